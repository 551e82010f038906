"""Compile the CUDA kernels for every GPU that they are built for and record registers, spills and shared memory.

python benchmarks/report_cuda_resources.py        (needs nvcc, no GPU; about a minute on two cores)
"""

from __future__ import annotations

import sys
from pathlib import Path

from provenance import provenance

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "kernels"))

from cuda_resources import find_nvcc, known_archs, nvcc_version, report, write_table  # noqa: E402


def main() -> int:
    nvcc = find_nvcc()
    if nvcc is None:
        print("no nvcc in PATH, CUDA_HOME or /usr/local/cuda", file=sys.stderr)
        return 1
    archs = known_archs(nvcc)
    rows = report(nvcc, archs)
    path = ROOT / "benchmarks" / "results" / "cuda_resources.json"
    write_table(path, {"provenance": provenance(), "nvcc": nvcc_version(nvcc)}, archs, rows)
    print(f"{'kernel':64} " + " ".join(f"sm_{arch:<4}" for arch in archs) + "  registers / shared bytes")
    for kernel in sorted({(row.source, row.kernel) for row in rows}):
        own = {row.arch: row for row in rows if (row.source, row.kernel) == kernel}
        print(
            f"{kernel[1]:64} " + " ".join(f"{own[arch].registers:<7}" for arch in archs),
            max(own[arch].shared for arch in archs),
        )
    spills = sum(1 for row in rows if row.stack or row.spilled)
    print(f"{len(rows)} kernels compiled, {spills} with spills")
    return 0


if __name__ == "__main__":
    sys.exit(main())
