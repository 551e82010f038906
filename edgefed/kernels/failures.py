"""When a backend fails in use, the error becomes a verdict, a warning says so, and another backend runs."""

from __future__ import annotations

import functools
import logging
import traceback
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

from edgefed.errors import EdgefedError, first_line
from edgefed.kernels.out_of_memory import is_out_of_memory
from edgefed.kernels.verdicts import Case, Verdict, any_case, now, verdicts_of

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


_FAULTS = (RuntimeError, OSError, ImportError, AttributeError, TypeError, KeyError, ArithmeticError, AssertionError)


def is_fault_of_backend(error: Exception) -> bool:
    """Whether an error may come from a backend: not from its arguments, and not for want of memory.

    Triton has errors of its own. What torch's checkpointing raises only ends a recomputation early.
    """
    module = type(error).__module__
    if isinstance(error, (EdgefedError, MemoryError)) or module.startswith("torch.utils.checkpoint"):
        return False
    if not (isinstance(error, _FAULTS) or module.startswith("triton")):
        return False
    return not is_out_of_memory(error)


def ends_cuda(error: Exception) -> bool:
    """Whether no further call on the GPU can succeed in this process, lost or not (`is_device_lost`)."""
    text = str(error).lower()
    return type(error).__name__ == "AcceleratorError" or ("cuda error" in text and "invalid argument" not in text)


def record_failures(operation: str, device: str, case: Case | None, failed: Mapping[str, Exception]) -> None:
    """Record the errors of backends, by name; see `record_failure`."""
    for name, error in failed.items():
        record_failure(operation, device, case, name, error)


def record_failure(operation: str, device: str, case: Case | None, name: str, error: Exception) -> None:
    """Record that a backend failed in a case, so that it does not run there again, and warn of it."""
    reason = f"{type(error).__name__}: {first_line(error)}"
    kind = case or any_case(operation)
    logger.warning(
        "%s on %s: the backend %s failed and is not used in this case again until `edgefed doctor` proves it (%s): %s",
        operation, device, name, kind, reason,
    )  # fmt: skip
    verdicts_of(device).record(Verdict(kind, name, "failed", reason[:500], when=now()))


def record_backward_failure(device: str, error: Exception) -> str:
    """Record a backend whose backward pass raised ``error``, for its whole operation, and return its name; "" if none.

    Inside a backward pass no other backend can take over, but the next attempt will use one. The backend is the one
    whose module is innermost in the traceback. An error is recorded once, however often it is passed.
    """
    known: str | None = getattr(error, _RECORDED, None)
    if known is not None:
        return known
    if not is_fault_of_backend(error):
        return ""
    from edgefed.kernels.masked_experts import IMPLEMENTATIONS

    modules = {module: name for name, (module, _) in IMPLEMENTATIONS.items()}
    names = [
        modules.get(frame.f_globals.get("__name__", ""), "") for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    name = next(filter(None, reversed(names)), "")
    if name:
        rows = verdicts_of(device).all()
        cases = [row.case for row in rows if row.backend == name and row.case.trains != "nothing"]
        record_failure("masked_experts", device, None, name, error)
        reason = f"{type(error).__name__}: {first_line(error)}"[:500]
        verdicts_of(device).record(*(Verdict(case, name, "failed", reason, when=now()) for case in cases))
    setattr(error, _RECORDED, name)
    return name


_RECORDED = "_edgefed_backend"
"""Attribute of an error that has been recorded: the backend."""
_watched: set[str] = set()


def watch_backward(implementation: ModuleType) -> None:
    """Make the autograd functions of a backend's module record what their backward pass raises, in anybody's loop."""
    if implementation.__name__ in _watched:
        return
    import torch

    _watched.add(implementation.__name__)
    for function in vars(implementation).values():
        if isinstance(function, type) and issubclass(function, torch.autograd.Function):
            function.backward = staticmethod(_recording(function.backward))  # type: ignore[method-assign]


def _recording(backward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(backward)
    def run(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        try:
            return backward(ctx, *gradients)
        except Exception as error:
            device = next((str(gradient.device) for gradient in gradients if gradient is not None), "cpu")
            record_backward_failure(device, error)
            raise

    return run
