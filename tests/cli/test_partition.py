"""`edgefed partition` as a person meets it: a table, files that `join` reads, a cache, and mistakes with a remedy."""

import json

import numpy as np
import pytest

from edgefed.cli.main import main
from edgefed.personal.labelled_text import load_labelled_texts
from edgefed.personal.sample_files import load_images


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Run the verb in an empty folder; returns (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(["partition", *(str(word) for word in words)])
        captured = capsys.readouterr()
        return end.value.code, captured.out, captured.err

    return call


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 40)
    pixels = rng.integers(0, 256, (120, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "all.npz", images=pixels, labels=labels, classes=np.array(["ant", "bee", "[red]cow"]))
    return "all.npz"


def test_by_class_prints_the_counts_it_wrote(run, images, tmp_path):
    status, out, err = run(images, "--clients", 3, "--out", "parts")
    assert status == 0, err
    assert not err
    lines = out.splitlines()
    assert lines[0].split() == ["client", "ant", "bee", "[red]cow", "examples", "classes"]
    assert lines[1].split()[0] == "client-00.npz"
    assert lines[1].split()[-2:] == ["40", "2"]
    assert lines[4].split() == ["all", "40", "40", "40", "120", "3"]
    assert lines[-1] == "written: 3 files and partition.png in parts"
    assert sum(len(load_images(tmp_path / "parts" / f"client-0{i}.npz")) for i in range(3)) == 120
    status, again, _ = run(images, "--clients", 3, "--out", "parts")
    assert status == 0
    assert again == out.replace("written", "already there")


def test_json_of_a_dirichlet_partition(run, images):
    words = (images, "--clients", 4, "--by", "dirichlet", "--alpha", 0.5, "--seed", 7, "--out", "parts", "--json")
    status, out, _ = run(*words)
    assert status == 0
    printed = json.loads(out)
    assert printed["settings"] == {
        "clients": 4, "by": "dirichlet", "alpha": 0.5, "min_examples": 10, "seed": 7, "resized": False,
    }  # fmt: skip
    assert not printed["cached"]
    assert len(printed["files"]) == 4
    assert np.sum(printed["counts"]) == 120
    assert min(map(sum, printed["counts"])) >= 10
    assert json.loads(run(*words)[1])["cached"]


def test_texts_with_bad_lines_are_divided_and_the_lines_are_reported(run, tmp_path):
    rows = [json.dumps({"text": f"number {i}", "label": "odd" if i % 2 else "even"}) for i in range(40)]
    (tmp_path / "all.jsonl").write_text("\n".join(["no json", *rows]))
    status, out, err = run("all.jsonl", "--clients", 2, "--classes-per-client", 1, "--out", "parts")
    assert status == 0
    assert "line 1: invalid JSON" in err
    assert {load_labelled_texts(tmp_path / "parts" / f"client-0{i}.jsonl").classes for i in range(2)} == {
        ("odd",),
        ("even",),
    }


def test_classes_that_nobody_has_and_long_tables_are_said(run, tmp_path):
    labels = np.repeat(np.arange(20), 10)
    np.savez(tmp_path / "all.npz", images=np.zeros((200, 32, 32, 3), np.uint8), labels=labels)
    status, out, _ = run("all.npz", "--clients", 1, "--classes-per-client", 15, "--out", "parts")
    assert status == 0
    assert "50 examples are of classes that no client has" in out
    assert out.splitlines()[1].split()[-3:] == ["30", "150", "15"]  # three classes more than columns
    status, out, _ = run("all.npz", "--clients", 40, "--classes-per-client", 1, "--out", "many")
    assert status == 0
    assert "10 more" in out
    assert out.splitlines()[-2].split()[-2:] == ["200", "20"]


def test_other_sizes_need_resize(run, tmp_path):
    np.savez(tmp_path / "all.npz", images=np.zeros((20, 28, 28), np.uint8), labels=np.arange(20) % 2)
    status, out, err = run("all.npz", "--clients", 2, "--out", "parts")
    assert status == 4
    assert "28x28" in err
    assert "--resize" in err
    assert not out
    status, _, err = run("all.npz", "--clients", 2, "--out", "parts", "--resize")
    assert status == 0
    assert "scaled from 28x28 to 32x32" in err
    assert "grey" in err


@pytest.mark.parametrize(
    ("words", "status", "code", "text"),
    [
        (("nothing.npz", "--clients", 2), 4, "data", "file or folder not found"),
        (("all.txt", "--clients", 2), 4, "data", "unknown suffix"),
        (
            ("all.npz", "--clients", 2, "--classes-per-client", 4),
            2,
            "config",
            "--classes-per-client is 4, but the data has 3 classes",
        ),
        (("all.npz", "--clients", 2, "--alpha", 1), 2, "config", "--alpha has no effect with --by class"),
        (("all.npz", "--clients", 2, "--by", "dirichlet", "--classes-per-client", 1), 2, "config", "no effect"),
        (("all.npz", "--clients", 13, "--by", "dirichlet"), 4, "data", "120 examples are too few for 13 clients"),
        (("all.npz", "--clients", 100), 4, "data", "class 0 has 40 examples, too few for 67 clients"),
    ],
)
def test_mistakes_are_named_with_a_remedy(run, images, words, status, code, text):
    found, out, err = run(*words, "--out", "parts")
    assert (found, out) == (status, ""), err
    assert f"error[{code}]" in err
    assert text in " ".join(err.split())
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) >= 2
