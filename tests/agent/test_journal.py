"""Identity and pending work over restarts, corruption, and two agents in one folder."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys

import pytest

from edgefed.agent import journal as journal_module
from edgefed.agent.journal import Journal
from edgefed.errors import DiskFull, StateCorrupt, StateLocked
from edgefed.protocol.messages import ExpertReport, UpdateMeta


def write_update(journal: Journal, attempt: int = 1) -> UpdateMeta:
    data = b"update" * 100
    journal.update_path().write_bytes(data)
    return UpdateMeta(
        client_id=journal.record.client_id,
        server_round=journal.record.server_round,
        attempt=attempt,
        sha256=hashlib.sha256(data).hexdigest(),
        size_bytes=len(data),
        num_examples=5,
        num_tokens=50,
        experts=(ExpertReport(layer=0, expert=3, usage=0.5, importance=1.25, steps=2, tokens=9),),
        metrics={"loss": 2.5},
    )


def reopen(journal: Journal) -> Journal:
    journal.close()
    return Journal(journal.folder)


def test_identity_is_made_once_and_kept_private(tmp_path):
    with Journal(tmp_path / "state") as journal:
        first = journal.record
    with Journal(tmp_path / "state") as journal:
        assert journal.record == first
    assert len(first.client_id) == 32
    assert len(first.client_key) == 64
    with Journal(tmp_path / "other") as other:
        assert other.record.client_id != first.client_id
        assert other.record.client_key != first.client_key
    if os.name == "posix":
        assert stat.S_IMODE((tmp_path / "state" / "journal.json").stat().st_mode) == 0o600


def test_pending_update_survives_every_transition(tmp_path):
    journal = Journal(tmp_path)
    journal.bind("http://a:1", "run")
    assert journal.begin_training(4) == 1
    journal = reopen(journal)
    assert (journal.record.phase, journal.pending) == ("training", None)
    assert journal.begin_training(4) == 2  # the same round again: a new attempt
    meta = write_update(journal, 2)
    journal.finish_training(journal.update_path(), meta, bytes_down=10, seconds={"train": 1.5})
    journal = reopen(journal)
    assert (journal.record.phase, journal.pending) == ("trained", meta)
    assert journal.pending_path.read_bytes() == b"update" * 100
    journal.begin_upload()
    journal = reopen(journal)
    assert (journal.record.phase, journal.pending) == ("uploading", meta)
    assert (journal.record.round_bytes_down, journal.record.round_seconds) == (10, {"train": 1.5})
    journal.begin_next_attempt()
    assert (journal.pending.attempt, journal.record.attempt, journal.record.phase) == (3, 3, "trained")
    update = journal.pending_path
    journal.acknowledge(bytes_down=10, bytes_up=600)
    journal = reopen(journal)
    assert (journal.record.phase, journal.pending, update.exists()) == ("idle", None, False)
    assert (journal.record.rounds_acknowledged, journal.record.bytes_up) == (1, 600)
    assert journal.begin_training(4) == 4
    assert journal.begin_training(5) == 1
    journal.close()


@pytest.mark.parametrize("place", [("http://b:1", "run"), ("http://a:1", "another run")])
def test_another_run_or_server_drops_work_and_keeps_the_identity(tmp_path, caplog, place):
    with Journal(tmp_path) as journal:
        identity = journal.record.client_id
        journal.bind("http://a:1", "run")
        journal.begin_training(2)
        update = journal.update_path()
        journal.finish_training(update, write_update(journal), bytes_down=0, seconds={})
        journal.bind("http://a:1", "run")
        assert journal.pending is not None
        assert not caplog.records
        journal.bind(*place)
        assert journal.pending is None
        assert not update.exists()
        assert journal.record.client_id == identity
        assert "dropping the trained update of round 2" in caplog.text
        assert journal.begin_training(2) == 1
        assert journal.knows(place[0])
        assert not journal.knows("http://c:1")


def test_stray_files_of_a_crash_are_removed(tmp_path):
    with Journal(tmp_path) as journal:
        journal.begin_training(1)
        (journal.updates / "round-1-attempt-1.safetensors.tmp").write_bytes(b"half")
    with Journal(tmp_path) as journal:
        assert list(journal.updates.iterdir()) == []


def test_failed_write_keeps_the_old_journal(tmp_path, monkeypatch):
    with Journal(tmp_path) as journal:
        journal.begin_training(1)

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("edgefed.disk.sync_file", full)
        with pytest.raises(DiskFull, match=r"journal\.json"):
            journal.begin_training(2)
        assert journal.record.server_round == 1
    monkeypatch.undo()
    with Journal(tmp_path) as journal:
        assert journal.record.server_round == 1


def change(**fields):
    def apply(data: bytes) -> bytes:
        return json.dumps({**json.loads(data), **fields}).encode()

    return apply


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-20],
        lambda data: b"\xff" + data,
        lambda data: b"[" * 100_000,
        change(phase="dancing"),
        change(phase="uploading"),  # without an update
        change(client_id="../../etc"),
        change(client_key=""),
        change(format_version=99),
        change(server_round="one"),
    ],
)
def test_damaged_journal_is_named_and_not_overwritten(tmp_path, damage):
    with Journal(tmp_path):
        pass
    path = tmp_path / journal_module.JOURNAL_FILE
    bad = damage(path.read_bytes())
    path.write_bytes(bad)
    for _ in range(2):  # the second time shows that the first released the lock
        with pytest.raises(StateCorrupt, match="invalid journal") as caught:
            Journal(tmp_path)
        assert "new client" in caught.value.remedy
    assert path.read_bytes() == bad


def test_an_update_file_outside_the_folder_is_refused(tmp_path):
    with Journal(tmp_path) as journal:
        journal.begin_training(1)
        journal.finish_training(journal.update_path(), write_update(journal), bytes_down=0, seconds={})
    path = tmp_path / journal_module.JOURNAL_FILE
    path.write_bytes(change(update_file="../journal.json")(path.read_bytes()))
    with pytest.raises(StateCorrupt, match="invalid file name"):
        Journal(tmp_path)


def test_a_locked_folder_refuses_a_second_agent(tmp_path):
    with Journal(tmp_path):
        with pytest.raises(StateLocked, match="another edgefed process"):
            Journal(tmp_path)
        code = f"from edgefed.agent.journal import Journal; Journal({str(tmp_path)!r})"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
        assert other.returncode != 0
        assert "StateLocked" in other.stderr
        if os.name != "nt":
            (tmp_path / journal_module.LOCK_FILE).unlink()  # by somebody who takes it for a leftover
            with pytest.raises(StateLocked):
                Journal(tmp_path)
    with Journal(tmp_path):
        pass
