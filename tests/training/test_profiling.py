"""Every kind of profile pass gives the profile of the full model in memory, with the documented number of reads."""

from __future__ import annotations

import dataclasses
import gc
import sys
import threading
import weakref
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from edgefed.errors import CheckpointError, ConfigError
from edgefed.expert_records import ActivationProfile, LayerProfile
from edgefed.kernels.quantization import dequantize_experts, quantize_experts
from edgefed.moe import lockstep
from edgefed.moe.architecture import discover_layers
from edgefed.moe.bank import ExpertBank
from edgefed.moe.model import MoeModel
from edgefed.moe.units import MemorySource, TrainScope
from edgefed.training.encoding import TokenBlocks
from edgefed.training.profiling import (
    NUM_GROUPS,
    ProfilePass,
    activation_error,
    profile_blocks,
    top_k_agreement,
)

sys.path.insert(0, str(Path(__file__).parent))
import toy_training  # noqa: E402

FIELDS = [f.name for f in dataclasses.fields(LayerProfile) if f.name != "num_tokens"]
BATCHES, ROWS, LENGTH = 4, 4, 12
PASSES = [
    ProfilePass("expert", None, ROWS, 1),
    ProfilePass("layer", None, ROWS, 0),
    ProfilePass("layer", None, ROWS, 3),
    ProfilePass("all", None, ROWS, 1),
    ProfilePass("layer", None, 1, 0),
]


class CountingSource(MemorySource):
    def __init__(self, units):
        super().__init__(units)
        self.reads = Counter()

    def read(self, unit_key):
        self.reads[unit_key] += 1
        return super().read(unit_key)


def make(family, scope=None, **changes):
    """(full model, its units, blocks of text of which the last batch is smaller)."""
    module = toy_training.build(family, **changes)
    if module is None:
        pytest.skip(f"this transformers has no {family} with an experts interface")
    model = MoeModel(module, discover_layers(module), device=torch.device("cpu"))
    units = {s.key: {n: t.clone() for n, t in ts.items()} for s, ts in model.iter_units(scope, seed=7)}
    ids = torch.randint(3, 96, (BATCHES * ROWS - 1, LENGTH), generator=torch.Generator().manual_seed(3))
    return model, units, TokenBlocks(ids, ids)


def assert_same(record, expected, rtol=1e-6):
    for found, real in zip(record.layers, expected.layers, strict=True):
        assert found.num_tokens == real.num_tokens == (BATCHES * ROWS - 1) * LENGTH
        for name in FIELDS:
            a, b = getattr(found, name), getattr(real, name)
            assert (a is None) == (b is None), name
            if a is not None:
                np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("family", list(toy_training.KNOWN))
def test_every_pass_records_the_same(family):
    model, units, blocks = make(family)
    expected = profile_blocks(model, blocks, profile_pass=ProfilePass(batch_size=ROWS), attention=True)
    model.drop_experts()
    for profile_pass in PASSES:
        record = profile_blocks(model, blocks, MemorySource(units), profile_pass, attention=True)
        assert_same(record, expected, rtol=1e-5)
        assert all(layer.attention_sum.any() for layer in record.layers)


@pytest.mark.parametrize("storage", ["int8", "nf4"])
@pytest.mark.parametrize("family", list(toy_training.FAMILIES))
def test_quantized_experts_give_the_profile_of_their_dequantized_values(family, storage):
    """The same as with every matrix replaced by its dequantized values (int8 products also round their inputs)."""
    model, units, blocks = make(family)
    stored = {
        key: {n: dequantize_experts(quantize_experts(t, storage)) if t.ndim == 2 else t for n, t in tensors.items()}
        if ".experts." in key
        else tensors
        for key, tensors in units.items()
    }
    plain = profile_blocks(model, blocks, MemorySource(units), ProfilePass("all"))
    expected = profile_blocks(model, blocks, MemorySource(stored), ProfilePass("all"))
    for residency in ("layer", "all"):
        record = profile_blocks(model, blocks, MemorySource(units), ProfilePass(residency, storage, ROWS, 0))
        for found, real, other in zip(record.layers, expected.layers, plain.layers, strict=True):
            np.testing.assert_allclose(found.gate_sum, real.gate_sum, rtol=2e-2 if storage == "int8" else 1e-5)
            if found is record.layers[-1]:
                assert not np.allclose(found.gate_sum, other.gate_sum, rtol=1e-7)


@pytest.mark.parametrize("storage", [None, "int8", "nf4"])
def test_each_expert_is_read_once_whatever_the_batches(storage):
    model, units, blocks = make("olmoe")
    model.drop_experts()
    for profile_pass, reads in (
        (ProfilePass("layer", storage, ROWS, 0), 1),
        (ProfilePass("layer", storage, 1, 0), 1),
        (ProfilePass("all", storage, 1, 1), 1),
        (ProfilePass("layer", storage, ROWS, 2), 2),
        (ProfilePass("layer", storage, ROWS, 1), BATCHES),
    ):
        source = CountingSource(units)
        profile_blocks(model, blocks, source, profile_pass)
        assert set(source.reads.values()) == {reads}, profile_pass
        assert len(source.reads) == 16, profile_pass


def test_only_one_layer_is_resident_at_a_time(monkeypatch):
    """No other layer has experts in memory when those of a layer are read."""
    model, units, blocks = make("mixtral", num_hidden_layers=4)
    model.drop_experts()
    made, alive = [], []

    class Watched(ExpertBank):
        def __init__(self, *args, **options):
            gc.collect()
            alive.append(sum(bank() is not None for bank in made))
            made.append(weakref.ref(self))
            super().__init__(*args, **options)

    monkeypatch.setattr(lockstep, "ExpertBank", Watched)
    profile_blocks(model, blocks, MemorySource(units), ProfilePass("layer", "nf4", ROWS, 0))
    gc.collect()
    assert alive == [0, 0, 0, 0]
    assert not any(bank() is not None for bank in made)


def test_adapters_are_part_of_the_profile():
    scope = TrainScope(experts="lora", router="none", lora_rank=2)
    model, units, blocks = make("olmoe", scope)
    for key, tensors in units.items():
        if key.endswith(":lora"):
            for name, tensor in tensors.items():
                tensor.uniform_(-0.3, 0.3, generator=torch.Generator().manual_seed(len(key + name)))
    base = profile_blocks(model, blocks, MemorySource(units), ProfilePass("all"))
    expected = profile_blocks(model, blocks, MemorySource(units), PASSES[0], scope=scope)
    assert activation_error(expected, base) > 0
    for profile_pass in PASSES[1:]:
        assert_same(profile_blocks(model, blocks, MemorySource(units), profile_pass, scope=scope), expected, rtol=1e-5)


def test_progress_adds_up():
    model, units, blocks = make("olmoe")
    for profile_pass in PASSES:
        done = []
        profile_blocks(model, blocks, MemorySource(units), profile_pass, on_batch=done.append)
        assert sum(done) == blocks.num_tokens
        assert all(tokens >= 0 for tokens in done)
        assert len(done) > 1


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "edgefed-lockstep"]


@pytest.mark.parametrize("profile_pass", PASSES)
def test_a_missing_expert_is_an_error_and_leaves_no_thread(profile_pass):
    model, units, blocks = make("olmoe")
    expected = profile_blocks(model, blocks, MemorySource(units), profile_pass)
    key = model.layers[1].expert_key(int(np.argmax(expected.layers[1].tokens_per_expert)))
    model.drop_experts()
    with pytest.raises(CheckpointError, match=f"'{key}' not found"):
        profile_blocks(
            model, blocks, MemorySource({k: t for k, t in units.items() if k != key}), profile_pass, attention=True
        )
    assert not threads()
    assert_same(profile_blocks(model, blocks, MemorySource(units), profile_pass), expected)


def test_the_callback_may_stop_the_pass():
    model, units, blocks = make("olmoe")

    class Stop(Exception):
        pass

    def stop(tokens):
        raise Stop

    for profile_pass in PASSES:
        with pytest.raises(Stop):
            profile_blocks(model, blocks, MemorySource(units), profile_pass, on_batch=stop)
        assert not threads()


@pytest.mark.parametrize("profile_pass", [PASSES[0], PASSES[2], PASSES[4]])
def test_energies_are_recorded_in_groups_of_batches(profile_pass):
    model, units, blocks = make("olmoe")
    source, calls = MemorySource(units), []

    def enough(parts):
        calls.append([part.layers[1].neuron_energy.copy() for part in parts])
        return 8

    whole = profile_blocks(model, blocks, source, profile_pass, neurons=True)
    staged = profile_blocks(model, blocks, source, profile_pass, neurons=True, enough=enough)
    assert_same(staged, whole)
    batches = [-(-min(8, len(blocks) - first) // profile_pass.batch_size) for first in (0, 8)]
    assert [len(groups) for groups in calls] == [0, batches[0], min(NUM_GROUPS, sum(batches))]
    np.testing.assert_allclose(sum(calls[-1]), whole.layers[1].neuron_energy, rtol=1e-5)
    assert all(group.any() for group in calls[-1])


def test_weights_that_cannot_be_quantized_are_refused():
    model, units, blocks = make("olmoe")
    key = model.layers[0].expert_key(3)
    units[key]["down_proj"][0, 0] = torch.inf
    with pytest.raises(CheckpointError, match=f"'down_proj' of '{key}' cannot be stored as nf4"):
        profile_blocks(model, blocks, MemorySource(units), ProfilePass("layer", "nf4", ROWS, 0))
    with pytest.raises(ConfigError, match="read one at a time cannot be stored as nf4"):
        profile_blocks(model, blocks, MemorySource(units), ProfilePass("expert", "nf4", ROWS, 0))
    with pytest.raises(ConfigError, match="invalid storage format of experts 'int4'"):
        profile_blocks(model, blocks, MemorySource(units), ProfilePass("all", "int4", ROWS, 0))
    with pytest.raises(ConfigError, match="residency of a streamed model must be .*; found 'disk'"):
        profile_blocks(model, blocks, MemorySource(units), ProfilePass("disk"))


def test_layers_without_attention_are_reported():
    model, units, blocks = make("jamba")
    messages = []
    profile_blocks(model, blocks, MemorySource(units), PASSES[1], attention=True, on_message=messages.append)
    assert len(messages) == 1
    assert messages[0].startswith("attention: no attention matrix before model.layers.0.feed_forward.experts")


def record(*frequencies):
    layers = []
    for values in frequencies:
        counts = np.array(values, dtype=np.float64)
        layers.append(LayerProfile(10, counts, counts, counts, -counts, -counts, counts))
    return ActivationProfile(tuple(layers))


def test_errors_by_hand():
    truth = record([10, 5, 0, 5], [2, 2, 8, 8])
    estimate = record([5, 5, 5, 5], [2, 4, 8, 6])
    # Layer 0: |5-10|/10, 0, (unused), 0 -> 0.5/3. Layer 1: 0, 1, 0, 0.25 -> 1.25/4.
    assert activation_error(estimate, truth) == pytest.approx((0.5 / 3 + 1.25 / 4) / 2)
    assert activation_error(truth, truth) == 0
    assert top_k_agreement(truth, truth) == 1
    # Two experts a token. Layer 0: {0, 1} against {0, 1}; layer 1: {2, 3} against {2, 3}.
    assert top_k_agreement(estimate, truth) == 1
    assert top_k_agreement(record([1, 9, 9, 1], [9, 9, 1, 1]), truth) == pytest.approx((0.5 + 0) / 2)
    assert top_k_agreement(record([1, 9, 9, 1], [9, 9, 1, 1]), truth, count=3) == pytest.approx((2 / 3 + 2 / 3) / 2)
    with pytest.raises(ValueError, match="records of layers with"):
        activation_error(record([1, 2]), truth)
    empty = dataclasses.replace(truth.layers[0], num_tokens=0)
    with pytest.raises(ValueError, match="no token"):
        activation_error(ActivationProfile((empty,)), ActivationProfile((empty,)))
