"""Memory of a training step: what it keeps for its backward pass, and its temporaries. Formulas without torch.

They follow transformers' blocks and the experts' kernels: the reference (`edgefed.kernels.masked_experts`) and the
native one (`edgefed.kernels.native_experts`, which keeps the up projection in training). H hidden_size, I expert_width,
U outputs of the up projection (2I where it is gated), T tokens of a batch, V vocab_size, E experts,
P (token, expert) pairs, R LoRA rank, w bytes of a number.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

from edgefed.costs.shapes import LayerShape, ModelShape
from edgefed.costs.step_setup import (
    ADAPTER_BYTES,
    BLOCKSIZE,
    CHUNK_TOKENS,
    CORRECTED_MARGIN,
    CUBLAS_BYTES,
    DTYPE_BYTES,
    EIGHT_BIT_CODES,
    EIGHT_BIT_MIN_ELEMENTS,
    EIGHT_BIT_STATE,
    MARGIN,
    SCALE_BYTES,
    STORAGE_BYTES,
    TRAINABLE_TOKENS,
    UNPACKING_BYTES,
    Correction,
    StepSetup,
)

INDEX_BYTES = 48
"""Per (token, expert) pair: slot, position, weight, and what the router keeps for its gradient."""


@dataclasses.dataclass(frozen=True)
class Activations:
    """Bytes per decoder layer.

    Attributes:
        outside: Kept for the backward pass outside the experts.
        scores: Attention scores, a part of ``outside``. A measured step of another length does not correct them.
        inside: Kept for the backward pass inside the experts.
        stays: The part of ``inside`` that remains until the experts have gradients; infinite with native kernels.
        forward: Temporaries of the forward pass.
        backward: Temporaries of the backward pass.
        tail: What embedding and last norm keep, and attention masks, of the whole model.
        loss: Logits and their gradient.
        first: First layer with trainable parameters in it or below; earlier ones keep nothing.
    """

    outside: list[float]
    scores: list[float]
    inside: list[float]
    stays: list[float]
    forward: list[float]
    backward: list[float]
    tail: float
    loss: float
    first: int


def activations(
    shape: ModelShape,
    setup: StepSetup,
    resident: Sequence[int],
    trainable: Sequence[int],
    trainable_share: Sequence[float] | None = None,
    trainable_tokens: float = TRAINABLE_TOKENS,
    flows_in: bool | None = None,
) -> Activations:
    """The formulas for one step, without margin or correction.

    Args:
        shape: The model.
        setup: How the step is done.
        resident: Experts in memory per MoE layer.
        trainable: Those of them that train.
        trainable_share: Share of each MoE layer's (token, expert) pairs that trainable experts compute; None: their
            share of the resident experts times ``trainable_tokens``.
        trainable_tokens: Tokens of trainable experts, as a multiple of an even share.
        flows_in: The embedding's output takes a gradient, as transformers makes it with checkpointing (None: then).
    """
    flows_in = setup.checkpointing if flows_in is None else flows_in
    first = 0 if flows_in else first_trained(shape, setup, trainable)
    outside, scores, inside, stays, forward, backward = [], [], [], [], [], []
    native = setup.kernels == "native"
    counts = iter(enumerate(zip(resident, trainable, strict=True)))
    for index, layer in enumerate(shape.layers):
        moe, (count_resident, count_trainable) = next(counts) if layer.num_experts else (-1, (0, 0))
        share = 0.0
        if count_trainable:
            even = min(1.0, trainable_tokens * count_trainable / count_resident)
            share = trainable_share[moe] if trainable_share else even
        pairs = setup.tokens * min(layer.top_k, count_resident)
        below = index > first or setup.attention != "none" or flows_in
        trains = index >= first
        outside.append(outside_experts(shape, layer, setup, mixer=below) if trains else 0.0)
        scores.append(float(score_bytes(shape, layer, setup)) if trains and below else 0.0)
        inside.append(inside_experts(shape, layer, setup, pairs, share, below) if trains and pairs else 0.0)
        gathered = pairs * shape.hidden_size * setup.width if trains and share else 0.0
        stays.append(math.inf if native else gathered)
        keeps = trains and not setup.checkpointing
        forward.append(forward_transient(shape, layer, setup, pairs, keeps=keeps))
        backward.append(backward_transient(shape, layer, setup, pairs) if trains else 0.0)
    tail = setup.tokens * shape.hidden_size * (4 + 2 * setup.width)
    tail += shape.masks * setup.tokens * setup.sequence_length * setup.width
    tokens = min(setup.tokens, CHUNK_TOKENS) if setup.chunked_loss else setup.tokens
    loss = 12.0 * tokens * shape.vocab_size
    return Activations(outside, scores, inside, stays, forward, backward, tail, loss, first)


def corrected(raw: Activations, correction: Correction | None) -> Activations:
    """The formulas corrected by a measured step, if there is one, and with a margin."""
    margin = MARGIN if correction is None else CORRECTED_MARGIN
    scale = correction or Correction(1.0, 0, "no measured step")
    other = margin * scale.activation_scale
    return dataclasses.replace(
        raw,
        outside=[(size - s) * other + s * margin for size, s in zip(raw.outside, raw.scores, strict=True)],
        inside=[size * (margin * scale.expert_scale) for size in raw.inside],
        forward=[size * (margin * scale.forward_scale) for size in raw.forward],
        backward=[size * (margin * scale.transient_scale) for size in raw.backward],
        tail=raw.tail * margin,
        loss=raw.loss * (1.0 if correction is None else margin * scale.loss_scale),
    )


def with_counts(shape: ModelShape, trainable: Sequence[int]) -> Iterator[tuple[LayerShape, int]]:
    """Yield each decoder layer with its number of trainable experts."""
    counts = iter(trainable)
    for layer in shape.layers:
        yield layer, next(counts) if layer.num_experts else 0


def first_trained(shape: ModelShape, setup: StepSetup, trainable: Sequence[int]) -> int:
    """Index of the first layer with a trainable parameter."""
    for index, (layer, count) in enumerate(with_counts(shape, trainable)):
        expert, rest = trained_tensors(layer, setup)
        if rest or (expert and count):
            return index
    return len(shape.layers)


def outside_experts(shape: ModelShape, layer: LayerShape, setup: StepSetup, *, mixer: bool = True) -> float:
    """What one layer keeps outside its experts: norms, attention or another mixer, router, dense or shared MLP.

    T (8 H + 2 w H) for two norms (float32 copy, residual), 7/4 w per output of the mixer's projections, 2 w per output
    of the dense ones, 8 T E for the router, and attention scores where they are kept. If attention trains, the inputs
    of its projections; with LoRA also its weights with their updates, which each pass computes. A selective scan keeps
    12 bytes per number of its state (14 in half precision), measured on Jamba without hub kernels.
    """
    tokens, w = setup.tokens, setup.width
    size: float = tokens * shape.hidden_size * (4 + w) * (2 if mixer else 1)
    if setup.attention != "none":
        size += tokens * w * 2 * shape.hidden_size  # what the projections' weight gradients need
    if setup.attention == "lora":
        size += w * sum(size_in * size_out for size_in, size_out in layer.attention_matrices)
    if mixer:
        size += tokens * (1.75 * w * layer.mixer_width + 4 * layer.num_heads) + score_bytes(shape, layer, setup)
        size += tokens * layer.scan_states * (12 if w == 4 else 14)
    return size + tokens * (2 * w * layer.dense_width + 8 * layer.num_experts)


def score_bytes(shape: ModelShape, layer: LayerShape, setup: StepSetup) -> int:
    """Attention scores (T, sequence) of all heads, where they are kept: see `ModelShape.scores`."""
    if not shape.scores or (shape.scores == "float32" and setup.device != "cpu"):
        return 0
    width = {"dtype": setup.width, "float32": 4, "both": 4 + setup.width}[shape.scores]
    return setup.tokens * setup.sequence_length * layer.num_heads * width


def inside_experts(
    shape: ModelShape, layer: LayerShape, setup: StepSetup, pairs: int, trainable_share: float, below: bool
) -> float:
    """What the experts of one layer keep (`edgefed.kernels.masked_experts`). ``below``: their input has a gradient.

    Per pair with the reference: the up projection and the activation's result where a gradient flows through; the
    product that a trainable down projection needs; gathered input and outputs (H); indices. With native kernels: the up
    projection in any case; indices. Both keep the output (H) per token.
    """
    w, output = setup.width, setup.tokens * shape.hidden_size * setup.width
    if setup.kernels == "native":
        return pairs * (w * _up_width(layer) + INDEX_BYTES) + output
    trains = setup.experts != "none" and trainable_share > 0
    through = 1.0 if below else trainable_share
    width = layer.expert_width
    per_pair = w * (layer.kept_by_gate * width * through + width * trainable_share + shape.hidden_size * (1 + trains))
    if setup.experts == "lora":
        per_pair += 2 * w * setup.lora_rank * through
    return pairs * (per_pair + INDEX_BYTES) + output


def forward_transient(
    shape: ModelShape, layer: LayerShape, setup: StepSetup, pairs: int, *, keeps: bool = False
) -> float:
    """Temporaries of the forward pass of one layer.

    With the reference: the experts' outputs, weighted in float32. With native kernels: activation and outputs, the up
    projection unless the layer ``keeps`` it, and what the busiest expert gathers, at most all tokens.
    """
    w = setup.width
    if setup.kernels == "native":
        experts = w * pairs * (layer.expert_width + shape.hidden_size + (0 if keeps else _up_width(layer)))
        experts += w * setup.tokens * shape.hidden_size
    else:
        experts = pairs * shape.hidden_size * (4 + 2 * w)
    mixer = setup.tokens * w * (layer.mixer_width + layer.dense_width)
    mixer += 2 * score_bytes(shape, layer, setup) + 8 * setup.tokens * layer.scan_states
    return max(experts, mixer) + setup.tokens * shape.hidden_size * (4 + w)


def backward_transient(shape: ModelShape, layer: LayerShape, setup: StepSetup, pairs: int) -> float:
    """Temporaries of the backward pass of one layer, without the gradients of its weights.

    With the reference: gradients of the gathered rows (float32 and w) and the sum over experts that each adds to. With
    native kernels: the activation and the gradient of the up projection while weights get their gradients, and twice
    what the busiest expert gathers; then the latter and the gradient of the gathered rows.
    """
    w, hidden = setup.width, shape.hidden_size
    if setup.kernels == "native":
        up, width = _up_width(layer), layer.expert_width
        activated = pairs * (2 * width + up)  # the gradient of the activation is there until that of the up projection
        weights = pairs * (width + up) + 2 * hidden * setup.tokens
        experts = w * max(activated, weights, pairs * (up + hidden)) + pairs * INDEX_BYTES
    else:
        experts = pairs * hidden * (8 + 3 * w)
    mixer = setup.tokens * w * (2 * layer.mixer_width + 2 * layer.dense_width) + 2 * score_bytes(shape, layer, setup)
    mixer += 8 * setup.tokens * layer.scan_states
    return max(experts, mixer) + setup.tokens * hidden * (4 + w)


def _up_width(layer: LayerShape) -> int:
    """U, the outputs of an expert's up projection."""
    return layer.expert_matrices[0][1] if layer.expert_matrices else 0


# --- exact parts: weights, gradients, optimizer state -----------------------------------------------------------------


def expert_bytes(layer: LayerShape, setup: StepSetup, storage: str | None = None) -> float:
    """Bytes of one frozen expert, with its adapter if the run has adapters."""
    stored = storage or setup.expert_storage or setup.dtype
    matrices = sum(_matrix_bytes(*sizes, stored, layer.is_transposed) for sizes in layer.expert_matrices)
    adapter = ADAPTER_BYTES * _adapter(layer.expert_matrices, setup) if setup.experts == "lora" else 0
    return matrices + sum(layer.expert_biases) * setup.width + adapter


def streamed_layer_bytes(layer: LayerShape, setup: StepSetup, resident: int, trainable: int) -> float:
    """Bytes of one layer that are streamed: frozen experts, and with LoRA also the weights of trainable ones."""
    frozen = (resident - trainable) * expert_bytes(layer, setup)
    without_adapter = expert_bytes(layer, dataclasses.replace(setup, experts="none"))
    return frozen + (trainable * without_adapter if setup.experts == "lora" else 0.0)


def _matrix_bytes(size_in: int, size_out: int, storage: str, is_transposed: bool) -> float:
    """Bytes of one matrix of an expert, with scales per row (int8) or per block of 64 (nf4)."""
    size = size_in * size_out
    if storage == "int8":
        return size + SCALE_BYTES * (size_in if is_transposed else size_out)
    if storage == "nf4":
        return -(-size // 2) + SCALE_BYTES * -(-size // BLOCKSIZE)
    return size * STORAGE_BYTES[storage]


def _adapter(sizes: Sequence[tuple[int, int]], setup: StepSetup) -> int:
    return sum(setup.lora_rank * (size_in + size_out) for size_in, size_out in sizes)


def _state_bytes(setup: StepSetup, width: int, sizes: Sequence[int]) -> float:
    """Bytes of optimizer state for tensors with these numbers of elements."""
    if setup.optimizer == "adamw":
        return sum(2 * width * size + 4 for size in sizes)  # a moment has its tensor's dtype; a float32 step counter
    if setup.optimizer == "paged_adamw_8bit" and setup.device == "cuda":
        return 0.0  # the driver moves them to the host
    return sum(
        EIGHT_BIT_STATE * size + EIGHT_BIT_CODES if size >= EIGHT_BIT_MIN_ELEMENTS else 8 * size for size in sizes
    )


def trained_tensors(layer: LayerShape, setup: StepSetup) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(elements, bytes of a number) of each trained tensor: of one trainable expert, and of the rest of the layer."""

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


def gradient_bytes(
    shape: ModelShape, setup: StepSetup, trainable: Sequence[int], *, lasting: bool = False
) -> list[int]:
    """Gradient bytes per decoder layer; ``lasting``: without those of offloaded experts, which are moved at once."""
    sizes = []
    for layer, count in with_counts(shape, trainable):
        expert, rest = trained_tensors(layer, setup)
        if lasting and setup.offload:
            count = 0
        sizes.append(count * sum(n * w for n, w in expert) + sum(n * w for n, w in rest))
    return sizes


def static_bytes(
    shape: ModelShape, setup: StepSetup, resident: Sequence[int], trainable: Sequence[int]
) -> dict[str, int]:
    """Bytes during the whole step: weights, adapters and optimizer state.

    A merged expert counts as a frozen one; with LoRA it takes slightly less, as it has no adapter. Of offloaded experts
    the largest layer is resident; on a GPU all of them, unless checkpointing frees each layer's after its backward
    pass. Of streamed experts, one layer is resident on a CPU, and at most two buffers for a layer on a GPU.
    """
    linear_bytes = STORAGE_BYTES[setup.dense_storage or setup.dtype]
    dense: float = (shape.embedding_parameters + shape.other_parameters) * setup.width + shape.own_dtype_bytes
    states, counts = 0.0, iter(enumerate(zip(resident, trainable, strict=True)))
    weights: list[tuple[float, float]] = []  # bytes of frozen and of trainable experts, by layer
    streamed = 0.0
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
        ordinal, (count_resident, count_trainable) = next(counts)
        trained = count_trainable * expert_bytes(layer, setup, setup.dtype if setup.experts == "full" else None)
        frozen = (count_resident - count_trainable) * expert_bytes(layer, setup)
        if setup.streams(ordinal, len(resident)):
            far = streamed_layer_bytes(layer, setup, count_resident, count_trainable)
            trained, frozen, streamed = trained + frozen - far, 0.0, max(streamed, far)
        weights.append((frozen, trained))
        if not setup.offload:
            states += count_trainable * sum(_state_bytes(setup, width, [size]) for size, width in expert)
    if setup.offload and (setup.device == "cpu" or setup.checkpointing):
        weights = [max(weights, key=sum)] if weights else []
    weights.append((streamed * min(setup.streamed_layers, 1 if setup.device == "cpu" else 2), 0.0))
    return {
        "dense": rounded_up(dense),
        "resident experts": rounded_up(sum(frozen for frozen, _ in weights)),
        "trainable experts": rounded_up(sum(trained for _, trained in weights)),
        "optimizer": rounded_up(states),
    }


def workspace_bytes(shape: ModelShape, setup: StepSetup) -> int:
    """Scratch memory of libraries and of dequantization.

    Quantized experts: one matrix decoded, with the reference also its codes and scales at full size. Quantized dense
    part: two matrices.
    """
    scratch = 0
    storage = setup.expert_storage
    if storage is not None and storage not in DTYPE_BYTES:
        largest = max((i * o for layer in shape.moe_layers for i, o in layer.expert_matrices), default=0)
        unpacking = 0 if setup.kernels == "native" else UNPACKING_BYTES[storage]
        scratch = rounded_up(largest * (setup.width + unpacking))
    if setup.dense_storage not in (None, *DTYPE_BYTES):
        scratch = max(scratch, 2 * shape.largest_matrix * setup.width)
    return scratch + (CUBLAS_BYTES if setup.device != "cpu" else 0)


def rounded_up(value: float) -> int:
    """The least integer that is not below ``value``."""
    return -int(-value // 1)
