"""Which updates of a round count, and how much: claims out of range, failing methods, files that decay."""

from __future__ import annotations

import numpy as np
import pytest
import toy_run
from toy_run import Toy, make_run, make_update, trained, weighted_mean

from edgefed.aggregator.robust import RULES, coordinate_median, trimmed_mean
from edgefed.aggregator.stopping import describe_best
from edgefed.errors import ConfigError, InvalidUpdate
from edgefed.protocol.frames import storage_dtype
from edgefed.protocol.messages import TrainingConfig
from edgefed.protocol.server_optimizer import ServerOptimizer


def close_round(toy: Toy, **examples: int) -> None:
    """Every client in ``examples`` trains everything and the round is aggregated."""
    toy.join(*examples)
    for seed, (name, count) in enumerate(examples.items()):
        toy.send(toy.update(name, seed, num_examples=count))
    toy.run.fold_pending()


def means(toy: Toy, weights: list[float]) -> dict[str, np.ndarray]:
    """The model that follows if client i, trained with seed i, has weight i."""
    units = [unit for unit in toy.manifest("1").units if unit.trainable]
    updates = [trained(units, seed) for seed in range(len(weights))]
    return {
        name: weighted_mean([(w, u[name][1]) for w, u in zip(weights, updates, strict=True)]).astype(values.dtype)
        for name, (_, values) in updates[0].items()
    }


def assert_model(toy: Toy, expected: dict[str, np.ndarray]) -> None:
    values = toy.values()
    for name, array in expected.items():
        np.testing.assert_allclose(values[name], array, rtol=1e-6, atol=1e-3 if array.dtype == np.float16 else 1e-7)


def set_aside(toy: Toy) -> dict[str, str]:
    return {each.client_id: each.reason for each in toy.run.status().history[-1].set_aside}


def test_a_client_counts_with_no_more_examples_than_it_registered(toy):
    toy.join("a", "b")
    toy.send(toy.update("a", 0, num_examples=1000))
    toy.send(toy.update("b", 1, num_examples=10**9))
    toy.run.fold_pending()
    assert_model(toy, means(toy, [1, 1]))
    assert toy.run.status().history[-1].metrics["loss"] == (1000 + 10**9) / 2


def test_more_tokens_than_a_round_of_training_are_refused(toy):
    toy.join("a", "b")
    with pytest.raises(InvalidUpdate, match="num_tokens is 20481"):
        toy.send(toy.update("a", 1, num_tokens=20 * 8 * 128 + 1))


@pytest.mark.parametrize(
    ("claims", "counted"), [([10, 12, 1000], [10, 12, 12]), ([10, 10, 10**6, 10**9], [10, 10, 100, 100])]
)
def test_one_client_counts_at_most_as_the_next_and_a_multiple_of_the_median(tmp_path, claims, counted):
    toy = Toy(make_run(tmp_path / "state", min_clients=len(claims)))
    close_round(toy, **dict(zip("abcd", claims, strict=False)))
    assert_model(toy, means(toy, counted))
    toy.close()


def test_losses_between_evaluations_and_metrics_of_the_server_are_not_taken_from_clients(tmp_path):
    """The two of five clients that report a loss in round 2, where nobody evaluates, would otherwise undo round 1."""
    training = TrainingConfig(evaluate_every=3)
    toy = Toy(make_run(tmp_path / "state", rounds=7, min_clients=5, rollback=1.5, stop_after=1, training=training))
    claims = {"restored_round": 1.0, "bytes_down_changes": 1e9}
    for server_round, losses in (
        (1, dict.fromkeys("abcde", 2.0)), (2, {"a": 9.0, "b": 9.0}), (3, {"a": -5.0})
    ):  # fmt: skip
        toy.join(*"abcde")
        for seed, name in enumerate("abcde", 10 * server_round):
            metrics = claims | ({"held_out_loss_before": losses[name]} if name in losses else {})
            units = [unit for unit in toy.manifest().units if unit.trainable]
            toy.send(make_update(toy.manifest(), name, trained(units, seed), metrics=metrics))
        toy.run.fold_pending()
    status = toy.run.status()
    assert [each.undone for each in status.history] == [None] * 3
    assert [each.metrics.get("held_out_loss_median") for each in status.history] == [2.0, None, None]
    assert status.state == "training"
    assert not claims.keys() & {name for each in status.history for name in each.metrics}
    toy.close()


def test_the_policy_can_limit_the_examples_of_a_client(tmp_path):
    toy = Toy(make_run(tmp_path / "state", max_examples=20))
    close_round(toy, a=10, b=1000)
    assert_model(toy, means(toy, [10, 20]))
    toy.close()


def test_a_decayed_update_is_set_aside_and_the_round_goes_on(tmp_path):
    toy = Toy(make_run(tmp_path / "state", min_clients=3))
    toy.join("a", "b", "c")
    for seed, name in enumerate("abc"):
        toy.send(toy.update(name, seed))
    (path,) = toy.run.uploads.updates.glob("c-*")
    content = bytearray(path.read_bytes())
    content[-5] ^= 0x10
    path.write_bytes(content)
    toy.run.fold_pending()
    assert set_aside(toy) == {"c": set_aside(toy)["c"]}
    assert "is damaged" in set_aside(toy)["c"]
    assert toy.run.status().history[-1].updates == 2
    assert_model(toy, means(toy, [1, 1]))
    toy.close()


class Picky(toy_run.Mean):
    """Fails on one client, or on every round of several."""

    def plan_merge(self, contributions, units):
        if any(c.client_id == "b" for c in contributions):
            raise OverflowError("weights of b")
        return super().plan_merge(contributions, units)


class Moody(toy_run.Mean):
    """Fails on two contributions, not on one; and never assigns."""

    def plan_merge(self, contributions, units):
        if len(contributions) > 1:
            raise ZeroDivisionError("together")
        return super().plan_merge(contributions, units)

    def assign_experts(self, surveys, coverage, server_round, seed):
        raise ZeroDivisionError("always")


def test_an_update_on_which_the_method_fails_is_set_aside(tmp_path, monkeypatch):
    monkeypatch.setattr(toy_run, "make_method", lambda name, options: Picky())
    toy = Toy(make_run(tmp_path / "state", min_clients=3))
    close_round(toy, a=10, b=10, c=10)
    assert set_aside(toy) == {"b": "the method fails on it: weights of b"}
    assert toy.manifest().server_round == 2
    toy.close()


def test_updates_on_which_the_method_fails_together_leave_the_model_and_the_server(tmp_path, monkeypatch):
    monkeypatch.setattr(toy_run, "make_method", lambda name, options: Moody(assigns=True))
    toy = Toy(make_run(tmp_path / "state"))
    before = toy.values()
    close_round(toy, a=10, b=10)
    assert set(set_aside(toy)) == {"a", "b"}
    assert toy.assignment("a").experts is None
    for name, values in toy.values().items():
        np.testing.assert_array_equal(values, before[name])
    toy.close()


# --- limits on what one client can do -----------------------------------------------------------------------------


def moved(toy: Toy, seed: int, size: float, *, kinds: tuple[str, ...] = ("dense", "router", "expert")) -> dict:
    """The current model with noise of ``size`` in every trainable unit of ``kinds``."""
    current, rng, tensors = toy.values(), np.random.default_rng(seed), {}
    for unit in toy.manifest().units:
        if unit.trainable and unit.kind in kinds:
            for info in unit.tensors:
                name = f"{unit.key}|{info.name}"
                noise = size * rng.standard_normal(info.shape)
                tensors[name] = (info.dtype, (current[name] + noise).astype(storage_dtype(info.dtype)))
    return tensors


def send_moved(toy: Toy, sizes: dict[str, float], **changes) -> None:
    toy.join(*sizes)
    for seed, (name, size) in enumerate(sizes.items()):
        toy.send(make_update(toy.manifest(), name, moved(toy, seed, size), **changes))
    toy.run.fold_pending()


def distance(toy: Toy, before: dict) -> float:
    """Root mean square of the change of the float32 tensors."""
    after = toy.values()
    changes = [(after[n] - before[n]).ravel() for n in after if before[n].dtype == np.float32]
    return float(np.sqrt(np.mean(np.concatenate(changes).astype(np.float64) ** 2)))


@pytest.mark.parametrize(("clip", "most"), [(2.0, 0.02), (None, 0.5)])
def test_a_client_moves_the_model_no_farther_than_the_median_allows(tmp_path, clip, most):
    toy = Toy(make_run(tmp_path / "state", min_clients=4, clip=clip))
    before = toy.values()
    send_moved(toy, {"a": 0.01, "b": 0.01, "c": 0.01, "liar": 0.8})
    assert distance(toy, before) < most
    assert clip is not None or distance(toy, before) > 0.1
    toy.close()


def test_clipping_changes_no_bit_where_nobody_is_out_of_line(tmp_path):
    models = []
    for name, clip in (("plain", None), ("clipped", 2.0)):
        toy = Toy(make_run(tmp_path / name, min_clients=3, clip=clip))
        send_moved(toy, {"a": 0.01, "b": 0.012, "c": 0.009})
        models.append(toy.blobs())
        toy.close()
    assert models[0] == models[1]


def test_an_absurd_update_is_set_aside(tmp_path):
    toy = Toy(make_run(tmp_path / "state", min_clients=3, clip=2.0))
    toy.join("a", "b", "liar")
    for seed, name in enumerate("ab"):
        toy.send(make_update(toy.manifest(), name, moved(toy, seed, 0.01)))
    huge = {n: (d, np.full_like(v, 6e4)) for n, (d, v) in moved(toy, 3, 0.01).items()}
    toy.send(make_update(toy.manifest(), "liar", huge))
    toy.run.fold_pending()
    assert set(set_aside(toy)) == {"liar"}
    assert "per element (root mean square), limit" in set_aside(toy)["liar"]
    toy.close()


@pytest.mark.parametrize("rule", ["median", "trimmed-mean"])
def test_robust_rules_ignore_an_outlier_and_keep_rows_nobody_uses(tmp_path, rule):
    toy = Toy(make_run(tmp_path / "state", min_clients=4, robust=rule, options={"row_routers": True}))
    before = toy.values()
    toy.join("a", "b", "c", "liar")
    updates = {
        name: moved(toy, seed, 100.0 if name == "liar" else 0.01) for seed, name in enumerate(("a", "b", "c", "liar"))
    }
    for name, tensors in updates.items():
        used = {n: v for n, v in tensors.items() if n.split("|")[0] != "layer0.expert2"}
        toy.send(make_update(toy.manifest(), name, used))
    toy.run.fold_pending()
    after = toy.values()
    stack = np.stack([tensors["layer0.expert1|up"][1] for tensors in updates.values()]).astype(np.float64)
    np.testing.assert_allclose(after["layer0.expert1|up"], RULES[rule].combine(stack), rtol=1e-6)
    np.testing.assert_array_equal(after["layer0.router|w"][2], before["layer0.router|w"][2])
    assert distance(toy, before) < 0.05
    toy.close()


def test_rules_by_hand():
    values = np.array([[1.0, 5.0], [2.0, 7.0], [3.0, -9.0], [100.0, 6.0], [4.0, 6.5]])
    np.testing.assert_array_equal(coordinate_median(values), [3.0, 6.0])
    np.testing.assert_allclose(trimmed_mean(values), [3.0, 17.5 / 3])


@pytest.mark.parametrize(("changes", "says"), [({"clip": 0.5}, "clip is 0.5"), ({"rollback": 0.0}, "rollback is 0")])
def test_invalid_policies_are_refused(tmp_path, changes, says):
    with pytest.raises(ConfigError, match=says):
        make_run(tmp_path / "state", **changes)


def test_a_round_whose_loss_jumps_on_most_clients_is_undone(tmp_path):
    toy = Toy(make_run(tmp_path / "state", rounds=4, min_clients=3, rollback=1.5))

    def play(*losses: float) -> dict[str, str]:
        toy.join("a", "b", "c")
        for seed, (name, loss) in enumerate(zip("abc", losses, strict=True)):
            toy.send(make_update(toy.manifest(), name, moved(toy, seed, 0.01), metrics={"held_out_loss_before": loss}))
        toy.run.fold_pending()
        return toy.blobs()

    first = toy.blobs()
    good = play(2.0, 2.0, 2.0)
    assert good != first
    bad = play(1.9, 9.0, 2.0)  # one liar is no majority
    assert bad != good
    restored = play(9.0, 9.0, 9.0)
    assert restored == good
    last = toy.run.status().history[-1]
    assert (last.undone, last.updates, len(last.set_aside)) == (2, 0, 3)
    assert play(2.0, 2.0, 2.0) != restored
    assert toy.run.status().history[-1].undone is None
    toy.close()


def play_losses(toy, *losses):
    """A round per loss that three clients report of its model. Returns the blobs of each round's model."""
    models = []
    for loss in losses:
        toy.join("a", "b", "c")
        models.append(toy.blobs())
        for seed, name in enumerate("abc"):
            reported = {"held_out_loss_before": 1e9 if name == "c" else loss + 0.01 * seed}  # c lies
            toy.send(make_update(toy.manifest(), name, moved(toy, seed, 0.01), metrics=reported))
        toy.run.fold_pending()
    return models


@pytest.mark.parametrize("server_optimizer", [None, ServerOptimizer(kind="momentum", learning_rate=0.1)])
def test_a_run_ends_with_its_best_model_once_the_loss_no_longer_falls(tmp_path, server_optimizer):
    policy = {"rounds": 9, "min_clients": 3, "rollback": None, "clip": None, "stop_after": 3}
    toy = Toy(make_run(tmp_path / "state", server_optimizer=server_optimizer, **policy))
    models = play_losses(toy, 3.0, 2.0, 2.5)
    toy = toy.reopen()  # the losses are known to the next process, too
    models += play_losses(toy, 2.2, 2.4)
    assert toy.run.status().state == "finished"
    assert "no longer improves" in toy.assignment("a").reason
    assert toy.blobs() == models[1]
    assert toy.blobs("2") == models[1], "the best model stays stored, though only two others do"
    history = toy.run.status().history
    assert [done.metrics["best_round"] for done in history] == [1, 2, 2, 2, 2]
    assert history[-1].metrics["restored_round"] == 2
    assert [done.updates for done in history] == [3] * 5
    toy = toy.reopen()
    assert toy.run.status().state == "finished"
    toy.close()


def test_rounds_since_the_last_evaluation_are_undone_together(tmp_path):
    training = TrainingConfig(evaluate_every=3)
    toy = Toy(make_run(tmp_path / "state", rounds=7, min_clients=3, rollback=1.5, clip=None, training=training))
    models = []
    for loss in (2.0, None, None, 9.0):
        toy.join("a", "b", "c")
        models.append(toy.blobs())
        for seed, name in enumerate("abc"):
            metrics = {} if loss is None else {"held_out_loss_before": loss}
            toy.send(make_update(toy.manifest(), name, moved(toy, seed, 0.01), metrics=metrics))
        toy.run.fold_pending()
    assert toy.blobs() == models[0], "four models were kept, though only two are by default"
    assert toy.run.status().history[-1].undone == 1
    toy.close()


def test_the_best_model_is_kept_and_can_be_chosen(tmp_path):
    toy = Toy(make_run(tmp_path / "state", rounds=9, min_clients=3, rollback=None, clip=None))
    with pytest.raises(ConfigError, match="no client has evaluated a model of this run"):
        describe_best(toy.run.status().history, private=False)
    models = play_losses(toy, 3.0, 2.0, 2.5, 2.4, 2.6)
    history = toy.run.status().history
    best, sentence = describe_best(history, private=False)
    assert (best, sentence) == (2, "round 2: held-out loss 2.0100, the smallest of 5 evaluated models")
    assert toy.blobs(str(best)) == models[1]
    assert "the newest model is later" in describe_best(history[:2], private=False)[1]
    with pytest.raises(ConfigError, match="`dp_noise` cannot be chosen"):
        describe_best(history, private=True)
    toy.close()


def test_a_run_goes_on_while_the_loss_falls_or_is_not_measured(tmp_path, caplog):
    toy = Toy(make_run(tmp_path / "state", rounds=4, min_clients=3, rollback=None, clip=None, stop_after=1))
    for _ in range(2):
        toy.join("a", "b", "c")
        for seed, name in enumerate("abc"):
            toy.send(make_update(toy.manifest(), name, moved(toy, seed, 0.01)))
        toy.run.fold_pending()
    assert "no client has evaluated a model yet" in caplog.text
    before = play_losses(toy, 2.9, 2.8)[-1]
    assert toy.run.status().state == "finished"
    assert "restored_round" not in toy.run.status().history[-1].metrics
    assert toy.blobs() != before, "the last round was aggregated"
    toy.close()
