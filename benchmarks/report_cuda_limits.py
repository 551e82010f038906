"""Share of the roofline that the CUDA products can reach on GPUs that are not here, computed from the disassembly.

python benchmarks/report_cuda_limits.py        (needs nvcc and cuobjdump, no GPU; a minute on two cores)

An upper bound. Counted are the instructions of the loops along the sum: one a cycle for each quarter of a
multiprocessor, tensor-core instructions at the rate of the data sheet, and shared memory at 128 bytes a cycle. Not
counted are latencies, the ends of loops, cache misses of activations, and the small kernels of a layer. The roofline is
the time of the packed weights and rows at the memory's bandwidth, or of the products at the rate of the tensor cores,
whichever is longer. Every expert gets the same number of tokens.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from provenance import provenance

from edgefed.hardware.profiles import find_profile

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "kernels"))

from cuda_resources import find_nvcc, kernel_name, nvcc_version  # noqa: E402

ARCH = 86
"""The code of 8.6 stands for that of 8.7 and 8.9: same instructions, and the same registers in cuda_resources.json."""
GPUS = {"rtx-3060-12gb": (28, 512), "rtx-4090": (128, 512), "jetson-orin-nano-8gb": (8, 2048)}
"""Profile -> multiprocessors, and bf16 operations of tensor cores a cycle in each of these."""
LAYERS = {"OLMoE-1B-7B": (2048, 1024, 64, 8), "Qwen3-30B-A3B": (2048, 768, 128, 8)}
"""Hidden size, width, experts, top-k."""
TOKENS = (1, 16, 64, 512, 4096)
BYTES_PER_WEIGHT = {"nf4": 0.5 + 4 / 64, "bfloat16": 2.0}
FORMAT = {"nf4": 16, "bfloat16": 3}
TILE_ROWS, ROWS = (16, 32, 64), (1, 2, 4)
TILES_FROM = 5
_LINE = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(@!?U?P\w+ )?([A-Z0-9_.]+)([^;]*);")
_PIPED = ("LDS", "STS", "LDG", "LDGSTS", "LD")
"""Instructions of a multiprocessor's memory pipe besides LDSM: a cycle for each 128 bytes that a warp moves."""


def loops_of(object_file: Path) -> dict[str, list[list[str]]]:
    """The instructions of each loop of each kernel, in order."""
    tool = shutil.which("cuobjdump")
    if tool is None:
        raise SystemExit("no cuobjdump in PATH; it comes with the CUDA toolkit, and with Triton (backends/nvidia/bin)")
    text = subprocess.run([tool, "-sass", str(object_file)], capture_output=True, text=True, check=True).stdout
    found = {}
    for part in text.split("Function : ")[1:]:
        code = [
            (int(at, 16), "NOP" if condition == "@!PT " else name, rest)
            for at, condition, name, rest in _LINE.findall(part)
        ]
        loops = []
        for at, name, rest in code:
            target = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
            if target and int(target.group(1), 16) < at:
                begin = int(target.group(1), 16)
                loops.append([other for place, other, _ in code if begin <= place <= at])
        found[kernel_name(part.split("\n")[0].strip())] = loops
    return found


def compile_loops(nvcc: str, folder: Path) -> dict[str, list[list[str]]]:
    found = {}
    for source in ("cuda_matmul_tiles.cu", "cuda_matmul_rows.cu"):
        target = folder / f"{source}.o"
        flags = ["-std=c++17", "-O3", f"-gencode=arch=compute_{ARCH},code=sm_{ARCH}"]
        subprocess.run([nvcc, *flags, "-c", str(ROOT / "csrc" / source), "-o", str(target)], check=True)
        found |= loops_of(target)
    return found


def count(loop: list[str], *names: str) -> int:
    return sum(instruction.split(".")[0] in names for instruction in loop)


def memory_cycles(loop: list[str]) -> int:
    """Cycles of the memory pipe for a warp in each quarter of a multiprocessor."""
    cycles = 0
    for name, *suffixes in (instruction.split(".") for instruction in loop):
        if name == "LDSM":
            cycles += 4
        elif name in _PIPED:  # 4 bytes a lane unless the name says 8 or 16
            cycles += 4 if "128" in suffixes else 2 if "64" in suffixes else 1
    return 4 * cycles


def tile_cycles(loops: dict, storage: str, rows: int, operations: int) -> tuple[float, int]:
    """Cycles of a block for a step along the sum, and the values of a step."""
    name = f"tiles_kernel<{FORMAT[storage]}, bfloat16, false, {rows}>"
    loop = next(loop for loop in loops[name] if count(loop, "HMMA"))
    tensor = count(loop, "HMMA") * 2 * 16 * 8 * 16 / (operations / 4)
    depth = 32 if rows == 64 else 64
    return max(len(loop), tensor, memory_cycles(loop)), depth


def rows_cycles(loops: dict, storage: str, rows: int) -> tuple[float, int]:
    """Cycles of a warp for an iteration, and the values of a column in it."""
    name = f"rows_kernel<{FORMAT[storage]}, bfloat16>"
    decode = {"nf4": 32, "bfloat16": 8}[storage]
    products = sorted((loop for loop in loops[name] if count(loop, "FFMA") >= 2 * decode), key=len)
    loop = products[ROWS.index(rows)]
    return max(len(loop), memory_cycles(loop)), 32 * decode


def seconds(loops: dict, gpu: tuple[int, int], figures: dict, product: tuple, storage: str, kernel: str) -> float:
    """Time of a product: (experts with tokens, rows of each, outputs, inputs)."""
    experts, rows, n, k = product
    processors, operations = gpu
    clock = figures["flops"] / (processors * operations)
    if kernel == "rows":
        size = 4
        tiles = math.ceil(rows / size)
        own = min(size, 1 << (min(rows, size) - 1).bit_length())
        cycles, values = rows_cycles(loops, storage, own)
        busy = experts * tiles * math.ceil(n / 2) * math.ceil(k / values) * cycles / 4
    else:
        size = 16 if rows <= 16 else 32 if rows <= 48 else 64
        cycles, depth = tile_cycles(loops, storage, size, operations)
        busy = experts * math.ceil(rows / size) * math.ceil(n / 64) * math.ceil(k / depth) * cycles
    return max(busy / processors / clock, moved(product, storage) / figures["bandwidth"])


def moved(product: tuple, storage: str) -> float:
    experts, rows, n, k = product
    return experts * (n * k * BYTES_PER_WEIGHT[storage] + rows * (n + k) * 2)


def shares(loops: dict, gpu: tuple, figures: dict, layer: tuple, tokens: int, storage: str) -> dict[str, float]:
    hidden, width, experts, top_k = layer
    used = min(experts, tokens * top_k)
    rows = max(1, round(tokens * top_k / used))
    products = [(used, rows, 2 * width, hidden), (used, rows, hidden, width)]
    limit = sum(
        max(moved(each, storage) / figures["bandwidth"], 2 * math.prod(each) / figures["flops"]) for each in products
    )
    found = {
        kernel: limit / sum(seconds(loops, gpu, figures, each, storage, kernel) for each in products)
        for kernel in ("rows", "tiles")
    }
    chosen = "rows" if tokens * top_k < TILES_FROM * experts else "tiles"
    return {**{kernel: round(share, 2) for kernel, share in found.items()}, "chosen": round(found[chosen], 2)}


def main() -> int:
    nvcc = find_nvcc()
    if nvcc is None:
        print("no nvcc in PATH, CUDA_HOME or /usr/local/cuda", file=sys.stderr)
        return 1
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        loops = compile_loops(nvcc, Path(folder))
    for name, gpu in GPUS.items():
        profile = find_profile(name)
        figures = {
            "bandwidth": profile.required("bandwidth") * 1e9,
            "flops": profile.required("bf16_tflops") * 1e12,
        }
        for model, layer in LAYERS.items():
            for storage in BYTES_PER_WEIGHT:
                for tokens in TOKENS:
                    found = shares(loops, gpu, figures, layer, tokens, storage)
                    rows.append({"gpu": name, "model": model, "storage": storage, "tokens": tokens, **found})
                    print(f"{name:22} {model:14} {storage:9} T={tokens:<5} {found}")
    path = ROOT / "benchmarks" / "results" / "cuda_limits.json"
    lines = ",\n".join(json.dumps(row) for row in rows)
    head = json.dumps({"provenance": provenance(), "nvcc": nvcc_version(nvcc), "rows": []}, indent=1)
    path.write_text(head.removesuffix("[]\n}") + "[\n" + lines + "\n]}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
