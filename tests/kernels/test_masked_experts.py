"""masked_experts against a token-by-token oracle, its gradients, and its edge cases."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn import functional as F

from edgefed.kernels.masked_experts import LowRankPair, SlotWeights, by_width, masked_experts

HIDDEN, WIDTH, RANK = 6, 5, 2


def swiglu(up: torch.Tensor) -> torch.Tensor:
    gate, value = up.chunk(2, dim=-1)
    return F.silu(gate) * value


def interleaved_clamped(up: torch.Tensor) -> torch.Tensor:
    gate, value = up[..., ::2].clamp(max=1.0), up[..., 1::2].clamp(-1.0, 1.0)
    return (value + 1) * gate * torch.sigmoid(1.7 * gate)


LAYOUTS = {
    "gated": dict(activation=swiglu, gated=True),
    "ungated": dict(activation=F.relu, gated=False),
    "transposed, biased, interleaved": dict(activation=interleaved_clamped, gated=True, transposed=True, bias=True),
    "lora": dict(activation=swiglu, gated=True, lora=True),
    "transposed lora": dict(activation=swiglu, gated=True, transposed=True, bias=True, lora=True),
    "normed": dict(activation=swiglu, gated=True, finish=lambda x: F.rms_norm(x, (HIDDEN,))),
}


def make_slots(count, *, gated, transposed=False, bias=False, lora=False, dtype=torch.float64, **_):
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype).mul_(0.5).requires_grad_()

    width = 2 * WIDTH if gated else WIDTH
    slots = []
    for _ in range(count):
        slots.append(
            SlotWeights(
                up=random(HIDDEN, width) if transposed else random(width, HIDDEN),
                down=random(WIDTH, HIDDEN) if transposed else random(HIDDEN, WIDTH),
                up_bias=random(width) if bias else None,
                down_bias=random(HIDDEN) if bias else None,
                up_lora=LowRankPair(random(RANK, HIDDEN), random(width, RANK), 1.5) if lora else None,
                down_lora=LowRankPair(random(RANK, WIDTH), random(HIDDEN, RANK), 1.5) if lora else None,
            )
        )
    return slots


def tensors_of(slot: SlotWeights) -> list[torch.Tensor]:
    own = [slot.up, slot.down, slot.up_bias, slot.down_bias]
    adapters = [t for pair in (slot.up_lora, slot.down_lora) if pair for t in (pair.lora_a, pair.lora_b)]
    return [tensor for tensor in own if tensor is not None] + adapters


def run(hidden, indices, weights, slots, layout):
    return masked_experts(
        hidden,
        indices,
        weights,
        slots,
        activation=layout["activation"],
        is_transposed=layout.get("transposed", False),
        finish=layout.get("finish"),
    )


def oracle(hidden, indices, weights, slots, layout):
    """One token and one expert at a time, dense effective weights."""
    rows = []
    for token, (chosen, weight) in enumerate(zip(indices.tolist(), weights, strict=True)):
        row = torch.zeros(hidden.shape[1], dtype=hidden.dtype)
        for k, slot in enumerate(chosen):
            if slot < 0:
                continue
            s, x = slots[slot], hidden[token]

            def effective(matrix, pair):
                matrix = matrix.T if layout.get("transposed") else matrix
                return matrix if pair is None else matrix + pair.scale * pair.lora_b @ pair.lora_a

            up = effective(s.up, s.up_lora) @ x + (0 if s.up_bias is None else s.up_bias)
            down = effective(s.down, s.down_lora) @ layout["activation"](up)
            down = down + (0 if s.down_bias is None else s.down_bias)
            row = row + weight[k] * (layout["finish"](down) if "finish" in layout else down)
        rows.append(row)
    return torch.stack(rows) if rows else hidden.new_zeros(hidden.shape)


def inputs(num_tokens, top_k, num_slots, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, HIDDEN, generator=generator).to(dtype).requires_grad_()
    indices = torch.randint(-1, num_slots, (num_tokens, top_k), generator=generator)
    weights = torch.rand(num_tokens, top_k, generator=generator).to(dtype).requires_grad_()
    return hidden, indices, weights


@pytest.mark.parametrize("name", LAYOUTS)
def test_values_and_all_gradients_equal_oracle(name):
    layout = LAYOUTS[name]
    results = []
    for function in (run, oracle):
        slots = make_slots(4, **layout)
        hidden, indices, weights = inputs(11, 3, 4)
        output = function(hidden, indices, weights, slots, layout)
        output.square().sum().backward()
        leaves = [hidden, weights, *(t for slot in slots for t in tensors_of(slot))]
        results.append([output.detach(), *(leaf.grad for leaf in leaves)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradcheck(name):
    layout = LAYOUTS[name]
    slots = make_slots(3, **layout)
    hidden, indices, weights = inputs(4, 2, 3)
    indices[0] = torch.tensor([1, 1])  # the same expert twice, as merged experts do
    leaves = tensors_of(slots[1])

    def function(hidden, weights, *_):
        return run(hidden, indices, weights, slots, layout)

    assert torch.autograd.gradcheck(function, (hidden, weights, *leaves))


def test_dropped_pairs_cost_nothing_and_get_no_gradient():
    """Slots without a pair are never read; weights of dropped pairs get gradient 0."""

    class OnlyTwo:
        asked: list[int] = []

        def __len__(self):
            return 4

        def __getitem__(self, slot):
            self.asked.append(slot)
            return slots[slot]

    slots = make_slots(4, **LAYOUTS["gated"])
    hidden, _, weights = inputs(3, 2, 4)
    indices = torch.tensor([[2, -1], [-1, -1], [-1, 2]])
    watched = OnlyTwo()
    output = run(hidden, indices, weights, watched, LAYOUTS["gated"])
    output.sum().backward()
    assert watched.asked == [2]
    assert output[1].eq(0).all()
    assert hidden.grad[1].eq(0).all()
    assert weights.grad[indices < 0].eq(0).all()
    assert weights.grad[indices >= 0].ne(0).all()
    assert slots[0].up.grad is None
    assert slots[2].up.grad is not None


def test_a_detached_weight_still_passes_the_gradient_on():
    """A frozen expert computes no dW, but passes the gradient to the layers below it."""
    slots = make_slots(2, **LAYOUTS["gated"])
    frozen = SlotWeights(up=slots[0].up.detach(), down=slots[0].down.detach())
    hidden, _, weights = inputs(3, 1, 2)
    run(hidden, torch.zeros(3, 1, dtype=torch.int64), weights, [frozen, slots[1]], LAYOUTS["gated"]).sum().backward()
    assert hidden.grad.ne(0).any()
    assert slots[0].up.grad is None


@pytest.mark.parametrize(("num_tokens", "top_k", "num_slots"), [(0, 2, 3), (3, 2, 0), (3, 0, 2)])
def test_empty(num_tokens, top_k, num_slots):
    hidden = torch.randn(num_tokens, HIDDEN)
    indices = torch.full((num_tokens, top_k), -1)
    slots = make_slots(num_slots, **LAYOUTS["gated"], dtype=torch.float32)
    output = run(hidden, indices, torch.rand(num_tokens, top_k), slots, LAYOUTS["gated"])
    assert output.shape == hidden.shape
    assert output.eq(0).all()


def test_bfloat16_sums_in_float32():
    """256 equal contributions: added one by one in bfloat16 they would stop at a fraction of their sum."""
    layout = dict(activation=lambda up: up, gated=False)
    slots = [SlotWeights(up=torch.eye(1, dtype=torch.bfloat16), down=torch.eye(1, dtype=torch.bfloat16))] * 512
    output = run(
        torch.ones(1, 1, dtype=torch.bfloat16),
        torch.arange(512).unsqueeze(0),
        torch.ones(1, 512, dtype=torch.bfloat16),
        slots,
        layout,
    )
    assert output.dtype == torch.bfloat16
    assert output.item() == 512.0


def test_shapes_that_do_not_match_are_refused():
    slots = make_slots(2, **LAYOUTS["gated"], dtype=torch.float32)
    hidden = torch.randn(3, HIDDEN)
    with pytest.raises(ValueError, match=r"\(3, 6\) and slot_indices \(2, 1\)"):
        run(hidden, torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1), slots, LAYOUTS["gated"])
    with pytest.raises(ValueError, match="differ"):
        run(hidden, torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 2), slots, LAYOUTS["gated"])
    with pytest.raises(IndexError, match="slot 2 is out of range: there are 2 slots"):
        run(hidden, torch.full((3, 1), 2), torch.ones(3, 1), slots, LAYOUTS["gated"])


class Ragged(list):
    """Slots of different widths."""

    def __init__(self, slots, widths):
        super().__init__(slots)
        self.widths = widths


def ragged_slots(widths, dtype=torch.float64):
    generator = torch.Generator().manual_seed(4)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).mul_(0.3).to(dtype).requires_grad_()

    return Ragged([SlotWeights(up=random(2 * w, HIDDEN), down=random(HIDDEN, w)) for w in widths], tuple(widths))


@pytest.mark.parametrize("form", ["native", "by width"])
def test_slices_of_different_widths_match_the_reference(form):
    """Output and every gradient; native in float32, and width by width as backends do that take one width."""
    widths, dtype = (16, 5, 16, 48, 5), torch.float32 if form == "native" else torch.float64
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(-1, len(widths), (40, 3), generator=generator)
    results = []
    for name in ("reference", form):
        slots = ragged_slots(widths, dtype)
        hidden = torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        weights = torch.rand(40, 3, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
        if name == "by width":
            function = functools.partial(masked_experts, activation=swiglu, backend="reference")
            out = by_width(function, slots, widths, hidden, indices, weights)
        else:
            out = masked_experts(hidden, indices, weights, slots, activation=swiglu, backend=name)
        out.sin().sum().backward()
        results.append([out.detach(), hidden.grad, weights.grad, *(t.grad for s in slots for t in (s.up, s.down))])
    tolerance = dict(rtol=1e-4, atol=1e-5) if form == "native" else dict(rtol=1e-9, atol=1e-12)
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, **tolerance)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_neuron_energies_of_slices(backend):
    widths = (16, 5, 48)
    slots = ragged_slots(widths, torch.float32)
    indices = torch.randint(-1, len(widths), (600, 2), generator=torch.Generator().manual_seed(0))
    hidden = torch.randn(600, HIDDEN, generator=torch.Generator().manual_seed(1))
    weights = torch.rand(600, 2, generator=torch.Generator().manual_seed(2))
    energies = [torch.zeros(width, dtype=torch.float64) for width in widths]
    with torch.no_grad():
        for _ in range(2):  # they accumulate
            masked_experts(hidden, indices, weights, slots, activation=swiglu, backend=backend, neuron_energy=energies)
        for slot, energy in enumerate(energies):
            token, k = (indices == slot).nonzero(as_tuple=True)
            act = swiglu(hidden[token] @ slots[slot].up.T)
            parts = weights[token, k, None, None] * act[:, :, None] * slots[slot].down.T  # (P, I, H)
            expected = 2 * parts.double().square().sum(dim=(0, 2))
            torch.testing.assert_close(energy, expected, rtol=1e-4, atol=1e-9)
