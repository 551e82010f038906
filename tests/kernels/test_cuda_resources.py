"""The CUDA kernels compile for the supported GPUs, without spills, with the resources of the recorded table."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from cuda_resources import (
    REGISTERS_OF_MULTIPROCESSOR,
    SHARED_LIMIT,
    SOURCES,
    find_nvcc,
    known_archs,
    nvcc_version,
    read_table,
    report,
)

RECORDED = Path(__file__).parents[2] / "benchmarks" / "results" / "cuda_resources.json"
SAMPLE = [75, 87]  # what these kernels are for; `benchmarks/report_cuda_resources.py` does all


@pytest.fixture(scope="module")
def compiled():
    nvcc = find_nvcc()
    if nvcc is None or not SOURCES:
        pytest.skip("no nvcc, or no sources, to compile the CUDA kernels with")
    archs = [arch for arch in SAMPLE if arch in known_archs(nvcc)]
    if not archs:
        pytest.skip(f"this nvcc knows none of {SAMPLE}")
    return nvcc, archs, report(nvcc, archs)


@pytest.fixture(scope="module")
def recorded():
    return read_table(RECORDED)


def check(rows):
    assert not [row for row in rows if row.stack or row.spilled]
    assert not [row for row in rows if row.shared > SHARED_LIMIT]
    # Two blocks of 256 threads, or four of 128, fit into the registers of a multiprocessor; on two GPUs three of 128.
    threads = {75: 384, 120: 384}
    assert not [row for row in rows if row.registers * threads.get(row.arch, 512) > REGISTERS_OF_MULTIPROCESSOR]


@pytest.mark.full
def test_no_kernel_spills_or_exceeds_the_shared_memory(compiled):
    _, archs, rows = compiled
    check(rows)
    per_arch = Counter(row.arch for row in rows)
    assert set(per_arch) == set(archs)
    assert len(set(per_arch.values())) == 1
    assert {row.source for row in rows} == {source.name for source in SOURCES}


def test_the_recorded_table_is_complete_and_free_of_spills(recorded):
    table, rows = recorded
    check(rows)
    assert {row.arch for row in rows} == set(table["archs"]) >= {75, 80, 86, 87, 89, 90, 120}
    assert len(rows) == len({(row.kernel, row.source) for row in rows}) * len(table["archs"])


def test_the_recorded_table_matches_the_sources(compiled, recorded):
    nvcc, archs, rows = compiled
    table, recorded_rows = recorded
    if nvcc_version(nvcc) != table["nvcc"]:
        pytest.skip(f"recorded with nvcc {table['nvcc']}, here is {nvcc_version(nvcc)}")
    assert [row for row in recorded_rows if row.arch in archs] == rows
