"""What a training step stores all the time or until its end, exactly: weights, gradients, optimiser state. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from edgefed.moe.shapes import LayerShape, ModelShape
from edgefed.moe.step_setup import (
    ADAPTER_BYTES,
    BLOCKSIZE,
    CUBLAS_BYTES,
    DTYPE_BYTES,
    EIGHT_BIT_CODES,
    EIGHT_BIT_MIN_ELEMENTS,
    EIGHT_BIT_STATE,
    SCALE_BYTES,
    STORAGE_BYTES,
    UNPACKING_BYTES,
    StepSetup,
)


def expert_bytes(layer: LayerShape, setup: StepSetup, storage: str | None = None) -> float:
    """Bytes of one expert that does not train, with its adapter where the run has one."""
    stored = storage or setup.expert_storage or setup.dtype
    matrices = sum(_matrix_bytes(*sizes, stored, layer.is_transposed) for sizes in layer.expert_matrices)
    adapter = ADAPTER_BYTES * _adapter(layer.expert_matrices, setup) if setup.experts == "lora" else 0
    return matrices + sum(layer.expert_biases) * setup.width + adapter


def _matrix_bytes(size_in: int, size_out: int, storage: str, is_transposed: bool) -> float:
    """Bytes of one matrix of an expert, whose scales belong to rows (int8) or to blocks of 64 (nf4)."""
    size = size_in * size_out
    if storage == "int8":
        return size + SCALE_BYTES * (size_in if is_transposed else size_out)
    if storage == "nf4":
        return -(-size // 2) + SCALE_BYTES * -(-size // BLOCKSIZE)
    return size * STORAGE_BYTES[storage]


def _adapter(sizes: Sequence[tuple[int, int]], setup: StepSetup) -> int:
    return sum(setup.lora_rank * (size_in + size_out) for size_in, size_out in sizes)


def _state_bytes(setup: StepSetup, width: int, sizes: Sequence[int]) -> float:
    """Bytes that the optimiser keeps for tensors of these numbers of elements."""
    if setup.optimizer == "adamw":
        return sum(2 * width * size + 4 for size in sizes)  # a moment has its tensor's dtype; a float32 step counter
    if setup.optimizer == "paged_adamw_8bit" and setup.device == "cuda":
        return 0.0  # the driver moves them to the host
    return sum(
        EIGHT_BIT_STATE * size + EIGHT_BIT_CODES if size >= EIGHT_BIT_MIN_ELEMENTS else 8 * size for size in sizes
    )


def trained_tensors(layer: LayerShape, setup: StepSetup) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(elements, bytes of a number) of each trained tensor: of one tuned expert, and of the rest of the layer."""

    def adapters(sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        return [(setup.lora_rank * size, ADAPTER_BYTES) for pair in sizes for size in pair]

    expert: list[tuple[int, int]] = []
    if setup.experts == "full":
        expert = [(i * o, setup.width) for i, o in layer.expert_matrices]
        expert += [(size, setup.width) for size in layer.expert_biases]
    elif setup.experts == "lora":
        expert = adapters(layer.expert_matrices)
    rest: list[tuple[int, int]] = []
    for mode, matrices, vectors in (
        (setup.router, layer.router_matrices, layer.router_vectors),
        (setup.attention, layer.attention_matrices, ()),
    ):
        if mode == "full":
            rest += [(i * o, setup.width) for i, o in matrices]
            rest += [(size, setup.width) for size in vectors]
        elif mode == "lora":
            rest += adapters(matrices)
    return expert, rest


def gradient_bytes(shape: ModelShape, setup: StepSetup, tuned: Sequence[int], *, lasting: bool = False) -> list[int]:
    """Gradient bytes per layer, as its backward pass makes them; ``lasting``: without offloaded experts', which go."""
    sizes, counts = [], iter(tuned)
    for layer in shape.layers:
        expert, rest = trained_tensors(layer, setup)
        count = next(counts) if layer.num_experts else 0
        if lasting and setup.offload:
            count = 0
        sizes.append(count * sum(n * w for n, w in expert) + sum(n * w for n, w in rest))
    return sizes


def static_bytes(shape: ModelShape, setup: StepSetup, kept: Sequence[int], tuned: Sequence[int]) -> dict[str, int]:
    """Bytes that are there all the time: weights, adapters and optimiser state.

    A merged expert counts as a frozen one. It has no adapter, so with LoRA it takes a little less than that. Of
    offloaded experts the largest layer is there; on a GPU all of them, unless checkpointing ends what a backward pass
    needs with each layer.
    """
    linear_bytes = STORAGE_BYTES[setup.dense_storage or setup.dtype]
    dense = shape.embedding_parameters * setup.width + shape.own_dtype_bytes + shape.other_parameters * setup.width
    states, counts = 0.0, iter(zip(kept, tuned, strict=True))
    held: list[tuple[float, float]] = []  # bytes of frozen and of trained experts, by layer
    for layer in shape.layers:
        expert, rest = trained_tensors(layer, setup)
        trained_linear = sum(i * o for i, o in layer.attention_matrices) if setup.attention == "full" else 0
        dense += (layer.linear_parameters - trained_linear) * linear_bytes
        dense += (trained_linear + layer.other_parameters) * setup.width
        dense += ADAPTER_BYTES * (
            (_adapter(layer.attention_matrices, setup) if setup.attention == "lora" else 0)
            + (_adapter(layer.router_matrices, setup) if setup.router == "lora" else 0)
        )
        for size, width in rest:
            states += _state_bytes(setup, width, [size])
        if not layer.num_experts:
            continue
        count_kept, count_tuned = next(counts)
        trained = count_tuned * expert_bytes(layer, setup, setup.dtype if setup.experts == "full" else None)
        held.append(((count_kept - count_tuned) * expert_bytes(layer, setup), trained))
        if not setup.offload:
            states += count_tuned * sum(_state_bytes(setup, width, [size]) for size, width in expert)
    if setup.offload and (setup.device == "cpu" or setup.checkpointing):
        held = [max(held, key=sum)] if held else []
    return {
        "dense": rounded_up(dense),
        "kept experts": rounded_up(sum(frozen for frozen, _ in held)),
        "tuned experts": rounded_up(sum(trained for _, trained in held)),
        "optimizer": rounded_up(states),
    }


def offloaded_bytes(shape: ModelShape, setup: StepSetup, kept: Sequence[int], tuned: Sequence[int]) -> int:
    """Bytes that offloaded experts take where they lie: weights, and gradients and two moments of what trains."""
    total = 0.0
    for layer, count_kept, count_tuned in zip(shape.moe_layers, kept, tuned, strict=True):
        expert, _ = trained_tensors(layer, setup)
        total += count_kept * expert_bytes(layer, setup) + 3 * count_tuned * sum(n * w for n, w in expert)
    return rounded_up(total)


def optimizer_temporary(shape: ModelShape, setup: StepSetup, tuned: Sequence[int]) -> int:
    """torch's AdamW has two copies of the tensor that it updates, and one of the tensor before it; the fused and the
    8-bit ones have none."""
    if setup.optimizer != "adamw" or setup.device != "cpu":
        return 0
    largest, counts = 0, iter(tuned)
    for layer in shape.layers:
        expert, rest = trained_tensors(layer, setup)
        count = next(counts) if layer.num_experts else 0
        largest = max([largest, *(n * w for n, w in (expert if count else []) + rest)])
    return 3 * largest


def workspace_bytes(shape: ModelShape, setup: StepSetup) -> int:
    """Libraries' scratch, and where weights are quantised: an expert's matrix decoded, on the way with the reference
    also its codes and scales at full size; or two matrices of the dense part."""
    scratch = 0
    if setup.expert_storage not in (None, *DTYPE_BYTES):
        largest = max((i * o for layer in shape.moe_layers for i, o in layer.expert_matrices), default=0)
        unpacking = 0 if setup.kernels == "native" else UNPACKING_BYTES[setup.expert_storage]
        scratch = largest * (setup.width + unpacking)
    if setup.dense_storage not in (None, *DTYPE_BYTES):
        scratch = max(scratch, 2 * shape.largest_matrix * setup.width)
    return scratch + (CUBLAS_BYTES if setup.device != "cpu" else 0)


def rounded_up(value: float) -> int:
    return -int(-value // 1)
