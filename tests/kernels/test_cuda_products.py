"""The CUDA kernels one by one: sorting, products, weight gradients, rows between pairs and tokens."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from edgefed.kernels.cuda_kernels import LowRank, Operand, matrix_table
from edgefed.kernels.cuda_library import PLAIN, ROWS, TILES
from edgefed.kernels.quantization import dequantize_experts, quantize_experts
from edgefed.native import dtype_code

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
EPSILON = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Allowed error, as a share of the largest value: the last rounding, and for float32 the order of the sum."""
KERNELS = {"rows": ROWS, "tiles": TILES, "plain": PLAIN}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def assert_close(ours: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert ours.shape == expected.shape
    assert torch.isfinite(ours).all()
    error = (ours.double() - expected.double()).abs().max().item() if ours.numel() else 0.0
    assert error <= EPSILON[dtype] * max(expected.double().abs().max().item(), 1e-30) if ours.numel() else True


def random(rig, *shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(rig.device)


def pick_slots(rig, tokens, top_k, num_slots, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, num_slots, (tokens, top_k), generator=generator).to(rig.device)


def rows_of(pairs, slot):
    """Sorted positions of a slot, as a range."""
    begins = pairs.begins().tolist()
    return range(begins[slot], begins[slot + 1])


# --- sorting ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "top_k", "num_slots"),
    [(1, 1, 1), (15, 8, 64), (33, 8, 5), (300, 3, 70), (257, 1, 2), (40, 2, 300), (5, 3, 0)],
)
def test_sort_is_stable_and_its_tiles_cover_each_slot(rig, tokens, top_k, num_slots):
    slots = pick_slots(rig, tokens, top_k, num_slots)
    pairs = rig.kernels.sort_pairs(slots, num_slots)
    flat = slots.reshape(-1).cpu()
    valid = (flat >= 0).nonzero().squeeze(1)
    order = valid[torch.sort(flat[valid], stable=True).indices]
    count = len(order)
    place = torch.full((tokens * top_k,), -1, dtype=torch.int64)
    place[order] = torch.arange(count)
    assert pairs.order[:count].tolist() == order.tolist()
    assert pairs.tokens[:count].tolist() == (order // top_k).tolist()
    assert pairs.place.reshape(-1).tolist() == place.tolist()
    counts = torch.bincount(flat[valid], minlength=num_slots)
    work = pairs.work.reshape(5, num_slots + 1).cpu()
    for begins, rows in zip(work, (1, 4, 16, 32, 64), strict=True):
        tiles = -(-counts // rows)
        assert begins[0] == 0
        assert begins[1:].tolist() == tiles.cumsum(0).tolist()


def test_sort_with_every_pair_dropped_or_on_one_slot(rig):
    for slot, begins in ((-1, [0, 0, 0, 0]), (1, [0, 0, 600, 600])):
        pairs = rig.kernels.sort_pairs(torch.full((300, 2), slot, device=rig.device), 3)
        assert pairs.begins().tolist() == begins


def test_a_slot_out_of_range_aborts_the_device(rig):
    if not rig.emulated:
        pytest.skip("a stopped GPU serves no further test in this process")
    with pytest.raises(RuntimeError, match="CUDA error 719"):
        rig.kernels.sort_pairs(torch.tensor([[3]]), 3)


# --- products ---------------------------------------------------------------------------------------------------


def make_operands(rig, num_slots, shape, format, dtype, blocksize=64, bias=None):
    """Operands, and the matrices in float64 that they stand for."""
    operands, matrices = [], []
    for slot in range(num_slots):
        weight = random(rig, *shape, seed=10 + slot).to(dtype)
        if format == "dense":
            operands.append(Operand(weight, dtype_code(dtype)))
            matrices.append(weight.double())
        else:
            packed = quantize_experts(weight, format, blocksize=blocksize, backend="reference")
            code = {"nf4": 16, "int8": 17}[format]
            operands.append(Operand(packed.packed, code, packed.absmax, packed.blocksize))
            matrices.append(dequantize_experts(packed, backend="reference").double())
    return operands, matrices


def check_product(rig, kernel, format, dtype, transposed, *, tokens=40, top_k=2, num_slots=3, n=72, k=96, blocksize=64):
    shape = (k, n) if transposed else (n, k)
    operands, matrices = make_operands(rig, num_slots, shape, format, dtype, blocksize)
    slots = pick_slots(rig, tokens, top_k, num_slots)
    slots[:, 0] = 1  # one slot has many rows
    pairs = rig.kernels.sort_pairs(slots, num_slots)
    x = random(rig, tokens, k, seed=5).to(dtype)
    y = rig.kernels.grouped_matmul(
        matrix_table(operands), pairs, x, pairs.tokens, n, transposed=transposed, kernel=kernel
    )
    for slot in range(num_slots):
        rows = rows_of(pairs, slot)
        chosen = x[pairs.tokens[rows.start : rows.stop].long()].double()
        expected = chosen @ (matrices[slot] if transposed else matrices[slot].T)
        assert_close(y[rows.start : rows.stop], expected, dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("format", ["dense", "nf4", "int8"])
@pytest.mark.parametrize(("kernel", "transposed"), [("rows", False), ("tiles", False), ("tiles", True), ("plain", False), ("plain", True)])  # fmt: skip  # noqa: E501
def test_products_of_every_kernel(rig, kernel, transposed, format, dtype):
    code = {"dense": dtype_code(dtype), "nf4": 16, "int8": 17}[format]
    able = rig.kernels.library.ef_cuda_can_matmul(
        code, 64, dtype_code(dtype), 72, 96, transposed, KERNELS[kernel], rig.capability()
    )
    if kernel == "tiles" and (dtype == torch.float32 or (dtype == torch.bfloat16 and rig.capability() < 80)):
        assert not able
        pytest.skip("not a type of tensor cores")
    assert able
    check_product(rig, KERNELS[kernel], format, dtype, transposed)


@pytest.mark.parametrize(("format", "n", "k", "blocksize"), [("nf4", 8, 40, 32), ("nf4", 7, 9, 32), ("int8", 5, 11, 64), ("dense", 3, 5, 64), ("nf4", 130, 64, 128), ("nf4", 65, 64, 4096)])  # fmt: skip  # noqa: E501
@pytest.mark.parametrize("transposed", [False, True])
def test_odd_shapes_use_a_kernel_that_supports_them(rig, format, n, k, blocksize, transposed):
    for kernel in KERNELS.values():
        check_product(rig, kernel, format, torch.float16, transposed, tokens=9, n=n, k=k, blocksize=blocksize)


def test_capability_75_has_no_bfloat16_tiles(rig):
    can = rig.kernels.library.ef_cuda_can_matmul
    half, brain = dtype_code(torch.float16), dtype_code(torch.bfloat16)
    assert can(16, 64, half, 64, 64, 0, TILES, 75)
    assert not can(16, 64, brain, 64, 64, 0, TILES, 75)
    assert can(16, 64, brain, 64, 64, 0, TILES, 80)
    assert can(16, 64, brain, 64, 64, 0, ROWS, 75)
    if rig.emulated:
        rig.pretend(capability=75)
        check_product(rig, TILES, "nf4", torch.bfloat16, True)


@pytest.mark.parametrize("kernel", KERNELS)
def test_bias_factor_accumulation_and_slots_without_a_matrix(rig, kernel):
    dtype, n, k = torch.float16, 64, 32
    operands, matrices = make_operands(rig, 3, (n, k), "nf4", dtype)
    bias = random(rig, n, seed=3).to(dtype)
    operands = [
        Operand(operands[0].data, 16, operands[0].scale, 64, bias, 0.5),
        None,
        Operand(operands[2].data, 16, operands[2].scale, 64, None, -2.0),
    ]
    pairs = rig.kernels.sort_pairs(torch.tensor([[0, 1], [2, 1], [0, 2], [-1, 0]], device=rig.device), 3)
    x, start = random(rig, 4, k, seed=1).to(dtype), random(rig, 8, n, seed=2).to(dtype)
    y, table = start.clone(), matrix_table(operands)
    rig.kernels.grouped_matmul(table, pairs, x, pairs.tokens, n, transposed=False, kernel=KERNELS[kernel], add_to=y)
    for slot, (alpha, add) in {0: (0.5, bias.double()), 2: (-2.0, 0.0)}.items():
        rows = rows_of(pairs, slot)
        chosen = x[pairs.tokens[rows.start : rows.stop].long()].double()
        expected = start[rows.start : rows.stop].double() + alpha * (chosen @ matrices[slot].T) + add
        assert_close(y[rows.start : rows.stop], expected, dtype)
    untouched = [*rows_of(pairs, 1), *range(pairs.begins().tolist()[-1], 8)]
    assert torch.equal(y[untouched], start[untouched])


@pytest.mark.parametrize(
    ("kernel", "transposed"), [("rows", False), ("tiles", False), ("tiles", True), ("plain", True)]
)
@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.float16], ids=name_of)
def test_the_low_rank_term_of_a_product(rig, kernel, transposed, factor_dtype):
    """Adapters are float32 beside weights in 16 bits: A as an operand, B within the product of the weights."""
    dtype, n, k, rank = torch.float16, 72, 96, 8
    operands, matrices = make_operands(rig, 3, (k, n) if transposed else (n, k), "nf4", dtype)
    factors = [random(rig, rank, n, seed=20 + slot).to(factor_dtype) for slot in range(2)]
    if not transposed:
        factors = [factor.t().contiguous() for factor in factors]
    operands[:2] = [dataclasses.replace(own, factor=factor) for own, factor in zip(operands, factors, strict=False)]
    downs = [random(rig, k, rank, seed=30 + slot).to(factor_dtype).mul_(0.3) for slot in range(3)]
    downs = downs if transposed else [down.t().contiguous() for down in downs]
    lows = [Operand(down, dtype_code(factor_dtype), alpha=0.5) for down in downs]
    slots = pick_slots(rig, 40, 2, 3)
    pairs = rig.kernels.sort_pairs(slots, 3)
    x, run = random(rig, 40, k, seed=5).to(dtype), rig.kernels.grouped_matmul
    low = run(matrix_table(lows), pairs, x, pairs.tokens, rank, transposed=transposed, kernel=KERNELS[kernel])
    y = run(
        matrix_table(operands), pairs, x, pairs.tokens, n, transposed=transposed, kernel=KERNELS[kernel],
        low_rank=LowRank(low, factor_dtype),
    )  # fmt: skip
    for slot in range(3):
        rows = rows_of(pairs, slot)
        chosen = x[pairs.tokens[rows.start : rows.stop].long()].double()
        down = downs[slot].to(dtype).double()
        expected_low = 0.5 * (chosen @ (down if transposed else down.T))
        assert_close(low[rows.start : rows.stop], expected_low, dtype)
        expected = chosen @ (matrices[slot] if transposed else matrices[slot].T)
        if slot < 2:
            factor = factors[slot].to(dtype).double()
            expected += low[rows.start : rows.stop].double() @ (factor if transposed else factor.T)
        assert_close(y[rows.start : rows.stop], expected, dtype)


@pytest.mark.parametrize(("kernel", "rows"), [("rows", 5), ("tiles", 65), ("plain", 65)])
def test_the_grid_covers_the_largest_number_of_tiles(rig, kernel, rows):
    """Each of five slots has one row more than a tile: the bound that the host launches with is then exact."""
    n, k = 24, 32
    operands, matrices = make_operands(rig, 5, (n, k), "dense", torch.float16)
    pairs = rig.kernels.sort_pairs(torch.arange(5 * rows, device=rig.device).remainder(5).unsqueeze(1), 5)
    x = random(rig, 5 * rows, k).to(torch.float16)
    start = torch.zeros(5 * rows, n, dtype=torch.float16, device=rig.device)  # what no block writes stays 0
    y = rig.kernels.grouped_matmul(
        matrix_table(operands), pairs, x, pairs.tokens, n, transposed=False, kernel=KERNELS[kernel], add_to=start
    )
    for slot in range(5):
        chosen = x[slot::5].double()
        assert_close(y[rows * slot : rows * (slot + 1)], chosen @ matrices[slot].T, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("num_slots", [20, 8, 4])  # 8, 20 and 40 rows a slot: tiles of 16, 32 and 64 rows
def test_tiles_of_every_size_in_more_than_one_band(rig, num_slots, dtype):
    """One slot has 80 rows more; three columns of tiles, and for the small ones more row tiles than a band has."""
    check_product(rig, TILES, "nf4", dtype, False, tokens=80, top_k=2, num_slots=num_slots, n=136, k=192)


@pytest.mark.parametrize("kernel", KERNELS)
def test_more_slots_than_fit_in_one_launch(rig, kernel):
    check_product(rig, KERNELS[kernel], "int8", torch.bfloat16, False, tokens=60, num_slots=130, n=16, k=16)


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize(("m", "n"), [(72, 80), (9, 5), (64, 1)])
def test_weight_gradients(rig, dtype, m, n):
    slots = pick_slots(rig, 50, 3, 3)
    slots[slots == 2] = 1
    slots[:, 0] = 0
    pairs = rig.kernels.sort_pairs(slots, 4)
    a, b = random(rig, 150, m, seed=1).to(dtype), random(rig, 50, n, seed=2).to(dtype)
    results = rig.kernels.grouped_outer([1.0, 0.5, 1.0, None], pairs, a, b, pairs.tokens)
    assert results[3] is None
    assert results[2].eq(0).all()
    for slot, alpha in ((0, 1.0), (1, 0.5)):
        rows = rows_of(pairs, slot)
        chosen = b[pairs.tokens[rows.start : rows.stop].long()].double()
        assert_close(results[slot], alpha * (a[rows.start : rows.stop].double().T @ chosen), dtype)
    wide = rig.kernels.grouped_outer(
        [1.0, 0.5, 1.0, None], pairs, a, b, pairs.tokens, dtype=torch.float32, together=True
    )
    assert wide[3] is None
    for own, other in zip(wide[:3], results[:3], strict=True):
        assert own.dtype == torch.float32
        assert torch.equal(own.to(dtype), other)


# --- rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("width", [1, 40, 300])
def test_combine_and_its_gradients(rig, dtype, width):
    tokens, top_k = 21, 3
    slots = pick_slots(rig, tokens, top_k, 4)
    pairs = rig.kernels.sort_pairs(slots, 4)
    valid = pairs.begins().tolist()[-1]
    rows = random(rig, tokens * top_k, width).to(dtype)
    rows[valid:] = float("nan")  # rows without a pair are never read
    weights = random(rig, tokens, top_k, seed=1)
    place = pairs.place.long()
    mask = (place >= 0).double()
    chosen = rows.double().nan_to_num()[place.clamp(min=0)]  # (T, K, N)
    y = rig.kernels.combine(rows, pairs, weights)
    assert_close(y, (chosen * (weights.double() * mask).unsqueeze(-1)).sum(1), dtype)
    assert_close(rig.kernels.combine(rows, pairs, None), (chosen * mask.unsqueeze(-1)).sum(1), dtype)

    dy = random(rig, tokens, width, seed=2).to(dtype)
    order, owner = pairs.order[:valid].long(), pairs.tokens[:valid].long()
    factor = weights.reshape(-1)[order].double().unsqueeze(1)
    assert_close(rig.kernels.spread(dy, pairs, weights)[:valid], factor * dy[owner].double(), dtype)
    dots = torch.zeros(tokens, top_k, device=rig.device)
    scaled = rows.clone()
    rig.kernels.pair_dots_(scaled, dy, pairs.tokens, pairs, weights, dots)
    assert_close(dots, (chosen * dy.double().unsqueeze(1)).sum(-1) * mask, torch.float32 if width > 1 else dtype)
    assert_close(scaled[:valid], factor * rows[:valid].double(), dtype)
    assert torch.isnan(scaled[valid:]).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("width", [5, 40])
def test_swiglu_and_its_gradients(rig, dtype, width):
    tokens, top_k = 21, 3
    pairs = rig.kernels.sort_pairs(pick_slots(rig, tokens, top_k, 4), 4)
    valid = pairs.begins().tolist()[-1]
    gate_up, d = random(rig, 63, 2 * width, seed=1).to(dtype), random(rig, 63, width, seed=2).to(dtype)
    gate_up[valid:], d[valid:] = float("nan"), float("nan")
    weights = random(rig, tokens, top_k, seed=3)
    source = gate_up[:valid].double().requires_grad_()
    gate, up = source.chunk(2, dim=-1)
    expected = F.silu(gate) * up
    factor = weights.reshape(-1)[pairs.order[:valid].long()].double().unsqueeze(1)
    (source_grad,) = torch.autograd.grad(expected, source, factor * d[:valid].double())
    assert_close(rig.kernels.swiglu(gate_up, pairs)[:valid], expected.detach(), dtype)
    for keeps_hidden in (False, True):
        own, hidden = gate_up.clone(), d.clone()
        dots = rig.kernels.swiglu_backward_(own, hidden, pairs, weights, keeps_hidden=keeps_hidden)
        assert_close(own[:valid], source_grad, dtype)
        assert_close(hidden[:valid], expected.detach() if keeps_hidden else d[:valid], dtype)
        dot = (d[:valid].double() * expected.detach()).sum(1)
        assert_close(dots.reshape(-1)[pairs.order[:valid].long()], dot, torch.float32)
        assert dots[pairs.place < 0].eq(0).all()
