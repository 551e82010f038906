"""What a training step keeps between forward and backward, and needs on the way: formulas, no torch.

Written from transformers' blocks and from the kernels of the experts: the reference (`edgefed.kernels.masked_experts`)
and the native one (`edgefed.kernels.native_experts`, told to keep the up projection). H hidden_size, I expert_width,
U outputs of the up projection (2I where it is gated), T tokens of a batch, V vocab_size, E experts,
P (token, expert) pairs, R LoRA rank, w bytes of a number.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from edgefed.moe.shapes import LayerShape, ModelShape
from edgefed.moe.step_setup import (
    CHUNK_TOKENS,
    CORRECTED_MARGIN,
    MARGIN,
    TUNED_TOKENS,
    Correction,
    StepSetup,
)
from edgefed.moe.stored import trained_tensors

INDEX_BYTES = 48
"""Per (token, expert) pair: its slot, its place, its weight, and what choosing it kept."""


@dataclasses.dataclass(frozen=True)
class Activations:
    """Bytes per decoder layer: kept for its backward pass ``outside`` and ``inside`` its experts, and needed on the
    way, in its ``forward`` and its ``backward`` pass. ``tail``: what embedding and last norm keep, and
    attention masks; ``loss``: logits. ``scores``: the part of ``outside`` that is attention scores: they grow with the
    square of the length, so what a step of another length says of the rest says nothing of them.

    ``stays``: the part of ``inside`` that is still there when the experts have their gradients: with the reference the
    gathered input, with native kernels all (infinite). Layers before ``first`` have nothing to learn in them or below,
    so they keep nothing.
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
    kept: Sequence[int],
    tuned: Sequence[int],
    tuned_share: Sequence[float] | None = None,
    tuned_tokens: float = TUNED_TOKENS,
    flows_in: bool | None = None,
) -> Activations:
    """The formulas for one step, without margin or correction.

    ``tuned_share``: part of the (token, expert) pairs of each MoE layer that tuned experts compute; by default that of
    their number times ``tuned_tokens``. ``flows_in``: the embedding's output takes a gradient,
    so that the first layer keeps as much as the others; by default with checkpointing, for which transformers asks it.
    """
    flows_in = setup.checkpointing if flows_in is None else flows_in
    first = 0 if flows_in else first_trained(shape, setup, tuned)
    outside, scores, inside, stays, forward, backward = [], [], [], [], [], []
    native = setup.kernels == "native"
    counts = iter(enumerate(zip(kept, tuned, strict=True)))
    for index, layer in enumerate(shape.layers):
        moe, (count_kept, count_tuned) = next(counts) if layer.num_experts else (-1, (0, 0))
        share = 0.0
        if count_tuned:
            share = tuned_share[moe] if tuned_share else min(1.0, tuned_tokens * count_tuned / count_kept)
        pairs = setup.tokens * min(layer.top_k, count_kept)
        below = index > first or setup.attention != "none" or flows_in
        learns = index >= first
        outside.append(outside_experts(shape, layer, setup, mixer=below) if learns else 0.0)
        scores.append(float(score_bytes(shape, layer, setup)) if learns and below else 0.0)
        inside.append(inside_experts(shape, layer, setup, pairs, share, below) if learns and pairs else 0.0)
        gathered = pairs * shape.hidden_size * setup.width if learns and share else 0.0
        stays.append(math.inf if native else gathered)
        keeps = learns and not setup.checkpointing
        forward.append(forward_transient(shape, layer, setup, pairs, keeps=keeps))
        backward.append(backward_transient(shape, layer, setup, pairs) if learns else 0.0)
    tail = setup.tokens * shape.hidden_size * (4 + 2 * setup.width)
    tail += shape.masks * setup.tokens * setup.sequence_length * setup.width
    tokens = min(setup.tokens, CHUNK_TOKENS) if setup.chunked_loss else setup.tokens
    loss = 12.0 * tokens * shape.vocab_size
    return Activations(outside, scores, inside, stays, forward, backward, tail, loss, first)


def corrected(raw: Activations, correction: Correction | None) -> Activations:
    """The formulas with what a measured step says about them, and the margin in either case."""
    if correction is None:
        factors = dict.fromkeys(("activation", "expert", "loss", "transient", "forward"), MARGIN)
        factors["loss"] = 1.0
    else:
        names = ("activation", "expert", "loss", "transient", "forward")
        factors = {name: CORRECTED_MARGIN * getattr(correction, f"{name}_scale") for name in names}
    margin = MARGIN if correction is None else CORRECTED_MARGIN
    rest = [(size - scores) * factors["activation"] for size, scores in zip(raw.outside, raw.scores, strict=True)]
    return dataclasses.replace(
        raw,
        outside=[size + scores * margin for size, scores in zip(rest, raw.scores, strict=True)],
        inside=[size * factors["expert"] for size in raw.inside],
        forward=[size * factors["forward"] for size in raw.forward],
        backward=[size * factors["transient"] for size in raw.backward],
        tail=raw.tail * margin,
        loss=raw.loss * factors["loss"],
    )


def first_trained(shape: ModelShape, setup: StepSetup, tuned: Sequence[int]) -> int:
    """Index of the first layer with anything that trains."""
    counts = iter(tuned)
    for index, layer in enumerate(shape.layers):
        count = next(counts) if layer.num_experts else 0
        expert, rest = trained_tensors(layer, setup)
        if rest or (expert and count):
            return index
    return len(shape.layers)


def outside_experts(shape: ModelShape, layer: LayerShape, setup: StepSetup, *, mixer: bool = True) -> float:
    """What one layer keeps outside its experts: norms, attention or what stands for it, router, dense or shared MLP.

    T (8 H + 2 w H) for two norms (float32 copy, residual), 7/4 w for each number that the mixer's projections give,
    2 w for each that the dense ones give, 8 T E for the router; attention scores where they are kept. Where attention
    trains, the inputs of its projections; by LoRA also its weights with their updates, which are made in each pass.
    A selective scan keeps 12 bytes for each number of its state (14 in half precision), measured on transformers' own
    form of Jamba's, the one that runs without hub kernels.
    """
    tokens, w = setup.tokens, setup.width
    size = tokens * shape.hidden_size * (4 + w) * (2 if mixer else 1)
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
    shape: ModelShape, layer: LayerShape, setup: StepSetup, pairs: int, tuned_share: float, below: bool
) -> float:
    """What the experts of one layer keep: see `edgefed.kernels.masked_experts`. ``below``: their input has a gradient.

    Per pair with the reference: the up projection and the activation's result, where anything flows through; the
    product that a tuned down projection needs; gathered input and outputs (H); indices. With native kernels: the up
    projection, whoever learns; indices. And the output (H) per token, which is there when the layer has been counted.
    """
    w, output = setup.width, setup.tokens * shape.hidden_size * setup.width
    if setup.kernels == "native":
        return pairs * (w * _up_width(layer) + INDEX_BYTES) + output
    learns = setup.experts != "none" and tuned_share > 0
    through = 1.0 if below else tuned_share
    width = layer.expert_width
    per_pair = w * (layer.kept_by_gate * width * through + width * tuned_share + shape.hidden_size * (1 + learns))
    if setup.experts == "lora":
        per_pair += 2 * w * setup.lora_rank * through
    return pairs * (per_pair + INDEX_BYTES) + output


def forward_transient(
    shape: ModelShape, layer: LayerShape, setup: StepSetup, pairs: int, *, keeps: bool = False
) -> float:
    """What the forward pass of one layer needs on the way. By the reference: the experts' outputs, weighted in float32.
    By native kernels: activation and outputs, the up projection where the layer does not keep it (``keeps``), and what
    the busiest expert gathers, at most all tokens."""
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
    """What the backward pass of one layer needs on the way, beside the gradients of its weights; or of its dense part.

    By the reference: gradients of the gathered rows (float32 and w), with the sum over experts that each of them adds
    to. By native kernels: the activation and the gradient of the up projection while weights get their gradients, with
    what the busiest expert gathers twice; then the latter and the gradient of the gathered rows.
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
