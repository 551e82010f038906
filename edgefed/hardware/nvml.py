"""NVML through nvidia-ml-py: the only place that imports it. One narrow seam, `Library.call`, that cannot raise.

A recording stands around the seam, a replay in its place. What the answers mean is `edgefed.hardware.gpu`'s business;
here are only the library's life (found, loaded, initialised once a process, reset in a forked child) and its errors.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import threading
import types
import warnings
from typing import Any, NamedTuple, Protocol

from edgefed.hardware.facts import Reading, Reason

NOT_INITIALISED, INVALID_ARGUMENT, NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND, DRIVER_NOT_LOADED = 1, 2, 3, 4, 6, 9
LIBRARY_NOT_FOUND, FUNCTION_NOT_FOUND, GPU_IS_LOST, RESET_REQUIRED, RM_MISMATCH, NO_DATA = 12, 13, 15, 16, 18, 21
BINDING_ABSENT, BINDING_SHADOWED, BINDING_BROKEN, MALFORMED = -1, -2, -3, -4
"""Codes of our own, for what goes wrong before NVML is reached or behind it."""

_REASONS = {
    NOT_SUPPORTED: Reason.NOT_SUPPORTED,
    FUNCTION_NOT_FOUND: Reason.NOT_SUPPORTED,  # the driver is older than the call
    NO_PERMISSION: Reason.NO_PERMISSION,
    NOT_FOUND: Reason.ABSENT,
    NO_DATA: Reason.ABSENT,
    LIBRARY_NOT_FOUND: Reason.ABSENT,
    DRIVER_NOT_LOADED: Reason.ABSENT,
    BINDING_ABSENT: Reason.ABSENT,
    GPU_IS_LOST: Reason.LOST,
    RESET_REQUIRED: Reason.LOST,
}
WSL_LIBRARY = "/usr/lib/wsl/lib/libnvidia-ml.so.1"


IDLE, POWER_CAP, SLOWED = 0x1, 0x4, 0x8 | 0x20 | 0x40 | 0x80
"""Bits of NVML's throttle reasons. POWER_CAP, the software power limit, is normal for a GPU at work. SLOWED is not:
hardware slowdown, temperature, power brake."""
THROTTLE_WORDS = {
    POWER_CAP: "power limit",
    0x8: "hardware slowdown",
    0x20: "software thermal limit",
    0x40: "hardware thermal limit",
    0x80: "power brake",
}


def throttle_words(bits: int) -> tuple[str, ...]:
    """Names of the throttle reasons in ``bits``, without those that are normal for an idle GPU."""
    return tuple(word for bit, word in THROTTLE_WORDS.items() if bits & bit)


@dataclasses.dataclass(frozen=True)
class Device:
    """A GPU by NVML's number, or the MIG instance number ``mig`` of it."""

    index: int
    mig: int | None = None


class Answer(NamedTuple):
    """What one call gave: ``value`` when ``code`` is 0, else NVML's code (or one of ours) and its text."""

    value: Any
    code: int = 0
    text: str = ""

    def reading(self, source: str) -> Reading[Any]:
        """The answer as a reading: its value, or NVML's code as a reason."""
        if self.code == 0 and self.value is not None:
            return Reading.of(self.value, source)
        if self.code == 0:
            return Reading.missing(Reason.NOT_SUPPORTED, source, "no value")
        return Reading.missing(_REASONS.get(self.code, Reason.FAILED), source, self.text or f"NVML error {self.code}")


class Nvml(Protocol):
    """The two calls that everything above NVML needs: `Library`, a recording and a replay have them."""

    def start(self) -> Answer:
        """Load and initialise NVML."""
        ...

    def call(self, name: str, *arguments: Any) -> Answer:
        """Call the NVML function ``name``."""
        ...


class Library:
    """The NVML of this process. ``start`` may be called again at any time; it does work only when it is needed."""

    def __init__(self) -> None:
        self._reset()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._reset)  # NVML's state does not survive a fork

    def _reset(self) -> None:
        self._lock = threading.RLock()
        self._pynvml: types.ModuleType | None = None
        self._failures: tuple[type[Exception], ...] = ()
        self._started = False
        self._handles: dict[Device, Any] = {}

    def start(self) -> Answer:
        """Load and initialise NVML, and forget the handles of an earlier look: cards come, go and are cut anew."""
        with self._lock:
            self._handles.clear()
            if self._pynvml is None and (failure := self._import()) is not None:
                return failure
            if self._started:
                # a driver that disappeared fails here first; only a new start shows the reason
                if self._guarded("nvmlDeviceGetCount").code == 0:
                    return self._ready()
                self._guarded("nvmlShutdown")
                self._started = False
            answer = self._guarded("nvmlInit")
            if answer.code == LIBRARY_NOT_FOUND and os.path.exists(WSL_LIBRARY):
                try:  # Windows puts it where the loader does not look; loaded once, its name is found
                    ctypes.CDLL(WSL_LIBRARY, mode=ctypes.RTLD_GLOBAL)
                    answer = self._guarded("nvmlInit")
                except OSError as error:
                    answer = Answer(None, LIBRARY_NOT_FOUND, str(error))
            self._started = answer.code == 0
            return self._ready() if self._started else answer

    def _ready(self) -> Answer:
        """Success; with a text when it is reached through the retired package, which works but lacks newer calls."""
        file = str(getattr(self._pynvml, "__file__", "") or "")
        return Answer(True, text=file if os.path.basename(file) == "__init__.py" else "")

    def call(self, name: str, *arguments: Any) -> Answer:
        """The NVML function ``name``. A `Device` among the arguments becomes its handle. Structures become dicts."""
        with self._lock:
            if not self._started:
                return Answer(None, NOT_INITIALISED, "NVML is not started")
            resolved = []
            for argument in arguments:
                if isinstance(argument, Device):
                    handle = self._handle(argument)
                    if handle.code:
                        return handle
                    argument = handle.value
                resolved.append(argument)
        answer = self._guarded(name, *resolved)
        if answer.code == INVALID_ARGUMENT:  # a GPU was cut anew: look its handles up again next time
            changed = {argument.index for argument in arguments if isinstance(argument, Device)}
            with self._lock:
                for device in [device for device in self._handles if device.index in changed]:
                    del self._handles[device]
        return answer if answer.code else Answer(_plain(answer.value))

    def _handle(self, device: Device) -> Answer:
        if device in self._handles:
            return Answer(self._handles[device])
        if device.mig is None:
            answer = self._guarded("nvmlDeviceGetHandleByIndex", device.index)
        else:
            parent = self._handle(Device(device.index))
            if parent.code:
                return parent
            answer = self._guarded("nvmlDeviceGetMigDeviceHandleByIndex", parent.value, device.mig)
        if answer.code == 0:
            self._handles[device] = answer.value
        return answer

    def _import(self) -> Answer | None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # the retired package pynvml warns even where it forwards to the right one
                import pynvml
        except ImportError as error:
            return Answer(None, BINDING_ABSENT, str(error))
        except Exception as error:  # a foreign package of that name may raise anything
            return Answer(None, BINDING_BROKEN, f"{type(error).__name__}: {error}")
        if not hasattr(pynvml, "nvmlInitWithFlags"):
            return Answer(None, BINDING_SHADOWED, str(getattr(pynvml, "__file__", "") or "pynvml"))
        mismatch = getattr(pynvml, "NVMLLibraryMismatchError", pynvml.NVMLError)  # no subclass of NVMLError
        self._pynvml, self._failures = pynvml, (pynvml.NVMLError, mismatch)
        return None

    def _guarded(self, name: str, *arguments: Any) -> Answer:
        try:
            return Answer(getattr(self._pynvml, name)(*arguments))
        except self._failures as error:
            code = getattr(error, "value", FUNCTION_NOT_FOUND)  # a mismatch has no code: the driver is too old
            return Answer(None, code if isinstance(code, int) and code else MALFORMED, str(error))
        except AttributeError:
            return Answer(None, FUNCTION_NOT_FOUND, f"this nvidia-ml-py has no {name}")
        except (OSError, ValueError, TypeError, ctypes.ArgumentError) as error:  # UnicodeDecodeError is a ValueError
            return Answer(None, MALFORMED, f"{type(error).__name__}: {error}")


def _plain(value: Any) -> Any:
    """Structures, and nvidia-ml-py's friendly copies of them, as dicts; bytes as text."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, ctypes.Structure):
        return {field[0]: _plain(getattr(value, field[0])) for field in value._fields_}
    if isinstance(value, ctypes._SimpleCData):
        return value.value
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return {name: _plain(item) for name, item in vars(value).items()}


_library: Library | None = None


def process_library() -> Library:
    """The one library of this process."""
    global _library
    if _library is None:
        _library = Library()
    return _library


class Setting(NamedTuple):
    """What decides which advice is right when NVML does not work."""

    container: str = ""
    is_wsl: bool = False
    jetson: str = ""
    """The JetPack of a Jetson, or "unknown"."""
    has_device_node: bool = False


def explain(answer: Answer, setting: Setting) -> tuple[str, str]:
    """(problem, remedy) for a start that failed. Situations of NVML's documentation and of the field, in words."""
    code = answer.code
    if code == BINDING_ABSENT:
        return "the Python package nvidia-ml-py is not installed", "pip install 'nvidia-ml-py>=12.560'"
    if code in (0, BINDING_SHADOWED):
        return (
            f"the retired package pynvml hides nvidia-ml-py ({answer.text})",
            "pip uninstall -y pynvml; pip install --force-reinstall 'nvidia-ml-py>=12.560'",
        )
    if code == BINDING_BROKEN:
        return f"nvidia-ml-py cannot be imported: {answer.text}", "pip install --force-reinstall 'nvidia-ml-py>=12.560'"
    if code == LIBRARY_NOT_FOUND:
        return _explain_no_library(setting)
    if code == DRIVER_NOT_LOADED:
        return (
            "the NVIDIA driver is installed, but its kernel module is not loaded (Driver Not Loaded)",
            "Run `sudo modprobe nvidia`; after a kernel update `dkms status` shows whether the module must be rebuilt.",
        )
    if code == RM_MISMATCH:
        return (
            "the NVIDIA library and the loaded kernel module have different versions: the driver was updated",
            "Reboot, or stop every program that uses the GPU and reload the driver's modules.",
        )
    if code == NO_PERMISSION:
        return (
            "this user may not open the NVIDIA driver (Insufficient Permissions)",
            "Look at the rights of /dev/nvidia*; the user may have to be in the group `video` or `render`.",
        )
    if code == FUNCTION_NOT_FOUND:
        return f"this NVIDIA driver is too old: {answer.text}", "Update the NVIDIA driver."
    words = answer.text or f"error {code}"
    return f"NVML fails: {words}", "Run `nvidia-smi`, and look for NVRM and Xid lines in `sudo dmesg`."


def _explain_no_library(setting: Setting) -> tuple[str, str]:
    if setting.jetson:
        if setting.jetson.startswith(("4", "5")):
            return (
                f"this Jetson has no NVML (JetPack {setting.jetson} brings none): its own sensors are read instead",
                "Nothing to do.",
            )
        return (
            f"NVML is not found on this Jetson (JetPack {setting.jetson}): its own sensors are read instead",
            "JetPack 6 and later bring NVML: a container needs `--runtime nvidia`, a system the nvidia-l4t packages.",
        )
    if setting.container:
        return (
            f"no NVIDIA driver found in this container ({setting.container})",
            "If the machine has an NVIDIA GPU, start the container with `--gpus all` (and, for monitoring, "
            "NVIDIA_DRIVER_CAPABILITIES=compute,utility).",
        )
    if setting.is_wsl:
        return (
            "no NVIDIA driver found in WSL: libnvidia-ml.so.1 is missing from /usr/lib/wsl/lib",
            "Install the NVIDIA driver on Windows (not inside WSL), then run `wsl --update` and `wsl --shutdown`.",
        )
    if setting.has_device_node:
        return (
            "the NVIDIA kernel driver runs, but its library libnvidia-ml.so.1 is not found",
            "Install the driver's libraries (packages nvidia-utils or libnvidia-compute of the same version).",
        )
    return (
        "no NVIDIA driver found",
        "If this machine has an NVIDIA GPU, install its driver; otherwise ignore this.",
    )
