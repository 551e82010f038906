"""The GPU benchmarks run on the CPU, so that errors show before they need a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgefed.kernels.dispatch import why_not_native

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.skipif(why_not_native() is not None, reason=f"a rehearsal runs the native kernels: {why_not_native()}")
@pytest.mark.full
@pytest.mark.parametrize(
    ("script", "cases"),
    [
        ("bench_masked_experts.py", {"nf4-1", "int8-20", "bf16-20", "train-3-trainable-5-nf4", "train-8-nf4-lora"}),
        ("bench_quantize.py", {"float32", "bfloat16", "float16"}),
        ("bench_router_statistics.py", None),
    ],
)
def test_every_case_runs(tmp_path, script, cases):
    if not (BENCHMARKS / script).is_file():
        pytest.skip("the benchmarks are not beside the tests")
    target = tmp_path / "rows.json"
    command = [sys.executable, script, "--rehearse", "--repetitions", "1", "--threads", "1", "--json", str(target)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("EDGEFED_")}
    result = subprocess.run(command, cwd=BENCHMARKS, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = json.loads(target.read_text())
    assert "the numbers mean nothing" in rows["rehearsal"]
    found = rows["cases"]
    if cases is None:
        assert found
        assert all(case["us"]["native"] > 0 and case["us"]["reference"] > 0 for case in found)
    else:
        assert cases <= set(found)
    if script == "bench_masked_experts.py":
        for case in found.values():
            assert case["ms"]["edgefed-native"] > 0
            assert case["limit_ms"] > 0
            assert {"host_ms", "host_waits", "peak_mib", "share_of_limit"} <= set(case)
        assert {"grouped_mm", "eager"} <= set(found["bf16-20"]["ms"])
