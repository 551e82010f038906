"""Every Triton kernel compiles for every supported device, and fits: no spills, shared memory, tensor cores.

Nothing runs. A sample here; benchmarks/report_triton_resources.py compiles all of it into a table.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgefed.triton_kernels import availability

needs_triton = pytest.mark.skipif(
    availability.triton_version() is None, reason="triton is not installed: it is optional (pip install triton)"
)
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "report_triton_resources.py"
# The kernels that need most, each on a device with little of one resource: registers on 8.0, shared memory on 8.6 and
# 12.0, and the other tensor-core instructions of 9.0.
SAMPLE = {
    80: ["grouped_matmul nf4 bf16 gated 128", "grouped_matmul nf4 bf16 backward 64", "schedule_tiles S64"],
    86: ["grouped_matmul plain bf16 gated 128", "grouped_outer bf16 128", "quantize nf4", "dequantize nf4"],
    87: ["grouped_matmul nf4 bf16 gated 16", "swiglu_backward", "router_statistics softmax E64"],
    89: ["grouped_matmul int8 bf16 gated 64", "quantize nf4"],
    90: ["grouped_matmul plain bf16 forward 128", "grouped_matmul nf4 bf16 forward 128", "combine"],
    120: ["grouped_matmul plain fp32 exact gated 64", "grouped_matmul nf4 bf16 gated 128", "place_pairs S512"],
}


def report(*arguments: str) -> dict:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


@needs_triton
def test_a_sample_compiles_and_fits():
    arguments = [f"{capability}:{label}" for capability, labels in SAMPLE.items() for label in labels]
    rows = report("--only", *arguments)["rows"]
    assert len(rows) == len(arguments)
    for row in rows:
        assert row["fits"], row
        assert row["stack"] == row["local"] == 0, row
        assert row["shared"] <= row["shared_limit"], row
        assert row["tensor_core_instructions"] > 0 or not row["has_products"], row


@needs_triton
def test_a_layer_compiles_as_it_launches():
    """Compile forward and backward through Triton's JIT for a GPU that this machine does not have."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("triton_launches.py")), "90", "nf4"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = json.loads(result.stdout)
    names = [row["kernel"] for row in rows]
    assert names.count("grouped_matmul_kernel") == 5  # gated up, down, and backwards: up again, dh, dx
    assert {"place_pairs_kernel", "combine_kernel", "swiglu_backward_kernel"} <= set(names)
    assert all(row["stack"] == row["local"] == 0 for row in rows), rows
    products = [row for row in rows if row["kernel"] == "grouped_matmul_kernel"]
    assert all(row["tensor_core_instructions"] > 0 for row in products)


@needs_triton
def test_the_check_can_fail():
    """A tile with five stages in shared memory is more than 8.6 has, and the report says so."""
    (row,) = report("--only", "86:grouped_matmul plain bf16 forward 128", "--tile", "128,128,64,8,5")["rows"]
    assert row["fits"] is False
    assert row["shared"] > row["shared_limit"]


def test_the_recorded_table_is_complete_and_fits():
    table = json.loads((ROOT / "benchmarks" / "results" / "triton_resources.json").read_text())
    assert {row["capability"] for row in table["rows"]} == set(SAMPLE)
    assert all(row["fits"] for row in table["rows"])
    kernels = {row["label"].split()[0] for row in table["rows"]}
    assert kernels >= {label.split()[0] for labels in SAMPLE.values() for label in labels}


@needs_triton
def test_no_kernel_has_more_than_eight_configurations():
    from edgefed.triton_kernels.grouped_matmul import CONFIGS, matmul_config, rows_per_tile
    from edgefed.triton_kernels.grouped_outer import outer_config

    used = {
        matmul_config(rows_per_tile(pairs, 64, size), format, last, gated, n, size, capability)
        for pairs in (8, 4096, 32768)
        for size in (2, 4)
        for format in ("plain", "nf4", "int8")
        for last, gated in ((True, True), (True, False), (False, False))
        for n in (16, 4096)
        for capability in ((8, 0), (9, 0))
    }
    assert used == set(CONFIGS)
    assert len(used) <= 8
    outer = {
        outer_config(n1, n2, rows, size)
        for n1 in (8, 16, 32, 64, 2048)
        for n2 in (8, 16, 32, 64, 2048)
        for rows in (16, 64, 128)
        for size in (2, 4)
    }
    assert len(outer) <= 8
