"""`edgefed bench` as a user runs it: a real quick run in a process of its own (`-m full`), and errors with remedies."""

from __future__ import annotations

import csv
import getpass
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading

import pytest

from edgefed.bench.report import parse_report, to_json
from edgefed.cli.main import main
from edgefed.hardware.profile_files import parse_profile

COMMAND = [sys.executable, "-m", "edgefed", "bench"]
LIMIT_S = 120
LATE_S = 100.0


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Run `edgefed bench` in this process and an empty folder; returns (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(["bench", *(str(word) for word in words)])
        captured = capsys.readouterr()
        return end.value.code, captured.out, captured.err

    return call


def refused(result, status, code, *texts):
    assert result[0] == status, result
    assert not result[1]
    assert "Traceback" not in result[2]
    joined = " ".join(result[2].split())
    assert f"error[{code}]" in joined
    for text in texts:
        assert text in joined, joined


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One real quick run, about 30 s of processor time: (folder, finished process)."""
    folder = tmp_path_factory.mktemp("bench")
    words = ["--quick", "--model", "tiny", "--repeats", "3", "--state", ".", "--json", "a.json", "--csv", "-",
             "--plot", "a.svg", "--markdown", "a.md"]  # fmt: skip
    done = subprocess.run([*COMMAND, *words], cwd=folder, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.mark.full
def test_a_quick_run_measures_and_writes_what_was_asked_for(quick):
    folder, done = quick
    assert sorted(path.name for path in folder.iterdir()) == ["a.json", "a.md", "a.svg"]  # and no file of the disk test
    report = parse_report((folder / "a.json").read_bytes(), "a.json")
    assert report.tool.mode == "quick"
    assert report.device.speed_on in ("cpu", "cuda:0")
    assert not report.interrupted
    for name in ("copy", "matmul float32", "disk write", "expert forward", "train step", "profile"):
        entry = report.test(name)
        assert entry.measured, entry
        assert 0 < min(entry.samples) <= entry.median <= entry.best, entry
    assert not report.test("train step").derived
    assert report.test("train step").params["layers"] == [4]
    assert report.memory.check is not None
    assert report.memory.check.verified_bytes > 0
    assert sum(term.size_bytes for term in report.memory.terms) == report.memory.now_bytes
    assert {fit.model for fit in report.fits} >= {"tiny", "OLMoE-1B-7B", "Mixtral-8x7B"}
    assert "<svg" in (folder / "a.svg").read_text()
    assert "| train step |" in (folder / "a.md").read_text()
    assert "Traceback" not in done.stderr


@pytest.mark.full
def test_stdout_is_nothing_but_the_document(quick):
    rows = list(csv.DictReader(io.StringIO(quick[1].stdout)))
    assert {row["name"] for row in rows} >= {"copy", "train step", "energy"}
    assert all(row["verdict"] for row in rows)


@pytest.mark.full
def test_nothing_in_a_report_names_the_machine_or_its_owner(quick):
    text = (quick[0] / "a.json").read_text().lower()
    words = set(re.findall(r"[^\s\"/,]+", text))
    assert not words & {socket.gethostname().lower(), getpass.getuser().lower()}
    assert str(quick[0]).lower() not in text


@pytest.mark.full
def test_a_report_compares_with_itself_as_the_same_or_says_why_not(quick, run):
    path = quick[0] / "a.json"
    status, out, _ = run("--compare", path, path, "--json", "-")
    rows = json.loads(out)["tests"]
    assert status == 0
    assert {row["verdict"] for row in rows} <= {"same", "not comparable"}
    assert all(row["ratio"] in (1.0, None) and (row["reasons"]) for row in rows)
    status, out, _ = run("--compare", path, path)
    assert status == 0
    assert "B / A" in out
    assert "copy" in out
    assert out.isascii()


@pytest.mark.full
def test_ctrl_c_leaves_a_report_of_what_there_is(tmp_path):
    words = ["--quick", "--model", "tiny", "--sustain", "600", "--state", ".", "--json", "a.json"]
    child = subprocess.Popen(
        [*COMMAND, *words], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )  # fmt: skip
    # At the first measurement that leaves a line; on a machine so quick that none does, in the sustained run.
    late = threading.Timer(LATE_S, lambda: child.send_signal(signal.SIGINT))
    late.start()
    try:
        seen = ""
        for line in child.stderr:
            seen += line
            if line.startswith(("matmul", "disk", "expert", "train", "profile")):
                break
        late.cancel()
        if child.poll() is None:
            child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=LIMIT_S)
    finally:
        late.cancel()
        child.kill()
    assert child.returncode == 130, seen + err
    assert "stopped by Ctrl-C" in out
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    report = parse_report((tmp_path / "a.json").read_bytes(), "a.json")
    assert report.interrupted
    assert report.test("copy").measured
    assert report.sustain is None


def test_a_profile_stands_in_without_measuring(run):
    status, out, _ = run("--device-profile", "jetson-orin-nano-8gb", "--model", "tiny", "--explain")
    assert status == 0
    assert "nothing was measured" in out
    assert "predicted peak" in out
    assert "Speed" not in out
    assert out.isascii()
    status, out, _ = run("--device-profile", "rtx-4090", "--memory", "6GiB", "--uplink", "cable", "--json", "-")
    report = json.loads(out)
    assert json.loads(out)["verdict"].startswith("OLMoE-1B-7B: ")
    assert report["memory"]["now_bytes"] == 6 * 2**30
    assert report["uplink"]["name"] == "cable"
    assert report["device"]["stand_in"]
    assert not report["tests"]
    assert report["device"]["speed_on"] == ""
    more = json.loads(run("--device-profile", "rtx-4090", "--json", "-")[1])
    fitting = [sum(fit["experts"] for fit in each["fits"]) for each in (report, more)]
    assert fitting[0] < fitting[1]


def test_profiles_are_listed(run):
    status, out, _ = run("--list-profiles")
    assert status == 0
    assert "jetson-orin-nano-8gb" in out
    assert "rtx-4090" in out
    assert "t4" in json.loads(run("--list-profiles", "--json", "-")[1])["profiles"]


@pytest.mark.full
def test_a_written_profile_is_one_that_can_stand_in(quick, run, tmp_path):
    """From the report's own numbers, without measuring again."""
    from edgefed.bench.formats import to_profile
    from edgefed.hardware.probe import probe_device

    report = parse_report((quick[0] / "a.json").read_bytes(), "a.json")
    text = to_profile("my-laptop", probe_device("cpu", ask_torch=False), report)
    profile = parse_profile(text, "my-laptop.toml")
    assert profile.id == "my-laptop"
    assert profile.value("memory_visible") > 0
    for key, name in (("bandwidth", "copy"), ("fp32_tflops", "matmul float32")):
        entry = report.test(name)
        figure = profile.figures.get(key)
        assert (figure is None) == (entry.verdict == "unusable")
        assert figure is None or (figure.basis == "measured" and figure.value == pytest.approx(entry.median, abs=1e-4))
    (tmp_path / "my-laptop.toml").write_text(text)
    status, out, _ = run("--device-profile", tmp_path / "my-laptop.toml", "--json", "-")
    assert status == 0
    assert json.loads(out)["device"]["profile"] == "my-laptop"


@pytest.mark.parametrize(
    ("words", "status", "code", "texts"),
    [
        (("--device-profile", "rtx-4080"), 2, "unknown-profile", ("'rtx-4080'", "did you mean")),
        (("--device-profile", "t4", "--device", "cpu"), 2, "config", ("no effect beside --device-profile t4",)),
        (("--device-profile", "t4", "--explain"), 2, "config", ("needs a --model",)),
        (("--device-profile", "t4", "--as-profile", "x"), 2, "config", ("nothing is measured",)),
        (("--quick", "--model", "/nowhere/model"), 3, "model-not-found", ("/nowhere/model",)),
        (("--quick", "--device", "cuda:99"), 2, "device-not-found", ("cuda:99",)),
        (("--quick", "--memory", "lots"), 2, "config", ("lots", "memory size")),
        (("--quick", "--json", "no/such/folder/a.json"), 7, "storage", ("no/such/folder/a.json",)),
        (("--quick", "--json", "-", "--csv", "-"), 2, "config", ("cannot all go to stdout",)),
        (("--quick", "--json", "-", "--as-profile", "x"), 2, "config", ("cannot all go to stdout",)),
        (("--quick", "--plot", "a.gif"), 2, "config", (".png nor .svg",)),
        (("--quick", "--plot", "-"), 2, "config", ("--plot needs a file",)),
        (("--quick", "--state", "nowhere"), 2, "config", ("nowhere is not a directory",)),
        (("--quick", "--active"), 2, "config", ("which is missing",)),
        (("--quick", "--uplink", "fast"), 2, "config", ("invalid connection 'fast'",)),
        (("--quick", "--as-profile", "My Laptop"), 2, "config", ("not a profile id",)),
        (("--quick", "--no-sustain", "--sustain", "5"), 2, "config", ("contradict",)),
        (("--compare", "a.json", "b.json"), 2, "config", ("cannot read a.json",)),
    ],
)
def test_invalid_options_are_refused_before_anything_is_measured(run, words, status, code, texts):
    result = run(*words)
    if "--json" in words and "-" in words:
        assert result[0] == status
        assert json.loads(result[2])["error"]["code"] == code
        return
    if "--json" in words:
        assert result[0] == status
        assert texts[0] in json.loads(result[2])["error"]["message"]
        return
    refused(result, status, code, *texts)


@pytest.mark.full
def test_compare_refuses_an_invalid_report(run, tmp_path, quick):
    broken = tmp_path / "broken.json"
    broken.write_text('{"schema": "edgefed.bench/1", "created"')
    refused(run("--compare", quick[0] / "a.json", broken), 2, "config", "broken.json: invalid JSON")
    broken.write_text('{"schema": "something else"}')
    refused(run("--compare", broken, quick[0] / "a.json"), 2, "config", "found 'something else'")
    report = parse_report((quick[0] / "a.json").read_bytes(), "a")
    broken.write_text(to_json(report).replace('"seconds"', '"seconds": "x", "s"', 1))
    result = run("--compare", broken, broken)
    assert result[0] == 2
    assert "Traceback" not in result[2]


@pytest.mark.skipif(os.name == "nt" or os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_to(run, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    result = run("--quick", "--csv", closed / "a.csv")
    refused(result, 7, "storage", "Permission denied")
