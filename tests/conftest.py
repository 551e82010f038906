"""For every test: one thread for torch, a working directory of its own, and the split into default and full tests.

The tensors are tiny; several OpenMP threads only wait for each other, many times longer on a busy machine.
"""

import atexit
import importlib.util
import os
import shutil
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import psutil
import pytest

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["EDGEFED_CACHE"] = tempfile.mkdtemp(prefix="edgefed-test-cache-")  # nothing is proved in it
atexit.register(shutil.rmtree, os.environ["EDGEFED_CACHE"], ignore_errors=True)
sys.path.insert(0, str(Path(__file__).parent))  # warm_process, warm_imports
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))  # merge_error, pretrain_tiny

DEFAULT_FAMILIES = {"olmoe", "deepseek_v3", "gpt_oss"}
"""Model families of a default run: softmax routers, sigmoid routers with a bias, transposed weights with biases.
A test that has more than `MOST_FAMILIES` families runs on the others with `-m full`."""
MOST_FAMILIES = 3
FULL_FIXTURES = {"built_rig": "emulated"}
"""Fixture -> parameter that marks a test `full`: the emulator needs a minute to compile."""

SLOW_FILES = {
    "simulation/test_simulate.py": ("test_a_fleet_learns", "test_two_simulations_are_equal"),
    "simulation/test_flux_federation.py": (),
    "simulation/test_text_federation.py": (),
    "simulation/test_personal_federation.py": (),
    "trainer/test_memory_guard.py": ("test_fewer_experts_after", "test_a_smaller_budget", "test_what_a_half_done"),
    "doctor/test_diagnosis.py": ("test_quick_runs_no_kernel",),
    "cli/test_doctor.py": ("test_a_healthy_machine", "test_json_is_one_document"),
    "training/test_calibration.py": ("test_one_step_of_one_plan_corrects_all_plans[mixtral-float32-full-auto]",),
}
"""File whose tests take seconds each -> those that a default run keeps; the others are `full`."""
SLOW_TESTS = (
    "trainer/test_offloading.py::test_a_round_under_a_real_limit",
    "cli/test_cli.py::test_a_wrong_model_path",
    "cli/test_cli.py::test_a_closed_pipe",
    "cli/test_cli.py::test_flags_of_a_run_of_text",
    "api/test_api.py::test_a_method_of_ones_own_in_a_simulation",
    "costs/test_fallbacks.py::test_whatever_the_model",
)
"""Single tests that are `full` for their time."""


WORKER_BYTES = 3 << 30
"""What a worker and the processes that its tests start take at most."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """Two workers a core for the default tests if memory allows: many of them wait for processes that they started."""
    if config.getoption("markexpr") != "not full and not gpu":
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 2 * cores if psutil.virtual_memory().available >= 2 * cores * WORKER_BYTES else None


def _is_slow(nodeid: str) -> bool:
    place = nodeid.removeprefix("tests/")
    file, _, name = place.partition("::")
    if file in SLOW_FILES and not any(name.startswith(kept) for kept in SLOW_FILES[file]):
        return True
    return place.startswith(SLOW_TESTS)


def _families() -> set[str]:
    spec = importlib.util.spec_from_file_location("toy_families", Path(__file__).parent / "moe" / "toy_models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {*module.FAMILIES, *module.MORE_FAMILIES}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as `full` what a default run leaves out."""
    known = _families()
    by_test: dict[str, list[tuple[pytest.Item, str]]] = defaultdict(list)
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if _is_slow(item.nodeid) or any(params.get(fixture) == value for fixture, value in FULL_FIXTURES.items()):
            item.add_marker("full")
        for value in params.values():
            if isinstance(value, str) and value in known:
                by_test[item.nodeid.partition("[")[0]].append((item, value))
    for found in by_test.values():
        if len({family for _, family in found}) > MOST_FAMILIES:
            for item, family in found:
                if family not in DEFAULT_FAMILIES:
                    item.add_marker("full")


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
    """Run in an empty folder.

    `python -m edgefed` takes a package of its working directory first: in a checkout its sources, which have no native
    kernels, and not the installed package that the tests import.
    """
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("work"))
    yield
    os.chdir(before)


@pytest.fixture
def registry():
    """The registry of methods, which is as before after the test: other files list every method in it."""
    from edgefed.methods.registry import METHODS

    before = dict(METHODS)
    yield METHODS
    METHODS.clear()
    METHODS.update(before)
