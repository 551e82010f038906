"""The speed tests of one run, in order, each within its time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator

import msgspec
import torch

from edgefed.bench import compute
from edgefed.bench.disk import BLOCK, RANDOM_BLOCK, DiskTest
from edgefed.bench.experts import expert_forward
from edgefed.bench.fits import expert_bytes, planned_kernels
from edgefed.bench.models import BenchModel
from edgefed.bench.plan import BenchOptions
from edgefed.bench.sensors import DeviceSensors
from edgefed.bench.session import Session
from edgefed.bench.statistics import Entry
from edgefed.bench.stopwatch import Stopwatch
from edgefed.bench.training_step import StepWork, cut_shape, depths, measure_training
from edgefed.costs.memory import StepSetup
from edgefed.costs.shapes import ModelShape
from edgefed.hardware.facts import DeviceFacts, MemoryKind
from edgefed.hardware.profile_files import DeviceProfile

FALLBACK_BYTES = 2**30
"""What tests may take when nobody knows what is left."""
SEQUENCE = 128
FEWEST_TOKENS = 32
SLOWEST_STEP_S = 10.0
"""A step of the fewest tokens that would take longer is not tried: it takes three of them to say anything."""

FIGURES = {
    "copy": ("bandwidth", "GB/s"),
    "matmul bfloat16": ("bf16_tflops", "TFLOPS"),
    "matmul float16": ("fp16_tflops", "TFLOPS"),
    "matmul float32": ("fp32_tflops", "TFLOPS"),
    "disk read": ("disk_read", "MB/s"),
    "disk write": ("disk_write", "MB/s"),
}
"""Test -> the figure of a device profile that it is, and its unit. The disk is hardly ever the profile's: it is
written into a new one, and not held against an old one."""


class SpeedTests:
    """Runs tests and keeps their entries in ``session``."""

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
        """What a test may take now: the budget, or what is left above the system's reserve, whichever is less."""
        room = self.sensors.room_bytes() if self.sensors.is_real else None
        return max(0, self._budget if room is None else min(self._budget, room))

    def basic(self) -> None:
        """Copies and products."""
        run, watch, sampling = self.session.measure, self.watch, self.sampling
        run("copy", "GB/s", lambda: compute.copy_bandwidth(watch, sampling, self.effort.copy_sizes, self.free_bytes()))
        watch.release()
        for pinned in (True, False):
            name = f"host to device, {'pinned' if pinned else 'pageable'}"
            if not watch.is_cuda or self.unified:
                reason = "one memory for CPU and GPU" if self.unified else "no GPU is used"
                self.session.skip(name, "GB/s", reason)
                continue
            run(name, "GB/s", lambda p=pinned: compute.host_to_device(watch, sampling, self.effort.copy_sizes[:3], p))
            watch.release()
        for dtype, reason in compute.matmul_dtypes(watch):
            name = f"matmul {str(dtype).removeprefix('torch.')}"
            if reason:
                self.session.skip(name, "TFLOPS", reason)
                continue
            run(name, "TFLOPS", lambda d=dtype: compute.matmul(watch, sampling, d, self.free_bytes()))
            watch.release()

    def disk(self) -> None:
        """The disk of the folder that was asked for."""
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
                self.session.keep(Entry.failed(name, "MB/s", reason))
            return
        with disk:
            if disk.refused:
                self.session.skip("disk", "MB/s", disk.refused)
                return
            run = self.session.measure
            run("disk write", "MB/s", lambda: disk.write(self.sampling), on_device=False)
            for name, piece, scattered in reads:
                arguments = (name, piece, scattered, self.sampling)
                run(name, "MB/s", lambda a=arguments: disk.read(*a), on_device=False)

    # --- the model ------------------------------------------------------------------------------------------------

    def model_speed(self) -> None:
        """Expert forward, training step, profiling, energy."""
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
        while not depths(self.model, setup, work) and work.kept > 1:
            work = dataclasses.replace(work, kept=work.kept // 2, trainable=work.kept // 2)
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
        """As many experts as the mode has time for; whether they fit is seen later."""
        count = min(self.model.shape.num_experts, max(self.model.shape.top_k, self.effort.most_experts))
        return StepWork(
            kept=count, trainable=count, batch_size=max(1, self.effort.tokens // SEQUENCE), sequence_length=SEQUENCE,
            memory_bytes=min(self.free_bytes() // 2, self.effort.step_memory_bytes), limit_s=self.effort.step_limit_s,
            whole_below_bytes=self.effort.step_memory_bytes // 4,
        )  # fmt: skip

    def setup(self, work: StepWork) -> StepSetup:
        """A run's step with its defaults, at this size."""
        device = "cuda" if self.watch.is_cuda else "cpu"
        return StepSetup(
            batch_size=work.batch_size, sequence_length=work.sequence_length,
            dtype=str(self.model.dtype).removeprefix("torch."), device=device,
            kernels=planned_kernels(device, self.model.dtype),
        )  # fmt: skip

    def _step_flops(self, work: StepWork) -> float:
        """Operations per token of a step of the deepest model that is measured: 6 per parameter that a token meets."""
        most = len(self.model.shape.layers)
        shape = cut_shape(self.model.shape, max(depths(self.model, self.setup(work), work) or (min(2, most),)))
        return 6.0 * (active_parameters(shape) - shape.embedding_parameters / 2)

    def _affordable(self, tokens: int, flops_per_token: float, limit_s: float) -> tuple[int, str]:
        """Tokens that take at most about ``limit_s`` at the speed of this dtype's matrix product, and why not."""
        dtype = str(self.model.dtype).removeprefix("torch.")
        product = next((e for e in self.session.entries if e.name == f"matmul {dtype}" and e.measured), None)
        if product is None:
            return tokens, ""
        rate = product.median * 1e12 / 3  # batches are smaller and kernels more than one large product
        fitting = int(limit_s * rate / flops_per_token)
        if fitting >= tokens:
            return tokens, ""
        if fitting < FEWEST_TOKENS:
            seconds = FEWEST_TOKENS * flops_per_token / rate
            if seconds <= SLOWEST_STEP_S:
                return FEWEST_TOKENS, ""
            return 0, f"{dtype} runs at {product.median:.2g} TFLOPS: {FEWEST_TOKENS} tokens would take {seconds:.0f} s"
        return 2 ** int(math.log2(fitting)), ""

    def fastest_matmul(self) -> tuple[torch.dtype, int] | None:
        """Dtype and size of the product that ran fastest."""
        products = [e for e in self.session.entries if e.name.startswith("matmul ") and e.measured]
        best = max(products, key=lambda entry: entry.median, default=None)
        return (getattr(torch, best.params["dtype"]), best.params["n"]) if best else None


def active_parameters(shape: ModelShape) -> int:
    """Parameters that one token meets."""
    routed = sum(min(layer.top_k, layer.num_experts) * layer.parameters_per_expert for layer in shape.layers)
    return shape.dense_parameters + routed


def paper_figures(
    entries: Iterable[Entry], profile: DeviceProfile | None, facts: DeviceFacts, on_gpu: bool
) -> Iterator[Entry]:
    """The entries with what the device's profile states beside them, where speed was measured on that device."""
    same_device = profile is not None and (on_gpu or facts.kind is MemoryKind.CPU)
    if same_device and profile.match.fallback_cpus:
        same_device = False  # it stands for any small host, and knows nothing of this one
    for entry in entries:
        key, unit = FIGURES.get(entry.name, ("", ""))
        figure = profile.figures.get(key) if same_device and key and not key.startswith("disk") else None
        if figure is None or unit != entry.unit:
            yield entry
            continue
        yield msgspec.structs.replace(
            entry, paper=float(figure.value), paper_source=f"{profile.id}: {figure.basis}, {figure.source}"
        )
