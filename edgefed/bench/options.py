"""Options of a benchmark run, and how much each mode measures and for how long."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from edgefed.bench.statistics import MIN_SAMPLES, Sampling

MIB = 2**20
DEFAULT_MODEL = "OLMoE-1B-7B"
"""Its configuration is built in, so nothing is downloaded."""
DEFAULT_LINE = "10mbit"
"""Uplink for upload times when none was measured or given: a slow home connection."""


@dataclasses.dataclass(frozen=True)
class Effort:
    """Limits of one mode. Seconds bound one measurement; sizes are bytes, None for the whole budget."""

    name: str
    limit_s: float
    copy_sizes: tuple[int, ...]
    host_check_bytes: int | None
    gpu_check_bytes: int | None
    disk_bytes: int
    tokens: int
    step_limit_s: float
    step_memory_bytes: int
    most_experts: int
    sustain_s: float


_COPY = tuple(MIB * size for size in (64, 128, 256, 512, 1024))
QUICK = Effort("quick", 1.5, _COPY[:3:2], 1024 * MIB, 4096 * MIB, 32 * MIB, 128, 2.0, 2048 * MIB, 8, 0.0)
DEFAULT = Effort("default", 4.0, _COPY, 4096 * MIB, None, 256 * MIB, 256, 6.0, 4096 * MIB, 16, 60.0)
FULL = Effort("full", 20.0, _COPY, None, None, 1024 * MIB, 1024, 30.0, 16384 * MIB, 64, 120.0)
EFFORTS = {effort.name: effort for effort in (QUICK, DEFAULT, FULL)}


@dataclasses.dataclass(frozen=True)
class BenchOptions:
    """Options of a run. ``folder`` is on the disk to measure; ``profile`` names the device profile for `stand_in`."""

    mode: str = "default"
    device: str | None = None
    memory_bytes: int | None = None
    model: str | None = None
    explain: bool = False
    server: str | None = None
    token: str | None = None
    active: bool = False
    network: bool = True
    sustain_s: float | None = None
    repeats: int | None = None
    verify: bool = False
    folder: Path = Path(".")
    uplink: str | None = None
    profile: str | None = None

    @property
    def effort(self) -> Effort:
        """The mode's limits with the user's changes."""
        effort = EFFORTS[self.mode]
        if self.sustain_s is not None:
            effort = dataclasses.replace(effort, sustain_s=self.sustain_s)
        if self.verify:
            effort = dataclasses.replace(effort, host_check_bytes=None, gpu_check_bytes=None)
        return effort

    @property
    def sampling(self) -> Sampling:
        """How samples are taken in this mode."""
        repeats = self.repeats or (2 * MIN_SAMPLES + 1 if self.mode == "full" else MIN_SAMPLES)
        return Sampling(repeats=repeats, limit_s=self.effort.limit_s)
