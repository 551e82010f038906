"""What a simulated device can do, from its profile: peaks, and the share of them that real work achieves."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from edgefed.costs.memory import training_memory
from edgefed.costs.roofline import Op, Pass, distinct_experts, forward_pass, stored_bytes, training_step
from edgefed.costs.step_setup import DTYPE_BYTES, StepSetup
from edgefed.errors import ConfigError
from edgefed.hardware.budget import plan_budget
from edgefed.hardware.facts import MemoryKind
from edgefed.hardware.profile_files import DeviceProfile
from edgefed.hardware.profiles import facts_of
from edgefed.simulation.config import Link, SimulatedDevice
from edgefed.simulation.cost_shape import CostShape
from edgefed.simulation.round_work import RoundWork

DISKS = (
    ("nvme gen5", 10_000.0, 8_000.0),
    ("nvme gen4", 5_000.0, 4_000.0),
    ("nvme gen3", 2_500.0, 1_800.0),
    ("nvme gen2", 400.0, 400.0),
    ("nvme", 2_500.0, 1_800.0),
    ("sata", 500.0, 450.0),
    ("microsd", 90.0, 30.0),
)
"""(words in a profile's usual disk, MB/s read, written); sequential, assumed. The first that matches counts."""
UNKNOWN_DISK = (500.0, 450.0)
LINK_SHARE = 0.8
"""Of a link's rate that copies from pinned memory reach, assumed."""
HOST_LINK_GB_S = 12.0
"""From host memory to a GPU whose profile does not say: PCIe 3.0 x16 as it is reached from pinned memory, assumed."""
HOST_MEMORY_GB_S = 40.0
"""Host memory beside a discrete GPU: two channels of DDR4-3200 as they are reached, assumed."""


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Share of the roofline's speed that work achieves, by phase, from one measured step.

    The defaults are those of `benchmarks/results/virtual_clock.json`: a step of a model with experts half as large as
    OLMoE-1B-7B's, with the CPU kernels. They are taken for other devices as well, whose peaks are their profiles':
    kernels are assumed to be as far from their limit everywhere.
    """

    forward: float = 0.83
    backward: float = 0.70
    optimizer: float = 0.47
    origin: str = "benchmarks/results/virtual_clock.json"

    def __post_init__(self) -> None:
        for name in ("forward", "backward", "optimizer"):
            if not 0 < getattr(self, name) <= 2:
                raise ConfigError(f"calibration: {name} is {getattr(self, name)}, expected a share of the roofline")


@dataclasses.dataclass(frozen=True)
class DeviceRates:
    """Peaks in operations and bytes per second. ``host_link``: from host memory, None where there is only one memory.

    ``offload_bytes``: memory for what is offloaded before the disk has to take it; on a device with one memory, none.
    """

    kind: MemoryKind
    flops_half: float
    flops_single: float
    bandwidth: float
    link: Link
    disk_read: float
    disk_write: float
    host_link: float | None
    host_bandwidth: float
    offload_bytes: int

    def flops(self, width: int) -> float:
        """Operations per second with numbers of ``width`` bytes."""
        return self.flops_half if width <= 2 else self.flops_single


def device_rates(device: SimulatedDevice) -> DeviceRates:
    """Raises ConfigError when the profile states too little."""
    profile = device.profile
    single = profile.value("fp32_tflops")
    half = max((profile.value(name) or 0.0 for name in ("bf16_tflops", "fp16_tflops")), default=0.0) or single
    bandwidth = profile.value("bandwidth")
    if not half or not bandwidth:
        raise ConfigError(
            f"profile {profile.id} states no {'bandwidth' if half else 'TFLOPS that edgefed can use'}: "
            f"its speed cannot be simulated"
        )
    read, write = _disk(profile)
    discrete = profile.kind is MemoryKind.DISCRETE
    pcie = profile.value("host_link")
    link = (LINK_SHARE * pcie if pcie else HOST_LINK_GB_S) * 1e9 if discrete else None
    return DeviceRates(
        kind=profile.kind,
        flops_half=half * 1e12,
        flops_single=(single or half / 2) * 1e12,
        bandwidth=bandwidth * 1e9,
        link=device.link,
        disk_read=(device.disk_read_mb_s or profile.value("disk_read") or read) * 1e6,
        disk_write=(device.disk_write_mb_s or profile.value("disk_write") or write) * 1e6,
        host_link=link,
        host_bandwidth=HOST_MEMORY_GB_S * 1e9 if discrete else bandwidth * 1e9,
        offload_bytes=device.host_memory_bytes if discrete else 0,
    )


def _disk(profile: DeviceProfile) -> tuple[float, float]:
    words = profile.typical_disk.lower()
    return next(((read, write) for name, read, write in DISKS if name in words), UNKNOWN_DISK)


def memory_budget(device: SimulatedDevice) -> int:
    """Bytes that training may use: the owner's limit, or what the idle device leaves. Raises ConfigError."""
    budget = plan_budget(facts_of(device.profile), override_bytes=device.memory_bytes)
    if budget.now_bytes is None:
        raise ConfigError(f"how much memory {device.name} has for training is unknown: {budget.origin}")
    return budget.now_bytes


# From what a client did in a round to the seconds that its device would take. Pure arithmetic.
#
#     download, upload   bytes over the link, which the aggregator's link bounds; one latency each
#     load               planned experts from disk into the device's memory
#     profile            all experts from disk once, quantised where the profile is; the pass itself
#     merge              members read and added up; before the first time all experts compared with each other
#     train              steps by the roofline; experts quantised anew in each round before
#     offload            experts that do not fit cross the host's link, or the disk's, when tokens need them
#     explore, evaluate  forward passes
#
# What is assumed: transfers and computation do not overlap (an expert is known only when its router has run); experts
# are routed to evenly, so a batch hits nearly all of those held; the disk's cache is cold.

PARTS = ("download", "load", "profile", "merge", "train", "offload", "explore", "evaluate", "upload")
"""What a client's time is made of, in the order in which it happens."""

STATE_BYTES = 2
"""Moments of the optimizer per trained parameter, each in the dtype of the weights."""


@dataclasses.dataclass(frozen=True)
class ClientTimes:
    """Seconds of one client in one round. ``parts`` by `PARTS`; ``in_wait``: work for the next round that is done after
    the upload, while others still train or the aggregator aggregates.
    """

    parts: Mapping[str, float]
    in_wait: float = 0.0

    @property
    def busy(self) -> float:
        return sum(self.parts.values())


def transfer_bytes_per_s(link_mbit: float, server_bytes_per_s: float, num_clients: int) -> float:
    """What a client's link carries while ``num_clients`` share the aggregator's evenly."""
    return min(link_mbit * 1e6 / 8, server_bytes_per_s / num_clients)


@dataclasses.dataclass(frozen=True)
class CostModel:
    """``server_bytes_per_s``: the aggregator's link, shared evenly by ``num_clients``; ``ratios`` as
    `CostShape.byte_ratios` gives them.
    """

    charged: CostShape
    ratios: Mapping[str, float]
    server_bytes_per_s: float
    num_clients: int
    calibration: Calibration = Calibration()

    def charged_bytes(self, sizes: Mapping[str, int]) -> float:
        """Bytes of the model, by kind, as bytes of the cost shape."""
        return sum(size * self.ratios.get(kind, 1.0) for kind, size in sizes.items())

    def client_times(self, work: RoundWork, rates: DeviceRates, usable_bytes: int) -> ClientTimes:
        """``usable_bytes``: the device's budget, which decides what of an offloaded model stays."""
        setup = self.charged.setup(work.setup, rates.kind)
        held, trainable = self.charged.counts(work.held), self.charged.counts(work.trainable)
        pairs = self.charged.shares(work.trainable_pairs)
        shape = self.charged.shape
        parts = dict.fromkeys(PARTS, 0.0)
        parts["download"] = self._transfer(work.down, rates.link.down_mbit, rates)
        parts["upload"] = self._transfer(work.up, rates.link.up_mbit, rates)
        step = training_step(shape, setup, held, trainable, pairs)
        parts["train"] = work.steps * self._seconds(step, rates, setup.width)
        if work.offloads:
            parts["offload"] = work.steps * self._offload(setup, held, trainable, rates, usable_bytes)
        else:
            parts["load"] = self._load(setup, held, trainable, rates)
            parts["train"] += self._quantise(setup, held, trainable, rates)
        parts["merge"] = self._merge(work, setup, rates)
        explored = work.explored_tokens * self.charged.experts_ratio  # each expert is probed on its own
        for name, tokens in (("explore", explored), ("evaluate", work.evaluated_tokens)):
            if tokens:
                batches = tokens / setup.tokens
                once = forward_pass(shape, setup, held, setup.tokens, storage=setup.expert_storage, logits=True)
                parts[name] = batches * self._seconds(once, rates, setup.width)
        parts["profile"] = self._profile(work, work.profile_tokens, setup, rates)
        waiting = self._profile(work, work.waiting_profile_tokens, setup, rates)
        if work.waiting_down:
            waiting += self._transfer(work.waiting_down, rates.link.down_mbit, rates)
        return ClientTimes(parts, waiting)

    def aggregation_seconds(self, uploaded: Mapping[str, int], fold_bytes_per_s: float) -> float:
        """Seconds that the aggregator takes for a round in which so many bytes, by kind, were uploaded."""
        return self.charged_bytes(uploaded) / fold_bytes_per_s

    # --- parts ------------------------------------------------------------------------------------------------------

    def _seconds(self, work: Pass, rates: DeviceRates, width: int) -> float:
        total = 0.0
        for phase in ("forward", "backward", "optimizer"):
            ops: tuple[Op, ...] = getattr(work, phase)
            ideal = sum(op.seconds(rates.flops(width), rates.bandwidth) for op in ops)
            total += ideal / getattr(self.calibration, phase)
        return total

    def _transfer(self, sizes: Mapping[str, int], link_mbit: float, rates: DeviceRates) -> float:
        size = self.charged_bytes(sizes)
        speed = transfer_bytes_per_s(link_mbit, self.server_bytes_per_s, self.num_clients)
        return size / speed + rates.link.latency_ms / 1e3

    def _moved(self, size: float, rates: DeviceRates) -> float:
        """Bytes through the device's memory, as a phase without arithmetic achieves it."""
        return size / rates.bandwidth / self.calibration.optimizer

    def _expert_sizes(self, setup: StepSetup) -> list[tuple[int, float, float]]:
        """(experts, bytes in the dtype, bytes as stored) of each MoE layer."""
        layers = self.charged.shape.moe_layers
        return [(at.num_experts, at.parameters_per_expert * setup.width, stored_bytes(at, setup)) for at in layers]

    def _load(self, setup: StepSetup, held: Sequence[int], trainable: Sequence[int], rates: DeviceRates) -> float:
        """Experts lie on disk as they were downloaded, and are quantised, if they are, on the way in."""
        sizes = self._expert_sizes(setup)
        read = sum(count * plain for count, (_, plain, _) in zip(held, sizes, strict=True))
        entered = sum(
            count_trainable * plain + (count - count_trainable) * stored
            for count, count_trainable, (_, plain, stored) in zip(held, trainable, sizes, strict=True)
        )
        return read / rates.disk_read + (entered / rates.host_link if rates.host_link else 0.0)

    def _quantise(self, setup: StepSetup, held: Sequence[int], trainable: Sequence[int], rates: DeviceRates) -> float:
        if setup.expert_storage in (None, *DTYPE_BYTES):
            return 0.0
        full = setup.experts == "full"
        size = sum(
            (count - (count_trainable if full else 0)) * (plain + stored)
            for count, count_trainable, (_, plain, stored) in zip(
                held, trainable, self._expert_sizes(setup), strict=True
            )
        )
        return self._moved(size, rates)

    def _merge(self, work: RoundWork, setup: StepSetup, rates: DeviceRates) -> float:
        """Members are read from disk and added up. Comparing reads every expert once and passes over it."""
        members, groups = self._counts(work.members), self._counts(work.groups)
        sizes = self._expert_sizes(setup)
        read = sum(count * plain for count, (_, plain, _) in zip(members, sizes, strict=True))
        moved = read + sum(count * (plain + stored) for count, (_, plain, stored) in zip(groups, sizes, strict=True))
        if work.compares:
            everything = sum(count * plain for count, plain, _ in sizes)
            read, moved = read + everything, moved + everything
        return read / rates.disk_read + self._moved(moved, rates)

    def _counts(self, counts: Sequence[int]) -> tuple[int, ...]:
        return self.charged.counts(counts or (0,) * len(self.charged.experts_per_layer))

    def _profile(self, work: RoundWork, tokens: int, setup: StepSetup, rates: DeviceRates) -> float:
        """Layer by layer: its experts from disk, quantised where the profile is, then all ``tokens`` through it."""
        if not tokens:
            return 0.0
        setup = dataclasses.replace(setup, experts="none", expert_storage=work.profile_storage)
        sizes = self._expert_sizes(setup)
        read = sum(count * plain for count, plain, _ in sizes)
        entered = sum(count * stored for count, _, stored in sizes)
        reads = work.profile_reads
        seconds = reads * (read / rates.disk_read + (entered / rates.host_link if rates.host_link else 0.0))
        if work.profile_storage not in (None, *DTYPE_BYTES):
            seconds += reads * self._moved(read + entered, rates)
        every = self.charged.shape.experts_per_layer
        at_once = min(tokens, setup.tokens)
        once = forward_pass(self.charged.shape, setup, every, at_once, storage=work.profile_storage)
        return seconds + tokens / at_once * self._seconds(once, rates, setup.width)

    def _offload(
        self, setup: StepSetup, held: Sequence[int], trainable: Sequence[int], rates: DeviceRates, usable_bytes: int
    ) -> float:
        """Transfers of one step. Experts hit come for the forward pass, those that found no room again for the backward
        pass; gradients of trainable ones go; the optimizer steps where its moments lie, beside the weights.

        What host memory cannot hold of weights and moments lies on disk.
        """
        shape, sizes = self.charged.shape, self._expert_sizes(setup)
        one = training_memory(shape, setup, 1, int(setup.experts != "none"))
        layers = shape.moe_layers
        hit = [distinct_experts(count, layer.top_k, setup.tokens) for count, layer in zip(held, layers, strict=True)]
        needed = sum(count * stored for count, (_, _, stored) in zip(hit, sizes, strict=True))
        room = max(0.0, usable_bytes - one.total_bytes)
        trained = sum(count * plain for count, (_, plain, _) in zip(trainable, sizes, strict=True))
        if room >= sum(count * stored for count, (_, _, stored) in zip(held, sizes, strict=True)) + 3 * trained:
            return 0.0  # everything fits, with gradients and moments: nothing is offloaded
        incoming = needed + max(
            0.0, needed - room
        )  # trained weights are new in each step, so the first part stays whole
        stored_away = (
            sum(count * stored for count, (_, _, stored) in zip(held, sizes, strict=True)) + STATE_BYTES * trained
        )
        on_disk = max(0.0, 1.0 - (rates.offload_bytes + (0 if rates.host_link else room)) / stored_away)
        seconds = on_disk * (incoming / rates.disk_read)
        seconds += on_disk * (STATE_BYTES * trained / rates.disk_read + (1 + STATE_BYTES) * trained / rates.disk_write)
        if rates.host_link:
            seconds += (incoming + trained) / rates.host_link
        return seconds + 7.0 * trained / rates.host_bandwidth / self.calibration.optimizer
