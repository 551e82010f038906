"""Padded products: few shapes whatever the routing, and the same values and gradients as without padding."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig

from edgefed.kernels.dispatch import why_not_native
from edgefed.kernels.masked_experts import LowRankPair, SlotWeights, masked_experts
from edgefed.kernels.quantization import quantize_experts
from edgefed.kernels.row_sizes import BLOCK_ROWS, ROW_SIZES, is_compiled, pad_rows, padded_size, row_product
from edgefed.protocol.messages import TrainingConfig
from edgefed.trainer.kernel_proof import compile_products

compiled = pytest.mark.skipif(not is_compiled(torch.bfloat16, "cpu"), reason="oneDNN compiles no products here")
HIDDEN, WIDTH, RANK, EXPERTS = 72, 40, 5, 6  # none of these is a size of rows
BACKENDS = ["reference", *([] if why_not_native() else ["native"])]


def test_sizes_are_few_and_waste_at_most_half():
    sizes = {rows: padded_size(rows) for rows in range(1, 1501)}
    assert set(sizes.values()) == {*ROW_SIZES, *range(512, 1537, BLOCK_ROWS)}
    assert all(rows <= size <= max(16, 2 * rows - 2) for rows, size in sizes.items())
    assert sum(sizes[rows] - rows for rows in range(16, 257)) < 0.2 * sum(range(16, 257))


@compiled
@pytest.mark.parametrize("rows", [1, 16, 25, 256, 257, 700])
def test_values_and_gradients_are_those_of_the_plain_product(rows):
    torch.manual_seed(rows)
    x = torch.randn(rows, HIDDEN).bfloat16().requires_grad_()
    weight = torch.randn(HIDDEN, WIDTH).bfloat16().requires_grad_()
    dy = torch.randn(rows, WIDTH).bfloat16()
    found = row_product(x, weight)
    gradients = torch.autograd.grad(found, (x, weight), dy)
    wide, wide_weight = x.detach().double(), weight.detach().double()
    expected = wide @ wide_weight, dy.double() @ wide_weight.T, wide.T @ dy.double()
    for own, exact in zip((found, *gradients), expected, strict=True):
        torch.testing.assert_close(own.double(), exact, rtol=2**-8, atol=1e-2)  # one rounding to bfloat16
    index = torch.randperm(rows)
    assert torch.equal(pad_rows(x.detach(), index)[:rows], x[index])
    assert not pad_rows(x.detach(), index)[rows:].any()


def test_float32_rows_are_not_copied():
    x = torch.randn(3, HIDDEN)
    assert pad_rows(x) is x


class Products(TorchDispatchMode):
    """Shapes and strides of the matrix products of 16-bit tensors."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm) and args[-1].dtype == torch.bfloat16:
            self.found.add(tuple((tuple(tensor.shape), tensor.stride()) for tensor in args[-2:]))
        return func(*args, **(kwargs or {}))


def make_slot(kind):
    def weight(rows, columns):
        dense = torch.randn(rows, columns).bfloat16() * columns**-0.5
        return quantize_experts(dense, "nf4") if kind == "nf4" else dense.requires_grad_(kind == "full")

    def adapter(rows, columns):
        leaves = (torch.randn(RANK, columns).requires_grad_(), torch.randn(rows, RANK).requires_grad_())
        return None if kind == "full" else LowRankPair(*leaves, 2.0)

    return SlotWeights(
        weight(2 * WIDTH, HIDDEN), weight(HIDDEN, WIDTH),
        up_lora=adapter(2 * WIDTH, HIDDEN), down_lora=adapter(HIDDEN, WIDTH),
    )  # fmt: skip


def train_step(slots, tokens, backend):
    """Compute and differentiate a layer with random routing; returns the tokens of each expert."""
    hidden = torch.randn(tokens, HIDDEN).bfloat16().requires_grad_()
    indices = (torch.rand(tokens, 1) ** 2 * EXPERTS).long()  # some experts are used more
    output = masked_experts(
        hidden, indices, torch.rand(tokens, 1), slots, backend=backend,
        activation=lambda up: F.silu(up[:, :WIDTH]) * up[:, WIDTH:],
    )  # fmt: skip
    output.sum().backward()
    return torch.bincount(indices.flatten(), minlength=EXPERTS).tolist()


@compiled
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["full", "nf4"])
def test_a_training_step_multiplies_in_few_sizes(kind, backend):
    torch.manual_seed(0)
    slots = [make_slot(kind) for _ in range(EXPERTS)]
    with Products() as products:
        counts = {count for tokens in range(20, 620, 60) for count in train_step(slots, tokens, backend)}
    sizes = {size for product in products.found for shape, _ in product for size in shape}
    sizes -= {HIDDEN, WIDTH, 2 * WIDTH, RANK}
    assert sizes <= {*ROW_SIZES, 2 * BLOCK_ROWS}, "a row count of its own"
    assert 1 < len(sizes) < len(counts) / 3


@compiled
@pytest.mark.skipif("native" not in BACKENDS, reason="no native library")
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_what_a_step_multiplies_is_compiled_before_memory_is_measured(kind):
    config = AutoConfig.for_model(
        "olmoe", hidden_size=HIDDEN, intermediate_size=WIDTH, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_experts=EXPERTS, num_experts_per_tok=2,
    )  # fmt: skip
    training = TrainingConfig(experts=kind, lora_rank=RANK, batch_size=2, sequence_length=100)
    with Products() as compiled_before:
        compile_products(
            "cpu", SimpleNamespace(config=config, dtype=torch.bfloat16), SimpleNamespace(training=training)
        )
    with Products() as products:
        train_step([make_slot(kind) for _ in range(EXPERTS)], 200, "native")
    assert products.found
    assert products.found <= compiled_before.found


@pytest.mark.full
@compiled
def test_memory_does_not_grow_with_the_number_of_row_counts():
    code = """
import torch
from edgefed.hardware.memory import process_rss_bytes, set_up_allocator
from edgefed.kernels.row_sizes import row_product
set_up_allocator()
weight = torch.randn(1024, 1024).bfloat16().requires_grad_()
for rows in range(1, 401):
    row_product(torch.randn(rows, 1024).bfloat16().requires_grad_(), weight).sum().backward()
    if rows == 257: before = process_rss_bytes()
print(process_rss_bytes() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert int(done.stdout) < 40 << 20
