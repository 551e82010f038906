"""Adapters averaged as products: against a dense singular value decomposition, alone and in a fold."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from toy_run import Toy, frame_of, make_update, new_unit, run_config, unit_values

from edgefed.aggregator import fold
from edgefed.aggregator.adapter_products import average_products
from edgefed.aggregator.blobs import BlobStore
from edgefed.aggregator.creation import RunWriter, create_run
from edgefed.aggregator.fold import Robustness
from edgefed.aggregator.ranks import widen_update
from edgefed.aggregator.rounds import RoundPolicy
from edgefed.aggregator.staleness import BaseLost, staleness_weight
from edgefed.errors import InvalidUpdate
from edgefed.kernels.compression import CODECS, encode
from edgefed.kernels.fold import NUMPY, select_backend
from edgefed.methods.interface import UnitMerge
from edgefed.protocol.frames import ENCODED_DTYPE
from edgefed.protocol.messages import NEURON_INDEX, NEURON_TABLE, TrainingConfig

RANK, OUT, IN = 4, 24, 16


def adapters(count, seed=0, *, out=OUT, size_in=IN, shared=0):
    """Pairs (B, A) of ``count`` clients; the products have ``shared`` directions in common, or none."""
    rng = np.random.default_rng(seed)
    rows = rng.uniform(-1, 1, (RANK, size_in))
    pairs = []
    for _ in range(count):
        lora_a = rng.uniform(-1, 1, (RANK, size_in))
        if shared:
            lora_a = rng.standard_normal((RANK, shared)) @ rows[:shared]
        pairs.append((rng.standard_normal((out, RANK)), lora_a))
    return pairs


def best(dense, rank=RANK):
    left, values, right = np.linalg.svd(dense, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def error(found, expected):
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("count", [1, 2, 5, 40])
@pytest.mark.parametrize("shape", [(OUT, IN), (3, IN), (OUT, RANK)])
def test_the_product_is_the_best_of_its_rank(count, shape):
    out, size_in = shape
    weights = np.random.default_rng(count).dirichlet(np.ones(count))
    pairs = adapters(count, out=out, size_in=size_in)
    lora_b, lora_a = average_products((w, b, a) for w, (b, a) in zip(weights, pairs, strict=True))
    dense = sum(w * b @ a for w, (b, a) in zip(weights, pairs, strict=True))
    assert lora_b.shape == (out, RANK)
    assert lora_a.shape == (RANK, size_in)
    assert error(lora_b @ lora_a, best(dense)) < 1e-10


def test_a_rank_that_suffices_makes_the_mean_exact_and_factors_do_not():
    pairs = adapters(6, shared=3)
    dense = sum(b @ a for b, a in pairs) / 6
    lora_b, lora_a = average_products((1 / 6, b, a) for b, a in pairs)
    assert error(lora_b @ lora_a, dense) < 1e-10
    assert error(sum(b for b, _ in pairs) @ sum(a for _, a in pairs) / 36, dense) > 0.1


def test_one_contributor_keeps_its_factors_and_an_untrained_adapter_can_learn():
    ((lora_b, lora_a),) = adapters(1)
    found_b, found_a = average_products([(1.0, lora_b, lora_a)])
    np.testing.assert_allclose(found_b, lora_b, atol=1e-10)
    np.testing.assert_allclose(found_a, lora_a, atol=1e-10)
    zero_b, some_a = average_products([(0.5, np.zeros_like(lora_b), a) for _, a in adapters(2)])
    assert not zero_b.any()
    assert np.linalg.norm(some_a, axis=1).min() > 0.01, "no row of A is 0"


def test_weights_by_row_and_inputs_below_the_rank():
    pairs = adapters(2, shared=3)
    rows = np.random.default_rng(1).uniform(0, 1, OUT)
    lora_b, lora_a = average_products([(rows, *pairs[0]), (1 - rows, *pairs[1])])
    dense = rows[:, None] * (pairs[0][0] @ pairs[0][1]) + (1 - rows)[:, None] * (pairs[1][0] @ pairs[1][1])
    assert error(lora_b @ lora_a, dense) < 1e-10
    assert average_products([(1.0, np.ones((OUT, RANK)), np.ones((RANK, RANK - 1)))]) is None


@pytest.fixture
def run(tmp_path):
    """A run with the adapter of an expert and that of a router of six experts: (units, blobs, fold of updates)."""
    start = {kind: adapters(1, 9, out=out)[0] for kind, out in (("expert", OUT), ("router", 6))}
    with RunWriter(tmp_path / "state") as writer:
        units = [
            writer.add_unit(*new_unit(f"{kind}:lora", kind, 0, 0 if kind == "expert" else -1, True, {
                "w.lora_a": ("F32", pair[1].astype(np.float32)), "w.lora_b": ("F32", pair[0].astype(np.float32)),
            }))
            for kind, pair in start.items()
        ]  # fmt: skip
    blobs = BlobStore(tmp_path / "state")

    def fold_of(pairs, plan, **limits):
        files = {}
        for client, tensors in pairs.items():
            files[client] = tmp_path / client
            files[client].write_bytes(frame_of({
                f"{kind}:lora|w.lora_{part}": ("F32", values.astype(np.float32))
                for kind, pair in tensors.items() for part, values in zip("ba", pair, strict=True)
            }))  # fmt: skip
        changed = fold.fold_round(units, plan, files, blobs, NUMPY, robustness=Robustness(products=True, **limits))
        return {unit.key: unit_values(blobs.path(unit.sha256)) for unit in changed}

    return start, fold_of


def product(values):
    return values["w.lora_b"].astype(np.float64) @ values["w.lora_a"].astype(np.float64)


def test_a_fold_averages_products_per_expert_and_per_row(run, monkeypatch):
    start, fold_of = run
    common = adapters(3, 1, shared=2)
    pairs = {c: {"expert": pair, "router": (pair[0][:6], pair[1])} for c, pair in zip("abc", common, strict=True)}
    rows = {"a": np.array([1.0, 0, 0, 2, 0, 0]), "b": np.array([1.0, 0, 3, 0, 0, 0]), "c": np.zeros(6)}
    plan = {
        "expert:lora": UnitMerge((("c", 1.0), ("a", 2.0), ("b", 0.0))),
        "router:lora": UnitMerge(tuple(rows.items())),
    }
    found = fold_of(pairs, plan)
    dense = {c: pair[0] @ pair[1] for c, pair in zip("abc", common, strict=True)}
    assert error(product(found["expert:lora"]), (2 * dense["a"] + dense["c"]) / 3) < 1e-5
    old = start["router"][0] @ start["router"][1]
    expected = np.stack([
        (dense["a"][0] + dense["b"][0]) / 2, old[1], dense["b"][2], dense["a"][3], old[4], old[5],
    ])  # fmt: skip
    assert error(product(found["router:lora"]), best(expected)) < 1e-5
    monkeypatch.setattr(fold, "BLOCK_ELEMENTS", 7)
    again = fold_of(dict(reversed(pairs.items())), plan)
    for key, values in found.items():
        for name, array in values.items():
            np.testing.assert_array_equal(again[key][name], array)


@pytest.mark.parametrize("backend", [NUMPY, select_backend()], ids=["numpy", "default"])
@pytest.mark.parametrize("compressed", [False, True])
def test_adapters_of_slices_are_averaged_as_products_neuron_by_neuron(tmp_path, compressed, backend):
    """A neuron has two rows of the first product and a column of the last; it is the mean over those who sent it."""
    hidden, neurons, rng = 10, 8, np.random.default_rng(5)
    owned = {"a": np.array([0, 1, 2, 5]), "b": np.array([2, 3, 5]), "c": np.array([5, 6])}
    weights = {"a": 3.0, "b": 1.0, "c": 2.0}
    start = tuple(rng.standard_normal(s).astype(np.float32) for s in (
        (neurons, 3 * RANK), (RANK, hidden), (hidden, RANK),
    ))  # fmt: skip
    names = (NEURON_TABLE, "up.lora_a", "down.lora_b")
    with RunWriter(tmp_path / "state") as writer:
        unit = writer.add_unit(*new_unit("e:lora", "expert", 0, 0, True, {
            name: ("F32", part) for name, part in zip(names, start, strict=True)
        }))  # fmt: skip

    def dense(table, lora_a, lora_b):
        """(neurons, 2, hidden) of the first product, (hidden, neurons) of the last."""
        first = table[:, : 2 * RANK].reshape(len(table), 2, RANK) @ lora_a
        return first.astype(np.float64), (lora_b @ table[:, 2 * RANK :].T).astype(np.float64)

    totals, files = np.zeros(neurons), {}
    expected = [np.zeros((neurons, 2, hidden)), np.zeros((hidden, neurons))]
    for client, rows in owned.items():
        own = [rng.standard_normal(part.shape).astype(np.float32) for part in (start[0][rows], *start[1:])]
        base = (start[0][rows], *start[1:])
        frame = {f"e:lora|{name}": ("F32", part) for name, part in zip(names, own, strict=True)}
        if compressed:
            codec = CODECS["int8"]
            changes = [encode(codec, (new - old).reshape(-1)) for new, old in zip(own, base, strict=True)]
            frame = {f"e:lora|{name}|int8": (ENCODED_DTYPE, part) for name, part in zip(names, changes, strict=True)}
        frame |= {f"e:lora|{NEURON_INDEX}": ("I32", rows.astype(np.int32))}
        files[client] = tmp_path / client
        files[client].write_bytes(frame_of(frame))
        first, last = dense(*own)
        expected[0][rows] += weights[client] * first
        expected[1][:, rows] += weights[client] * last
        totals[rows] += weights[client]
    kept = totals == 0
    old = dense(*start)
    expected[0] = np.where(kept[:, None, None], old[0], expected[0] / np.maximum(totals, 1)[:, None, None])
    expected[1] = np.where(kept, old[1], expected[1] / np.maximum(totals, 1))
    blobs, plan = BlobStore(tmp_path / "state"), {"e:lora": UnitMerge(tuple(weights.items()))}
    (changed,) = fold.fold_round([unit], plan, files, blobs, backend, robustness=Robustness(products=True))
    values = unit_values(blobs.path(changed.sha256))
    found = dense(*(values[name] for name in names))
    tolerance = 0.05 if compressed else 1e-5
    assert error(found[0].reshape(-1, hidden), best(expected[0].reshape(-1, hidden))) < tolerance
    assert error(found[1], best(expected[1])) < tolerance


def test_one_client_is_copied_bit_by_bit_and_a_shortened_one_is_shortened(run):
    start, fold_of = run
    (first, second) = adapters(2, 3)
    own = {"a": {"expert": first}}
    found = fold_of(own, {"expert:lora": UnitMerge((("a", 3.0),))})["expert:lora"]
    np.testing.assert_array_equal(found["w.lora_a"], first[1].astype(np.float32))
    both = {"a": {"expert": first}, "b": {"expert": second}}
    plan = {"expert:lora": UnitMerge((("a", 1.0), ("b", 1.0)))}
    found = fold_of(both, plan, factors={("b", "expert:lora"): 0.25})["expert:lora"]
    shortened = [old + 0.25 * (new - old) for old, new in zip(start["expert"], second, strict=True)]
    dense = (first[0] @ first[1] + shortened[0] @ shortened[1]) / 2
    assert error(product(found), best(dense)) < 1e-5


@pytest.mark.parametrize("compressed", [False, True])
def test_factors_alternate_and_each_round_is_exact(tmp_path, compressed):
    lora_b, lora_a = (part.astype(np.float32) for part in adapters(1, 9)[0])
    unit = new_unit("e:lora", "expert", 0, 0, True, {"w.lora_a": ("F32", lora_a), "w.lora_b": ("F32", lora_b)})
    training = TrainingConfig(lora_factors="alternate", experts="lora")
    run = msgspec.structs.replace(run_config(rounds=4), training=training)
    (config := tmp_path / "config.json").write_text("{}")
    policy = RoundPolicy(rounds=4, adapter_average="alternate", clip=1e6)
    create_run(tmp_path / "state", run, policy, [unit], [config])
    toy = Toy(tmp_path / "state")
    for server_round in (1, 2, 3):
        toy.join("a", "b")
        old, name = toy.values(), "e:lora|w.lora_b" if server_round % 2 else "e:lora|w.lora_a"
        other = next(each for each in old if each != name)
        new = {c: old[name] + np.float32(seed) * np.ones_like(old[name]) for seed, c in enumerate("ab", start=1)}
        for tensors, says in (
            ({name: new["a"], other: old[other]}, "has no tensor"),
            ({other: old[other]}, "has no tensor"),
        ):
            with pytest.raises(InvalidUpdate, match=says):
                send(toy, "a", tensors, attempt=9)
        for weight, client in enumerate("ab", start=1):
            send(toy, client, {name: new[client]}, num_examples=weight, base=old if compressed else None)
        toy.run.fold_pending()
        found = toy.values()
        np.testing.assert_array_equal(found[other], old[other])
        np.testing.assert_allclose(found[name], (new["a"] + 2 * new["b"]) / 3, rtol=1e-5)
        pairs = [{**old, name: new[client]} for client in "ab"]
        exact = sum(w * product_of(pair) for w, pair in zip((1, 2), pairs, strict=True)) / 3
        assert error(product_of(found), exact) < 1e-5
    toy.close()


def product_of(values):
    return values["e:lora|w.lora_b"].astype(np.float64) @ values["e:lora|w.lora_a"].astype(np.float64)


def best_of_all(pairs, weights, old, ranks):
    """The dense mean of what clients make of an adapter: the leading part is theirs, the rest unchanged."""
    total = 0
    for (lora_b, lora_a), weight, rank in zip(pairs, weights, ranks, strict=True):
        total = total + weight * (lora_b @ lora_a + old[0][:, rank:] @ old[1][rank:])
    return total / sum(weights)


@pytest.mark.parametrize("smallest", [1, 2, RANK])
@pytest.mark.parametrize("count", [1, 4])
def test_ordered_factors_are_the_best_of_every_rank_as_slices(smallest, count):
    pairs = adapters(count)
    found_b, found_a = average_products(((1 / count, b, a) for b, a in pairs), smallest)
    dense = sum(b @ a for b, a in pairs) / count
    for rank in range(smallest, RANK + 1):
        assert error(found_b[:, :rank] @ found_a[:rank], best(dense, rank)) < 1e-10
    lengths = np.linalg.norm(found_a, axis=1)
    np.testing.assert_allclose(found_a @ found_a.T, np.diag(lengths**2), atol=1e-9)
    np.testing.assert_allclose(lengths, np.sqrt(np.mean(sum(a for _, a in pairs) ** 2) * IN) / count)
    again_b, again_a = average_products([(1.0, found_b, found_a)], smallest)
    np.testing.assert_allclose(again_a, found_a, atol=1e-9, err_msg="a model that stays keeps its factors")
    np.testing.assert_allclose(again_b, found_b, atol=1e-9)


@pytest.mark.parametrize("average", ["product", "factors", "alternate"])
@pytest.mark.parametrize("compressed", [False, True])
def test_clients_of_unequal_ranks(tmp_path, average, compressed):
    lora_b, lora_a = (part.astype(np.float32) for part in adapters(1, 9)[0])
    unit = new_unit("e:lora", "expert", 0, 0, True, {"w.lora_a": ("F32", lora_a), "w.lora_b": ("F32", lora_b)})
    factors = "alternate" if average == "alternate" else "both"
    training = TrainingConfig(lora_factors=factors, experts="lora", lora_rank=RANK, min_lora_rank=2)
    run = msgspec.structs.replace(run_config(rounds=4), training=training)
    (config := tmp_path / "config.json").write_text("{}")
    policy = RoundPolicy(rounds=4, min_clients=3, adapter_average=average, clip=1e6)
    create_run(tmp_path / "run", run, policy, [unit], [config])
    names, ranks = ("e:lora|w.lora_b", "e:lora|w.lora_a"), (2, RANK, 3)
    toys = [Toy(tmp_path / "run")]
    for server_round in (1, 2):
        toy = toys[0]
        toy.join("a", "b", "c")
        old = [toy.values()[name] for name in names]
        rng = np.random.default_rng(server_round)
        pairs = []
        for client, rank in zip("cba", ranks, strict=True):
            own = [old[0][:, :rank].copy(), old[1][:rank].copy()]
            sent = names if average != "alternate" else names[(server_round - 1) % 2 :][:1]
            base = {name: part.copy() for name, part in zip(names, own, strict=True)} if compressed else None
            for at, name in enumerate(names):
                own[at] += rng.standard_normal(own[at].shape).astype(np.float32) * (name in sent)
            pairs.append([part.astype(np.float64) for part in own])
            tensors = {name: part for name, part in zip(names, own, strict=True) if name in sent}
            with pytest.raises(InvalidUpdate, match="shape|incomplete|expected"):
                send(toy, client, tensors, base, attempt=8, lora_rank=2 if rank == RANK else 0)
            with pytest.raises(InvalidUpdate, match="lora_rank is 1, the run has adapters of rank 2 to 4"):
                send(toy, client, tensors, base, attempt=9, lora_rank=1)
            send(toy, client, tensors, base, lora_rank=rank)
        toy.run.fold_pending()
        found = [toy.values()[name].astype(np.float64) for name in names]
        dense = best_of_all(pairs, (1, 1, 1), [part.astype(np.float64) for part in old], ranks)
        tolerance = 0.02 if compressed else 1e-5
        if average == "factors":
            whole = [[np.hstack([b, old[0][:, len(a) :]]), np.vstack([a, old[1][len(a) :]])] for b, a in pairs]
            for at in range(2):
                assert error(found[at], sum(pair[at] for pair in whole) / 3) < tolerance
            assert error(found[0] @ found[1], dense) > 2 * tolerance, "the mean of factors is another adapter"
        else:
            assert error(found[0] @ found[1], best(dense)) < tolerance
        if average == "product":
            assert error(found[0][:, :2] @ found[1][:2], best(dense, 2)) < tolerance
    toys[0].close()


def test_unequal_ranks_repeat_bit_by_bit_whatever_the_order_and_restarts(tmp_path):
    start = adapters(1, 9)[0]
    unit = new_unit("e:lora", "expert", 0, 0, True, {
        name: ("F32", part.astype(np.float32)) for name, part in zip(("w.lora_b", "w.lora_a"), start, strict=True)
    })  # fmt: skip
    training = TrainingConfig(experts="lora", lora_rank=RANK, min_lora_rank=1)
    run = msgspec.structs.replace(run_config(rounds=4), training=training)
    (config := tmp_path / "config.json").write_text("{}")
    pairs, found = adapters(3, 7), []
    for order, restarts in (("abc", False), ("cab", True)):
        folder = tmp_path / order
        create_run(folder, run, RoundPolicy(rounds=4, min_clients=3, adapter_average="product"), [unit], [config])
        toy = Toy(folder)
        toy.join("a", "b", "c")
        for client in order:
            rank, (lora_b, lora_a) = {"a": 1, "b": 0, "c": 3}[client], pairs["abc".index(client)]
            own = lora_b[:, : rank or RANK], lora_a[: rank or RANK]
            names = "e:lora|w.lora_b", "e:lora|w.lora_a"
            tensors = {name: part.astype(np.float32) for name, part in zip(names, own, strict=True)}
            send(toy, client, tensors, lora_rank=rank)
            toy = toy.reopen() if restarts else toy
        toy.run.fold_pending()
        found.append(toy.blobs())
        toy.close()
    assert found[0] == found[1]


def test_a_late_update_of_a_smaller_rank_moves_only_what_it_has(tmp_path):
    """What it lacks counts as unchanged from the model that it trained, not from the newest one."""
    start = {name: part.astype(np.float32) for name, part in zip(("w.lora_b", "w.lora_a"), adapters(1)[0], strict=True)}
    unit = new_unit("e:lora", "expert", 0, 0, True, {name: ("F32", part) for name, part in start.items()})
    training = TrainingConfig(experts="lora", lora_rank=RANK, min_lora_rank=2)
    run = msgspec.structs.replace(run_config(rounds=4), training=training)
    (config := tmp_path / "config.json").write_text("{}")
    policy = RoundPolicy(rounds=4, min_clients=2, quorum=1, max_staleness=1)
    create_run(tmp_path / "run", run, policy, [unit], [config])
    toy, names = Toy(tmp_path / "run"), ("e:lora|w.lora_b", "e:lora|w.lora_a")
    toy.join("a", "b")
    old = toy.values()
    late = make_update(
        toy.manifest(), "b",
        {names[0]: ("F32", old[names[0]][:, :2] + 1), names[1]: ("F32", old[names[1]][:2] + 1)}, lora_rank=2,
    )  # fmt: skip
    send(toy, "a", {name: old[name] + 10 for name in names})
    toy.run.fold_pending()
    toy.send(late)
    toy.run.fold_pending()
    found = [toy.values()[name] - old[name] for name in names]
    part = 10 + staleness_weight(1)
    np.testing.assert_allclose(found[0], np.hstack([np.full((OUT, 2), part), np.full((OUT, 2), 10)]), rtol=1e-5)
    np.testing.assert_allclose(found[1], np.vstack([np.full((2, IN), part), np.full((2, IN), 10)]), rtol=1e-5)
    toy.close()


def test_a_lost_or_damaged_model_sets_a_smaller_rank_aside(tmp_path):
    lora_b, lora_a = (part.astype(np.float32) for part in adapters(1, 9)[0])
    unit = new_unit("e:lora", "expert", 0, 0, True, {"w.lora_a": ("F32", lora_a), "w.lora_b": ("F32", lora_b)})
    with RunWriter(tmp_path) as writer:
        info = writer.add_unit(*unit)
    update, wide, blobs = tmp_path / "update", tmp_path / "wide", BlobStore(tmp_path)
    own = {"e:lora|w.lora_a": lora_a[:2] + 1, "e:lora|w.lora_b": lora_b[:, :2] - 1}
    update.write_bytes(frame_of({name: ("F32", values) for name, values in own.items()}))
    with pytest.raises(BaseLost, match="not stored any more"):
        widen_update(update, wide, 2, None, blobs, ())
    blobs.path(info.sha256).write_bytes(b"damaged")
    with pytest.raises(BaseLost, match="is damaged"):
        widen_update(update, wide, 2, [info], blobs, ())
    widen_update(update, wide, 2, [info], blobs, (), left_out=["e:lora"])
    assert not unit_values(wide)["e:lora|w.lora_a"][2:].any()


def send(toy, client, tensors, base=None, **changes):
    """Send factors as they are, or as encoded changes of ``base``."""
    frame = {name: ("F32", values) for name, values in tensors.items()}
    if base is not None:
        codec = CODECS["int8"]
        frame = {
            f"{name}|int8": (ENCODED_DTYPE, encode(codec, (values - base[name]).reshape(-1)))
            for name, values in tensors.items()
        }
    toy.send(make_update(toy.manifest(), client, frame, **changes))
