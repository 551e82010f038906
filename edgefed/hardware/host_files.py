"""Read the machine's files through one narrow interface, and derive the host facts from them.

`Files` is the seam: a recording wraps it, a replay stands in for it, a test gives it another ``root``. Everything above
works on what it returns, so no file here is opened anywhere else. Nothing is written, and no file can raise.
"""

from __future__ import annotations

import errno
import operator
import os
import platform
import re
import stat
import subprocess
from pathlib import Path
from typing import Any

import psutil

from edgefed.errors import ConfigError
from edgefed.hardware import cgroup
from edgefed.hardware.facts import Battery, HostFacts, Reading, Reason

READ_LIMIT = 2**20
"""Bytes of one file that are looked at. The longest that we need, /proc/cpuinfo of a large server, is about 200 KB."""
LARGEST = 2**60
"""Numbers from 1 EiB are not sizes: kernels write such numbers for "no limit", and broken files contain them."""

_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ENODEV, errno.ENXIO, errno.ELOOP, errno.ENAMETOOLONG}
_FORBIDDEN = {errno.EACCES, errno.EPERM}


def sysroot(root: Path | None = None) -> Path:
    """``root``, else EDGEFED_SYSROOT, else "/". Raises ConfigError when it is not a directory."""
    chosen = root if root is not None else Path(os.environ.get("EDGEFED_SYSROOT") or "/")
    if not chosen.is_dir():
        name = "the root" if root is not None else "EDGEFED_SYSROOT"
        raise ConfigError(
            f"{name} is {chosen}, which is not a directory",
            remedy="Unset EDGEFED_SYSROOT, or point it to a folder that holds proc/ and sys/.",
        )
    return chosen


class Files:
    """Files below ``root``, the environment of this process, and facts that only system calls report."""

    def __init__(self, root: Path):
        self.root = root
        self.is_real = root.resolve() == Path("/").resolve()
        """Whether this is the machine that we run on: only then may system calls speak for it."""

    def text(self, path: str) -> Reading[str]:
        """The file at the absolute ``path``, NULs stripped from its end; at most `READ_LIMIT` bytes."""
        # O_NONBLOCK: a pipe in the place of a file must not stop us
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        try:
            handle = os.open(f"{self.root}/{path.lstrip('/')}", flags)
            try:
                if not stat.S_ISREG(os.fstat(handle).st_mode):
                    return Reading.missing(Reason.FAILED, path, "not a regular file")
                content = _read(handle)
            finally:
                os.close(handle)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            return Reading.missing(_reason(error), path, getattr(error, "strerror", None) or str(error))
        return Reading.of(content.decode("utf-8", "replace").rstrip("\0"), path)

    def names(self, path: str) -> tuple[str, ...]:
        """Names in the folder at ``path``, sorted; none when it cannot be listed."""
        try:
            return tuple(sorted(os.listdir(f"{self.root}/{path.lstrip('/')}")))
        except (OSError, ValueError):
            return ()

    def exists(self, path: str) -> bool:
        """Whether there is something at ``path``."""
        return os.path.exists(f"{self.root}/{path.lstrip('/')}")

    def environment(self, name: str) -> str:
        """A variable of this process; empty when it is not set."""
        return os.environ.get(name, "")

    def ask(self, name: str) -> Reading[Any]:
        """Return a fact that no file contains, by its name in `_QUESTIONS`; absent for a stand-in root."""
        source, own, question = _QUESTIONS[name]
        if not (self.is_real or own):
            return Reading.missing(Reason.ABSENT, source, "not asked for a stand-in root")
        try:
            answer = question()
        except (OSError, ValueError, RuntimeError, AttributeError, psutil.Error, subprocess.SubprocessError) as error:
            return Reading.missing(_reason(error), source, str(error))
        return Reading.missing(Reason.ABSENT, source) if answer in (None, "") else Reading.of(answer, source)


def _read(handle: int) -> bytes:
    content = b""
    while len(content) < READ_LIMIT and (more := os.read(handle, READ_LIMIT - len(content))):
        content += more
    return content


def _reason(error: Exception) -> Reason:
    code = getattr(error, "errno", None)
    if code in _ABSENT:
        return Reason.ABSENT
    return Reason.NO_PERMISSION if code in _FORBIDDEN else Reason.FAILED


def _resident_bytes() -> int:
    """Resident memory of this process. On Linux the file itself, which takes 10 us; psutil takes 50."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError, AttributeError):  # another system
        return psutil.Process().memory_info().rss


def _resident_file_bytes() -> int | None:
    """The part of this process's resident memory that maps files. Linux only; None elsewhere."""
    try:
        with open("/proc/self/status", encoding="utf-8") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith("RssFile:")), None)
    except (OSError, ValueError, IndexError):
        return None


def _virtual_memory() -> dict[str, int]:
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    return {"total": memory.total, "available": memory.available, "swap_total": swap.total, "swap_used": swap.used}


def _battery() -> dict[str, Any] | None:
    state = psutil.sensors_battery()
    return None if state is None else {"percent": float(state.percent), "plugged": state.power_plugged}


def _cpu_brand() -> str:
    if platform.system() != "Darwin":
        return platform.processor()
    return _output("/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string")


def _output(*command: str) -> str:
    """What a reading command of the system prints; a command that is not there is an OSError."""
    return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()


_QUESTIONS: dict[str, tuple[str, bool, Any]] = {
    # name -> where it comes from, whether it speaks of this process (then right for any root), how to ask
    "system": ("platform.system", True, lambda: platform.system().lower()),
    "machine": ("platform.machine", True, platform.machine),
    "kernel": ("platform.release", False, platform.release),
    "cpu_brand": ("platform.processor", False, _cpu_brand),
    "cpu_count": ("os.cpu_count", False, os.cpu_count),
    "load": ("os.getloadavg", False, lambda: psutil.getloadavg()[0]),
    "memory": ("psutil.virtual_memory", False, _virtual_memory),
    "battery": ("psutil.sensors_battery", False, _battery),
    "l4t_package": ("dpkg-query", False, lambda: _output("dpkg-query", "-W", "-f", "${Version}", "nvidia-l4t-core")),
    "nvpmodel": ("nvpmodel -q", False, lambda: _output("nvpmodel", "-q")),
    "page_bytes": ("sysconf SC_PAGE_SIZE", True, lambda: os.sysconf("SC_PAGE_SIZE")),
    "pid_namespace": ("/proc/self/ns/pid", True, lambda: os.readlink("/proc/self/ns/pid")),
    "pid": ("os.getpid", True, os.getpid),
    "rss": ("/proc/self/statm", True, _resident_bytes),
    "rss_files": ("/proc/self/status RssFile", True, _resident_file_bytes),
}


def parse_meminfo(text: str) -> dict[str, int]:
    """/proc/meminfo: field -> bytes (fields in kB), or count (HugePages_*). Lines that are not that are left out."""
    found = {}
    for match in re.finditer(r"^([A-Za-z_][\w()]*):[ \t]+(\d{1,19})([ \t]+kB)?[ \t]*$", text, re.MULTILINE):
        value = int(match[2]) * (1024 if match[3] else 1)
        if value < LARGEST:
            found[match[1]] = value
    return found


def field_of(text: Reading[str], fields: dict[str, int], name: str) -> Reading[int]:
    """One field of a parsed file, or why there is none."""
    source = f"{text.source} {name}"
    if not text.known:
        return text.without_value(source)
    if name not in fields:
        return Reading.missing(Reason.FAILED, source, "no such line, or no number in it")
    return Reading.of(fields[name], source)


def available_memory(text: Reading[str], fields: dict[str, int]) -> Reading[int]:
    """MemAvailable; on kernels before 3.14 an estimate that its source names as such."""
    available = field_of(text, fields, "MemAvailable")
    if not available.known and {"MemFree", "Cached"} <= fields.keys():
        # shared memory is counted in Cached and cannot be dropped
        estimate = fields["MemFree"] + max(0, fields["Cached"] - fields.get("Shmem", 0))
        available = Reading.of(estimate, f"{text.source} MemFree + Cached - Shmem (no MemAvailable: an estimate)")
    if available.value is not None and available.value > fields.get("MemTotal", LARGEST):
        return Reading.missing(Reason.IMPLAUSIBLE, available.source, f"{available.value} bytes exceed MemTotal")
    return available


def swapped_out_pages(files: Files) -> Reading[int]:
    """Pswpout of /proc/vmstat: pages written to swap since boot."""
    text = files.text("/proc/vmstat")
    if text.value is None:
        return text.without_value()
    match = re.search(r"^pswpout[ \t]+(\d{1,20})[ \t]*$", text.value, re.MULTILINE)
    if match is None:
        return Reading.missing(Reason.FAILED, f"{text.source} pswpout", "no such line, or no number in it")
    return Reading.of(int(match[1]), f"{text.source} pswpout")


def largest_free_block(text: Reading[str], page_bytes: int) -> Reading[int]:
    """The largest block that /proc/buddyinfo counts: column k holds free blocks of 2**k pages."""
    if text.value is None:
        return text.without_value()
    largest, rows = 0, 0
    for match in re.finditer(r"^Node\s+\d+,\s+zone\s+\S+((?:[ \t]+\d{1,12})+)[ \t]*$", text.value, re.MULTILINE):
        counts = [int(count) for count in match[1].split()]
        if len(counts) <= 20:  # 2**20 pages are 4 GiB: no kernel has larger orders
            rows += 1
            largest = max([largest, *(page_bytes << order for order, count in enumerate(counts) if count)])
    if not rows:
        return Reading.missing(Reason.FAILED, text.source, "no zone in it")
    return Reading.of(largest, text.source)


def zram_used(files: Files) -> Reading[int]:
    """RAM that compressed swap takes: mm_stat's mem_used_total, else what /proc/swaps says before compression."""
    swaps = files.text("/proc/swaps")
    rows = re.finditer(r"^/dev/(zram\d+)\s+\S+\s+\d+\s+(\d{1,15})\b", swaps.value or "", re.MULTILINE)
    devices = {row[1]: int(row[2]) for row in rows}
    if not devices:
        reason = swaps.reason or Reason.ABSENT
        return Reading.missing(reason, swaps.source, swaps.detail or "no zram swap")
    total, sources = 0, set()
    for name, used_kib in devices.items():
        statistics = files.text(f"/sys/block/{name}/mm_stat")
        columns = (statistics.value or "").split()
        if len(columns) >= 3 and columns[2].isdecimal():
            total += int(columns[2])
            sources.add("/sys/block/zram*/mm_stat")
        else:
            total += used_kib * 1024
            sources.add("/proc/swaps (before compression)")
    return Reading.of(total, ", ".join(sorted(sources)))


def read_battery(files: Files) -> Reading[Battery]:
    """The battery that feeds the machine, not a mouse's or a headset's: sysfs on Linux, psutil elsewhere."""
    folder, percents, discharging, mains = "/sys/class/power_supply", [], False, []
    for name in files.names(folder):
        kind = (files.text(f"{folder}/{name}/type").value or "").strip()
        scope = (files.text(f"{folder}/{name}/scope").value or "").strip()
        if kind == "Battery" and scope != "Device":
            capacity = (files.text(f"{folder}/{name}/capacity").value or "").strip()
            if capacity.isdecimal() and int(capacity) <= 100:
                percents.append(int(capacity))
                discharging |= (files.text(f"{folder}/{name}/status").value or "").strip() == "Discharging"
        elif kind in ("Mains", "USB"):
            mains.append((files.text(f"{folder}/{name}/online").value or "").strip() == "1")
    if percents:
        plugged = False if discharging else (any(mains) if mains else None)
        return Reading.of(Battery(sum(percents) / len(percents), plugged), folder)
    if files.ask("system").value == "linux":
        return Reading.missing(Reason.ABSENT, folder, "no battery")
    return files.ask("battery").map(lambda state: Battery(state["percent"], state["plugged"]))


def read_container(files: Files) -> Reading[str]:
    """Which container we are in, by the marks that its engine leaves."""
    groups = "".join(files.text(f"/proc/{who}/cgroup").value or "" for who in ("1", "self"))
    named = files.environment("container") or (files.text("/run/systemd/container").value or "").strip()
    marks = (
        ("kubernetes", "KUBERNETES_SERVICE_HOST", bool(files.environment("KUBERNETES_SERVICE_HOST"))),
        ("kubernetes", "/proc/1/cgroup", "kubepods" in groups),
        ("podman", "/run/.containerenv", files.exists("/run/.containerenv")),
        ("docker", "/.dockerenv", files.exists("/.dockerenv")),
        (named, "container=", bool(named)),
        ("docker", "/proc/1/cgroup", "docker" in groups),
        ("podman", "/proc/1/cgroup", "libpod" in groups),
        ("containerd", "/proc/1/cgroup", "containerd" in groups),
        ("lxc", "/proc/1/cgroup", "/lxc" in groups),
    )
    for name, source, seen in marks:
        if seen:
            return Reading.of(name[:40], source)
    return Reading.missing(Reason.ABSENT, "/.dockerenv, /run/.containerenv, /proc/1/cgroup", "not in a container")


def _cpu_name(files: Files, board: Reading[str]) -> Reading[str]:
    text = files.text("/proc/cpuinfo")
    for field in ("model name", "Model", "Hardware"):
        match = re.search(rf"^{field}[ \t]*:[ \t]*(\S.*?)[ \t]*$", text.value or "", re.MULTILINE)
        if match:
            return Reading.of(match[1][:120], f"{text.source} {field}")
    if board.known:
        return board
    brand = files.ask("cpu_brand")
    return brand if brand.known else Reading.missing(text.reason or Reason.FAILED, text.source, "no CPU name in it")


def read_board(files: Files) -> Reading[str]:
    """The board's or computer's model: the device tree's, else the firmware's."""
    for path in ("/sys/firmware/devicetree/base/model", "/proc/device-tree/model", "/sys/class/dmi/id/product_name"):
        text = files.text(path)
        if text.value is not None and (name := text.value.strip(" \0\n\t")):
            return Reading.of(name[:120], path)
    return Reading.missing(Reason.ABSENT, "device tree, DMI", "no file names the model")


def _kernel(files: Files) -> Reading[str]:
    release = files.text("/proc/sys/kernel/osrelease").map(str.strip)
    if release.value:
        return release
    match = re.match(r"Linux version (\S+)", files.text("/proc/version").value or "")
    return Reading.of(match[1], "/proc/version") if match else files.ask("kernel")


def is_wsl(files: Files) -> bool:
    """Linux inside Windows: its kernel says Microsoft."""
    texts = [files.text(path).value or "" for path in ("/proc/version", "/proc/sys/kernel/osrelease")]
    return any("microsoft" in text.lower() for text in texts) or bool(files.environment("WSL_DISTRO_NAME"))


def _cpu_count(files: Files) -> Reading[int]:
    count = len(re.findall(r"^cpu\d+ ", files.text("/proc/stat").value or "", re.MULTILINE))
    return Reading.of(count, "/proc/stat") if count else files.ask("cpu_count")


def _load(files: Files) -> Reading[float]:
    text = files.text("/proc/loadavg")
    match = re.match(r"(\d{1,7}\.\d+)\s", text.value or "")
    return Reading.of(float(match[1]), text.source) if match else files.ask("load")


def _huge_page_free(text: Reading[str], fields: dict[str, int]) -> Reading[int]:
    free = field_of(text, fields, "HugePages_Free")
    size = fields.get("Hugepagesize")
    if free.value is None or size is None:
        return free if free.value is None else Reading.missing(Reason.FAILED, text.source, "no Hugepagesize line")
    return Reading.of(free.value * size, f"{text.source} HugePages_Free x Hugepagesize")


def read_host(files: Files) -> HostFacts:
    """Everything about the host; on Linux from files, elsewhere from psutil."""
    text = files.text("/proc/meminfo")
    fields = parse_meminfo(text.value or "")
    total, available = field_of(text, fields, "MemTotal"), available_memory(text, fields)
    if total.value == 0:
        total = Reading.missing(Reason.IMPLAUSIBLE, total.source, "a total of 0")
    swap_total, swap_free = field_of(text, fields, "SwapTotal"), field_of(text, fields, "SwapFree")
    swap_used = swap_free
    if swap_total.value is not None and swap_free.value is not None:
        swap_used = Reading.of(max(0, swap_total.value - swap_free.value), f"{text.source} SwapTotal - SwapFree")
    if text.reason is Reason.ABSENT and (memory := files.ask("memory")).known:
        total, available, swap_total, swap_used = (
            memory.map(operator.itemgetter(name)) for name in ("total", "available", "swap_total", "swap_used")
        )
    page_bytes = files.ask("page_bytes").value or 4096
    limit = cgroup.read_memory_limit(files)
    board = read_board(files)
    return HostFacts(
        system=files.ask("system").value or "unknown",
        kernel=_kernel(files),
        machine=files.ask("machine").value or "unknown",
        cpu_name=_cpu_name(files, board),
        cpu_count=_cpu_count(files),
        cpu_quota=cgroup.read_cpu_quota(files),
        load_average=_load(files),
        memory_total_bytes=total,
        memory_available_bytes=available,
        huge_pages_total=field_of(text, fields, "HugePages_Total"),
        huge_pages_free_bytes=_huge_page_free(text, fields),
        swap_total_bytes=swap_total,
        swap_used_bytes=swap_used,
        zram_used_bytes=zram_used(files),
        swapped_out_pages=swapped_out_pages(files),
        largest_free_block_bytes=largest_free_block(files.text("/proc/buddyinfo"), page_bytes),
        cgroup_limit_bytes=limit.limit_bytes,
        cgroup_used_bytes=limit.used_bytes,
        own_rss_bytes=files.ask("rss"),
        own_file_bytes=files.ask("rss_files"),
        battery=read_battery(files),
        is_wsl=is_wsl(files),
        container=read_container(files),
        board=board,
    )
