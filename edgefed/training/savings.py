"""Memory savings of a training step: activation checkpointing, 8-bit optimizers, experts in 4 or 8 bits.

The chunked loss is in `edgefed.training.loss`. `problems` returns the savings that do not work with a model on a
device, with reasons.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from edgefed.errors import ConfigError, first_line
from edgefed.kernels.dispatch import choose, why_not_native
from edgefed.kernels.masked_experts import SlotWeights, masked_experts
from edgefed.kernels.quantization import dequantize_experts, quantize_experts
from edgefed.moe.slots import EXPERT_STORAGES, PACKABLE
from edgefed.training.loss import structural_problem
from edgefed.training.optimizers import (
    AdamW,
    is_offloaded,
    needs_stochastic_rounding,
    with_stochastic_rounding,
)

OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_8bit")
_EIGHT_BIT_PROBE = 4096  # elements: bitsandbytes leaves smaller tensors in 32 bit


def problems(module: nn.Module, device: torch.device | str) -> dict[str, str]:
    """Savings that do not work here, {name: reason}; the names are those of `FallbackSearch.problems`.

    The chunked loss is checked by the model's structure only; `chunking_problem` measures it once experts are loaded.
    """
    place, dtype = str(torch.device(device)), getattr(module, "dtype", torch.float32)
    no_nf4 = packing_problem("nf4", place, dtype) or packing_is_slow(place)
    found = {
        "chunked_loss": structural_problem(cast(PreTrainedModel, module)),
        "checkpointing": checkpointing_problem(module),
        "adamw_8bit": eight_bit_problem(place),
        "nf4_experts": no_nf4,
        "int8_experts": "" if no_nf4 else packing_problem("int8", place, dtype),
    }
    return {name: reason for name, reason in found.items() if reason}


# --- activation checkpointing ------------------------------------------------------------------------------------


def checkpointing_problem(module: nn.Module) -> str:
    """Why ``module`` cannot recompute its layers in the backward pass; empty if it can."""
    if not getattr(module, "supports_gradient_checkpointing", False):
        return f"{type(module).__name__} does not support activation checkpointing"
    return ""


@contextlib.contextmanager
def checkpointing(module: nn.Module, enabled: bool) -> Iterator[None]:
    """Within it a training step keeps only each layer's input and recomputes the rest in its backward pass.

    Non-reentrant: the first pass runs with gradients, so it alone records routers and makes schedules. Raises
    ConfigError if the model does not support it.
    """
    if not enabled:
        yield
        return
    if problem := checkpointing_problem(module):
        raise ConfigError(problem, remedy="Train without checkpointing, with a shorter `sequence_length`.")
    # The public switch also makes the embedding's output need a gradient, with another hook at each call. Reentrant
    # checkpoints need that; here it would only run the backward pass through layers where nothing trains.
    switch = cast(Any, module)._set_gradient_checkpointing
    switch(enable=True, gradient_checkpointing_func=functools.partial(checkpoint, use_reentrant=False))
    try:
        yield
    finally:
        switch(enable=False)


# --- optimizers --------------------------------------------------------------------------------------------------


def make_optimizer(
    parameters: Iterable[nn.Parameter], name: str, *, learning_rate: float, weight_decay: float, seed: int = 0
) -> torch.optim.Optimizer:
    """AdamW over ``parameters`` with betas 0.9 and 0.999.

    "adamw" keeps two moments in the parameter's dtype, 8 bytes per element in float32. "adamw_8bit" is bitsandbytes'
    with block-wise 8-bit moments (arXiv 2110.02861), 2.03 bytes; tensors below 4096 elements stay in 32 bit.
    "paged_adamw_8bit" can move them to the host, which helps only on a GPU with memory of its own. Moments of offloaded
    parameters are those of "adamw" and are stored beside the parameters. If a 16-bit dtype would lose the updates, all
    round weights stochastically by ``seed`` (`edgefed.training.optimizers`), in the same memory but for one tensor.

    Raises ConfigError if it does not work here.
    """
    parameters = list(parameters)
    device = parameters[0].device if parameters else torch.device("cpu")
    if name not in OPTIMIZERS:
        raise ConfigError(f"invalid optimizer {name!r}, expected one of {', '.join(OPTIMIZERS)}")
    if is_offloaded(parameters):
        if name != "adamw":
            raise ConfigError(f"invalid optimizer {name!r}: offloaded experts need adamw")
        return AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, seed=seed)
    if name == "adamw" and any(needs_stochastic_rounding(parameter, learning_rate) for parameter in parameters):
        return AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, seed=seed)
    if name == "adamw":
        # foreach, torch's choice on CUDA, needs one more copy of all parameters at its peak.
        fused, foreach = (True, None) if device.type == "cuda" else (None, False)
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=fused, foreach=foreach)
    if name == "paged_adamw_8bit" and device.type != "cuda":
        raise ConfigError(f"invalid optimizer {name!r} on {device}: it moves its state between a GPU and the host")
    kind_name = "AdamW8bit" if name == "adamw_8bit" else "PagedAdamW8bit"
    if problem := eight_bit_problem(str(device), kind_name):
        raise ConfigError(f"8-bit AdamW cannot be used on {device}: {problem}", remedy="Use the optimizer adamw.")
    import bitsandbytes

    kind = with_stochastic_rounding(getattr(bitsandbytes.optim, kind_name), seed)
    optimizer: torch.optim.Optimizer = kind(parameters, lr=learning_rate, weight_decay=weight_decay)
    return optimizer


@functools.lru_cache(maxsize=8)
def eight_bit_problem(device: str, kind: str = "AdamW8bit") -> str:
    """Why an 8-bit optimizer of bitsandbytes does not work on ``device``; empty if it does. Tests it once per process.

    An import proves nothing: on some Jetsons the package imports and fails at its first kernel.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import bitsandbytes
    except ImportError as error:
        return f"bitsandbytes is not installed ({error})" if error.name == "bitsandbytes" else f"bitsandbytes: {error}"
    except Exception as error:  # its import loads native libraries
        return f"bitsandbytes cannot be loaded: {first_line(error)}"
    try:
        values = torch.full((_EIGHT_BIT_PROBE,), 1.0, device=device)
        weight = nn.Parameter(values.clone())
        weight.grad = values.clone()
        optimizer = getattr(bitsandbytes.optim, kind)([weight], lr=0.5, weight_decay=0.0)
        optimizer.step()
        moved = (1.0 - weight.detach()).cpu()  # the first step of Adam is the learning rate, whatever the gradient
        held = sum(t.numel() * t.element_size() for t in optimizer.state[weight].values() if torch.is_tensor(t))
    except Exception as error:  # a kernel that is not there, a library that does not fit
        return f"bitsandbytes fails on {device}: {first_line(error)}"
    if not torch.allclose(moved, torch.full_like(moved, 0.5), atol=0.02):
        return f"bitsandbytes computes a wrong step on {device}"
    if held > 4 * _EIGHT_BIT_PROBE:  # two moments of one byte, tables and scales; 32-bit state would be 8 bytes each
        return f"bitsandbytes keeps 32-bit state on {device}"
    return ""


_WIDTH = 64
_LARGEST_ERROR = 0.05
"""Relative to the largest value: twice the error of a product of 64 values of which x is rounded to bfloat16."""


@functools.lru_cache(maxsize=32)
def packing_problem(storage: str, device: str, dtype: torch.dtype) -> str:
    """Return why ``device`` cannot train with experts of ``dtype`` in this storage; empty if it can.

    Quantizes one expert, runs it forward and backward, and compares with its dequantized weights. Once per process.
    """
    if storage not in EXPERT_STORAGES:
        return f"experts cannot be stored as {storage!r}"
    if dtype not in PACKABLE:
        return f"weights in {str(dtype).removeprefix('torch.')} cannot be quantized"
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    x, weights = random(8, _WIDTH), [random(_WIDTH, _WIDTH) / 8 for _ in range(2)]
    try:
        packed = [quantize_experts(weight, cast(Literal["nf4", "int8"], storage)) for weight in weights]
        unpacked = [dequantize_experts(matrix, torch.float32, backend="reference") for matrix in packed]
        found = _product_and_gradient(x.to(device), [matrix.to(device) for matrix in packed], "auto")
        expected = _product_and_gradient(x.float(), unpacked, "reference")
    except Exception as error:  # a missing kernel, an incompatible library
        return f"quantized experts fail on {device}: {first_line(error)}"
    for ours, theirs in zip(found, expected, strict=True):
        difference = (ours.float().cpu() - theirs).abs().max()
        if not difference <= _LARGEST_ERROR * theirs.abs().max():  # written so that NaN is an error, too
            return f"quantized experts give wrong results on {device}"
    return ""


def packing_is_slow(device: str) -> str:
    """Return why training with quantized experts is too slow on ``device``; empty if it is not."""
    device_type = torch.device(device).type
    if device_type == "cpu" and choose("masked_experts", device_type) == "reference":
        return f"plain PyTorch would dequantize every expert in each step ({why_not_native() or 'EDGEFED_KERNELS'})"
    return ""


def _product_and_gradient(x: torch.Tensor, matrices: list[Any], backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.requires_grad_()
    indices = torch.zeros(len(x), 1, dtype=torch.int64, device=x.device)
    weights = torch.ones(len(x), 1, dtype=x.dtype, device=x.device)
    with torch.enable_grad():
        y = masked_experts(
            x, indices, weights, [SlotWeights(*matrices)], activation=torch.nn.functional.silu, backend=backend
        )
        (gradient,) = torch.autograd.grad(y.float().sum(), x)
    return y.detach(), gradient
