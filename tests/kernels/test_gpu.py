"""Everything that only a GPU can show, by every backend of it, through the functions that edgefed itself calls.

    EDGEFED_REQUIRE_GPU=1 pytest -m gpu tests/kernels

Without a GPU these tests are skipped with the reason; with EDGEFED_REQUIRE_GPU=1 a missing GPU, driver, library or
Triton fails them instead, so that they cannot pass by having run nothing. The cases of layers are rehearsed on the CPU
with the native kernels, so that they are known to be sound before they meet a GPU.
"""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch
from torch.nn import functional as F

from edgefed.kernels import dispatch
from edgefed.kernels.masked_experts import LowRankPair, SlotWeights, masked_experts, masked_experts_reference
from edgefed.kernels.quantization import QuantizedMatrix, dequantize_experts, quantize_experts
from edgefed.kernels.router_statistics import GATE_KINDS, gate_of, new_statistics, router_statistics

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Relative error of a whole tensor (2-norm) against float32 throughout: roundings of operands and of rows between."""
PLACES = [
    pytest.param(("cpu", "native"), id="rehearsal"),
    pytest.param(("cuda", "triton"), id="triton", marks=pytest.mark.gpu),
    pytest.param(("cuda", "cuda"), id="cuda", marks=pytest.mark.gpu),
]
ON_GPU = PLACES[1:]


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """float32 products without TF32, and no requested from outside."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    monkeypatch.delenv("EDGEFED_KERNELS", raising=False)
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def place(request) -> tuple[str, str]:
    """Device type and backend. Skips, or fails where EDGEFED_REQUIRE_GPU asks for it, what cannot run here."""
    device, backend = request.param
    if device == "cuda" and not torch.cuda.is_available():
        reason = "torch sees no GPU"
    else:
        reason = {"triton": dispatch.why_not_triton, "cuda": dispatch.why_not_cuda, "native": dispatch.why_not_native}[
            backend
        ]()
    if reason is not None:
        (pytest.fail if device == "cuda" and os.environ.get("EDGEFED_REQUIRE_GPU") == "1" else pytest.skip)(reason)
    return device, backend


def swiglu(up: torch.Tensor) -> torch.Tensor:
    gate, value = up.chunk(2, dim=-1)
    return F.silu(gate) * value


def interleaved(up: torch.Tensor) -> torch.Tensor:
    gate, value = up[..., ::2], up[..., 1::2]
    return (value + 1) * gate * torch.sigmoid(1.7 * gate)


@dataclasses.dataclass(frozen=True)
class Layer:
    kinds: tuple[str, ...] = ("dense", "nf4", "int8", "nested", "frozen")
    tokens: int = 40
    top_k: int = 3
    hidden: int = 256
    width: int = 128
    activation: object = swiglu
    gated: bool = True
    transposed: bool = False
    bias: bool = False
    rank: int = 0
    finish: object = None
    route: str = "random"  # "random", "merged", "one" or "none"


LAYERS = {
    **{f"{tokens} tokens": Layer(tokens=tokens) for tokens in (1, 15, 16, 17, 600)},
    "lora on every slot": Layer(rank=8),
    "all nf4": Layer(kinds=("nf4",) * 6),
    "all dense": Layer(kinds=("dense",) * 6, tokens=200),
    "merged experts": Layer(route="merged"),
    "one expert takes all": Layer(route="one", tokens=300),
    "every pair dropped": Layer(route="none"),
    "gpt-oss": Layer(activation=interleaved, transposed=True, bias=True, kinds=("dense", "int8", "frozen")),
    "ungated": Layer(activation=F.silu, gated=False),
    "normed": Layer(finish=lambda rows: F.rms_norm(rows, rows.shape[-1:]) + 0.5),
    "no multiple of a tile": Layer(kinds=("dense", "frozen", "int8"), hidden=200, width=72, tokens=77),
    "sixty-four experts": Layer(kinds=("dense", "nf4") * 32, top_k=8, tokens=500),
}


def make_slots(layer: Layer, dtype: torch.dtype, device: str) -> list[SlotWeights]:
    generator = torch.Generator().manual_seed(1)
    wide = layer.width * (2 if layer.gated else 1)

    def random(*shape, requires_grad=True):
        values = torch.randn(*shape, generator=generator).mul_(shape[-1] ** -0.5).to(dtype).to(device)
        return values.requires_grad_(requires_grad)

    def weight(kind, rows, columns):
        value = random(*((columns, rows) if layer.transposed else (rows, columns)), requires_grad=kind == "dense")
        if kind in ("dense", "frozen"):
            return value
        format = "nf4" if kind == "nested" else kind
        return quantize_experts(value, format, nested=kind == "nested", backend="reference")

    def adapter(rows, columns):
        return LowRankPair(random(layer.rank, columns), random(rows, layer.rank), 0.5) if layer.rank else None

    return [
        SlotWeights(
            up=weight(kind, wide, layer.hidden),
            down=weight(kind, layer.hidden, layer.width),
            up_bias=random(wide) if layer.bias else None,
            down_bias=random(layer.hidden) if layer.bias else None,
            up_lora=adapter(wide, layer.hidden),
            down_lora=adapter(layer.hidden, layer.width),
        )
        for kind in layer.kinds
    ]


def in_float32(slot: SlotWeights) -> SlotWeights:
    """The same values as dense float32 leaves, so that the reference rounds nothing in between."""

    def widen(value):
        if isinstance(value, QuantizedMatrix):
            return dequantize_experts(value, backend="reference").float()
        if isinstance(value, LowRankPair):
            return LowRankPair(widen(value.lora_a), widen(value.lora_b), value.scale)
        return None if value is None else value.detach().float().requires_grad_(value.requires_grad)

    return SlotWeights(**{field.name: widen(getattr(slot, field.name)) for field in dataclasses.fields(SlotWeights)})


def leaves(slots: list[SlotWeights]) -> dict[str, torch.Tensor]:
    found = {}
    for index, slot in enumerate(slots):
        for field in dataclasses.fields(SlotWeights):
            value = getattr(slot, field.name)
            parts = {"a": value.lora_a, "b": value.lora_b} if isinstance(value, LowRankPair) else {"": value}
            for name, tensor in parts.items():
                if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                    found[f"slot {index} {field.name} {name}"] = tensor
    return found


def inputs(layer: Layer, dtype: torch.dtype, device: str):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(layer.tokens, layer.hidden, generator=generator).to(dtype).to(device).requires_grad_()
    indices = torch.randint(-1, len(layer.kinds), (layer.tokens, layer.top_k), generator=generator)
    if layer.route == "merged":
        indices = torch.where(indices > 1, 1, indices)
    elif layer.route != "random":
        indices = torch.full_like(indices, 1 if layer.route == "one" else -1)
    weights = torch.rand(layer.tokens, layer.top_k, generator=generator).to(dtype).to(device)
    upstream = torch.randn(layer.tokens, layer.hidden, generator=generator).to(dtype).to(device)
    return hidden, indices.to(device), weights.requires_grad_(), upstream


def assert_near(name: str, found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    found, expected = found.detach().double(), expected.detach().double()
    assert found.shape == expected.shape, name
    assert torch.isfinite(found).all(), name
    error = float((found - expected).norm() / expected.norm().clamp_min(1e-20))
    assert error <= TOLERANCE[dtype] or float(expected.norm()) == float(found.norm()) == 0, f"{name}: {error:.2e}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("place", PLACES, indirect=True)
def test_output_and_every_gradient_equal_the_reference(place, name, dtype):
    (device, backend), layer = place, LAYERS[name]
    slots = make_slots(layer, dtype, device)
    wide = [in_float32(slot) for slot in slots]
    hidden, indices, weights, upstream = inputs(layer, dtype, device)
    form = dict(activation=layer.activation, is_transposed=layer.transposed, finish=layer.finish)
    output = masked_experts(hidden, indices, weights, slots, backend=backend, **form)
    if output.requires_grad:  # else no pair is left
        output.backward(upstream)
    x, w = (tensor.detach().float().requires_grad_() for tensor in (hidden, weights))
    expected = masked_experts_reference(x, indices, w, wide, **form)
    if expected.requires_grad:
        expected.backward(upstream.float())
    assert output.dtype == dtype
    assert_near("output", output, expected, dtype)
    for what, own, other in (("tokens", hidden, x), ("gate weights", weights, w)):
        gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in (own, other)]
        assert_near(what, *gradients, dtype)
    others = leaves(wide)
    for what, tensor in leaves(slots).items():
        assert (tensor.grad is None) == (others[what].grad is None), f"{what} has a gradient in one of them only"
        if tensor.grad is not None:
            assert tensor.grad.dtype == dtype
            assert_near(what, tensor.grad, others[what].grad, dtype)


@pytest.mark.parametrize("shape", [(0, 2, 3), (3, 2, 0), (3, 0, 2)])
@pytest.mark.parametrize("place", PLACES, indirect=True)
def test_no_pairs_give_zeros(place, shape):
    (device, backend), (tokens, top_k, num_slots) = place, shape
    slots = make_slots(Layer(kinds=("nf4",) * num_slots), torch.bfloat16, device)
    hidden = torch.randn(tokens, 256, device=device, dtype=torch.bfloat16)
    indices, weights = torch.full((tokens, top_k), -1, device=device), torch.rand(tokens, top_k, device=device)
    output = masked_experts(hidden, indices, weights, slots, activation=swiglu, backend=backend)
    assert output.shape == hidden.shape
    assert output.eq(0).all()


@pytest.mark.parametrize("place", PLACES, indirect=True)
def test_the_same_bits_from_run_to_run(place):
    device, backend = place
    results = []
    for _ in range(2):
        layer = Layer(kinds=("dense", "nf4", "int8"), tokens=500, rank=4)
        slots = make_slots(layer, torch.bfloat16, device)
        hidden, indices, weights, upstream = inputs(layer, torch.bfloat16, device)
        output = masked_experts(hidden, indices, weights, slots, activation=swiglu, backend=backend)
        output.backward(upstream)
        results.append([output.detach(), hidden.grad, weights.grad, *(t.grad for t in leaves(slots).values())])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("kinds", [("nf4",) * 8, ("dense",) * 8])
@pytest.mark.parametrize("tokens", [1, 64])
@pytest.mark.parametrize("place", ON_GPU, indirect=True)
def test_the_host_never_waits(place, tokens, kinds):
    """In the forward pass, and in the backward pass where only tokens and gate weights have gradients."""
    device, backend = place
    layer = Layer(kinds=kinds, tokens=tokens)
    slots = make_slots(layer, torch.bfloat16, device)
    hidden, indices, weights, upstream = inputs(layer, torch.bfloat16, device)
    run = lambda: masked_experts(hidden, indices, weights, slots, activation=swiglu, backend=backend)  # noqa: E731
    run().backward(upstream)  # compiles, and measures the gate
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = run()
        if kinds[0] == "nf4":
            output.backward(upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("place", ON_GPU, indirect=True)
def test_a_frozen_layer_is_never_unpacked_as_a_whole(place):
    """64 NF4 experts of 3 x 2048 x 1024, forward and backward of 16 tokens: far below their 0.8 GB in bfloat16."""
    device, backend = place
    up, down = (
        torch.randn(8, rows, columns, device=device).bfloat16() for rows, columns in ((2048, 2048), (2048, 1024))
    )
    ups, downs = (quantize_experts(stack, "nf4", backend="reference") for stack in (up, down))
    slots = [SlotWeights(ups[slot % 8].to(device), downs[slot % 8].to(device)) for slot in range(64)]
    dense_bytes = 64 * (2048 * 2048 + 2048 * 1024) * 2
    del up, down
    hidden = torch.randn(16, 2048, device=device, dtype=torch.bfloat16, requires_grad=True)
    indices = torch.arange(128, device=device).reshape(16, 8) % 64
    weights = torch.rand(16, 8, device=device, requires_grad=True)
    for _ in range(2):  # the first call also compiles
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        masked_experts(hidden, indices, weights, slots, activation=swiglu, backend=backend).sum().backward()
        used = torch.cuda.max_memory_allocated() - before
    assert used < dense_bytes / 20, f"{used / 2**20:.0f} MiB"


@pytest.mark.parametrize("place", ON_GPU, indirect=True)
def test_slots_farther_apart_than_32_bits(place):
    """Two experts at both ends of a storage of more than 2^31 weights."""
    device, backend = place
    size = 2**31 + 2**20
    if torch.cuda.mem_get_info()[0] < 3 * size:
        pytest.skip("too little free memory for a storage of 2^31 weights")
    storage = torch.empty(size, device=device, dtype=torch.float16)
    hidden_size, width = 256, 128
    pieces = []
    for start in (0, size - 3 * hidden_size * width):
        up = storage[start : start + 2 * hidden_size * width].view(2 * width, hidden_size)
        down = storage[start + up.numel() : start + 3 * hidden_size * width].view(hidden_size, width)
        pieces.append(SlotWeights(up.normal_(std=0.05), down.normal_(std=0.05)))
    layer = Layer(kinds=("frozen",) * 2)
    hidden, indices, weights, _ = inputs(layer, torch.float16, device)
    with torch.no_grad():
        found = masked_experts(hidden, indices, weights, pieces, activation=swiglu, backend=backend)
        copies = [SlotWeights(slot.up.float(), slot.down.float()) for slot in pieces]
        expected = masked_experts_reference(hidden.float(), indices, weights.float(), copies, activation=swiglu)
    assert_near("output", found, expected, torch.float16)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize("place", PLACES, indirect=True)
def test_quantized_bytes_are_those_of_the_reference(place, format, dtype):
    device, backend = place
    weights = torch.randn(4, 256, 512, generator=torch.Generator().manual_seed(2)).mul_(0.05).to(dtype)
    weights[0, 0] = 0
    expected = quantize_experts(weights, format, backend="reference")
    found = quantize_experts(weights.to(device), format, backend=backend)
    assert torch.equal(found.packed.cpu(), expected.packed)
    assert torch.equal(found.absmax.cpu(), expected.absmax)
    for target in TOLERANCE:
        values = dequantize_experts(found, target, backend=backend).cpu()
        assert torch.equal(values, dequantize_experts(expected, target, backend="reference"))


@pytest.mark.parametrize("kind", GATE_KINDS)
@pytest.mark.parametrize("place", PLACES, indirect=True)
def test_router_statistics_equal_the_reference(place, kind):
    device, backend = place
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(5000, 64, generator=generator)
    router = gate_of(logits, "softmax") if kind == "probability" else logits
    weights, indices = gate_of(logits, "softmax").topk(8, dim=1)
    expected, found = new_statistics(64), new_statistics(64, device)
    router_statistics(expected, router.double(), indices, weights.double(), kind=kind, backend="reference")
    router_statistics(found, *(t.to(device) for t in (router, indices, weights)), kind=kind, backend=backend)
    assert torch.equal(found[0].cpu(), expected[0])  # counts are exact
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("place", PLACES, indirect=True)
def test_a_transformers_model_trains_as_with_eager(place, monkeypatch):
    from transformers import OlmoeConfig, OlmoeForCausalLM

    import edgefed

    device, backend = place
    monkeypatch.setenv("EDGEFED_KERNELS", backend)
    edgefed.register_experts()
    config = OlmoeConfig(
        vocab_size=96, hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_experts=8, num_experts_per_tok=2, initializer_range=0.1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = OlmoeForCausalLM(config).to(device)
    ids = torch.randint(3, 90, (2, 31), generator=torch.Generator().manual_seed(1)).to(device)
    results = []
    for implementation in ("eager", "edgefed"):
        model.set_experts_implementation(implementation)
        model.zero_grad(set_to_none=True)
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        results.append({"logits": output.logits} | {name: p.grad.clone() for name, p in model.named_parameters()})
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=1e-3, atol=1e-4, msg=name)
    answers = []
    for implementation in ("eager", "edgefed"):  # decoding: one token at a time
        model.set_experts_implementation(implementation)
        answers.append(model.generate(ids[:1, :4], max_new_tokens=6, do_sample=False, eos_token_id=None))
    assert torch.equal(*answers)
