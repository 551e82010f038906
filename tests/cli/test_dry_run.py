"""`edgefed join --dry-run` against a real server: one sentence, nothing registered, and refusals as of `join`."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from pathlib import Path

import pytest
from warm_process import WarmProcess

from edgefed.agent.transport import AggregatorClient
from edgefed.cli.main import main
from edgefed.preview import Preview

START_S = 120.0


def serve(folder: Path, *words: str) -> tuple[WarmProcess, str]:
    """(the server, its address)."""
    log = folder / "serve.log"
    process = WarmProcess(
        ["-m", "edgefed", "serve", "--port", "0", "--state", str(folder / "run"), "--min-clients", "2", *words], log=log
    )
    until = time.monotonic() + START_S
    while not (found := re.search(r"serving .* at (http://\S+)", log.read_text() if log.exists() else "")):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.05)
    return process, found[1]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """The address of a run with short steps."""
    words = ("--local-steps", "4", "--batch-size", "2", "--sequence-length", "32")
    process, found = serve(tmp_path_factory.mktemp("dry-run"), *words)
    yield found
    process.terminate()
    process.wait(20)


@pytest.fixture
def dry_run(capsys, tmp_path, monkeypatch):
    """Run the command in this process and an empty folder; returns (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EDGEFED_TOKEN", raising=False)

    def call(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(["join", "--dry-run", *(str(word) for word in words)])
        captured = capsys.readouterr()
        return end.value.code, captured.out, captured.err

    return call


def test_a_sentence_and_no_trace_on_either_side(dry_run, url, tmp_path):
    status, out, err = dry_run(url, "--data", "silo:http", "--memory", "4GiB", "--experts", "50%")
    assert status == 0, err
    sentence = r"tiny: 8 of 16 experts a layer trained in full, about \S+ \w+ of training a round, \S+ s upload\n"
    assert re.fullmatch(sentence, out), out
    with AggregatorClient(url) as server:
        found = server.status()
    assert not found.clients
    assert found.state == "waiting"
    assert list(tmp_path.iterdir()) == []  # no state folder


def test_its_numbers_as_json(dry_run, url):
    status, out, err = dry_run(url, "--data", "silo:http", "--memory", "4GiB", "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["verdict"].startswith("tiny: 16 of 16 experts a layer")
    assert found["resident"] == found["trainable"] == [16] * 4
    assert 0 < found["memory_bytes"] < 4 * 2**30
    assert found["training_s"] > 0
    with AggregatorClient(url) as server:
        units = server.manifest().units
    assert found["upload_bytes"] == sum(unit.size_bytes for unit in units if unit.trainable)
    assert found["upload_s"] > found["upload_bytes"] / found["upload_bytes_per_s"] > 0


def test_what_does_not_fit_is_refused_as_by_join(dry_run, url):
    status, out, err = dry_run(url, "--data", "silo:http", "--memory", "64MiB")
    assert (status, out) == (5, "")
    assert "error[budget-too-small]: one expert in each of the 4 MoE layers needs" in err
    assert "--memory" in err


def test_bad_data_and_an_unreachable_server_are_named_before_torch_is_asked(dry_run, url, tmp_path):
    status, out, err = dry_run(url, "--data", "missing.txt")
    assert (status, out) == (4, "")
    assert "missing.txt" in err
    status, out, err = dry_run("http://127.0.0.1:1", "--data", "silo:http")
    assert (status, out) == (8, "")
    assert "error[server-unreachable]" in err
    status, _, err = dry_run(url, "--data", "x.npz", "--task", "images", "--model", "cnn1")
    assert status == 2
    assert "--task images" in err


@pytest.mark.full
def test_slices_are_a_share_of_neurons(dry_run, tmp_path):
    process, found = serve(tmp_path, "--method", "slices", "--local-steps", "4", "--batch-size", "2")
    try:
        status, out, err = dry_run(found, "--data", "silo:http", "--memory", "4GiB", "--experts", "25%")
    finally:
        process.terminate()
        process.wait(20)
    assert status == 0, err
    assert out.startswith("tiny: 25% of the neurons of every expert trained in full, about "), out


MADE = Preview(
    model="m", method="hfedmoe", experts_per_layer=(64, 64), resident=(57, 56), trainable=(57, 56), neuron_share=1.0,
    storage="nf4", trains="lora", sequence_length=128, memory_bytes=1, num_examples=1, training_s=240.0,
    upload_bytes=1, upload_bytes_per_s=1.0, upload_s=59.0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, "56 to 57 of 64 experts a layer in NF4 with adapters, about 4.0 min of training a round, 59 s upload"),
        (
            {"trains": "full", "trainable": (8, 8), "upload_s": None},
            "56 to 57 of 64 experts a layer, 8 of them trained in full, the others in NF4, about 4.0 min of training "
            "a round",
        ),
        (
            {"experts_per_layer": (64, 60), "storage": "bfloat16", "training_s": None},
            "113 of 124 experts in bfloat16 with adapters, 59 s upload",
        ),
        (
            {"neuron_share": 0.37, "training_s": None, "upload_s": None},
            "37% of the neurons of every expert in NF4 with adapters",
        ),
        (
            {"lora_rank": 4, "training_s": None, "upload_s": None},
            "56 to 57 of 64 experts a layer in NF4 with adapters of rank 4",
        ),
    ],
)
def test_one_sentence_for_every_kind_of_plan(changes, sentence):
    assert str(dataclasses.replace(MADE, **changes)) == f"m: {sentence}"
