"""Registers, spills and shared memory of the CUDA kernels on each GPU, as ptxas reports them. Needs nvcc, no GPU."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = sorted((Path(__file__).parents[2] / "csrc").glob("cuda_*.cu"))
SHARED_LIMIT = 48 << 10
"""Bytes of shared memory that a block may have everywhere without asking for more (CUDA programming guide)."""
REGISTERS_OF_MULTIPROCESSOR = 65536
_ARCHS = (75, 80, 86, 87, 89, 90, 100, 110, 120)
_ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(.*)")
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclasses.dataclass(frozen=True)
class Resources:
    """One kernel on one GPU. ``stack`` and ``spilled`` are bytes of a thread, ``shared`` bytes of a block."""

    source: str
    kernel: str
    arch: int
    registers: int
    stack: int
    spilled: int
    shared: int


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    return shutil.which("nvcc") or shutil.which(os.path.join(home, "bin", "nvcc"))


def nvcc_version(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V(\d+\.\d+\.\d+)", text).group(1)


def known_archs(nvcc: str) -> list[int]:
    """Those that setup.py builds for and this nvcc knows."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    return [arch for arch in _ARCHS if f"compute_{arch}" in listed]


def kernel_name(symbol: str) -> str:
    """The kernel's own name and template arguments: rows_kernel<16, bfloat16>."""
    tool = shutil.which("c++filt")
    if tool is None:
        return symbol
    name = subprocess.run([tool, symbol], capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"\(anonymous namespace\)::|edgefed::|__nv_|__|^void |\((int|bool)\)", "", name)
    depth = 0
    for at, letter in enumerate(name):  # up to the parameter list
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:at]
    return name


def compile_report(nvcc: str, source: Path, archs: list[int]) -> list[Resources]:
    """Compile one file for the GPUs given and read what ptxas says."""
    code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-std=c++17", "-O3", "-Xptxas", "-v", *code, "-c", str(source), "-o", f"{folder}/object"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{source.name} does not compile:\n{done.stderr}")
    found, entry, spills = [], None, None
    for line in done.stderr.splitlines():
        if match := _ENTRY.search(line):
            entry, spills = match, None
        elif match := _SPILLS.search(line):
            spills = match
        elif (match := _USED.search(line)) and entry and spills:
            shared = _SHARED.search(match.group(2))
            found.append(
                Resources(
                    source.name, kernel_name(entry.group(1)), int(entry.group(2)), int(match.group(1)),
                    int(spills.group(1)), int(spills.group(2)) + int(spills.group(3)),
                    int(shared.group(1)) if shared else 0,
                )
            )  # fmt: skip
            entry = None
    return found


def report(nvcc: str, archs: list[int]) -> list[Resources]:
    """All kernels of all files."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = pool.map(lambda source: compile_report(nvcc, source, archs), SOURCES)
        return sorted((row for part in parts for row in part), key=lambda row: (row.source, row.kernel, row.arch))


# --- the recorded table: a line for each kernel, with lists over the GPUs ------------------------------------------

_LISTS = ("registers", "stack", "spilled", "shared")


def write_table(path: Path, facts: dict, archs: list[int], rows: list[Resources]) -> None:
    """Record ``rows``, which must have every kernel for every GPU."""
    found = {(row.source, row.kernel, row.arch): row for row in rows}
    lines = []
    for source, kernel in sorted({(row.source, row.kernel) for row in rows}):
        own = [found[source, kernel, arch] for arch in archs]
        lists = {name: [getattr(row, name) for row in own] for name in _LISTS}
        lines.append(json.dumps({"source": source, "kernel": kernel, **lists}))
    head = json.dumps({**facts, "archs": archs, "kernels": []}, indent=1).removesuffix("[]\n}")
    path.write_text(head + "[\n" + ",\n".join(lines) + "\n]}\n", encoding="utf-8")


def read_table(path: Path) -> tuple[dict, list[Resources]]:
    """Its facts, and the rows sorted as `report` does."""
    table = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        Resources(entry["source"], entry["kernel"], arch, *(entry[name][at] for name in _LISTS))
        for entry in table["kernels"]
        for at, arch in enumerate(table["archs"])
    ]
    return table, sorted(rows, key=lambda row: (row.source, row.kernel, row.arch))
