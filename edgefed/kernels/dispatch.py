"""Chooses the implementation of an operation.

    choose("masked_experts", "cpu")             the best that can run, logged once with the reason
    choose("masked_experts", "cpu", "native")   that one; ConfigError with the reason if it cannot run
    run_best("masked_experts", "cuda:0", "auto", run, case=case)   run(name) with the best one for this call
    observe_backends()                          records which backend each operation ran with
    backend_table("cuda:0")                     all of them, for `edgefed doctor`

`register_backend` adds an implementation: its operation, name, device type, and a function that returns the reason why
it cannot run here. The first registered one that can run is the best, so fast ones come before ``reference``.

A backend that ``needs_proof`` runs only in cases in which this device has proved it right and faster than the reference
(`edgefed.kernels.proof`); of several, the fastest. A backend that raises an error is recorded as failed, with a
warning, and the next one runs. The environment variable EDGEFED_KERNELS names a backend for every operation that
requests "auto" and has that backend on its device, proved or not: "triton" does not affect operations on the CPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

from edgefed.errors import ConfigError
from edgefed.kernels.failures import ends_cuda, is_fault_of_backend, record_failures
from edgefed.kernels.verdicts import FASTER, Case, any_case, has_verdicts, verdicts_of
from edgefed.native import ISA_CODES, NativeUnavailable, isa_code, load_native, setting

logger = logging.getLogger(__name__)

OPERATIONS = ("quantize_experts", "masked_experts", "router_statistics")
ANY_DEVICE = "*"
UNPROVED = "not proved in this case on this device (`edgefed doctor` and training prove it)"
PROOF_NEEDED = "runs where this device has proved it"

Result = TypeVar("Result")


class Unsupported(Exception):
    """This backend does not support this call. The message is the reason, in one clause."""


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation.

    ``why_not(device)`` is None if it can run on "cpu", "cuda:1", ..., else the reason in one clause;
    ``detail(device)`` says what it runs with.
    """

    operation: str
    name: str
    device_type: str
    why_not: Callable[[str], str | None]
    detail: Callable[[str], str]
    needs_proof: bool = False
    """Whether "auto" uses it only where the device has proved it."""


@dataclasses.dataclass(frozen=True)
class BackendRow:
    """A row of `backend_table`. ``reason`` is why it cannot run, or what it runs with; see `Backend` for the rest."""

    operation: str
    name: str
    device_type: str
    available: bool
    reason: str
    needs_proof: bool


_backends: list[Backend] = []
_chosen: dict[tuple[object, ...], str] = {}
_consulted: dict[tuple[str, str], bool] = {}
_logged: set[tuple[str, str, str, str]] = set()
_observers: list[dict[str, str]] = []


def register_backend(
    operation: str,
    name: str,
    device_type: str,
    why_not: Callable[[str], str | None],
    detail: Callable[[str], str] = lambda device: "",
    *,
    before: str = "reference",
    needs_proof: bool = False,
) -> None:
    """Add an implementation, preferred to the one named ``before``. It replaces one of the same name.

    See `Backend` for the arguments.
    """
    _backends[:] = [b for b in _backends if (b.operation, b.name, b.device_type) != (operation, name, device_type)]
    choose_again()
    place = next((i for i, b in enumerate(_backends) if (b.operation, b.name) == (operation, before)), len(_backends))
    _backends.insert(place, Backend(operation, name, device_type, why_not, detail, needs_proof))


def choose_again() -> None:
    """Forget what was chosen: backends or verdicts have changed."""
    _chosen.clear()
    _consulted.clear()


@contextlib.contextmanager
def temporary_backends() -> Iterator[None]:
    """Discard, after the block, what was registered, chosen and logged in it: for tests and experiments."""
    saved = list(_backends), set(_logged)
    choose_again()
    _logged.clear()
    try:
        yield
    finally:
        _backends[:] = saved[0]
        choose_again()
        _logged.clear()
        _logged.update(saved[1])


def run_best(
    operation: str,
    device: str,
    requested: str,
    run: Callable[[str], Result],
    *,
    case: Callable[[], Case | None] = lambda: None,
) -> Result:
    """Call ``run(name)`` with the best backend for this call.

    Skips one that raises `Unsupported`, which is logged once, and one that fails: its error is recorded as a verdict of
    the case and logged as a warning, once another backend has shown that the call itself is sound.

    Args:
        operation: one of OPERATIONS.
        device: "cpu", "cuda:1", ...: that of the tensors.
        requested: a backend's name, or "auto".
        run: the call.
        case: what kind of call it is; evaluated only if there are verdicts or backends that need one.

    Raises ConfigError if a backend requested by name cannot run here, or does not support this call.

    """
    kind = case() if requested == "auto" and _consults_verdicts(operation, device) else None
    refused: dict[str, str] = {}
    failed: dict[str, Exception] = {}
    while True:
        name = choose(operation, device, requested, case=kind, without=(*refused, *failed))
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
        except Exception as error:
            if name == requested or not is_fault_of_backend(error):
                raise
            if name == "reference":
                if failed and ends_cuda(error):  # by the first one: what runs afterwards only meets the wreck
                    record_failures(operation, device, kind, failed)
                raise next(iter(failed.values()), error) from error
            failed[name] = error
            continue
        if failed:
            record_failures(operation, device, kind, failed)
        note_backend(operation, name)
        if refused:
            reasons = "; ".join(f"not {other}: {reason}" for other, reason in refused.items())
            log_choice(operation, device, name, reasons)
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
    device: str,
    requested: str = "auto",
    *,
    case: Case | None = None,
    without: tuple[str, ...] = (),
) -> str:
    """Return the backend of ``operation`` on a device ("cpu", "cuda:0"), except ``without``.

    ``case`` is the kind of call; without one, verdicts do not count, and backends that need proof are not chosen.
    Raises ConfigError for an unknown name, and for a requested backend that cannot run here.
    """
    # Every layer calls this, so choices are cached by everything that they depend on.
    environment = setting("EDGEFED_KERNELS"), setting("EDGEFED_ISA")
    key = (operation, device, requested, case, without, *environment)
    if key not in _chosen:
        _chosen[key] = _choose(operation, device, requested, case, without)
    return _chosen[key]


def _candidates(operation: str, device: str) -> list[Backend]:
    kinds = (device.partition(":")[0], ANY_DEVICE)
    return [backend for backend in _backends if backend.operation == operation and backend.device_type in kinds]


def _consults_verdicts(operation: str, device: str) -> bool:
    """Whether the choice on this device depends on the case: a backend needs proof, or there are verdicts."""
    key = (operation, device)
    if key not in _consulted:
        needed = any(b.needs_proof and b.why_not(device) is None for b in _candidates(operation, device))
        _consulted[key] = needed or has_verdicts(device)
    return _consulted[key]


def _choose(operation: str, device: str, requested: str, case: Case | None, without: tuple[str, ...]) -> str:
    candidates = [backend for backend in _candidates(operation, device) if backend.name not in without]
    original = requested
    if requested == "auto":
        requested = os.environ.get("EDGEFED_KERNELS", "auto") or "auto"
        known, here = {b.name for b in _backends}, {b.name for b in candidates}
        if requested in known and requested not in here:
            requested = "auto"
    if requested != "auto":
        for backend in candidates:
            if backend.name == requested:
                reason = backend.why_not(device)
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
        raise ConfigError(f"invalid backend {requested!r}{source} of {operation} on {device}: {why}")
    refused: list[str] = []
    admitted: list[tuple[float, Backend, str]] = []
    for backend in candidates:
        reason = backend.why_not(device)
        speedup, proof = 1.0, ""
        if reason is None:
            reason, speedup, proof = _judge(backend, device, case)
        if reason is None:
            admitted.append((speedup, backend, proof))
        else:
            refused.append(f"not {backend.name}: {reason}")
    if not admitted:
        raise ConfigError(f"no backend of {operation} for {device}: {'; '.join(refused)}")
    _, backend, proof = max(admitted, key=lambda item: item[0])  # the first of equals
    if not without:
        log_choice(
            operation, device, backend.name, "; ".join(filter(None, (proof, *refused))) or backend.detail(device),
            aloud=bool(refused or proof),
        )  # fmt: skip
    return backend.name


def want_proof(operation: str, device: str, case: Callable[[], Case | None]) -> None:
    """Remember the case of a call that was planned with the reference, where another backend could be proved."""
    if _consults_verdicts(operation, device) and needs_proof(device):
        kind = case()
        if kind is not None:
            verdicts_of(device).want(kind)


def proved_in_training(device: str, dtype: str) -> str | None:
    """Return a backend that is proved for the known training cases of the device; None unless every case has one.

    The memory of a step is planned before its cases are known.
    """
    requested = setting("EDGEFED_KERNELS") or "auto"
    if requested != "auto" or not has_verdicts(device):
        return None
    rows = [row for row in verdicts_of(device).all() if row.case.trains != "nothing" and row.case.dtype == dtype]
    proved = {row.case: row.backend for row in rows if row.state == "proved"}
    return next(iter(proved.values()), None) if proved.keys() == {row.case for row in rows} else None


def _judge(backend: Backend, device: str, case: Case | None) -> tuple[str | None, float, str]:
    """Return why "auto" does not use a backend, or None; its speed relative to the reference; and its proof."""
    if backend.name == "reference":
        return None, 1.0, ""
    if case is None and not has_verdicts(device):
        return (UNPROVED if backend.needs_proof else None), 1.0, ""
    verdicts = verdicts_of(device)
    verdict = (case and verdicts.get(case, backend.name)) or verdicts.get(any_case(backend.operation), backend.name)
    if verdict is None:
        if backend.needs_proof:
            if case is not None:
                verdicts.want(case)
            return UNPROVED, 1.0, ""
        return None, 1.0, ""
    if verdict.state == "proved":
        return None, verdict.speedup, f"{verdict.describe()} on {verdict.when[:10]}: {case}"
    if verdict.state == "slower" and not backend.needs_proof and verdict.speedup > 1 / FASTER:
        return None, 1.0, ""
    return verdict.describe(), 1.0, ""


def log_choice(operation: str, device_type: str, name: str, reason: str, *, aloud: bool = True) -> None:
    """Log once which backend runs and why: ``aloud`` (INFO) if a better one was skipped, else DEBUG."""
    key = (operation, device_type, name, reason)
    if key not in _logged:
        _logged.add(key)
        level = logging.INFO if aloud else logging.DEBUG
        logger.log(level, "%s on %s uses %s%s", operation, device_type, name, f" ({reason})" if reason else "")


def backend_table(device: str | None = None) -> list[BackendRow]:
    """Return every implementation with whether it can run here, and why not or with what.

    ``device``: "cuda:1" asks for that GPU, otherwise the current one; backends of the CPU are listed in any case.
    """
    rows = []
    for backend in _backends:
        where = device if device is not None and device.startswith(backend.device_type) else backend.device_type
        reason = backend.why_not(where)
        text = reason or "; ".join(filter(None, (backend.detail(where), PROOF_NEEDED if backend.needs_proof else "")))
        rows.append(
            BackendRow(backend.operation, backend.name, backend.device_type, reason is None, text, backend.needs_proof)
        )
    return rows


def needs_proof(device: str) -> bool:
    """Whether a backend that can run on a device is used only where it is proved."""
    every = (backend for operation in OPERATIONS for backend in _candidates(operation, device))
    return any(backend.needs_proof and backend.why_not(device) is None for backend in every)


def provable_backends(operation: str, device: str) -> list[str]:
    """Return the backends that can run on a device and can be compared with the reference, best first."""
    return [b.name for b in _candidates(operation, device) if b.name != "reference" and b.why_not(device) is None]


def why_not_native(device: str = "cpu") -> str | None:
    """Return why the native library is unavailable, or None."""
    try:
        isa_code(load_native())
    except (NativeUnavailable, ConfigError) as error:
        return str(error)
    return None


def native_isa(device: str = "cpu") -> str:
    """Return the name of the instruction set that native kernels use now."""
    code = isa_code(load_native())
    return next(name for name, value in ISA_CODES.items() if value == code)


def why_not_triton(device: str = "cuda") -> str | None:
    """Return why the Triton kernels are unavailable on a GPU, or None."""
    try:
        from edgefed.triton_kernels.availability import why_not
    except ImportError as error:
        return f"the Triton kernels cannot be imported: {error}"
    reason: str | None = why_not(device)
    return reason


def triton_detail(device: str = "cuda") -> str:
    """Return what the Triton kernels run with."""
    from edgefed.triton_kernels.availability import detail

    return str(detail(device))


def why_not_cuda(device: str = "cuda") -> str | None:
    """Return why the CUDA library is unavailable on a GPU, or None."""
    from edgefed.kernels.cuda_library import why_not_cuda

    return why_not_cuda(int(device.partition(":")[2] or 0))


for _operation in OPERATIONS:
    register_backend(_operation, "reference", ANY_DEVICE, lambda device: None, lambda device: "plain PyTorch")
    register_backend(_operation, "native", "cpu", why_not_native, native_isa)
    register_backend(_operation, "triton", "cuda", why_not_triton, triton_detail, needs_proof=True)
    register_backend(_operation, "cuda", "cuda", why_not_cuda, needs_proof=True)
