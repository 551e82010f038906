"""masked_experts in Triton against the reference: values and every gradient. Run by test_triton_values.py, in a process
of its own: in Triton's interpreter where there is no GPU, on the GPU where there is one.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from edgefed.kernels import quantization
from edgefed.kernels.masked_experts import LastingSlots, LowRankPair, SlotWeights
from edgefed.kernels.masked_experts import masked_experts_reference as reference
from edgefed.triton_kernels import masked_experts as module
from edgefed.triton_kernels.gate import is_swiglu
from edgefed.triton_kernels.masked_experts import masked_experts
from edgefed.triton_kernels.projection import Unsupported
from edgefed.triton_kernels.tensor_types import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
HIDDEN, WIDTH, RANK = 128, 64, 4
ERROR = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Relative error of a whole tensor (2-norm): roundings of the products' operands and of the rows in between."""


def swiglu(up: torch.Tensor) -> torch.Tensor:
    gate, value = up.chunk(2, dim=-1)
    return F.silu(gate) * value


def interleaved_clamped(up: torch.Tensor) -> torch.Tensor:
    gate, value = up[..., ::2].clamp(max=1.0), up[..., 1::2].clamp(-1.0, 1.0)
    return (value + 1) * gate * torch.sigmoid(1.7 * gate)


def make_slot(
    index, kind, *, dtype=torch.float32, transposed=False, bias=False, lora=False, gated=True, trainable=True,
    hidden=HIDDEN, inner=WIDTH,
):  # fmt: skip
    """A slot of one kind: plain, nf4, int8, nf4 nested. Plain ones are trainable on request; adapters always are."""
    generator = torch.Generator().manual_seed(index)
    width = 2 * inner if gated else inner

    def random(*shape, dtype=dtype, requires_grad=trainable):
        value = (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(DEVICE, dtype)
        return value.requires_grad_(requires_grad)

    def matrix(rows, columns):
        shape = (columns, rows) if transposed else (rows, columns)
        if kind == "plain":
            return random(*shape)
        nested = kind == "nested"
        value = random(*shape, requires_grad=False).cpu()
        stored = quantization.quantize_experts(value, "nf4" if nested else kind, nested=nested, backend="reference")
        return stored.to(DEVICE)

    def pair(rows, columns):
        if not lora:
            return None
        return LowRankPair(
            random(RANK, columns, dtype=torch.float32, requires_grad=True),
            random(rows, RANK, dtype=torch.float32, requires_grad=True),
            1.5,
        )

    return SlotWeights(
        up=matrix(width, hidden),
        down=matrix(hidden, inner),
        up_bias=random(width) if bias else None,
        down_bias=random(hidden) if bias else None,
        up_lora=pair(width, hidden),
        down_lora=pair(hidden, inner),
    )


def dense(slot: SlotWeights) -> SlotWeights:
    """The same slot with its quantized matrices as tensors, and leaves of its own."""

    def copy(value):
        if isinstance(value, torch.Tensor):
            return value.detach().clone().requires_grad_(value.requires_grad)
        if isinstance(value, LowRankPair):
            return LowRankPair(copy(value.lora_a), copy(value.lora_b), value.scale)
        return value if value is None else quantization.dequantize_experts(value, backend="reference")

    return SlotWeights(**{field.name: copy(getattr(slot, field.name)) for field in dataclasses.fields(SlotWeights)})


def leaves(slots):
    found = {}
    for index, slot in enumerate(slots):
        for field in dataclasses.fields(SlotWeights):
            value = getattr(slot, field.name)
            parts = {"": value} if not isinstance(value, LowRankPair) else {".a": value.lora_a, ".b": value.lora_b}
            for name, tensor in parts.items():
                if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                    found[f"slot {index} {field.name}{name}"] = tensor
    return found


def run(function, slots, indices, dtype, options, weights_dtype=torch.float32):
    width = (slots[0].up.shape[0] if options.get("is_transposed") else slots[0].up.shape[1]) if slots else HIDDEN
    generator = torch.Generator().manual_seed(7)
    num_tokens, top_k = indices.shape
    hidden = torch.randn(num_tokens, width, generator=generator).to(DEVICE, dtype).requires_grad_()
    weights = torch.rand(num_tokens, top_k, generator=generator).to(DEVICE, weights_dtype).requires_grad_()
    upstream = torch.randn(num_tokens, width, generator=generator).to(DEVICE, dtype)
    out = function(hidden, indices.to(DEVICE), weights, slots, **options)
    out.backward(upstream)
    return out, {"hidden": hidden, "expert_weights": weights} | leaves(slots)


def check(slots, indices, dtype, options, weights_dtype=torch.float32, **ours):
    out, ours_leaves = run(masked_experts, slots, indices, dtype, options | ours, weights_dtype)
    expected, expected_leaves = run(reference, [dense(slot) for slot in slots], indices, dtype, options, weights_dtype)
    assert out.dtype == expected.dtype
    assert ours_leaves.keys() == expected_leaves.keys()
    assert_near("output", out, expected, dtype)
    for name, leaf in ours_leaves.items():
        other = expected_leaves[name].grad
        assert (leaf.grad is None) == (other is None), name
        if other is not None:
            assert leaf.grad.dtype == other.dtype
            assert leaf.grad.shape == other.shape
            assert_near(name, leaf.grad, other, dtype)


def assert_near(name, value, expected, dtype):
    value, expected = value.detach().double(), expected.detach().double()
    assert torch.isfinite(value).all(), name
    error = (value - expected).norm() / expected.norm().clamp_min(1e-30)
    assert error <= ERROR[dtype], f"{name}: relative error {error:.2e}"


def choose_slots(num_tokens, top_k, num_slots, *, without=()):
    indices = torch.randint(-1, num_slots, (num_tokens, top_k), generator=torch.Generator().manual_seed(3))
    for slot in without:
        indices[indices == slot] = -1
    return indices


MIXTURES = {
    "plain": ["plain"] * 3,
    "nf4": ["nf4"] * 3,
    "int8": ["int8"] * 3,
    "mixed": ["plain", "nf4", "int8", "nested", "plain"],
}


@pytest.mark.parametrize("lora", [False, True], ids=["", "lora"])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_swiglu_equals_the_reference(mixture, lora):
    kinds = MIXTURES[mixture]
    slots = [make_slot(i, kind, dtype=torch.float32, lora=lora) for i, kind in enumerate(kinds)]
    check(slots, choose_slots(13, 3, len(slots)), torch.float32, dict(activation=swiglu))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    slots = [make_slot(i, kind, dtype=dtype, lora=i % 2 == 0) for i, kind in enumerate(MIXTURES["mixed"])]
    check(slots, choose_slots(13, 2, len(slots)), dtype, dict(activation=swiglu), dtype)


@pytest.mark.parametrize(("dtype", "num_tokens"), [(torch.float32, 24), (torch.bfloat16, 24), (torch.bfloat16, 110)])
def test_large_tiles_and_sizes_that_are_not_their_multiples(dtype, num_tokens):
    """Many rows per slot take the tiles of 64 and 128 rows; 72 and 40 fit no tile."""
    slots = [make_slot(i, "plain", dtype=dtype, hidden=72, inner=40, lora=True) for i in range(2)]
    check(slots, choose_slots(num_tokens, 2, 2), dtype, dict(activation=swiglu), dtype)
    slots = [make_slot(i, kind, dtype=dtype) for i, kind in enumerate(["nf4", "int8"])]
    check(slots, choose_slots(num_tokens, 2, 2), dtype, dict(activation=swiglu), dtype)


LAYERS = {
    "own gate, biased": dict(slot=dict(bias=True), activation=interleaved_clamped),
    "transposed, biased, lora": dict(slot=dict(bias=True, transposed=True, lora=True), activation=interleaved_clamped),
    "ungated": dict(slot=dict(gated=False), activation=F.relu),
    "normed": dict(slot={}, activation=swiglu, finish=lambda x: F.rms_norm(x, x.shape[-1:])),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_other_layers_equal_the_reference(layer):
    layer = dict(LAYERS[layer])
    form = layer.pop("slot")
    slots = [make_slot(i, kind, **form) for i, kind in enumerate(["plain", "nf4", "int8"])]
    options = layer | {"is_transposed": form.get("transposed", False)}
    assert not is_swiglu(layer["activation"], WIDTH) or "finish" in layer
    check(slots, choose_slots(13, 2, 3), torch.float32, options)


def test_saved_activations_give_the_same_and_the_graph_may_run_twice():
    indices = choose_slots(13, 2, 2)
    for keep in (True, False):
        slots = [make_slot(i, kind, lora=True) for i, kind in enumerate(["plain", "nf4"])]
        check(slots, indices, torch.float32, dict(activation=swiglu), keep_activations=keep)
    hidden = torch.randn(13, HIDDEN, device=DEVICE, requires_grad=True)
    weights = torch.rand(13, 2, device=DEVICE)
    options = dict(activation=swiglu, keep_activations=True)
    total = masked_experts(hidden, indices.to(DEVICE), weights, slots, **options).sum()
    first = torch.autograd.grad(total, hidden, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(total, hidden)[0])


def test_slots_of_different_dtypes_and_merged_experts():
    """A trainable float32 slot beside bfloat16 NF4; the same slot twice in one token's choice."""
    slots = [make_slot(0, "plain"), make_slot(1, "nf4", dtype=torch.float16)]
    indices = choose_slots(9, 2, 2)
    indices[0], indices[1] = torch.tensor([1, 1]), torch.tensor([0, 0])
    out, _ = run(masked_experts, slots, indices, torch.float16, dict(activation=swiglu))
    expected, _ = run(reference, [dense(slot) for slot in slots], indices, torch.float16, dict(activation=swiglu))
    assert_near("output", out, expected, torch.float16)


def test_a_slot_without_a_token_gets_no_gradient_and_others_do():
    slots = [make_slot(i, "plain", lora=i > 1) for i in range(4)]
    run(masked_experts, slots, choose_slots(15, 2, 4, without=(0, 3)), torch.float32, dict(activation=swiglu))
    with_gradient = {name.split()[1] for name, leaf in leaves(slots).items() if leaf.grad is not None}
    assert with_gradient == {"1", "2"}
    assert all(leaf.grad is None for leaf in leaves([slots[0], slots[3]]).values())


def test_frozen_slots_pass_the_gradient_on_and_get_none():
    slots = [make_slot(0, "plain", trainable=False), make_slot(1, "plain")]
    check(slots, choose_slots(9, 2, 2), torch.float32, dict(activation=swiglu))
    assert slots[0].up.grad is None
    assert slots[1].up.grad is not None


@pytest.mark.parametrize(("num_tokens", "top_k", "num_slots"), [(0, 2, 3), (3, 2, 0), (3, 0, 2)])
def test_empty(num_tokens, top_k, num_slots):
    slots = [make_slot(i, "plain") for i in range(num_slots)]
    hidden, weights = torch.randn(num_tokens, HIDDEN, device=DEVICE), torch.rand(num_tokens, top_k, device=DEVICE)
    indices = torch.full((num_tokens, top_k), -1, device=DEVICE)
    out = masked_experts(hidden, indices, weights, slots, activation=swiglu)
    assert out.shape == hidden.shape
    assert out.eq(0).all()


def test_every_pair_dropped():
    slots = [make_slot(i, "plain", lora=True) for i in range(3)]
    out, found = run(masked_experts, slots, torch.full((3, 2), -1), torch.float32, dict(activation=swiglu))
    assert out.eq(0).all()
    assert found["hidden"].grad.eq(0).all()
    assert found["expert_weights"].grad.eq(0).all()
    assert all(leaf.grad is None for leaf in leaves(slots).values())


def test_all_tokens_to_one_slot():
    slots = [make_slot(i, "nf4") for i in range(3)]
    check(slots, torch.full((20, 1), 1), torch.float32, dict(activation=swiglu))


def test_the_backward_pass_saves_tokens_indices_and_stored_weights_only():
    slots = [make_slot(i, "nf4", dtype=torch.float16) for i in range(3)]
    stored = {t.data_ptr() for s in slots for m in (s.up, s.down) for t in (m.packed, m.absmax)}
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    num_tokens, top_k = 30, 2
    hidden = torch.randn(num_tokens, HIDDEN, device=DEVICE, dtype=torch.float16, requires_grad=True)
    weights = torch.rand(num_tokens, top_k, device=DEVICE, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        masked_experts(
            hidden, choose_slots(num_tokens, top_k, 3).to(DEVICE), weights, slots, activation=swiglu
        ).sum().backward()
    others = [t for t in saved if t.data_ptr() not in stored]
    floating = sorted(tuple(t.shape) for t in others if t.is_floating_point())
    assert floating == [(num_tokens, top_k), (num_tokens, HIDDEN)]
    assert sum(t.numel() for t in others if not t.is_floating_point()) <= 2 * num_tokens * top_k + 3 * (30 + 3) + 4


def test_two_runs_give_the_same_bits():
    results = []
    for _ in range(2):
        slots = [make_slot(i, kind, lora=True) for i, kind in enumerate(["plain", "nf4"])]
        out, found = run(masked_experts, slots, choose_slots(17, 2, 2), torch.float32, dict(activation=swiglu))
        results.append([out, *(leaf.grad for leaf in found.values())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class _HostQuestions(torch.utils._python_dispatch.TorchDispatchMode):
    """Fail at an operation that reads a value on the host, or has a shape that depends on values."""

    ASKS = ("_local_scalar_dense", "nonzero", "bincount", "unique", "masked_select", "is_nonzero", "equal.default")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(name in str(func) for name in self.ASKS), func
        return func(*args, **(kwargs or {}))


def test_the_forward_pass_never_waits_for_the_device():
    slots = [make_slot(i, kind, lora=True) for i, kind in enumerate(MIXTURES["mixed"])]
    hidden = torch.randn(20, HIDDEN, device=DEVICE)
    indices, weights = choose_slots(20, 2, 5).to(DEVICE), torch.rand(20, 2, device=DEVICE)
    options = dict(activation=swiglu)
    masked_experts(hidden, indices, weights, slots, **options)  # measures the gate
    with torch.no_grad(), _HostQuestions():
        out = masked_experts(hidden, indices, weights, slots, **options)
    assert torch.isfinite(out).all()
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            masked_experts(hidden, indices, weights, slots, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")


class Lasting(list):
    """Slots that keep their tensors, as those of a bank; counts how often they are read."""

    reads, scheduled = 0, None

    def __init__(self, slots):
        super().__init__(slots)
        self.lasting = LastingSlots(self)

    def __getitem__(self, slot):
        self.reads += 1
        return super().__getitem__(slot)


@pytest.mark.parametrize("bias", [False, True])  # in one node, or in three
def test_lasting_slots_are_read_once_and_see_new_values(bias):
    plain = [make_slot(index, kind, lora=True, bias=bias) for index, kind in enumerate(("plain", "nf4", "int8"))]
    slots = Lasting(plain)
    indices = torch.tensor([[0, 1], [1, 2], [2, 0]])
    for scheduled in (None, {0, 2}):
        found = []
        for own in (slots, plain):
            slots.scheduled = scheduled
            out, tensors = run(masked_experts, own, indices, torch.float32, {"activation": swiglu})
            found.append({"output": out.detach()} | {name: tensor.grad for name, tensor in tensors.items()})
            for leaf in leaves(plain).values():
                leaf.grad = None
        for name, expected in found[1].items():
            if scheduled is not None and name.startswith("slot 1"):
                assert found[0][name] is None
            else:
                assert torch.equal(found[0][name], expected), name
        with torch.no_grad():
            for leaf in leaves(plain).values():
                leaf.mul_(1.25)
    assert slots.reads <= 3 + 2 * 2  # `run` reads slot 0 for its width


def test_layers_without_a_kernel_are_refused_with_the_reason():
    slots = [make_slot(0, "plain", dtype=torch.float64)]
    hidden, weights = torch.randn(2, HIDDEN, device=DEVICE), torch.ones(2, 1, device=DEVICE)
    indices = torch.zeros(2, 1, dtype=torch.int64, device=DEVICE)
    with pytest.raises(Unsupported, match="float64"):
        masked_experts(hidden, indices, weights, slots, activation=swiglu)
    narrow = make_slot(0, "plain", hidden=72, inner=40).up.detach().cpu()
    stored = quantization.quantize_experts(narrow, "nf4", backend="reference").to(DEVICE)
    with pytest.raises(Unsupported, match="multiples of 64"):
        masked_experts(hidden, indices, weights, [SlotWeights(up=stored, down=stored)], activation=swiglu)
    shapes = [make_slot(0, "plain"), make_slot(1, "plain", inner=32)]
    with pytest.raises(Unsupported, match="slot 1"):
        masked_experts(hidden, indices, weights, shapes, activation=swiglu)
    with pytest.raises(Unsupported, match="float64 tokens"):
        masked_experts(hidden.double(), indices, weights, shapes, activation=swiglu)

    assert module.why_not(hidden, weights, shapes) is None

    class Stream(list):
        streamed = True

    with pytest.raises(Unsupported, match="one at a time"):
        masked_experts(hidden, indices, weights, Stream(shapes), activation=swiglu)
    with pytest.raises(ValueError, match=r"\(T, K\)"):
        masked_experts(hidden, indices[:1], weights, slots, activation=swiglu)
    with pytest.raises(ValueError, match="differ"):
        masked_experts(hidden, indices, weights.repeat(1, 2), slots, activation=swiglu)


def test_the_gate_is_measured():
    class Experts(torch.nn.Module):
        def gate(self, x):
            return swiglu(x)

    experts = Experts()
    assert is_swiglu(experts.gate, 40)
    assert is_swiglu(experts.gate, 40)
    assert is_swiglu(swiglu, WIDTH)
    assert not is_swiglu(interleaved_clamped, WIDTH)
    assert not is_swiglu(F.relu, WIDTH)
    assert not is_swiglu(lambda x: F.gelu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1], WIDTH)


def test_tiles_follow_the_rows_per_slot():
    rows = [module.rows_per_tile(pairs, 64, 2) for pairs in (8, 1024, 4096, 32768)]
    assert rows == [16, 16, 64, 128]
    assert module.rows_per_tile(32768, 64, 4) == 64
