"""Masked experts on the CUDA kernels: output, every gradient, determinism and saved tensors."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from edgefed.kernels import cuda_experts
from edgefed.kernels.cuda_library import PLAIN, ROWS, TILES
from edgefed.kernels.masked_experts import LastingSlots, LowRankPair, SlotWeights, masked_experts_reference
from edgefed.kernels.quantization import QuantizedMatrix, dequantize_experts, quantize_experts

HIDDEN, WIDTH, RANK = 64, 32, 8
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""Allowed error as a share of the largest value. In 16 bits the projections in between are rounded as well."""


def swiglu(up: torch.Tensor) -> torch.Tensor:
    gate, value = up.chunk(2, dim=-1)
    return F.silu(gate) * value


def interleaved(up: torch.Tensor) -> torch.Tensor:
    """Like gpt-oss, without its clamp: at the kink a rounding in 16 bits would turn a gradient on or off."""
    gate, value = up[..., ::2], up[..., 1::2]
    return (value + 1) * gate * torch.sigmoid(1.7 * gate)


@dataclasses.dataclass(frozen=True)
class Layer:
    formats: tuple[str, ...] = ("dense", "nf4", "int8", "frozen")
    activation: object = swiglu
    transposed: bool = False
    bias: bool = False
    lora: tuple[int, ...] = (0, 0, 0, 0)  # rank by slot
    hidden: int = HIDDEN
    width: int = WIDTH
    gated: bool = True


LAYERS = {
    "dense, nf4, int8 and frozen": Layer(),
    "all nf4": Layer(formats=("nf4",) * 4),
    "transposed, biased, interleaved": Layer(activation=interleaved, transposed=True, bias=True),
    "lora of two ranks": Layer(lora=(8, 4, 8, 0)),
    "transposed lora": Layer(transposed=True, lora=(0, 8, 8, 8), bias=True),
    "ungated, odd sizes": Layer(activation=F.relu, gated=False, hidden=18, width=11, lora=(3, 3, 3, 3), bias=True),
}


def make_slots(layer: Layer, dtype: torch.dtype, device) -> list[SlotWeights]:
    generator = torch.Generator().manual_seed(1)
    wide = layer.width * (2 if layer.gated else 1)

    def random(*shape, requires_grad=True):
        values = torch.randn(*shape, generator=generator).mul_(shape[-1] ** -0.5).to(dtype).to(device)
        return values.requires_grad_(requires_grad)

    def weight(format, *shape):
        if layer.transposed:
            shape = shape[::-1]
        if format in ("dense", "frozen"):
            return random(*shape, requires_grad=format == "dense")
        return quantize_experts(random(*shape, requires_grad=False), format, backend="reference")

    slots = []
    for format, rank in zip(layer.formats, layer.lora, strict=True):
        slots.append(
            SlotWeights(
                up=weight(format, wide, layer.hidden),
                down=weight(format, layer.hidden, layer.width),
                up_bias=random(wide) if layer.bias else None,
                down_bias=random(layer.hidden) if layer.bias else None,
                up_lora=LowRankPair(random(rank, layer.hidden), random(wide, rank), 1.5) if rank else None,
                down_lora=LowRankPair(random(rank, layer.width), random(layer.hidden, rank), 0.5) if rank else None,
            )
        )
    return slots


def tensors_of(slot: SlotWeights) -> list[torch.Tensor]:
    own = [t for t in (slot.up, slot.down, slot.up_bias, slot.down_bias) if isinstance(t, torch.Tensor)]
    own += [t for pair in (slot.up_lora, slot.down_lora) if pair for t in (pair.lora_a, pair.lora_b)]
    return [tensor for tensor in own if tensor.requires_grad]


def all_of(slots: list[SlotWeights]) -> list[torch.Tensor]:
    return [tensor for slot in slots for tensor in tensors_of(slot)]


def places_of(slots: list[SlotWeights], slot: int) -> range:
    """Places of a slot's tensors in `all_of`."""
    begin = len(all_of(slots[:slot]))
    return range(begin, begin + len(tensors_of(slots[slot])))


def in_float32(slots: list[SlotWeights]) -> list[SlotWeights]:
    """The same values as dense float32 leaves, so that the reference rounds nothing in between."""

    def widen(value):
        if isinstance(value, QuantizedMatrix):
            return dequantize_experts(value, backend="reference").float()
        if isinstance(value, LowRankPair):
            return LowRankPair(widen(value.lora_a), widen(value.lora_b), value.scale)
        return None if value is None else value.detach().float().requires_grad_(value.requires_grad)

    names = [field.name for field in dataclasses.fields(SlotWeights)]
    return [SlotWeights(**{name: widen(getattr(slot, name)) for name in names}) for slot in slots]


def inputs(layer: Layer, tokens, dtype, device, top_k=3, num_slots=4):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, layer.hidden, generator=generator).to(dtype).to(device).requires_grad_()
    indices = torch.randint(-1, num_slots, (tokens, top_k), generator=generator)
    indices[0] = torch.tensor([1, 1, 1])  # the same slot again, as merged experts do
    weights = torch.rand(tokens, top_k, generator=generator).to(dtype).to(device).requires_grad_()
    return hidden, indices.to(device), weights


def run_ours(rig, layer, hidden, indices, weights, slots, kernel=None):
    return cuda_experts.masked_experts(
        hidden, indices, weights, slots, layer.activation, layer.transposed, kernels=rig.kernels, kernel=kernel
    )


def run_reference(layer, hidden, indices, weights, slots):
    return masked_experts_reference(
        hidden, indices, weights, slots, activation=layer.activation, is_transposed=layer.transposed
    )


def gradients(output, leaves):
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(9)).to(output.dtype)
    output.backward(direction.to(output.device))
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def assert_same(ours, expected, dtype):
    assert len(ours) == len(expected)
    for own, other in zip(ours, expected, strict=True):
        assert (own is None) == (other is None)
        if own is not None:
            error = (own.double() - other.double()).abs().max().item()
            assert error <= TOLERANCE[dtype] * max(other.abs().max().item(), 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("tokens", [1, 13, 70])
@pytest.mark.parametrize("name", LAYERS)
def test_output_and_every_gradient_equal_the_reference(rig, name, tokens, dtype):
    layer = LAYERS[name]
    slots = make_slots(layer, dtype, rig.device)
    wide = in_float32(slots)
    hidden, indices, weights = inputs(layer, tokens, dtype, rig.device)
    leaves = [hidden, weights, *(t for slot in slots for t in tensors_of(slot))]
    ours = gradients(run_ours(rig, layer, hidden, indices, weights, slots), leaves)
    x, w = (t.detach().float().requires_grad_() for t in (hidden, weights))
    others = [x, w, *(t for slot in wide for t in tensors_of(slot))]
    expected = gradients(run_reference(layer, x, indices, w, wide), others)
    assert [t.dtype for t in ours if t is not None] == [dtype] * sum(t is not None for t in ours)
    assert_same(ours, expected, dtype)


@pytest.mark.parametrize("kernel", [ROWS, TILES, PLAIN])
def test_all_kernels_agree(rig, kernel):
    layer = LAYERS["lora of two ranks"]
    dtype = torch.float16
    results = []
    for chosen in (kernel, None):
        slots = make_slots(layer, dtype, rig.device)
        hidden, indices, weights = inputs(layer, 20, dtype, rig.device)
        leaves = [hidden, weights, *(t for slot in slots for t in tensors_of(slot))]
        results.append(gradients(run_ours(rig, layer, hidden, indices, weights, slots, chosen), leaves))
    assert_same(*results, dtype)


def test_float32_adapters_beside_weights_in_16_bits(rig):
    """As `edgefed.moe.adapters` has them: read and differentiated in float32, by one product each with the weights."""
    layer = Layer(formats=("nf4",) * 4, lora=(8, 8, 0, 8))
    slots = make_slots(layer, torch.float16, rig.device)

    def in_float(pair):
        if pair is None:
            return None
        parts = (part.detach().float().requires_grad_() for part in (pair.lora_a, pair.lora_b))
        return LowRankPair(*parts, pair.scale)

    slots = [
        dataclasses.replace(slot, up_lora=in_float(slot.up_lora), down_lora=in_float(slot.down_lora)) for slot in slots
    ]
    wide = in_float32(slots)
    for tokens in (4, 40):
        hidden, indices, weights = inputs(layer, tokens, torch.float16, rig.device)
        indices[indices == 3] = 0
        ours = gradients(run_ours(rig, layer, hidden, indices, weights, slots), [hidden, weights, *all_of(slots)])
        x, w = (t.detach().float().requires_grad_() for t in (hidden, weights))
        expected = gradients(run_reference(layer, x, indices, w, wide), [x, w, *all_of(wide)])
        assert [t.dtype for t in ours[3:] if t is not None] == [torch.float32] * 8
        assert_same(ours, expected, torch.float16)
        for leaf in (*all_of(slots), *all_of(wide)):
            leaf.grad = None


def test_lasting_slots_are_read_once_and_see_new_values(rig):
    """The tables are built at the first call; optimizer steps change values in place; `scheduled` limits gradients."""
    layer = Layer(formats=("dense", "nf4", "nf4", "dense"), lora=(8, 8, 8, 8))
    plain = make_slots(layer, torch.float16, rig.device)

    class Lasting(list):
        reads = 0
        scheduled = None

        def __getitem__(self, slot):
            self.reads += 1
            return super().__getitem__(slot)

    slots = Lasting(plain)
    slots.lasting = LastingSlots(slots)
    for scheduled in (None, {0, 2}, None):
        results = []
        for own in (slots, plain):
            slots.scheduled = scheduled
            hidden, indices, weights = inputs(layer, 30, torch.float16, rig.device)
            output = run_ours(rig, layer, hidden, indices, weights, own)
            results.append(gradients(output, [hidden, weights, *all_of(plain)]))
            for leaf in all_of(plain):
                leaf.grad = None
        for place, (one, other) in enumerate(zip(*results, strict=True)):
            slot = next((s for s in range(4) if place - 3 in places_of(plain, s)), None)
            if scheduled is None or slot is None or slot in scheduled:
                assert torch.equal(one, other)
            else:
                assert one is None
        with torch.no_grad():
            for leaf in all_of(plain):
                leaf.mul_(1.25)
    assert slots.reads == 4


def test_hidden_states_of_another_dtype_than_the_weights(rig):
    layer = LAYERS["all nf4"]
    slots = make_slots(layer, torch.float16, rig.device)
    hidden, indices, weights = inputs(layer, 9, torch.float32, rig.device)
    ours = gradients(run_ours(rig, layer, hidden, indices, weights, slots), [hidden, weights])
    x, w = (t.detach().requires_grad_() for t in (hidden, weights))
    expected = gradients(run_reference(layer, x, indices, w, in_float32(slots)), [x, w])
    assert ours[0].dtype == ours[1].dtype == torch.float32
    assert_same(ours, expected, torch.float16)


def test_the_order_of_blocks_and_threads_changes_no_bit(rig):
    """On a GPU: the same bits from run to run."""
    layer = LAYERS["lora of two ranks"]
    results = []
    for falling in (False, True, False):
        if rig.emulated:
            rig.pretend(falling=falling)
        slots = make_slots(layer, torch.bfloat16, rig.device)
        hidden, indices, weights = inputs(layer, 120, torch.bfloat16, rig.device)
        leaves = [hidden, weights, *(t for slot in slots for t in tensors_of(slot))]
        results.append(gradients(run_ours(rig, layer, hidden, indices, weights, slots), leaves))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_slot_without_tokens_has_no_gradient(rig):
    layer = Layer(formats=("dense",) * 4, bias=True, lora=(8, 8, 8, 8))
    slots = make_slots(layer, torch.float32, rig.device)
    hidden, indices, weights = inputs(layer, 5, torch.float32, rig.device)
    indices = torch.where(indices == 2, -1, indices)
    output = run_ours(rig, layer, hidden, indices, weights, slots)
    output.sum().backward()
    assert all(t.grad is None for t in tensors_of(slots[2]))
    assert all(t.grad is not None for t in tensors_of(slots[1]))
    assert weights.grad[indices < 0].eq(0).all()
    assert weights.grad[indices >= 0].ne(0).all()


@pytest.mark.parametrize("tokens", [4, 40])
def test_a_frozen_nf4_layer_saves_tokens_indices_and_packed_weights(rig, tokens):
    layer = LAYERS["all nf4"]
    slots = make_slots(layer, torch.bfloat16, rig.device)
    hidden, indices, weights = inputs(layer, tokens, torch.bfloat16, rig.device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        run_ours(rig, layer, hidden, indices, weights, slots)
    packed = {t.data_ptr() for slot in slots for m in (slot.up, slot.down) for t in (m.packed, m.absmax)}
    rest = [t for t in saved if t.data_ptr() not in packed | {hidden.data_ptr(), weights.data_ptr()}]
    assert {t.dtype for t in rest} == {torch.int32}
    assert sum(t.numel() for t in rest) <= 3 * indices.numel() + rig.kernels.library.ef_cuda_work_size(4)


@pytest.mark.parametrize(("tokens", "top_k", "num_slots"), [(0, 2, 3), (3, 2, 0), (3, 0, 2), (3, 2, 2)])
def test_no_pairs_give_zeros(rig, tokens, top_k, num_slots):
    layer = Layer(formats=("dense",) * num_slots, lora=(0,) * num_slots)
    slots = make_slots(layer, torch.float32, rig.device)
    hidden = torch.randn(tokens, HIDDEN, device=rig.device, requires_grad=True)
    indices = torch.full((tokens, top_k), -1, device=rig.device)
    weights = torch.rand(tokens, top_k, device=rig.device)
    output = run_ours(rig, layer, hidden, indices, weights, slots)
    assert output.shape == hidden.shape
    assert output.eq(0).all()


def test_one_expert_takes_all(rig):
    layer = LAYERS["dense, nf4, int8 and frozen"]
    for slot in range(4):
        slots = make_slots(layer, torch.float16, rig.device)
        hidden, indices, weights = inputs(layer, 80, torch.float16, rig.device)
        indices = torch.full_like(indices, slot)
        expected = run_reference(layer, hidden.float(), indices, weights.float(), in_float32(slots))
        assert_same([run_ours(rig, layer, hidden, indices, weights, slots)], [expected.detach()], torch.float16)


def test_the_host_never_waits_for_the_device(rig):
    """In the forward pass, and in the backward pass of frozen weights."""
    if rig.emulated:
        pytest.skip("only a GPU has a host to wait")
    layer = LAYERS["all nf4"]
    slots = make_slots(layer, torch.float16, rig.device)
    for tokens in (4, 64):
        hidden, indices, weights = inputs(layer, tokens, torch.float16, rig.device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            run_ours(rig, layer, hidden, indices, weights, slots).backward(torch.ones_like(hidden))
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_unsupported_layers_use_the_reference(rig):
    hidden, indices, weights = inputs(Layer(), 4, torch.float32, rig.device)
    assert "float64" in cuda_experts.why_not(hidden.double(), weights, [])

    class Streamed(list):
        streamed = True

    assert "streamed" in cuda_experts.why_not(hidden, weights, Streamed())
    assert cuda_experts.why_not(hidden, weights, []) is None
    mixed = [*make_slots(Layer(), torch.float32, rig.device)[:2], *make_slots(Layer(), torch.float16, rig.device)[2:]]
    with pytest.raises(cuda_experts.Unsupported, match="torch.float16"):
        run_ours(rig, Layer(), hidden, indices, weights, mixed)
