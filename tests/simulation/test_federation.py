"""Whole federations of real processes over loopback."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from wiretap import Wiretap

from edgefed.agent.transport import AggregatorClient
from edgefed.embedded import tiny_model_directory
from edgefed.protocol import PROTOCOL_VERSION, frames
from edgefed.protocol.messages import Assignment, ExpertReport, Register, UpdateMeta
from edgefed.runs import RunReader

TOY_DEVICE = Path(__file__).parents[1] / "agent" / "toy_device.py"
TOY_EXAMPLES = 7


@pytest.mark.full
def test_one_agent_killed_and_one_upload_repeated_give_the_closed_form(serve, processes, wait_for, tmp_path):
    """Three clients: one process delivers, one process dies while it trains, one delivers the same update twice.

    FedAvg's aggregate is (7 a + 21 c) / 28 in every element of every trainable tensor.
    """
    from toy_device import toy_value

    _, url = serve(
        "--method", "fedavg", "--rounds", 1, "--min-clients", 3, "--client-timeout", 3, "--local-steps", 2,
        "--clip", 0,  # the toy updates are far from the model
    )  # fmt: skip
    quick = processes(TOY_DEVICE, url, tmp_path / "quick", 0.1, log=tmp_path / "quick.log")
    slow = processes(TOY_DEVICE, url, tmp_path / "slow", 600, log=tmp_path / "slow.log")
    with AggregatorClient(url, "repeater", "sixteen-characters") as client:
        client.register(
            Register(
                protocol_version=PROTOCOL_VERSION,
                client_id="repeater",
                client_key="sixteen-characters",
                name="repeater",
                memory_bytes=1,
                expert_share=1.0,
                compute_share=1.0,
                num_examples=21,
                edgefed_version="test",
            )  # fmt: skip
        )
        replies = []
        wait_for(lambda: isinstance(replies.append(client.assignment(1.0)) or replies[-1], Assignment), "a round")
        wait_for(lambda: b"train" in (tmp_path / "slow.log").read_bytes() or slow.poll() is not None, "slow training")
        slow.send_signal(signal.SIGKILL)
        slow.wait()

        manifest = client.manifest(1)
        trainable = [unit for unit in manifest.units if unit.trainable]
        path = tmp_path / "update"
        sha256, size = frames.write_frame(
            path,
            {
                frames.update_name(unit.key, info.name): (info.dtype, np.full(info.shape, -3.5, np.float32))
                for unit in trainable
                for info in unit.tensors
            },
        )
        reports = tuple(
            ExpertReport(layer=unit.layer, expert=unit.expert, usage=0.5, importance=0.5, steps=2, tokens=9)
            for unit in trainable
            if unit.kind == "expert"
        )
        meta = UpdateMeta(
            client_id="repeater", server_round=1, attempt=1, sha256=sha256, size_bytes=size, num_examples=21,
            num_tokens=99, experts=reports, metrics={},
        )  # fmt: skip
        client.upload(1, 1, path)
        assert not client.commit(meta).repeated
        assert client.commit(meta).repeated
        # A repetition under another number changes nothing either: it is the same content.
        again = msgspec.structs.replace(meta, attempt=2)
        assert client.commit(again).repeated

        wait_for(lambda: client.status().state == "finished", "the end of the run")
        history = client.status().history
        assert [(done.participants, done.updates) for done in history] == [(3, 2)]
        assert quick.wait(timeout=60) == 0

        a, c = toy_value(0.0, 1), -3.5
        expected = np.float32((TOY_EXAMPLES * a + 21 * c) / (TOY_EXAMPLES + 21))
        final = {unit.key: unit for unit in client.manifest(2).units}
        for unit in trainable:
            blob = tmp_path / "blob"
            blob.unlink(missing_ok=True)
            client.download(final[unit.key].sha256, final[unit.key].size_bytes, blob)
            for entry in frames.read_header(blob).values():
                np.testing.assert_array_equal(frames.map_tensor(blob, entry), expected)
        untouched = [unit for unit in manifest.units if not unit.trainable]
        assert untouched
        assert all(final[unit.key].sha256 == unit.sha256 for unit in untouched)


@pytest.mark.parametrize("scope", ["full", pytest.param("lora", marks=pytest.mark.full)])
def test_a_device_trains_and_its_text_never_crosses_the_wire(serve, processes, wait_for, tmp_path, scope):
    """The real agent, the real server, and between them somebody who listens; then the export of what came out."""
    secrets = [f"Zebrafinch{i} told the quartz lantern {i * 7919} secrets" for i in range(60)]
    data = tmp_path / "secret.jsonl"
    data.write_text("".join(json.dumps({"text": f"{line}. " * 6}) + "\n" for line in secrets) + "{broken\n")
    server, url = serve(
        "--rounds", 1, "--min-clients", 1, "--local-steps", 4, "--batch-size", 2, "--sequence-length", 64,
        "--profile-tokens", 512, "--exit-when-finished", "--train-experts", scope, "--train-router", scope,
    )  # fmt: skip
    tap = Wiretap(int(url.rpartition(":")[2]))
    agent = processes(
        "-m", "edgefed", "join", f"http://127.0.0.1:{tap.port}", "--data", data, "--experts", "25%", "--state",
        tmp_path / "me", "--name", "listener-test", "--json", log=tmp_path / "agent.log",
    )  # fmt: skip
    assert agent.wait(timeout=180) == 0, (tmp_path / "agent.log").read_text()
    assert server.wait(timeout=60) == 0
    tap.close()

    log = (tmp_path / "agent.log").read_text()
    assert '"global_model": ' in log  # the summary compares the final model
    assert "round 1/1: train" in log
    assert "line 61" in log  # the broken line is named, and costs nothing else
    heard = bytes(tap.heard["up"] + tap.heard["down"])
    assert b"listener-test" in heard  # the wiretap does hear
    update_bytes = 100_000 if scope == "lora" else 2_000_000
    assert len(tap.heard["up"]) > update_bytes
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_directory())
    for line in secrets:
        for word in line.split():
            if len(word) > 6:
                assert word.encode() not in heard
        ids = tokenizer(line)["input_ids"][:8]
        for dtype in (np.int16, np.int32, np.int64):
            assert np.array(ids, dtype).tobytes() not in heard
        assert ", ".join(map(str, ids)).encode() not in heard
        assert ",".join(map(str, ids)).encode() not in heard

    export = processes(
        "-m", "edgefed", "export", "--state", tmp_path / "run", "--to", "hf", tmp_path / "model",
        log=tmp_path / "export.log",
    )  # fmt: skip
    assert export.wait(timeout=120) == 0, (tmp_path / "export.log").read_text()
    before = AutoModelForCausalLM.from_pretrained(tiny_model_directory()).state_dict()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    with RunReader(tmp_path / "run") as reader:
        assert reader.last_round == 2
    assert {name.rpartition(".")[2] for name in changed} == {"gate_up_proj", "down_proj", "weight"}
    assert all(".mlp." in name for name in changed)  # experts and routers, nothing else
    inputs = tokenizer("Zebrafinch", return_tensors="pt")
    output = model.generate(inputs["input_ids"], max_new_tokens=5, do_sample=False)
    assert output.shape[1] > inputs["input_ids"].shape[1]


def test_the_demo_runs_and_shows_what_it_did(processes, tmp_path, monkeypatch):
    # Settings of the user's real runs do not reach into the demo.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDGEFED_TOKEN", "for-another-server")
    (tmp_path / "edgefed.toml").write_text('[serve]\nquorum = 1\nlearning-rate = 100.0\ntrain-attention = "full"\n')
    demo = processes(
        "-m", "edgefed", "demo", "--out", tmp_path / "demo", "--rounds", 1, "--clients", 2, "--local-steps", 3,
        "--private", "adapter", log=tmp_path / "demo.log",
    )  # fmt: skip
    assert demo.wait(timeout=240) == 0, (tmp_path / "demo.log").read_text()
    log = (tmp_path / "demo.log").read_text()
    assert "round 1/1: train" in log
    assert "2 of 2 clients" in log
    assert "asyncio" in log
    assert "100 %" in log
    assert "50 %" in log
    found = json.loads((tmp_path / "demo" / "demo.json").read_text())
    clients = found["results"][0]["clients"]
    assert [np.mean(client["neuron_shares"]) for client in clients] == [1.0, pytest.approx(0.5, abs=0.01)]
    assert clients[1]["peak_expert_bytes"] == pytest.approx(clients[0]["peak_expert_bytes"] / 2, rel=0.05)
    assert clients[1]["bytes_up"] < 0.6 * clients[0]["bytes_up"]
    assert len(found["results"][0]["mean_global_losses"]) == 2
    for client in clients:
        compared = found["comparison"][client["name"]]
        assert [compared["before"], compared["global_model"]] == client["global_losses"]
        assert compared["alone"] == client["alone"] < compared["before"] + 0.5
        own = json.loads((tmp_path / "demo" / "slices" / "clients" / client["name"] / "comparison.json").read_text())
        # What the device itself found of the same models on the same text.
        assert own["comparison"]["num_tokens"] == compared["num_tokens"]
        assert own["comparison"]["global_model"] == pytest.approx(compared["global_model"], rel=1e-3)
        assert own["comparison"]["before"] == pytest.approx(compared["before"], rel=1e-3)
        # The private part is in the device's own model only.
        assert compared["own"] == client["own"] == own["comparison"]["own"] != compared["global_model"]
    assert "training alone" in found["verdict"]
    assert "training alone" in log
    assert found["sample"].startswith("import asyncio")
    picture = (tmp_path / "demo" / "demo.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000
    assert (tmp_path / "demo" / "model" / "model.safetensors").exists()


def test_the_demo_gives_each_method_the_training_and_the_share_that_it_needs(monkeypatch, tmp_path):
    from edgefed.simulation import demo

    started = {}

    class Stopped(Exception):
        pass

    class Recorded:
        def __init__(self, folder, flags, clients):
            started[folder.name] = (flags, [client.expert_share for client in clients])
            raise Stopped

    class Sink:
        def method(self, name):
            pass

    monkeypatch.setattr(demo, "LocalFederation", Recorded)
    for method in ("fmq", "fmd", "hfedmoe"):
        with pytest.raises(Stopped):
            demo.run_demo(demo.DemoConfig(out=tmp_path / method, methods=(method,), clients=2), Sink())
    flags, shares = started["fmq"]
    assert flags[flags.index("--train-experts") + 1] == "lora"
    assert shares == [1.0, 1.0]
    flags, shares = started["fmd"]
    assert "--train-experts" not in flags
    assert shares == [1.0, 1.0]
    assert started["hfedmoe"][1] == [1.0, 0.5]
