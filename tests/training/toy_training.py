"""Toy models with a plan applied, for the tests of this folder."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from edgefed.expert_records import ExpertPlan
from edgefed.moe.model import MoeModel
from edgefed.moe.units import MemorySource, TrainScope

sys.path.insert(0, str(Path(__file__).parents[1] / "moe"))
from toy_models import FAMILIES, MORE_FAMILIES, SINCE  # noqa: E402

KNOWN = {**FAMILIES, **MORE_FAMILIES}


def build(family: str, dtype: torch.dtype = torch.float32, **changes):
    """A random transformers model of a family, with ``changes`` to its configuration; None where it is too new."""
    import transformers

    if int(transformers.__version__.split(".")[1]) < SINCE.get(family, 0):
        return None
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**KNOWN[family], **changes})
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def make_device(family: str, folder: Path, scope: TrainScope, trainable, frozen=None, **changes) -> MoeModel | None:
    """A model with a plan in place, made from a checkpoint in ``folder``, in training mode."""
    module = build(family, **changes)
    if module is None:
        return None
    module.save_pretrained(folder)
    full = MoeModel.from_checkpoint(folder)
    units = {
        spec.key: {name: t.clone() for name, t in tensors.items()} for spec, tensors in full.iter_units(scope, seed=7)
    }
    model = MoeModel.skeleton(folder)
    for spec in model.unit_infos():
        if spec.kind != "expert":
            model.load_unit(spec.key, units[spec.key])
    layers = len(model.experts_per_layer)
    plan = ExpertPlan.of(model.experts_per_layer, [trainable] * layers, [frozen or []] * layers)
    model.apply_plan(plan, MemorySource(units), scope)
    model.module.train()
    return model


def batch(vocabulary: int = 96, rows: int = 2, length: int = 20, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, labels), the labels with holes at the front, in the middle and at the end."""
    ids = torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[0, : length // 3] = -100
    labels[1, length // 2 : length // 2 + 2] = -100
    labels[1, -1] = -100
    return ids, labels


def gradients_of(model: MoeModel) -> dict[str, torch.Tensor]:
    """Gradients by parameter name, copied; parameters without one are left out."""
    named = model.module.named_parameters()
    return {name: p.grad.detach().clone() for name, p in named if p.grad is not None}
