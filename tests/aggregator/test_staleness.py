"""Late updates: what they add, in which round, and that neither order nor a crash changes it."""

import math

import msgspec
import numpy as np
import pytest
import toy_run
from server_process import Client

from edgefed.aggregator.blobs import BlobStore
from edgefed.aggregator.creation import RunWriter
from edgefed.aggregator.staleness import Rebasing, rebase_update, staleness_weight
from edgefed.errors import RoundClosed, UpdateConflict
from edgefed.kernels.fold import NUMPY
from edgefed.protocol.frames import read_header
from edgefed.protocol.messages import NEURON_INDEX, NEURON_TABLE


@pytest.fixture
def late_toy(tmp_path):
    """Rounds close with one update; an update may be two rounds late."""
    folder = toy_run.make_run(tmp_path / "state", rounds=6, min_clients=3, quorum=1, max_staleness=2)
    toy = toy_run.Toy(folder)
    toy.join("a", "b", "c", "d")
    yield toy
    toy.close()


def next_round(toy, client: str, seed: int) -> None:
    toy.send(toy.update(client, seed))
    toy.run.fold_pending()


def numbers(values: dict[str, np.ndarray], kinds=("<f4", "<f2")) -> dict[str, np.ndarray]:
    return {name: array.astype(np.float64) for name, array in values.items() if array.dtype.str in kinds}


def sent(update: toy_run.Update, path) -> dict[str, np.ndarray]:
    path.write_bytes(update.frame)
    return toy_run.unit_values(path)


def test_a_late_update_adds_its_change_with_less_weight(late_toy, tmp_path):
    base, late = numbers(late_toy.values()), late_toy.update("b", 7)
    next_round(late_toy, "a", 1)
    next_round(late_toy, "a", 2)
    before = numbers(late_toy.values())
    late_toy.send(late)
    assert late_toy.run.fold_due, "it fills the buffer of the current round"
    late_toy.run.fold_pending()
    after, moved = numbers(late_toy.values()), sent(late, tmp_path / "late")
    weight = 1 / math.sqrt(3)
    for name, values in moved.items():
        expected = before[name] + weight * (values.astype(np.float64) - base[name])
        tolerance = 2**-9 if values.dtype == np.float16 else 1e-6
        np.testing.assert_allclose(after[name], expected, rtol=tolerance, atol=tolerance)
    status = late_toy.service.status().history[-1]
    assert (status.updates, status.metrics["late_updates"], status.metrics["staleness"]) == (1, 1.0, 2.0)
    assert not list(late_toy.folder.glob("rebased*"))


@pytest.mark.parametrize("order", ["bcd", "dcb"])
@pytest.mark.parametrize("restarts", [False, True])
def test_neither_order_nor_a_restart_changes_a_bit(tmp_path, order, restarts):
    def run(folder, order: str, restarts: bool) -> dict[str, str]:
        policy = {"rounds": 6, "min_clients": 4, "quorum": 3, "max_staleness": 2}
        toy = toy_run.Toy(toy_run.make_run(folder / "state", **policy))
        toy.join("a", "b", "c", "d")
        updates = {"b": toy.update("b", 2)}
        for update in (toy.update(client, seed) for seed, client in enumerate("acd")):
            toy.send(update)
        toy.run.fold_pending()
        updates |= {client: toy.update(client, ord(client)) for client in "cd"}
        for client in order:
            toy.send(updates[client])
            if restarts:
                toy = toy.reopen()
                assert toy.service.status().updates_received == order.index(client) + 1 or toy.run.fold_due
        toy.run.fold_pending()
        blobs = toy.blobs("3")
        toy.close()
        return blobs

    assert run(tmp_path / "x", order, restarts) == run(tmp_path / "y", "cbd", False)


def test_what_is_too_late_or_foreign_or_sent_twice_is_refused(late_toy):
    late, too_late = late_toy.update("b", 7), late_toy.update("c", 8)
    next_round(late_toy, "a", 1)
    late_toy.send(late)
    assert late_toy.commit(late.meta).repeated
    with pytest.raises(UpdateConflict):
        late_toy.send(toy_run.make_update(late_toy.manifest("1"), "b", {}, attempt=2))
    late_toy.run.fold_pending()
    late_toy.join("e")
    with pytest.raises(RoundClosed):  # did not take part in round 2
        late_toy.send(toy_run.make_update(late_toy.manifest("2"), "e", {}))
    next_round(late_toy, "a", 3)
    with pytest.raises(RoundClosed):
        late_toy.send(too_late)


def test_an_upload_that_a_closed_round_interrupts_goes_on(late_toy):
    late = late_toy.update("b", 7)
    late_toy.put("b", late.frame[:500])
    late_toy.send(late_toy.update("a", 1))
    assert late_toy.put("b", late.frame[500:], offset=500) == len(late.frame)
    late_toy.commit(late.meta)  # while round 1 is aggregated: it counts in round 2
    late_toy.run.fold_pending()
    first, second = late_toy.service.status().history, late_toy.run
    assert [done.updates for done in first] == [1]
    second.fold_pending()
    assert [done.updates for done in late_toy.service.status().history] == [1, 1]


def test_without_staleness_a_late_update_is_dropped(tmp_path):
    toy = toy_run.Toy(toy_run.make_run(tmp_path / "state", rounds=3, quorum=1))
    toy.join("a", "b")
    late = toy.update("b", 7)
    next_round(toy, "a", 1)
    with pytest.raises(RoundClosed):
        toy.send(late)
    toy.close()


def test_a_damaged_base_sets_the_update_aside(late_toy):
    late, base = late_toy.update("b", 7), late_toy.blobs()
    next_round(late_toy, "a", 1)
    late_toy.send(late)
    path = late_toy.service.blob(base["layer0.router"])[0]
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    late_toy.run.fold_pending()
    (aside,) = late_toy.service.status().history[-1].set_aside
    assert "'layer0.router' of the model that it was trained from is damaged" in aside.reason


def test_the_neurons_of_a_slice_move_where_they_are(tmp_path):
    rng, rows = np.random.default_rng(0), np.array([0, 1, 4, 7], dtype=np.int32)
    models = [rng.standard_normal((8, 5)).astype(np.float32) for _ in range(2)]
    blobs = BlobStore(tmp_path)
    with RunWriter(tmp_path) as writer:
        now = writer.add_unit(*toy_run.new_unit("e", "expert", 0, 0, True, {NEURON_TABLE: ("F32", models[1])}))
    sha256, size_bytes = blobs.put([toy_run.frame_of({NEURON_TABLE: ("F32", models[0])})])
    before = msgspec.structs.replace(now, sha256=sha256, size_bytes=size_bytes)
    values = rng.standard_normal((4, 5)).astype(np.float32)
    frame = toy_run.frame_of({f"e|{NEURON_TABLE}": ("F32", values), f"e|{NEURON_INDEX}": ("I32", rows)})
    (tmp_path / "update").write_bytes(frame)
    rebase_update(tmp_path / "update", tmp_path / "late", Rebasing([before], [now], 1), blobs, NUMPY)
    assert read_header(tmp_path / "late") == read_header(tmp_path / "update")
    found = toy_run.unit_values(tmp_path / "late")
    assert np.array_equal(found[f"e|{NEURON_INDEX}"], rows)
    expected = models[1][rows] + staleness_weight(1) * (values - models[0][rows])
    np.testing.assert_allclose(found[f"e|{NEURON_TABLE}"], expected, rtol=1e-6, atol=1e-6)


def test_a_slow_client_counts_late_in_a_real_server(tmp_path, start_server):
    server = start_server(
        toy_run.make_run(tmp_path / "state", rounds=3, min_clients=2, quorum=1, max_staleness=1, clients_per_round=2)
    )
    fast, slow = Client(server.url, "fast"), Client(server.url, "slow")
    for client in (fast, slow):
        client.register()
    manifest = slow.manifest()
    units = [unit for unit in manifest.units if unit.trainable]
    assert type(slow.assignment(wait_s=2.0)).__name__ == "Assignment"
    fast.send(toy_run.make_update(manifest, "fast", toy_run.trained(units, 1)))
    fast.wait_for_round(2)
    slow.send(toy_run.make_update(manifest, "slow", toy_run.trained(units, 2)))
    fast.wait_for_round(3)
    history = fast.status().history
    assert [(done.updates, done.metrics.get("late_updates")) for done in history] == [(1, None), (1, 1.0)]
