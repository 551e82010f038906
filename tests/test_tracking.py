"""Trackers: what they record, and that nothing waits for one that fails."""

import importlib
import json
import subprocess
import sys
import time

import pytest

from edgefed import tracking
from edgefed.errors import ConfigError
from edgefed.simulation.processes import LocalClient, LocalFederation
from edgefed.tracking import RoundTrackers, check_trackers

RUN = {"run_id": "run-1", "model": "tiny", "method": "hfedmoe", "rounds": 2, "seed": 0}


def record(specs, rounds=((1, {"train_loss": 3.0, "nan": float("nan")}), (2, {"train_loss": 2.5}))):
    messages = []
    with RoundTrackers(specs, "laptop", messages.append) as trackers:
        for server_round, metrics in rounds:
            trackers.record(RUN, server_round, metrics)
    return messages


def test_json_lines(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    assert record([f"json:{path}"]) == []
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["server_round"], line["metrics"]) for line in lines] == [
        (1, {"train_loss": 3.0}),
        (2, {"train_loss": 2.5}),
    ]
    assert {(line["run_id"], line["name"]) for line in lines} == {("run-1", "laptop")}


def test_a_tracker_that_fails_is_reported_once_and_the_others_go_on(tmp_path):
    (tmp_path / "file").write_text("")
    messages = record([f"json:{tmp_path / 'file' / 'metrics.jsonl'}", f"json:{tmp_path / 'good.jsonl'}"])
    assert len(messages) == 1
    assert "gets no more metrics" in messages[0]
    assert len((tmp_path / "good.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("break_", "said"),
    [("import time; time.sleep(60)", "did not end within"), ("import os; os.abort()", "killed by SIGABRT")],
)
def test_a_tracker_that_hangs_or_dies_holds_nobody_up(tmp_path, monkeypatch, break_, said):
    package = tmp_path / "tensorboard"
    package.mkdir()
    (package / "__init__.py").write_text(break_)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(tracking, "OPEN_S", 0.5 if "sleep" in break_ else 60.0)
    importlib.invalidate_caches()
    messages = []
    with RoundTrackers([f"tensorboard:{tmp_path}"], "laptop", messages.append) as trackers:
        started = time.process_time()
        for server_round in range(1, 5):
            trackers.record(RUN, server_round, {"train_loss": 1.0})
        assert time.process_time() - started < 0.2
    assert len(messages) == 1
    assert said in messages[0]


@pytest.mark.parametrize("spec", ["tensorboard", "tensorboard:", "wandb:my-project", "csv:file", ""])
def test_an_unknown_tracker_is_refused(spec):
    with pytest.raises(ConfigError, match="invalid tracker"):
        check_trackers([spec])


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(tracking.PACKAGES, "mlflow", "no_such_package")
    with pytest.raises(ConfigError, match="needs the package no_such_package") as caught:
        check_trackers(["mlflow:runs"])
    assert "edgefed[mlflow]" in caught.value.remedy


@pytest.mark.full
def test_tensorboard_reads_the_events(tmp_path, patient):
    pytest.importorskip("tensorboard", reason="needs tensorboard: pip install 'edgefed[tensorboard]'")
    assert record([f"tensorboard:{tmp_path}"]) == []
    script = (
        "import sys\n"
        "from tensorboard.backend.event_processing.event_accumulator import EventAccumulator\n"
        "events = EventAccumulator(sys.argv[1])\n"
        "events.Reload()\n"
        "print([(e.step, e.value) for e in events.Scalars('train_loss')])\n"
    )
    folder = str(tmp_path / "run-1-laptop")
    read = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, check=True)
    assert read.stdout.strip() == "[(1, 3.0), (2, 2.5)]"


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_server_and_a_client_record_each_round(tmp_path):
    flags = ["--rounds", "2", "--min-clients", "1", "--local-steps", "2", "--profile-tokens", "256"]
    client = LocalClient("laptop", "silo:email", flags=("--track", f"json:{tmp_path / 'client.jsonl'}"))
    serve = [*flags, "--track", f"json:{tmp_path / 'server.jsonl'}"]
    with LocalFederation(tmp_path / "run", serve, [client]) as federation:
        federation.run(lambda status: None, timeout_s=800)
    for name, metric in (("server", "uploaded_bytes"), ("client", "train_loss")):
        lines = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert [line["server_round"] for line in lines] == [1, 2]
        assert all(line["metrics"][metric] > 0 for line in lines)


@pytest.fixture
def patient(monkeypatch):
    """Importing a tracker takes long on a busy machine."""
    for name in ("OPEN_S", "CALL_S", "CLOSE_S"):
        monkeypatch.setattr(tracking, name, 280.0)


@pytest.mark.full
def test_wandb_writes_an_offline_run(tmp_path, monkeypatch, patient):
    pytest.importorskip("wandb", reason="needs wandb: pip install 'edgefed[wandb]'")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    assert record(["wandb:offline"]) == []
    (file,) = tmp_path.glob("wandb/offline-run-*-run-1-laptop/*.wandb")
    content = file.read_bytes()
    assert b"train_loss" in content
    assert b"hfedmoe" in content


@pytest.mark.full
def test_mlflow_reads_the_run(tmp_path, monkeypatch, patient):
    pytest.importorskip("mlflow", reason="needs mlflow: pip install 'edgefed[mlflow]'")
    assert record([f"mlflow:{tmp_path}"]) == []
    assert record([f"mlflow:{tmp_path}"], [(3, {"train_loss": 2.0})]) == [], "a process that restarts goes on"
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    script = (
        "import sys\n"
        "from mlflow.tracking import MlflowClient\n"
        "client = MlflowClient(sys.argv[1])\n"
        "experiment = client.get_experiment_by_name('edgefed')\n"
        "(run,) = client.search_runs([experiment.experiment_id])\n"
        "history = client.get_metric_history(run.info.run_id, 'train_loss')\n"
        "print(run.data.params['method'], [(m.step, m.value) for m in history])\n"
    )
    read = subprocess.run([sys.executable, "-c", script, tmp_path.as_uri()], capture_output=True, text=True, check=True)
    assert read.stdout.strip() == "hfedmoe [(1, 3.0), (2, 2.5), (3, 2.0)]"
