"""Families beyond the guaranteed six: each is loaded, reduced, trained, streamed and saved."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from edgefed.expert_records import ExpertPlan
from edgefed.moe.units import TrainScope

_spec = importlib.util.spec_from_file_location("_toy_models", Path(__file__).with_name("toy_models.py"))
_toy_models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_toy_models)

LORA = TrainScope(experts="lora", router="lora", attention="lora", lora_rank=2)


@pytest.mark.parametrize("family", _toy_models.MORE_FAMILIES)
def test_round_trip(family, toys, tmp_path):
    toy = toys(family)
    units = toy.units(LORA)
    model, source = toy.device(units)
    with model.streaming(source):
        torch.testing.assert_close(model.module(toy.input_ids).logits, toy.logits, rtol=1e-5, atol=2e-6)
    fixed = {key: tensors for key, tensors in units.items() if not key.endswith(":lora") and ".experts." not in key}
    for scope in (TrainScope(), LORA):
        model.apply_plan(ExpertPlan.full(model.experts_per_layer), source, scope)
        with torch.no_grad():
            torch.testing.assert_close(model.module(toy.input_ids).logits, toy.logits, rtol=1e-5, atol=2e-6)
        reduced = ExpertPlan.of(model.experts_per_layer, [[1, 3]] * len(model.layers), [[4]] * len(model.layers))
        model.apply_plan(reduced, source, scope)
        model.module.train()
        optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=0.02)
        losses = []
        for _ in range(3):
            loss = model.module(input_ids=toy.input_ids, labels=toy.input_ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        model.module.eval()
        for key, tensors in fixed.items():  # training changed routers in place
            model.load_unit(key, tensors)
    model.restore(source, LORA)
    model.module.save_pretrained(tmp_path)
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path)(toy.input_ids).logits
    torch.testing.assert_close(again, toy.logits, rtol=1e-5, atol=2e-6)
