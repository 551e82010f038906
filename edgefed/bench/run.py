"""The whole benchmark, in order: memory, speed, experts, disk, a sustained run, network, what fits.

`run_bench` measures and never prints; `stand_in` plans for a device that is not here. Ctrl-C at any point ends with a
report of what there is.
"""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections.abc import Iterator

from edgefed.bench import describe
from edgefed.bench.explain import measure, plan_cases, predict
from edgefed.bench.fits import fits_of, planned_kernels
from edgefed.bench.models import BenchModel, find_model
from edgefed.bench.network import Line, find_line, measure_network, upload_seconds
from edgefed.bench.plan import DEFAULT_LINE, DEFAULT_MODEL, BenchOptions
from edgefed.bench.report import Fit, MemoryCheck, Report, Sustain
from edgefed.bench.sensors import DeviceSensors
from edgefed.bench.session import Session
from edgefed.bench.speed import SpeedTests, paper_figures
from edgefed.bench.statistics import Entry
from edgefed.bench.stopwatch import Stopwatch
from edgefed.costs.memory import StepSetup
from edgefed.costs.shapes import KNOWN_SHAPES
from edgefed.hardware.budget import MemoryBudget, plan_budget
from edgefed.hardware.facts import DeviceFacts, MemoryKind
from edgefed.hardware.memory import GIB, format_bytes, process_rss_bytes
from edgefed.hardware.probe import probe_device
from edgefed.hardware.profiles import facts_of, find_profile, in_power_mode, match_profile
from edgefed.progress import ProgressSink
from edgefed.training.out_of_memory import is_out_of_memory
from edgefed.training.savings import eight_bit_problem

DEFAULT_RTT_MS = 30.0


def stand_in(options: BenchOptions) -> Report:
    """What would fit on the device of a profile. Nothing is measured.

    Raises UnknownProfile, ConfigError, ModelError.
    """
    started = time.monotonic()
    profile = find_profile(options.profile)
    facts = facts_of(profile)
    budget = plan_budget(facts, override_bytes=options.memory_bytes)
    model = find_model(options.model) if options.model else None
    planner = _Planner(facts, budget, _line(options, []), stand_in=True)
    return Report(
        created=_now(),
        tool=describe.tool_section("plan", 0),
        host=describe.host_section(facts),
        device=describe.device_section(facts, profile, "", stand_in=True),
        memory=describe.memory_section(budget),
        fits=tuple(planner.fits(model)),
        uplink=planner.uplink(),
        planning=planner.planning(),
        model=_model_section(model) if model else {},
        explain=tuple(planner.explain(model)) if options.explain and model else (),
        warnings=(f"{profile.id} stands in for the device: nothing was measured", *budget.notes),
        seconds=time.monotonic() - started,
    )


def run_bench(options: BenchOptions, progress: ProgressSink) -> Report:
    """Measure this device.

    Raises ConfigError and ModelError for what was asked wrongly, before anything is measured; what goes wrong later is
    in the report.
    """
    started = time.monotonic()
    facts = probe_device(options.device)
    budget = plan_budget(facts, override_bytes=options.memory_bytes)
    line = find_line(options.uplink) if options.uplink else None
    model = find_model(options.model or DEFAULT_MODEL)
    return _Run(options, facts, budget, model, line, progress).report(started)


class _Run:
    def __init__(
        self,
        options: BenchOptions,
        facts: DeviceFacts,
        budget: MemoryBudget,
        model: BenchModel,
        line: Line | None,
        progress: ProgressSink,
    ):
        self.options, self.facts, self.budget, self.model, self.line = options, facts, budget, model, line
        self.effort = options.effort
        self.on_gpu = facts.trains_on_gpu
        self.speed_on = f"cuda:{facts.gpu.cuda_index}" if self.on_gpu else "cpu"
        self.watch = Stopwatch(self.speed_on)
        self.sensors = DeviceSensors(facts, on_gpu=self.on_gpu)
        self.session = Session(progress, self.watch.release)
        self.progress = progress
        profile = match_profile(facts)
        mode = facts.tegra.power_mode.value if facts.tegra else None
        self.profile = in_power_mode(profile, mode) if profile and mode else profile
        self.check: MemoryCheck | None = None
        self.sustained: Sustain | None = None
        self.network: list[Entry] = []
        self.explained: list[dict] = []

    def report(self, started: float) -> Report:
        interrupted = False
        self._warn_about_conditions()
        try:
            for part in (self._memory, self._speed, self._explain, self._sustain, self._network):
                part()
        except KeyboardInterrupt:
            self.progress.done()
            interrupted = True
        planner = _Planner(self.facts, self.budget, _line(self.options, self.network, self.line))
        return Report(
            created=_now(),
            tool=describe.tool_section(self.options.mode, self.options.sampling.repeats),
            host=describe.host_section(self.facts, _load_now(self.options.device)),
            device=describe.device_section(self.facts, self.profile, self.speed_on, stand_in=False),
            memory=describe.memory_section(self.budget, self.check),
            tests=tuple(paper_figures(self.session.entries, self.profile, self.facts, self.on_gpu)),
            sustain=self.sustained,
            fits=tuple(planner.fits(self.model)),
            network=tuple(self.network),
            uplink=planner.uplink(),
            planning=planner.planning(),
            model=_model_section(self.model),
            explain=tuple(self.explained),
            warnings=tuple(dict.fromkeys((*self.facts.notes, *self.budget.notes, *self.session.warnings))),
            unknown=describe.unknown_fields(self.facts),
            seconds=time.monotonic() - started,
            interrupted=interrupted,
        )

    def _warn_about_conditions(self) -> None:
        host, warn = self.facts.host, self.session.warnings.append
        if host.battery.known and host.battery.value.plugged is False:
            warn("on battery: the numbers may not be compared")
        if host.load_average.known and host.cpu_count.known and host.load_average.value > host.cpu_count.value / 2:
            warn(
                f"load {host.load_average.value:.1f} before the start: something else is at work here, "
                "and the speeds are too low"
            )
        if not self.sensors.is_real:
            warn("EDGEFED_SYSROOT is set: the memory is that of another machine, and is not allocated here")

    # --- parts, each of which may be interrupted ------------------------------------------------------------------

    def _speed_budget(self) -> int | None:
        """What the place where speed is measured may take."""
        if not self.sensors.is_real:
            return min(2 * GIB, self.budget.now_bytes or 2 * GIB)
        if self.facts.kind is not MemoryKind.CPU and not self.on_gpu:
            return plan_budget(self.facts, for_training=True).now_bytes
        return self.budget.now_bytes

    def _memory(self) -> None:
        from edgefed.bench.memory_check import verify_memory

        budget = self._speed_budget()
        if budget is None or not self.sensors.is_real:
            return
        if not self.on_gpu:
            budget = max(0, budget - process_rss_bytes())
        most = self.effort.gpu_check_bytes if self.speed_on != "cpu" else self.effort.host_check_bytes
        if self.facts.kind is MemoryKind.UNIFIED:
            most = self.effort.host_check_bytes
        asked = budget if most is None else min(budget, most)
        if asked <= 0:
            return
        found = self.session.attempt(
            "memory",
            lambda: verify_memory(
                self.watch, asked, self.sensors.room_bytes, is_out_of_memory, on_bytes=self.progress.advance
            ),
            total=asked,
        )
        if isinstance(found, MemoryCheck):
            self.check = found
            if not found.complete:
                self.session.warnings.append(
                    f"only {format_bytes(found.verified_bytes)} of {format_bytes(asked)} could be allocated: "
                    f"{found.stopped}"
                )
            if found.spilled:
                self.session.warnings.append(
                    f"the last blocks copy at {100 * found.last_speed_share:.0f} % of the first ones' speed: "
                    "GPU memory spilled into system memory; plan with less (`memory`)"
                )

    def _speed(self) -> None:
        tests = SpeedTests(
            self.watch, self.session, self.options, self.model, self._speed_budget(), self.sensors,
            unified=self.facts.kind is MemoryKind.UNIFIED,
        )  # fmt: skip
        self.tests = tests
        tests.basic()
        tests.disk()
        tests.model_speed()

    def _explain(self) -> None:
        if not self.options.explain:
            return
        planner = _Planner(self.facts, self.budget, None)
        self.explained = planner.explain(self.model)
        work = self.tests.step_work()
        for index, (case, row) in enumerate(zip(planner.cases(self.model), self.explained, strict=True)):
            found = self.session.attempt(
                f"explain {index + 1}", lambda case=case: measure(self.watch, self.model, case, work)
            )
            row["measured"] = found if isinstance(found, dict) else None
            self.watch.release()

    def _sustain(self) -> None:
        from edgefed.bench.sustain import run_sustained

        seconds = self.effort.sustain_s
        if seconds <= 0 or self.session.lost:
            return
        chosen = self.tests.fastest_matmul()
        if chosen is None:
            self.session.warnings.append("no sustained run: no matrix product worked")
            return
        dtype, n = chosen
        done = [0]

        def on_point(at_s: float) -> None:
            self.progress.advance(round(at_s) - done[0])
            done[0] = round(at_s)

        found = self.session.attempt(
            "sustained",
            lambda: run_sustained(self.watch, dtype, n, seconds, self.sensors.sense, on_point=on_point),
            total=round(seconds),
            unit="second",
        )
        self.sustained = found if isinstance(found, Sustain) else None
        if self.sustained is not None and self.sustained.throttled:
            self.session.warnings.append(f"throttled while busy: {', '.join(self.sustained.reasons)}")

    def _network(self) -> None:
        if not self.options.network or not self.options.server:
            return
        self.progress.phase("network")
        try:
            measure_network(
                self.options.server,
                self.options.token,
                active=self.options.active,
                repeats=self.options.sampling.repeats,
                record=self.network.append,
            )
        finally:
            self.progress.done()


class _Planner:
    """What fits under a budget, and how long its update would take to send."""

    def __init__(self, facts: DeviceFacts, budget: MemoryBudget, line: Line | None, *, stand_in: bool = False):
        self._facts, self._budget, self._line = facts, budget, line
        self.device = {MemoryKind.CPU: "cpu", MemoryKind.UNIFIED: "unified", MemoryKind.DISCRETE: "cuda"}[facts.kind]
        problem = "" if stand_in and self.device != "cpu" else eight_bit_problem(
            f"cuda:{facts.gpu.cuda_index}" if facts.trains_on_gpu else "cpu"
        )  # fmt: skip
        self.optimizer = "adamw" if problem else "adamw_8bit"

    def room(self, budget_bytes: int | None) -> int | None:
        """What tensors may take: on the CPU the budget is of the whole process, Python and libraries included."""
        if budget_bytes is None:
            return None
        return max(0, budget_bytes - process_rss_bytes()) if self._facts.kind is MemoryKind.CPU else budget_bytes

    def fits(self, model: BenchModel | None) -> Iterator[Fit]:
        shapes = dict(KNOWN_SHAPES)
        if model is not None and model.name not in shapes:
            shapes = {model.name: model.shape, **shapes}
        for shape in shapes.values():
            for name, size in (("now", self._budget.now_bytes), ("ideal", self._budget.ideal_bytes)):
                for fit in fits_of(shape, name, self.room(size), self.optimizer, self.device):
                    seconds = upload_seconds(fit.upload_bytes, self._line) if fit.upload_bytes and self._line else None
                    yield _with(fit, upload_s=seconds)

    def planning(self) -> dict:
        """What the predictions assume, beside what the tables say."""
        own = process_rss_bytes() if self._facts.kind is MemoryKind.CPU else 0
        return {"device": self.device, "optimizer": self.optimizer, "process_bytes": own}

    def uplink(self) -> dict:
        line = self._line
        if line is None:
            return {}
        return {
            "name": line.name,
            "up_bytes_per_s": line.sustained_up_bytes_per_s,
            "rtt_ms": line.rtt_ms,
            "basis": line.basis,
        }

    def setup(self, model: BenchModel) -> StepSetup:
        """A run's step with its defaults."""
        return StepSetup(
            batch_size=8, sequence_length=128, dtype=str(model.dtype).removeprefix("torch."), device=self.device,
            kernels=planned_kernels(self.device, model.dtype),
        )  # fmt: skip

    def cases(self, model: BenchModel):
        return plan_cases(model, self.setup(model), self.room(self._budget.now_bytes))

    def explain(self, model: BenchModel) -> list[dict]:
        room = self.room(self._budget.now_bytes)
        return [predict(model, case, room) for case in self.cases(model)]


def _with(fit: Fit, **changes: object) -> Fit:
    import msgspec

    return msgspec.structs.replace(fit, **changes)


def _line(options: BenchOptions, network: list[Entry], stated: Line | None = None) -> Line:
    """The uplink: stated, else measured, else the default, which is named as assumed."""
    if options.uplink:
        return stated or find_line(options.uplink)
    upload = next((entry for entry in network if entry.name == "upload" and entry.measured), None)
    if upload is not None:
        connect = next((entry.median for entry in network if entry.name == "connect" and entry.measured), None)
        rate = upload.median * 1e6
        return Line("measured", rate, rate, connect or DEFAULT_RTT_MS, basis="measured")
    return dataclasses.replace(find_line(DEFAULT_LINE), basis="assumed")


def _model_section(model: BenchModel) -> dict:
    shape = model.shape
    return {
        "name": model.name,
        "parameters": shape.num_parameters,
        "layers": len(shape.layers),
        "moe_layers": len(shape.moe_layers),
        "experts": shape.num_experts,
        "top_k": shape.top_k,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")  # noqa: UP017


def _load_now(device: str | None) -> float | None:
    return probe_device("cpu", ask_torch=False).host.load_average.value
