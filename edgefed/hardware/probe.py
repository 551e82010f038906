"""The only door to the sensors: one call that gives `DeviceFacts`, whatever is missing, broken or forbidden.

    facts = probe_device()                    # the best GPU that torch can use, else the best there is, else the CPU
    facts = probe_device("cuda:1")            # torch's number; a GPU or MIG UUID works too
    sensors = MemorySensors(facts)            # cheap samples for a running training
    sample = sensors.sample()

Nothing is decided here: `classify` says what kind of memory it is, `budget` how much of it may be used.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

from edgefed.errors import DeviceNotFound
from edgefed.hardware import cuda
from edgefed.hardware.facts import (
    DeviceFacts,
    DriverFacts,
    GpuFacts,
    MemoryKind,
    Reading,
    Reason,
    TegraFacts,
    TorchFacts,
)
from edgefed.hardware.gpu import count_gpus, read_gpus
from edgefed.hardware.host_files import Files, read_host, sysroot
from edgefed.hardware.matching import choose_gpu, classify, find_gpu, is_divided, is_lost, match_cuda, tegra_gpu
from edgefed.hardware.memory import format_bytes
from edgefed.hardware.nvml import (
    IDLE,
    MALFORMED,
    SLOWED,
    Answer,
    Nvml,
    Setting,
    explain,
    process_library,
    throttle_words,
)
from edgefed.hardware.sampling import MemorySample, MemorySensors
from edgefed.hardware.tegra import read_tegra

__all__ = ["MemorySample", "MemorySensors", "Sources", "probe_device", "sources_of", "sysroot"]


@dataclasses.dataclass(frozen=True)
class Sources:
    """The seams that every raw reading passes. A recording wraps them, a replay stands in for them."""

    files: Files
    nvml: Nvml
    ask_torch: Callable[[], cuda.CudaReport]
    cuda_free: Callable[[int], Reading[int]] = cuda.free_bytes
    """Free bytes of torch's device of that number; called only for a discrete GPU whose memory NVML does not report."""


def sources_of(root: Path | None = None, *, ask_torch: bool = True) -> Sources:
    """The sources of this machine (or of a stand-in for its files)."""
    return Sources(Files(sysroot(root)), process_library(), cuda.ask_torch if ask_torch else cuda.not_asked)


def probe_device(
    device: str | None = None,
    *,
    root: Path | None = None,
    ask_torch: bool = True,
    sources: Sources | None = None,
) -> DeviceFacts:
    """Probe one device and its host.

    Args:
        device: None or "auto" for the best; "cpu"; "cuda" or "cuda:1" (torch's numbers; NVML's when torch has no
            CUDA); a GPU or MIG UUID, or a beginning of it that names one.
        root: where files are looked up; default EDGEFED_SYSROOT, or "/". NVML and torch are not moved by it.
        ask_torch: False leaves torch out (it takes a second to import): nothing is then known of CUDA.
        sources: replaces all of it, for a replay.

    Raises:
        DeviceNotFound: ``device`` does not exist on this machine. ConfigError: the root is not a directory.

    """
    sources = sources or sources_of(root, ask_torch=ask_torch)
    files = sources.files
    host, tegra = read_host(files), read_tegra(files)
    driver, gpus = _read_nvml(sources.nvml, files, host.container.value or "", host.is_wsl, tegra)
    report = sources.ask_torch()
    gpus = match_cuda(gpus, report, files.environment("CUDA_VISIBLE_DEVICES"))
    if tegra is not None:
        gpus = tegra_gpu(gpus, tegra)
    gpu = _select(device, gpus, report)
    verdict = classify(gpu, tegra, host.board, driver.problem if not gpus else _why_none(device))
    if gpu is not None and verdict.kind is MemoryKind.DISCRETE:
        filled = _with_cuda_memory(gpu, sources)
        gpus = tuple(filled if other is gpu else other for other in gpus)
        gpu = filled
    facts = DeviceFacts(
        kind=verdict.kind,
        evidence=verdict.evidence,
        gpu=gpu,
        gpus=gpus,
        host=host,
        tegra=tegra,
        driver=driver,
        torch=TorchFacts(report.version, report.cuda_version, report.available),
        notes=(),
    )
    return dataclasses.replace(facts, notes=(*verdict.notes, *notes_of(facts)))


def _select(device: str | None, gpus: tuple[GpuFacts, ...], report: cuda.CudaReport) -> GpuFacts | None:
    wanted = (device or "auto").strip()
    if wanted.lower() == "cpu":
        return None
    if wanted.lower() == "auto":
        return choose_gpu(gpus)
    gpu = find_gpu(gpus, wanted, by_cuda=bool(report.devices))
    if gpu is None:
        raise DeviceNotFound(f"device {wanted!r} not found; available: {', '.join(_listed(gpus))}")
    return gpu


def _why_none(device: str | None) -> str:
    if (device or "").strip().lower() == "cpu":
        return "the CPU was asked for"
    return "the only GPU is in MIG mode and has no instance"


def _with_cuda_memory(gpu: GpuFacts, sources: Sources) -> GpuFacts:
    """Read the memory from CUDA for a card that NVML does not know (a container without it, another maker)."""
    if gpu.cuda_index is None or gpu.memory_free_bytes.known or gpu.memory_free_bytes.reason is Reason.LOST:
        return gpu
    free = sources.cuda_free(gpu.cuda_index)
    if not free.known:
        return gpu
    total = gpu.memory_total_bytes if gpu.memory_total_bytes.known else gpu.cuda_total_bytes
    return dataclasses.replace(gpu, memory_free_bytes=free, memory_total_bytes=total)


def _listed(gpus: tuple[GpuFacts, ...]) -> list[str]:
    names = ["cpu"]
    for number, gpu in enumerate(gpus):
        place = f"cuda:{gpu.cuda_index}" if gpu.cuda_index is not None else f"GPU {number} (not usable by torch)"
        names.append(f"{place} {gpu.name.value or 'without a name'} {gpu.uuid.value or ''}".strip())
    return names


def _read_nvml(
    nvml: Nvml, files: Files, container: str, is_wsl: bool, tegra: TegraFacts | None
) -> tuple[DriverFacts, tuple[GpuFacts, ...]]:
    """The driver and its GPUs; why there are none."""
    started = nvml.start()
    has_node = any(re.fullmatch(r"nvidia\d+", name) for name in files.names("/dev"))
    jetson = "" if tegra is None else tegra.jetpack.value or "unknown"
    setting = Setting(container, is_wsl, jetson, has_node)
    if started.code:
        missing = started.reading("NVML")
        problem, remedy = explain(started, setting)
        return DriverFacts(False, missing, missing, missing, problem, remedy), ()
    cuda_version = nvml.call("nvmlSystemGetCudaDriverVersion_v2")
    if cuda_version.code:
        cuda_version = nvml.call("nvmlSystemGetCudaDriverVersion")
    driver = DriverFacts(
        available=True,
        driver_version=_text(nvml.call("nvmlSystemGetDriverVersion"), "NVML SystemGetDriverVersion"),
        nvml_version=_text(nvml.call("nvmlSystemGetNVMLVersion"), "NVML SystemGetNVMLVersion"),
        cuda_driver_version=_cuda_version(cuda_version),
    )
    if started.text:
        problem, remedy = explain(started, setting)
        driver = dataclasses.replace(driver, problem=problem, remedy=remedy)
    count, gpus = count_gpus(nvml), read_gpus(nvml, files)
    if not count.known:
        _, remedy = explain(Answer(None, MALFORMED), setting)
        driver = dataclasses.replace(driver, problem=f"the GPUs cannot be counted: {count.describe()}", remedy=remedy)
    elif not gpus:
        remedy = "`lspci | grep -i nvidia` shows whether the system sees one; it may belong to a virtual machine."
        if container:
            remedy = f"This is a container ({container}): start it with `--gpus all` or the device that it may use."
        driver = dataclasses.replace(driver, problem="the NVIDIA driver works, but it has no GPU", remedy=remedy)
    return driver, gpus


def _text(answer: Answer, source: str) -> Reading[str]:
    reading = answer.reading(source)
    if reading.known and not (isinstance(reading.value, str) and reading.value.strip()):
        return Reading.missing(Reason.IMPLAUSIBLE, source, repr(reading.value)[:80])
    return reading


def _cuda_version(answer: Answer) -> Reading[str]:
    """13000 -> 13.0."""
    reading = answer.reading("NVML SystemGetCudaDriverVersion")
    if reading.known and not (isinstance(reading.value, int) and 1000 <= reading.value < 100_000):
        return Reading.missing(Reason.IMPLAUSIBLE, reading.source, repr(reading.value)[:80])
    return reading.map(lambda number: f"{number // 1000}.{number % 1000 // 10}")


def notes_of(facts: DeviceFacts) -> tuple[str, ...]:
    """Everything worth a sentence, the most serious first."""
    return (*_driver(facts), *_gpus(facts), *_torch(facts), *_host(facts))


def _driver(facts: DeviceFacts) -> list[str]:
    driver = facts.driver
    return [f"{driver.problem}. {driver.remedy}"] if driver.problem else []


def _named(gpu: GpuFacts) -> str:
    number = "" if gpu.nvml_index is None else f"GPU {gpu.nvml_index} "
    return f"{number}({gpu.name.value or 'without a name'})"


def _gpus(facts: DeviceFacts) -> list[str]:
    notes = []
    for gpu in facts.gpus:
        if is_lost(gpu):
            notes.append(
                f"{_named(gpu)} does not respond any more (GPU is lost). Look for Xid lines in `sudo dmesg`; reboot or "
                "reload the driver."
            )
        parts = [part for part in facts.gpus if part.is_mig and part.nvml_index == gpu.nvml_index]
        if is_divided(gpu) and not parts:
            notes.append(
                f"{_named(gpu)} is in MIG mode and has no instance that this user can see. Create one with "
                "`nvidia-smi mig -cgi ... -C`, or switch MIG off."
            )
        elif is_divided(gpu):
            notes.append(f"{_named(gpu)} is in MIG mode: its {len(parts)} instance(s) are used, not the whole GPU.")
    used = facts.gpu
    if used is None:
        return notes
    if len([other for other in facts.gpus if not is_divided(other)]) > 1:
        notes.append(
            f"{_named(used)} {used.uuid.value or ''} is used; choose another with `device`.".replace("  ", " ")
        )
    bits = used.throttle_reasons.value or 0
    if bits & SLOWED and not bits & IDLE:
        notes.append(f"{_named(used)} is throttled: {', '.join(throttle_words(bits))}.")
    if used.processes.reason is Reason.NO_PERMISSION:
        notes.append(f"who else uses {_named(used)} is not visible to this user: {used.processes.describe()}.")
    if facts.kind is MemoryKind.DISCRETE and used.memory_total_bytes.known and facts.host.is_wsl:
        notes.append("WSL: Windows shares this GPU and may silently move its memory to the host's: slow, not an error.")
    return notes


def _torch(facts: DeviceFacts) -> list[str]:
    gpu, torch = facts.gpu, facts.torch
    if torch.version.reason is Reason.FAILED:
        return [f"torch cannot be imported: {torch.version.detail}. Reinstall it for this machine."]
    asked = torch.version.known
    if gpu is None or gpu.cuda_index is not None or not asked:
        return []
    if torch.cuda_available.known:
        if gpu.cuda_total_bytes.known:
            return [f"this torch ({torch.version.value}) has no code for {_named(gpu)}: install a build that has."]
        return [f"torch does not see {_named(gpu)}: look at CUDA_VISIBLE_DEVICES. Training runs on the CPU."]
    return [f"torch cannot use {_named(gpu)}: {torch.cuda_available.detail}. Training runs on the CPU."]


def _host(facts: DeviceFacts) -> list[str]:
    host, notes = facts.host, []
    if not host.memory_total_bytes.known:
        notes.append(f"the size of the host's memory is unknown: {host.memory_total_bytes.describe()}.")
    elif not host.memory_available_bytes.known:
        notes.append(f"the host's free memory is unknown: {host.memory_available_bytes.describe()}.")
    elif "estimate" in host.memory_available_bytes.source:
        notes.append(f"free memory is an estimate: {host.memory_available_bytes.source}.")
    if host.cgroup_limit_bytes.known:
        limit = format_bytes(host.cgroup_limit_bytes.require())
        where = f" in this container ({host.container.value})" if host.container.known else ""
        notes.append(f"memory is limited to {limit}{where} ({host.cgroup_limit_bytes.source}).")
        if not host.cgroup_used_bytes.known:
            notes.append(f"how much of that limit is used is unknown: {host.cgroup_used_bytes.describe()}.")
    elif host.cgroup_limit_bytes.reason is not Reason.ABSENT:
        notes.append(f"a memory limit may exist and cannot be read: {host.cgroup_limit_bytes.describe()}.")
    if host.cpu_quota.known:
        notes.append(f"{host.cpu_quota.value:g} processors are allowed ({host.cpu_quota.source}).")
    if facts.tegra is not None and not facts.tegra.l4t.known:
        notes.append(f"the L4T release is unknown: {facts.tegra.l4t.describe()}.")
    return notes
