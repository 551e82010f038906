"""Compile a Triton kernel for a GPU that this machine does not have; read registers, spills and shared memory.

Works in a process without TRITON_INTERPRET, with a CPU build of torch. The tools come with Triton's wheel.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import tempfile
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_source

from edgefed.triton_kernels import (
    combine,
    gate,
    grouped_matmul,
    grouped_outer,
    neuron_energy,
    quantize,
    router_statistics,
    sort_pairs,
)

SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 87: 163 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}
"""Bytes of shared memory that one block may have, by compute capability (CUDA programming guide, table of limits)."""


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs. ``stack`` > 0 or ``local`` > 0 bytes per thread means that registers spill."""

    registers: int
    stack: int
    local: int
    shared: int
    tensor_core_instructions: int


def compile_kernel(kernel, signature: dict, constants: dict, capability: int, warps: int, stages: int) -> Resources:
    """Compile ``kernel`` (a triton.jit function) for sm_``capability``.

    ``signature`` gives the type of each argument that is not a constant ("*bf16", "i32", "fp32"); pointers are taken to
    be 16-byte aligned, as torch's allocator guarantees.
    """
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if name not in constants and signature[name].startswith("*")
        },
    )
    target = GPUTarget("cuda", capability, 32)
    compiled = compile_source(source, target=target, options={"num_warps": warps, "num_stages": stages})
    return resources_of(compiled)


def resources_of(compiled: triton.compiler.CompiledKernel) -> Resources:
    """What a compiled kernel needs."""
    registers, stack, local = _usage(compiled.asm["cubin"])
    mma = len(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", compiled.asm["ptx"]))
    return Resources(registers, stack, local, compiled.metadata.shared, mma)


def _usage(cubin: bytes) -> tuple[int, int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", listing)
    if found is None:
        raise RuntimeError(f"cuobjdump named no resources: {listing[:300]}")
    return tuple(int(number) for number in found.groups())


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way a kernel is launched: what it is called in the report, and how it is compiled."""

    label: str
    kernel: object
    signature: dict
    constants: dict
    warps: int
    stages: int
    has_products: bool  # tensor-core instructions are expected

    def compile(self, capability: int) -> Resources:
        return compile_kernel(self.kernel, self.signature, self.constants, capability, self.warps, self.stages)


_TYPES = {"bf16": (tl.bfloat16, 2), "fp16": (tl.float16, 2), "fp32": (tl.float32, 4)}
_ROWS = (16, 64, 128)
_OFFSETS = {name: "*i64" for name in ("weight_offset", "absmax_offset", "bias_offset", "factor_offset")}
_INTEGERS = {
    name: "*i32"
    for name in ("order", "offsets", "tile_slot", "tile_row", "slot_group", "slot_ids", "position", "counts")
}


def matmul_variants(capability: int) -> list[Variant]:
    """grouped_matmul for an OLMoE layer (H 2048, I 1024) in every format, direction and tile, with a LoRA of rank 16.

    float32 products are "exact" (no tensor cores) or "tf32", as torch.set_float32_matmul_precision asks.
    """
    found = []
    for format, code in grouped_matmul.FORMATS.items():
        types = (("bf16", "tf32"), ("fp16", "tf32"), ("fp32", "ieee"), ("fp32", "tf32"))
        for dtype, precision in types if format == "plain" else (types[0], types[2]):
            for last, gated in ((True, True), (True, False), (False, False)):
                for rows in _ROWS if dtype != "fp32" else _ROWS[:2]:
                    n, k = (1024, 2048) if last else (2048, 1024)
                    config = grouped_matmul.matmul_config(
                        rows, format, last, gated, n, _TYPES[dtype][1], divmod(capability, 10)
                    )
                    kind = "gated" if gated else "forward" if last else "backward"
                    exact = " exact" if precision == "ieee" else " tf32" if dtype == "fp32" else ""
                    found.append(
                        _matmul_variant(
                            f"grouped_matmul {format} {dtype}{exact} {kind}", code, dtype, precision, config, n, k,
                            LAST=last, GATED=gated, SPLIT_IN=format == "nf4" and last,
                            SPLIT_OUT=format == "nf4" and gated,
                        )
                    )  # fmt: skip
    config = grouped_matmul.matmul_config(64, "plain", True, False, 16, 2, divmod(capability, 10))
    found.append(
        _matmul_variant("grouped_matmul plain bf16 adapter of nf4", 0, "bf16", "tf32", config, 16, 1024, LAST=True,
                        GATED=False, SPLIT_IN=True, SPLIT_OUT=False, RANK=0)
    )  # fmt: skip
    return found


def _matmul_variant(label, format, dtype, precision, config, n, k, **constants) -> Variant:
    compute, pointer = _TYPES[dtype][0], f"*{dtype}"
    signature = _INTEGERS | _OFFSETS | {
        "a": pointer, "out": pointer, "weight": (pointer, "*u8", "*i8")[format], "absmax": "*fp32", "bias": pointer,
        "table": "*fp32", "low": pointer, "factor": "*fp32", "row_scale": "*fp32", "scale": "fp32",
        "num_tiles": "i32", "group": "i32",
    }  # fmt: skip
    constants = {
        "N": n, "K": k, "TOP_K": 8, "FORMAT": format, "HAS_BIAS": True, "RANK": 16, "RANK_LAST": constants["LAST"],
        "HAS_ROW_SCALE": True, "BLOCKSIZE": 64, "ALIGNED": True, "COMPUTE": compute, "PRECISION": precision,
        "RANK_PADDED": 16, "BM": config.rows, "BN": config.columns, "BK": config.depth, "GROUP_M": 8,
    } | constants  # fmt: skip
    label += f" {config.rows}x{config.columns}x{config.depth}"
    return Variant(
        label, grouped_matmul.grouped_matmul_kernel, signature, constants, config.warps, config.stages,
        precision != "ieee",
    )  # fmt: skip


def outer_variants() -> list[Variant]:
    """grouped_outer for the weights and the adapters of an OLMoE layer."""
    found = []
    for dtype, precision in (("bf16", "tf32"), ("fp32", "ieee"), ("fp32", "tf32")):
        shapes = [(2048, 2048, rows) for rows in _ROWS] + [(2048, 16, 64), (16, 2048, 64)]
        for n1, n2, rows in shapes:
            config = grouped_outer.outer_config(n1, n2, rows, _TYPES[dtype][1])
            constants = {
                "N1": n1, "N2": n2, "LEFT_TOP_K": 0, "RIGHT_TOP_K": 8, "COMPUTE": _TYPES[dtype][0],
                "PRECISION": precision, "B1": config.rows, "B2": config.columns, "BR": config.depth,
            }  # fmt: skip
            out = "*fp32" if min(n1, n2) == 16 else f"*{dtype}"
            signature = _INTEGERS | {"left": f"*{dtype}", "right": f"*{dtype}", "out": out}
            exact = " exact" if precision == "ieee" else " tf32" if dtype == "fp32" else ""
            label = f"grouped_outer {dtype}{exact} {config.rows}x{config.columns}x{config.depth}"
            found.append(
                Variant(
                    label, grouped_outer.grouped_outer_kernel, signature, constants, config.warps, config.stages,
                    precision != "ieee",
                )
            )  # fmt: skip
    return list({variant.label: variant for variant in found}.values())


def other_variants() -> list[Variant]:
    """The kernels without matrix products, at the sizes of OLMoE (E 64, K 8, H 2048, I 1024) and of 512 experts."""
    found = []

    def add(label, kernel, signature, constants, warps=4):
        found.append(Variant(label, kernel, _INTEGERS | signature, constants, warps, 3, False))

    for slots, block in ((64, 128), (512, 16)):
        common = {"S": slots, "SP": slots}
        pairs = {"slots": "*i64", "num_pairs": "i32"}
        add(f"count_pairs S{slots}", sort_pairs.count_pairs_kernel, pairs, common | {"BLOCK": block})
        add(f"place_pairs S{slots}", sort_pairs.place_pairs_kernel, pairs, common | {"BLOCK": block})
        add(
            f"schedule_tiles S{slots}",
            sort_pairs.schedule_tiles_kernel,
            {"num_blocks": "i32", "max_tiles": "i32"},
            common
            | {"BM": 64, "ROWS": sort_pairs.MAX_COUNTS // slots, "TILES": min(sort_pairs.MAX_COUNTS // slots, 64)},
        )
        add(
            f"router_statistics softmax E{slots}",
            router_statistics.router_statistics_kernel,
            {name: "*fp32" for name in ("scores", "weights", "received", "partials")}
            | {"indices": "*i64", "num_tokens": "i32"},
            {
                "E": slots,
                "EP": slots,
                "K": 8,
                "KIND": 1,
                "ROWS": 7,
                "BT": max(min(router_statistics.MAX_TILE // slots, 32), 1),
            },
        )
    add(
        "add_partials E64",
        router_statistics.add_partials_kernel,
        {"partials": "*fp32", "statistics": "*fp64", "num_programs": "i32"},
        {"E": 64, "ROWS": 7, "BE": 64},
        warps=2,
    )
    names = ("rows", "out", "grad", "rows_grad", "gate_up", "gate_up_grad", "hidden", "hidden_grad")
    rows = {name: "*bf16" for name in names} | {"slots": "*i64", "slot_is_split": "*i32"}
    rows |= {"expert_weights": "*fp32", "weight_grad": "*fp32"}
    add("combine", combine.combine_kernel, rows, {"TOP_K": 8, "N": 2048, "WEIGHTED": True, "BN": 1024})
    add("combine_backward", combine.combine_backward_kernel, rows, {"TOP_K": 8, "N": 2048, "BN": 1024})
    add("swiglu_backward", gate.swiglu_backward_kernel, rows, {"NUM_SLOTS": 64, "WIDTH": 1024, "BI": 1024})
    add("swiglu", gate.swiglu_kernel, rows, {"NUM_SLOTS": 64, "WIDTH": 1024, "BI": 1024})
    add("column_sums", grouped_outer.column_sums_kernel, rows, {"N": 2048, "BN": 64, "BR": 32})
    for format, code in grouped_matmul.FORMATS.items():
        sums = rows | _OFFSETS | {"energy": "*fp32", "energy_offset": "*i64", "absmax": "*fp32", "table": "*fp32"}
        sums["group"] = "i32"
        sums["weight"] = ("*bf16", "*u8", "*i8")[code]
        constants = {
            "I": 1024, "H": 2048, "FORMAT": code, "TRANSPOSED": False, "SPLIT": format == "nf4", "BLOCKSIZE": 64,
            "COMPUTE": tl.bfloat16, "BI": neuron_energy.NEURONS, "BR": neuron_energy.ROWS, "BH": neuron_energy.DEPTH,
        }  # fmt: skip
        add(f"neuron_energy {format}", neuron_energy.neuron_energy_kernel, sums, constants)
    stored = {"values": "*bf16", "absmax": "*fp32", "table": "*fp32", "num_blocks": "i32"}
    blocks = {"BLOCKSIZE": 64, "BLOCKS": quantize.VALUES_PER_PROGRAM // 64}
    add("quantize nf4", quantize.quantize_nf4_kernel, stored | {"packed": "*u8"}, blocks)
    add("dequantize nf4", quantize.dequantize_nf4_kernel, stored | {"packed": "*u8"}, blocks)
    columns = {"COLUMNS": 2048, "BC": 2048}
    add("quantize int8", quantize.quantize_int8_kernel, stored | {"packed": "*i8"}, columns)
    add("dequantize int8", quantize.dequantize_int8_kernel, stored | {"packed": "*i8"}, columns)
    return found


def all_variants(capability: int) -> list[Variant]:
    """Every kernel in every form that `edgefed.triton_kernels` launches on a device of that compute capability."""
    return matmul_variants(capability) + outer_variants() + other_variants()
