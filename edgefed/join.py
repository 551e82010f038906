"""Assembles an agent: the device and its memory, identity and journal, transport, and the trainer."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from edgefed.agent.agent import AgentSettings, open_agent
from edgefed.agent.summary import RunSummary
from edgefed.errors import BudgetTooSmall, ConfigError
from edgefed.hardware.budget import MemoryBudget, plan_budget
from edgefed.hardware.facts import DeviceFacts, MemoryKind
from edgefed.hardware.memory import process_rss_bytes, set_up_allocator
from edgefed.hardware.occupancy import HOST, AgentRegistry, OwnMemory
from edgefed.hardware.policy import policy_from_environment
from edgefed.hardware.probe import probe_device
from edgefed.hardware.profiles import match_profile
from edgefed.hardware.sampling import MemorySensors
from edgefed.hardware.watch import PressureWatch, WatchLimits
from edgefed.progress import ProgressSink
from edgefed.protocol.messages import Assignment, DeviceInfo, Manifest, RunConfig
from edgefed.protocol.trainer import Fetch, TrainedUpdate, Trainer
from edgefed.tracking import RoundTrackers, tracked_run
from edgefed.trainer.comparison import ComparingTrainer
from edgefed.trainer.local_trainer import LocalTrainer
from edgefed.trainer.planner import DeviceLimits
from edgefed.trainer.ports import ProcessMemory
from edgefed.training.data import problem_notes
from edgefed.training.records import AUTOMATIC, RecordFields
from edgefed.training.user_functions import NONE, UserFunctions

OnRound = Callable[[RunConfig, int, Mapping[str, float]], None]
MAX_TEXT_CHARACTERS = 200
_PROGRAMS = re.compile(r" \([^()]*\)")
"""Names of other programs in a budget's origin; the server does not need them."""


@dataclasses.dataclass(frozen=True)
class JoinConfig:
    """Settings of a client. Sizes are bytes, shares are 0..1.

    ``memory_bytes`` None: memory is measured before each round. ``device`` as in `probe_device`; ``expert_storage`` one
    of `placement.STORAGE_CHOICES`, ``profile_storage`` one of `activation_profile.PROFILE_STORAGES`, ``stream_experts``
    one of `stream_choice.STREAM_CHOICES`.
    """

    server: str
    data: str
    state: Path
    name: str
    memory_bytes: int | None = None
    expert_share: float = 1.0
    compute_share: float = 1.0
    held_out_share: float = 0.1
    token: str | None = None
    invitation: str = ""
    new_identity: bool = False
    """Join as a new client: for a state folder that was copied from another device."""
    device: str | None = None
    expert_storage: str = "auto"
    profile_storage: str = "auto"
    stream_experts: str = "auto"
    private: str = "none"
    """"adapter": train an adapter that never leaves this device (`edgefed.trainer.private_part`)."""
    lora_rank: int | None = None
    """Rank of the adapters; None: that of the run, or what memory has room for (`edgefed.protocol.ranks`)."""
    task: str | None = None
    """"images" or "text": take part with a model of one's own (FedMoE), ``model``; None: train the server's model."""
    model: str | None = None
    fields: RecordFields = AUTOMATIC
    """Names of the fields of the data's records."""
    resize: bool = False
    """Scale images of another size than the shared extractor's."""
    final_evaluation: str = "auto"
    """One of `finish.EVALUATIONS`."""
    compare_alone: bool = False
    """Also train alone at the end, for comparison."""
    track: tuple[str, ...] = ()
    """Trackers of the metrics of each round, as `tracking.check_trackers` takes them."""
    on_round: OnRound | None = None
    """Called with the run, the round and its metrics when it is trained."""
    functions: UserFunctions = NONE
    """Loss, callback and evaluation of the user."""

    @property
    def limits(self) -> DeviceLimits:
        """What the owner allows."""
        return DeviceLimits(
            self.expert_share, self.compute_share, self.profile_storage, self.expert_storage, self.stream_experts,
            self.private, self.lora_rank,
        )  # fmt: skip


class DeviceMemory:
    """The memory that the device may use, measured at every call of `measure`, and the watch in between.

    Raises DeviceNotFound, ConfigError (memory cannot be measured), BudgetTooSmall (none to spare).
    """

    def __init__(self, device: str | None, memory_bytes: int | None, registry: AgentRegistry | None = None):
        self._device, self._memory_bytes = device, memory_bytes
        self._policy = policy_from_environment(os.environ)
        self._registry = registry or AgentRegistry()
        self._registry.enter(limit_bytes=memory_bytes)  # before the probe, so that agents that start together agree
        with contextlib.ExitStack() as undo:
            undo.callback(self._registry.leave)
            self.facts: DeviceFacts = probe_device(device)
            self.latest: MemoryBudget = self._plan(self.facts)
            self.settle()
            undo.pop_all()

    def settle(self) -> MemoryBudget:
        """Take the latest budget as the first one. Raises ConfigError if it is unknown, BudgetTooSmall if it is 0."""
        self.first: MemoryBudget = self.latest
        if self.first.now_bytes is None:
            raise ConfigError(
                f"how much memory training may use is unknown: {self.first.origin}",
                remedy="Set `memory`, e.g. 4GiB.",
            )
        if self.first.now_bytes <= 0:
            raise BudgetTooSmall(f"this device has no memory to spare: {self.first.origin}")
        self.first_bytes: int = self.first.now_bytes
        return self.first

    @property
    def torch_device(self) -> str:
        """Where the model lives: ``cuda:0``, or ``cpu`` where torch cannot use the GPU."""
        gpu = self.facts.gpu if self.facts.trains_on_gpu else None
        return f"cuda:{gpu.cuda_index}" if gpu is not None else "cpu"

    def measure(self) -> MemoryBudget:
        """Measure the budget; it becomes ``latest``."""
        self.latest = self._plan(probe_device(self._device))
        return self.latest

    def describe(self) -> DeviceInfo:
        """Return the facts about this device that the agent sends at registration."""
        facts, budget = self.facts, self.latest
        profile = match_profile(facts)
        gpu = facts.gpu if budget.kind is not MemoryKind.CPU else None
        name = (gpu.name if gpu else facts.host.cpu_name).value
        if budget.kind is MemoryKind.DISCRETE and gpu is not None:
            total = gpu.memory_total_bytes.value
        else:
            total = facts.host.memory_total_bytes.value
        return DeviceInfo(
            name=_short(name or (profile.name if profile else "unknown")),
            kind=budget.kind.value,
            trains_on=self.torch_device.partition(":")[0],
            profile=profile.id if profile else "",
            total_bytes=total,
            budget_bytes=budget.now_bytes,
            ideal_budget_bytes=budget.ideal_bytes,
            budget_origin=_short(_PROGRAMS.sub("", budget.origin)),
            power_mode=_short(facts.tegra.power_mode.value or "") if facts.tegra else "",
        )

    def make_watch(self) -> PressureWatch:
        """A watch with the limits of this device; not started."""
        facts, kind = self.facts, self.first.kind
        gpu_total = facts.gpu.memory_total_bytes.value if facts.gpu is not None else None
        limits = WatchLimits.of(
            kind,
            facts.host.memory_total_bytes.value,
            gpu_total,
            self._memory_bytes if kind is MemoryKind.CPU else None,
        )
        available = facts.host.memory_available_bytes.value
        if self._memory_bytes is not None and kind is not MemoryKind.DISCRETE and available is not None:
            # An owner who gives more than the policy would leaves a smaller reserve: no reason to shrink.
            left = available + process_rss_bytes() - self._memory_bytes
            limits = limits.with_reserve_at_most(left)
        # A GPU that torch cannot use may be lost or full without effect on training on the CPU.
        watched = facts if facts.trains_on_gpu else dataclasses.replace(facts, gpu=None)
        return PressureWatch(MemorySensors(watched), limits)

    def close(self) -> None:
        """Remove this agent from the registry: it needs no memory any more."""
        self._registry.leave()

    def _plan(self, facts: DeviceFacts) -> MemoryBudget:
        memory = HOST
        if facts.kind is MemoryKind.DISCRETE and facts.gpu is not None and facts.trains_on_gpu:
            memory = facts.gpu.uuid.value or f"cuda:{facts.gpu.cuda_index}"
        self._registry.enter(memory, self._memory_bytes)
        return plan_budget(
            facts, override_bytes=self._memory_bytes, own=self._own(facts), policy=self._policy, for_training=True,
            others=self._registry.others(memory),
        )  # fmt: skip

    def _own(self, facts: DeviceFacts) -> OwnMemory:
        reserved = 0
        if facts.trains_on_gpu and facts.gpu is not None:
            import torch

            reserved = torch.cuda.memory_reserved(facts.gpu.cuda_index)
        return OwnMemory(rss_bytes=process_rss_bytes(), torch_reserved_bytes=reserved)


def _short(text: str) -> str:
    """One printable line of at most `MAX_TEXT_CHARACTERS`, as the server accepts it."""
    line = "".join(character if character.isprintable() else " " for character in text)
    return line[:MAX_TEXT_CHARACTERS]


@contextlib.contextmanager
def open_trainer(config: JoinConfig, progress: ProgressSink) -> Iterator[tuple[Trainer, DeviceMemory]]:
    """The trainer of a device, which has read its data, and the memory that it may use.

    Raises what the trainers and `DeviceMemory` raise.
    """
    set_up_allocator()
    memory = DeviceMemory(config.device, config.memory_bytes)
    with contextlib.closing(memory):
        notes = dict.fromkeys((*memory.facts.notes, *memory.first.notes))
        for note in notes:
            progress.message(note)
        make_trainer = _expert_trainer if config.task is None else _personal_trainer
        trainer = make_trainer(config, memory, progress)
        # Reading the data took a while: agents that started together see each other by now.
        memory.measure()
        for note in memory.settle().notes:
            if note not in notes:
                progress.message(note)
        with RoundTrackers(config.track, config.name, progress.message) as trackers:
            yield _ReportingTrainer(trainer, trackers, config.on_round), memory


class _ReportingTrainer:
    """A `Trainer` that reports the metrics of each round that it has trained."""

    def __init__(self, trainer: Trainer, trackers: RoundTrackers, on_round: OnRound | None):
        self._trainer, self._trackers, self._on_round = trainer, trackers, on_round
        self.num_examples, self.evaluates_global = trainer.num_examples, trainer.evaluates_global
        self.compare, self.between_rounds = trainer.compare, trainer.between_rounds

    def train_round(
        self, run: RunConfig, manifest: Manifest, assignment: Assignment, fetch: Fetch, progress: ProgressSink,
        update_path: Path,
    ) -> TrainedUpdate:  # fmt: skip
        """Train one round, and report its metrics."""
        trained = self._trainer.train_round(run, manifest, assignment, fetch, progress, update_path)
        self._trackers.record(tracked_run(run), assignment.server_round, trained.metrics)
        if self._on_round is not None:
            self._on_round(run, assignment.server_round, trained.metrics)
        return trained


def run_agent(config: JoinConfig, progress: ProgressSink, stop: threading.Event) -> RunSummary:
    """Take part in the run at ``config.server`` until it is over or ``stop`` is set.

    The data is read first, so that a bad file is reported before the server hears of this device. Raises what
    `Agent.run` and `open_trainer` raise.
    """
    with open_trainer(config, progress) as (trainer, memory):
        settings = AgentSettings(
            name=config.name,
            memory_bytes=memory.first_bytes,
            expert_share=config.expert_share,
            compute_share=config.compute_share,
            device=memory.describe(),
            budget_bytes=lambda: memory.latest.now_bytes,
            final_evaluation=config.final_evaluation,
        )
        with open_agent(
            config.server,
            config.state,
            settings,
            trainer,
            token=config.token,
            invitation=config.invitation,
            progress=progress,
            stop=stop,
            new_identity=config.new_identity,
        ) as agent:
            return agent.run()


def _expert_trainer(config: JoinConfig, memory: DeviceMemory, progress: ProgressSink) -> Trainer:
    """Trains experts of the server's model, as many as the device affords."""
    trainer = LocalTrainer(
        config.data,
        config.state,
        config.limits,
        config.name,
        ProcessMemory(memory.measure, memory.torch_device, memory.make_watch()),
        held_out_share=config.held_out_share,
        device=memory.torch_device,
        fields=config.fields,
        functions=config.functions,
    )
    for note in trainer.corpus.notes():
        progress.message(note)
    return ComparingTrainer(trainer, config.state, config.final_evaluation, config.compare_alone)


def _personal_trainer(config: JoinConfig, memory: DeviceMemory, progress: ProgressSink) -> Trainer:
    """Trains a model of the device's own together with the shared extractor."""
    from edgefed.personal.tasks import make_task
    from edgefed.personal.trainer import PersonalTrainer

    assert config.task is not None, "the configuration names a task"
    make = functools.partial(
        make_task, config.task, config.data, config.model, config.name, config.held_out_share, config.resize,
        config.fields,
    )  # fmt: skip
    task = make()
    for note in problem_notes(config.data, task.problems):
        progress.message(note)
    of_classes = f" of {task.num_present} classes" if task.classes else ""
    if task.num_present < len(task.classes):
        of_classes += f" (the data names {len(task.classes)})"
    progress.message(
        f"{config.name}: {task.num_examples} examples{of_classes}, own model {config.model}; "
        "only the shared extractor leaves this device"
    )
    return PersonalTrainer(
        task, config.state, device=memory.torch_device, untrained=make, compare_alone=config.compare_alone
    )
