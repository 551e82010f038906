"""``edgefed doctor`` as a person meets it: the report at every width, JSON, recordings, and every mistake."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys

import pytest

from edgefed.cli.doctor import render
from edgefed.cli.main import main
from edgefed.doctor.finding import Diagnosis, Finding, Group, State


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Run ``edgefed doctor`` in an empty folder; returns (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EDGEFED_TOKEN", raising=False)

    def call(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(["doctor", *(str(word) for word in words)])
        captured = capsys.readouterr()
        return end.value.code, captured.out, captured.err

    return call


def refused(result, status, code, *texts):
    assert result[0] == status, result
    assert not result[1]
    assert "Traceback" not in result[2]
    assert f"error[{code}]" in result[2]
    assert len(result[2].strip().splitlines()) >= 2
    for text in texts:
        assert text in " ".join(result[2].split())


def a_diagnosis():
    long = "a sentence that goes on and on, because a sensor had much to say about what it could not tell, " * 2
    command = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130"
    return Diagnosis(
        "NVIDIA GeForce RTX 4090",
        (
            Finding(Group.PACKAGES, "python", State.OK, "CPython 3.11.7"),
            Finding(Group.TORCH, "torch on the GPU", State.WARNING, long, long, "Install another.", command),
            Finding(Group.MEMORY, "a name that is longer than its column", State.NOTE, "noted"),
            Finding(Group.HOST, "clock", State.PROBLEM, "1970", "", "Set it."),
        ),
        None,
        ("something was left out",),
    )


@pytest.mark.parametrize("width", [20, 70, 96, 140])
def test_the_report_fits_its_width_and_commands_stay_whole(width):
    lines = [line for _, line in render(a_diagnosis(), width)]
    for line in lines:
        assert len(line) <= max(width, 40) or "$ pip" in line or " " not in line.strip(), line
    assert sum("pip install --force-reinstall torch --index-url https" in line for line in lines) == 1
    text = " ".join(" ".join(lines).split())
    for word in ("WARNING", "PROBLEM", "note", "ok", "fix: Set it.", "Something was left out."):
        assert word in text
    assert text.endswith("1 problem, 1 warning: this device cannot train")


def test_marks_are_words_and_groups_keep_their_order():
    lines = [line for _, line in render(a_diagnosis(), 96)]
    order = [lines.index(str(group)) for group in (Group.PACKAGES, Group.TORCH, Group.MEMORY, Group.HOST)]
    assert order == sorted(order)
    assert str(Group.NETWORK) not in lines


def test_a_healthy_machine_ends_with_status_0(run):
    status, out, err = run("--quick", "--device", "cpu")
    assert status == 0
    assert "this device can train, on its CPU" in out
    assert "Traceback" not in out + err
    assert "\x1b" not in out


def test_json_is_one_document(run):
    status, out, _ = run("--quick", "--device", "cpu", "--json")
    data = json.loads(out)
    assert status == 0
    assert data["schema"] == "edgefed.doctor/1"
    assert data["can_train"] is True
    assert data["counts"]["problem"] == 0
    assert data["facts"]["kind"] == "cpu"
    assert {"group", "name", "state", "found", "why", "fix", "command"} == set(data["findings"][0])
    assert any("--quick" in sentence for sentence in data["left_out"])


def test_a_device_that_is_not_here_cannot_train(run):
    status, out, _ = run("--quick", "--device", "cuda:9")
    assert status == 1
    assert "cuda:9" in out
    assert "PROBLEM" in out
    assert "cannot train" in out


def test_record_then_replay(run, tmp_path):
    status, out, err = run("--record", "here.json")
    assert status == 0
    assert not out
    assert "here.json" in err
    assert json.loads((tmp_path / "here.json").read_text())["schema"].startswith("edgefed.recording/")
    assert os.listdir(tmp_path) == ["here.json"]
    status, out, _ = run("--replay", "here.json")
    assert "A recording was examined" in " ".join(out.split())
    assert "Memory" in out
    assert "matmul" not in out
    again = run("--replay", "here.json")
    assert again[1] == out
    assert again[0] == status


def test_a_recording_is_not_overwritten_unless_asked(run, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text("precious")
    refused(run("--record", path), 2, "config", "exists", "--force")
    assert path.read_text() == "precious"
    status, out, _ = run("--record", path, "--force", "--json")
    assert status == 0
    assert json.loads(out)["size_bytes"] == path.stat().st_size


def test_a_recording_that_cannot_be_written(run, tmp_path):
    refused(run("--record", tmp_path / "no" / "such" / "x.json"), 2, "config", "existing folder")
    refused(run("--record", tmp_path, "--force"), 2, "config", "not a file in an existing folder")
    refused(run("--record", "/proc/edgefed.json"), 7, "storage", "/proc/edgefed.json")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_recording_into_a_folder_of_somebody_else(run, tmp_path):
    folder = tmp_path / "closed"
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    refused(run("--record", folder / "x.json"), 7, "storage", "Permission denied")


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"schema": "edgefed.recording/99"}', '{"schema": "edgefed.recording/1"}']
)
def test_a_replay_of_something_else(run, tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    refused(run("--replay", "x.json"), 2, "config", "x.json")


def test_a_replay_of_nothing(run):
    refused(run("--replay", "nothing.json"), 2, "config", "nothing.json")


@pytest.mark.parametrize(
    "words",
    [
        ("--record", "a", "--replay", "b"),
        ("--replay", "a", "--server", "http://127.0.0.1:1"),
        ("--force",),
        ("--slow",),
    ],
)
def test_options_that_do_not_go_together(run, words):
    status, out, err = run(*words)
    assert status == 2
    assert not out
    assert "Traceback" not in err
    assert err.strip()


def test_a_server_that_is_away_and_an_address_that_is_none(run, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    status, out, _ = run("--quick", "--server", "http://127.0.0.1:1")
    assert status == 1
    assert "no answer from" in " ".join(out.split())
    refused(run("--quick", "--server", "127.0.0.1:8470"), 2, "config", "http://")


def test_it_needs_neither_torch_nor_a_terminal(tmp_path):
    """In a process of its own: torch cannot be imported there, and the output goes into a pipe."""
    (tmp_path / "torch.py").write_text("raise OSError('libcublas.so.12: cannot open shared object file')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "80"}
    done = subprocess.run(
        [sys.executable, "-m", "edgefed", "doctor", "--quick", "--state", str(tmp_path / "state")],
        env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1
    assert "libcublas.so.12" in " ".join(done.stdout.split())
    assert "Traceback" not in done.stdout + done.stderr
    assert "\x1b" not in done.stdout
    assert done.stdout.rstrip().endswith("this device cannot train")


def test_the_command_imports_no_torch(tmp_path):
    modules = "edgefed.cli.doctor, edgefed.doctor.diagnosis, edgefed.doctor.diagnosis, edgefed.doctor.host"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == "False\n"
