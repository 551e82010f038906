"""What a training step keeps between forward and backward, and needs on the way: formulas, no torch.

Written from the reference kernels (`edgefed.kernels.masked_experts`) and transformers' blocks. H hidden_size,
I expert_width, T tokens of a batch, V vocab_size, E experts, P (token, expert) pairs, R LoRA rank, w bytes of a number.
"""

from __future__ import annotations

import dataclasses
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


@dataclasses.dataclass(frozen=True)
class Activations:
    """Bytes per decoder layer: kept for its backward pass ``outside`` and ``inside`` its experts, and needed on the
    way, in its ``forward`` and its ``backward`` pass. ``tail``: what embedding and last norm keep, and
    attention masks; ``loss``: logits.

    ``gathered``: the part of ``inside`` that is the gathered input. Layers before ``first`` have nothing to learn in
    them or below, so they keep nothing.
    """

    outside: list[float]
    inside: list[float]
    gathered: list[float]
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
    outside, inside, gathered, forward, backward = [], [], [], [], []
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
        inside.append(inside_experts(shape, layer, setup, pairs, share, below) if learns and pairs else 0.0)
        gathered.append(pairs * shape.hidden_size * setup.width if learns and share else 0.0)
        forward.append(forward_transient(shape, layer, setup, pairs))
        backward.append(backward_transient(shape, layer, setup, pairs) if learns else 0.0)
    tail = setup.tokens * shape.hidden_size * (4 + 2 * setup.width)
    tail += shape.masks * setup.tokens * setup.sequence_length * setup.width
    tokens = min(setup.tokens, CHUNK_TOKENS) if setup.chunked_loss else setup.tokens
    return Activations(outside, inside, gathered, forward, backward, tail, 12.0 * tokens * shape.vocab_size, first)


def corrected(raw: Activations, correction: Correction | None) -> Activations:
    """The formulas with what a measured step says about them, and the margin in either case."""
    if correction is None:
        factors = dict.fromkeys(("activation", "expert", "loss", "transient", "forward"), MARGIN)
        factors["loss"] = 1.0
    else:
        names = ("activation", "expert", "loss", "transient", "forward")
        factors = {name: CORRECTED_MARGIN * getattr(correction, f"{name}_scale") for name in names}
    return dataclasses.replace(
        raw,
        outside=[size * factors["activation"] for size in raw.outside],
        inside=[size * factors["expert"] for size in raw.inside],
        gathered=raw.gathered,
        forward=[size * factors["forward"] for size in raw.forward],
        backward=[size * factors["transient"] for size in raw.backward],
        tail=raw.tail * (MARGIN if correction is None else CORRECTED_MARGIN),
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

    Per pair: the up projection and the activation's result, where anything flows through; the product that a tuned
    down projection needs; gathered input and outputs (H); indices.
    """
    w, learns = setup.width, setup.experts != "none" and tuned_share > 0
    through = 1.0 if below else tuned_share
    width = layer.expert_width
    per_pair = w * (layer.kept_by_gate * width * through + width * tuned_share + shape.hidden_size * (1 + learns)) + 48
    if setup.experts == "lora":
        per_pair += 2 * w * setup.lora_rank * through
    return pairs * per_pair + setup.tokens * shape.hidden_size * w


def forward_transient(shape: ModelShape, layer: LayerShape, setup: StepSetup, pairs: int) -> float:
    """What the forward pass of one layer needs on the way: the experts' outputs, weighted in float32."""
    experts = pairs * shape.hidden_size * (4 + 2 * setup.width)
    mixer = setup.tokens * setup.width * (layer.mixer_width + layer.dense_width)
    mixer += 2 * score_bytes(shape, layer, setup) + 8 * setup.tokens * layer.scan_states
    return max(experts, mixer) + setup.tokens * shape.hidden_size * (4 + setup.width)


def backward_transient(shape: ModelShape, layer: LayerShape, setup: StepSetup, pairs: int) -> float:
    """What the backward pass of one layer needs on the way: gradients of the gathered rows (float32 and w), with the
    sum over experts that each of them adds to; or of the dense part."""
    w = setup.width
    experts = pairs * shape.hidden_size * (8 + 3 * w)
    mixer = setup.tokens * w * (2 * layer.mixer_width + 2 * layer.dense_width) + 2 * score_bytes(shape, layer, setup)
    mixer += 8 * setup.tokens * layer.scan_states
    return max(experts, mixer) + setup.tokens * shape.hidden_size * (4 + w)
