import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # cuda_rig is a plain module


@pytest.fixture(scope="session", params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def built_rig(request, tmp_path_factory):
    from cuda_rig import make_rig

    return make_rig(request.param, tmp_path_factory.mktemp("cuda"))


@pytest.fixture
def rig(built_rig):
    """The CUDA kernels on the emulator, and on a GPU where there is one."""
    yield built_rig
    if built_rig.emulated:
        built_rig.pretend()
