"""The pretraining script of experiments/: its text, and a training that continues bit by bit where it was killed."""

from __future__ import annotations

import gzip
import io
import json
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import edgefed

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
sys.path.append(str(EXPERIMENTS))

import pretrain  # noqa: E402
import pretrain_text  # noqa: E402

TOY = [
    "--layers=1", "--hidden-size=32", "--experts=4", "--expert-width=16", "--vocabulary=300", "--sequence-length=16",
    "--batch-size=2", "--validation-share=0.1", "--warmup-steps=5",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_package(path: Path, files: dict[str, str], compression: str = "xz") -> Path:
    """A Debian package with compressed text files: an ar archive of a version, an empty control part, and the files."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=f"w:{compression}") as archive:
        for name, text in files.items():
            packed = gzip.compress(text.encode())
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(packed)
            archive.addfile(member, io.BytesIO(packed))
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", f"data.tar.{compression}": data.getvalue()}
    content = b"!<arch>\n"
    for name, body in members.items():
        content += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(body):<10}`\n".encode() + body + b"\n" * (len(body) % 2)
        )
    path.write_bytes(content)
    return path


def words(start: int, count: int) -> str:
    return " ".join(f"word{index % 17} follows word{index % 5}." for index in range(start, start + count))


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    files = {f"usr/share/doc/linux-doc/Documentation/page{index}.rst.gz": words(index, 30) for index in range(30)}
    return write_package(tmp_path_factory.mktemp("package") / "linux-doc_1_all.deb", files)


@pytest.fixture(scope="module")
def prepared(package, tmp_path_factory):
    work = tmp_path_factory.mktemp("prepared") / "work"
    assert pretrain.main(["prepare", "--work", str(work), "--packages", str(package), *TOY]) == 0
    return work


@pytest.fixture
def work(prepared, tmp_path):
    """A prepared folder without a checkpoint."""
    for path in prepared.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def curve(work: Path) -> list[dict]:
    rows = [json.loads(line) for line in (work / "curve.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "cpu_s"} for row in rows if row["kind"] != "start"]


def weights(work: Path) -> dict[str, torch.Tensor]:
    return torch.load(work / "checkpoint.pt", weights_only=True)["model"]


def train(work: Path, *arguments: str) -> None:
    assert pretrain.main(["train", "--work", str(work), *arguments]) == 0


@pytest.fixture(scope="module")
def uninterrupted(prepared, tmp_path_factory):
    """(curve, weights) of 60 steps in one sitting, with a validation after each 20."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    for path in prepared.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "VALIDATION_STEPS", 20)
        train(folder, "--steps=60")
    return curve(folder), weights(folder)


def test_a_resumed_training_is_the_uninterrupted_one(work, uninterrupted, monkeypatch):
    monkeypatch.setattr(pretrain, "VALIDATION_STEPS", 20)
    train(work, "--steps=33")  # in the middle of a row of the curve
    with (work / "curve.jsonl").open("a") as file:
        file.write('{"kind": "loss", "step": 40, "loss": 9.9}\n{"kind": "lo')  # of steps that a crash lost
    train(work, "--steps=60", "--resume")
    expected, model = uninterrupted
    assert curve(work) == expected
    assert [row["step"] for row in expected] == [20, 20, 40, 40, 60, 60]
    losses = [row["loss"] for row in expected if row["kind"] == "loss"]
    assert losses[-1] < losses[0] - 0.5
    assert all(torch.equal(tensor, model[name]) for name, tensor in weights(work).items())


def test_a_sitting_records_where_it_ran(work):
    train(work, "--steps=1")
    train(work, "--steps=2", "--resume")
    rows = [json.loads(line) for line in (work / "curve.jsonl").read_text().splitlines()]
    assert [(row["kind"], row["step"]) for row in rows] == [("start", 0), ("start", 1)]
    assert all({"commit", "device", "versions"} <= row["provenance"].keys() for row in rows)


@pytest.mark.full
def test_a_killed_training_continues_bit_by_bit(work, uninterrupted, monkeypatch):
    command = [
        sys.executable,
        EXPERIMENTS / "pretrain.py",
        "train",
        "--work",
        work,
        "--minutes=5",
        "--save-minutes=0.001",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not (work / "checkpoint.pt").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    done = torch.load(work / "checkpoint.pt", weights_only=True)["step"]
    monkeypatch.setattr(pretrain, "VALIDATION_STEPS", 20)
    train(work, f"--steps={max(60, done)}", "--resume")
    rows = [row for row in curve(work) if row["kind"] == "loss" and row["step"] <= 60]
    assert rows == [row for row in uninterrupted[0] if row["kind"] == "loss"]


@pytest.mark.full
def test_ctrl_c_saves_the_step(work):
    command = [sys.executable, EXPERIMENTS / "pretrain.py", "train", "--work", work, "--minutes=5"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert "loss" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert f"saved step {torch.load(work / 'checkpoint.pt', weights_only=True)['step']} to" in output


def test_an_exported_model_is_one_that_edgefed_loads(work, tmp_path):
    train(work, "--steps=20")
    out = tmp_path / "model"
    assert pretrain.main(["export", "--work", str(work), "--out", str(out), "--cooldown=3"]) == 0
    assert edgefed.plan(out, memory="4GiB").experts.roles[0].shape == (4,)
    record = json.loads((out / "pretraining.json").read_text())
    assert (record["steps"], record["cooldown_steps"], record["tokens"]) == (20, 3, 23 * 2 * 16)
    assert record["text"]["sources"]["linux-doc"]["documents"] == 30
    exported, trained = load_file(out / "model.safetensors"), weights(work)
    name = "model.embed_tokens.weight"
    assert not torch.equal(exported[name], trained[name])  # the copy cooled down; what is resumed did not
    with pytest.raises(SystemExit, match="is not empty; choose another --out"):
        pretrain.main(["export", "--work", str(work), "--out", str(out)])


def test_wrong_input_is_refused_by_name(work, package, tmp_path, capsys):
    def refusal(*arguments) -> str:
        with pytest.raises(SystemExit) as caught:
            pretrain.main([str(each) for each in arguments])
        return f"{caught.value.code} {capsys.readouterr().err}"

    text, empty = tmp_path / "notes.deb", tmp_path / "empty"
    text.write_text("not a package")
    empty.mkdir()
    prepare = ("prepare", "--work", tmp_path / "new", *TOY, "--packages")
    assert "is not a Debian package" in refusal(*prepare, text)
    assert "cannot read" in refusal(*prepare, tmp_path / "absent.deb")
    text.write_bytes(package.read_bytes()[:-900])
    assert "is incomplete; fetch it again" in refusal(*prepare, text)
    assert "no text found in other" in refusal(*prepare, write_package(tmp_path / "other_1_all.deb", {"a.gz": "b"}))
    assert "is absent" in refusal(*prepare, package, "--data", empty)
    assert "must be at least 1" in refusal(*prepare, package, "--experts=0")
    assert "only 4 experts" in refusal(*prepare, package, "--experts-per-token=5")
    assert "too little text" in refusal(*prepare, package, "--sequence-length=100000")
    assert not (tmp_path / "new").exists()
    assert "is prepared already" in refusal("prepare", "--work", work, "--packages", package)
    assert "prepare the text first" in refusal("train", "--work", empty, "--steps=1")
    assert "--minutes or --steps is required" in refusal("train", "--work", work)
    assert "must be positive" in refusal("train", "--work", work, "--minutes=-1")
    assert "start with train, without --resume" in refusal("train", "--work", work, "--steps=1", "--resume")
    train(work, "--steps=1")
    assert "pass --resume to continue" in refusal("train", "--work", work, "--steps=2")
    (work / "checkpoint.pt").write_bytes(b"damaged")
    assert "Delete it to start again" in refusal("train", "--work", work, "--steps=2", "--resume")


# --- the text


def test_packages_become_plain_text(tmp_path):
    entry = "Act \\Act\\, v. t.\n   To perform.\n   [1913 Webster]\n\n         Act well your part. --Pope.\n\n"
    quoted = "         To act her earthy. --Shak.\n\n"
    long = 'Actor \\Ac"tor\\, n.\n   One who acts.' + " On a stage." * 20
    page = (
        '.\\" licence\n.TH FOPEN 3\n.SH NAME\nfopen \\- open\n.PP\nThe\n.BR fopen ()\nopens \\fIpath\\fP.\n'
        + "x " * 100
    )
    files = {
        "usr/share/dictd/gcide.dict.dz": "Preface\n\nA \\A\\ letter\n\n" + entry + quoted + long + "\n\n",
        "usr/share/man/man3/fopen.3.gz": page,
        "usr/share/man/man3/short.3.gz": ".so fopen.3",
        "usr/share/doc/l/Documentation/a.rst.gz": words(0, 20),
        "usr/share/doc/l/Documentation/translations/it/a.rst.gz": words(0, 20),
        "usr/share/doc/l/Documentation/a.c.gz": words(0, 20),
    }
    for compression in ("xz", "gz"):
        found = pretrain_text.documents_of([write_package(tmp_path / "p_1.deb", files, compression)], None)["p"]
        texts = [each.text for each in found]
        assert "To perform." in texts[0]
        assert "Pope" in texts[0]
        assert "Shak" not in texts[0]
        assert "Webster" not in texts[0]
        assert texts[1].startswith("NAME\nfopen - open\n\nThe\nfopen()\nopens path.")
        assert len(texts) == 3


def test_what_experiments_may_hold_out_is_left_out(tmp_path, monkeypatch):
    def write(path: str, content: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(gzip.compress(content.encode()))

    monkeypatch.setattr(pretrain_text, "LARGEST_ROLES", 1)
    tested = {"instruction": "Is it SO?", "output": "no"}
    for task in pretrain_text.TASKS:
        write(f"mcq_math_tasks/{task}/test.json.gz", json.dumps([tested]))
    for task in pretrain_text.TRAINING_TASKS:
        rows = [{"instruction": "is it so", "output": "yes"}, {"instruction": f"{task}?", "output": "yes"}]
        write(f"mcq_math_tasks/{task}/train.json.gz", json.dumps(rows))
    speeches = [("KING", "To be, or not to be " * 9), ("KING", "Ay."), ("FOOL", "ay!"), ("FOOL", "Nuncle, ask me.")]
    rows = [json.dumps({"play": "lear", "role": role, "text": text}) for role, text in speeches]
    write("shakespeare_by_role/speeches.jsonl.gz", "\n".join(rows))
    found = pretrain_text.documents_of([], tmp_path)
    assert [each.text for each in found["questions"]] == [f"{task}?\nyes" for task in pretrain_text.TRAINING_TASKS]
    assert [each.text for each in found["shakespeare"]] == ["FOOL\nNuncle, ask me."]
