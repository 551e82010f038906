"""Which memory a GPU works in, from evidence. Pure: readings in, a kind and sentences out.

In this order, the first that holds decides:
    1. CUDA calls the device integrated                                             -> unified (whatever NVML says)
    2. NVML has no memory figure (not supported, or a total of 0) and a second sign -> unified
       (a name, board, SoC or architecture that only exists with shared memory)
    3. the name is on the list of such chips                                        -> unified
    4. everything else                                                              -> discrete
Never by compute capability alone (a GH200 is 9.0 like an H100), and never "not supported" alone: a discrete GPU may
fail to answer, and its memory is then unknown, not the host's.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from edgefed.hardware.facts import GpuFacts, MemoryKind, TegraFacts
from edgefed.hardware.memory import format_bytes
from edgefed.hardware.reading import Reading, Reason

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
        notes = ()
        if memory.known:
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
            (f"NVML reports {format_bytes(memory.value)} of memory, which the host shares.",) if memory.known else ()
        )
        return Verdict(MemoryKind.UNIFIED, (*evidence, *second), notes)
    if memory.known:
        return Verdict(MemoryKind.DISCRETE, evidence, ())
    if gpu.cuda_total_bytes.known:
        notes = (f"NVML tells no memory of this GPU: {memory.describe()}. Its size is CUDA's.",)
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
    if memory.known:
        signs.append(f"NVML reports a memory of {format_bytes(memory.value)} ({memory.source})")
    else:
        signs.append(f"NVML reports no memory: {memory.describe()}")
    return tuple(signs)


def _second_signs(gpu: GpuFacts, tegra: TegraFacts | None, board: Reading[str]) -> tuple[str, ...]:
    signs = []
    if chip := chip_of(gpu.name):
        signs.append(f"its name {gpu.name.value!r} means {chip}, which shares the host's memory ({gpu.name.source})")
    elif CARD_FAMILIES.search((gpu.name.value or "").lower()):
        return ()  # a card in a slot: what surrounds it is no sign
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
