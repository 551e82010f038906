"""What a device with text opens within a run: the run's tokenizer from its files, its own model, its own data."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from text_rig import labelled_lines, tiny_llama, word_tokenizer

from edgefed.aggregator.rounds import RoundPolicy
from edgefed.embedded import tiny_model_directory
from edgefed.errors import ConfigError, DataError, MalformedMessage, ModelError, ModelNotFound
from edgefed.personal.local_training import Rates, evaluate, make_optimizer, train_epochs
from edgefed.personal.mixture import Gate, LocalMixture
from edgefed.personal.tasks import check_task, make_task, unpack_tokenizer
from edgefed.protocol.messages import RunConfig, TrainingConfig
from edgefed.runs import RunReader, import_extractor
from edgefed.training.tokenizer import vocabulary_size

CODE = """
import torch
from torch import nn

class Bag(nn.Module):
    def __init__(self, vocab_size, task):
        super().__init__()
        self.table, self.task = nn.Embedding(vocab_size, 8), task

    def forward(self, input_ids, attention_mask):
        vectors = self.table(input_ids) * attention_mask.unsqueeze(-1)
        return vectors if self.task == "next-token" else vectors.sum(1)

def build_model(vocab_size, num_classes, task):
    model = nn.Module()
    model.extractor, model.header = Bag(vocab_size, task), nn.Linear(8, num_classes)
    return model

def per_token(vocab_size, num_classes):
    return build_model(vocab_size, num_classes, "next-token")

class Ahead(Bag):
    def forward(self, input_ids, attention_mask):
        return super().forward(input_ids.roll(-1, 1), attention_mask)

def looks_ahead(vocab_size, num_classes, task):
    model = build_model(vocab_size, num_classes, task)
    model.extractor = Ahead(vocab_size, task)
    return model
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Those of a run of text-small over the packaged tokenizer."""
    folder = tmp_path_factory.mktemp("served") / "run"
    run = RunConfig(
        run_id="t1", model="text-small", method="fedmoe", method_options={}, rounds=1, seed=3,
        training=TrainingConfig(), tokenizer="tiny",
    )  # fmt: skip
    import_extractor(folder, run, RoundPolicy(rounds=1, min_clients=1))
    reader = RunReader(folder)
    manifest = reader.manifest(1)
    paths = reader.paths(manifest)
    (unit,) = manifest.units
    assert sum(int(np.prod(tensor.shape)) for tensor in unit.tensors) == 2_102_272
    assert unit.trainable
    return {file.name: paths[file.sha256] for file in manifest.files}


@pytest.fixture
def labelled(tmp_path):
    path = tmp_path / "mine.jsonl"
    texts, labels = labelled_lines(10, classes=("asyncio", "topics"))
    rows = [{"text": text, "label": ("code", "prose")[label]} for text, label in zip(texts, labels, strict=True)]
    path.write_text("\n".join(map(json.dumps, [*rows, {"text": "nobody knows"}])))
    return str(path)


@pytest.fixture
def code(tmp_path, monkeypatch):
    (tmp_path / "my_text.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)


def assert_that_it_learns(opened) -> None:
    mixture = LocalMixture(opened.shared, opened.own, Gate(opened.shared.gate_in, 8))
    before = opened.shared.encoder.embedding.weight.detach().clone()
    optimizer = make_optimizer(mixture.groups(), Rates())
    train_epochs(mixture, opened.train, optimizer, epochs=1, batch_size=8, rng=np.random.default_rng(0))
    assert not torch.equal(opened.shared.encoder.embedding.weight, before)
    found = evaluate(mixture, opened.held_out)
    assert np.isfinite(found.loss)
    assert len(found.gate_weights) == len(opened.held_out)


def test_a_tokenizer_travels_as_files_of_the_run(files):
    tokenizer = unpack_tokenizer(files)
    assert vocabulary_size(tokenizer) == 2048
    assert tokenizer("def f(self):")["input_ids"]
    assert set(files) >= {"tokenizer.json", "tokenizer_config.json"}
    with pytest.raises(MalformedMessage, match="must not contain a folder"):
        unpack_tokenizer({"../tokenizer.json": next(iter(files.values()))})
    with pytest.raises(ModelNotFound, match="no tokenizer"):
        unpack_tokenizer({})


@pytest.mark.parametrize("model", ["text-cnn", "my_text:build_model"])
def test_labelled_texts(files, labelled, code, model):
    task = make_task("text", labelled, model, "me", 0.2)
    assert task.num_examples == 16
    assert task.classes == ("code", "prose")
    assert len(task.problems) == 1
    assert "line 21" in task.problems[0]
    assert "label" in task.problems[0]
    opened = task.open("text-small", files, seed=3, length=24)
    assert (len(opened.train), len(opened.held_out)) == (16, 4)
    assert any("tokens of the run's tokenizer" in note for note in opened.notes)
    batch = opened.train.batch(np.arange(16))
    assert batch.shared["input_ids"].shape == (16, 24)
    assert (batch.own is batch.shared) == (model != "text-cnn")
    assert batch.own["input_ids"].shape == (16, 24)
    assert_that_it_learns(opened)


@pytest.mark.parametrize("model", ["text-gru", "my_text:build_model"])
def test_the_next_token(files, code, tmp_path, model):
    path = tmp_path / "notes.txt"
    path.write_text("\n\n".join(labelled_lines(20, lines=8, classes=("topics",))[0]))
    task = make_task("next-token", str(path), model, "me", 0.2)
    assert task.num_examples > 3
    assert task.classes == ()
    opened = task.open("text-small", files, seed=3, length=32)
    assert len(opened.train) > len(opened.held_out) > 0
    batch = opened.train.batch(np.arange(2))
    assert batch.shared["input_ids"].shape == batch.labels.shape == (2, 32)
    assert_that_it_learns(opened)


def test_a_model_that_does_not_fit_is_reported(files, labelled, code, tmp_path):
    llama = tiny_llama(tmp_path / "llama", word_tokenizer(labelled_lines(5)[0], 90, specials=False, end="<end>"))
    with pytest.raises(ConfigError, match="needs the run's vocabulary"):
        make_task("next-token", labelled, llama, "me", 0.2).open("text-small", files, 3, 16)
    assert make_task("text", labelled, llama, "me", 0.2).open("text-small", files, 3, 16)
    with pytest.raises(ModelError, match="one vector per text"):
        make_task("text", labelled, "my_text:per_token", "me", 0.2).open("text-small", files, 3, 16)
    with pytest.raises(ConfigError, match="attends to later tokens"):
        make_task("next-token", labelled, "my_text:looks_ahead", "me", 0.2).open("text-small", files, 3, 16)
    with pytest.raises(ConfigError, match="the run's extractor cnn5 is for images"):
        make_task("text", labelled, "text-cnn", "me", 0.2).open("cnn5", {}, 3, 16)
    with pytest.raises(ConfigError, match="the run's extractor cnn5 is for images"):
        make_task("next-token", labelled, "text-gru", "me", 0.2).open("cnn5", {}, 3, 16)
    with pytest.raises(ConfigError, match="is for text"):
        check_task("images", "text-small")
    with pytest.raises(DataError, match="file not found"):
        make_task("text", str(tmp_path / "none.jsonl"), "text-gru", "me", 0.2)
    with pytest.raises(ConfigError, match="`model` is missing"):
        make_task("next-token", labelled, None, "me", 0.2)
    with pytest.raises(ModelNotFound):
        make_task("text", labelled, str(tiny_model_directory() / "no-such-folder"), "me", 0.2)
