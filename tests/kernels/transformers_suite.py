"""Run transformers' own model tests with edgefed's experts, and print the tests that fail only with them.

    git clone --depth 1 --branch v5.23.0 https://github.com/huggingface/transformers
    python tests/kernels/transformers_suite.py transformers            OLMoE, Mixtral and Qwen3-MoE
    python tests/kernels/transformers_suite.py transformers tests/models/gpt_oss -k "not flash"

The checkout is of the installed version and needs what its tests need (``parameterized``). The tests run twice in
processes of their own: as they are, and with "edgefed" in place of the implementation that a model takes by default,
once with each backend that can run on this machine's CPU. Ends with 1 when a test fails with edgefed only, and when
edgefed's experts were never called.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

FOLDERS = ("tests/models/olmoe", "tests/models/mixtral", "tests/models/qwen3_moe")
CALLS = "EDGEFED_SUITE_CALLS"
"""Environment variable: the file that the plugin writes the number of calls to."""


# --- the plugin: this file, loaded by pytest in the processes that run the suite -------------------------------------

_calls = 0


def pytest_configure(config: object) -> None:
    """Make "edgefed" the experts implementation of models without a requested one."""
    if CALLS not in os.environ:
        return
    from transformers import PreTrainedModel

    from edgefed.moe import layer_runtime

    choose, compute = PreTrainedModel.get_correct_experts_implementation, layer_runtime.edgefed_experts

    def counted(*arguments, **keywords):
        global _calls
        _calls += 1
        return compute(*arguments, **keywords)

    def edgefed_by_default(model, requested):
        if requested is None and model._can_set_experts_implementation():
            requested = layer_runtime.IMPLEMENTATION
        return choose(model, requested)

    layer_runtime.edgefed_experts = counted
    layer_runtime.register_implementation()
    PreTrainedModel.get_correct_experts_implementation = edgefed_by_default


def pytest_unconfigure(config: object) -> None:
    if CALLS in os.environ:
        Path(os.environ[CALLS]).write_text(str(_calls), encoding="utf-8")


# --- the program ------------------------------------------------------------------------------------------------


def run(checkout: Path, arguments: list[str], backend: str | None) -> tuple[dict[str, str], int]:
    """Outcome of each test (passed, failed, skipped), and how often edgefed's experts were called."""
    with tempfile.TemporaryDirectory() as folder:
        report, calls = Path(folder) / "report.xml", Path(folder) / "calls"
        environment = os.environ | {
            "PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        }
        if backend is not None:
            environment |= {CALLS: str(calls), "EDGEFED_KERNELS": backend}
        command = [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", Path(__file__).stem,
            f"--junitxml={report}", *arguments,
        ]  # fmt: skip
        subprocess.run(command, cwd=checkout, env=environment, stdout=subprocess.DEVNULL, check=False)
        if not report.is_file():
            raise SystemExit(f"{' '.join(command)} wrote no report: run it in {checkout} to see why")
        outcomes = {}
        for case in ElementTree.parse(report).iter("testcase"):
            kinds = {child.tag for child in case}
            outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
            outcomes[f"{case.get('classname')}::{case.get('name')}"] = outcome
        return outcomes, int(calls.read_text()) if calls.is_file() else 0


def main(arguments: list[str]) -> int:
    from edgefed.kernels.dispatch import why_not_native

    checkout = Path(arguments[0]).resolve()
    chosen = arguments[1:] or [folder for folder in FOLDERS if (checkout / folder).is_dir()]
    plain, _ = run(checkout, chosen, None)
    print(f"as it is: {tally(plain)}", flush=True)
    worse = 0
    for backend in ("reference", *(["native"] if why_not_native() is None else [])):
        ours, calls = run(checkout, chosen, backend)
        print(f"with edgefed ({backend}, {calls} calls): {tally(ours)}", flush=True)
        lost = sorted(name for name, outcome in plain.items() if outcome == "passed" and ours.get(name) != "passed")
        for name in lost:
            print(f"  passes without edgefed, not with it: {name}", flush=True)
        worse += len(lost) + (calls == 0)
    return 1 if worse else 0


def tally(outcomes: dict[str, str]) -> str:
    return ", ".join(f"{list(outcomes.values()).count(kind)} {kind}" for kind in ("passed", "failed", "skipped"))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    raise SystemExit(main(sys.argv[1:]))
