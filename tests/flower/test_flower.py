"""edgefed's methods on Flower, against edgefed's own aggregator: the same model, bit by bit."""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import msgspec
import psutil
import pytest

import edgefed
from edgefed.agent.agent import BLOBS_FOLDER
from edgefed.agent.journal import Journal
from edgefed.errors import ConfigError, DataError, ProcessFailed
from edgefed.flower.device_process import ADDRESS_FILE, DeviceProcess
from edgefed.flower.round_worker import RoundWorker
from edgefed.flower.tasks import RoundTask
from edgefed.runs import RunReader
from edgefed.simulation.in_process import DirectAggregator
from edgefed.simulation.processes import LocalClient, LocalFederation

SILOS = ("asyncio", "email")
TRAINING = {"rounds": 2, "local_steps": 2, "batch_size": 2, "sequence_length": 32, "min_clients": 2}
TRAINING |= {"profile_tokens": 256, "evaluation_tokens": 64}


def needs_flower():
    pytest.importorskip("flwr", reason="needs flwr: pip install 'edgefed[flower]'")


def node_config(folder: Path, name: str, **more):
    return {"data": f"silo:{name}", "name": name, "memory": "1GiB", "threads": 1, "state": str(folder / name), **more}


def trained_model(state: Path) -> dict[str, str]:
    with RunReader(state) as reader:
        return {unit.key: unit.sha256 for unit in reader.manifest().units}


def own_federation(folder: Path, method: str) -> tuple[dict[str, str], list[str]]:
    """The model of the same run with `edgefed serve` and `edgefed join`, and its clients in the order of their ids."""
    flags = [word for name, value in TRAINING.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    clients = [LocalClient(name, f"silo:{name}", flags=("--memory", "1GiB")) for name in SILOS]
    ids = {}
    for name in SILOS:
        journal = Journal(folder / "clients" / name)
        ids[name] = journal.record.client_id
        journal.close()
    with LocalFederation(folder, [*flags, "--method", method], clients) as federation:
        federation.run(lambda status: None, timeout_s=1200)
    return trained_model(folder / "run"), sorted(SILOS, key=ids.get)


@pytest.mark.full
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("method", ["hfedmoe", "fedavg"])
def test_the_model_is_that_of_edgefeds_own_aggregator(tmp_path, method):
    needs_flower()
    from loopback_grid import LoopbackGrid

    from edgefed.flower import ExpertStrategy, make_client_app

    expected, order = own_federation(tmp_path / "own", method)
    grid = LoopbackGrid(
        make_client_app(), {number: node_config(tmp_path, name) for number, name in enumerate(order, 1)}
    )
    server = edgefed.Server(model="tiny", method=method, state=tmp_path / "run", **TRAINING)
    result = ExpertStrategy(server).start(grid)
    assert trained_model(tmp_path / "run") == expected
    assert list(result.train_metrics_clientapp) == [1, 2]
    assert "train_loss" in result.train_metrics_clientapp[2]
    assert not list(tmp_path.glob(f"*/{ADDRESS_FILE}")), "the devices' processes have ended"


def server_of(folder: Path, **settings) -> edgefed.Server:
    return edgefed.Server(model="tiny", state=folder / "run", **{**TRAINING, **settings})


def bring(aggregator: DirectAggregator, state: Path, hashes) -> None:
    for sha256 in hashes:
        shutil.copy(aggregator.blob(sha256), state / BLOBS_FOLDER / sha256)


def test_a_data_set_as_an_object_does_not_reach_another_process(tmp_path):
    with pytest.raises(ConfigError, match="`data` of a ClientApp must be a path, found list"):
        DeviceProcess(tmp_path, {"data": [{"text": "x"}]})


def test_a_device_asks_for_what_it_lacks_and_repeats_its_update(tmp_path):
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 200)
    state = tmp_path / "device"
    lines, rounds = tmp_path / "rounds.jsonl", []
    client = edgefed.Client(
        "", str(tmp_path / "text.txt"), memory="4GiB", state=state, name="laptop", threads=1, track=[f"json:{lines}"]
    )
    run = server_of(tmp_path, rounds=1, min_clients=1).open_run(on_round=lambda run, status: rounds.append(status))
    with (
        DirectAggregator(run) as aggregator,
        RoundWorker(client) as worker,
    ):
        known = worker.introduce()
        aggregator.register("one", known.name, known.num_examples, known.memory_bytes, known.device)
        assignment = aggregator.assignment("one")
        task = RoundTask(aggregator.active.config, aggregator.manifest(1), assignment, "one", 1)
        asked = []
        while (reply := worker.work(task)).status == "needs":
            asked.append(reply.missing)
            bring(aggregator, state, reply.missing)
        assert reply.status == "trained", reply.error
        assert asked, "a new device has nothing"
        assert len({sha256 for missing in asked for sha256 in missing}) == sum(map(len, asked)), "asks once for each"
        again = worker.work(msgspec.structs.replace(task, attempt=2))
        assert (again.meta.attempt, again.meta.sha256) == (2, reply.meta.sha256)
        aggregator.deliver(reply.meta, Path(reply.update))
        aggregator.fold()
        assert aggregator.finished
        assert {path.name for path in (state / BLOBS_FOLDER).iterdir()} <= set(reply.resident)

        invalid = msgspec.structs.replace(task, run=msgspec.structs.replace(task.run, run_id="../.."))
        assert worker.work(invalid).error.code == "malformed-message"
    assert [(status.server_round, status.updates) for status in rounds] == [(1, 1)]
    (line,) = [json.loads(line) for line in lines.read_text().splitlines()]
    assert (line["name"], line["server_round"]) == ("laptop", 1)
    assert line["metrics"]["train_loss"] == rounds[0].metrics["train_loss"]


@pytest.mark.full
@pytest.mark.timeout(900)
def test_the_process_of_a_device_starts_again_after_a_kill(tmp_path):
    settings = node_config(tmp_path, "email")
    with pytest.raises(DataError, match="not found"):
        DeviceProcess(
            tmp_path / "email", {**settings, "server": "", "data": str(tmp_path / "absent.jsonl")}
        ).introduce()
    device = DeviceProcess(tmp_path / "email", {**settings, "server": ""})
    first = device.introduce().num_examples
    own = [each for each in psutil.Process().children(recursive=True) if each.status() != psutil.STATUS_ZOMBIE]
    (process,) = [each for each in own if "edgefed.flower.device_process" in " ".join(each.cmdline())]
    assert device.introduce().num_examples == first
    assert process.is_running(), "the process stays"
    process.kill()
    process.wait()
    assert device.introduce().num_examples == first
    device.end()
    assert not (tmp_path / "email" / ADDRESS_FILE).exists()


@pytest.mark.full
@pytest.mark.timeout(1500)
def test_lost_messages_and_devices_that_cannot_train(tmp_path):
    needs_flower()
    from loopback_grid import LoopbackGrid

    from edgefed.flower import ExpertStrategy, make_client_app

    bad = node_config(tmp_path, "absent") | {"data": str(tmp_path / "absent.jsonl")}
    grid = LoopbackGrid(make_client_app(), {1: node_config(tmp_path, "email"), 2: bad, 3: {}}, lost=("train",))
    result = ExpertStrategy(server_of(tmp_path, rounds=1, min_clients=1, client_timeout=600)).start(grid)
    assert list(result.train_metrics_clientapp) == [1]
    trains = [(kind, node) for kind, node, _ in grid.sent if kind == "train"]
    assert len(trains) >= 2, "the lost message was sent again"
    assert set(trains) == {("train", 1)}
    assert [(kind, node) for kind, node, _ in grid.sent if node != 1] == [("query.join", 2), ("query.join", 3)]

    none_left = LoopbackGrid(make_client_app(), {2: bad})
    with pytest.raises(ProcessFailed, match=r"no node can take part: file not found: .*absent\.jsonl"):
        ExpertStrategy(server_of(tmp_path / "other", min_clients=1)).start(none_left)
    with pytest.raises(ConfigError, match="num_rounds is 7, the run has 1"):
        ExpertStrategy(server_of(tmp_path, rounds=None, min_clients=1)).start(grid, num_rounds=7)


@pytest.mark.full
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("engine", ["superlink", "simulation"])
def test_the_example_runs(tmp_path, engine):
    needs_flower()
    if engine == "simulation":
        pytest.importorskip("ray", reason="needs ray: pip install 'flwr[simulation]'")
    app = Path(__file__).parents[2] / "examples" / "flower"
    if not app.is_dir():
        pytest.skip("needs examples/flower of a checkout")
    tools = Path(sys.executable).parent
    home, port = tmp_path / "home", 21000 + os.getpid() % 10000
    home.mkdir()
    (home / "config.toml").write_text(f'[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n')
    environment = {**os.environ, "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0"}
    environment |= {"RAY_USAGE_STATS_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    environment["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] = "1"  # edgefed is here, and on no package index
    environment["PATH"] = f"{tools}{os.pathsep}{environment['PATH']}"
    started = []

    def start(*command: str) -> None:
        log = (tmp_path / f"{len(started)}.log").open("wb")
        with log:
            started.append(subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=log, stderr=log))

    try:
        address = ("--insecure", "--host", "127.0.0.1", "--port", str(port))
        start(str(tools / "flower-superlink"), *address, *(["--simulation"] if engine == "simulation" else []))
        wait_for(f"http://127.0.0.1:{port}/health")
        if engine == "superlink":
            for number, name in enumerate(SILOS, 1):
                config = " ".join(f'{key}="{value}"' for key, value in node_config(tmp_path, name).items())
                start(
                    str(tools / "flower-supernode"), "--insecure", "--superlink", f"127.0.0.1:{port}",
                    "--host", "127.0.0.1", "--port", str(port + number), "--node-config", config,
                )  # fmt: skip
        run = subprocess.run(
            [
                str(tools / "flwr"), "run", str(app), "here", "--stream",
                "--run-config", f'rounds=2 local-steps=2 state="{tmp_path / "run"}"',
            ],
            env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=1400,
        )  # fmt: skip
    finally:
        everything = [psutil.Process(each.pid) for each in started if each.poll() is None]
        everything += [child for each in everything for child in each.children(recursive=True)]
        for each in everything:
            each.terminate()
        psutil.wait_procs(everything, timeout=20)
        for each in started:
            each.wait(timeout=60)
    assert f"the run is in {tmp_path / 'run'}" in run.stdout, run.stdout + run.stderr
    with RunReader(tmp_path / "run") as reader:
        assert reader.last_round == 3
        assert reader.manifest(3).units != reader.manifest(2).units


def wait_for(url: str) -> None:
    for _ in range(600):
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(url)
