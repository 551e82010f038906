"""The whole benchmark, in order: memory, speed, experts, disk, a sustained run, network, what fits.

`run_bench` measures and never prints; `stand_in` plans for a device that is absent. Ctrl-C at any point ends the run
with a report of the results so far.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import time
from typing import Any

import msgspec

from edgefed.bench import report as sections
from edgefed.bench.capacity import verify_memory
from edgefed.bench.compute import Stopwatch, dtype_name
from edgefed.bench.models import BenchModel, find_model
from edgefed.bench.network import Line, find_line, measure_network
from edgefed.bench.options import DEFAULT_LINE, DEFAULT_MODEL, BenchOptions
from edgefed.bench.planning import Planner, speed_device
from edgefed.bench.report import MemoryCheck, Report, Sustain
from edgefed.bench.speed import Session, SpeedTests, paper_figures
from edgefed.bench.statistics import Entry
from edgefed.bench.sustain import DeviceSensors, run_sustained
from edgefed.bench.training_step import measure_memory
from edgefed.bench.verdict import verdict
from edgefed.errors import ConfigError
from edgefed.hardware.budget import MemoryBudget, plan_budget
from edgefed.hardware.facts import DeviceFacts, MemoryKind
from edgefed.hardware.memory import GIB, format_bytes, process_rss_bytes
from edgefed.hardware.probe import probe_device
from edgefed.hardware.profiles import facts_of, find_profile, in_power_mode, match_profile
from edgefed.kernels.out_of_memory import is_out_of_memory
from edgefed.kernels.proof import backends_in_use
from edgefed.progress import ProgressSink

DEFAULT_RTT_MS = 30.0


def stand_in(options: BenchOptions) -> Report:
    """Plan for the device of a profile, without measuring. Raises UnknownProfile, ConfigError, ModelError."""
    started = time.monotonic()
    if options.profile is None:
        raise ConfigError("missing device profile")
    profile = find_profile(options.profile)
    facts = facts_of(profile)
    budget = plan_budget(facts, override_bytes=options.memory_bytes)
    model = find_model(options.model) if options.model else None
    planner = Planner(facts, budget, _line(options, []), stand_in=True)
    report = Report(
        created=_now(),
        tool=sections.tool_section("plan", 0),
        host=sections.host_section(facts),
        device=sections.device_section(facts, profile, "", stand_in=True),
        memory=sections.memory_section(budget),
        fits=tuple(planner.fits(model)),
        uplink=planner.uplink(),
        planning=planner.planning(),
        model=_model_section(model) if model else {},
        explain=tuple(planner.explain(model)) if options.explain and model else (),
        warnings=(f"planned for the profile {profile.id}, not measured", *budget.notes),
        seconds=time.monotonic() - started,
    )
    return msgspec.structs.replace(report, verdict=verdict(report))


def run_bench(options: BenchOptions, progress: ProgressSink) -> Report:
    """Measure this device.

    Raises ConfigError and ModelError for invalid options, before measuring; later errors are in the report.
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
        self.speed_on = speed_device(facts)
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
        self.explained: list[dict[str, Any]] = []

    def report(self, started: float) -> Report:
        interrupted = False
        self._warn_about_conditions()
        try:
            for part in (self._memory, self._speed, self._explain, self._sustain, self._network):
                part()
        except KeyboardInterrupt:
            self.progress.done()
            interrupted = True
        planner = Planner(self.facts, self.budget, _line(self.options, self.network, self.line))
        report = Report(
            created=_now(),
            tool=sections.tool_section(self.options.mode, self.options.sampling.repeats),
            host=sections.host_section(self.facts, _load_now()),
            device=sections.device_section(self.facts, self.profile, self.speed_on, stand_in=False),
            memory=sections.memory_section(self.budget, self.check),
            tests=tuple(paper_figures(self.session.entries, self.profile, self.facts, self.on_gpu)),
            sustain=self.sustained,
            fits=tuple(planner.fits(self.model)),
            network=tuple(self.network),
            uplink=planner.uplink(),
            planning=planner.planning(),
            model=_model_section(self.model),
            explain=tuple(self.explained),
            kernels=tuple(sections.Kernel(**dataclasses.asdict(found)) for found in backends_in_use(self.speed_on)),
            warnings=tuple(dict.fromkeys((*self.facts.notes, *self.budget.notes, *self.session.warnings))),
            unknown=sections.unknown_fields(self.facts),
            seconds=time.monotonic() - started,
            interrupted=interrupted,
        )
        return msgspec.structs.replace(report, verdict=verdict(report))

    def _warn_about_conditions(self) -> None:
        host, warn = self.facts.host, self.session.warnings.append
        battery, load, cores = host.battery.value, host.load_average.value, host.cpu_count.value
        if battery is not None and battery.plugged is False:
            warn("on battery: do not compare the numbers")
        if load is not None and cores is not None and load > cores / 2:
            warn(f"load {load:.1f} before the start: other programs are running, so the speeds are too low")
        if not self.sensors.is_real:
            warn("EDGEFED_SYSROOT is set: the memory belongs to another machine and is not allocated here")

    # --- parts; Ctrl-C may interrupt each of them ------------------------------------------------------------------

    def _speed_budget(self) -> int | None:
        """Return the budget of the device that speed is measured on."""
        if not self.sensors.is_real:
            return min(2 * GIB, self.budget.now_bytes or 2 * GIB)
        if self.facts.kind is not MemoryKind.CPU and not self.on_gpu:
            return plan_budget(self.facts, for_training=True).now_bytes
        return self.budget.now_bytes

    def _memory(self) -> None:
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
                    f"allocated only {format_bytes(found.verified_bytes)} of {format_bytes(asked)}: {found.stopped}"
                )
            if found.spilled and found.last_speed_share is not None:
                self.session.warnings.append(
                    f"the last blocks copy at {100 * found.last_speed_share:.0f} % of the speed of the first: "
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
        planner = Planner(self.facts, self.budget, None)
        self.explained = planner.explain(self.model)
        work = self.tests.step_work()
        for index, (case, row) in enumerate(zip(planner.cases(self.model), self.explained, strict=True)):
            found = self.session.attempt(
                f"explain {index + 1}", functools.partial(measure_memory, self.watch, self.model, case, work)
            )
            row["measured"] = found if isinstance(found, dict) else None
            self.watch.release()

    def _sustain(self) -> None:
        seconds = self.effort.sustain_s
        if seconds <= 0 or self.session.lost:
            return
        chosen = self.tests.fastest_matmul()
        if chosen is None:
            self.session.warnings.append("no sustained run: every matrix product failed")
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
            self.session.warnings.append(f"throttled under load: {', '.join(self.sustained.reasons)}")

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


def _line(options: BenchOptions, network: list[Entry], stated: Line | None = None) -> Line:
    """Return the uplink: the given, else the measured, else the default one, marked as assumed."""
    if options.uplink:
        return stated or find_line(options.uplink)
    upload = next((entry for entry in network if entry.name == "upload" and entry.measured), None)
    if upload is not None and upload.median is not None:
        connect = next((entry.median for entry in network if entry.name == "connect" and entry.measured), None)
        rate = upload.median * 1e6
        return Line("measured", rate, rate, connect or DEFAULT_RTT_MS, basis="measured")
    return dataclasses.replace(find_line(DEFAULT_LINE), basis="assumed")


def _model_section(model: BenchModel) -> dict[str, Any]:
    shape = model.shape
    return {
        "name": model.name,
        "parameters": shape.num_parameters,
        "layers": len(shape.layers),
        "moe_layers": len(shape.moe_layers),
        "experts": shape.num_experts,
        "top_k": shape.top_k,
        "dtype": dtype_name(model.dtype),
    }


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")  # noqa: UP017


def _load_now() -> float | None:
    return probe_device("cpu", ask_torch=False).host.load_average.value
