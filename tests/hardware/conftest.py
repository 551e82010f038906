"""A stand-in machine for every test that wants one. Its module is loaded by path: tests are no package."""

import importlib.util
import sys
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("edgefed_fake_machine", Path(__file__).with_name("fake_machine.py"))
_module = importlib.util.module_from_spec(_spec)
sys.modules["edgefed_fake_machine"] = _module
_spec.loader.exec_module(_module)


@pytest.fixture(scope="session")
def fake_drivers(tmp_path_factory):
    """The fake driver of today, and the one of 2020."""
    new, old = (tmp_path_factory.mktemp(name) for name in ("driver", "old_driver"))
    return {"new": _module.build_driver(new), "old": _module.build_driver(old, "-DOLD_DRIVER")}


@pytest.fixture
def machine(tmp_path, monkeypatch, fake_drivers):
    """A desktop without a GPU; give it a driver and files."""
    for name in ("WSL_DISTRO_NAME", "container", "KUBERNETES_SERVICE_HOST", "CUDA_VISIBLE_DEVICES", "EDGEFED_SYSROOT"):
        monkeypatch.delenv(name, raising=False)
    return _module.Machine(tmp_path, monkeypatch, fake_drivers)


@pytest.fixture
def plain_machine(tmp_path, monkeypatch):
    """The same without a compiler's help: files only."""
    for name in ("WSL_DISTRO_NAME", "container", "KUBERNETES_SERVICE_HOST", "CUDA_VISIBLE_DEVICES", "EDGEFED_SYSROOT"):
        monkeypatch.delenv(name, raising=False)
    return _module.Machine(tmp_path, monkeypatch, {})
