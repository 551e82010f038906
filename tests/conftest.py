"""For every test: one thread for torch, here and in the processes that a test starts, and no checkout underfoot.

The tensors are tiny; several OpenMP threads only wait for each other, many times longer on a busy machine.
"""

import os

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def agents_of_their_own(tmp_path_factory):
    """Agents of this session share the memory among themselves, not with agents that somebody else runs here."""
    os.environ["EDGEFED_AGENTS"] = str(tmp_path_factory.mktemp("agents"))


@pytest.fixture(scope="session", autouse=True)
def outside_the_checkout(tmp_path_factory):
    """`python -m edgefed` takes a package of its working directory first: in a checkout its sources, which have no
    native kernels, and not the installed package that the tests import.
    """
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("work"))
    yield
    os.chdir(before)
