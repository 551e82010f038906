"""K-means over all layers at once, principal components, sketches."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgefed.moe.merging.clustering import cluster_layers, expert_embeddings, principal_components, sketch_layer
from edgefed.moe.units import MemorySource


def cost(points, labels, weights=None):
    weights = np.ones(len(points)) if weights is None else weights
    total = 0.0
    for label in np.unique(labels):
        own = labels == label
        centre = np.average(points[own], axis=0, weights=weights[own])
        total += (weights[own] * ((points[own] - centre) ** 2).sum(axis=1)).sum()
    return total


def test_fused_equals_layer_by_layer():
    rng = np.random.default_rng(0)
    sizes, counts = [20, 3, 0, 11, 1], [6, 3, 0, 2, 1]
    points = [rng.standard_normal((size, 4)) for size in sizes]
    weights = [rng.random(size) for size in sizes]
    fused = cluster_layers(points, counts, weights=weights, seed=5)
    for layer in range(5):
        alone = cluster_layers([points[layer]], [counts[layer]], weights=[weights[layer]], seed=5, ordinals=[layer])
        np.testing.assert_array_equal(alone[0], fused[layer])


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_every_cluster_has_a_member_even_among_equal_points(data):
    layers = data.draw(st.integers(1, 3))
    points, counts = [], []
    for _ in range(layers):
        size = data.draw(st.integers(0, 7))
        values = data.draw(st.lists(st.integers(0, 2), min_size=2 * size, max_size=2 * size))
        points.append(np.asarray(values, dtype=np.float64).reshape(size, 2))
        counts.append(data.draw(st.integers(min(size, 1), size)))
    for points_of, count, labels in zip(points, counts, cluster_layers(points, counts), strict=True):
        assert len(labels) == len(points_of)
        assert sorted(set(labels.tolist())) == list(range(count))
        firsts = [int(np.flatnonzero(labels == label)[0]) for label in range(count)]
        assert firsts == sorted(firsts)


def test_finds_the_best_partition_of_a_few_points():
    rng = np.random.default_rng(2)
    for trial in range(5):
        points, weights = rng.standard_normal((7, 2)), rng.random(7)
        best = min(
            cost(points, np.asarray(labels), weights)
            for labels in itertools.product(range(3), repeat=7)
            if len(set(labels)) == 3
        )
        labels = cluster_layers([points], [3], weights=[weights], restarts=16, seed=trial)[0]
        assert cost(points, labels, weights) == pytest.approx(best)


def test_a_heavy_point_gets_its_own_cluster():
    points = [np.array([[0.0], [1.0], [10.0]])]
    assert cluster_layers(points, [2])[0].tolist() == [0, 0, 1]
    assert cluster_layers(points, [2], weights=[np.array([1.0, 1000.0, 0.001])])[0].tolist() == [0, 1, 1]
    assert cluster_layers(points, [2], weights=[np.zeros(3)])[0].tolist() == [0, 0, 1]


def test_previous_clusters_are_used_again_while_they_are_nearly_as_good():
    points = [np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.001], [1.0, 1.001]])]
    # Rows cost 1.0, columns 1.002: both are stable, and K-means without previous clusters chooses the rows.
    assert cluster_layers(points, [2], restarts=16)[0].tolist() == [0, 0, 1, 1]
    assert cluster_layers(points, [2], restarts=16, previous=[np.array([0, 1, 0, 1])])[0].tolist() == [0, 1, 0, 1]
    far = [points[0] * [1, 2]]
    assert cluster_layers(far, [2], restarts=16, previous=[np.array([0, 1, 0, 1])])[0].tolist() == [0, 0, 1, 1]


def test_counts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="layer 1 has 2 points"):
        cluster_layers([np.zeros((3, 1)), np.zeros((2, 1))], [1, 3])
    with pytest.raises(ValueError, match="layer 0 has 2 points"):
        cluster_layers([np.zeros((2, 1))], [0])
    assert [len(labels) for labels in cluster_layers([np.zeros((0, 1))] * 2, [0, 0])] == [0, 0]


def test_principal_components_keep_distances():
    rows = np.random.default_rng(0).standard_normal((6, 50))
    full = principal_components(rows, 32)
    assert full.shape == (6, 5)
    for i, j in itertools.combinations(range(6), 2):
        assert np.linalg.norm(full[i] - full[j]) == pytest.approx(np.linalg.norm(rows[i] - rows[j]))
    np.testing.assert_allclose(principal_components(rows, 2), full[:, :2])
    assert (np.diff((full**2).sum(axis=0)) <= 1e-9).all()
    assert principal_components(rows[:1], 4).shape == (1, 1)


def test_a_sketch_keeps_distances_and_is_linear(olmoe):
    model = olmoe.full()
    layer, units = model.layers[0], olmoe.units()
    source = MemorySource(units)
    sketches = sketch_layer(layer, source, size=1021)
    np.testing.assert_array_equal(sketches, sketch_layer(layer, source, size=1021))
    assert not np.array_equal(sketches, sketch_layer(layer, source, size=1021, seed=1))
    flat = [
        torch.cat([units[layer.expert_key(e)][p.name].flatten() for p in layer.parameters]).numpy() for e in range(8)
    ]
    for i, j in itertools.combinations(range(8), 2):
        true = np.linalg.norm(flat[i] - flat[j]) ** 2
        assert np.linalg.norm(sketches[i] - sketches[j]) ** 2 == pytest.approx(true, rel=5 * (2 / 1021) ** 0.5)
    middle = {n: (t + units[layer.expert_key(1)][n]) / 2 for n, t in units[layer.expert_key(0)].items()}
    halfway = sketch_layer(layer, MemorySource({**units, layer.expert_key(0): middle}), size=1021)
    np.testing.assert_allclose(halfway[0], (sketches[0] + sketches[1]) / 2, atol=1e-5)


def test_points_of_every_family(toy):
    model, source = toy.device(toy.units())
    done = []
    points = expert_embeddings(model.layers, source, components=4, on_layer=done.append)
    assert [p.shape for p in points] == [(8, 4)] * len(model.layers)
    assert done == [layer.ordinal for layer in model.layers]
    assert all(np.isfinite(p).all() and p.any() for p in points)
