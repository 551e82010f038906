"""The loop inside this process, against a real loopback server that fails on request."""

from __future__ import annotations

import dataclasses
import random
import threading
import time

import msgspec
import pytest
from agent_rig import Memo, device, ledger, start
from fake_aggregator import EXPERTS, REFUSED, FakeAggregator
from throttling_proxy import ThrottlingProxy
from toy_device import ToyTrainer, toy_value

from edgefed.agent import delivery, finish, network
from edgefed.agent.agent import AgentSettings, open_agent
from edgefed.agent.backoff import BackoffSchedule, Retry
from edgefed.agent.cache import BlobCache
from edgefed.agent.journal import Journal
from edgefed.errors import (
    ChecksumMismatch,
    DiskFull,
    EdgefedError,
    IdentityInUse,
    InvalidUpdate,
    NotFound,
    OffsetMismatch,
    ProtocolError,
    RoundClosed,
    ServerUnreachable,
    StateLocked,
    TrainingDiverged,
    Unauthorized,
    UnknownClient,
    UpdateConflict,
    UpdateTooLarge,
    VersionMismatch,
)
from edgefed.progress import StopRequested
from edgefed.protocol.comparison import Comparison
from edgefed.protocol.messages import ExpertSurvey, Heartbeat


def test_a_whole_run(server: FakeAggregator, tmp_path):
    memo, trainer = Memo(), ToyTrainer(bias=1.0)
    with device(server.url, tmp_path, trainer, memo=memo) as agent:
        summary = agent.run()
    assert (summary.rounds, summary.finished, summary.reason) == (2, True, "all rounds done")
    assert summary.metrics["loss"] == 0.5
    assert "broken" not in summary.metrics
    assert trainer.rounds == [1, 2]
    assert [server.value_of(expert) for expert in range(EXPERTS)] == [toy_value(1.0, 2)] * EXPERTS
    assert server.registrations == 1
    assert server.left == []
    register = next(iter(server.clients.values()))
    assert (register.name, register.num_examples) == ("toy", 7)
    first, second = ledger(tmp_path)
    assert (first["outcome"], first["attempt"], first["server_round"]) == ("accepted", 1, 1)
    assert (first["experts_resident"], first["experts_changed"], first["resumed"]) == (EXPERTS, EXPERTS, False)
    assert {"download", "train", "upload"} <= first["seconds"].keys()
    assert first["metrics"]["loss"] == 1.0
    unit = next(iter(server.units.values()))
    # After round 1 the four experts are equal, so they are one blob; the cache keeps the frozen unit, not config.json.
    assert first["bytes_down"] > 5 * unit.size_bytes > 2 * unit.size_bytes > second["bytes_down"] > unit.size_bytes
    assert second["bytes_up"] > EXPERTS * unit.size_bytes - 4096
    assert ("train", 3) in memo.phases
    assert memo.advanced["upload"] == dict(memo.phases)["upload"]
    assert list((tmp_path / "updates").iterdir()) == []
    assert {file.name for file in (tmp_path / "blobs").iterdir()} == {server.units["model.embed"].sha256}
    with Journal(tmp_path) as journal:
        assert (journal.record.phase, journal.record.rounds_acknowledged) == ("idle", 2)
        assert journal.record.bytes_up == first["bytes_up"] + second["bytes_up"]


def test_a_heartbeat_at_the_end_of_a_round_keeps_totals_consistent(server: FakeAggregator, tmp_path, monkeypatch):
    """The ledger's line and the journal's totals are of the same bytes, whatever is sent between the two."""
    with device(server.url, tmp_path) as agent:
        write = delivery.append_entry

        def slow_disk(*args):
            write(*args)
            agent.client.heartbeat(Heartbeat(phase="x" * 1000, fraction=0.0, server_round=1))

        monkeypatch.setattr(delivery, "append_entry", slow_disk)
        agent.run()
    with Journal(tmp_path) as journal:
        for name in ("bytes_up", "bytes_down"):
            assert getattr(journal.record, name) == sum(line[name] for line in ledger(tmp_path))


def test_a_device_killed_after_its_ledger_was_written_notes_the_update_once(server, tmp_path, monkeypatch):
    monkeypatch.setattr(Journal, "acknowledge", lambda journal, **_: 1 / 0)
    with device(server.url, tmp_path) as agent, pytest.raises(ZeroDivisionError):
        agent.run()
    monkeypatch.undo()
    with device(server.url, tmp_path) as agent:
        agent.run()
    assert [(line["server_round"], line["outcome"]) for line in ledger(tmp_path)] == [(1, "accepted"), (2, "accepted")]
    with Journal(tmp_path) as journal:
        assert journal.record.bytes_up == sum(line["bytes_up"] for line in ledger(tmp_path))


class Surveyor(ToyTrainer):
    """Says something of its experts."""

    def train_round(self, *args):
        rows = ((0.5,) * EXPERTS,)
        survey = ExpertSurvey(utility=rows, frequency=rows, tune_slots=EXPERTS, train_slots=2)
        return dataclasses.replace(super().train_round(*args), survey=survey)


@pytest.mark.timeout(60)
def test_a_survey_contains_the_rate_of_its_own_upload(server, tmp_path, monkeypatch):
    """65 KB up at 200 kB/s, 80 KB down at 400 kB/s; the minimum for a rate is lowered to match."""
    monkeypatch.setattr(network, "TINY_BYTES", 1024)
    monkeypatch.setattr(network, "ENOUGH_BYTES", 32 * 1024)
    with (
        ThrottlingProxy(server.port, up=200_000, down=400_000) as proxy,
        device(proxy.url, tmp_path, Surveyor()) as agent,
    ):
        agent.run()
    first, second = (meta.survey for meta in server.commits)
    for said in (first, second):
        assert 20_000 < said.upload_bytes_per_s < 600_000
        assert 10_000 < said.download_bytes_per_s < 1_200_000
        assert (said.tune_slots, said.train_slots) == (EXPERTS, 2)


def test_an_unmeasured_rate_is_not_reported(server, tmp_path):
    with device(server.url, tmp_path, Surveyor()) as agent:
        agent.step()
    assert server.commits[0].survey.upload_bytes_per_s is None, "so few bytes say too little"


class Comparing(ToyTrainer):
    """Compares what it is given."""

    fetches: bool | None = None

    def compare(self, run, manifest, fetch, progress, skipped=""):
        self.fetches = not skipped
        if not skipped:
            fetch(manifest.units)
        return Comparison(server_round=manifest.server_round, device=1.5, skipped=skipped)


@pytest.mark.parametrize("evaluation", ["auto", "never"])
def test_a_device_compares_at_the_end_even_where_the_server_does_not_listen(server, tmp_path, evaluation):
    with device(server.url, tmp_path, trainer := Comparing(), final_evaluation=evaluation) as agent:
        summary = agent.run()  # this server answers 404 to the report
    assert summary.finished
    assert trainer.fetches == (True if evaluation == "auto" else None)
    assert (summary.comparison and summary.comparison.device) == (1.5 if evaluation == "auto" else None)


def test_a_final_model_larger_than_the_whole_run_is_not_downloaded(server, tmp_path, monkeypatch):
    monkeypatch.setattr(finish, "FREE_DOWNLOAD_BYTES", 0)
    monkeypatch.setattr(BlobCache, "bytes_to_download", lambda cache, items: 1 << 40)
    memo, trainer = Memo(), Comparing()
    with device(server.url, tmp_path, trainer, memo=memo, final_evaluation="auto") as agent:
        summary = agent.run()
    assert not trainer.fetches
    assert "1024 GiB to download" in summary.comparison.skipped
    assert any("is not evaluated: 1024 GiB" in text for text in memo.messages)


def test_missing_blobs_between_rounds_are_ignored(server, tmp_path):
    class Late(ToyTrainer):
        def between_rounds(self, fetch, progress) -> None:
            progress.phase("profile", 1, "token")
            raise NotFound("that blob is of a round long gone")

    with device(server.url, tmp_path, Late()) as agent:
        summary = agent.run()
    assert (summary.rounds, summary.finished) == (2, True)


def test_steps_drive_several_devices_in_one_process(server, tmp_path):
    server.quorum = 2
    with (
        device(server.url, tmp_path / "a", ToyTrainer(1.0)) as a,
        device(server.url, tmp_path / "b", ToyTrainer(3.0)) as b,
    ):
        kinds = [(a.step().kind, b.step().kind) for _ in range(2)]
        assert kinds == [("accepted", "accepted")] * 2
        assert a.step().kind == b.step().kind == "finished"
    assert server.value_of(0) == toy_value(2.0, 2)


def test_waiting_is_an_outcome(server, tmp_path):
    server.quorum = 2
    with device(server.url, tmp_path) as agent:
        assert agent.step().kind == "accepted"
        outcome = agent.step()
    assert (outcome.kind, outcome.detail) == ("waited", "the others still train")


def test_heartbeats_report_phase_and_fraction_during_training(server, tmp_path):
    with device(server.url, tmp_path, ToyTrainer(step_s=0.2)) as agent:
        agent.step()
        agent.step()
    training = [beat for beat in server.heartbeats if beat.phase == "train"]
    assert {beat.server_round for beat in training} == {1, 2}
    assert {round(beat.fraction, 2) for beat in training} >= {0.33, 0.67}


def test_heartbeat_failures_do_not_matter(server, tmp_path):
    server.fail.append(("heartbeat", 500, 10**6))
    with device(server.url, tmp_path, ToyTrainer(step_s=0.05)) as agent:
        assert agent.run().rounds == 2
    assert server.heartbeats == []
    assert server.fail[0][2] < 10**6


@pytest.mark.parametrize(
    ("part", "error"),
    [
        ("POST /v1/clients", 503),
        ("assignment", 500),
        ("manifests", EdgefedError("a bug in the server")),
        ("blobs", 502),
        ("PUT", DiskFull("server disk")),
        ("uploads", 429),
        ("commit", 503),
    ],
)
def test_server_errors_are_retried(server, tmp_path, part, error):
    server.fail.append((part, error, 3))
    with device(server.url, tmp_path, memo=(memo := Memo())) as agent:
        assert agent.run().rounds == 2
    assert server.fail == []
    assert len(server.accepted) == 2
    assert ("connected" if part == "POST /v1/clients" else "connected again") in memo.messages


def test_a_web_page_after_joining_is_retried(server, tmp_path):
    with device(server.url, tmp_path) as agent:
        agent.step()
        server.fail.append(("assignment", 404, 2))  # a tunnel that lost its server answers like this
        assert agent.run().rounds == 2


def test_a_run_over_cut_connections(server, proxy, tmp_path):
    proxy.cut_down += [40_000, 1000, 30_000]
    proxy.cut_up += [300, 50_000, 20_000, 30_000]
    with device(proxy.url, tmp_path) as agent:
        assert agent.run().rounds == 2
    assert proxy.cuts_made >= 4
    assert len(server.accepted) == 2
    assert server.value_of(0) == toy_value(0.0, 2)


def test_server_restart_in_the_middle(server, tmp_path, wait_until):
    trainer = ToyTrainer(step_s=0.15)
    with device(server.url, tmp_path, trainer) as agent:
        thread, ends = start(agent)
        wait_until(lambda: agent.progress.snapshot()[0] == "train")
        server.stop()
        wait_until(lambda: agent.journal.record.phase == "uploading")
        time.sleep(0.3)
        assert thread.is_alive()
        server.start()
        thread.join(15)
    assert ends[0].rounds == 2
    assert trainer.rounds == [1, 2]
    assert server.registrations == 1


def test_an_agent_registers_again_with_a_server_that_lost_its_clients(server, tmp_path, wait_until):
    trainer = ToyTrainer(step_s=0.1)
    with device(server.url, tmp_path, trainer) as agent:
        thread, ends = start(agent)
        wait_until(lambda: trainer.rounds == [1])
        server.clients.clear()
        thread.join(15)
    assert ends[0].rounds == 2
    assert server.registrations == 2
    assert trainer.rounds == [1, 2]


def test_a_server_that_rejects_every_registration_ends_the_agent(server, tmp_path):
    server.fail.append(("assignment", UnknownClient("who?"), 10**6))
    with device(server.url, tmp_path) as agent, pytest.raises(UnknownClient):
        agent.run()
    assert server.registrations == 3


def test_run_that_changes_under_a_registered_device(server, tmp_path):
    with device(server.url, tmp_path, trainer := ToyTrainer()) as agent:
        agent.step()
        server.run = msgspec.structs.replace(server.run, run_id="run-2")
        assert [agent.step().kind for _ in range(2)] == ["unregistered", "accepted"]
        assert agent.journal.record.run_id == "run-2"
        assert trainer.rounds == [1, 2]


def test_a_new_run_at_the_same_address_drops_pending_work(server, tmp_path, tmp_path_factory, caplog):
    server.fail.append(("commit", Unauthorized("token changed"), 1))
    with device(server.url, tmp_path) as agent, pytest.raises(Unauthorized):
        agent.run()
    port = server.port
    server.stop()
    other = FakeAggregator(tmp_path_factory.mktemp("server"), run_id="run-2", rounds=1)
    other.port = port
    other.start()
    try:
        with device(other.url, tmp_path) as agent:
            assert agent.run().rounds == 1
    finally:
        other.stop()
        server.start()
    assert other.clients.keys() == server.clients.keys()
    assert "dropping the uploading update" in caplog.text
    assert [entry["run_id"] for entry in ledger(tmp_path)] == ["run-2"]


def test_lost_acknowledgement_counts_once(server, tmp_path):
    server.lose_acknowledgements = 2
    with device(server.url, tmp_path) as agent:
        assert agent.step().kind == "accepted"
    assert len(server.commits) == 3
    assert len(server.accepted) == 1
    assert len({c.attempt for c in server.commits}) == 1


@pytest.mark.parametrize("error", [RoundClosed("late"), UpdateConflict("other"), NotFound("round is unknown")])
def test_late_update_is_dropped(server, tmp_path, error):
    times = 3 if isinstance(error, NotFound) else 1
    server.fail.append(("commit", error, times))
    with device(server.url, tmp_path, trainer := ToyTrainer()) as agent:
        outcome = agent.step()
        assert (outcome.kind, outcome.detail) == ("dropped", str(error))
        assert agent.journal.pending is None
        assert list((tmp_path / "updates").iterdir()) == []
        assert agent.run().rounds == 2
    assert trainer.rounds == [1, 1, 2]
    assert [(entry["outcome"], entry["attempt"]) for entry in ledger(tmp_path)] == [
        (error.code, 1), ("accepted", 2), ("accepted", 1),
    ]  # fmt: skip


def test_round_that_ends_during_the_download_is_dropped(server, tmp_path):
    for part in ("manifests", "blobs"):
        server.fail.append((part, NotFound("moved on"), 1))
    with device(server.url, tmp_path) as agent:
        assert [agent.step().kind for _ in range(3)] == ["dropped", "dropped", "accepted"]


@pytest.mark.parametrize("error", [REFUSED, UpdateTooLarge("too many bytes")])
def test_three_refused_updates_in_a_row_end_the_agent(server, tmp_path, error):
    server.fail += [("commit", error, 2)]
    with device(server.url, tmp_path / "a") as agent:
        assert [agent.step().kind for _ in range(3)] == ["dropped", "dropped", "accepted"]
        server.fail += [("commit", error, 3)]  # the acceptance in between started the count again
        assert [agent.step().kind for _ in range(2)] == ["dropped", "dropped"]
        with pytest.raises(type(error)):
            agent.run()
        assert agent.journal.pending is None  # a restart does not send it again
    assert server.left == [error.code]


def test_upload_that_arrives_damaged_is_sent_again(server, tmp_path):
    server.reset_on_commit = 2
    with device(server.url, tmp_path, trainer := ToyTrainer()) as agent:
        assert agent.step().kind == "accepted"
        assert trainer.rounds == [1]
        assert [meta.attempt for meta in server.commits] == [1, 2, 3]
        server.reset_on_commit = 3
        assert agent.step().kind == "dropped"


def test_bytes_that_the_server_lost_are_sent_again(server, tmp_path):
    server.fail.append(("commit", OffsetMismatch("bytes are missing"), 2))
    with device(server.url, tmp_path, trainer := ToyTrainer()) as agent:
        assert agent.step().kind == "accepted"
        assert trainer.rounds == [1]
    assert server.commits[-1].attempt == 1


def test_a_blob_damaged_three_times_ends_the_agent(server, tmp_path):
    server.corrupt_blobs[server.units["model.embed"].sha256] = 10**6
    with device(server.url, tmp_path) as agent:
        assert [agent.step().kind for _ in range(2)] == ["dropped", "dropped"]
        with pytest.raises(ChecksumMismatch):
            agent.step()


def test_damaged_pending_update_is_trained_again(server, tmp_path):
    server.fail.append(("commit", VersionMismatch("new server"), 1))
    with device(server.url, tmp_path) as agent, pytest.raises(VersionMismatch):
        agent.run()
    next((tmp_path / "updates").iterdir()).write_bytes(b"short")
    with device(server.url, tmp_path, memo=(memo := Memo())) as agent:
        assert [agent.step().kind for _ in range(2)] == ["dropped", "accepted"]
    assert "damaged or missing" in memo.messages[0]
    assert len(server.accepted) == 1


@pytest.mark.parametrize("error", [Unauthorized("wrong token"), VersionMismatch("too old")])
def test_permanent_errors_end_the_agent(server, tmp_path, error):
    server.fail.append(("POST /v1/clients", error, 1))
    with device(server.url, tmp_path) as agent, pytest.raises(type(error)):
        agent.run()
    with device(server.url, tmp_path) as agent:  # and a second start works
        assert agent.run().rounds == 2


def test_an_unreachable_server_ends_the_agent_only_before_joining(server, tmp_path):
    server.stop()
    started = time.monotonic()
    memo = Memo()
    unreached = pytest.raises(ServerUnreachable, match=f"no server was ever reached at {server.url}: gave up after 0 s")
    with device(server.url, tmp_path, memo=memo, give_up_after_s=0.3) as agent, unreached:
        agent.run()
    assert 0.3 <= time.monotonic() - started < 5
    assert [line for line in memo.messages if line.endswith("retrying for 0 s")] == memo.messages
    assert len(memo.messages) == 1
    server.start()
    with device(server.url, tmp_path, memo=memo) as agent:
        agent.step()
    assert memo.messages[1] == "joined: fedavg on tiny, 2 rounds"
    server.stop()
    with device(server.url, tmp_path, give_up_after_s=0.1) as agent:  # a restarted device waits for its server
        thread, ends = start(agent)
        time.sleep(0.5)
        assert thread.is_alive()
        server.start()
        thread.join(15)
    assert ends[0].rounds == 1
    assert str(ends[0]) == "Run finished. This device trained in 2 of 2 rounds."


def test_a_web_page_before_joining_ends_the_agent(server, tmp_path):
    server.fail.append(("POST /v1/clients", 404, 1))
    with device(server.url, tmp_path) as agent, pytest.raises(ProtocolError, match="not answer as an edgefed server"):
        agent.run()
    assert len(server.log) == 1


def test_stop_during_training_leaves_and_stays_resumable(server, tmp_path, wait_until):
    stop, trainer = threading.Event(), ToyTrainer(step_s=0.3)
    with device(server.url, tmp_path, trainer, stop=stop) as agent:
        thread, ends = start(agent)
        wait_until(lambda: any(beat.phase == "train" for beat in server.heartbeats))
        stop.set()
        thread.join(5)
        assert (ends[0].finished, ends[0].reason, ends[0].rounds) == (False, "stopped", 0)
        assert server.left == ["stopped by its user"]
        assert server.accepted == {}
        beats = len(server.heartbeats)
        time.sleep(3 * server.heartbeat_s)
        assert len(server.heartbeats) == beats  # a heartbeat after the goodbye would undo it
    with device(server.url, tmp_path, trainer) as agent:
        agent.step()
    assert [meta.attempt for meta in server.accepted.values()] == [2]


def test_stop_during_a_long_poll_is_quick(server, tmp_path, wait_until):
    server.quorum = 2
    stop = threading.Event()
    with device(server.url, tmp_path, stop=stop) as agent:
        agent.step()
        polls = len(server.log)
        thread, ends = start(agent)
        wait_until(lambda: any("assignment" in path for _, path, _ in server.log[polls:]))
        started = time.monotonic()
        stop.set()
        thread.join(5)
        assert time.monotonic() - started < 1
    assert ends[0].reason == "stopped"
    assert len(server.left) == 1


def test_stop_while_the_server_is_away(server, tmp_path):
    stop = threading.Event()
    with device(server.url, tmp_path, stop=stop) as agent:
        agent.step()
        server.stop()
        thread, ends = start(agent)
        time.sleep(0.2)
        stop.set()
        thread.join(5)
        assert ends[0].reason == "stopped"
        with pytest.raises(StopRequested):
            agent.step()
    server.start()


def test_trainer_errors_propagate_after_leaving(server, tmp_path):
    class Diverging(ToyTrainer):
        def train_round(self, *_):
            raise TrainingDiverged("loss is nan")

    with device(server.url, tmp_path, Diverging()) as agent, pytest.raises(TrainingDiverged):
        agent.run()
    assert server.left == ["training-diverged"]


@pytest.mark.parametrize(
    ("end", "reason"),
    [(SystemExit, "stopped by its user"), (KeyboardInterrupt, "stopped by its user"),
     (ZeroDivisionError, "internal error (ZeroDivisionError)")],
)  # fmt: skip
def test_the_server_hears_in_words_why_a_device_leaves(server, tmp_path, end, reason):
    class Ending(ToyTrainer):
        def train_round(self, *_):
            raise end

    with device(server.url, tmp_path, Ending()) as agent, pytest.raises(end):
        agent.run()
    assert server.left == [reason]


def test_a_state_folder_has_one_agent(server, tmp_path):
    with device(server.url, tmp_path), pytest.raises(StateLocked), device(server.url, tmp_path):
        pass


def test_open_agent_unlocks_the_folder_after_an_error(server, tmp_path):
    with pytest.raises(InvalidUpdate), device(server.url, tmp_path):
        raise InvalidUpdate("in the body")
    with device(server.url, tmp_path):
        pass


@pytest.mark.parametrize("refusal", [DiskFull("cannot write an upload"), 413], ids=["disk", "proxy"])
def test_refused_uploads_back_off_although_bytes_moved(server, tmp_path, refusal):
    """Only what the server has is progress; otherwise every try would begin with the shortest wait again."""
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 8:
            server.fail.clear()

    retry = Retry(threading.Event(), schedule=BackoffSchedule(), rng=Longest(), sleep=sleep)
    server.fail.append(("PUT", refusal, 1000))
    settings = AgentSettings(name="toy", memory_bytes=1 << 30, poll_s=1.0)
    with open_agent(server.url, tmp_path, settings, ToyTrainer(), retry=retry, progress=(memo := Memo())) as agent:
        assert agent.step().kind == "accepted"
    assert waits[:8] == [0.5, 1, 2, 4, 8, 16, 30, 30]
    notes = [line for line in memo.messages if "retrying" in line]
    assert len(notes) == 1
    assert ("the server" in notes[0]) == isinstance(refusal, DiskFull)


class Longest(random.Random):
    """Draws the upper limit."""

    def uniform(self, a: float, b: float) -> float:
        return b


def test_the_server_s_reason_to_wait_is_printed_when_it_changes(server, tmp_path):
    with device(server.url, tmp_path, memo=(memo := Memo())) as agent:
        agent.step()
        server.reasons = ["round 2 waits for 2 clients, 1 are here"] * 3 + ["round 2 runs without this client"]
        for _ in range(4):
            assert agent.step().kind == "waited"
    assert [line for line in memo.messages if "round 2" in line] == [
        "round 2 waits for 2 clients, 1 are here",
        "round 2 runs without this client",
    ]
    queries = [query for _, path, query in server.log if path.endswith("/assignment")]
    assert queries == ["wait_s=0.0", *["wait_s=1.0"] * 4], "the first answer comes at once"


def test_a_copied_identity_ends_the_agent_and_keeps_its_update(server, tmp_path):
    server.fail.append(("commit", IdentityInUse("another process has registered"), 1))
    with device(server.url, tmp_path) as agent, pytest.raises(IdentityInUse):
        agent.run()
    with Journal(tmp_path) as journal:
        assert journal.pending is not None
    with device(server.url, tmp_path) as agent:
        assert agent.run().rounds == 2
    assert len(server.clients) == 1


def test_a_new_identity_joins_as_another_client(server, tmp_path):
    with device(server.url, tmp_path) as agent:
        agent.step()
    (first,) = server.clients
    settings = AgentSettings(name="copy", memory_bytes=1 << 30, poll_s=1.0)
    with open_agent(server.url, tmp_path, settings, ToyTrainer(), new_identity=True) as agent:
        agent.step()
    assert len(server.clients) == 2
    assert len({message.client_key for message in server.clients.values()}) == 2
    with Journal(tmp_path) as journal:
        assert journal.record.client_id != first


def test_every_process_sends_its_own_instance_name(server, tmp_path):
    instances = []
    for _ in range(2):
        with device(server.url, tmp_path) as agent:
            agent.step()
            (message,) = server.clients.values()
            assert message.instance == agent.client.instance
            instances.append(message.instance)
    assert len(set(instances)) == 2
