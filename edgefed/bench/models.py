"""The model that speed is measured with: its real width, with as many layers as memory and time allow.

Weights are random: they take the same time as trained ones and need no download. Only the packaged tiny model has its
real weights, so it is measured with the choices of its trained routers.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

from edgefed.costs.shapes import KNOWN_SHAPES, ModelShape
from edgefed.embedded import TINY, resolve_model
from edgefed.errors import UnsupportedArchitecture
from edgefed.expert_records import ExpertPlan, Role
from edgefed.moe.loading import load_config
from edgefed.moe.model import MoeModel
from edgefed.moe.model_shape import shape_from_config
from edgefed.moe.units import ExpertSource, MemorySource, TrainScope
from edgefed.protocol.messages import UnitInfo
from edgefed.training.encoding import TokenBlocks

_QWEN = dict(vocab_size=151936, num_attention_heads=16, num_key_value_heads=16)
KNOWN_CONFIGS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "OLMoE-1B-7B": ("olmoe", dict(
        hidden_size=2048, intermediate_size=1024, num_hidden_layers=16, num_attention_heads=16, num_key_value_heads=16,
        vocab_size=50304, num_experts=64, num_experts_per_tok=8,
    )),
    "Qwen1.5-MoE-A2.7B": ("qwen2_moe", dict(
        _QWEN, hidden_size=2048, moe_intermediate_size=1408, shared_expert_intermediate_size=5632,
        intermediate_size=5632, num_hidden_layers=24, num_experts=60, num_experts_per_tok=4,
    )),
    "gpt-oss-20b": ("gpt_oss", dict(
        hidden_size=2880, intermediate_size=2880, num_hidden_layers=24, num_attention_heads=64, num_key_value_heads=8,
        head_dim=64, vocab_size=201088, num_local_experts=32, num_experts_per_tok=4,
    )),
    "Qwen3-30B-A3B": ("qwen3_moe", dict(
        hidden_size=2048, moe_intermediate_size=768, intermediate_size=6144, num_hidden_layers=48,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, vocab_size=151936, num_experts=128,
        num_experts_per_tok=8, norm_topk_prob=True,
    )),
    "Mixtral-8x7B": ("mixtral", dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=32000, num_local_experts=8, num_experts_per_tok=2,
    )),
}  # fmt: skip
"""Values of their config.json that differ from their class's defaults: a model is measured without a download."""


@dataclasses.dataclass(frozen=True)
class BenchModel:
    """A model to measure. ``shape`` is that of the whole model; only the packaged model has weights in ``folder``."""

    name: str
    config: Any
    shape: ModelShape
    folder: str | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its checkpoint."""
        dtype = getattr(self.config, "dtype", None) or getattr(self.config.get_text_config(), "dtype", None)
        return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.bfloat16


def known_name(name: str | Path) -> str | None:
    """Return the well-known model called ``name`` in any case, None if there is none."""
    return next((known for known in KNOWN_SHAPES if known.lower() == str(name).lower()), None)


def find_model(name: str | Path) -> BenchModel:
    """Find a model: ``tiny``, a well-known name, a directory with a config.json, or a Hugging Face Hub id.

    Only the configuration of a directory or Hub model is read. Raises ModelNotFound, CheckpointError,
    UnsupportedArchitecture.
    """
    known = known_name(name)
    if known is not None:
        kind, values = KNOWN_CONFIGS[known]
        return BenchModel(known, AutoConfig.for_model(kind, dtype="bfloat16", **values), KNOWN_SHAPES[known])
    source = resolve_model(name)
    config = load_config(source)
    label = Path(name).name or str(name)
    return BenchModel(label, config, shape_from_config(config, label), source if str(name) == TINY else None)


def shortened(config: Any, layers: int) -> Any:
    """Copy a configuration with only its first ``layers`` decoder layers; lists with one entry per layer are cut."""
    short = copy.deepcopy(config)
    text = short.get_text_config()
    depth = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, (list, tuple)) and len(value) == depth and name != "architectures":
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    return short


def first_moe_layer(shape: ModelShape) -> int:
    """Return the index of the first decoder layer with experts."""
    return next(index for index, layer in enumerate(shape.layers) if layer.num_experts)


class RandomUnits:
    """An `edgefed.moe.units.ExpertSource` of random weights. Experts share their tensors, which the bank copies."""

    def __init__(self, units: list[UnitInfo], dtype: torch.dtype):
        self._units = {unit.key: unit for unit in units}
        self._dtype = dtype
        self._made: dict[tuple[tuple[int, ...], torch.dtype], torch.Tensor] = {}

    def read(self, unit_key: str) -> dict[str, torch.Tensor]:
        """Return a unit's tensors: matrices with entries of about 0.02, vectors of ones (norms) or zeros (biases)."""
        infos = self._units[unit_key].tensors
        return {info.name: self._tensor(info.name, info.dtype, tuple(info.shape), unit_key) for info in infos}

    def _tensor(self, name: str, dtype: str, shape: tuple[int, ...], key: str) -> torch.Tensor:
        kind = getattr(torch, _DTYPES[dtype])
        if not kind.is_floating_point:
            return torch.zeros(shape, dtype=kind)
        if len(shape) < 2:
            return torch.ones(shape, dtype=kind) if "norm" in f"{key}.{name}" else torch.zeros(shape, dtype=kind)
        if (shape, kind) not in self._made:
            generator = torch.Generator().manual_seed(len(self._made))
            self._made[shape, kind] = torch.empty(shape, dtype=kind).uniform_(-0.035, 0.035, generator=generator)
        return self._made[shape, kind]


_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


def build_model(
    model: BenchModel,
    layers: int,
    resident: int,
    trainable: int,
    scope: TrainScope,
    device: torch.device,
    *,
    storage: str | None = None,
    neuron_share: float = 1.0,
) -> tuple[MoeModel, ExpertPlan, ExpertSource]:
    """Build the first ``layers`` layers on ``device``: ``resident`` experts each, the first ``trainable`` trainable.

    ``storage``: as `MoeModel.apply_plan` takes it. ``neuron_share``: of its neurons that each resident expert has.
    Returns (model, plan, source of its experts). Raises UnsupportedArchitecture, and the errors of allocations.
    """
    if model.folder is not None and layers == len(model.shape.layers):
        moe = MoeModel.from_checkpoint(model.folder, device=device)
        units = moe.iter_units(scope) if scope.uses_lora else moe.iter_units()
        source: ExpertSource = MemorySource({spec.key: tensors for spec, tensors in units})
    else:
        with tempfile.TemporaryDirectory(prefix="edgefed-bench-") as folder:
            shortened(model.config, layers).save_pretrained(folder)
            moe = MoeModel.skeleton(folder, model.dtype, device)
        specs = moe.unit_infos(scope)
        source = RandomUnits(specs, model.dtype)
        for spec in specs:
            if spec.kind != "expert" and not spec.key.endswith(":lora"):
                moe.load_unit(spec.key, source.read(spec.key))
    if not moe.layers:
        raise UnsupportedArchitecture(f"the first {layers} layers of {model.name} have no experts")
    counts = [(min(resident, experts), min(trainable, resident, experts)) for experts in moe.experts_per_layer]
    plan = ExpertPlan.of(
        moe.experts_per_layer,
        trainable=[range(some) for _, some in counts],
        frozen=[range(some, most) for most, some in counts],
    )
    if neuron_share < 1.0:
        widths = [max(1, round(neuron_share * layer.num_neurons)) for layer in moe.layers]
        masks = (
            np.logical_and.outer(roles != Role.ABSENT, np.arange(layer.num_neurons) < width)
            for roles, layer, width in zip(plan.roles, moe.layers, widths, strict=True)
        )
        plan = ExpertPlan(plan.roles, neurons=tuple(masks))
    moe.apply_plan(plan, source, scope, storage=storage)
    return moe, plan, source


def random_blocks(vocab_size: int, blocks: int, sequence_length: int) -> TokenBlocks:
    """Return fixed synthetic tokens (blocks, sequence_length), all with labels."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab_size, (blocks, sequence_length), generator=generator)
    return TokenBlocks(ids, ids.clone())
