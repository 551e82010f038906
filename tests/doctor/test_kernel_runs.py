"""The arithmetic that doctor runs passes here, and notices when a result is wrong."""

import dataclasses
import math
import sys
import types

import numpy as np
import pytest
import torch

from edgefed.doctor import kernel_runs
from edgefed.doctor.kernel_runs import WrongResult
from edgefed.kernels import fold, masked_experts
from edgefed.native import NativeUnavailable
from edgefed.training.savings import eight_bit_problem


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_matmul_is_right_here(dtype):
    assert dtype in kernel_runs.matmul("cpu", dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_matmul_that_drops_one_of_its_products_is_noticed(dtype, monkeypatch):
    right = torch.Tensor.__matmul__

    def wrong(a, b):
        if a.dtype is torch.float64:
            return right(a, b)
        a = a.clone()
        a[3, 5] = 0
        return right(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", wrong)
    with pytest.raises(WrongResult, match="numbers are wrong"):
        kernel_runs.matmul("cpu", dtype)


def test_the_expert_layer_is_right_here():
    assert "all gradients" in kernel_runs.masked_experts("cpu")


def test_an_expert_layer_with_a_wrong_result_or_gradient_is_noticed(monkeypatch):
    right = masked_experts.masked_experts

    class WrongGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 1.01

    monkeypatch.setattr(masked_experts, "masked_experts", lambda *a, **k: right(*a, **k) * 1.01)
    with pytest.raises(WrongResult, match="the forward pass"):
        kernel_runs.masked_experts("cpu")
    monkeypatch.setattr(masked_experts, "masked_experts", lambda *a, **k: WrongGradient.apply(right(*a, **k)))
    with pytest.raises(WrongResult, match="the gradient of x"):
        kernel_runs.masked_experts("cpu")


def test_non_finite_numbers_are_refused():
    exact = torch.ones(4)
    with pytest.raises(WrongResult, match="1 of 4"):
        kernel_runs.compare(torch.tensor([1.0, math.nan, 1.0, 1.0]), exact, 0.1, "it")
    with pytest.raises(WrongResult, match="shape"):
        kernel_runs.compare(torch.ones(3), exact, 0.1, "it")


def test_the_native_fold_where_it_was_built():
    try:
        fold.native_backend()
    except NativeUnavailable:
        pytest.skip("built without a C++ compiler")
    assert "BF16" in kernel_runs.native_fold()


def test_a_native_fold_with_one_wrong_bit_is_noticed(monkeypatch):
    def off_by_one_bit(accumulator, raw, dtype, weight):
        bad = fold.NUMPY.fold_block(accumulator, raw, dtype, weight)
        accumulator[17] = np.nextafter(accumulator[17], np.inf)
        return bad

    broken = dataclasses.replace(fold.NUMPY, name="native", fold_block=off_by_one_bit)
    monkeypatch.setattr(fold, "native_backend", lambda: broken)
    with pytest.raises(WrongResult, match="other bits"):
        kernel_runs.native_fold()


NF4 = torch.tensor([-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0,
                    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0])  # fmt: skip


def a_bitsandbytes(by_first_block):
    """NF4 as in the paper; ``by_first_block`` scales everything by the first block's maximum, as a broken one does."""

    def quantize_4bit(weight, blocksize, quant_type):
        assert quant_type == "nf4"
        blocks = weight.reshape(-1, blocksize)
        absmax = blocks.abs().amax(dim=1)
        codes = (blocks / absmax[:, None]).reshape(-1, 1).sub(NF4).abs().argmin(dim=1)
        return codes.to(torch.uint8), (absmax, blocksize, weight.shape)

    def dequantize_4bit(codes, state):
        absmax, blocksize, shape = state
        scale = absmax[:1].expand_as(absmax) if by_first_block else absmax
        return (NF4[codes.long()].reshape(-1, blocksize) * scale[:, None]).reshape(shape)

    module = types.ModuleType("bitsandbytes.functional")
    module.quantize_4bit, module.dequantize_4bit = quantize_4bit, dequantize_4bit
    package = types.ModuleType("bitsandbytes")
    package.functional = module
    return {"bitsandbytes": package, "bitsandbytes.functional": module}


@pytest.mark.parametrize("columns", [16, 64])
def test_nf4_is_judged_by_its_own_rounding(monkeypatch, columns):
    for name, module in a_bitsandbytes(by_first_block=False).items():
        monkeypatch.setitem(sys.modules, name, module)
    assert f"16x{columns}" in kernel_runs.nf4("cpu", columns)
    for name, module in a_bitsandbytes(by_first_block=True).items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(WrongResult):
        kernel_runs.nf4("cpu", columns)


@pytest.mark.parametrize(
    ("broken", "message"), [("", ""), ("codes", "8-bit codes"), ("sums", "24x128x64"), ("step", "a wrong step")]
)
def test_8_bit_kernels_are_judged_by_the_mathematics(monkeypatch, broken, message):
    def int8_vectorwise_quant(matrix):
        absmax = matrix.float().abs().amax(dim=1)
        codes = (matrix.float() * (127 / absmax[:, None])).round()
        return (codes - int(broken == "codes")).to(torch.int8), absmax, None

    def int8_linear_matmul(a, b):
        return a.int() @ b.int().T + (torch.arange(64) == 9).int() * 2000 * int(broken == "sums")

    def int8_mm_dequant(sums, rows, columns):
        return (sums * rows[:, None] * columns / 127**2).half()

    class AdamW8bit:
        def __init__(self, parameters, lr, weight_decay):
            self.weight, self.lr, self.state = parameters[0], lr, {parameters[0]: {"state1": torch.zeros(4096).char()}}

        def step(self):
            self.weight.data -= self.lr * int(broken != "step")

    module = types.ModuleType("bitsandbytes.functional")
    module.int8_vectorwise_quant, module.int8_mm_dequant = int8_vectorwise_quant, int8_mm_dequant
    module.int8_linear_matmul = int8_linear_matmul
    package = types.ModuleType("bitsandbytes")
    package.functional, package.optim = module, types.SimpleNamespace(AdamW8bit=AdamW8bit)
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", module)
    eight_bit_problem.cache_clear()
    run = kernel_runs.eight_bit_step if broken == "step" else kernel_runs.int8_product
    try:
        if broken:
            with pytest.raises(WrongResult, match=message):
                run("cpu")
        else:
            assert "24x128x64" in run("cpu")
            assert kernel_runs.eight_bit_step("cpu") == "a step of AdamW8bit"
    finally:
        eight_bit_problem.cache_clear()


def test_real_bitsandbytes_kernels():
    pytest.importorskip("bitsandbytes")
    from edgefed.isolation.worker import Worker

    with Worker() as worker:
        for target in ("int8_product", "eight_bit_step"):
            outcome = worker.call(f"edgefed.doctor.kernel_runs:{target}", 120, device="cpu")
            assert outcome.ok, outcome.failure


def test_triton_in_its_interpreter():
    pytest.importorskip("triton")
    from edgefed.isolation.worker import Worker

    with Worker({"TRITON_INTERPRET": "1"}) as worker:
        outcome = worker.call("edgefed.doctor.kernel_runs:triton_kernel", 120, device="cpu")
    assert outcome.ok
    assert "interpreter" in outcome.value
