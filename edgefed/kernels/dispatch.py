"""Which implementation of an operation runs where.

    choose("masked_experts", "cpu")             the best that can run, logged once with the reason
    choose("masked_experts", "cpu", "native")   that one; ConfigError with the reason when it cannot run
    run_best("masked_experts", "cpu", "auto", run)   run(name) by the best one that does not refuse this call
    backend_table()                             all of them, for `edgefed doctor`

An implementation announces itself with `register_backend`: its operation, name, kind of device, and a function that
says why it cannot run here. The first announced that can run is the best, so fast ones come before ``reference``.
The environment variable EDGEFED_KERNELS names a backend for every operation that asks for "auto" and has it on that
device: with "triton", what runs on the CPU is chosen as ever. "auto" never takes a backend that has not been measured
on its kind of device: it must be asked for by name. Among those that it may take, one that is announced as
``for_few_tokens`` goes first in calls of fewer than FEW_TOKENS tokens.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable
from typing import TypeVar

from edgefed.errors import ConfigError
from edgefed.native import ISA_CODES, NativeUnavailable, isa_code, load_native, setting

logger = logging.getLogger(__name__)

OPERATIONS = ("quantize_experts", "masked_experts", "router_statistics")
ANY_DEVICE = "*"
FEW_TOKENS = 16
"""Below this many tokens a tile of tensor cores is mostly empty (a product of Triton has at least 16 rows), and dot
products with weights that are decoded on the way are for them."""

Result = TypeVar("Result")


class Unsupported(Exception):
    """This call is not for this backend. The message is the reason, in one clause."""


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation. ``why_not()`` is None when it can run in this process, else the reason in one clause."""

    operation: str
    name: str
    device_type: str
    why_not: Callable[[], str | None]
    detail: Callable[[], str]
    only_by_name: str = ""
    """Why "auto" does not take it though it can run; empty when it does."""
    for_few_tokens: bool = False
    """Whether "auto" prefers it to all others in calls of fewer than FEW_TOKENS tokens."""


@dataclasses.dataclass(frozen=True)
class BackendRow:
    """A line of the doctor's table. ``reason`` is why it cannot run, or what it runs with."""

    operation: str
    name: str
    device_type: str
    available: bool
    reason: str


_backends: list[Backend] = []
_chosen: dict[tuple, str] = {}
_logged: set[tuple[str, str, str, str]] = set()


def register_backend(
    operation: str,
    name: str,
    device_type: str,
    why_not: Callable[[], str | None],
    detail: Callable[[], str] = str,
    *,
    before: str = "reference",
    only_by_name: str = "",
    for_few_tokens: bool = False,
) -> None:
    """Announce an implementation; it is preferred to the one named ``before``. Announcing it again replaces it.

    ``only_by_name`` is the reason for which "auto" leaves it out; for the others see `Backend`.
    """
    _backends[:] = [b for b in _backends if (b.operation, b.name, b.device_type) != (operation, name, device_type)]
    _chosen.clear()
    place = next((i for i, b in enumerate(_backends) if (b.operation, b.name) == (operation, before)), len(_backends))
    _backends.insert(place, Backend(operation, name, device_type, why_not, detail, only_by_name, for_few_tokens))


def run_best(
    operation: str, device_type: str, requested: str, run: Callable[[str], Result], *, few_tokens: bool = False
) -> Result:
    """``run(name)`` of the best backend; one that raises `Unsupported` is passed over, and that is said once.

    ``few_tokens``: the call has fewer than FEW_TOKENS tokens. Raises ConfigError where the backend asked for by name
    cannot run here, or not this call.
    """
    refused: dict[str, str] = {}
    while True:
        name = choose(operation, device_type, requested, few_tokens=few_tokens, without=tuple(refused))
        try:
            result = run(name)
        except Unsupported as error:
            if name == requested:
                raise ConfigError(
                    f"backend {name!r} of {operation} was asked for, but {error}", remedy="Ask for auto or reference."
                ) from error
            refused[name] = str(error)
            continue
        if refused:
            reasons = "; ".join(f"not {other}: {reason}" for other, reason in refused.items())
            log_choice(operation, device_type, name, reasons)
        return result


def choose(
    operation: str,
    device_type: str,
    requested: str = "auto",
    *,
    few_tokens: bool = False,
    without: tuple[str, ...] = (),
) -> str:
    """Name of the backend of ``operation`` for tensors of a device type ("cpu", "cuda"), other than ``without``.

    Raises ConfigError for an unknown name, and for an explicit requested that cannot run here.
    """
    # What was chosen before holds as long as nothing that it was chosen by has changed: this runs for every layer.
    environment = setting("EDGEFED_KERNELS"), setting("EDGEFED_ISA")
    key = (operation, device_type, requested, few_tokens, without, *environment)
    if key not in _chosen:
        _chosen[key] = _choose(operation, device_type, requested, few_tokens, without)
    return _chosen[key]


def _choose(operation: str, device_type: str, requested: str, few_tokens: bool, without: tuple[str, ...]) -> str:
    candidates = [
        backend
        for backend in _backends
        if backend.operation == operation
        and backend.device_type in (device_type, ANY_DEVICE)
        and backend.name not in without
    ]
    asked = requested
    if requested == "auto":
        requested = os.environ.get("EDGEFED_KERNELS", "auto") or "auto"
        known, here = {b.name for b in _backends}, {b.name for b in candidates}
        if requested in known and requested not in here:
            requested = "auto"
    if requested != "auto":
        for backend in candidates:
            if backend.name == requested:
                reason = backend.why_not()
                if reason is None:
                    return backend.name
                raise ConfigError(
                    f"backend {requested!r} of {operation} was asked for, but {reason}",
                    remedy="Ask for auto or reference, or see `edgefed doctor` for what this machine has.",
                )
        names = sorted({b.name for b in _backends if b.operation == operation})
        elsewhere = sorted({b.device_type for b in _backends if (b.operation, b.name) == (operation, requested)})
        why = f"it is for {', '.join(elsewhere)}" if elsewhere else f"there are {', '.join(names)}"
        source = "" if asked != "auto" else " by EDGEFED_KERNELS"
        raise ConfigError(f"backend {requested!r} of {operation} was asked for{source} on {device_type}, but {why}")
    if few_tokens:
        candidates.sort(key=lambda backend: not backend.for_few_tokens)  # stable
    refused = []
    for backend in candidates:
        reason = backend.why_not() or backend.only_by_name or None
        if reason is None:
            if not without:
                log_choice(
                    operation, device_type, backend.name, "; ".join(refused) or backend.detail(), aloud=bool(refused)
                )
            return backend.name
        refused.append(f"not {backend.name}: {reason}")
    raise ConfigError(f"no backend of {operation} for {device_type}: {'; '.join(refused)}")


def log_choice(operation: str, device_type: str, name: str, reason: str, *, aloud: bool = True) -> None:
    """Say once which backend runs, and why; ``aloud`` where a better one was passed over, else for debugging only."""
    key = (operation, device_type, name, reason)
    if key not in _logged:
        _logged.add(key)
        level = logging.INFO if aloud else logging.DEBUG
        logger.log(level, "%s on %s uses %s%s", operation, device_type, name, f" ({reason})" if reason else "")


def backend_table() -> list[BackendRow]:
    """Every implementation, whether it can run here, and why not or with what."""
    rows = []
    for backend in _backends:
        reason = backend.why_not()
        rows.append(
            BackendRow(
                backend.operation,
                backend.name,
                backend.device_type,
                reason is None,
                "; ".join(filter(None, (backend.detail(), backend.only_by_name))) if reason is None else reason,
            )
        )
    return rows


def why_not_native() -> str | None:
    """Why the native library cannot be used, or None."""
    try:
        isa_code(load_native())
    except (NativeUnavailable, ConfigError) as error:
        return str(error)
    return None


def native_isa() -> str:
    """Name of the instruction set that native kernels use now."""
    code = isa_code(load_native())
    return next(name for name, value in ISA_CODES.items() if value == code)


def why_not_triton() -> str | None:
    """Why the Triton kernels cannot be used, or None."""
    try:
        from edgefed.triton_kernels.availability import why_not
    except ImportError as error:
        return f"the Triton kernels are not there: {error}"
    return why_not()


def triton_detail() -> str:
    """What Triton kernels run with."""
    from edgefed.triton_kernels.availability import detail

    return detail()


def why_not_cuda() -> str | None:
    """Why the CUDA library cannot be used, or None."""
    from edgefed.kernels.cuda_library import why_not_cuda

    return why_not_cuda()


NOT_MEASURED = "only by name (EDGEFED_KERNELS): it has not been measured on a GPU yet"
for _operation in OPERATIONS:
    register_backend(_operation, "reference", ANY_DEVICE, lambda: None, lambda: "plain PyTorch")
    register_backend(_operation, "native", "cpu", why_not_native, native_isa)
    register_backend(_operation, "triton", "cuda", why_not_triton, triton_detail, only_by_name=NOT_MEASURED)
    register_backend(
        _operation,
        "cuda",
        "cuda",
        why_not_cuda,
        only_by_name=NOT_MEASURED,
        for_few_tokens=_operation == "masked_experts",
    )
