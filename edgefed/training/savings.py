"""What a training step can do with less memory, for the same loss and gradients: checkpointing and small optimizers.

The chunked loss and quantised experts have files of their own. `problems` says which of them this model and this device
cannot have, in words.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from edgefed.errors import ConfigError, first_line
from edgefed.training.chunked_loss import structural_problem
from edgefed.training.offloaded import OffloadedAdamW, is_offloaded
from edgefed.training.quantising import packing_is_slow, packing_problem

OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_8bit")
_EIGHT_BIT_PROBE = 4096  # elements: bitsandbytes leaves smaller tensors in 32 bit


def problems(module: nn.Module, device: torch.device | str) -> dict[str, str]:
    """Why a saving is not to be had: {"chunked_loss" | "checkpointing" | "adamw_8bit" | "nf4_experts": reason}. Absent:
    it works.

    The chunked loss is judged by the model's structure only; `chunking_problem` measures it once experts are there.
    """
    place = str(torch.device(device))
    found = {
        "chunked_loss": structural_problem(module),
        "checkpointing": checkpointing_problem(module),
        "adamw_8bit": eight_bit_problem(place),
        "nf4_experts": packing_problem("nf4", place, getattr(module, "dtype", torch.float32)) or packing_is_slow(place),
    }
    return {name: reason for name, reason in found.items() if reason}


# --- activation checkpointing ------------------------------------------------------------------------------------


def checkpointing_problem(module: nn.Module) -> str:
    """Why ``module`` cannot compute its layers again in the backward pass; empty when it can."""
    if not getattr(module, "supports_gradient_checkpointing", False):
        return f"{type(module).__name__} does not support activation checkpointing"
    return ""


@contextlib.contextmanager
def checkpointing(module: nn.Module, enabled: bool) -> Iterator[None]:
    """Within it a training step keeps each layer's input only and computes the rest again in its backward pass.

    Non-reentrant: the first pass runs with gradients, so routers are recorded and schedules made there, once. Raises
    ConfigError where the model has no such thing.
    """
    if not enabled:
        yield
        return
    if problem := checkpointing_problem(module):
        raise ConfigError(problem, remedy="Train without checkpointing, with a shorter `sequence_length`.")
    # The public switch also makes the embedding's output need a gradient, with a hook more each time it is called:
    # reentrant checkpoints need that; here it would only drag the backward pass through layers where nothing trains.
    module._set_gradient_checkpointing(
        enable=True, gradient_checkpointing_func=functools.partial(checkpoint, use_reentrant=False)
    )
    try:
        yield
    finally:
        module._set_gradient_checkpointing(enable=False)


# --- optimizers --------------------------------------------------------------------------------------------------


def make_optimizer(
    parameters: Iterable[nn.Parameter], name: str, *, learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW over ``parameters`` with betas 0.9 and 0.999.

    "adamw" keeps two moments in the parameter's dtype, 8 bytes a number in float32. "adamw_8bit" is bitsandbytes'
    with block-wise 8-bit moments (arXiv 2110.02861), 2.03 bytes; tensors below 4096 elements stay in 32 bit. "paged"
    lets them move to the host: of use with a GPU of its own memory only. Moments of offloaded parameters are "adamw"'s
    and lie where those are. Raises ConfigError when it is not to be had.
    """
    parameters = list(parameters)
    device = parameters[0].device if parameters else torch.device("cpu")
    if name not in OPTIMIZERS:
        raise ConfigError(f"no optimizer {name!r}; known are {', '.join(OPTIMIZERS)}")
    if is_offloaded(parameters):
        if name != "adamw":
            raise ConfigError(f"the experts are offloaded, with moments of their own: asked for {name!r}")
        return OffloadedAdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    if name == "adamw":
        # foreach, torch's choice on CUDA, needs one more copy of all parameters at its peak.
        implementation = {"fused": True} if device.type == "cuda" else {"foreach": False}
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, **implementation)
    if problem := eight_bit_problem(str(device)):
        raise ConfigError(f"8-bit AdamW cannot be used on {device}: {problem}", remedy="Use the optimizer adamw.")
    if name == "paged_adamw_8bit" and device.type != "cuda":
        raise ConfigError(f"paged AdamW moves state between GPU and host; it was asked for on {device}")
    import bitsandbytes

    kind = bitsandbytes.optim.AdamW8bit if name == "adamw_8bit" else bitsandbytes.optim.PagedAdamW8bit
    return kind(parameters, lr=learning_rate, weight_decay=weight_decay)


@functools.lru_cache(maxsize=8)
def eight_bit_problem(device: str) -> str:
    """Why bitsandbytes' 8-bit AdamW does not work on ``device``; empty when it does. Tried out, once per process.

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
        optimizer = bitsandbytes.optim.AdamW8bit([weight], lr=0.5, weight_decay=0.0)
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
