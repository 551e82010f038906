"""FedMoE's round on one device: theta leaves, everything else stays and goes on where it was."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from edgefed.aggregator.rounds import RoundPolicy
from edgefed.errors import ConfigError, ModelError, StateCorrupt, TrainingDiverged
from edgefed.exporting import export_model
from edgefed.methods.interface import Contribution
from edgefed.methods.registry import make_method
from edgefed.moe.expert_reading import FrameSource
from edgefed.personal.glyphs import glyph_client
from edgefed.personal.tasks import make_task
from edgefed.personal.trainer import PersonalTrainer
from edgefed.progress import NullProgress
from edgefed.protocol import frames
from edgefed.protocol.comparison import is_sound
from edgefed.protocol.messages import Assignment, RunConfig, TrainingConfig
from edgefed.runs import RunReader, import_extractor

THETA = 665_048
OPTIONS = {"batch_size": 16, "extractor_lr": 0.05, "model_lr": 0.05, "gate_lr": 0.05}


class Table:
    """A run of FedMoE whose blobs lie on this disk."""

    def __init__(self, folder, rounds=3, extractor="cnn5", method="fedmoe", tokenizer="", **options):
        options = {**OPTIONS, **options} if method == "fedmoe" else options
        self.run = RunConfig(
            run_id="r1", model=extractor, method=method, method_options=options, rounds=rounds, seed=3,
            training=TrainingConfig(), tokenizer=tokenizer,
        )  # fmt: skip
        import_extractor(folder, self.run, RoundPolicy(rounds=rounds, min_clients=1))
        self._reader = RunReader(folder)
        self.manifest = self._reader.manifest(1)
        self.paths = self._reader.paths(self.manifest)

    def fetch(self, items):
        return {item.sha256: self.paths[item.sha256] for item in items}

    def round(self, trainer, path, server_round=1, progress=None):
        assignment = Assignment(server_round=server_round, deadline_s=None, seed=11)
        return trainer.train_round(
            self.run, self.manifest, assignment, self.fetch, progress or NullProgress(), path
        )  # fmt: skip


@pytest.fixture
def table(tmp_path):
    return Table(tmp_path / "run")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "mine.npz"
    samples = glyph_client(0, 48)
    np.savez(path, images=samples.images, labels=samples.labels, classes=np.array(samples.classes))
    return str(path)


class Memo(NullProgress):
    def __init__(self):
        self.messages = []

    def message(self, text):
        self.messages.append(text)


def trainer_of(images, folder, model="cnn5", name="me"):
    return PersonalTrainer(make_task("images", images, model, name, 0.2), folder)


def state_of(folder, server_round=1):
    return folder / "personal" / "r1" / f"round-{server_round:06d}.safetensors"


def tensors_of(path):
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_theta_is_all_that_is_in_the_update(table, images, tmp_path):
    update = table.round(trainer_of(images, tmp_path / "me", "cnn1"), tmp_path / "update")
    header = frames.read_header(tmp_path / "update")
    (unit,) = table.manifest.units
    assert sorted(header) == sorted(frames.update_name(unit.key, info.name) for info in unit.tensors)
    assert sum(int(np.prod(entry.info.shape)) for entry in header.values()) == THETA
    first = FrameSource(table.manifest.units, table.paths).read(unit.key)
    trained = {name.rpartition("|")[2]: frames.map_tensor(tmp_path / "update", entry) for name, entry in header.items()}
    assert all(not np.array_equal(trained[name], tensor.numpy()) for name, tensor in first.items())
    saved = tensors_of(state_of(tmp_path / "me"))
    for name, value in trained.items():
        np.testing.assert_array_equal(saved[f"shared.{name}"].numpy(), value)
    own = sum(value.numel() for name, value in saved.items() if name.startswith("own."))
    assert own == 2_621_558, "cnn1 with ten classes stays here"
    assert update.experts == ()
    assert update.survey is None
    assert update.num_examples == 38
    assert update.metrics["train_loss"] > 0
    assert 0 <= update.metrics["held_out_accuracy_after"] <= 1
    assert 0 < update.metrics["shared_extractor_share"] < 1


def test_at_the_end_a_device_compares_its_mixture_with_its_model_before_and_alone(table, images, tmp_path):
    def trainer(folder):
        make = functools.partial(make_task, "images", images, "cnn1", "me", 0.2)
        return PersonalTrainer(make(), tmp_path / folder, untrained=make, compare_alone=True)

    device = trainer("me")
    assert device.compare(table.run, table.manifest, table.fetch, NullProgress()) is None
    first = table.round(device, tmp_path / "update")
    last = table.round(device, tmp_path / "update", 2)
    found = device.compare(table.run, table.manifest, table.fetch, Memo())
    assert found.accuracies["device"] == last.metrics["held_out_accuracy_after"]
    assert found.device == pytest.approx(last.metrics["held_out_loss_after"])
    assert found.global_model is None
    assert found.num_tokens == 10
    assert is_sound(found)
    assert found.before > found.alone, "untrained, and after as many epochs as the mixture"
    assert found.before != pytest.approx(first.metrics["held_out_loss_before"]), "that was of the mixture"
    assert trainer("me").compare(table.run, table.manifest, table.fetch, NullProgress()) == found  # after a restart
    memo = Memo()
    assert trainer("other").compare(table.run, table.manifest, table.fetch, memo) is None
    assert memo.messages == []


def test_own_model_gate_and_momentum_continue_and_theta_is_that_of_the_round(images, tmp_path):
    table = Table(tmp_path / "run", momentum=0.9)
    trainer = trainer_of(images, tmp_path / "me")
    table.round(trainer, tmp_path / "update")
    first = tensors_of(state_of(tmp_path / "me"))
    assert {"momentum:own.header.weight", "momentum:gate.out.weight"} <= first.keys()
    assert not any(name.startswith("momentum:shared.") for name in first), "theta comes anew each round"
    seen = {}

    class Look(NullProgress):
        def phase(self, name, total=None, unit="B"):
            if name == "train":
                seen.update({n: v.clone() for n, v in trainer.mixture.state_dict().items()})

    table.round(trainer, tmp_path / "update", 2, Look())
    theta = FrameSource(table.manifest.units, table.paths).read("extractor")
    for name, value in seen.items():
        expected = theta[name.removeprefix("shared.")] if name.startswith("shared.") else first[name]
        assert torch.equal(value, expected), name


@pytest.mark.parametrize("added", [{}, {"expert_loss": 1.0, "feature_pull": 5.0}])
def test_a_restart_and_a_repeated_round_end_where_an_uninterrupted_device_ends(images, tmp_path, added):
    updates = {}
    for name in ("once", "restarted"):
        table = Table(tmp_path / name / "run", momentum=0.5, **added)
        trainer = trainer_of(images, tmp_path / name / "me")
        for server_round in (1, 2, 3):
            if name == "restarted":
                table.round(trainer, tmp_path / name / "lost", server_round)  # died before the upload was safe
                trainer = trainer_of(images, tmp_path / name / "me")
            table.round(trainer, tmp_path / name / "update", server_round)
        updates[name] = (tmp_path / name / "update").read_bytes()
        files = sorted(path.name for path in state_of(tmp_path / name / "me").parent.iterdir())
        assert files == ["round-000002.safetensors", "round-000003.safetensors"]
    assert updates["once"] == updates["restarted"]


def test_two_devices_with_the_same_data_begin_unlike(table, images, tmp_path):
    for name in ("a", "b"):
        table.round(trainer_of(images, tmp_path / name, name=name), tmp_path / f"{name}.update")
    a, b = (tensors_of(state_of(tmp_path / name)) for name in ("a", "b"))
    assert not torch.equal(a["own.header.weight"], b["own.header.weight"])


def test_an_interrupted_round_leaves_the_state_of_before(table, images, tmp_path):
    class Stop(Exception):
        pass

    class Stopping(NullProgress):
        def advance(self, amount):
            raise Stop

    trainer = trainer_of(images, tmp_path / "me")
    table.round(trainer, tmp_path / "update")
    before = state_of(tmp_path / "me").read_bytes()
    with pytest.raises(Stop):
        table.round(trainer, tmp_path / "update", 2, Stopping())
    assert state_of(tmp_path / "me").read_bytes() == before
    assert not state_of(tmp_path / "me", 2).exists()


def test_a_state_of_something_else_is_refused(table, images, tmp_path):
    table.round(trainer_of(images, tmp_path / "me", "cnn5"), tmp_path / "update")
    with pytest.raises(ConfigError, match="trained with model 'cnn5', found 'cnn4' now"):
        table.round(trainer_of(images, tmp_path / "me", "cnn4"), tmp_path / "update", 2)
    state_of(tmp_path / "me").write_bytes(b"torn")
    with pytest.raises(StateCorrupt, match="round-000001"):
        table.round(trainer_of(images, tmp_path / "me", "cnn5"), tmp_path / "update", 2)


def test_runs_and_tasks_that_do_not_go_together(images, tmp_path):
    other = Table(tmp_path / "run", method="fedavg")
    with pytest.raises(ConfigError, match="the method of this run is 'fedavg'"):
        other.round(trainer_of(images, tmp_path / "me"), tmp_path / "update")
    with pytest.raises(ConfigError, match="unknown task 'sounds'"):
        make_task("sounds", images, "cnn1", "me", 0.1)
    with pytest.raises(ConfigError, match="`model` is missing"):
        make_task("images", images, None, "me", 0.1)


def test_a_non_finite_loss_ends_the_round_and_saves_nothing(images, tmp_path):
    table = Table(tmp_path / "run", model_lr=1e30, extractor_lr=1e30, local_epochs=3)
    with pytest.raises(TrainingDiverged):
        table.round(trainer_of(images, tmp_path / "me"), tmp_path / "update")
    assert not state_of(tmp_path / "me").exists()


def test_code_of_a_user_that_fails_late_is_named(table, images, tmp_path, monkeypatch):
    (tmp_path / "fails_late.py").write_text(
        """
from torch import nn

class Late(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.out = nn.Flatten(), nn.Linear(3072, 10)

    def forward(self, x):
        if self.training and len(x) > 10:
            raise KeyError("no such weather")
        return self.out(self.body(x))

def build_model():
    return Late()
"""
    )
    monkeypatch.chdir(tmp_path)
    trainer = trainer_of(images, tmp_path / "me", "fails_late:build_model")
    with pytest.raises(ModelError, match=r"build_model failed during training: KeyError.*no such weather.*line 11"):
        table.round(trainer, tmp_path / "update")
    assert not state_of(tmp_path / "me").exists()


def test_text_to_be_continued_weighs_by_its_length(tmp_path):
    """A client with one long text counts for more than one with two short ones."""
    weights = []
    for index, texts in enumerate((["to be or not to be " * 200] * 2, ["to be or not " * 30] * 4)):
        path = tmp_path / f"{index}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        table = Table(tmp_path / f"run{index}", extractor="text-small", tokenizer="tiny")
        trainer = PersonalTrainer(make_task("next-token", str(path), "text-gru", "me", 0.0), tmp_path / f"d{index}")
        weights.append(table.round(trainer, tmp_path / "update").num_examples)
    assert trainer.num_examples == 4
    assert weights[0] > 4 * weights[1]


def test_a_pull_to_classes_is_refused_where_there_are_none(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("to be or not to be " * 200)
    table = Table(tmp_path / "run", extractor="text-small", tokenizer="tiny", feature_pull=1.0)
    trainer = PersonalTrainer(make_task("next-token", str(path), "text-gru", "me", 0.0), tmp_path / "me")
    with pytest.raises(ConfigError, match="feature_pull is 1.0, but next-token prediction has no classes"):
        table.round(trainer, tmp_path / "update")


def test_a_server_has_no_model_to_export(table, tmp_path):
    with pytest.raises(ConfigError, match="is a run of fedmoe"):
        export_model(tmp_path / "run", tmp_path / "model")


def test_facts_travel_in_the_file(table, images, tmp_path):
    table.round(trainer_of(images, tmp_path / "me"), tmp_path / "update")
    with safe_open(state_of(tmp_path / "me"), framework="pt") as file:
        facts = json.loads(file.metadata()["facts"])
    assert facts == {
        "extractor": "cnn5", "model": "cnn5", "classes": "\n".join("0123456789"), "gate": "64 switch", "task": "images",
        "length": "128", "rounds": "1",
    }  # fmt: skip


def test_the_aggregator_weighs_by_examples():
    method = make_method("fedmoe")
    clients = [Contribution("b", 30, {}, frozenset({"extractor"})), Contribution("a", 10, {}, frozenset({"extractor"}))]

    class Unit:
        key = "extractor"

    assert method.plan_merge(clients, [Unit()])["extractor"].weights == (("a", 10.0), ("b", 30.0))
    with pytest.raises(ConfigError, match="batch_size must be at least 2"):
        make_method("fedmoe", {"batch_size": 1})
    assert make_method("fedmoe", {"batch_size": 1, "gate_norm": "layer"}).batch_size == 1
