"""A client's mixture from its state folder alone: the same predictions as in training, on the command line, too."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import edgefed
from edgefed.aggregator.rounds import RoundPolicy
from edgefed.cli.main import main
from edgefed.errors import ConfigError, DataError
from edgefed.personal.glyphs import load_glyphs
from edgefed.personal.local_training import evaluate
from edgefed.personal.tasks import make_task
from edgefed.personal.trainer import PersonalTrainer
from edgefed.progress import NullProgress
from edgefed.protocol.messages import Assignment, RunConfig, TrainingConfig
from edgefed.runs import RunReader, import_extractor

sys.path.insert(0, str(Path(__file__).parent))
from text_rig import labelled_lines  # noqa: E402

OPTIONS = {"local_epochs": 1, "batch_size": 16}


def train(folder, task, extractor, tokenizer=""):
    run = RunConfig(
        run_id="r1", model=extractor, method="fedmoe", method_options=OPTIONS, rounds=1, seed=3,
        training=TrainingConfig(sequence_length=32), tokenizer=tokenizer,
    )  # fmt: skip
    import_extractor(folder / "run", run, RoundPolicy(rounds=1, min_clients=1))
    trainer = PersonalTrainer(task, folder / "me")
    with RunReader(folder / "run") as reader:
        manifest = reader.manifest(1)
        paths = reader.paths(manifest)
        trainer.train_round(
            run, manifest, Assignment(server_round=1, deadline_s=None, seed=11),
            lambda items: {item.sha256: paths[item.sha256] for item in items}, NullProgress(), folder / "update",
        )  # fmt: skip
    return trainer


@pytest.fixture(scope="module")
def glyphs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glyphs")
    return train(folder, make_task("images", "glyphs:0", "cnn5", "me", 0.2), "cnn5"), folder / "me"


def test_images(glyphs, tmp_path):
    trainer, state = glyphs
    samples = load_glyphs("glyphs:0")
    mixture = edgefed.load_mixture(state)
    assert (mixture.classes, mixture.server_round) == (samples.classes, 1)
    assert mixture.evaluate("glyphs:0").accuracy == evaluate(trainer.mixture, samples).accuracy
    files = []
    for number in range(6):
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(samples.images[number]).save(files[-1])
    found = mixture.predict(files)
    with torch.no_grad():
        logits, weights = trainer.mixture.eval()(samples.batch(np.arange(6)))
    assert [each.label for each in found] == [samples.classes[int(place)] for place in logits.argmax(-1)]
    assert [each.probability for each in found] == pytest.approx(logits.softmax(-1).max(-1).values.tolist(), abs=1e-5)
    assert [each.shared_weight for each in found] == pytest.approx(weights[:, 0].tolist(), abs=1e-5)
    assert mixture.predict([]) == []
    with pytest.raises(DataError, match="image not found"):
        mixture.predict("nothing.png")


def test_the_command_line(glyphs, tmp_path, capsys):
    _, state = glyphs
    Image.fromarray(load_glyphs("glyphs:0").images[0]).save(tmp_path / "a.png")

    def call(*words):
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in words])
        captured = capsys.readouterr()
        return end.value.code, captured.out, captured.err

    status, out, err = call("predict", "--state", state, tmp_path / "a.png", "--data", "glyphs:0")
    assert status == 0
    assert "accuracy" in out
    assert "trained up to round 1" in err
    status, out, _ = call("predict", "--state", state, tmp_path / "a.png", "--json")
    assert status == 0
    assert json.loads(out)["predictions"][0]["label"] in load_glyphs("glyphs:0").classes
    for words, text in (
        (("--state", tmp_path / "none", "x"), "no mixture found"),
        (("--state", state), "nothing to predict"),
    ):
        status, _, err = call("predict", *words)
        assert status != 0
        assert text in err
    status, _, err = call("export", "--state", glyph_run(state), tmp_path / "out")
    assert status != 0
    assert "edgefed predict" in err


def glyph_run(state):
    return state.parent / "run"


def test_texts(tmp_path):
    texts, labels = labelled_lines(10, classes=("asyncio", "topics"))
    rows = [{"text": text, "label": ("code", "prose")[label]} for text, label in zip(texts, labels, strict=True)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = make_task("text", str(tmp_path / "mine.jsonl"), "text-cnn", "me", 0.2)
    trainer = train(tmp_path, task, "text-small", "tiny")
    mixture = edgefed.load_mixture(tmp_path / "me")
    found = mixture.predict(["import asyncio", "The following statement"])
    assert {each.label for each in found} <= {"code", "prose"}
    trained = next(iter(trainer.mixture.own.parameters()))
    scores = mixture.evaluate(str(tmp_path / "mine.jsonl"))
    assert 0 <= scores.accuracy <= 1
    assert np.isfinite(scores.loss)
    assert trained.isfinite().all()
    (tmp_path / "other.jsonl").write_text(json.dumps({"text": "a", "label": "verse"}))
    with pytest.raises(DataError, match="examples of verse; the model knows code, prose"):
        mixture.evaluate(str(tmp_path / "other.jsonl"))


def test_tokens_are_not_predicted(tmp_path):
    (tmp_path / "a.txt").write_text("one two three four five six\n\n" * 100)
    train(tmp_path, make_task("next-token", str(tmp_path / "a.txt"), "text-gru", "me", 0.2), "text-small", "tiny")
    with pytest.raises(ConfigError, match="predicts tokens, not classes"):
        edgefed.load_mixture(tmp_path / "me")
