"""The host never waits for a GPU in a layer: tested without one, on the device "meta", whose tensors have no values.

An operation that reads a value there, or has a shape that depends on values, raises. Copies between the host and the
device also fail. The kernels do nothing here; their results are tested elsewhere.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from edgefed.kernels import cuda_experts, cuda_kernels, dispatch
from edgefed.kernels.masked_experts import LastingSlots, LowRankPair, SlotWeights, masked_experts
from edgefed.kernels.quantization import dequantize_experts, quantize_experts
from edgefed.kernels.router_statistics import GATE_KINDS, new_statistics, router_statistics
from edgefed.moe.model import MoeModel

HIDDEN, WIDTH = 64, 32
_spec = importlib.util.spec_from_file_location("_toys", Path(__file__).parents[1] / "moe" / "toy_models.py")
_toys = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_toys)


class Still:
    """A library whose kernels return at once; sizes are those of any small call."""

    def __init__(self):
        self.called: list[str] = []

    def __getattr__(self, name):
        def function(*arguments):
            self.called.append(name)
            return 256 if name.endswith(("_size", "_scratch")) else 0

        return function


class NoCopies(TorchDispatchMode):
    """Fails where a tensor with dimensions goes from the host to the device or back."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor) and t.ndim]
        assert len({t.device.type for t in tensors}) <= 1, f"{function} copies between host and device"
        return out


@pytest.fixture
def library(monkeypatch):
    """ "cuda" is the backend of the device "meta", and its library does nothing."""
    still = Still()
    kernels = cuda_kernels.CudaKernels(still, emulated=True)
    with dispatch.temporary_backends():
        monkeypatch.delenv("EDGEFED_KERNELS", raising=False)
        for module in (cuda_kernels, cuda_experts):
            monkeypatch.setattr(module, "cuda_kernels", lambda: kernels)
        for operation in dispatch.OPERATIONS:
            dispatch.register_backend(operation, "cuda", "meta", lambda device: None)
        yield still


def swiglu(up: torch.Tensor) -> torch.Tensor:
    gate, value = up.chunk(2, dim=-1)
    return F.silu(gate) * value


def on_meta(*shape, dtype=torch.bfloat16, requires_grad=False):
    return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=requires_grad)


def slots(*, trainable: bool) -> list[SlotWeights]:
    dense = SlotWeights(
        on_meta(2 * WIDTH, HIDDEN, requires_grad=trainable), on_meta(HIDDEN, WIDTH, requires_grad=trainable)
    )
    packed = [
        quantize_experts(torch.randn(*shape).bfloat16(), "nf4").to("meta") for shape in ((64, HIDDEN), (HIDDEN, WIDTH))
    ]
    adapter = LowRankPair(
        on_meta(4, HIDDEN, requires_grad=trainable), on_meta(2 * WIDTH, 4, requires_grad=trainable), 0.5
    )
    return [dense, SlotWeights(*packed), SlotWeights(*packed, up_lora=adapter), dense]


class Lasting(list):
    """Slots that keep their tensors, as those of a bank."""

    scheduled = None

    def __init__(self, slots):
        super().__init__(slots)
        self.lasting = LastingSlots(self)


def packed_slot(rank: int) -> SlotWeights:
    up, down = (quantize_experts(torch.randn(*shape).bfloat16(), "nf4").to("meta") for shape in ((64, 64), (64, 32)))

    def adapter(rows, columns):
        parts = [on_meta(*shape, dtype=torch.float32) for shape in ((rank, columns), (rows, rank))]
        return LowRankPair(*parts, 0.5) if rank else None

    return SlotWeights(up, down, up_lora=adapter(64, 64), down_lora=adapter(64, 32))


@pytest.mark.parametrize("finish", [None, torch.tanh])
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("trainable", [False, True])
def test_a_layer(library, tokens, trainable, finish):
    """Forward: always. Backward: with frozen weights. Trainable weights need one wait, for token counts of the forward
    pass, because an expert without tokens must get no gradient.
    """
    hidden, weights = on_meta(tokens, HIDDEN, requires_grad=True), on_meta(tokens, 2, requires_grad=True)
    indices = on_meta(tokens, 2, dtype=torch.int64)
    layer = slots(trainable=trainable)
    with NoCopies():
        output = masked_experts(hidden, indices, weights, layer, activation=swiglu, finish=finish)
        if not trainable:
            output.backward(torch.empty_like(output))
    assert output.shape == hidden.shape
    assert library.called.count("ef_cuda_combine") == (1 if trainable else 2)
    if not trainable:
        assert hidden.grad.shape == hidden.shape
        assert weights.grad.shape == weights.shape


def calls_of(run) -> int:
    """How many functions a call enters, of Python and of C."""
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("rank", [0, 8])
def test_the_host_does_the_same_for_any_number_of_lasting_experts(library, rank):
    """What a forward pass costs the host: with 64 experts at most 250 calls, and none more than with four."""
    found = {}
    for count in (4, 64):
        layer = Lasting(packed_slot(rank) for _ in range(count))
        hidden, weights = on_meta(3, HIDDEN), on_meta(3, 2)
        indices = on_meta(3, 2, dtype=torch.int64)

        def forward(layer=layer, hidden=hidden, indices=indices, weights=weights):
            with torch.no_grad():
                masked_experts(hidden, indices, weights, layer, activation=swiglu)

        forward()
        found[count] = calls_of(forward)
    assert found[64] == found[4] <= 250


@pytest.mark.parametrize("kind", GATE_KINDS)
def test_router_statistics(library, kind):
    with NoCopies():
        statistics = new_statistics(8, "meta")
        router_statistics(statistics, on_meta(9, 8), on_meta(9, 2, dtype=torch.int64), on_meta(9, 2), kind=kind)
    assert "ef_cuda_router_statistics" in library.called


def test_dequantizing(library):
    matrix = quantize_experts(torch.randn(2, 8, 64), "nf4").to("meta")
    with NoCopies():
        assert dequantize_experts(matrix).shape == (2, 8, 64)
    assert "ef_cuda_dequantize_nf4" in library.called


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen3_moe"])
def test_a_transformers_layer_with_its_router(library, family):
    """The function that `edgefed.register_experts` registers, called as transformers calls it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    import edgefed

    edgefed.register_experts()
    config = AutoConfig.for_model(family, **_toys.FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config).to("meta").eval()
    model.set_experts_implementation("edgefed")
    hidden = on_meta(1, 7, config.hidden_size, dtype=torch.float32)
    with torch.no_grad(), NoCopies():
        output = model.model.layers[0].mlp(hidden)
    assert (output[0] if isinstance(output, tuple) else output).shape == hidden.shape
    assert "ef_cuda_combine" in library.called


@pytest.mark.parametrize("storage", [None, "nf4"])
def test_a_profile(library, tmp_path, storage):
    """All layers of a model with its statistics recorded: what is copied is copied when experts are loaded, before."""
    from transformers import AutoConfig

    AutoConfig.for_model("olmoe", **_toys.FAMILIES["olmoe"]).save_pretrained(tmp_path)
    model = MoeModel.skeleton(tmp_path, torch.bfloat16, device="meta")
    specs = {spec.key: spec for spec in model.unit_infos()}

    class Zeros:
        def read(self, key):
            return {tensor.name: torch.zeros(tensor.shape, dtype=torch.bfloat16) for tensor in specs[key].tensors}

    blocks, hidden = [layer.mlp for layer in model.module.base_model.eval().layers], on_meta(2, 10, 32)
    with model.streaming(Zeros(), residency="all", storage=storage), model.record_statistics():
        for block in blocks:
            block(hidden)
        library.called.clear()
        with torch.no_grad(), NoCopies():
            outputs = [block(hidden) for block in blocks]
    assert all(output.shape == hidden.shape for output in outputs)
    for kernel in ("ef_cuda_combine", "ef_cuda_router_statistics"):
        assert library.called.count(kernel) == len(model.layers), kernel


def test_the_test_detects_a_wait(library):
    """The reference waits once a layer, for token counts."""
    hidden, indices, weights = on_meta(3, HIDDEN), on_meta(3, 2, dtype=torch.int64), on_meta(3, 2)
    with pytest.raises((RuntimeError, NotImplementedError)):
        masked_experts(hidden, indices, weights, slots(trainable=False), activation=swiglu, backend="reference")
    with pytest.raises(AssertionError, match="copies between host and device"), NoCopies():
        torch.ones(3).to("meta")
