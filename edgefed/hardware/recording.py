"""Record every raw reading of a device in one JSON document with hashed identifiers, and replay it.

    document = record_readings()              # what `record` of `edgefed doctor` writes
    facts = replay(Path("orin.json"))         # the same facts, on any machine

The document holds what passed the three seams (`probe.Sources`): file texts, NVML's return codes and values, torch's
report. UUIDs, serial numbers, PCI and MAC addresses, container, host and user names become salted hashes; the salt is
not stored. Equal identifiers give equal hashes within one document, so that a UUID still matches itself and the path of
a control group still leads to its files, but nobody can test guesses against a hash.
"""

from __future__ import annotations

import contextlib
import dataclasses
import getpass
import hashlib
import json
import re
import secrets
import socket
from pathlib import Path
from typing import Any

from edgefed.errors import ConfigError
from edgefed.hardware.cuda import CudaDevice, CudaReport
from edgefed.hardware.facts import DeviceFacts, Reading, Reason
from edgefed.hardware.host_files import Files
from edgefed.hardware.nvml import FUNCTION_NOT_FOUND, Answer, Device, Nvml
from edgefed.hardware.probe import Sources, probe_device, sources_of

_UUID = re.compile(r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b", re.IGNORECASE)
_UUID_ESCAPED = re.compile(r"\b[0-9a-f]{8}(?:_[0-9a-f]{4}){3}_[0-9a-f]{12}\b", re.IGNORECASE)
_PCI = re.compile(r"\b[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]\b", re.IGNORECASE)
_MAC = re.compile(r"\b(?:[0-9a-f]{2}[:-]){5}[0-9a-f]{2}\b", re.IGNORECASE)
_LONG_HEX = re.compile(r"(?<![0-9a-z])(?=[0-9]*[a-f])[0-9a-f]{12,}(?![0-9a-z])")
_AT = re.compile(r"[\w.+-]+@[\w.-]+")
_HOME = re.compile(r"(/home/|/Users/|\\Users\\)([^/\\\s:]+)")
_SERIAL = re.compile(r"(?im)(?<=^serial)(\s*:\s*)(\S+)")
_STANDARD_GROUP = re.compile(
    r"(user|system|machine|app|session|background)\.slice|init(\.scope)?|user-\d+\.slice|session-c?\d+\.scope"
    r"|kubepods(-besteffort|-burstable)?(\.slice)?|besteffort|burstable|docker|podman|lxc(\.payload)?|libpod_parent"
)
_GENERIC_NAMES = {"root", "user", "users", "home", "ubuntu", "debian", "fedora", "linux", "nvidia", "jetson", "tegra"}
_GENERIC_NAMES |= {
    "tegra-ubuntu",
    "nvidia-desktop",
    "docker",
    "localhost",
    "admin",
    "runner",
    "raspberrypi",
    "microsoft",
}


class Anonymiser:
    """Replaces identifiers in every text and key of a document."""

    def __init__(self, document: dict[str, Any], salt: bytes):
        self._document = document
        self._salt = salt
        names = {name for name in _local_names() if len(name) >= 3 and name.lower() not in _GENERIC_NAMES}
        self._names = re.compile("|".join(rf"(?<!\w){re.escape(name)}(?!\w)" for name in sorted(names)) or r"(?!)")
        groups = {part for path in self._group_paths() for part in path.split("/") if part}
        private = sorted((part for part in groups if not _STANDARD_GROUP.fullmatch(part)), key=len, reverse=True)
        self._groups = re.compile("|".join(rf"(?<=/){re.escape(part)}(?=/|$)" for part in private) or r"(?!)", re.M)

    def clean(self) -> dict[str, Any]:
        """The document without identifiers."""
        cleaned: dict[str, Any] = self._walk(self._document, ())
        return cleaned

    def _group_paths(self) -> list[str]:
        texts = [self._document["files"]["text"].get(f"/proc/{who}/cgroup", {}).get("value") for who in ("self", "1")]
        return [line.split(":", 2)[2] for text in texts if text for line in text.splitlines() if line.count(":") >= 2]

    def _hash(self, word: str, size: int = 8) -> str:
        return hashlib.sha256(self._salt + word.lower().encode()).hexdigest()[:size]

    def _walk(self, value: Any, path: tuple[str, ...]) -> Any:
        if isinstance(value, dict):
            return {self._text(key, path): self._walk(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._walk(item, path) for item in value]
        return self._text(value, path) if isinstance(value, str) else value

    def _text(self, text: str, path: tuple[str, ...]) -> str:
        where = " ".join(path)
        if "cgroup" in text or "cgroup" in where:
            text = self._groups.sub(self._group, text)
        text = _UUID.sub(lambda m: self._uuid(m[0]), text)
        text = _UUID_ESCAPED.sub(lambda m: self._uuid(m[0].replace("_", "-")).replace("-", "_"), text)
        text = _PCI.sub(lambda m: "pci-" + self._hash(m[0]), text)
        text = _MAC.sub(lambda m: "mac-" + self._hash(m[0]), text)
        text = _SERIAL.sub(lambda m: m[1] + self._hash(m[2]), text)
        text = _LONG_HEX.sub(lambda m: self._hash(m[0], 12), text)
        text = _HOME.sub(lambda m: f"{m[1]}user-{self._hash(m[2])}", text)
        if "cpuinfo" not in where and "meminfo" not in where and "device" not in where:
            # a name may be a word that these need ("model"), and they hold none
            text = _AT.sub(lambda m: "name-" + self._hash(m[0]), text)
            text = self._names.sub(lambda m: "name-" + self._hash(m[0]), text)
        return text

    def _uuid(self, uuid: str) -> str:
        if not uuid.strip("0-"):
            return uuid  # says that there is none
        digits = self._hash(uuid, 32)
        return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))

    def _group(self, match: re.Match[str]) -> str:
        marks = [mark for mark in ("kubepods", "docker", "libpod", "containerd", "lxc") if mark in match[0]]
        return "-".join([*marks, "group", self._hash(match[0])])


def _local_names() -> set[str]:
    """Return the names of this host and of its user, as far as they are known."""
    names = {socket.gethostname(), socket.gethostname().split(".")[0], Path.home().name}
    with contextlib.suppress(OSError, KeyError, ImportError):  # a container's user may have no name
        names.add(getpass.getuser())
    return names


SCHEMA = "edgefed.recording/1"
SIZE_LIMIT = 16 * 2**20
"""Bytes of a recording that are read; a real one has some hundred KB."""
MORE_CALLS = (
    ("GetMemoryInfo",),
    ("GetTemperature", 0),
    ("GetCurrentClocksThrottleReasons",),
    ("GetArchitecture",),
    ("GetBrand",),
    ("GetMemoryBusWidth",),
    ("GetNumGpuCores",),
    ("GetTemperatureThreshold", 0),
    ("GetTemperatureThreshold", 1),
    ("GetPowerManagementDefaultLimit",),
    ("GetPowerManagementLimitConstraints",),
    ("GetPerformanceState",),
    ("GetComputeMode",),
    ("GetComputeRunningProcesses_v2",),
)
"""Asked for the record only: older calls that a later edgefed may fall back to, and what helps to know a new device."""
PRESENCE_ONLY = ("WSL_DISTRO_NAME", "KUBERNETES_SERVICE_HOST")
"""Variables of which only the presence matters: their values stay here."""


class _RecordingFiles(Files):
    def __init__(self, inner: Files):
        super().__init__(inner.root)
        self._inner = inner
        self.log: dict[str, dict[str, Any]] = {"text": {}, "names": {}, "exists": {}, "environment": {}, "ask": {}}

    def text(self, path: str) -> Reading[str]:
        reading = self._inner.text(path)
        self.log["text"][path] = _reading_document(reading)
        return reading

    def names(self, path: str) -> tuple[str, ...]:
        names = self._inner.names(path)
        recorded = [name for name in names if name.startswith("nvidia")] if path == "/dev" else list(names)
        self.log["names"][path] = recorded
        return names

    def exists(self, path: str) -> bool:
        self.log["exists"][path] = found = self._inner.exists(path)
        return found

    def environment(self, name: str) -> str:
        value = self._inner.environment(name)
        self.log["environment"][name] = "set" if value and name in PRESENCE_ONLY else value
        return value

    def ask(self, name: str) -> Reading[Any]:
        reading = self._inner.ask(name)
        self.log["ask"][name] = _reading_document(reading)
        return reading


class _RecordingNvml:
    def __init__(self, inner: Nvml):
        self._inner = inner
        self.log: dict[str, Any] = {"start": None, "calls": {}}

    def start(self) -> Answer:
        answer = self._inner.start()
        self.log["start"] = answer._asdict()
        return answer

    def call(self, name: str, *arguments: Any) -> Answer:
        answer = self._inner.call(name, *arguments)
        self.log["calls"][_call_key(name, arguments)] = answer._asdict()
        return answer


class _ReplayedFiles(Files):
    def __init__(self, log: dict[str, Any]):
        super().__init__(Path("/"))
        self.is_real = False
        self._log = log

    def text(self, path: str) -> Reading[str]:
        return _reading(self._log["text"].get(path), path)

    def names(self, path: str) -> tuple[str, ...]:
        return tuple(str(name) for name in self._log["names"].get(path, ()))

    def exists(self, path: str) -> bool:
        return bool(self._log["exists"].get(path, False))

    def environment(self, name: str) -> str:
        return str(self._log["environment"].get(name, ""))

    def ask(self, name: str) -> Reading[Any]:
        return _reading(self._log["ask"].get(name), name)


class _ReplayedNvml:
    def __init__(self, log: dict[str, Any]):
        self._log = log

    def start(self) -> Answer:
        return _answer(self._log["start"])

    def call(self, name: str, *arguments: Any) -> Answer:
        return _answer(self._log["calls"].get(_call_key(name, arguments)))


def record_readings(
    device: str | None = None,
    *,
    root: Path | None = None,
    ask_torch: bool = True,
    sources: Sources | None = None,
    salt: bytes | None = None,
) -> dict[str, Any]:
    """Probe ``device`` (see `probe_device`, also for what is raised) and return all that was read, ready for JSON."""
    inner = sources or sources_of(root, ask_torch=ask_torch)
    files, nvml = _RecordingFiles(inner.files), _RecordingNvml(inner.nvml)
    report = inner.ask_torch()
    free: dict[str, Any] = {}

    def cuda_free(index: int) -> Reading[int]:
        reading = inner.cuda_free(index)
        free[str(index)] = _reading_document(reading)
        return reading

    facts = probe_device(device, sources=Sources(files, nvml, lambda: report, cuda_free))
    for gpu in facts.gpus:
        if gpu.nvml_index is not None:
            for name, *arguments in MORE_CALLS:
                nvml.call(f"nvmlDevice{name}", Device(gpu.nvml_index, gpu.mig_index), *arguments)
    document = {
        "schema": SCHEMA,
        "files": files.log,
        "nvml": nvml.log,
        "torch": {**_report_document(report), "free": free},
    }
    return Anonymiser(document, salt or secrets.token_bytes(16)).clean()


def replay(recording: Path | dict[str, Any], device: str | None = None) -> DeviceFacts:
    """The facts of a recorded device. Raises ConfigError when the recording cannot be read or is none."""
    document = recording if isinstance(recording, dict) else _load(recording)
    where = "the recording" if isinstance(recording, dict) else str(recording)
    if document.get("schema") != SCHEMA:
        raise ConfigError(
            f"{where} is not a recording of this edgefed: schema {str(document.get('schema'))[:60]!r}, not {SCHEMA!r}",
            remedy="Record again with `record` of `edgefed doctor`.",
        )
    try:
        files = {part: dict(document["files"][part]) for part in ("text", "names", "exists", "environment", "ask")}
        nvml = {"start": document["nvml"]["start"], "calls": dict(document["nvml"]["calls"])}
        report = _report(document["torch"])
        free = dict(document["torch"]["free"])

        def cuda_free(index: int) -> Reading[int]:
            return _reading(free.get(str(index)), "torch.cuda.mem_get_info")

        sources = Sources(_ReplayedFiles(files), _ReplayedNvml(nvml), lambda: report, cuda_free)
        return probe_device(device, sources=sources)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ConfigError(
            f"{where} is damaged: {type(error).__name__}: {error}",
            remedy="Record again with `record` of `edgefed doctor`.",
        ) from error


def _load(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(SIZE_LIMIT + 1)
    except OSError as error:
        raise ConfigError(f"cannot read the recording {path}: {error.strerror or error}") from error
    try:
        document = json.loads(content) if len(content) <= SIZE_LIMIT else None
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise ConfigError(
            f"{path} is not a recording: expected a JSON object of at most {SIZE_LIMIT // 2**20} MiB",
            remedy="Record with `record` of `edgefed doctor`.",
        )
    return document


def _call_key(name: str, arguments: tuple[Any, ...]) -> str:
    words = []
    for argument in arguments:
        if isinstance(argument, Device):
            words.append(f"gpu{argument.index}" + ("" if argument.mig is None else f".mig{argument.mig}"))
        else:
            words.append(str(argument))
    return f"{name}({', '.join(words)})"


def _reading_document(reading: Reading[Any]) -> dict[str, Any]:
    if reading.known:
        return {"value": reading.value, "source": reading.source}
    return {"reason": (reading.reason or Reason.FAILED).value, "source": reading.source, "detail": reading.detail}


def _reading(document: dict[str, Any] | None, source: str) -> Reading[Any]:
    if document is None:
        return Reading.missing(Reason.ABSENT, source, "not recorded")
    if "value" in document:
        return Reading.of(document["value"], str(document["source"]))
    return Reading.missing(Reason(document["reason"]), str(document["source"]), str(document["detail"]))


def _answer(document: dict[str, Any] | None) -> Answer:
    if document is None:
        return Answer(None, FUNCTION_NOT_FOUND, "not recorded")
    return Answer(document["value"], int(document["code"]), str(document["text"]))


def _report_document(report: CudaReport) -> dict[str, Any]:
    readings = {name: _reading_document(getattr(report, name)) for name in ("version", "cuda_version", "available")}
    return {**readings, "devices": [dataclasses.asdict(device) for device in report.devices]}


def _report(document: dict[str, Any]) -> CudaReport:
    readings = {name: _reading(document[name], name) for name in ("version", "cuda_version", "available")}
    devices = []
    for device in document["devices"]:
        major, minor = device["compute_capability"]
        devices.append(CudaDevice(**{**device, "compute_capability": (int(major), int(minor))}))
    return CudaReport(**readings, devices=tuple(devices))
