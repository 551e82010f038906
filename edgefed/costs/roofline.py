"""Operations and bytes of one pass through a model, from its shape alone, and the least time that they take.

    seconds of an operation = max(operations / peak, bytes / bandwidth)

Symbols as in `edgefed.costs.memory`: T tokens, S sequence, H hidden_size, I expert_width, V vocab_size, K experts per
token, E' resident experts, P = T min(K, E') pairs, w bytes of a number, D = E' (1 - (1 - min(K, E')/E')^T) distinct
experts that T evenly routed tokens use. A multiplication and an addition are two operations.

    experts, forward      2 P W,  D W b + P w (2 H + 3 I)          W parameters of an expert, b bytes of a stored one
    experts, backward     2 P W for dX, 2 P_train W for dW; weights read again, gradients written
    adapters, forward     2 P R (in + out) of each matrix, thin; twice as much backward
    projections           2 T W_dense forward, the same for dX, once more for dW if they train
    attention             2 T S A forward (causal, A outputs of the queries), 2.5 times as much backward
    output embedding      2 T H V forward, 2 T H V backward; forward once more if the loss is computed in chunks
    checkpointing         the layers once more forward
    quantized weights     read packed; above DECODED_TOKENS tokens also written and read once decoded
    optimizer             AdamW: 7 w per trained parameter, 8 bit: 3 w + 4; clipping 3 w; all bytes
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from edgefed.costs.activations import expert_bytes, first_trained, trained_tensors
from edgefed.costs.shapes import LayerShape, ModelShape
from edgefed.costs.step_setup import DTYPE_BYTES, STORAGE_BYTES, StepSetup

DECODED_TOKENS = 256
"""With fewer, a kernel decodes quantized weights as it multiplies; with more, decoding once first is cheaper."""

WIDE_RANK = 64
"""A product of width R runs at R / WIDE_RANK of the peak, at most at the peak. An assumption, of the order of what the
CPU kernels need for rank 8 (benchmarks/results/virtual_clock.json)."""


@dataclasses.dataclass(frozen=True)
class Op:
    """One operation: what it computes and what it moves."""

    flops: float
    bytes: float

    def seconds(self, flops_per_s: float, bytes_per_s: float) -> float:
        """The least time with these rates."""
        return max(self.flops / flops_per_s, self.bytes / bytes_per_s)


@dataclasses.dataclass(frozen=True)
class Pass:
    """The operations of a step by phase. A profile has only ``forward``."""

    forward: tuple[Op, ...]
    backward: tuple[Op, ...] = ()
    optimizer: tuple[Op, ...] = ()


def training_step(
    shape: ModelShape,
    setup: StepSetup,
    resident: Sequence[int],
    trainable: Sequence[int],
    trainable_pairs: Sequence[float],
) -> Pass:
    """The operations of one step.

    ``resident`` and ``trainable`` are experts per MoE layer; ``trainable_pairs`` is the share of each layer's (token,
    expert) pairs that trainable experts compute.
    """
    backward, trained = [], 0.0
    first = 0 if setup.checkpointing else first_trained(shape, setup, trainable)
    counts = iter(zip(resident, trainable, trainable_pairs, strict=True))
    layers: list[Op] = []
    for index, layer in enumerate(shape.layers):
        count_resident, count_trainable, share = next(counts) if layer.num_experts else (0, 0, 0.0)
        layers += _layer_forward(shape, layer, setup, setup.tokens, count_resident, count_trainable)
        if index >= first:
            backward += _layer_backward(
                shape, layer, setup, count_resident, count_trainable, share, below=index > first
            )
        expert, rest = trained_tensors(layer, setup)
        trained += count_trainable * sum(n * w for n, w in expert) + sum(n * w for n, w in rest)
    head = _head(shape, setup, setup.tokens)
    forward = [*layers, head]
    backward += [head, *([head] if setup.chunked_loss else []), *(layers if setup.checkpointing else [])]
    per_byte = 7.0 if setup.optimizer == "adamw" else 3.0 + 4.0 / setup.width
    return Pass(tuple(forward), tuple(backward), (Op(0.0, trained * (per_byte + 3.0)),))


def forward_pass(
    shape: ModelShape,
    setup: StepSetup,
    resident: Sequence[int],
    tokens: int,
    *,
    storage: str | None = None,
    logits: bool = False,
) -> Pass:
    """A forward pass without gradients, ``tokens`` tokens at a time, with experts stored as ``storage``.

    ``logits``: also those of all tokens, as an evaluation needs them.
    """
    setup = dataclasses.replace(setup, expert_storage=storage)
    counts, ops = iter(resident), []
    for layer in shape.layers:
        ops += _layer_forward(shape, layer, setup, tokens, next(counts) if layer.num_experts else 0, 0)
    return Pass((*ops, _head(shape, setup, tokens)) if logits else tuple(ops))


def distinct_experts(resident: int, top_k: int, tokens: int) -> float:
    """D: how many of ``resident`` experts ``tokens`` evenly routed tokens use."""
    active = min(top_k, resident)
    return resident * (1.0 - (1.0 - active / resident) ** tokens) if resident else 0.0


def stored_bytes(layer: LayerShape, setup: StepSetup) -> float:
    """Bytes of one frozen expert, without its adapter."""
    return expert_bytes(layer, dataclasses.replace(setup, experts="none"))


def _layer_forward(
    shape: ModelShape, layer: LayerShape, setup: StepSetup, tokens: int, resident: int, trainable: int
) -> list[Op]:
    w, hidden = setup.width, shape.hidden_size
    dense = STORAGE_BYTES[setup.dense_storage or setup.dtype] * layer.linear_parameters
    ops = [
        Op(0.0, tokens * hidden * (8 + 4 * w)),  # norms and residuals
        Op(
            2.0 * tokens * layer.linear_parameters,
            dense + tokens * w * (layer.mixer_width + layer.dense_width + hidden),
        ),
    ]
    if layer.attention_matrices:
        queries = layer.attention_matrices[0][1]
        ops.append(Op(2.0 * tokens * setup.sequence_length * queries, 4.0 * tokens * queries * w))
    if resident:
        ops.append(_router(hidden, layer, w, tokens))
        ops.append(_experts_forward(shape, layer, setup, tokens, resident, trainable))
        ops += _adapters(layer, setup, tokens, resident)
    return ops


def _router(hidden: int, layer: LayerShape, width: int, tokens: int) -> Op:
    size = sum(i * o for i, o in layer.router_matrices)
    return Op(2.0 * tokens * size, size * width + tokens * (hidden * width + 8.0 * layer.num_experts))


def _weights_read(layer: LayerShape, setup: StepSetup, tokens: int, resident: int, trainable: int) -> float:
    """Bytes of the distinct experts used, read once."""
    full_trainable = trainable if setup.experts == "full" else 0
    hit = distinct_experts(resident, layer.top_k, tokens) / resident
    plain = layer.parameters_per_expert * setup.width
    size = hit * (full_trainable * plain + (resident - full_trainable) * stored_bytes(layer, setup))
    storage = setup.expert_storage
    if storage is not None and storage not in DTYPE_BYTES and tokens > DECODED_TOKENS:
        size += 2.0 * hit * (resident - full_trainable) * plain
    return size


def _experts_forward(
    shape: ModelShape, layer: LayerShape, setup: StepSetup, tokens: int, resident: int, trainable: int
) -> Op:
    pairs, w = tokens * min(layer.top_k, resident), setup.width
    moved = _weights_read(layer, setup, tokens, resident, trainable)
    moved += pairs * w * (2.0 * shape.hidden_size + 3.0 * layer.expert_width)
    return Op(2.0 * pairs * layer.parameters_per_expert, moved)


def _adapters(layer: LayerShape, setup: StepSetup, tokens: int, resident: int) -> list[Op]:
    """The experts' adapters, forward: thin products, which run far below the peak."""
    if setup.experts != "lora":
        return []
    pairs, rank = tokens * min(layer.top_k, resident), setup.lora_rank
    flops = 2.0 * pairs * rank * sum(i + o for i, o in layer.expert_matrices)
    moved = pairs * setup.width * sum(i + 2.0 * o for i, o in layer.expert_matrices)
    return [Op(flops * max(1.0, WIDE_RANK / rank), moved)]


def _layer_backward(
    shape: ModelShape, layer: LayerShape, setup: StepSetup, resident: int, trainable: int, share: float, *, below: bool
) -> list[Op]:
    """``below``: something trains below this layer, so its input takes a gradient."""
    tokens, w, hidden = setup.tokens, setup.width, shape.hidden_size
    ops = []
    if below or setup.attention != "none":
        dense = STORAGE_BYTES[setup.dense_storage or setup.dtype] * layer.linear_parameters
        times = 2.0 if setup.attention == "full" else 1.0
        moved = times * (dense + 2.0 * tokens * w * (layer.mixer_width + layer.dense_width + hidden))
        ops += [Op(0.0, tokens * hidden * (16 + 6 * w)), Op(2.0 * times * tokens * layer.linear_parameters, moved)]
        if layer.attention_matrices:
            queries = layer.attention_matrices[0][1]
            ops.append(Op(5.0 * tokens * setup.sequence_length * queries, 8.0 * tokens * queries * w))
    if not resident:
        return ops
    router = _router(hidden, layer, w, tokens)
    ops.append(Op(router.flops * (1.0 + (setup.router != "none")), 2.0 * router.bytes))
    pairs, parameters = tokens * min(layer.top_k, resident), layer.parameters_per_expert
    activations = pairs * w * (3.0 * hidden + 6.0 * layer.expert_width)
    # The gradient passes through every expert. In the first trainable layer it stops, but the router still needs the
    # experts' outputs, and a trainable expert the gradient of its inner activation.
    flops = 2.0 * pairs * parameters * (1.0 if below else share / 3)
    moved = _weights_read(layer, setup, tokens, resident, trainable) + activations
    if setup.experts == "full" and trainable:
        flops += 2.0 * share * pairs * parameters
        moved += trainable * parameters * w
    ops.append(Op(flops, moved))
    return [*ops, *(2 * _adapters(layer, setup, tokens, resident))]  # of the adapter's weights, and of its input


def _head(shape: ModelShape, setup: StepSetup, tokens: int) -> Op:
    size = shape.hidden_size * shape.vocab_size
    return Op(2.0 * tokens * size, size * setup.width + tokens * (12.0 * shape.vocab_size))
