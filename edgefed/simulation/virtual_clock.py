"""From what a client did in a round to seconds, and to its place on the clock of the federation. Pure arithmetic.

`RoundWork` are the facts of a round, counted and not timed. `CostModel` turns them into the seconds of a device:

    download, upload   bytes over the link, which the aggregator's link bounds; one latency each
    load               planned experts from disk into the device's memory
    profile            all experts from disk once, quantized if the profile is; the pass itself
    merge              members read and summed; before the first time all experts compared with each other
    train              steps by the roofline; experts quantized anew in each round before
    offload            experts that do not fit cross the host's link, or the disk's, when tokens need them
    explore, evaluate  forward passes

Assumptions: transfers and computation do not overlap (an expert is known only when its router has run); tokens are
routed evenly, so a batch uses nearly all resident experts; the disk's cache is cold.

`VirtualClock` adds up rounds: a round ends when its slowest client's update is in and aggregated. Work for the next
round is hidden in the wait for others; what is left of it delays the next round.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from edgefed.costs.memory import training_memory
from edgefed.costs.roofline import Op, Pass, distinct_experts, forward_pass, stored_bytes, training_step
from edgefed.costs.step_setup import DTYPE_BYTES, StepSetup
from edgefed.expert_records import ExpertPlan
from edgefed.protocol.trainer import TrainedUpdate
from edgefed.simulation.device_rates import Calibration, CostShape, DeviceRates


class RoundWork(msgspec.Struct, frozen=True):
    """One client's round, as far as it costs time. Counts are of the model that was trained.

    Attributes:
        resident: Experts in memory per MoE layer, one for a merged group.
        trainable: Those of them that train.
        trainable_pairs: Share of each layer's (token, expert) pairs that trainable experts computed.
        setup: How a step was done.
        steps: Local steps.
        tokens: Tokens in all of them.
        groups: Merged experts per MoE layer.
        members: Experts in these groups.
        profile_tokens: Tokens that went forward through all experts for a profile.
        slice_shares: Mean share of their neurons that the resident experts of each MoE layer have; () for whole ones.
        profile_storage: How the profile stored experts; None is the model's dtype.
        profile_reads: How often each expert was read from disk for it.
        waiting_profile_tokens: Tokens of a profile for the next round, made after the upload.
        explored_tokens: Tokens that went forward to measure utilities.
        evaluated_tokens: Tokens that went forward for the held-out loss.
        compares: All experts were compared with each other, to be merged.
        offloads: Experts stay in host memory, and are loaded when a token needs them.
        down: Bytes downloaded, by `device_rates.byte_kind`.
        up: Bytes uploaded.
        waiting_down: Bytes downloaded only for a profile after the upload.
    """

    resident: tuple[int, ...]
    trainable: tuple[int, ...]
    trainable_pairs: tuple[float, ...]
    setup: StepSetup
    steps: int
    tokens: int
    groups: tuple[int, ...] = ()
    members: tuple[int, ...] = ()
    profile_tokens: int = 0
    slice_shares: tuple[float, ...] = ()
    profile_storage: str | None = None
    profile_reads: int = 1
    waiting_profile_tokens: int = 0
    explored_tokens: int = 0
    evaluated_tokens: int = 0
    compares: bool = False
    offloads: bool = False
    down: dict[str, int] = msgspec.field(default_factory=dict)
    up: dict[str, int] = msgspec.field(default_factory=dict)
    waiting_down: dict[str, int] = msgspec.field(default_factory=dict)


PARTS = ("download", "load", "profile", "merge", "train", "offload", "explore", "evaluate", "upload")
"""What a client's time is made of, in the order in which it happens."""

STATE_BYTES = 2
"""Moments of the optimizer per trained parameter, each in the dtype of the weights."""


@dataclasses.dataclass(frozen=True)
class ClientTimes:
    """Seconds of one client in one round.

    ``parts`` by `PARTS`; ``in_wait``: work for the next round after the upload, while others still train or the
    aggregator aggregates.
    """

    parts: Mapping[str, float]
    in_wait: float = 0.0

    @property
    def busy(self) -> float:
        """Seconds until the upload is done."""
        return sum(self.parts.values())


def transfer_bytes_per_s(link_mbit: float, server_bytes_per_s: float, num_clients: int) -> float:
    """What a client's link carries while ``num_clients`` share the aggregator's evenly."""
    return min(link_mbit * 1e6 / 8, server_bytes_per_s / num_clients)


@dataclasses.dataclass(frozen=True)
class CostModel:
    """Seconds of a round's work.

    ``server_bytes_per_s``: the aggregator's link, which ``num_clients`` share evenly; ``ratios`` are those of
    `CostShape.byte_ratios`.
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
        resident, trainable = self.charged.counts(work.resident), self.charged.counts(work.trainable)
        sliced = dataclasses.replace(self, charged=self.charged.sliced(work.slice_shares))
        shape = sliced.charged.shape
        parts = dict.fromkeys(PARTS, 0.0)
        parts["download"] = self._transfer(work.down, rates.link.down_mbit, rates)
        parts["upload"] = self._transfer(work.up, rates.link.up_mbit, rates)
        parts["train"], parts["offload"] = (
            work.steps * seconds for seconds in self.step_times(work, rates, usable_bytes)
        )
        if not work.offloads:
            parts["load"] = sliced._load(setup, resident, trainable, rates)
            parts["train"] += sliced._quantize(setup, resident, trainable, rates)
        parts["merge"] = self._merge(work, setup, rates)
        explored = work.explored_tokens * self.charged.experts_ratio  # each expert is probed on its own
        for name, tokens in (("explore", explored), ("evaluate", work.evaluated_tokens)):
            if tokens:
                batches = tokens / setup.tokens
                once = forward_pass(shape, setup, resident, setup.tokens, storage=setup.expert_storage, logits=True)
                parts[name] = batches * self._seconds(once, rates, setup.width)
        parts["profile"] = self._profile(work, work.profile_tokens, setup, rates)
        waiting = self._profile(work, work.waiting_profile_tokens, setup, rates)
        if work.waiting_down:
            waiting += self._transfer(work.waiting_down, rates.link.down_mbit, rates)
        return ClientTimes(parts, waiting)

    def step_times(self, work: RoundWork, rates: DeviceRates, usable_bytes: int) -> tuple[float, float]:
        """Seconds of one step of ``work``: of its computation, and of what is offloaded meanwhile."""
        setup = self.charged.setup(work.setup, rates.kind)
        resident, trainable = self.charged.counts(work.resident), self.charged.counts(work.trainable)
        shape, pairs = self.charged.sliced(work.slice_shares).shape, self.charged.shares(work.trainable_pairs)
        step = training_step(shape, setup, resident, trainable, pairs)
        offload = self._offload(setup, resident, trainable, rates, usable_bytes) if work.offloads else 0.0
        return self._seconds(step, rates, setup.width), offload

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

    def _load(self, setup: StepSetup, resident: Sequence[int], trainable: Sequence[int], rates: DeviceRates) -> float:
        """Experts lie on disk as they were downloaded, and are quantized, if they are, on the way in."""
        sizes = self._expert_sizes(setup)
        read = sum(count * plain for count, (_, plain, _) in zip(resident, sizes, strict=True))
        entered = sum(
            count_trainable * plain + (count - count_trainable) * stored
            for count, count_trainable, (_, plain, stored) in zip(resident, trainable, sizes, strict=True)
        )
        return read / rates.disk_read + (entered / rates.host_link if rates.host_link else 0.0)

    def _quantize(
        self, setup: StepSetup, resident: Sequence[int], trainable: Sequence[int], rates: DeviceRates
    ) -> float:
        if setup.expert_storage in (None, *DTYPE_BYTES):
            return 0.0
        full = setup.experts == "full"
        size = sum(
            (count - (count_trainable if full else 0)) * (plain + stored)
            for count, count_trainable, (_, plain, stored) in zip(
                resident, trainable, self._expert_sizes(setup), strict=True
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
        """Layer by layer: its experts from disk, quantized where the profile is, then all ``tokens`` through it."""
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
        self, setup: StepSetup, resident: Sequence[int], trainable: Sequence[int], rates: DeviceRates, usable_bytes: int
    ) -> float:
        """Transfers of one step.

        Used experts are loaded for the forward pass, and those without room again for the backward pass; gradients of
        trainable ones are moved out; the optimizer steps where its moments are, beside the weights. Weights and moments
        that host memory cannot hold are on disk.
        """
        shape, sizes = self.charged.shape, self._expert_sizes(setup)
        one = training_memory(shape, setup, 1, int(setup.experts != "none"))
        layers = shape.moe_layers
        hit = [
            distinct_experts(count, layer.top_k, setup.tokens) for count, layer in zip(resident, layers, strict=True)
        ]
        needed = sum(count * stored for count, (_, _, stored) in zip(hit, sizes, strict=True))
        room = max(0.0, usable_bytes - one.total_bytes)
        trained = sum(count * plain for count, (_, plain, _) in zip(trainable, sizes, strict=True))
        if room >= sum(count * stored for count, (_, _, stored) in zip(resident, sizes, strict=True)) + 3 * trained:
            return 0.0  # everything fits, with gradients and moments: nothing is offloaded
        incoming = needed + max(
            0.0, needed - room
        )  # trained weights are new in each step, so the first part stays whole
        stored_away = (
            sum(count * stored for count, (_, _, stored) in zip(resident, sizes, strict=True)) + STATE_BYTES * trained
        )
        on_disk = max(0.0, 1.0 - (rates.offload_bytes + (0 if rates.host_link else room)) / stored_away)
        seconds = on_disk * (incoming / rates.disk_read)
        seconds += on_disk * (STATE_BYTES * trained / rates.disk_read + (1 + STATE_BYTES) * trained / rates.disk_write)
        if rates.host_link:
            seconds += (incoming + trained) / rates.host_link
        return seconds + 7.0 * trained / rates.host_bandwidth / self.calibration.optimizer


# --- the clock --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ClientSpan:
    """Where one client's time of a round went, in seconds.

    ``late``: the rest of the work that the round before should have hidden; ``waits``: idle until the round was over;
    ``hidden``: work within that wait.
    """

    parts: Mapping[str, float]
    late: float
    waits: float
    hidden: float

    @property
    def busy(self) -> float:
        """Seconds until the upload is done."""
        return self.late + sum(self.parts.values())


@dataclasses.dataclass(frozen=True)
class RoundSpan:
    """One round; ``begins`` and ``ends`` in seconds since the first one began. ``slowest``: who it waited for."""

    begins: float
    ends: float
    aggregation: float
    slowest: str
    clients: Mapping[str, ClientSpan]

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.ends - self.begins


class VirtualClock:
    """Adds up rounds. ``now``: seconds since the run began."""

    def __init__(self) -> None:
        self.now = 0.0
        self._left: dict[str, float] = {}

    def round(self, times: Mapping[str, ClientTimes], aggregation: float) -> RoundSpan:
        """Let one round pass. ``times`` of every client that took part, at least one."""
        busy = {name: self._left.get(name, 0.0) + each.busy for name, each in times.items()}
        slowest = max(sorted(busy), key=busy.__getitem__)
        length = busy[slowest] + aggregation
        clients = {}
        for name, each in times.items():
            waits = length - busy[name]
            hidden = min(waits, each.in_wait)
            clients[name] = ClientSpan(dict(each.parts), self._left.get(name, 0.0), waits - hidden, hidden)
            self._left[name] = each.in_wait - hidden
        begins, self.now = self.now, self.now + length
        return RoundSpan(begins, self.now, aggregation, slowest, clients)


def expert_counts(plan: ExpertPlan) -> dict[str, Any]:
    """The fields of `RoundWork` that count experts per layer."""
    layers = range(plan.num_layers)
    return {
        "resident": tuple(plan.num_slots(layer) for layer in layers),
        "slice_shares": plan.slice_shares() if plan.neurons else (),
        "trainable": tuple(len(plan.trainable(layer)) for layer in layers),
        "groups": tuple(len(plan.groups(layer)) for layer in layers),
        "members": tuple(sum(len(group.experts) for group in plan.groups(layer)) for layer in layers),
    }


def trainable_pairs(plan: ExpertPlan, update: TrainedUpdate, top_k: Sequence[int]) -> tuple[float, ...]:
    """`RoundWork.trainable_pairs` of a trained round; ``top_k``: experts of a token, by layer."""
    routed = [0] * plan.num_layers
    for report in update.experts:
        if report.expert in plan.trainable(report.layer):
            routed[report.layer] += report.tokens
    slots = [plan.num_slots(layer) for layer in range(plan.num_layers)]
    pairs = [max(1, update.num_tokens * min(k, count)) for k, count in zip(top_k, slots, strict=True)]
    return tuple(min(1.0, count / most) for count, most in zip(routed, pairs, strict=True))
