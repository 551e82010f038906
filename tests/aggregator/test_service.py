"""The service without HTTP: clients, uploads, rounds, and what a restart finds."""

from __future__ import annotations

import errno
import hashlib
import math
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import toy_run
from toy_run import KEY, Toy, make_run, make_update, trained, weighted_mean

from edgefed.aggregator import blobs as blobs_module
from edgefed.aggregator import uploads as uploads_module
from edgefed.errors import (
    ChecksumMismatch,
    ConfigError,
    DiskFull,
    IdentityInUse,
    InvalidUpdate,
    MalformedMessage,
    NotFound,
    OffsetMismatch,
    RoundClosed,
    ServerFull,
    Unauthorized,
    UnknownClient,
    UpdateConflict,
    UpdateTooLarge,
    VersionMismatch,
)
from edgefed.protocol.comparison import COMPARING_PHASE, Comparison
from edgefed.protocol.messages import Assignment, DeviceInfo, Finished, Heartbeat, Wait

# --- clients ----------------------------------------------------------------------------------------------------


def test_a_round_from_registration_to_the_next_model(toy):
    toy.join("a")
    assert isinstance(toy.assignment("a"), Wait)
    toy.join("b")
    before = toy.values()
    updates = {name: toy.update(name, seed, num_examples=n) for name, seed, n in (("a", 1, 10), ("b", 2, 30))}
    assert toy.assignment("a").server_round == 1
    assert not toy.send(updates["a"]).repeated
    assert isinstance(toy.assignment("a"), Wait)
    assert isinstance(toy.assignment("b"), Assignment)
    toy.send(updates["b"])
    assert toy.run.fold_due
    toy.run.fold_pending()
    manifest = toy.manifest()
    assert manifest.server_round == 2
    assert toy.assignment("a").server_round == 2
    first, second = (trained([u for u in manifest.units if u.trainable], seed) for seed in (1, 2))
    for name, values in toy.values().items():
        if name in first:
            expected = weighted_mean([(10, first[name][1]), (30, second[name][1])]).astype(values.dtype)
            np.testing.assert_array_max_ulp(values, expected, maxulp=1)
        else:
            assert np.array_equal(values, before[name]), "a frozen unit keeps its bits"
    status = toy.run.status()
    (ledger,) = status.history
    assert (ledger.updates, ledger.participants, ledger.experts_changed) == (2, 2, 6)
    assert ledger.metrics["loss"] == pytest.approx((10 * 10 + 30 * 30) / 40)
    assert ledger.uploaded_bytes == sum(len(update.frame) for update in updates.values())
    assert {c.client_id: (c.rounds_done, c.state) for c in status.clients} == {
        "a": (1, "training"),
        "b": (1, "training"),
    }
    assert not list((toy.folder / "updates").iterdir())
    assert not list((toy.folder / "uploads").iterdir())


def test_registering_again_needs_the_key_and_keeps_the_client(toy):
    toy.join("a", "b")
    toy.send(toy.update("a", 1))
    toy.service.register(toy_run.register_message("a", name="renamed", num_examples=99))
    client = toy.run.clients["a"]
    assert (client.name, client.num_examples, client.rounds_done) == ("renamed", 99, 1)
    with pytest.raises(Unauthorized):
        toy.service.register(toy_run.register_message("a", client_key="another key, long enough"))
    with pytest.raises(Unauthorized):
        toy.service.assignment("a", "wrong")
    with pytest.raises(UnknownClient):
        toy.service.assignment("nobody", KEY)
    assert "wrong" not in (toy.folder / "edgefed.db").read_bytes().decode("latin1")
    assert KEY not in (toy.folder / "edgefed.db-wal").read_bytes().decode("latin1"), "only the key's hash is stored"


@pytest.mark.parametrize(
    "changes",
    [
        {"client_id": "../evil"}, {"client_id": "a/b"}, {"client_id": ""}, {"client_id": "x" * 65},
        {"client_id": "a\n"}, {"client_id": "ä"}, {"client_key": "short"}, {"name": "bell\x07"},
        {"memory_bytes": -1}, {"expert_share": 1.5},
        {"expert_share": math.nan}, {"compute_share": 0.0}, {"num_examples": -1}, {"num_examples": 10**12},
    ],
    ids=str,
)  # fmt: skip
def test_an_invalid_registration_is_refused(toy, changes):
    with pytest.raises(MalformedMessage):
        toy.service.register(toy_run.register_message(**{"client_id": "a", **changes}))
    assert not toy.run.clients


def test_client_ids_may_not_differ_in_case_only(toy):
    toy.join("Device")
    with pytest.raises(MalformedMessage, match="case"):
        toy.join("device")


def test_another_protocol_version_is_refused_by_name(toy):
    with pytest.raises(VersionMismatch, match="protocol 2"):
        toy.service.register(toy_run.register_message("a", protocol_version=2))


def test_a_heartbeat_updates_the_status_and_keeps_a_client_alive(toy):
    toy.join("a", "b")
    toy.now += 50.0
    toy.service.heartbeat("a", KEY + "a", Heartbeat(phase="training", fraction=0.25, server_round=1))
    toy.now += 20.0
    toy.run.tick()
    clients = {client.client_id: client for client in toy.run.status().clients}
    assert (clients["a"].state, clients["a"].phase, clients["a"].fraction) == ("training", "training", 0.25)
    assert clients["b"].state == "lost"
    assert clients["b"].last_seen_s == 70.0
    with pytest.raises(MalformedMessage):
        toy.service.heartbeat("a", KEY + "a", Heartbeat(phase="x", fraction=2.0, server_round=1))


def test_the_status_contains_each_device_and_its_newest_budget(toy):
    device = DeviceInfo(name="NVIDIA GeForce RTX 3060", kind="discrete", trains_on="cuda", budget_bytes=7 * 2**30)
    toy.service.register(toy_run.register_message("a", device=device, memory_bytes=7 * 2**30))
    assert toy.run.status().clients[0].device == device
    assert toy.run.status().clients[0].memory_bytes == 7 * 2**30
    toy.service.heartbeat("a", KEY + "a", Heartbeat(phase="train", fraction=0.5, server_round=1, budget_bytes=5))
    assert toy.run.status().clients[0].memory_bytes == 5
    with pytest.raises(MalformedMessage, match="budget_bytes -1"):
        toy.service.heartbeat("a", KEY + "a", Heartbeat(phase="train", fraction=0.5, server_round=1, budget_bytes=-1))
    assert toy.reopen().run.status().clients[0].device == device


@pytest.mark.parametrize(
    "wrong",
    [{"name": "x" * 300}, {"kind": "a\x1b[2J"}, {"budget_bytes": -1}, {"total_bytes": 2**60}, {"budget_origin": "\n"}],
)
def test_device_facts_with_control_characters_or_invalid_numbers_are_refused(toy, wrong):
    device = DeviceInfo(**{"name": "x", "kind": "cpu", "trains_on": "cpu", **wrong})
    with pytest.raises(MalformedMessage, match="device." + next(iter(wrong))):
        toy.service.register(toy_run.register_message("a", device=device))


# --- uploads ----------------------------------------------------------------------------------------------------


def test_a_cut_upload_resumes_at_its_offset(toy):
    toy.join("a", "b")
    update = toy.update("a", 1)
    assert toy.put("a", update.frame[:100]) == 100
    assert toy.service.upload_state("a", KEY + "a", 1, 1).offset == 100
    for wrong in (0, 99, 101):
        with pytest.raises(OffsetMismatch) as caught:
            toy.put("a", update.frame, offset=wrong)
        assert caught.value.offset == 100
    with pytest.raises(OffsetMismatch) as caught:
        toy.commit(update.meta)
    assert caught.value.offset == 100
    toy.put("a", update.frame[100:], offset=100)
    toy.commit(update.meta)
    assert toy.service.upload_state("a", KEY + "a", 1, 1).status == "accepted"


def test_a_second_connection_takes_over_an_upload(toy):
    toy.join("a", "b")
    name, stale = toy.service.open_upload("a", KEY + "a", 1, 1, 0, None)
    stale.write(b"x" * 10)
    toy.put("a", b"y" * 5, offset=10)
    with pytest.raises(OffsetMismatch, match="another connection"):
        stale.write(b"z")
    toy.service.close_upload(name, stale)
    assert (toy.folder / "uploads" / "a-1-1.part").read_bytes() == b"x" * 10 + b"y" * 5


def test_a_new_attempt_replaces_partial_uploads_of_older_ones(toy):
    toy.join("a", "b")
    toy.put("a", b"x" * 10, attempt=1)
    toy.put("b", b"x" * 10, attempt=1)
    toy.put("a", b"y" * 5, attempt=2)
    assert sorted(path.name for path in (toy.folder / "uploads").iterdir()) == ["a-1-2.part", "b-1-1.part"]


def test_a_repeated_update_counts_once_even_after_its_round(toy):
    toy.join("a", "b")
    update = toy.update("a", 1)
    toy.send(update)
    assert toy.commit(update.meta).repeated
    with pytest.raises(OffsetMismatch) as caught:
        toy.put("a", update.frame)
    assert caught.value.offset == len(update.frame)
    other = toy.update("a", 5, attempt=2)
    with pytest.raises(UpdateConflict):
        toy.put("a", other.frame, attempt=2)
    with pytest.raises(UpdateConflict):
        toy.commit(other.meta)
    toy.send(toy.update("b", 2))
    toy.run.fold_pending()
    assert toy.commit(update.meta).repeated
    assert toy.run.clients["a"].rounds_done == 1


def test_an_update_after_the_end_of_its_round_is_refused(toy):
    toy.join("a", "b", "c")
    late = toy.update("a", 1)
    toy.put("a", late.frame)
    name, writer = toy.service.open_upload("b", KEY + "b", 1, 1, 0, None)
    toy.join("a")  # still there
    toy.now += 100.0
    toy.join("b")
    toy.send(toy.update("b", 2))
    assert toy.run.fold_due
    for call in (
        lambda: writer.write(b"more"),
        lambda: toy.commit(late.meta),
        lambda: toy.put("a", b"x"),
        lambda: toy.service.upload_state("a", KEY + "a", 1, 1),
    ):
        with pytest.raises((RoundClosed, OffsetMismatch)):
            call()
    toy.run.fold_pending()
    with pytest.raises(RoundClosed):
        toy.commit(late.meta)
    with pytest.raises(RoundClosed, match="no part"):
        toy.put("c", b"x", server_round=2)
    with pytest.raises(NotFound, match="has not begun"):
        toy.put("a", b"x", server_round=7)


def test_wrong_bytes_are_refused_and_deleted(toy):
    toy.join("a", "b")
    update = toy.update("a", 1)
    toy.put("a", update.frame[:-1] + bytes([update.frame[-1] ^ 1]))
    with pytest.raises(ChecksumMismatch, match=update.meta.sha256):
        toy.commit(update.meta)
    toy.put("a", update.frame + b"more")
    with pytest.raises(ChecksumMismatch, match="bytes have arrived"):
        toy.commit(update.meta)
    with pytest.raises(NotFound):
        toy.commit(update.meta)
    toy.send(update)


def test_an_update_larger_than_the_model_is_refused_before_and_during_the_upload(toy):
    toy.join("a", "b")
    limit = toy.run.catalog.limit_bytes
    with pytest.raises(UpdateTooLarge):
        toy.put("a", b"x" * (limit + 1))
    name, writer = toy.service.open_upload("a", KEY + "a", 1, 1, 0, None)
    writer.write(b"x" * limit)
    with pytest.raises(UpdateTooLarge) as caught:
        writer.write(b"x")
    toy.service.close_upload(name, writer, refused=caught.value)
    assert not list((toy.folder / "uploads").iterdir())


def test_a_commit_of_another_update_is_refused(toy):
    toy.join("a", "b")
    update = toy.update("a", 1)
    toy.put("a", update.frame)
    with pytest.raises(MalformedMessage):
        toy.service.commit("a", KEY + "a", 1, 2, update.meta)
    with pytest.raises(Unauthorized):
        toy.service.commit("a", KEY + "b", 1, 1, update.meta)


def test_a_refused_update_leaves_the_round_open(toy):
    toy.join("a", "b")
    manifest = toy.manifest()
    tensors = trained([unit for unit in manifest.units if unit.kind == "router"], 1)
    tensors["layer0.router|w"][1][0, 0] = np.nan
    with pytest.raises(InvalidUpdate, match=r"layer0.router\|w.*element 0"):
        toy.send(make_update(manifest, "a", tensors))
    assert not list((toy.folder / "uploads").iterdir())
    assert isinstance(toy.assignment("a"), Assignment)
    toy.send(toy.update("a", 1, attempt=2))


def test_concurrent_commits_of_one_update_are_accepted_once(toy):
    toy.join("a", "b")
    update = toy.update("a", 1)
    toy.put("a", update.frame)
    replies = []
    threads = [threading.Thread(target=lambda: replies.append(toy.commit(update.meta).repeated)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(replies) == [False, True, True, True]


# --- rounds -----------------------------------------------------------------------------------------------------


def play(folder, order: str, **options) -> tuple[dict[str, str], dict]:
    """One round with updates in this order of arrival; the new model's hashes and values."""
    toy = Toy(make_run(folder, **options))
    toy.join(*sorted(order))
    updates = {name: toy.update(name, ord(name), num_examples=ord(name) - 90, share=0.7) for name in sorted(order)}
    for name in order:
        toy.send(updates[name])
    toy.run.fold_pending()
    try:
        return toy.blobs(), toy.values()
    finally:
        toy.close()


def test_the_order_of_arrival_does_not_matter_bitwise(tmp_path):
    orders = ["abcd", "dcba", "bdac"]
    hashes = [play(tmp_path / order, order, min_clients=4)[0] for order in orders]
    assert hashes[0] == hashes[1] == hashes[2]


def test_router_rows_without_weights_keep_their_values(tmp_path):
    toy = Toy(make_run(tmp_path / "state", options={"row_routers": True}))
    toy.join("a", "b")
    manifest, old = toy.manifest(), toy.values()
    routers = [unit for unit in manifest.units if unit.kind == "router"]
    for name, seed, experts in (("a", 1, (0,)), ("b", 2, (0, 1))):
        reports = tuple(toy_run.report(layer, expert) for layer in range(2) for expert in experts)
        toy.send(make_update(manifest, name, trained(routers, seed), experts=reports, num_examples=10 * seed))
    toy.run.fold_pending()
    first, second, new = trained(routers, 1), trained(routers, 2), toy.values()
    for router in ("layer0.router", "layer1.router"):
        w, norm = f"{router}|w", f"{router}|norm"
        a, b = first[w][1], second[w][1]
        np.testing.assert_array_max_ulp(new[w][0], weighted_mean([(10, a[0]), (20, b[0])]).astype(np.float32))
        assert np.array_equal(new[w][1], b[1]), "one holder: copied"
        assert np.array_equal(new[w][2], old[w][2]), "no holder: unchanged"
        # No row per expert: the mean of the row weights, 10/3 and 40/3.
        expected = weighted_mean([(10, first[norm][1]), (40, second[norm][1])]).astype(np.float32)
        np.testing.assert_array_max_ulp(new[norm], expected)
    toy.close()


def test_an_unchanged_unit_keeps_its_blob(toy):
    toy.join("a", "b")
    before = toy.blobs()
    manifest, old = toy.manifest(), toy.values()
    unit = next(unit for unit in manifest.units if unit.key == "layer1.expert2")
    same = {f"{unit.key}|{info.name}": ("F32", old[f"{unit.key}|{info.name}"]) for info in unit.tensors}
    for name in "ab":
        toy.send(make_update(manifest, name, same))
    toy.run.fold_pending()
    assert toy.blobs() == before
    assert toy.run.status().history[0].experts_changed == 0


def test_empty_updates_close_a_round(toy):
    toy.join("a", "b")
    before = toy.blobs()
    for name in "ab":
        toy.send(make_update(toy.manifest(), name, {}))
    toy.run.fold_pending()
    assert toy.blobs() == before
    assert toy.manifest().server_round == 2


def test_old_rounds_are_pruned_with_their_blobs(tmp_path):
    for keep, expected in ((1, [3]), (2, [2, 3]), (0, [1, 2, 3])):
        toy = Toy(make_run(tmp_path / str(keep) / "state", rounds=3), keep_rounds=keep)
        toy.join("a", "b")
        seen = {}
        for server_round in (1, 2):
            seen[server_round] = toy.blobs()
            # Round 2 changes half the units only: the others are then shared by the manifests of rounds 2 and 3.
            for name in "ab":
                toy.send(toy.update(name, server_round, share=1.0 if server_round == 1 else 0.5))
            toy.run.fold_pending()
        seen[3] = toy.blobs()
        for server_round in (1, 2, 3):
            if server_round in expected:
                assert toy.blobs(str(server_round)) == seen[server_round]
            else:
                with pytest.raises(NotFound):
                    toy.manifest(str(server_round))
        expected_blobs = {sha for server_round in expected for sha in seen[server_round].values()}
        expected_blobs |= {file.sha256 for file in toy.manifest().files}
        assert {path.name for path in (toy.folder / "blobs").glob("??/*")} == expected_blobs
        gone = set(seen[1].values()) - expected_blobs
        assert gone or keep == 0
        for sha256 in gone:
            with pytest.raises(NotFound):
                toy.service.blob(sha256)
        toy.close()


def test_a_finished_run_serves_its_final_model(toy):
    toy.join("a", "b")
    for seed in (1, 2):
        for name in "ab":
            toy.send(toy.update(name, seed))
        toy.run.fold_pending()
    finished = toy.assignment("a")
    assert isinstance(finished, Finished)
    assert finished.server_round == 3 == toy.manifest().server_round
    assert toy.run.status().state == "finished"
    assert not toy.run.all_heard(0.0)
    toy.service.leave("b", KEY + "b", "done")
    assert toy.run.all_heard(0.0)
    assert not toy.run.all_heard(5.0)
    toy.now += 5.0
    assert toy.run.all_heard(5.0)
    toy.service.heartbeat("a", KEY + "a", Heartbeat(phase=COMPARING_PHASE, fraction=0.0, server_round=3))
    toy.service.heartbeat("a", KEY + "a", Heartbeat(phase="evaluate", fraction=0.5, server_round=3))
    toy.now += 10.0
    assert not toy.run.all_heard(5.0)  # it still compares
    with pytest.raises(MalformedMessage, match="finite losses"):
        toy.service.compare("a", KEY + "a", Comparison(server_round=3, before=-1.0))
    found = Comparison(server_round=3, num_tokens=512, before=5.26, global_model=4.45, device=4.28)
    toy.service.compare("a", KEY + "a", found)
    assert toy.service.status().clients[0].phase == "waiting"
    toy.now += 5.0
    assert toy.run.all_heard(5.0)
    toy.now += 600.0  # its process has ended, as it should
    assert [client.state for client in toy.run.status().clients] == ["finished", "left"]
    again = toy.reopen()
    assert [client.comparison for client in again.run.status().clients] == [found, None]
    assert isinstance(again.assignment("a"), Finished)
    with pytest.raises(RoundClosed):
        again.put("a", b"x", server_round=3)
    again.close()


def test_assignments_contain_the_seed_of_the_round_and_the_remaining_time(tmp_path):
    toy = Toy(make_run(tmp_path / "state", deadline_s=30.0))
    toy.join("a", "b")
    toy.now += 10.0
    first, second = toy.assignment("a"), toy.assignment("b")
    assert first.deadline_s == 20.0
    assert first.seed == second.seed, "a client's id is drawn at random: what depends on it cannot be repeated"
    toy.send(toy.update("a", 1))
    toy.send(toy.update("b", 1))
    toy.run.fold_pending()
    assert toy.assignment("a").seed != first.seed
    toy.close()


# --- disks and restarts -----------------------------------------------------------------------------------------


def test_a_restart_keeps_the_open_round_its_updates_and_its_parts(toy):
    toy.join("a", "b")
    toy.send(toy.update("a", 1))
    second = toy.update("b", 2)
    toy.put("b", second.frame[:50])
    again = toy.reopen()
    assert isinstance(again.assignment("a"), Wait)
    assert isinstance(again.assignment("b"), Assignment)
    assert again.service.upload_state("b", KEY + "b", 1, 1).offset == 50
    again.put("b", second.frame[50:], offset=50)
    again.commit(second.meta)
    again.run.fold_pending()
    assert again.manifest().server_round == 2
    again.close()


def test_orphans_of_a_crash_are_cleaned_and_unacknowledged_updates_resumable(toy):
    toy.join("a", "b")
    update = toy.update("a", 1)
    toy.close()
    orphan = toy.folder / "blobs" / "ab" / ("ab" + "0" * 62)
    orphan.parent.mkdir(exist_ok=True)
    orphan.write_bytes(b"x")
    (toy.folder / "blobs" / "tmp" / "1-0").write_bytes(b"x")
    (toy.folder / "uploads" / "a-9-1.part").write_bytes(b"another round")
    (toy.folder / "uploads" / "strange").write_bytes(b"x")
    (toy.folder / "updates" / "a-1-1.safetensors").write_bytes(update.frame)
    again = Toy(toy.folder)
    assert not orphan.exists()
    assert not list((toy.folder / "blobs" / "tmp").iterdir())
    assert [path.name for path in (toy.folder / "uploads").iterdir()] == ["a-1-1.part"]
    assert not again.commit(update.meta).repeated
    again.close()


def test_a_missing_file_is_found_on_start(toy):
    toy.close()
    path = next((toy.folder / "blobs").glob("??/*"))
    path.unlink()
    again = Toy(toy.folder)
    assert again.run.repairs.wanted() == (path.name,)
    again.close()


def no_room(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_stops_only_the_upload(toy, monkeypatch):
    toy.join("a", "b")
    update = toy.update("a", 1)
    toy.put("a", update.frame[:100])

    def half(file, data):
        file.write(data[:20])
        no_room()

    with monkeypatch.context() as patch:
        patch.setattr(uploads_module, "write_all", half)
        with pytest.raises(DiskFull):
            toy.put("a", update.frame[100:], offset=100)
    assert toy.service.upload_state("a", KEY + "a", 1, 1).offset == 120, "what was written counts"
    toy.put("a", update.frame[120:], offset=120)
    with monkeypatch.context() as patch:
        patch.setattr(uploads_module, "sync_file", no_room)
        with pytest.raises(DiskFull):
            toy.commit(update.meta)
    with monkeypatch.context() as patch:
        patch.setattr(toy.run.store, "record_update", lambda *_: (_ for _ in ()).throw(DiskFull("full")))
        with pytest.raises(DiskFull):
            toy.commit(update.meta)
    assert toy.run.clients["a"].rounds_done == 0
    assert not toy.commit(update.meta).repeated


def test_a_full_disk_delays_a_fold(toy, monkeypatch):
    toy.join("a", "b")
    for seed, name in enumerate("ab"):
        toy.send(toy.update(name, seed))
    with monkeypatch.context() as patch:
        patch.setattr(blobs_module, "write_all", no_room)
        with pytest.raises(DiskFull):
            toy.run.fold_pending()
    assert toy.run.fold_due
    assert not list((toy.folder / "blobs" / "tmp").iterdir())
    toy.run.fold_pending()
    assert toy.manifest().server_round == 2


def test_a_phase_is_saved_again_after_a_failed_write(toy, monkeypatch):
    toy.join("a", "b")
    with monkeypatch.context() as patch:
        patch.setattr(toy.run.store, "save_round", lambda *_: (_ for _ in ()).throw(DiskFull("full")))
        for seed, name in enumerate("ab"):
            toy.send(toy.update(name, seed))
        assert toy.run.fold_due
        assert toy.run.store.current_round().phase.value == "training"
    toy.run.tick()
    assert toy.run.store.current_round().phase.value == "aggregating"


def test_the_mean_of_huge_metrics_does_not_overflow():
    from edgefed.aggregator.status import average_metrics
    from edgefed.aggregator.store import UpdateRecord

    frame = b""
    metas = [
        toy_run.UpdateMeta(
            client_id=name, server_round=1, attempt=1, sha256=hashlib.sha256(frame).hexdigest(), size_bytes=0,
            num_examples=n, num_tokens=0, experts=(), metrics=metrics,
        )
        for name, n, metrics in (("a", 10**9, {"x": 1e308}), ("b", 10**9, {"x": 1e308, "only": 2.0}))
    ]  # fmt: skip
    records = [UpdateRecord(1, meta.client_id, 1, meta.sha256, 0, meta) for meta in metas]
    assert average_metrics(records) == {"x": 1e308, "only": 2.0}


# --- silence, standstill and copies -----------------------------------------------------------------------------


def beat(toy: Toy, client_id: str) -> None:
    toy.service.heartbeat(client_id, KEY + client_id, Heartbeat(phase="train", fraction=0.5, server_round=1))


def test_a_suspended_server_does_not_lose_its_clients(tmp_path, caplog):
    """Ctrl-Z and fg, `docker pause`, a stalled disk: no client could reach the server."""
    toy = Toy(make_run(tmp_path / "state", client_timeout_s=8.0, deadline_s=100.0), tick_s=0.25)
    toy.join("a", "b")
    toy.send(toy.update("a", 1))
    toy.now += 20.0
    beat(toy, "a")  # arrives before the first tick
    toy.run.tick()
    assert "stood still for 20 s" in caplog.text
    assert toy.assignment("b").deadline_s == pytest.approx(100.0)
    toy.send(toy.update("b", 2))
    assert toy.run.fold_due
    assert len(toy.run.state.accepted) == 2
    toy.close()


def test_a_silent_client_is_lost(tmp_path):
    toy = Toy(make_run(tmp_path / "state", client_timeout_s=8.0), tick_s=0.25)
    toy.join("a", "b")
    toy.send(toy.update("a", 1))
    for _ in range(40):
        toy.now += 0.25
        beat(toy, "a")
        toy.run.tick()
    assert toy.run.fold_due
    toy.close()


@pytest.mark.parametrize("crash", [False, True])
def test_a_restart_opens_no_round_for_lost_clients(tmp_path, crash):
    toy = Toy(make_run(tmp_path / "state", client_timeout_s=40.0))
    toy.join("a", "b")
    toy.now += 45.0
    toy.run.tick()
    if crash:
        toy.run.store.close()
    else:
        toy.close()
    again = Toy(toy.folder)
    again.run.tick()
    status = again.run.status()
    assert status.state == "waiting"
    assert {client.state for client in status.clients} == {"lost"}
    assert all(44.0 < client.last_seen_s < 60.0 for client in status.clients)
    again.join("c", "d")
    assert isinstance(again.assignment("c"), Assignment)
    assert isinstance(again.assignment("d"), Assignment)
    beat(again, "a")
    again.run.tick()
    assert {client.client_id for client in again.run.status().clients if client.state == "lost"} == {"b"}
    again.close()


def test_leaving_sets_the_time_when_a_client_was_last_seen(toy):
    toy.join("a")
    toy.service.leave("a", KEY + "a", "done")
    assert toy.run.clients["a"].last_seen_at == pytest.approx(time.time(), abs=5)
    toy.run.clients["a"].last_seen_at -= 100
    (client,) = toy.run.status().clients
    assert client.state == "left"
    assert 99 < client.last_seen_s < 110


def test_a_client_that_left_must_register_again(toy):
    toy.join("a", "b")
    toy.service.leave("a", KEY + "a", "stopped")
    with pytest.raises(UnknownClient, match="register again"):
        toy.assignment("a")
    toy.join("a")
    assert isinstance(toy.assignment("a"), Assignment)


def test_the_process_that_registered_last_keeps_an_identity_and_the_other_gets_an_error(toy, caplog):
    for instance, name in (("card-a", "first"), ("card-b", "second")):
        toy.service.register(toy_run.register_message("a", instance=instance, name=name))
    toy.service.check_instance("a", KEY + "a", "card-b")
    toy.service.check_instance("a", KEY + "a", "")  # a client of an earlier version
    for _ in range(3):
        with pytest.raises(IdentityInUse, match="as 'second'"):
            toy.service.check_instance("a", KEY + "a", "card-a")
    assert caplog.text.count("two processes use the identity of 'second' (a)") == 1
    with pytest.raises(Unauthorized):
        toy.service.check_instance("a", "another key, long enough", "card-a")
    toy.service.register(toy_run.register_message("a", instance="card-a", name="first"))
    toy.service.check_instance("a", KEY + "a", "card-a")


# --- policy -----------------------------------------------------------------------------------------------------


def test_a_policy_change_on_resume_is_permanent(toy, caplog):
    caplog.set_level("INFO")
    toy.join("a")
    assert isinstance(toy.assignment("a"), Wait)
    again = toy.reopen(policy_changes={"min_clients": 1, "deadline_s": 30.0, "quorum": None})
    assert "min_clients is now 1, was 2" in caplog.text
    assert again.assignment("a").deadline_s == 30.0
    third = again.reopen()
    assert (third.run.policy.min_clients, third.run.policy.deadline_s, third.run.policy.rounds) == (1, 30.0, 2)
    third.close()


def test_an_invalid_policy_changes_nothing(toy):
    toy.close()
    with pytest.raises(ConfigError, match="min_clients is 0"):
        Toy(toy.folder, policy_changes={"min_clients": 0})
    again = Toy(toy.folder)
    assert again.run.policy.min_clients == 2
    again.close()


def test_logs_and_the_reason_to_wait_name_clients(tmp_path, caplog):
    caplog.set_level("INFO", logger="edgefed.aggregator")
    toy = Toy(make_run(tmp_path / "state", min_clients=3))
    toy.join("a")
    assert toy.assignment("a").reason == "round 1 waits: 1 of 3 clients needed"
    toy.join("b")
    toy.service.leave("b", KEY + "b", "shutdown")
    assert toy.assignment("a").reason == "round 1 waits: 1 of 3 clients needed; device of b left"
    toy.join("c", "d", "d")  # repeated: more examples than were announced
    toy.send(toy.update("a", 1))
    lines = [record.getMessage() for record in caplog.records]
    assert [line for line in lines if "joined" in line] == [f"'device of {name}' ({name}) joined" for name in "abcd"]
    assert "'device of b' (b) left: 'shutdown'" in lines
    assert "round 1: 3 clients to train" in lines
    assert any(line.startswith("round 1: update of 'device of a' (a) accepted, 0.0 MiB") for line in lines)
    toy.close()


def test_the_words_of_the_log_agree_in_number(tmp_path, caplog):
    caplog.set_level("INFO", logger="edgefed.aggregator")
    toy = Toy(make_run(tmp_path / "state", min_clients=1, rounds=1))
    toy.join("a")
    toy.send(toy.update("a", 1))
    toy.run.fold_pending()
    lines = [record.getMessage() for record in caplog.records]
    said = [
        line for line in lines if "update of" in line or line.startswith(("'device", "round 1: 1", "round 1: closed"))
    ]
    assert [line.split(",")[0] for line in said] == [
        "'device of a' (a) joined", "round 1: 1 client to train", "round 1: update of 'device of a' (a) accepted",
        "round 1: closed with 1 update",
    ]  # fmt: skip
    assert "run finished after 1 round" in lines
    toy.close()


def test_a_client_is_shown_at_rest_as_soon_as_its_update_is_accepted(toy):
    toy.join("a", "b")
    beat(toy, "a")
    toy.send(toy.update("a", 1))
    (client,) = [each for each in toy.service.status().clients if each.client_id == "a"]
    assert (client.state, client.phase, client.fraction) == ("done", "waiting", 0.0)


def test_the_log_counts_those_who_train_and_who_returns(tmp_path, caplog):
    caplog.set_level("INFO", logger="edgefed.aggregator")
    toy = Toy(make_run(tmp_path / "state"))
    toy.join("a", "b")
    for name in "ab":
        toy.service.leave(name, KEY + name, "shutdown")
    toy.join("a")
    lines = [record.getMessage() for record in caplog.records]
    assert lines[-2:] == ["'device of a' (a) joined again", "round 1: 1 client to train"]
    toy.close()


def test_clients_that_are_gone_make_room_for_new_ones(tmp_path):
    toy = Toy(make_run(tmp_path / "state", max_clients=2))
    toy.join("a", "b")
    with pytest.raises(ServerFull, match="takes 2 clients"):
        toy.join("c")
    toy.join("a")
    toy.service.leave("b", KEY + "b", "done")
    toy.join("c")
    assert {client.client_id for client in toy.service.status().clients} == {"a", "c"}
    again = toy.reopen()
    assert {client.client_id for client in again.service.status().clients} == {"a", "c"}
    again.close()


def test_unfinished_uploads_of_absent_clients_make_room_on_a_short_disk(tmp_path, monkeypatch):
    toy = Toy(make_run(tmp_path / "state", min_clients=3, client_timeout_s=60))
    toy.join("a", "b", "c")
    update = toy.update("a", 1)
    toy.put("b", b"x" * 1000)
    free = {"bytes": 10**9}
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free["bytes"]))
    free["bytes"] = uploads_module.DISK_RESERVE_BYTES + len(update.frame) - 1
    with pytest.raises(DiskFull, match="does not fit"):
        toy.put("a", update.frame)
    with pytest.raises(DiskFull, match="does not fit"):
        toy.service.upload_state("a", KEY + "a", 1, 1, len(update.frame))
    assert toy.service.upload_state("a", KEY + "a", 1, 1, len(update.frame) - 1).offset == 0
    assert list((toy.folder / "uploads").iterdir()), "b is here"
    toy.now += 61
    toy.run.tick()
    toy.service.heartbeat("a", KEY + "a", Heartbeat(phase="train", fraction=0.5, server_round=1))
    with pytest.raises(DiskFull):
        toy.put("a", update.frame)
    assert not list((toy.folder / "uploads").iterdir())
    free["bytes"] += 1
    assert toy.put("a", update.frame) == len(update.frame)
    toy.close()


def test_the_part_of_a_client_that_left_is_deleted(toy):
    toy.join("a", "b")
    toy.put("a", b"x" * 1000)
    toy.service.leave("a", KEY + "a", "done")
    assert not list((toy.folder / "uploads").iterdir())


def test_the_state_folder_is_private(tmp_path):
    folder = make_run(tmp_path / "state")
    folder.chmod(0o755)
    Toy(folder).close()
    assert folder.stat().st_mode & 0o077 == 0
