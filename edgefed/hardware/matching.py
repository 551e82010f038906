"""Match NVML's GPUs with torch's devices, choose one, and decide which memory it works in. Pure functions.

NVML orders GPUs by slot, CUDA by speed and by CUDA_VISIBLE_DEVICES: only the UUID identifies a GPU on both sides. Where
one side has no UUID (Jetson Orin), what is left on both sides is matched if there is one of each.

`classify` decides by the first rule that holds:
    1. CUDA reports an integrated device                                            -> unified (whatever NVML says)
    2. NVML has no memory figure (not supported, or a total of 0) and a second sign -> unified
       (a name, board, SoC or architecture that exists only with shared memory)
    3. the name is on the list of such chips                                        -> unified
    4. everything else                                                              -> discrete
Compute capability alone never decides (a GH200 is 9.0 like an H100), and neither does "not supported" alone: a discrete
GPU may fail to answer, and its memory is then unknown, not the host's.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, NamedTuple

from edgefed.hardware.cuda import CudaDevice, CudaReport
from edgefed.hardware.facts import GpuFacts, MemoryKind, Reading, Reason, TegraFacts
from edgefed.hardware.memory import format_bytes
from edgefed.hardware.tegra import SOC_CAPABILITY


def bare_uuid(uuid: str | None) -> str:
    """``GPU-1234...`` and ``MIG-1234...`` without their kind, in lower case: torch leaves it out."""
    return re.sub(r"^(gpu-|mig-)+", "", (uuid or "").strip().lower())


def is_divided(gpu: GpuFacts) -> bool:
    """A whole GPU in MIG mode: only its instances compute."""
    return bool(gpu.mig_enabled.value) and not gpu.is_mig


def match_cuda(gpus: tuple[GpuFacts, ...], report: CudaReport, visible_devices: str = "") -> tuple[GpuFacts, ...]:
    """NVML's GPUs with what CUDA knows of each; then CUDA's devices that NVML does not know.

    ``visible_devices`` is CUDA_VISIBLE_DEVICES.
    """
    visible = visible_devices.split(",")
    partner: dict[int, CudaDevice] = {}
    left = []
    for device in report.devices:
        number = _by_uuid(gpus, device, partner, visible)
        if number is None:
            left.append(device)
        else:
            partner[number] = device
    rest = [n for n, gpu in enumerate(gpus) if n not in partner and not is_divided(gpu) and not _contradicts(gpu, left)]
    if len(left) == 1 and len(rest) == 1:
        partner[rest[0]] = left.pop()
    reason = (
        report.available
        if not report.available.known
        else Reading.missing(
            Reason.ABSENT, "torch", "torch does not list this GPU (CUDA_VISIBLE_DEVICES, or another MIG instance)"
        )
    )
    merged = [_with_cuda(gpu, partner.get(number), reason) for number, gpu in enumerate(gpus)]
    unlisted = unlisted_gpu("NVML", "NVML does not list this GPU")
    return (*merged, *(_with_cuda(unlisted, device, reason) for device in left))


def _by_uuid(
    gpus: tuple[GpuFacts, ...], device: CudaDevice, taken: dict[int, CudaDevice], visible: list[str]
) -> int | None:
    uuid = bare_uuid(device.uuid)
    if not uuid:
        return None
    for number, gpu in enumerate(gpus):
        if number in taken or bare_uuid(gpu.uuid.value) != uuid:
            continue
        if not is_divided(gpu):
            return number
        # CUDA reported the UUID of the whole GPU: it means one of its instances.
        free = [n for n, part in enumerate(gpus) if part.is_mig and n not in taken]
        return _visible_instance(gpus, [n for n in free if gpus[n].nvml_index == gpu.nvml_index], gpu, device, visible)
    return None


def _visible_instance(
    gpus: tuple[GpuFacts, ...], parts: list[int], parent: GpuFacts, device: CudaDevice, visible: list[str]
) -> int | None:
    """Which of ``parts`` (numbers in ``gpus``) a CUDA device is: the visible one, else the one of its size."""
    named = [n for name in visible for n in parts if names_gpu(name, gpus[n], parent)]
    if named:
        return named[0]

    def distance(n: int) -> int:
        total = gpus[n].memory_total_bytes.value
        return 2**62 if total is None or device.total_bytes <= 0 else abs(total - device.total_bytes)

    return min(parts, key=distance, default=None)


def names_gpu(name: str, gpu: GpuFacts, parent: GpuFacts | None = None) -> bool:
    """Whether CUDA would understand ``name`` (an entry of CUDA_VISIBLE_DEVICES) as this GPU.

    A UUID, or the beginning of one, in upper or lower case; for a MIG instance of ``parent`` also the old form
    ``MIG-GPU-<uuid of the GPU>/<GPU instance>/<compute instance>``. Whether a beginning is unique is not checked here.
    """
    text = name.strip().lower()
    wanted, own = bare_uuid(text), bare_uuid(gpu.uuid.value)
    if not wanted or text.isdecimal():
        return False
    if text.startswith(("gpu-", "mig-")) and text.startswith("mig-") is not gpu.is_mig:
        return False
    if own == wanted or ("/" not in wanted and own.startswith(wanted)):
        return True
    whole, _, ids = wanted.partition("/")
    return (
        gpu.mig_ids.value is not None
        and parent is not None
        and bool(whole)
        and bare_uuid(parent.uuid.value).startswith(whole)
        and ids == "/".join(map(str, gpu.mig_ids.value))
    )


def _contradicts(gpu: GpuFacts, devices: list[CudaDevice]) -> bool:
    """Whether a GPU cannot be any of these: both UUIDs are known and differ, or the architecture is another."""
    return all(
        (bool(bare_uuid(gpu.uuid.value)) and bool(bare_uuid(device.uuid)) and _real(device.uuid))
        or (gpu.compute_capability.known and gpu.compute_capability.value != device.compute_capability)
        for device in devices
    )


def _real(uuid: str) -> bool:
    return bool(re.search(r"[1-9a-f]", bare_uuid(uuid)))  # Tegra's CUDA may give all zeros


def _with_cuda(gpu: GpuFacts, device: CudaDevice | None, reason: Reading[bool]) -> GpuFacts:
    if device is None:
        missing = reason.without_value()
        return dataclasses.replace(gpu, integrated=missing, cuda_total_bytes=missing)
    source = f"torch device properties, cuda:{device.index}"

    def either(reading: Reading[Any], value: Any) -> Reading[Any]:
        return reading if reading.known or not value else Reading.of(value, source)

    integrated = (
        Reading.missing(Reason.NOT_SUPPORTED, source, "this version of torch does not report it")
        if device.integrated is None
        else Reading.of(device.integrated, source)
    )
    return dataclasses.replace(
        gpu,
        cuda_index=device.index if device.runs_here else None,
        name=either(gpu.name, device.name),
        uuid=either(gpu.uuid, f"GPU-{bare_uuid(device.uuid)}" if _real(device.uuid) else ""),
        compute_capability=either(gpu.compute_capability, device.compute_capability),
        integrated=integrated,
        cuda_total_bytes=Reading.of(device.total_bytes, source)
        if device.total_bytes > 0
        else Reading.missing(Reason.IMPLAUSIBLE, source, "a total of 0"),
    )


def unlisted_gpu(source: str, detail: str) -> GpuFacts:
    """A GPU of which nothing is known, each reading missing for the reason ``detail``."""
    missing = Reading.missing(Reason.ABSENT, source, detail)
    values: dict[str, Any] = {
        field.name: missing
        for field in dataclasses.fields(GpuFacts)
        if field.name not in ("nvml_index", "cuda_index", "is_mig", "mig_index")
    }
    return GpuFacts(nvml_index=None, cuda_index=None, is_mig=False, **values)


def tegra_gpu(gpus: tuple[GpuFacts, ...], tegra: TegraFacts) -> tuple[GpuFacts, ...]:
    """Return the GPUs with the Jetson's own one, completed from its files, or created from them if it is not listed."""
    if not gpus:
        gpus = (unlisted_gpu("NVML", "no NVML here"),)
    capability = SOC_CAPABILITY.get(tegra.soc.value or "")
    own = [n for n, gpu in enumerate(gpus) if not gpu.memory_total_bytes.known and not gpu.is_mig]
    if len(own) != 1:
        return gpus
    gpu = gpus[own[0]]

    def either(reading: Reading[Any], other: Reading[Any]) -> Reading[Any]:
        return reading if reading.known or not other.known or reading.reason is Reason.LOST else other

    filled = dataclasses.replace(
        gpu,
        name=either(gpu.name, tegra.model),
        compute_capability=either(gpu.compute_capability, tegra.soc.map(lambda _: capability))
        if capability
        else gpu.compute_capability,
        utilization_percent=either(gpu.utilization_percent, tegra.gpu_load_percent.map(round)),
        sm_clock_mhz=either(gpu.sm_clock_mhz, tegra.gpu_clock_mhz),
        sm_clock_max_mhz=either(gpu.sm_clock_max_mhz, tegra.gpu_clock_max_mhz),
        memory_clock_mhz=either(gpu.memory_clock_mhz, tegra.memory_clock_mhz),
        temperature_celsius=either(gpu.temperature_celsius, tegra.temperature_celsius),
        power_watts=either(gpu.power_watts, tegra.power_watts),
    )
    return tuple(filled if n == own[0] else other for n, other in enumerate(gpus))


def choose_gpu(gpus: tuple[GpuFacts, ...]) -> GpuFacts | None:
    """The best: one that torch can use before one that it cannot, one that answers before a lost one, then the largest.

    A whole GPU in MIG mode is none: nothing runs on it.
    """
    usable = [gpu for gpu in gpus if not is_divided(gpu)]

    def rank(gpu: GpuFacts) -> tuple[bool, bool, int, int]:
        size = gpu.cuda_total_bytes.value or gpu.memory_total_bytes.value or 0
        return (gpu.cuda_index is not None, not is_lost(gpu), size, -gpus.index(gpu))

    return max(usable, key=rank, default=None)


def is_lost(gpu: GpuFacts) -> bool:
    """Whether the GPU stopped responding."""
    return Reason.LOST in (gpu.memory_total_bytes.reason, gpu.name.reason, gpu.uuid.reason)


def find_gpu(gpus: tuple[GpuFacts, ...], wanted: str, *, by_cuda: bool) -> GpuFacts | None:
    """The GPU that ``cuda``, ``cuda:1``, ``1`` or a UUID (or a beginning of it that is one GPU's alone) names.

    Numbers are torch's when ``by_cuda``; else, when torch cannot use any, NVML's order without MIG's whole cards.
    """
    text = wanted.strip().lower()
    if text in ("cuda", "gpu"):
        return choose_gpu(tuple(gpu for gpu in gpus if gpu.cuda_index is not None) if by_cuda else gpus)
    if match := re.fullmatch(r"(?:cuda:|gpu:)?(\d{1,4})", text):
        number = int(match[1])
        if by_cuda:
            return next((gpu for gpu in gpus if gpu.cuda_index == number), None)
        computing = [gpu for gpu in gpus if not is_divided(gpu)]
        return computing[number] if number < len(computing) else None
    parents = {gpu.nvml_index: gpu for gpu in gpus if is_divided(gpu)}
    exact = [gpu for gpu in gpus if gpu.uuid.value and bare_uuid(text) == bare_uuid(gpu.uuid.value)]
    begins = [gpu for gpu in gpus if len(text) >= 8 and names_gpu(text, gpu, parents.get(gpu.nvml_index))]
    found = exact or begins
    return found[0] if len(found) == 1 else None


SHARED_CHIPS = {
    r"\bgb10\b": "GB10 (DGX Spark)",
    r"\bn1x?\b|\brtx spark\b": "N1X (RTX Spark)",
    r"\bthor\b": "Jetson Thor",
    r"\borin\b": "Jetson Orin",
    r"\bxavier\b": "Jetson Xavier",
    r"\bjetson\b|\btegra|\bnvgpu\b|\bt[0-9]{3}d? ?\(nvgpu\)": "Jetson",
    r"\bgh200\b": "GH200 (Grace Hopper)",
    r"\bgb[23]00\b": "GB200 (Grace Blackwell)",
}
"""Patterns of lower-case device or board names whose GPU shares memory with the host (or is memory of the host's)."""
CARD_FAMILIES = re.compile(r"\b(geforce|gtx|rtx|quadro|tesla|titan|[abhlptv]\d{1,4}[a-z]?)\b")
"""Names of plug-in cards: signs of the board around them say nothing about their memory."""
SHARED_CAPABILITIES = {(5, 3), (6, 2), (7, 2), (8, 7), (10, 1), (11, 0), (12, 1)}
"""Architectures that exist only in chips with shared memory. A second sign, never the only one."""


class Verdict(NamedTuple):
    """The kind of memory, the evidence for it, and notes for the owner."""

    kind: MemoryKind
    evidence: tuple[str, ...]
    notes: tuple[str, ...]


def classify(gpu: GpuFacts | None, tegra: TegraFacts | None, board: Reading[str], why_none: str = "") -> Verdict:
    """The kind of ``gpu``'s memory; CPU without one. ``board`` is the computer's model (device tree or DMI)."""
    if gpu is None:
        return Verdict(MemoryKind.CPU, (f"no GPU is used: {why_none or 'none was chosen'}",), ())
    evidence = _plain_signs(gpu)
    second = _second_signs(gpu, tegra, board)
    chip = chip_of(gpu.name)
    memory = gpu.memory_total_bytes
    if gpu.integrated.value:
        notes: tuple[str, ...] = ()
        if memory.value is not None:
            notes = (
                f"NVML reports {format_bytes(memory.value)} for this integrated GPU: only a part carved out, which is "
                "ignored; the memory is the host's.",
            )
        return Verdict(MemoryKind.UNIFIED, (*evidence, *second), notes)
    silent = memory.reason in (Reason.NOT_SUPPORTED, Reason.IMPLAUSIBLE, Reason.ABSENT)
    if silent and second:
        return Verdict(MemoryKind.UNIFIED, (*evidence, *second), ())
    if chip:
        notes = (
            (f"NVML reports {format_bytes(memory.value)} of memory, which the host shares.",)
            if memory.value is not None
            else ()
        )
        return Verdict(MemoryKind.UNIFIED, (*evidence, *second), notes)
    if memory.known:
        return Verdict(MemoryKind.DISCRETE, evidence, ())
    if gpu.cuda_total_bytes.known:
        notes = (f"NVML reports no memory for this GPU ({memory.describe()}); the size is the one that CUDA reports.",)
        return Verdict(MemoryKind.DISCRETE, (*evidence, "nothing else says that it shares the host's memory"), notes)
    if memory.reason is Reason.LOST:
        return Verdict(MemoryKind.DISCRETE, (*evidence, "taken for a GPU with memory of its own"), ())
    note = (
        f"the memory of this GPU is unknown: {memory.describe()}. Nothing else says that it shares the host's memory, "
        "so it is taken for a GPU with memory of its own; give its budget with `memory`."
    )
    return Verdict(MemoryKind.DISCRETE, (*evidence, "no second sign of shared memory"), (note,))


def chip_of(name: Reading[str]) -> str:
    """The chip with shared memory that a name stands for; empty when it is none of the list."""
    text = (name.value or "").lower()
    return next((chip for pattern, chip in SHARED_CHIPS.items() if re.search(pattern, text)), "")


def _plain_signs(gpu: GpuFacts) -> tuple[str, ...]:
    integrated, memory = gpu.integrated, gpu.memory_total_bytes
    if integrated.known:
        word = "is integrated" if integrated.value else "is not integrated"
        signs = [f"CUDA says that the GPU {word} ({integrated.source})"]
    else:
        signs = [f"CUDA's integrated attribute: {integrated.describe()}"]
    if memory.value is not None:
        signs.append(f"NVML reports a memory of {format_bytes(memory.value)} ({memory.source})")
    else:
        signs.append(f"NVML reports no memory: {memory.describe()}")
    return tuple(signs)


def _second_signs(gpu: GpuFacts, tegra: TegraFacts | None, board: Reading[str]) -> tuple[str, ...]:
    signs = []
    if chip := chip_of(gpu.name):
        signs.append(f"its name {gpu.name.value!r} means {chip}, which shares the host's memory ({gpu.name.source})")
    elif CARD_FAMILIES.search((gpu.name.value or "").lower()):
        return ()  # a card in a slot: the board around it proves nothing
    if tegra is not None:
        known = [reading for reading in (tegra.soc, tegra.model, tegra.l4t) if reading.known]
        signs.append("this is a Jetson: " + ", ".join(f"{reading.value} ({reading.source})" for reading in known))
    elif board_chip := chip_of(board.map(lambda name: re.sub(r"[_-]+", " ", name).replace("DGX Spark", "GB10"))):
        signs.append(f"the computer {board.value!r} has {board_chip}, which shares the host's memory ({board.source})")
    capability = gpu.compute_capability
    if capability.value in SHARED_CAPABILITIES:
        version = ".".join(map(str, capability.value))
        signs.append(f"compute capability {version} exists only in chips with shared memory ({capability.source})")
    return tuple(signs)
