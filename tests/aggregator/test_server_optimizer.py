"""Server optimizers: the step against its equations, and that neither order, blocks nor a restart changes a bit."""

from __future__ import annotations

import numpy as np
import pytest
import toy_run
from toy_run import Toy, make_run

from edgefed.aggregator import fold
from edgefed.errors import NotFound
from edgefed.protocol.changes import DOWNLOADS
from edgefed.protocol.frames import widen
from edgefed.protocol.messages import UnitInfo
from edgefed.protocol.server_optimizer import ServerOptimizer

MOMENTUM = ServerOptimizer(kind="momentum", momentum=0.8)
ADAM = ServerOptimizer(kind="adam", learning_rate=0.05, momentum=0.7, beta2=0.9, epsilon=1e-2)


def play(folder, optimizer, *, order="ab", reopen=True, rounds=3, **changes):
    """Rounds of two clients. Returns the open run."""
    toy = Toy(make_run(folder / "state", rounds=rounds + 1, server_optimizer=optimizer, clip=None, **changes))
    toy.join("a", "b")
    for number in range(rounds):
        updates = {client: toy.update(client, 10 * number + at) for at, client in enumerate("ab")}
        for client in order:
            toy.send(updates[client])
        toy.run.fold_pending()
        if reopen:
            toy = toy.reopen()
    return toy


def wide(values):
    return {name: array.astype(np.float64) for name, array in values.items()}


def expected(toy, optimizer, rounds=3):
    """Each trainable tensor after the rounds, by the equations of the papers."""
    manifest = toy.manifest("1")
    before = wide(toy.values("1"))
    values = {
        f"{u.key}|{i.name}": before[f"{u.key}|{i.name}"] for u in manifest.units if u.trainable for i in u.tensors
    }
    first = {name: np.zeros_like(array) for name, array in values.items()}
    second = {name: np.full_like(array, optimizer.epsilon**2) for name, array in values.items()}
    trainable = [unit for unit in manifest.units if unit.trainable]
    for number in range(rounds):
        sent = [toy_run.trained(trainable, 10 * number + at) for at in range(2)]
        for name in values:
            delta = sum(tensors[name][1].astype(np.float64) for tensors in sent) / 2 - values[name]
            if optimizer.kind == "momentum":
                first[name] = optimizer.momentum * first[name] + delta
                values[name] = values[name] + optimizer.rate * (delta + optimizer.momentum * first[name])
                continue
            first[name] = optimizer.momentum * first[name] + (1 - optimizer.momentum) * delta
            second[name] = optimizer.beta2 * second[name] + (1 - optimizer.beta2) * delta**2
            values[name] = values[name] + optimizer.rate * first[name] / (np.sqrt(second[name]) + optimizer.epsilon)
    return values


@pytest.mark.parametrize("optimizer", [MOMENTUM, ADAM], ids=lambda o: o.kind)
def test_the_model_follows_the_equations_over_rounds_and_restarts(tmp_path, optimizer):
    toy = play(tmp_path, optimizer)
    found = wide(toy.values())
    toy.close()
    fresh = Toy(make_run(tmp_path / "other" / "state"))
    for name, values in expected(fresh, optimizer).items():
        tolerance = 2e-2 if name.startswith("norm") else 2e-5  # F16
        np.testing.assert_allclose(found[name], values, rtol=tolerance, atol=tolerance)
    fresh.close()


@pytest.mark.parametrize("optimizer", [MOMENTUM, ADAM], ids=lambda o: o.kind)
def test_neither_order_nor_blocks_nor_a_restart_changes_a_bit(tmp_path, monkeypatch, optimizer):
    toy = play(tmp_path / "x", optimizer, reopen=False)
    expected_blobs, moments = toy.blobs(), toy.run.store.moments(4)
    toy.close()
    assert len(moments) == len([key for key in expected_blobs if key != "embed"])
    monkeypatch.setattr(fold, "BLOCK_ELEMENTS", 7)
    toy = play(tmp_path / "y", optimizer, order="ba")
    assert (toy.blobs(), toy.run.store.moments(4)) == (expected_blobs, moments)
    toy.close()


def test_what_nobody_trained_does_not_move(tmp_path):
    """Neither units that no client sent, nor router rows of experts that no client held; their moments stay."""
    toy = play(tmp_path, MOMENTUM, rounds=1, options={"row_routers": True})
    before, moments = toy.values(), toy.run.store.moments(2)
    manifest = toy.manifest()
    keys = ("layer0.router", "layer0.expert1")
    for client in "ab":
        units = [unit for unit in manifest.units if unit.key in keys]
        toy.send(toy_run.make_update(manifest, client, toy_run.trained(units, 77)))
    toy.run.fold_pending()
    after, later = toy.values(), toy.run.store.moments(3)
    moved = {name for name in after if not np.array_equal(after[name], before[name])}
    assert {name.split("|")[0] for name in moved} == set(keys)
    np.testing.assert_array_equal(after["layer0.router|w"][[0, 2]], before["layer0.router|w"][[0, 2]])
    assert {key for key in later if later[key].sha256 != moments[key].sha256} == {f"moments:{key}" for key in keys}

    def rows(unit: UnitInfo) -> np.ndarray:
        return toy_run.unit_values(toy.folder / "blobs" / unit.sha256[:2] / unit.sha256)["w"]

    np.testing.assert_array_equal(
        rows(later["moments:layer0.router"])[[0, 2]], rows(moments["moments:layer0.router"])[[0, 2]]
    )
    toy.close()


def test_a_round_that_is_undone_takes_its_moments_along(tmp_path):
    toy = Toy(make_run(tmp_path / "state", rounds=5, min_clients=3, rollback=1.5, server_optimizer=MOMENTUM, clip=None))
    toy.join("a", "b", "c")
    found = []
    for loss in (2.0, 2.0, 9.0):  # round 2 makes the loss jump, round 3 sees it
        for seed, client in enumerate("abc"):
            toy.send(toy.update(client, seed, metrics={"held_out_loss_before": loss}))
        toy.run.fold_pending()
        number = toy.run.status().server_round
        found.append((toy.blobs(), {key: unit.sha256 for key, unit in toy.run.store.moments(number).items()}))
    assert toy.run.status().history[-1].undone == 2
    assert found[2] == found[0] != found[1]
    toy.close()


def test_damaged_moments_begin_anew_and_no_client_sees_any(tmp_path, caplog):
    toy = play(tmp_path, MOMENTUM, rounds=1)
    moments = toy.run.store.moments(2)
    assert moments
    assert not any(key.startswith("moments") for key in toy.blobs())
    damaged, missing = moments["moments:layer0.router"], moments["moments:layer1.router"]
    with pytest.raises(NotFound):
        toy.service.blob(damaged.sha256)
    paths = {unit.key: toy.folder / "blobs" / unit.sha256[:2] / unit.sha256 for unit in (damaged, missing)}
    paths[damaged.key].write_bytes(b"x" * damaged.size_bytes)
    paths[missing.key].unlink()
    toy = toy.reopen()
    assert toy.run.repairs.wanted() == ()
    for at, client in enumerate("ab"):
        toy.send(toy.update(client, at))
    toy.run.fold_pending()
    logged = [record.getMessage() for record in caplog.records if "begins anew" in record.getMessage()]
    assert sorted(line.split("'")[1] for line in logged) == ["layer0.router", "layer1.router"]
    toy.close()


@pytest.mark.parametrize(
    ("optimizer", "codec"), [(None, "topk"), (MOMENTUM, "topk"), (None, "int4")], ids=["mean", "momentum", "int4"]
)
def test_a_part_moves_and_what_is_left_moves_later(tmp_path, optimizer, codec):
    """g' + r' = g + (the step of all values) + r; in the last round, g' = g + the step."""
    share, rules = DOWNLOADS[codec].share, {"hidden": 5000, "experts": 1, "download_compression": codec}
    toy = Toy(make_run(tmp_path / "state", rounds=3, server_optimizer=optimizer, clip=None, **rules))
    toy.join("a", "b")
    residuals, momentum = {}, {}
    for number in range(1, 4):
        before, manifest = wide(toy.values()), toy.manifest()
        for at, client in enumerate("ba" if number == 2 else "ab"):
            toy.send(toy.update(client, 10 * number + at))
        toy.run.fold_pending()
        after, moments = wide(toy.values()), toy.run.store.moments(number + 1)
        units = [unit for unit in manifest.units if unit.trainable]
        sent = [toy_run.trained(units, 10 * number + at) for at in range(2)]
        kept = {}
        for unit in moments.values():
            values = toy_run.unit_values(toy.folder / "blobs" / unit.sha256[:2] / unit.sha256)
            kept |= {f"{unit.key.removeprefix('moments:')}|{name}": array for name, array in values.items()}
        for name in sent[0]:
            step = sum(tensors[name][1].astype(np.float64) for tensors in sent) / 2 - before[name]
            if optimizer is not None:
                momentum[name] = optimizer.momentum * momentum.get(name, 0.0) + step
                step = optimizer.rate * (step + optimizer.momentum * momentum[name])
            wanted = before[name] + step + (residuals.get(name, 0.0) if number < 3 else 0.0)
            sparse = step.size >= 4096 and number < 3
            assert (f"{name}.residual" in kept) == sparse
            residuals[name] = 0.0
            if sparse:
                left = kept[f"{name}.residual"]
                residuals[name] = widen(left, "BF16" if left.dtype == np.uint16 else "F32").astype(np.float64)
                moved = after[name] != before[name]
                assert np.count_nonzero(moved) <= np.ceil(share * step.size)
                far = np.abs(wanted - before[name])
                if codec == "int4":
                    assert np.abs(residuals[name]).max() < far.max() / 7
                else:
                    assert far[moved].min() >= 0.99 * far[~moved].max()
            tolerance = 1e-2 if name.startswith("norm") else 1e-5  # F16, and its residual BF16
            np.testing.assert_allclose(after[name] + residuals[name], wanted, rtol=tolerance, atol=tolerance)
        status = toy.run.status().history[-1].metrics
        assert (status.get("model_residual_norm", 0) > 0) == (number < 3)
        toy = toy.reopen()
    assert bool(moments) == (optimizer is not None), "no residual is left"
    toy.close()


def test_a_change_without_limit_stays_finite(tmp_path):
    toy = Toy(make_run(tmp_path / "state", rounds=3, server_optimizer=MOMENTUM, clip=None))
    toy.join("a", "b")
    manifest = toy.manifest()
    unit = next(unit for unit in manifest.units if unit.key == "norm")
    huge = {"norm|weight": ("F16", np.full(unit.tensors[0].shape, 65000, np.float16))}
    for client in "ab":
        toy.send(toy_run.make_update(manifest, client, huge))
    toy.run.fold_pending()
    assert np.isfinite(toy.values()["norm|weight"]).all()
    toy.close()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "sgd"}, "`server_optimizer` is 'sgd', expected none, momentum or adam"),
        ({"learning_rate": 0.0}, "`server_learning_rate` is 0.0"),
        ({"momentum": 1.0}, "`server_momentum` is 1.0, expected a number from 0 and below 1"),
        ({"kind": "adam", "beta2": float("nan")}, "`server_beta2` is nan"),
        ({"kind": "adam", "epsilon": 0.0}, "`server_epsilon` is 0.0"),
        ({"beta2": 0.5}, "`server_beta2` has no effect with `server_optimizer=momentum`"),
    ],
)
def test_invalid_settings_are_named(changes, words):
    assert any(words in problem for problem in ServerOptimizer(**{"kind": "momentum", **changes}).problems())
    assert not MOMENTUM.problems()
    assert not ADAM.problems()
