"""A model to take home: from a run's folder, its server, or a device; the round named; prompts as in training."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import threading

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import edgefed
from edgefed.agent.journal import Journal
from edgefed.aggregator.blobs import BlobStore
from edgefed.aggregator.rounds import RoundPolicy
from edgefed.cli.main import main
from edgefed.embedded import tiny_model_directory
from edgefed.errors import ConfigError, ServerUnreachable, StateCorrupt, StorageError
from edgefed.exporting import export_model
from edgefed.formats.card import ExportRecord, model_card, read_record
from edgefed.progress import NullProgress
from edgefed.protocol.messages import Assignment, RoundStatus, RunConfig, TrainingConfig
from edgefed.runs import RunReader, import_model
from edgefed.trainer.local_trainer import LocalTrainer
from edgefed.trainer.planner import DeviceLimits
from edgefed.trainer.ports import ProcessMemory
from edgefed.training.encoding import encode_examples
from edgefed.training.records import parse_record


def make_run(folder, method="hfedmoe"):
    run = RunConfig(
        run_id="a-run", model="tiny", method=method, method_options={}, rounds=2, seed=0,
        training=TrainingConfig(local_steps=2, batch_size=2, sequence_length=16, learning_rate=1e-2),
    )  # fmt: skip
    import_model(str(tiny_model_directory()), folder, run, RoundPolicy(rounds=2, min_clients=1))
    return run


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    make_run(folder / "run")
    return export_model(folder / "run", folder / "model")


def test_a_run_that_exchanged_nothing_says_that_the_model_is_unchanged(exported):
    record = read_record(exported)
    assert (record.server_round, record.source, record.unchanged, record.run_id) == (1, "run", True, "a-run")
    assert str(record) == (
        "the global model of tiny before round 1 of 2, method hfedmoe; no client has changed it: it is the model that "
        "the run began with"
    )
    original = load_file(tiny_model_directory() / "model.safetensors")
    written = load_file(exported / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in original.items())


@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        ("expert", lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?")),  # a value: only the hash shows it
        ("router", lambda path: path.write_bytes(b"?" + path.read_bytes()[1:])),  # unreadable
        ("config.json", lambda path: path.write_bytes(b"{")),
        ("expert", lambda path: path.unlink()),
    ],
)
def test_an_export_names_what_the_disk_has_damaged_and_leaves_nothing(kind, damage, exported, tmp_path):
    shutil.copytree(exported.parent / "run", tmp_path / "run")
    with RunReader(tmp_path / "run") as reader:
        manifest = reader.manifest()
    parts = [(unit.kind, unit.key, unit.sha256) for unit in manifest.units]
    parts += [(file.name, file.name, file.sha256) for file in manifest.files]
    _, name, sha256 = next(part for part in reversed(parts) if part[0] == kind)
    damage(BlobStore(tmp_path / "run").path(sha256))
    with pytest.raises(StateCorrupt, match=rf"1 of {len(parts)} parts of round 1 are damaged.*'{re.escape(name)}'"):
        export_model(tmp_path / "run", tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_export_that_cannot_be_written_names_its_target(exported, tmp_path, monkeypatch):
    monkeypatch.setattr("edgefed.formats.checkpoint.check_checkpoint", lambda folder: (folder / "?" / "?").touch())
    with pytest.raises(StorageError, match=f"cannot write the checkpoint to '{re.escape(str(tmp_path))}/model'"):
        export_model(exported.parent / "run", tmp_path / "model")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, "the global model of tiny after round 2 of 4, method flux"),
        ({"server_round": 5}, "the global model of tiny after all 4 rounds, method flux"),
        ({"own_units": 7}, "this device's own model (7 parts of its own) of tiny after round 2 of 4, method flux"),
    ],
)
def test_the_record_names_the_round(changes, sentence):
    record = ExportRecord(model="tiny", method="flux", run_id="r", rounds=4, server_round=3, source="run")
    assert str(msgspec.structs.replace(record, **changes)) == sentence


BASE_CARD = "---\nlicense: apache-2.0\nbase_model: other/base\n---\n\n# OLMoE\n\nText.\n"


def test_the_card_states_the_facts_of_the_run():
    record = ExportRecord(model="allenai/OLMoE", method="flux", run_id="r", rounds=4, server_round=3, source="run")
    done = [
        RoundStatus(
            server_round=number, participants=number + 1, updates=2, seconds=1.0, uploaded_bytes=1, experts_changed=1,
            metrics={"train_loss": 4.0 / number},
        )
        for number in (1, 2)
    ]  # fmt: skip
    card = model_card(BASE_CARD, record, done, hub_name=True)
    metadata, text = card.removeprefix("---\n").split("\n---\n")
    expected = ["license: apache-2.0", "base_model: allenai/OLMoE", "tags:", "- federated-learning"]
    assert metadata.splitlines() == expected
    for fact in (
        "# OLMoE\n\nText.", "| Licence of the base model | apache-2.0 |", "| Method | flux |", "| Rounds | 2 of 4 |",
        "| Clients in a round | 2 to 3 |", "| Updates that counted | 4 |",
        "| Training loss | 4 in round 1, 2 in round 2 |", "| Privacy | No noise was added",
    ):  # fmt: skip
        assert fact in text
    plain = model_card("", record, [], hub_name=False)
    assert "| Licence of the base model | not stated in its card |" in plain
    assert "base_model:" not in plain


def test_the_card_is_part_of_an_export(exported):
    assert "| Base model | tiny |" in (exported / "README.md").read_text()


def test_files_have_the_same_modes(tmp_path):
    make_run(tmp_path / "run")
    before = os.umask(0o027)
    try:
        folder = export_model(tmp_path / "run", tmp_path / "model")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o640}
    assert folder.stat().st_mode & 0o777 == 0o750


def test_a_prompt_has_the_tokens_of_training_and_of_transformers(exported):
    record = {"instruction": "Add", "context": "2, 3", "response": "5"}
    example = parse_record(record)
    with edgefed.load_chat(exported) as chat:
        blocks = encode_examples([example], chat.tokenizer, 4096)
        ids, labels = blocks.input_ids[0].tolist(), blocks.labels[0].tolist()
        asked = chat.encode([example.segments[0].message()])
        assert ids[: len(asked)] == asked
        assert labels[: len(asked)] == [-100] * len(asked)
        assert labels[len(asked)] != -100
        tokenizer = AutoTokenizer.from_pretrained(exported)
        messages = [example.segments[0].message()]
        assert tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == asked
        plain = encode_examples([parse_record({"prompt": "def a", "completion": "(x)"})], chat.tokenizer, 99)
        raw = chat.encode("def a")
        assert plain.input_ids[0].tolist()[: len(raw)] == raw
        pieces = []
        answer = chat.answer("def area(", max_new_tokens=8, on_text=pieces.append)
        assert "".join(pieces) == answer
        assert 0 < len(chat.tokenizer(answer)["input_ids"]) <= 12
        with pytest.raises(ConfigError, match="reads at most 512"):
            chat.answer("a b " * 600)


def same_files(folder, other):
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert files == {path.name: path.read_bytes() for path in other.iterdir()}


@pytest.mark.full
def test_a_model_is_taken_home_from_a_server_and_then_from_a_device_without_it(tmp_path):
    server = edgefed.Server(
        model="tiny", rounds=1, min_clients=1, port=0, state=tmp_path / "run", local_steps=1, batch_size=2,
        sequence_length=16, profile_tokens=256, evaluation_tokens=64, exit_when_finished=True,
    )  # fmt: skip
    urls, ready = [], threading.Event()

    def on_ready(url):
        urls.append(url)
        ready.set()

    serving = threading.Thread(target=server.serve, args=(on_ready,), daemon=True)
    serving.start()
    assert ready.wait(180)
    fresh = read_record(edgefed.export(urls[0], tmp_path / "fresh"))
    assert (fresh.source, fresh.server_round, fresh.unchanged) == ("server", 1, True)
    state = tmp_path / "me"
    edgefed.Client(urls[0], data="silo:http", memory="4GiB", state=state, threads=1).run()
    serving.join(60)
    assert not serving.is_alive()

    record = read_record(edgefed.export(state, tmp_path / "mine"))
    assert (record.source, record.server_round, record.own_units) == ("device", 2, 0)
    assert "after all 1 round" in str(record)
    newest = read_record(edgefed.export(tmp_path / "run", tmp_path / "newest"))
    assert (newest.source, newest.server_round, newest.unchanged) == ("run", 2, False)
    delta = edgefed.export(tmp_path / "run", tmp_path / "delta", format="safetensors-delta")
    same_files(edgefed.export(delta, tmp_path / "again"), tmp_path / "newest")
    largest = max((state / "blobs").iterdir(), key=lambda path: path.stat().st_size)
    largest.unlink()
    with pytest.raises(ServerUnreachable) as caught:
        edgefed.export(state, tmp_path / "none")
    assert "This device has 1" in caught.value.remedy
    assert not (tmp_path / "none").exists()


def device_after_a_round(tmp_path):
    """(trainer, state folder) of a device of a run without exchange, whose server is gone."""
    run = make_run(tmp_path / "run", "local")
    state = tmp_path / "me"
    with Journal(state) as journal:
        journal.bind("http://127.0.0.1:1", "a-run")
    with pytest.raises(ServerUnreachable):
        export_model(state, tmp_path / "early")
    trainer = LocalTrainer("silo:http", state, DeviceLimits(), "me", ProcessMemory(64 << 30))
    blobs = BlobStore(tmp_path / "run")
    with RunReader(tmp_path / "run") as reader:
        manifest = reader.manifest()
    (state / "blobs").mkdir()

    def fetch(items):
        for item in items:
            (state / "blobs" / item.sha256).write_bytes(blobs.path(item.sha256).read_bytes())
        return {item.sha256: state / "blobs" / item.sha256 for item in items}

    assignment = Assignment(server_round=1, deadline_s=None, seed=0)
    trainer.train_round(run, manifest, assignment, fetch, NullProgress(), tmp_path / "update")
    return trainer, state


def test_a_device_that_exchanges_nothing_exports_its_own_model(tmp_path):
    trainer, state = device_after_a_round(tmp_path)
    folder = export_model(state, tmp_path / "model")
    record = read_record(folder)
    assert record.own_units > 10
    assert "this device's own model" in str(record)
    own = load_file(folder / "model.safetensors")
    original = load_file(tiny_model_directory() / "model.safetensors")
    assert any(not torch.equal(own[name], tensor) for name, tensor in original.items())
    weights = dict(trainer.model.module.named_parameters())
    name = next(name for name in own if name.endswith("gate.weight"))
    assert torch.equal(own[name], weights[name].detach())
    with pytest.raises(ConfigError, match="needs the state folder of a device and format=onnx"):
        export_model(state, tmp_path / "none", format="hf", planned=True)
    (state / "plan.json").unlink()
    if importlib.util.find_spec("onnxscript"):
        with pytest.raises(ConfigError, match="has no plan of run a-run"):
            export_model(state, tmp_path / "none", format="onnx", planned=True)


@pytest.mark.full
def test_a_device_exports_what_it_computes_with(tmp_path):
    pytest.importorskip("onnxscript")
    trainer, state = device_after_a_round(tmp_path)
    folder = export_model(state, tmp_path / "planned", format="onnx", planned=True)
    assert read_record(folder).planned_experts == trainer.plan.num_resident
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    ids = torch.randint(0, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()}
    for value in session.get_inputs()[2:]:
        inputs[value.name] = torch.zeros(2, value.shape[1], 0, value.shape[3]).numpy()
    with torch.no_grad():
        expected = trainer.model.module.eval()(ids).logits
    torch.testing.assert_close(torch.from_numpy(session.run(["logits"], inputs)[0]), expected, rtol=1e-4, atol=1e-4)


def cli(capsys, *words):
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    captured = capsys.readouterr()
    return end.value.code, captured.out, captured.err


def test_the_command_line(capsys, monkeypatch, exported, tmp_path):
    monkeypatch.chdir(tmp_path)
    status, _, err = cli(capsys, "export", exported.parent / "run", "model")
    assert status == 0
    assert "the global model of tiny before round 1 of 2" in err
    assert "edgefed chat model" in err
    status, out, _ = cli(capsys, "chat", "model", "--prompt", "Hi", "--tokens", 4, "--json")
    assert status == 0
    assert '"answer"' in out
    assert cli(capsys, "chat", "--state", "model", "--raw", "--prompt", "def a", "--tokens", 4)[1].strip()
    for words, text in (
        (("export", "a", "b", "c"), "found 3 arguments"),
        (("export", "a", "--state", "b", "c"), "two sources are given: a and"),
        (("export", "nothing", "x"), "no run in"),
        (("export", exported.parent / "run", "x", "--push-to-hub", "model"), "is OWNER/NAME; found 'model'"),
        (("chat", "nothing"), "no model in 'nothing'"),
        (("chat", "model", "--raw", "--system", "x"), "--system has no effect with --raw"),
    ):
        status, _, err = cli(capsys, *words)
        assert status != 0
        assert text in " ".join(err.split())
