"""The native experts against the specification: values, every gradient, saved tensors, every instruction set."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from edgefed.errors import ConfigError
from edgefed.kernels import masked_experts as experts_module
from edgefed.kernels import native_products
from edgefed.kernels.dispatch import why_not_native
from edgefed.kernels.masked_experts import LowRankPair, SlotWeights, masked_experts
from edgefed.kernels.native_call import is_swiglu
from edgefed.kernels.quantization import QuantizedMatrix, quantize_experts
from edgefed.native import ISA_CODES, dtype_code, isa_names, load_native

pytestmark = pytest.mark.skipif(why_not_native() is not None, reason=f"no native library: {why_not_native()}")

HIDDEN, WIDTH, RANK = 128, 64, 3
ISAS = isa_names(load_native()) if why_not_native() is None else []
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Relative error of a result against the reference in float32, by the dtype that both compute in."""


def swiglu(up: torch.Tensor) -> torch.Tensor:
    gate, value = up.chunk(2, dim=-1)
    return F.silu(gate) * value


def interleaved_clamped(up: torch.Tensor) -> torch.Tensor:
    gate, value = up[..., ::2].clamp(max=7.0), up[..., 1::2].clamp(-7.0, 7.0)
    return (value + 1) * gate * torch.sigmoid(1.7 * gate)


def make_slots(kinds, dtype, *, transposed=False, gated=True, bias=False, lora=False, trains=True, seed=0):
    """One slot for each of ``kinds``: "dense", "nf4", "nested" or "int8"."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    def leaf(tensor):
        return tensor.requires_grad_(trains)

    def weight(rows, columns, kind):
        shape = (columns, rows) if transposed else (rows, columns)
        dense = random(*shape, scale=columns**-0.5)
        if kind == "dense":
            return leaf(dense)
        return quantize_experts(dense, "int8" if kind == "int8" else "nf4", nested=kind == "nested")

    def adapter(rows, columns):
        a = torch.randn(RANK, columns, generator=generator) * columns**-0.5
        return LowRankPair(leaf(a), leaf(torch.randn(rows, RANK, generator=generator)), 0.5)

    width = 2 * WIDTH if gated else WIDTH
    return [
        SlotWeights(
            up=weight(width, HIDDEN, kind),
            down=weight(HIDDEN, WIDTH, kind),
            up_bias=leaf(random(width, scale=0.1)) if bias else None,
            down_bias=leaf(random(HIDDEN, scale=0.1)) if bias else None,
            up_lora=adapter(width, HIDDEN) if lora else None,
            down_lora=adapter(HIDDEN, WIDTH) if lora else None,
        )
        for kind in kinds
    ]


def leaves_of(slot: SlotWeights) -> list[torch.Tensor]:
    own = [slot.up, slot.down, slot.up_bias, slot.down_bias]
    adapters = [t for pair in (slot.up_lora, slot.down_lora) if pair for t in (pair.lora_a, pair.lora_b)]
    return [t for t in own if isinstance(t, torch.Tensor)] + adapters


def in_float32(slot: SlotWeights) -> SlotWeights:
    """The same slot with all weights dense in float32, and new leaves."""

    def convert(value):
        if isinstance(value, QuantizedMatrix):
            from edgefed.kernels.quantization import dequantize_experts

            return dequantize_experts(value, backend="reference").float()
        if isinstance(value, LowRankPair):
            return dataclasses.replace(value, lora_a=convert(value.lora_a), lora_b=convert(value.lora_b))
        return None if value is None else value.detach().float().requires_grad_(value.requires_grad)

    return SlotWeights(**{f.name: convert(getattr(slot, f.name)) for f in dataclasses.fields(SlotWeights)})


def make_inputs(num_tokens, top_k, num_slots, dtype, seed=1):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, HIDDEN, generator=generator).to(dtype).requires_grad_()
    indices = torch.randint(-1, num_slots, (num_tokens, top_k), generator=generator)
    weights = torch.rand(num_tokens, top_k, generator=generator).to(dtype).requires_grad_()
    return hidden, indices, weights


def relative_error(found, expected):
    found, expected = found.detach(), expected.detach()
    return float((found.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-12))


def assert_same_as_reference(kinds, dtype, num_tokens, *, top_k=2, tolerance=None, activation=swiglu, **options):
    layout = {name: options.pop(name) for name in ("transposed", "gated", "bias", "lora") if name in options}
    slots = make_slots(kinds, dtype, **layout)
    hidden, indices, weights = make_inputs(num_tokens, top_k, len(slots), dtype)
    direction = torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(2))

    def run(hidden, weights, slots, **more):
        return masked_experts(
            hidden, indices, weights, slots, activation=activation,
            is_transposed=layout.get("transposed", False), **more,
        )  # fmt: skip

    ours = run(hidden, weights, slots, backend="native", **options)
    (ours.float() * direction).sum().backward()
    exact_hidden, exact_weights = (t.detach().float().requires_grad_() for t in (hidden, weights))
    exact_slots = [in_float32(slot) for slot in slots]
    exact = run(exact_hidden, exact_weights, exact_slots, backend="reference")
    (exact * direction).sum().backward()
    tolerance = tolerance or TOLERANCE[dtype]
    assert ours.dtype == dtype
    assert relative_error(ours, exact) < tolerance
    pairs = [(hidden, exact_hidden), (weights, exact_weights)]
    used = set(indices.flatten().tolist())
    for number, (slot, exact_slot, kind) in enumerate(zip(slots, exact_slots, kinds, strict=True)):
        own = leaves_of(slot)
        theirs = leaves_of(exact_slot)
        if kind != "dense":
            theirs = [t for t in theirs if not (t is exact_slot.up or t is exact_slot.down)]
        for found, expected in zip(own, theirs, strict=True):
            if number in used:
                pairs.append((found, expected))
            else:
                assert found.grad is None
    for found, expected in pairs:
        assert found.grad.dtype == found.dtype
        assert relative_error(found.grad, expected.grad) < 2 * tolerance


KINDS = {
    "dense": ["dense"] * 3,
    "nf4": ["nf4"] * 3,
    "int8": ["int8"] * 3,
    "mixed": ["dense", "nf4", "int8", "nested", "dense"],
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 7, 90], ids=["one token", "few", "many"])
@pytest.mark.parametrize("kinds", KINDS)
def test_values_and_all_gradients_equal_the_reference(kinds, num_tokens, dtype):
    assert_same_as_reference(KINDS[kinds], dtype, num_tokens)


LAYOUTS = {
    "ungated": dict(gated=False, activation=F.relu),
    "transposed, biased, interleaved": dict(transposed=True, bias=True, activation=interleaved_clamped),
    "lora": dict(lora=True),
    "biased lora": dict(lora=True, bias=True),
    "transposed lora": dict(lora=True, transposed=True),
    "saved activations": dict(keep_activations=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_equals_the_reference(name, dtype):
    for num_tokens in (5, 60):
        assert_same_as_reference(KINDS["mixed"], dtype, num_tokens, **LAYOUTS[name])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_instruction_set_equals_the_reference(isa, dtype, monkeypatch):
    monkeypatch.setenv("EDGEFED_ISA", isa)
    for num_tokens in (6, 50):
        assert_same_as_reference(KINDS["mixed"], dtype, num_tokens)


@pytest.mark.parametrize("kernel", ["ROWS", "ROWS_INT8", "TILES", "TILES_INT8"])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ["nf4", "int8", "dense"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_kernel_multiplies_with_the_stored_matrix(kernel, isa, kind, dtype, monkeypatch):
    """More than one panel, more rows than a chunk, a k longer than a panel; gathered rows; both directions."""
    monkeypatch.setenv("EDGEFED_ISA", isa)
    number, ran = getattr(native_products, kernel), 0
    for rows, columns, counts in ((192, 2112, [1, 7, 3]), (64, 64, [300, 2, 17]), (1088, 128, [1, 6, 33])):
        dense = torch.randn(len(counts), rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
        stored = [dense[i] if kind == "dense" else quantize_experts(dense[i], kind) for i in range(len(counts))]
        for transposed in (False, True):
            tensors, entries, begin = [], [], 0
            for weight, count in zip(stored, counts, strict=True):
                if kind == "dense":
                    matrix = native_products.Matrix(len(tensors), -1, dtype_code(dtype), (rows, columns), 0, dtype)
                    tensors += [weight]
                else:
                    matrix = native_products.Matrix(
                        len(tensors), len(tensors) + 1, native_products.DTYPE_CODES[kind], (rows, columns),
                        weight.blocksize, dtype,
                    )  # fmt: skip
                    tensors += [weight.packed, weight.scales()]
                entries.append((matrix, begin, begin + count))
                begin += count
            if not native_products.can_run(entries[0][0], dtype, transposed, number):
                continue
            ran += 1
            monkeypatch.setattr(native_products, "choose_kernel", lambda *_: number)
            x = torch.randn(40, rows if transposed else columns, generator=torch.Generator().manual_seed(1)).to(dtype)
            x_rows = torch.randint(0, 40, (begin,), generator=torch.Generator().manual_seed(2))
            found = native_products.grouped_product(entries, tensors, x, x_rows, begin, transposed, False)
            exact = []
            for (matrix, first, last), _ in zip(entries, counts, strict=True):
                weight = native_products.dense(matrix, tensors, {}).float()
                source = x[x_rows[first:last]].float()
                exact.append(source @ weight if transposed else source @ weight.T)
            limit = 0.015 if kernel.endswith("INT8") else 1e-6 if dtype == torch.float32 else 4e-3
            assert relative_error(found, torch.cat(exact)) < limit
    if isa in ("avx512_bf16", "amx") and dtype == torch.bfloat16 and (kind == "int8" or not kernel.endswith("INT8")):
        assert ran, "this processor has all kernels for bfloat16"
    if ran == 0:
        pytest.skip("no such kernel")


@pytest.mark.parametrize("isa", ISAS)
def test_the_gradient_of_a_weight_is_the_sum_over_its_rows(isa, monkeypatch):
    """Odd row counts, row counts above one part, and sizes that are not multiples of a tile."""
    monkeypatch.setenv("EDGEFED_ISA", isa)
    generator = torch.Generator().manual_seed(3)
    for rows, m, n in ((1, 64, 64), (33, 96, 128), (513, 32, 64), (1101, 40, 64)):
        a, b = torch.randn(rows, m, generator=generator), torch.randn(40, n, generator=generator)
        a, b, b_rows = a.bfloat16(), b.bfloat16(), torch.randint(0, 40, (rows,), generator=generator)
        found = native_products.outer(a, b, b_rows)
        assert relative_error(found, a.float().T @ b[b_rows].float()) < 4e-3, (rows, m, n)


@pytest.mark.parametrize("num_tokens", [1, 40])
def test_rounding_x_to_eight_bits_costs_one_percent_and_never_happens_in_training(num_tokens, monkeypatch):
    if "avx512_bf16" not in ISAS:
        pytest.skip("needs VNNI")
    monkeypatch.setenv("EDGEFED_ISA", "avx512_bf16")  # with AMX, x is never rounded
    slots = make_slots(["int8"] * 2, torch.bfloat16)
    hidden, indices, weights = make_inputs(num_tokens, 2, 2, torch.bfloat16)

    def run(**options):
        return masked_experts(hidden, indices, weights, slots, activation=swiglu, **options)

    exact = run(backend="reference")
    training = run(backend="native")
    with torch.no_grad():
        rounded, exact = run(backend="native"), run(backend="native", int8_activations=False)
    assert relative_error(training, exact) < TOLERANCE[torch.bfloat16]
    assert torch.equal(exact, training)
    # With few rows the weights' bytes are the limit, and rounding x saves nothing.
    assert torch.equal(rounded, exact) == (num_tokens == 1)
    assert relative_error(rounded, exact) < 0.03


@pytest.mark.parametrize("isa", ISAS)
def test_a_row_rounded_to_eight_bits_is_within_half_a_step(isa, monkeypatch):
    """Against the identity matrix the kernel returns the rounded x itself."""
    monkeypatch.setenv("EDGEFED_ISA", isa)
    identity = quantize_experts(torch.eye(128), "int8")
    matrix = native_products.Matrix(0, 1, native_products.DTYPE_CODES["int8"], (128, 128), 128, torch.float32)
    if not native_products.can_run(matrix, torch.float32, False, native_products.ROWS_INT8):
        pytest.skip("no such kernel")
    monkeypatch.setattr(native_products, "choose_kernel", lambda *_: native_products.ROWS_INT8)
    x = torch.randn(9, 128, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 9).unsqueeze(1)
    x[4] = 0
    tensors = [identity.packed, identity.scales()]
    found = native_products.grouped_product([(matrix, 0, 9)], tensors, x, None, 9, False, True)
    step = x.abs().amax(dim=1, keepdim=True) / 127
    assert ((found - x).abs() <= 0.5001 * step).all()
    assert found[4].eq(0).all()
    assert ((found - x).abs() > 0.1 * step).any()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_frozen_quantized_layer_saves_tokens_indices_and_packed_weights_only(kind):
    slots = make_slots([kind] * 3, torch.bfloat16)
    hidden, indices, weights = make_inputs(50, 2, 3, torch.bfloat16)
    saved: list[torch.Tensor] = []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = masked_experts(hidden, indices, weights, slots, activation=swiglu, backend="native")
    packed = sum(slot.up.size_bytes + slot.down.size_bytes for slot in slots)
    pairs = int((indices >= 0).sum())
    indices_bytes = 8 * (pairs + indices.numel())
    allowed = packed + hidden.numel() * 2 + weights.numel() * 2 + indices_bytes
    assert sum(t.numel() * t.element_size() for t in saved) <= allowed
    assert not [t for t in saved if t.is_floating_point() and t.shape[0] == pairs and t.ndim == 2]
    output.sum().backward()
    assert hidden.grad is not None


def test_results_do_not_depend_on_the_number_of_threads_or_the_run():
    slots = make_slots(KINDS["mixed"], torch.bfloat16)
    hidden, indices, weights = make_inputs(80, 2, 5, torch.bfloat16)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            for tensor in (hidden, weights, *leaves_of(slots[0])):
                tensor.grad = None
            output = masked_experts(hidden, indices, weights, slots, activation=swiglu, backend="native")
            output.square().sum().backward()
            results.append([output.detach(), hidden.grad, weights.grad, slots[0].up.grad])
    finally:
        torch.set_num_threads(before)
    for later in results[1:]:
        for a, b in zip(results[0], later, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("num_tokens", "top_k", "num_slots"), [(0, 2, 3), (3, 2, 0), (3, 0, 2)])
def test_empty(num_tokens, top_k, num_slots, isa, monkeypatch):
    monkeypatch.setenv("EDGEFED_ISA", isa)
    hidden = torch.randn(num_tokens, HIDDEN)
    indices = torch.full((num_tokens, top_k), -1)
    slots = make_slots(["nf4"] * num_slots, torch.float32)
    output = masked_experts(hidden, indices, torch.rand(num_tokens, top_k), slots, activation=swiglu, backend="native")
    assert output.shape == hidden.shape
    assert output.eq(0).all()


def test_one_expert_takes_all_and_merged_experts_add_up():
    slots = make_slots(["nf4"] * 4, torch.bfloat16)
    hidden, _, weights = make_inputs(300, 2, 4, torch.bfloat16)
    indices = torch.full((300, 2), 2)
    ours = masked_experts(hidden, indices, weights, slots, activation=swiglu, backend="native")
    exact = masked_experts(hidden, indices, weights, slots, activation=swiglu, backend="reference")
    assert relative_error(ours, exact) < TOLERANCE[torch.bfloat16]


def test_streamed_slots_are_read_one_at_a_time():
    class Streamed:
        streamed = True
        alive = 0
        most = 0

        def __len__(self):
            return 5

        def __getitem__(self, slot):
            import weakref

            weights = make_slots(["dense"], torch.float32, trains=False, seed=slot)[0]
            Streamed.alive += 1
            Streamed.most = max(Streamed.most, Streamed.alive)

            def gone():
                Streamed.alive -= 1

            weakref.finalize(weights.up, gone)
            return weights

    slots = [make_slots(["dense"], torch.float32, trains=False, seed=slot)[0] for slot in range(5)]
    hidden, indices, weights = make_inputs(20, 2, 5, torch.float32)
    with torch.no_grad():
        found = masked_experts(hidden, indices, weights, Streamed(), activation=swiglu, backend="native")
        expected = masked_experts(hidden, indices, weights, slots, activation=swiglu, backend="reference")
    assert relative_error(found, expected) < 1e-5
    assert Streamed.most <= 2  # the one that is used, and the one that replaces it


def test_unsupported_layers_are_an_error_by_name_and_a_logged_fallback_with_auto(caplog):
    slots = make_slots(["dense"], torch.float64)
    hidden, indices, weights = make_inputs(3, 1, 1, torch.float64)
    with pytest.raises(ConfigError, match="native.*float64"):
        masked_experts(hidden, indices, weights, slots, activation=swiglu, backend="native")
    with pytest.raises(ConfigError, match="quantum"):
        masked_experts(hidden, indices, weights, slots, activation=swiglu, backend="quantum")
    with caplog.at_level("INFO"):
        experts_module.masked_experts(hidden, indices, weights, slots, activation=swiglu)


def test_an_operation_after_the_experts_is_applied_to_each_pair():
    """Not linear and not 0 at 0, so that neither the weights nor a dropped pair may come before it."""

    def finish(rows):
        return torch.tanh(rows) * 2 + 0.5

    results = []
    for backend in ("native", "reference"):
        slots = make_slots(["dense", "nf4"], torch.float32)
        hidden, indices, weights = make_inputs(7, 3, 2, torch.float32)
        with torch.no_grad():
            weights[indices < 0] = float("nan")  # weights of dropped pairs are not read
        output = masked_experts(hidden, indices, weights, slots, activation=swiglu, finish=finish, backend=backend)
        output.square().sum().backward()
        results.append([output.detach(), hidden.grad, weights.grad[indices >= 0], slots[0].up.grad, slots[0].down.grad])
    assert (indices < 0).any()
    for found, expected in zip(*results, strict=True):
        assert relative_error(found, expected) < 1e-5


def test_an_unknown_instruction_set_is_an_error(monkeypatch):
    absent = [name for name in ISA_CODES if name not in ISAS]
    for name in ("sse9", *absent):
        monkeypatch.setenv("EDGEFED_ISA", name)
        with pytest.raises(ConfigError, match="EDGEFED_ISA|instruction set|this processor"):
            masked_experts(
                torch.randn(1, HIDDEN), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1),
                make_slots(["nf4"], torch.float32), activation=swiglu, backend="native",
            )  # fmt: skip


def test_an_index_beyond_the_slots_is_an_error():
    slots = make_slots(["nf4"] * 2, torch.float32)
    with pytest.raises(IndexError, match="slot 2 is out of range: there are 2 slots"):
        masked_experts(
            torch.randn(3, HIDDEN), torch.full((3, 1), 2), torch.ones(3, 1), slots, activation=swiglu, backend="native"
        )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 70), (33, 600)])
def test_swiglu_and_its_gradients_are_those_of_autograd(rows, width, dtype, isa, monkeypatch):
    """Large numbers too, where the exponential would overflow."""
    monkeypatch.setenv("EDGEFED_ISA", isa)
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(-2, 2, rows).unsqueeze(1)
    up = (torch.randn(rows, 2 * width, generator=generator) * scale).to(dtype)
    d = torch.randn(rows, width, generator=generator).to(dtype)
    weights = torch.rand(rows, generator=generator)
    exact_up, exact_weights = up.double().requires_grad_(), weights.double().requires_grad_()
    exact = swiglu(exact_up)
    (exact * d.double() * exact_weights.unsqueeze(1)).sum().backward()
    act, d_up, d_weights = native_products.swiglu_backward(up, d, weights)
    assert torch.equal(act, native_products.swiglu(up))
    for found, expected in ((act, exact), (d_up, exact_up.grad)):
        assert relative_error(found, expected) < {torch.float32: 1e-6}.get(dtype, TOLERANCE[dtype] / 4)
    assert relative_error(d_weights, exact_weights.grad) < 1e-5


def test_an_activation_is_recognized_by_its_values():
    def clamped(up):
        gate, value = up.chunk(2, dim=-1)
        return F.silu(gate.clamp(max=10)) * value.clamp(-10, 10)

    assert is_swiglu(swiglu, 64)
    assert is_swiglu(swiglu, 64)
    for other in (clamped, interleaved_clamped, F.silu, lambda up: swiglu(up.flip(-1))):
        assert not is_swiglu(other, 64)
    assert not is_swiglu(F.relu, 63)
