"""The speed tests of one run, in order, and the session that records them.

A failed test becomes an entry with the reason, and the other tests run; Ctrl-C ends the run cleanly.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec
import torch

from edgefed.bench import compute
from edgefed.bench.capacity import BLOCK, RANDOM_BLOCK, DiskTest
from edgefed.bench.compute import Stopwatch, dtype_name, expert_forward
from edgefed.bench.formats import FIGURES
from edgefed.bench.models import BenchModel
from edgefed.bench.options import BenchOptions
from edgefed.bench.planning import expert_bytes, planned_kernels
from edgefed.bench.statistics import NOISY, STABLE, UNUSABLE, Entry
from edgefed.bench.sustain import DeviceSensors
from edgefed.bench.training_step import StepWork, cut_shape, depths, measure_training
from edgefed.costs.memory import StepSetup
from edgefed.costs.shapes import ModelShape
from edgefed.errors import EdgefedError, first_line
from edgefed.hardware.facts import DeviceFacts, MemoryKind, Reading
from edgefed.hardware.profile_files import DeviceProfile
from edgefed.hardware.sampling import read_waited_s
from edgefed.kernels.out_of_memory import is_device_lost, is_out_of_memory
from edgefed.progress import ProgressSink

FALLBACK_BYTES = 2**30
"""Memory for tests when the free memory is unknown."""
SEQUENCE = 128
FEWEST_TOKENS = 32
SLOWEST_STEP_S = 10.0
"""Limit for a step of the fewest tokens: a measurement needs three steps."""

WAIT_NOISY, WAIT_UNUSABLE = 0.05, 0.20
"""Seconds in the run queue per second of a test, over all threads, that make it noisy or unusable."""


# --- the session ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Session:
    """The entries and warnings of one run. ``release`` frees memory after a failure.

    Once ``lost`` is set, tests on the GPU are skipped. `KeyboardInterrupt` is recorded in the entry that it interrupts
    and raised again: the caller ends the run with the results so far.
    """

    progress: ProgressSink
    release: Callable[[], None]
    entries: list[Entry] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)
    lost: str = ""

    def measure(self, name: str, unit: str, work: Callable[[], Entry], *, on_device: bool = True, **more: Any) -> Entry:
        """Run ``work`` and add its entry, or one with the reason of its failure and the fields ``more``."""
        if self.lost and on_device:
            return self.add(Entry.skipped(name, unit, self.lost, **more))
        self.progress.phase(name)
        try:
            waited_s, started = read_waited_s(), time.monotonic()
            entry = work()
            return self.add(judge_contention(entry, waited_s, read_waited_s(), time.monotonic() - started))
        except KeyboardInterrupt:
            self.add(Entry.interrupted(name, unit, **more))
            raise
        except Exception as error:
            reason = self.explain(error)
        finally:
            self.progress.done()
        # Outside the handler, whose traceback keeps the tensors of the failed measurement alive.
        self.release()
        return self.add(Entry.failed(name, unit, reason, **more))

    def attempt(self, name: str, work: Callable[[], object], *, total: int | None = None, unit: str = "B") -> object:
        """Run ``work`` that makes no entry; a failure becomes a warning and None. ``total``, ``unit``: for progress."""
        if self.lost:
            return None
        self.progress.phase(name, total, unit)
        try:
            return work()
        except Exception as error:
            reason = self.explain(error)
        finally:
            self.progress.done()
        self.release()
        self.warnings.append(f"{name}: {reason}")
        return None

    def add(self, entry: Entry) -> Entry:
        """Add an entry and return it."""
        self.entries.append(entry)
        return entry

    def skip(self, name: str, unit: str, reason: str, **more: Any) -> None:
        """Add an entry of a skipped test."""
        self.add(Entry.skipped(name, unit, reason, **more))

    def explain(self, error: Exception) -> str:
        """Describe an error in one line. Remembers a lost GPU."""
        text = first_line(error)
        if is_out_of_memory(error):
            return f"out of memory: {text}"
        if is_device_lost(error):
            self.lost = f"the GPU stopped responding: {text}"
            self.warnings.append(self.lost)
            return self.lost
        if isinstance(error, (EdgefedError, OSError)):
            return text
        return f"{type(error).__name__}: {text}"


def judge_contention(entry: Entry, before: Reading[float], after: Reading[float], seconds: float) -> Entry:
    """Return the entry, with a lower verdict if the process waited for a CPU meanwhile.

    A process that always waits is slow evenly: its samples agree, and only the kernel's accounting shows it.
    """
    if before.value is None or after.value is None or seconds <= 0 or entry.verdict not in (STABLE, NOISY):
        return entry
    share = max(0.0, after.value - before.value) / seconds
    if share < WAIT_NOISY:
        return entry
    verdict = UNUSABLE if share >= WAIT_UNUSABLE else NOISY
    return msgspec.structs.replace(entry, verdict=verdict, reason=f"waited {min(share, 9.99):.0%} for a CPU")


# --- the tests ------------------------------------------------------------------------------------------------------


class SpeedTests:
    """Runs the tests and adds their entries to ``session``."""

    def __init__(
        self,
        watch: Stopwatch,
        session: Session,
        options: BenchOptions,
        model: BenchModel,
        budget_bytes: int | None,
        sensors: DeviceSensors,
        *,
        unified: bool,
    ):
        self.watch, self.session, self.options, self.model = watch, session, options, model
        self.effort, self.sampling = options.effort, options.sampling
        self.sensors, self.unified = sensors, unified
        self._budget = FALLBACK_BYTES if budget_bytes is None else budget_bytes

    def free_bytes(self) -> int:
        """Return the memory for a test: the budget, or less if less is free above the system's reserve."""
        room = self.sensors.room_bytes() if self.sensors.is_real else None
        return max(0, self._budget if room is None else min(self._budget, room))

    def basic(self) -> None:
        """Measure copies and matrix products."""
        run, watch, sampling = self.session.measure, self.watch, self.sampling
        run("copy", "GB/s", lambda: compute.copy_bandwidth(watch, sampling, self.effort.copy_sizes, self.free_bytes()))
        watch.release()
        for pinned in (True, False):
            name = f"host to device, {'pinned' if pinned else 'pageable'}"
            if not watch.is_cuda or self.unified:
                reason = "CPU and GPU share one memory" if self.unified else "no GPU is used"
                self.session.skip(name, "GB/s", reason)
                continue
            run(
                name, "GB/s",
                functools.partial(compute.host_to_device, watch, sampling, self.effort.copy_sizes[:3], pinned),
            )  # fmt: skip
            watch.release()
        for dtype, reason in compute.matmul_dtypes(watch):
            name = f"matmul {dtype_name(dtype)}"
            if reason:
                self.session.skip(name, "TFLOPS", reason)
                continue
            run(name, "TFLOPS", functools.partial(self._matmul, dtype))
            watch.release()

    def _matmul(self, dtype: torch.dtype) -> Entry:
        return compute.matmul(self.watch, self.sampling, dtype, self.free_bytes())

    def disk(self) -> None:
        """Measure the disk of the requested folder."""
        reads = (
            ("disk read", BLOCK, False),
            ("disk random read", RANDOM_BLOCK, True),
            ("disk expert read", expert_bytes(self.model.shape), True),
        )
        try:
            disk = DiskTest(self.options.folder, self.effort.disk_bytes)
        except OSError as error:
            reason = f"{self.options.folder}: {error.strerror or error}"
            for name in ("disk write", *(name for name, _, _ in reads)):
                self.session.add(Entry.failed(name, "MB/s", reason))
            return
        with disk:
            if disk.refused:
                self.session.skip("disk", "MB/s", disk.refused)
                return
            run = self.session.measure
            run("disk write", "MB/s", lambda: disk.write(self.sampling), on_device=False)
            for name, piece, scattered in reads:
                read = functools.partial(disk.read, name, piece, scattered, self.sampling)
                run(name, "MB/s", read, on_device=False)

    # --- the model ------------------------------------------------------------------------------------------------

    def model_speed(self) -> None:
        """Measure the experts' forward pass, a training step, profiling and energy."""
        layer = max(self.model.shape.moe_layers, key=lambda layer: layer.parameters_per_expert)
        flops = 6 * layer.top_k * self.model.shape.hidden_size * layer.expert_width
        tokens, refusal = self._affordable(self.effort.tokens, flops, self.effort.limit_s / 4)
        if refusal:
            self.session.skip("expert forward", "tokens/s", refusal)
        else:
            self.session.measure(
                "expert forward", "tokens/s",
                lambda: expert_forward(
                    self.watch, self.sampling, hidden_size=self.model.shape.hidden_size,
                    expert_width=layer.expert_width, num_experts=layer.num_experts, top_k=layer.top_k, tokens=tokens,
                    dtype=self.model.dtype, free_bytes=self.free_bytes(), model=self.model.name,
                ),
            )  # fmt: skip
        self.watch.release()
        names = (("train step", "tokens/s"), ("profile", "tokens/s"), ("energy", "J/token"))
        work = self.step_work()
        tokens, refusal = self._affordable(
            work.batch_size * work.sequence_length, self._step_flops(work), self.effort.step_limit_s / 2
        )
        if refusal:
            for name, unit in names:
                self.session.skip(name, unit, refusal)
            return
        work = dataclasses.replace(
            work, batch_size=max(1, tokens // SEQUENCE), sequence_length=min(tokens, work.sequence_length)
        )
        setup = self.setup(work)
        while not depths(self.model, setup, work) and work.resident > 1:
            work = dataclasses.replace(work, resident=work.resident // 2, trainable=work.resident // 2)
        found: Iterator[Entry] = iter(())

        def first() -> Entry:
            nonlocal found
            found = measure_training(self.watch, self.sampling, self.model, setup, work, self.sensors.energy)
            return next(found)

        entry = self.session.measure(*names[0], first)
        for name, unit in names[1:]:
            if entry.measured:
                self.session.measure(name, unit, lambda: next(found))
            else:
                self.session.skip(name, unit, entry.reason)
        self.watch.release()

    def step_work(self) -> StepWork:
        """Return a step with as many experts as the mode has time for; whether they fit is checked later."""
        count = min(self.model.shape.num_experts, max(self.model.shape.top_k, self.effort.most_experts))
        return StepWork(
            resident=count,
            trainable=count,
            batch_size=max(1, self.effort.tokens // SEQUENCE),
            sequence_length=SEQUENCE,
            memory_bytes=min(self.free_bytes() // 2, self.effort.step_memory_bytes),
            limit_s=self.effort.step_limit_s,
            whole_below_bytes=self.effort.step_memory_bytes // 4,
        )

    def setup(self, work: StepWork) -> StepSetup:
        """Return the default step of a run, at this size."""
        device = "cuda" if self.watch.is_cuda else "cpu"
        return StepSetup(
            batch_size=work.batch_size, sequence_length=work.sequence_length,
            dtype=dtype_name(self.model.dtype), device=device,
            kernels=planned_kernels(device, self.model.dtype),
        )  # fmt: skip

    def _step_flops(self, work: StepWork) -> float:
        """Return the operations per token of the deepest measured model: 6 per active parameter."""
        most = len(self.model.shape.layers)
        shape = cut_shape(self.model.shape, max(depths(self.model, self.setup(work), work) or (min(2, most),)))
        return 6.0 * (active_parameters(shape) - shape.embedding_parameters / 2)

    def _affordable(self, tokens: int, flops_per_token: float, limit_s: float) -> tuple[int, str]:
        """Return the tokens that take about ``limit_s`` at the speed of matrix products, or 0 and the reason."""
        dtype = dtype_name(self.model.dtype)
        speed = next((entry.median for entry in self.session.entries if entry.name == f"matmul {dtype}"), None)
        if speed is None:
            return tokens, ""
        rate = speed * 1e12 / 3  # smaller batches and more kernels than one large product
        fitting = int(limit_s * rate / flops_per_token)
        if fitting >= tokens:
            return tokens, ""
        if fitting < FEWEST_TOKENS:
            seconds = FEWEST_TOKENS * flops_per_token / rate
            if seconds <= SLOWEST_STEP_S:
                return FEWEST_TOKENS, ""
            return 0, f"{dtype} runs at {speed:.2g} TFLOPS: {FEWEST_TOKENS} tokens would take {seconds:.0f} s"
        return 2 ** int(math.log2(fitting)), ""

    def fastest_matmul(self) -> tuple[torch.dtype, int] | None:
        """Return dtype and size of the fastest matrix product."""
        products = [entry for entry in self.session.entries if entry.name.startswith("matmul ") and entry.measured]
        best = max(products, key=lambda entry: entry.median or 0.0, default=None)
        return (getattr(torch, best.params["dtype"]), best.params["n"]) if best else None


def active_parameters(shape: ModelShape) -> int:
    """Return the number of parameters that one token uses."""
    routed = sum(min(layer.top_k, layer.num_experts) * layer.parameters_per_expert for layer in shape.layers)
    return shape.dense_parameters + routed


def paper_figures(
    entries: Iterable[Entry], profile: DeviceProfile | None, facts: DeviceFacts, on_gpu: bool
) -> Iterator[Entry]:
    """Yield the entries with the figures of the device's profile, if speed was measured on that device."""
    if not (on_gpu or facts.kind is MemoryKind.CPU) or (profile is not None and profile.match.fallback_cpus):
        profile = None  # of another device, or of small hosts in general
    for entry in entries:
        key, unit = FIGURES.get(entry.name, ("", ""))
        figure = profile.figures.get(key) if profile is not None and key and not key.startswith("disk") else None
        if profile is None or figure is None or unit != entry.unit:
            yield entry
            continue
        yield msgspec.structs.replace(
            entry, paper=float(figure.value), paper_source=f"{profile.id}: {figure.basis}, {figure.source}"
        )
