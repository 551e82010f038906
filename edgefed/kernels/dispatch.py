"""Chooses the implementation of an operation.

    choose("masked_experts", "cpu")             the best that can run, logged once with the reason
    choose("masked_experts", "cpu", "native")   that one; ConfigError with the reason if it cannot run
    run_best("masked_experts", "cpu", "auto", run)   run(name) with the best one that supports this call
    observe_backends()                          records which backend each operation ran with
    backend_table()                             all of them, for `edgefed doctor`

`register_backend` adds an implementation: its operation, name, device type, and a function that returns the reason why
it cannot run here. The first registered one that can run is the best, so fast ones come before ``reference``.

The environment variable EDGEFED_KERNELS names a backend for every operation that requests "auto" and has that backend
on its device: "triton" does not affect operations on the CPU. "auto" never chooses a backend that has not been measured
on its device type; such a backend must be requested by name. Among the others, a backend with ``for_few_tokens`` comes
first in calls of fewer than FEW_TOKENS tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

from edgefed.errors import ConfigError
from edgefed.native import ISA_CODES, NativeUnavailable, isa_code, load_native, setting

logger = logging.getLogger(__name__)

OPERATIONS = ("quantize_experts", "masked_experts", "router_statistics")
ANY_DEVICE = "*"
FEW_TOKENS = 16
"""Below this many tokens, a tile of tensor cores is mostly empty (a Triton product has at least 16 rows), and dot
products that decode the weights on the fly are faster."""

Result = TypeVar("Result")


class Unsupported(Exception):
    """This backend does not support this call. The message is the reason, in one clause."""


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation. ``why_not()`` is None if it can run in this process, else the reason in one clause."""

    operation: str
    name: str
    device_type: str
    why_not: Callable[[], str | None]
    detail: Callable[[], str]
    only_by_name: str = ""
    """Why "auto" never chooses it even if it can run; empty if it may."""
    for_few_tokens: bool = False
    """Whether "auto" prefers it in calls of fewer than FEW_TOKENS tokens."""


@dataclasses.dataclass(frozen=True)
class BackendRow:
    """A row of `backend_table`. ``reason`` is why it cannot run, or what it runs with; see `Backend` for the rest."""

    operation: str
    name: str
    device_type: str
    available: bool
    reason: str
    for_few_tokens: bool


_backends: list[Backend] = []
_chosen: dict[tuple[object, ...], str] = {}
_logged: set[tuple[str, str, str, str]] = set()
_observers: list[dict[str, str]] = []


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
    """Add an implementation, preferred to the one named ``before``. It replaces one of the same name.

    ``only_by_name`` is the reason why "auto" never chooses it; see `Backend` for the other arguments.
    """
    _backends[:] = [b for b in _backends if (b.operation, b.name, b.device_type) != (operation, name, device_type)]
    _chosen.clear()
    place = next((i for i, b in enumerate(_backends) if (b.operation, b.name) == (operation, before)), len(_backends))
    _backends.insert(place, Backend(operation, name, device_type, why_not, detail, only_by_name, for_few_tokens))


@contextlib.contextmanager
def temporary_backends() -> Iterator[None]:
    """Discard, after the block, what was registered, chosen and logged in it: for tests and experiments."""
    saved = list(_backends), dict(_chosen), set(_logged)
    _chosen.clear()
    _logged.clear()
    try:
        yield
    finally:
        _backends[:] = saved[0]
        _chosen.clear()
        _chosen.update(saved[1])
        _logged.clear()
        _logged.update(saved[2])


def run_best(
    operation: str, device_type: str, requested: str, run: Callable[[str], Result], *, few_tokens: bool = False
) -> Result:
    """Call ``run(name)`` with the best backend; skip one that raises `Unsupported`, which is logged once.

    ``few_tokens``: the call has fewer than FEW_TOKENS tokens. Raises ConfigError if a backend requested by name cannot
    run here, or does not support this call.
    """
    refused: dict[str, str] = {}
    while True:
        name = choose(operation, device_type, requested, few_tokens=few_tokens, without=tuple(refused))
        try:
            result = run(name)
        except Unsupported as error:
            if name == requested:
                raise ConfigError(
                    f"cannot run {operation} with the requested backend {name!r}: {error}",
                    remedy="Request auto or reference.",
                ) from error
            refused[name] = str(error)
            continue
        note_backend(operation, name)
        if refused:
            reasons = "; ".join(f"not {other}: {reason}" for other, reason in refused.items())
            log_choice(operation, device_type, name, reasons)
        return result


@contextlib.contextmanager
def observe_backends() -> Iterator[dict[str, str]]:
    """Record, within the block, the backend that each operation last ran with: operation -> name."""
    seen: dict[str, str] = {}
    _observers.append(seen)
    try:
        yield seen
    finally:
        _observers[:] = [other for other in _observers if other is not seen]


def note_backend(operation: str, name: str) -> None:
    """Tell `observe_backends` that ``operation`` ran with the backend ``name``."""
    for seen in _observers:
        seen[operation] = name


def choose(
    operation: str,
    device_type: str,
    requested: str = "auto",
    *,
    few_tokens: bool = False,
    without: tuple[str, ...] = (),
) -> str:
    """Return the backend of ``operation`` for tensors of a device type ("cpu", "cuda"), except ``without``.

    Raises ConfigError for an unknown name, and for a requested backend that cannot run here.
    """
    # Every layer calls this, so choices are cached by everything that they depend on.
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
    original = requested
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
                    f"cannot run {operation} with the requested backend {requested!r}: {reason}",
                    remedy="Request auto or reference; `edgefed doctor` lists the backends of this machine.",
                )
        names = sorted({b.name for b in _backends if b.operation == operation})
        elsewhere = sorted({b.device_type for b in _backends if (b.operation, b.name) == (operation, requested)})
        why = f"it runs on {', '.join(elsewhere)}" if elsewhere else f"expected one of {', '.join(names)}"
        source = "" if original != "auto" else " (EDGEFED_KERNELS)"
        raise ConfigError(f"invalid backend {requested!r}{source} of {operation} on {device_type}: {why}")
    if few_tokens:
        candidates.sort(key=lambda backend: not backend.for_few_tokens)  # stable
    refused: list[str] = []
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
    """Log once which backend runs and why: ``aloud`` (INFO) if a better one was skipped, else DEBUG."""
    key = (operation, device_type, name, reason)
    if key not in _logged:
        _logged.add(key)
        level = logging.INFO if aloud else logging.DEBUG
        logger.log(level, "%s on %s uses %s%s", operation, device_type, name, f" ({reason})" if reason else "")


def backend_table() -> list[BackendRow]:
    """Return every implementation with whether it can run here, and why not or with what."""
    rows = []
    for backend in _backends:
        reason = backend.why_not()
        text = reason or "; ".join(filter(None, (backend.detail(), backend.only_by_name)))
        rows.append(
            BackendRow(
                backend.operation, backend.name, backend.device_type, reason is None, text, backend.for_few_tokens
            )
        )
    return rows


def why_not_native() -> str | None:
    """Return why the native library is unavailable, or None."""
    try:
        isa_code(load_native())
    except (NativeUnavailable, ConfigError) as error:
        return str(error)
    return None


def native_isa() -> str:
    """Return the name of the instruction set that native kernels use now."""
    code = isa_code(load_native())
    return next(name for name, value in ISA_CODES.items() if value == code)


def why_not_triton() -> str | None:
    """Return why the Triton kernels are unavailable, or None."""
    try:
        from edgefed.triton_kernels.availability import why_not
    except ImportError as error:
        return f"the Triton kernels cannot be imported: {error}"
    reason: str | None = why_not()
    return reason


def triton_detail() -> str:
    """Return what the Triton kernels run with."""
    from edgefed.triton_kernels.availability import detail

    return str(detail())


def why_not_cuda() -> str | None:
    """Return why the CUDA library is unavailable, or None."""
    from edgefed.kernels.cuda_library import why_not_cuda

    return why_not_cuda()


NOT_MEASURED = "only by name (EDGEFED_KERNELS): not measured on a GPU yet"
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
