"""Neuron alignment."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from edgefed.errors import UnsupportedArchitecture
from edgefed.expert_records import MergedGroup
from edgefed.moe.merged_cache import merge_experts
from edgefed.moe.merging.alignment import neuron_aligner, neuron_layout, permute_neurons


def expert(toy, layer, index=0):
    return toy.units()[layer.expert_key(index)]


def shuffled(layer, tensors, seed=0):
    layout = neuron_layout(layer)
    size = tensors["down_proj"].shape[0 if layer.is_transposed else 1]
    return permute_neurons(layout, tensors, torch.randperm(size, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("family", ["nemotron_h"])
def test_ungated_experts_are_aligned_too(toys, family):
    check_undone(toys(family))


def test_a_permutation_is_undone_exactly(toy):
    check_undone(toy)


def check_undone(toy):
    model = toy.full()
    layer = model.layers[0]
    tensors = expert(toy, layer)
    mixed = shuffled(layer, tensors)
    assert not torch.equal(mixed["down_proj"], tensors["down_proj"])
    restored = neuron_aligner(model.layers)(tensors, mixed)
    assert set(restored) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(restored[name], tensor), name
    averaged = merge_experts(
        [tensors, mixed].__getitem__, MergedGroup((0, 1), (0.75, 0.25)), neuron_aligner(model.layers)
    )
    for name, tensor in tensors.items():
        torch.testing.assert_close(averaged[name], tensor)


def test_a_shuffled_expert_computes_the_same(toy):
    """The permutation moves gate, up, down and bias together: also with interleaved gate and up rows."""
    model = toy.full()
    layer = model.layers[0]
    path = layer.experts
    x = torch.randn(5, layer.input_output_sizes(layer.matrices[0])[0], generator=torch.Generator().manual_seed(1))
    indices, weights = torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1)
    with torch.no_grad():
        before = path(x, indices, weights)
        for name, value in shuffled(layer, expert(toy, layer)).items():
            getattr(path, name)[0].copy_(value)
        after = path(x, indices, weights)
    assert before.abs().max() > 1e-4
    torch.testing.assert_close(after, before)


def test_layouts_are_measured(toys):
    assert neuron_layout(toys("olmoe").full().layers[0]).gate == "halves"
    layout = neuron_layout(toys("gpt_oss").full().layers[0])
    assert (layout.gate, layout.is_transposed) == ("neighbours", True)
    assert neuron_layout(toys("nemotron_h").full().layers[0]).gate == "none"


def test_alignment_never_moves_experts_apart(olmoe):
    model = olmoe.full()
    a, b = expert(olmoe, model.layers[0], 0), expert(olmoe, model.layers[0], 1)
    aligned = neuron_aligner(model.layers)(a, b)

    def distance(member):
        return sum((a[name] - member[name]).square().sum().item() for name in a)

    assert distance(aligned) < distance(b)


def test_gating_that_mixes_neurons_is_refused(olmoe):
    layer = olmoe.full().layers[0]
    layer.experts._apply_gate = lambda rows: rows.cumsum(-1)[:, ::2]
    with pytest.raises(UnsupportedArchitecture, match="cannot be aligned"):
        neuron_aligner([layer])
    other = dataclasses.replace(olmoe.full().layers[0], is_transposed=True)
    with pytest.raises(UnsupportedArchitecture, match="same layout"):
        neuron_aligner([olmoe.full().layers[0], other])
