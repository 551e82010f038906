"""What one device does with a model: `plan` its memory, `profile` its router, and train some of its `experts`."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from edgefed.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from edgefed.costs.shapes import ModelShape
    from edgefed.expert_records import ActivationProfile, ExpertPlan
    from edgefed.moe.model import MoeModel
    from edgefed.moe.units import ExpertSource
    from edgefed.progress import ProgressSink
    from edgefed.training.profiling import ProfilePass
    from edgefed.training.records import RecordFields


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a model trains within a memory limit.

    ``experts``: which experts are resident, and which of them train. ``peak_bytes``: predicted peak of a training step,
    at most ``memory_bytes``. ``savings``: how a step saves memory, one sentence each. ``parts``: the peak in bytes, by
    purpose.
    """

    model: str
    experts: ExpertPlan
    memory_bytes: int
    peak_bytes: int
    savings: tuple[str, ...]
    parts: dict[str, int]
    sequence_length: int
    expert_storage: str | None
    checkpointing: bool

    @property
    def num_resident(self) -> int:
        """Experts in memory, over all layers."""
        return self.experts.num_resident

    @property
    def num_trainable(self) -> int:
        """Experts that train, over all layers."""
        return self.experts.num_trainable

    def __str__(self) -> str:
        from edgefed.hardware.memory import format_bytes

        total = sum(self.experts.experts_per_layer)
        lines = [
            f"{self.model}: {self.num_resident} of {total} experts resident, {self.num_trainable} trainable",
            f"predicted peak {format_bytes(self.peak_bytes)} of {format_bytes(self.memory_bytes)}",
            *self.savings,
        ]
        return "\n".join(lines)


def plan(
    model: str | Path | PreTrainedModel,
    memory: str | int,
    *,
    profile: ActivationProfile | None = None,
    lora: int | None = None,
    batch_size: int = 8,
    sequence_length: int = 128,
    device: str = "cpu",
) -> Plan:
    """Decide which experts of a model a device keeps and trains within ``memory``. Loads no weights.

    >>> import edgefed
    >>> plan = edgefed.plan("OLMoE-1B-7B", memory="8GiB", batch_size=1)
    >>> 16 <= plan.num_trainable <= plan.num_resident <= 16 * 64
    True
    >>> plan.peak_bytes <= plan.memory_bytes == 8 * 2**30
    True

    ``model``: a model that `edgefed bench` knows, a checkpoint folder, a hub id, or a transformers model. ``memory``:
    limit for tensors, e.g. "8GiB" or bytes. ``profile``: the most frequently used experts of each layer are chosen;
    None: the first ones. ``lora``: rank of adapters to train; None: experts train in full. ``device``: "cpu" or "cuda".

    Raises BudgetTooSmall when not even one expert per layer fits, ConfigError, ModelNotFound, UnsupportedArchitecture.
    """
    from edgefed.costs.fallbacks import fit
    from edgefed.costs.memory import training_memory
    from edgefed.costs.price import LossPrice
    from edgefed.costs.search import FallbackSearch
    from edgefed.costs.step_setup import StepPlan, StepSetup
    from edgefed.hardware.memory import parse_bytes

    memory_bytes = parse_bytes(str(memory))
    shape, dtype, name = _shape_of(model)
    sizes = shape.experts_per_layer
    if profile is not None and profile.experts_per_layer != sizes:
        raise ConfigError(f"the profile has layers of {profile.experts_per_layer} experts, {name} of {sizes}")
    setup = StepSetup(
        batch_size=batch_size, sequence_length=sequence_length, dtype=dtype, experts="lora" if lora else "full",
        router="none", lora_rank=lora or 8, device=device, kernels=_kernels(dtype, device),
    )  # fmt: skip

    def layout(resident: int, trainable: int) -> ExpertPlan:
        return _most_used(sizes, profile, resident, trainable)

    search = FallbackSearch(
        estimate=lambda case, resident, trainable: training_memory(shape, case, resident, trainable),
        layout=layout,
        price=LossPrice.of(profile, sizes, sequence_length),
        num_layers=len(sizes),
        run_sequence_length=sequence_length,
        problems={},
    )
    step, fallbacks = fit(search, StepPlan(setup, sum(sizes), sum(sizes)), memory_bytes)
    estimate = search.memory(step)
    return Plan(
        model=name,
        experts=search.layout(step.resident, step.trainable),
        memory_bytes=memory_bytes,
        peak_bytes=estimate.total_bytes,
        savings=tuple(fallback.sentence for fallback in fallbacks),
        parts=dict(estimate.parts),
        sequence_length=step.setup.sequence_length,
        expert_storage=step.setup.expert_storage,
        checkpointing=step.setup.checkpointing,
    )


def profile(
    model: str | Path | PreTrainedModel,
    data: str | Path | Iterable[Mapping[str, Any]],
    *,
    tokens: int = 16384,
    sequence_length: int = 128,
    batch_size: int = 8,
    storage: Literal["full", "int8", "nf4"] = "full",
    attention: bool = False,
    memory: str | int | None = None,
    fields: RecordFields | None = None,
    max_records: int | None = None,
    max_bytes: str | int | None = None,
    progress: ProgressSink | None = None,
) -> ActivationProfile:
    """Run text through a model and record which experts its router chooses.

    >>> import edgefed
    >>> profile = edgefed.profile("tiny", "silo:http", tokens=512)
    >>> profile.num_tokens, profile.experts_per_layer
    (512, (16, 16, 16, 16))
    >>> busiest = profile.layers[0].tokens_per_expert.argmax()

    ``model``: "tiny", a checkpoint folder, a hub id, or a transformers model. ``data``, ``fields``, ``max_records``,
    ``max_bytes``: as `Client` takes them; an iterable of records is written to a temporary file. ``tokens``: most to
    read, 0 for all. ``storage``: experts as they are, or quantized, which needs less memory. ``attention``: also record
    the attention that the tokens of each expert receive. ``memory``: bytes, or a text like "8GiB"; None is what is
    available. A checkpoint that does not fit is read layer by layer, or expert by expert.

    Raises DataError, ModelNotFound, CheckpointError, UnsupportedArchitecture.
    """
    from edgefed.embedded import resolve_model
    from edgefed.hardware.memory import set_up_allocator
    from edgefed.hub import check_source
    from edgefed.progress import NullProgress
    from edgefed.training.data import load_corpus
    from edgefed.training.records import AUTOMATIC
    from edgefed.training.spool import SPOOL_FILE, check_limits, spool_records

    sink = progress or NullProgress()
    check_limits(data, max_records, max_bytes)
    if not isinstance(data, (str, Path)):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, SPOOL_FILE)
            spool_records(data, path, fields or AUTOMATIC, max_records, max_bytes, sink)
            return profile(
                model, path, tokens=tokens, sequence_length=sequence_length, batch_size=batch_size, storage=storage,
                attention=attention, memory=memory, fields=fields, progress=progress,
            )  # fmt: skip
    set_up_allocator()
    if isinstance(model, (str, Path)) and (note := check_source(resolve_model(model))):
        sink.message(note)
    # Before torch is loaded: a bad file is reported at once.
    corpus = load_corpus(str(data), 0.0, 0, fields or AUTOMATIC)
    from edgefed.training.encoding import encode_examples
    from edgefed.training.profiling import profile_blocks, spread_blocks
    from edgefed.training.tokenizer import check_vocabulary, load_tokenizer

    for note in corpus.notes():
        sink.message(note)
    sink.phase("load")
    moe, units, profile_pass, source = _profiled_model(model, storage, batch_size, sequence_length, memory)
    tokenizer = load_tokenizer(source)
    embeddings = moe.module.get_input_embeddings()
    check_vocabulary(tokenizer, cast("torch.nn.Embedding", embeddings).num_embeddings, source)
    encoded = encode_examples(
        corpus.train, tokenizer, sequence_length, on_message=lambda note: sink.message(f"{data} {note}")
    )
    blocks = spread_blocks(encoded, tokens)
    sink.phase("profile", total=blocks.num_tokens, unit="token")
    notes: list[str] = []
    record = profile_blocks(
        moe, blocks, units, profile_pass, attention=attention, on_batch=sink.advance, on_message=notes.append
    )
    sink.done()
    for note in notes:
        sink.message(note)
    return record


@contextlib.contextmanager
def experts(
    model: PreTrainedModel,
    plan: Plan | ExpertPlan,
    *,
    lora: int | None = None,
    lora_alpha: float | None = None,
    lora_scaling: Literal["standard", "rank_stabilized"] = "standard",
    router: Literal["full", "none"] = "none",
    missing: Literal["renormalize", "skip"] = "renormalize",
    seed: int = 0,
) -> Iterator[PreTrainedModel]:
    """Within this context, a transformers model has only the experts of a plan, and trains with edgefed's kernels.

    >>> import edgefed, torch
    >>> from transformers import AutoModelForCausalLM
    >>> from edgefed.embedded import tiny_model_directory
    >>> model = AutoModelForCausalLM.from_pretrained(tiny_model_directory())
    >>> plan = edgefed.plan(model, memory="100MiB", lora=8)
    >>> with edgefed.experts(model, plan, lora=8):
    ...     optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ...     for input_ids in torch.randint(0, 256, (2, 1, 32)):
    ...         model(input_ids=input_ids, labels=input_ids).loss.backward()
    ...         optimizer.step()
    ...         optimizer.zero_grad()
    >>> model.save_pretrained("trained")                                                  # doctest: +SKIP

    Tokens routed to an absent expert go to the next best resident one, or nowhere with ``missing="skip"``. ``lora``:
    rank of adapters on the trainable experts; None: they train in full. ``lora_scaling``: their factor, alpha / rank or
    alpha / sqrt(rank). On exit the model is complete again, with what
    was trained; adapters are merged into the weights. Absent experts stay in memory until then.

    Raises ConfigError when the plan is for another model, UnsupportedArchitecture.
    """
    from edgefed.moe.units import MemorySource, TrainScope

    chosen = plan.experts if isinstance(plan, Plan) else plan
    storage = plan.expert_storage if isinstance(plan, Plan) else None
    moe, _ = _moe_model(model)
    rank = lora or 8
    scope = TrainScope(
        experts="lora" if lora else "full", router=router, attention="none", lora_rank=rank,
        lora_alpha=TrainScope.lora_alpha if lora_alpha is None else lora_alpha, lora_scaling=lora_scaling,
    )  # fmt: skip
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    units = {spec.key: dict(tensors) for spec, tensors in moe.iter_units(scope, seed=seed)}
    try:
        moe.apply_plan(chosen, MemorySource(units), scope, missing, storage)
        yield model
    finally:
        if moe.plan is not None:
            units |= {spec.key: dict(tensors) for spec, tensors in moe.trained_units()}
        moe.restore(MemorySource(units), scope)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)


def _profiled_model(
    model: str | Path | PreTrainedModel, storage: str, batch_size: int, sequence_length: int, memory: str | int | None
) -> tuple[MoeModel, ExpertSource | None, ProfilePass, str]:
    """(model, source of its experts or None if they are in memory, how to profile, where its tokenizer is)."""
    from edgefed.embedded import resolve_model
    from edgefed.hardware.memory import available_memory_bytes, parse_bytes
    from edgefed.moe.model import MoeModel
    from edgefed.moe.units import MemorySource
    from edgefed.training.profiling import ProfilePass

    quantized = None if storage == "full" else storage
    if not isinstance(model, (str, Path)):
        moe, source = _moe_model(model)
        if quantized is None:
            return moe, None, ProfilePass(batch_size=batch_size), source
        experts = MemorySource({unit.key: tensors for unit, tensors in moe.iter_units() if unit.kind == "expert"})
        moe.drop_experts()
        return moe, experts, ProfilePass("layer", quantized, batch_size, 1), source
    source = resolve_model(model)
    moe, checkpoint = MoeModel.streamed(source)
    free = available_memory_bytes() if memory is None else parse_bytes(str(memory))
    free -= moe.memory_bytes()["dense"]
    layers = [layer.num_experts * layer.bytes_per_expert for layer in moe.layers]
    if quantized is None and 2 * sum(layers) <= free:  # transformers joins the experts of a layer, which takes copies
        return MoeModel.from_checkpoint(source), None, ProfilePass(batch_size=batch_size), source
    if quantized is None and 2 * max(layers) > free:
        return moe, checkpoint, ProfilePass("expert", None, batch_size, 1), source
    hidden_bytes = batch_size * sequence_length * moe.config.get_text_config().hidden_size * 4
    concurrent = max(1, free // 8 // (4 * hidden_bytes))  # a waiting batch keeps a few tensors of hidden states
    return moe, checkpoint, ProfilePass("layer", quantized, batch_size, concurrent), source


def _moe_model(model: str | Path | PreTrainedModel) -> tuple[MoeModel, str]:
    """(a `MoeModel` of it, where its tokenizer is)."""
    from edgefed.embedded import resolve_model
    from edgefed.moe.architecture import discover_layers
    from edgefed.moe.model import MoeModel

    if isinstance(model, (str, Path)):
        source = resolve_model(model)
        return MoeModel.from_checkpoint(source), source
    return MoeModel(model, discover_layers(model), device=model.device), model.name_or_path or ""


def _shape_of(model: str | Path | PreTrainedModel) -> tuple[ModelShape, str, str]:
    """(shape, dtype name, label)."""
    from edgefed.bench.models import find_model
    from edgefed.moe.model_shape import shape_from_config

    if isinstance(model, (str, Path)):
        found = find_model(model)
        return found.shape, str(found.dtype).removeprefix("torch."), found.name
    name = Path(model.name_or_path or "").name or type(model).__name__
    return shape_from_config(model.config, name), str(model.dtype).removeprefix("torch."), name


def _kernels(dtype: str, device: str) -> str:
    import torch

    from edgefed.bench.planning import planned_kernels

    return planned_kernels(device.partition(":")[0], getattr(torch, dtype))


def _most_used(sizes: Sequence[int], profile: ActivationProfile | None, resident: int, trainable: int) -> ExpertPlan:
    """The plan with so many resident and trainable experts, the most frequently used ones first."""
    import numpy as np

    from edgefed.expert_records import ExpertPlan
    from edgefed.methods.averaging import select_by_score

    if profile is None:
        scores = [-np.arange(count, dtype=np.float64) for count in sizes]
    else:
        scores = [layer.frequency for layer in profile.layers]
    everything = [np.ones(count, dtype=bool) for count in sizes]
    kept = select_by_score(scores, everything, resident)
    here = [np.isin(np.arange(count), ids) for count, ids in zip(sizes, kept, strict=True)]
    trained = select_by_score(scores, here, trainable)
    frozen = [sorted(set(map(int, ids)) - set(map(int, own))) for ids, own in zip(kept, trained, strict=True)]
    return ExpertPlan.of(sizes, [list(map(int, own)) for own in trained], frozen)
