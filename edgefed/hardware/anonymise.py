"""Identifiers out of a recording: what says whose machine it is becomes a hash, what says which kind of machine stays.

Hashes are salted and the salt is not kept. Equal identifiers give equal hashes within one document, so that a UUID
still matches itself and a control group's path still leads to its files.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import re
import socket
from pathlib import Path
from typing import Any

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
        return self._walk(self._document, ())

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
    """Names of this host and of its user, as far as they can be told."""
    names = {socket.gethostname(), socket.gethostname().split(".")[0], Path.home().name}
    with contextlib.suppress(OSError, KeyError, ImportError):  # a container's user may have no name
        names.add(getpass.getuser())
    return names
