"""What is proved of the kernels on this machine's devices: one JSON file per device in the user's cache folder.

A `Case` is what decides whether a backend is right and fast: operation, dtype, storage, sizes, gradients. A `Verdict`
says what `edgefed.kernels.proof` found when it ran a backend on the device itself. The dispatcher looks verdicts up
(`verdicts_of`); a file belongs to one device with one set of versions (`describe_device`), so that a new driver, torch,
Triton or edgefed starts without verdicts. This module needs torch only to describe a GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import msgspec

import edgefed
from edgefed.disk import make_folder, write_durably
from edgefed.errors import ConfigError, StorageError
from edgefed.hardware.host_files import Files, read_host, sysroot
from edgefed.hardware.tegra import read_power_mode
from edgefed.native import NativeUnavailable, find_library, isa_code, load_native

logger = logging.getLogger(__name__)

State = Literal["proved", "slower", "wrong", "failed", "died", "trying", "unsupported"]
SCHEMA = 1
FASTER = 1.1
"""A backend is used if it is right and takes at most 1 / 1.1 of the reference's time."""
ROWS = (1, 16, 128)
"""Classes of rows per expert: each stands for its number and all smaller ones above the class before it."""
LOCK_STALE_S = 900.0
"""Age at which a lock is taken over: its owner was killed."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A kind of call. Two calls of one case may use the same backend.

    ``rows`` is the class of rows per expert, one of ROWS; ``hidden`` and ``width`` are H and I of the experts (router
    statistics: ``width`` is E); ``rank`` is that of the adapters, 0 without. ``storage`` names the formats of the
    weights, joined by "+". ``trains`` is what gets gradients: "nothing", "tokens" (and gate weights), or "weights".
    ``form`` names the activation ("swiglu" or "other") and what else decides which kernels run: "transposed", "bias",
    "finish", "energies" (of neurons, which a profile records), joined by "+". Router statistics have "attention" there
    if the attention that tokens receive is recorded.
    """

    operation: str
    dtype: str
    storage: str = "dense"
    hidden: int = 0
    width: int = 0
    rows: int = 0
    rank: int = 0
    trains: str = "nothing"
    form: str = ""

    def __str__(self) -> str:
        parts = [self.operation, self.dtype, self.storage]
        if self.hidden:
            parts.append(f"{self.hidden}x{self.width}")
        elif self.width:
            parts.append(f"{self.width} experts")
        if self.rows:
            parts.append(f"{self.rows} rows")
        if self.rank:
            parts.append(f"rank {self.rank}")
        if self.trains != "nothing":
            parts.append(f"gradients of {self.trains}")
        return " ".join([*parts, *([self.form] if self.form not in ("", "swiglu") else [])])


class Verdict(msgspec.Struct, frozen=True, omit_defaults=True):
    """What was found of one backend in one case. Times are of the wall clock, host included, in ms.

    ``state``: "proved" (right and faster), "slower" (right), "wrong" (other values or other bits from run to run),
    "failed" (raised an error), "died" (crashed or hung), "trying" (written before it runs, so that what takes the
    machine down is not tried again), "unsupported" (the backend has no kernel for the case).
    """

    case: Case
    backend: str
    state: State
    reason: str = ""
    ms: float = 0.0
    reference_ms: float = 0.0
    grouped_mm_ms: float = 0.0
    when: str = ""

    @property
    def speedup(self) -> float:
        """Time of the reference over that of the backend; 0 if it was not measured."""
        return self.reference_ms / self.ms if self.ms else 0.0

    def describe(self) -> str:
        """The verdict in one clause."""
        if self.state in ("proved", "slower"):
            return f"{self.state}, {self.speedup:.2g} times the reference's speed ({self.ms:.3g} ms)"
        return f"{self.state}{': ' + self.reason if self.reason else ''}"


class _File(msgspec.Struct):
    schema: int
    device: dict[str, str]
    verdicts: list[Verdict]
    wanted: list[Case]


def cache_folder() -> Path:
    """Return the cache folder, which may be deleted at any time: EDGEFED_CACHE, or ``edgefed`` in the user's cache."""
    chosen = os.environ.get("EDGEFED_CACHE")
    if chosen:
        return Path(chosen)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "edgefed" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "edgefed"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgefed"


def now() -> str:
    """Return the time as it is written into verdicts, UTC."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def describe_device(device: str) -> dict[str, str]:
    """Return everything that a verdict depends on beside its case: the hardware, its power mode, and all versions.

    ``device`` is "cpu" or "cuda:N". A GPU without a number is the current one.
    """
    found = {"torch": _version("torch"), "edgefed": edgefed.__version__}
    files = Files(sysroot())
    if device.partition(":")[0] != "cuda":
        library, isa = "", ""
        with contextlib.suppress(NativeUnavailable, ConfigError):
            library, isa = _hash(find_library("_native", "")), str(isa_code(load_native()))
        name = read_host(files).cpu_name.value or ""
        return {**found, "kind": device, "name": name, "isa": isa, "library": library}
    import torch

    properties = torch.cuda.get_device_properties(torch.device(device))
    library = ""
    with contextlib.suppress(NativeUnavailable):
        library = _hash(find_library("_cuda", ""))
    return {
        **found,
        "kind": "cuda",
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory": str(properties.total_memory),
        "driver": str(getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)()),
        "cuda": torch.version.cuda or "",
        "triton": _version("triton"),
        "library": library,
        "power_mode": read_power_mode(files).value or "",
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


class Verdicts:
    """The verdicts of one device. Reads its file once; every change is written at once, merged with what others wrote.

    A cache folder that cannot be written keeps the verdicts in this process only, with one warning.
    """

    def __init__(self, device: str, description: Mapping[str, str], folder: Path):
        self.device = device
        self.description = dict(description)
        digest = hashlib.sha256(msgspec.json.encode(sorted(self.description.items()))).hexdigest()[:16]
        self.path = folder / "kernels" / f"{digest}.json"
        self._rows: dict[tuple[Case, str], Verdict] = {}
        self._wanted: dict[Case, None] = {}
        self._lock = threading.Lock()
        self._warned = False
        self._merge(self._read())

    def __bool__(self) -> bool:
        return bool(self._rows)

    def get(self, case: Case, backend: str) -> Verdict | None:
        """Return the verdict on a backend, None without one."""
        return self._rows.get((case, backend))

    def all(self) -> list[Verdict]:
        """Return every verdict, in the order in which they were made."""
        return list(self._rows.values())

    def wanted(self) -> list[Case]:
        """Return the cases that ran without a verdict of every backend."""
        return list(self._wanted)

    def want(self, case: Case) -> None:
        """Remember a case for the next proof."""
        if case not in self._wanted:
            self._change([], [case])

    def record(self, *verdicts: Verdict) -> None:
        """Add verdicts, or replace those of the same case and backend."""
        self._change(verdicts, [])

    def forget(self, *keys: tuple[Case, str]) -> None:
        """Remove verdicts."""
        self._change([], [], keys)

    def clear(self) -> None:
        """Remove all verdicts; wanted cases stay."""
        self.forget(*self._rows)

    @contextlib.contextmanager
    def proving(self) -> Iterator[bool]:
        """Hold the right to measure this device, which only one process has at a time; False if another one has it."""
        lock = self.path.with_suffix(".proving")
        try:
            make_folder(lock.parent)
            with contextlib.suppress(FileNotFoundError):
                if time.time() - lock.stat().st_mtime > LOCK_STALE_S:
                    lock.unlink()
            os.close(os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except FileExistsError:
            yield False
            return
        except (OSError, StorageError):  # nothing to share verdicts with
            yield True
            return
        try:
            yield True
        finally:
            lock.unlink(missing_ok=True)

    def _read(self) -> _File | None:
        try:
            found = msgspec.json.decode(self.path.read_bytes(), type=_File)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, msgspec.MsgspecError) as error:
            self._warn(f"kernels: cannot read {self.path}, so nothing is proved: {error}")
            return None
        return found if found.schema == SCHEMA and found.device == self.description else None

    def _merge(self, found: _File | None) -> None:
        if found is not None:
            self._rows = {(row.case, row.backend): row for row in found.verdicts}
            self._wanted = dict.fromkeys([*found.wanted, *self._wanted])

    def _change(
        self, verdicts: list[Verdict] | tuple[Verdict, ...], wanted: list[Case], gone: tuple[tuple[Case, str], ...] = ()
    ) -> None:
        with self._lock:
            self._merge(self._read())
            for key in gone:
                self._rows.pop(key, None)
            for row in verdicts:
                self._rows[row.case, row.backend] = row
            self._wanted.update(dict.fromkeys(wanted))
            data = msgspec.json.encode(_File(SCHEMA, self.description, self.all(), self.wanted()))
            try:
                write_durably(make_folder(self.path.parent) / self.path.name, msgspec.json.format(data, indent=1))
            except StorageError as error:
                self._warn(f"kernels: verdicts are kept in this process only: {error}")
        forget_choices()

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(text)


def any_case(operation: str) -> Case:
    """Return the case of calls that are not told apart."""
    return Case(operation, "any")


_opened: dict[tuple[str, Path], Verdicts] = {}
_files: dict[Path, bool] = {}


def verdicts_of(device: str) -> Verdicts:
    """Return the verdicts of "cpu" or "cuda:N", read once per process; "cuda" is the current GPU."""
    key = _numbered(device), cache_folder()
    if key not in _opened:
        _opened[key] = Verdicts(key[0], describe_device(key[0]), key[1])
    return _opened[key]


def _numbered(device: str) -> str:
    if device != "cuda":
        return device
    import torch

    return f"cuda:{torch.cuda.current_device()}"


def has_verdicts(device: str) -> bool:
    """Whether any verdict on a device is stored. Without a file the device is not described, which takes time."""
    folder = cache_folder()
    if not any(opened == folder for _, opened in _opened):
        if folder not in _files:
            try:
                _files[folder] = any((folder / "kernels").glob("*.json"))
            except OSError:
                _files[folder] = False
        if not _files[folder]:
            return False
    return bool(verdicts_of(device))


def reload_verdicts() -> None:
    """Read the files again at the next use: another process may have written them."""
    _opened.clear()
    forget_choices()


def forget_choices() -> None:
    """Make the dispatcher choose again, and look again whether there are verdicts."""
    from edgefed.kernels import dispatch

    _files.clear()
    dispatch.choose_again()
