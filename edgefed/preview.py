"""What a device would do in a run, found out before it joins: nothing is registered, kept or trained.

    status, files -> data, memory -> step plan (`edgefed.trainer.planner`) -> seconds of a step and of an upload

Which experts a method chooses depends on an activation profile of the data, which would download the whole model. So a
preview takes the same share of each layer. A step is timed with random weights, as `edgefed bench` does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from edgefed.agent.cache import BlobCache
from edgefed.agent.network import measure_connect, measure_line
from edgefed.agent.transport import AggregatorClient
from edgefed.bench.compute import Stopwatch
from edgefed.bench.models import BenchModel
from edgefed.bench.network import Line, explain, upload_seconds
from edgefed.bench.statistics import Sampling
from edgefed.bench.training_step import StepWork, seconds_of_step
from edgefed.bench.verdict import with_times
from edgefed.costs.step_setup import StepPlan
from edgefed.costs.streaming import read_seconds, streamed_bytes
from edgefed.errors import NetworkError, ProtocolError, first_line
from edgefed.hardware.memory import GIB, format_bytes, set_up_allocator
from edgefed.join import DeviceMemory, JoinConfig
from edgefed.kernels.out_of_memory import free_memory, is_out_of_memory
from edgefed.methods.interface import ExpertMethod
from edgefed.methods.registry import make_expert_method
from edgefed.moe.expert_reading import FrameSource
from edgefed.moe.model import MoeModel
from edgefed.progress import ProgressSink, format_seconds
from edgefed.protocol.limits import check_run
from edgefed.protocol.messages import Manifest, RunConfig, Status, UnitInfo
from edgefed.protocol.ranks import with_rank
from edgefed.trainer.expert_choice import even_layout
from edgefed.trainer.kernel_proof import compile_products
from edgefed.trainer.planner import Planner, PlanRequest
from edgefed.trainer.ports import FormulaCosts, OwnModel, ProcessMemory
from edgefed.trainer.reports import own_rank
from edgefed.training.data import load_corpus
from edgefed.training.encoding import encode_examples

STEP_LIMIT_S = 5.0
"""Time limit for the steps at one depth of the model; a step that has begun is finished."""
STEPS = 5
WHOLE_BELOW_BYTES = GIB // 2
"""A larger model is timed with its first layers; creating random weights takes time."""
STORAGE_WORDS = {"nf4": "NF4", "int8": "8 bits"}


@dataclasses.dataclass(frozen=True)
class Preview:
    """What a device would do in a run. ``str()`` is one sentence in the form of `edgefed.bench.verdict`.

    Attributes:
        model: Name of the model.
        method: Name of the method.
        experts_per_layer: Experts of each MoE layer.
        resident: Of these on the device; with slices, all of them.
        trainable: Of these that train.
        neuron_share: Share (0, 1] of their neurons that resident experts have; 1 without slices.
        storage: Format of frozen experts.
        trains: How experts train: "full", "lora" or "none".
        sequence_length: Tokens of a block; smaller than the run's where memory is short.
        memory_bytes: Bytes that the model may use.
        num_examples: Examples of the data to train on.
        training_s: Seconds of the local steps of a round; None if they could not be measured.
        upload_bytes: Size of a round's update.
        upload_bytes_per_s: Measured rate; None if it could not be measured.
        upload_s: Seconds of the upload of a round's update; None without a rate.
        streamed: Frozen experts do not fit in memory: they are read while a step computes.
        lora_rank: Rank of the adapters on this device; 0: that of the run.
    """

    model: str
    method: str
    experts_per_layer: tuple[int, ...]
    resident: tuple[int, ...]
    trainable: tuple[int, ...]
    neuron_share: float
    storage: str
    trains: str
    sequence_length: int
    memory_bytes: int
    num_examples: int
    training_s: float | None
    upload_bytes: int
    upload_bytes_per_s: float | None
    upload_s: float | None
    streamed: bool = False
    lora_rank: int = 0

    def __str__(self) -> str:
        if self.neuron_share < 1.0:
            what = f"{self.neuron_share:.0%} of the neurons of every expert"
        elif len(set(self.experts_per_layer)) == 1:
            what = f"{_range(self.resident)} of {self.experts_per_layer[0]} experts a layer"
        else:
            what = f"{sum(self.resident)} of {sum(self.experts_per_layer)} experts"
        storage = STORAGE_WORDS.get(self.storage, self.storage) + (", streamed," if self.streamed else "")
        if self.trains == "lora":
            what += f" in {storage} with adapters{f' of rank {self.lora_rank}' if self.lora_rank else ''}"
        elif self.trains == "none":
            what += f" in {storage.rstrip(',')}, not trained"
        elif self.trainable == self.resident:
            what += " trained in full"
        else:
            what += f", {_range(self.trainable)} of them trained in full, the others in {storage.rstrip(',')}"
        return f"{self.model}: {with_times(what, self.training_s, self.upload_s)}"


def make_preview(config: JoinConfig, server: AggregatorClient, status: Status, progress: ProgressSink) -> Preview:
    """Preview the run of ``status`` on this device.

    Downloads the model's configuration and tokenizer into a temporary folder. Raises what `run_agent` raises before the
    first round: ConfigError, DataError, BudgetTooSmall, ModelError, NetworkError.
    """
    run = status.run
    check_run(run)
    if status.state == "finished":
        progress.message("the run is finished; this is what the device would have done")
    method = make_expert_method(run.method, run.method_options)
    manifest = server.manifest()
    set_up_allocator()
    with (
        contextlib.closing(DeviceMemory(config.device, config.memory_bytes)) as device,
        tempfile.TemporaryDirectory(prefix="edgefed-preview-") as folder,
    ):
        for note in dict.fromkeys((*device.facts.notes, *device.first.notes)):
            progress.message(note)
        progress.message(f"{config.name}: {device.first.origin}")
        cache = BlobCache(Path(folder, "blobs"), server)
        memory = ProcessMemory(device.measure, device.torch_device)
        model, request, num_examples = _open(config, run, method, manifest, cache, memory, device, progress)
        costs = FormulaCosts(stream_folder=config.state, device=device.torch_device)
        planner = Planner(Path(folder), config.limits, config.name, memory, costs)
        step = planner.estimate(request)
        usable_bytes = memory.usable_bytes()
        resident, trainable = even_layout(manifest.experts_per_layer)(step.resident, step.trainable).counts()
        share = 1.0
        if method.requirements.neurons:
            share = step.resident / sum(manifest.experts_per_layer)
            resident = trainable = manifest.experts_per_layer
        shape, reads_s = planner.shape, 0.0
        sliced = shape.sliced([share] * len(shape.moe_layers))
        if step.setup.streamed_layers and costs.stream_rates is not None:
            size_bytes = streamed_bytes(sliced, step.setup, resident, trainable)
            rates = costs.stream_rates(step.setup, size_bytes, usable_bytes)
            reads_s = read_seconds(sliced, step.setup, resident, trainable, rates.stream_bytes_per_s)
            progress.message(
                f"streaming: {format_bytes(size_bytes)} of frozen experts, read at "
                f"{format_bytes(rates.stream_bytes_per_s)}/s: {format_seconds(reads_s)} a step, beside its computation"
            )
        training_s = _training_seconds(
            BenchModel(run.model, model.config, shape), run, step, max(resident), max(trainable), share, reads_s,
            usable_bytes, device.torch_device, progress,
        )  # fmt: skip
    rank = own_rank(run.training, step.setup)
    size_bytes = _upload_bytes(
        with_rank(manifest.units, rank), step.trainable / sum(manifest.experts_per_layer), method
    )
    line = _measure_uplink(server, progress)
    return Preview(
        model=run.model,
        method=run.method,
        experts_per_layer=tuple(manifest.experts_per_layer),
        resident=tuple(resident),
        trainable=tuple(trainable),
        neuron_share=share,
        storage=step.setup.expert_storage or step.setup.dtype,
        streamed=step.setup.streamed_layers > 0,
        trains=run.training.experts,
        sequence_length=step.setup.sequence_length,
        memory_bytes=usable_bytes,
        num_examples=num_examples,
        training_s=training_s,
        upload_bytes=size_bytes,
        upload_bytes_per_s=line.up_bytes_per_s if line else None,
        upload_s=upload_seconds(size_bytes, line) if line else None,
        lora_rank=rank,
    )


def _open(
    config: JoinConfig,
    run: RunConfig,
    method: ExpertMethod,
    manifest: Manifest,
    cache: BlobCache,
    memory: ProcessMemory,
    device: DeviceMemory,
    progress: ProgressSink,
) -> tuple[MoeModel, PlanRequest, int]:
    """(the model without weights, what a plan is made from, number of examples), with the data read and encoded."""
    corpus = load_corpus(config.data, config.held_out_share, 0, config.fields)
    for note in corpus.notes():
        progress.message(note)
    host = OwnModel(cache.folder.parent / "model", device.torch_device)
    model = host.open(run, method, manifest, cache.ensure, progress)
    blocks = encode_examples(
        corpus.train, host.tokenizer, run.training.sequence_length,
        on_message=lambda note: progress.message(f"{corpus.source} {note}"),
    )  # fmt: skip
    compile_products(device.torch_device, model, run)
    memory.model_is_empty()
    progress.done()
    request = PlanRequest(run, method, manifest, model, blocks, FrameSource(), cache.ensure, progress)
    return model, request, len(blocks)


def _training_seconds(
    model: BenchModel,
    run: RunConfig,
    step: StepPlan,
    resident: int,
    trainable: int,
    neuron_share: float,
    reads_s: float,
    usable_bytes: int,
    torch_device: str,
    progress: ProgressSink,
) -> float | None:
    """Seconds of a round's local steps, measured with random weights; None, with a message, if that does not work.

    ``reads_s``: how long a step reads streamed experts. It is measured with the experts of two layers in memory.
    """
    setup = dataclasses.replace(step.setup, streamed_layers=0)
    if setup.offload:
        progress.message("the time of a round is not measured: experts are loaded when a token needs them")
        return None
    work = StepWork(
        resident=resident, trainable=trainable, batch_size=setup.batch_size, sequence_length=setup.sequence_length,
        memory_bytes=usable_bytes, limit_s=STEP_LIMIT_S, whole_below_bytes=WHOLE_BELOW_BYTES,
    )  # fmt: skip
    progress.phase("measure")
    try:
        sampling = Sampling(STEPS, limit_s=STEP_LIMIT_S)
        seconds = seconds_of_step(Stopwatch(torch_device), sampling, model, setup, work, neuron_share)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        free_memory(torch_device)
        progress.message(f"the time of a round is not measured: {first_line(error)[:160]}")
        return None
    finally:
        progress.done()
    return max(seconds, reads_s) * run.training.local_steps


def _upload_bytes(units: Sequence[UnitInfo], trained_share: float, method: ExpertMethod) -> int:
    """Bytes of an update with all trainable tensors and this share of the experts."""
    if not method.exchanges:
        return 0
    trained = [unit for unit in units if unit.trainable]
    experts = sum(unit.size_bytes for unit in trained if unit.kind == "expert")
    return round(trained_share * experts) + sum(unit.size_bytes for unit in trained if unit.kind != "expert")


def _measure_uplink(server: AggregatorClient, progress: ProgressSink) -> Line | None:
    """The rate to the server; None, with a message, if it does not let itself be measured."""
    progress.phase("network")
    try:
        rtt_ms = measure_connect(server.base_url).median_ms
        line = measure_line(server.probe_up)
    except (NetworkError, ProtocolError) as error:
        progress.message(f"the time of an upload is not measured: {explain(error, server.base_url)}")
        return None
    finally:
        progress.done()
    if not line.samples:
        progress.message("the time of an upload is not measured: the connection is too fast")
        return None
    rate = statistics.median(line.samples)
    progress.message(f"upload at {format_bytes(round(rate))}/s, {rtt_ms:.1f} ms to connect")
    return Line("measured", rate, rate, rtt_ms, basis="measured")


def _range(counts: Sequence[int]) -> str:
    """``7``, or ``7 to 8`` for layers that differ by what a division leaves."""
    return str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
