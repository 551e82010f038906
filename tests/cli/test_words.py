"""The words of the command line: suggestions, examples, verbosity, sizes without a unit, a hub out of reach."""

from __future__ import annotations

import datetime
import json
import logging
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from edgefed import hub
from edgefed.aggregator.creation import create_run
from edgefed.aggregator.rounds import RoundPolicy
from edgefed.api.server import Server
from edgefed.cli.examples import EXAMPLES
from edgefed.cli.main import VERBS, main, verb_command
from edgefed.cli.output import TerminalProgress
from edgefed.cli.reference import reference
from edgefed.config import parse_share
from edgefed.errors import ConfigError, ModelNotFound, UnknownMethod, did_you_mean
from edgefed.hardware.memory import parse_bytes
from edgefed.isolation.start import module_command
from edgefed.methods.registry import make_method
from edgefed.progress import Pulse
from edgefed.protocol.messages import RunConfig, TrainingConfig, UnitInfo


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Run the command line in an empty folder; returns (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in words])
        captured = capsys.readouterr()
        return end.value.code, captured.out, captured.err

    yield call
    logging.getLogger("edgefed").setLevel(logging.INFO)


def test_similar_names_are_suggested():
    assert did_you_mean("Fluxx", ["hfedmoe", "flux"]) == " Did you mean 'flux'?"
    assert did_you_mean("olmoe", ["OLMoE-1B"]) == " Did you mean 'OLMoE-1B'?"
    assert did_you_mean("zzz", ["flux"]) == ""


def test_verbs_flags_methods_and_options_that_almost_exist(run):
    status, _, err = run("serv")
    assert (status, "unknown command 'serv'. Did you mean 'serve'?" in err) == (2, True)
    status, _, err = run("serve", "--rouns", "2")
    assert (status, "--rounds" in err) == (2, True)
    with pytest.raises(UnknownMethod, match=r"the methods are hfedmoe, .*\. Did you mean 'fedavg'\?"):
        make_method("fedav")
    with pytest.raises(ConfigError, match=r"Did you mean 'lambda'\?"):
        make_method("hfedmoe", {"lamda": "1"})


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_every_verb_ends_with_examples_that_parse(run, verb):
    status, out, _ = run(verb, "--help")
    assert status == 0
    assert EXAMPLES[verb]
    Path("token.txt").write_text("a-secret")  # an example reads it
    for comment, line in EXAMPLES[verb]:
        assert f"# {comment}" in " ".join(out.split())
        assert line in out
        assert line in reference()
        words = [word for word in shlex.split(line) if "=" not in word or word.startswith("-")]
        assert words[:2] == ["edgefed", verb]
        verb_command(verb).make_context(verb, words[2:])  # raises for a flag or value that does not exist


@pytest.mark.parametrize(
    ("words", "level"),
    [
        (["partition"], logging.INFO),
        (["-q", "partition"], logging.WARNING),
        (["partition", "-q"], logging.WARNING),
        (["partition", "-v"], logging.DEBUG),
        (["--log-level", "error", "partition"], logging.ERROR),
        (["-v", "partition", "--log-level", "warning"], logging.WARNING),
    ],
)
def test_verbosity_before_and_after_the_verb(run, words, level):
    assert run(*words, "absent.csv", "--clients", 2, "--out", "parts")[0] == 4
    assert logging.getLogger("edgefed").level == level


def test_quiet_hides_notices_but_not_errors(run, tmp_path):
    (tmp_path / "labels.csv").write_text("text,label\n" + "hello there,a\ngood bye,b\n" * 20)
    split = ("partition", "labels.csv", "--clients", 2, "--classes-per-client", 1)
    assert run(*split, "--out", "one", "-q")[2] == ""
    status, _, err = run("partition", "absent.csv", "--clients", 2, "--out", "two", "-q")
    assert status
    assert "error[" in err


def test_log_lines_are_notices_with_the_time_for_long_running_verbs():
    code = (
        "import logging; from edgefed.cli.verbosity import set_up_logging; set_up_logging('info', {verb!r});"
        "log = logging.getLogger('edgefed.x'); log.info('as it is'); log.warning('set `memory`'); log.debug('no')"
    )
    lines = {
        verb: subprocess.run(
            [sys.executable, "-c", code.format(verb=verb)], capture_output=True, text=True, check=True
        ).stderr.splitlines()
        for verb in ("status", "serve")
    }
    assert lines["status"] == ["as it is", "warning: set --memory"]
    assert [line.split(" ", 1)[1] for line in lines["serve"]] == lines["status"]
    assert all(time.strptime(line.split()[0], "%Y-%m-%dT%H:%M:%SZ") for line in lines["serve"])


def test_log_lines_as_json_are_one_object_a_line():
    code = (
        "import logging; from edgefed.cli.verbosity import set_up_logging; set_up_logging('info', 'serve', 'json');"
        "from edgefed.cli.output import print_error, TerminalProgress; from edgefed.errors import ConfigError;"
        "log = logging.getLogger('edgefed.x'); log.warning('of %r', 'a\\nb'); log.debug('no');"
        "sink = TerminalProgress(0); sink.phase('train'); sink.message('half'); sink.done();"
        "print_error(ConfigError('set `memory`', remedy='do'), as_json=False)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [(line["level"], line["logger"], line["message"].split()[0]) for line in lines] == [
        ("warning", "edgefed.x", "of"), ("info", "edgefed.cli", "half"), ("info", "edgefed.cli", "train"),
        ("error", "edgefed.cli", "set"),
    ]  # fmt: skip
    assert lines[0]["message"] == "of 'a\\nb'"
    assert (lines[3]["code"], lines[3]["remedy"]) == ("config", "do")
    assert all(datetime.datetime.fromisoformat(line["time"].replace("Z", "+00:00")) for line in lines)


def test_sizes_and_shares_without_a_unit_ask_for_it():
    for text, likely in (("2", "2GiB"), ("0.5", "0.5GiB"), ("512", "512MiB")):
        with pytest.raises(ConfigError, match=rf"invalid memory size '{text}': .* Did you mean {likely}\?"):
            parse_bytes(text)
    assert parse_bytes("1048576") == 2**20
    assert parse_bytes("2G") == 2**31
    with pytest.raises(ConfigError, match=r"invalid `experts`: '25'; .* Did you mean 25%\?"):
        parse_share("25", "experts")
    with pytest.raises(ConfigError, match=r"0\.25$"):
        parse_share("250", "experts")


# --- progress -----------------------------------------------------------------------------------------------------


def test_a_log_says_what_goes_on_and_how_long_it_may_take(capsys, monkeypatch):
    monkeypatch.setattr(Pulse, "TIMES_S", (0.05, 60.0))
    progress = TerminalProgress()
    progress.phase("train", 20, "step")
    progress.advance(5)
    time.sleep(0.15)
    progress.phase("load")
    time.sleep(0.15)
    progress.phase("download", 3 << 20)
    progress.advance(1 << 20)
    time.sleep(0.15)
    progress.done()
    lines = capsys.readouterr().err.splitlines()
    lines = [re.sub(r"[0-9.]+ s\b", "N s", re.sub(r"^\S+Z ", "", line)) for line in lines]
    assert lines == [
        "train: 5/20 steps, about N s left",
        "load: N s so far; torch and the data are read, on a slow disk for a minute",
        "download: 1.0 MiB of 3.0 MiB, about N s left",
    ]


def test_an_import_says_how_far_it_is(tmp_path, monkeypatch):
    """With the folder of a run that grows while the importing process works."""
    monkeypatch.setattr(Pulse, "TIMES_S", (0.05, 60.0))

    def slow_import(source: str, folder: Path, *_: object, **__: object) -> None:
        folder.mkdir()
        (folder / "blob").write_bytes(bytes(1 << 20))
        time.sleep(0.3)
        raise ModelNotFound("enough")

    monkeypatch.setattr("edgefed.runs.import_in_subprocess", slow_import)
    lines: list[str] = []
    with pytest.raises(ModelNotFound, match="enough"):
        Server(model="tiny", state=tmp_path / "run", port=0).serve(on_message=lines.append)
    assert lines[0] == f"importing tiny into {tmp_path / 'run'}"
    assert re.fullmatch(r"importing tiny: 1\.0 MiB of [0-9.]+ MiB, about [0-9.]+ s left", lines[1])


def test_an_option_that_contradicts_the_run_is_named_with_the_value_of_the_run(tmp_path):
    run = RunConfig(
        run_id="r", model="m", method="hfedmoe", method_options={}, rounds=1, seed=0, training=TrainingConfig()
    )
    unit = UnitInfo(key="dense", kind="dense", trainable=True), {"weight": ("F32", np.zeros(4, np.float32))}
    create_run(tmp_path / "run", run, RoundPolicy(rounds=1), [unit], [])
    with pytest.raises(ConfigError, match=r"^`options` lambda=0.9 was asked for, but the run in .* has lambda=0.5$"):
        Server(state=tmp_path / "run", port=0, options={"lambda": "0.9", "beta": "0.25"}).serve()


# --- the hub ------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """An address of the hub at which nothing listens, and an empty cache; returns the cache."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(hub.OFFLINE, "0")  # what the check sets is undone after the test
    return tmp_path / "cache"


def test_a_hub_id_without_the_hub_fails_at_once_with_what_to_do(run, no_hub):
    started = time.monotonic()
    for words in (("serve", "--port", 0), ("profile", "--data", "silo:http")):
        status, _, err = run(*words, "--model", "allenai/OLMoE-1B-7B-0924")
        assert status == 3
        text = " ".join(err.split())
        assert "error[model-not-found]" in text
        assert "the hub cannot be used: no connection to 127.0.0.1:" in text
        assert "hf download NAME --local-dir FOLDER" in text
    assert time.monotonic() - started < 5


def test_a_hub_id_without_the_hub_is_refused_before_torch_is_loaded(no_hub, tmp_path):
    """Torch takes most of the time to load; what a slow machine has to wait for is what is imported."""
    code = (
        "import sys\n"
        "from edgefed.cli.main import main\n"
        "for words in ('serve --port 0', 'profile --data silo:http', 'bench', 'bench --explain'):\n"
        "    try: main([*words.split(), '--model', 'allenai/OLMoE-1B-7B-0924'])\n"
        "    except SystemExit as end: print(words, end.code, 'torch' in sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert result.stdout.splitlines() == [
        f"{words} 3 False" for words in ("serve --port 0", "profile --data silo:http", "bench", "bench --explain")
    ], result.stderr


def test_without_the_hub_a_cached_model_is_used(no_hub, monkeypatch):
    snapshot = no_hub / "models--allenai--OLMoE" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert "taking the copy of allenai/OLMoE in the cache" in hub.check_source("allenai/OLMoE")
    monkeypatch.setenv(hub.OFFLINE, "1")
    assert hub.check_source("allenai/OLMoE") == ""
    with pytest.raises(ModelNotFound, match="HF_HUB_OFFLINE is set"):
        hub.check_source("allenai/other")


def test_a_host_that_does_not_answer_takes_a_limited_time(monkeypatch):
    def slow(*_: object) -> None:
        time.sleep(1)
        raise TimeoutError

    monkeypatch.setattr(hub, "CONNECT_S", 0.1)
    monkeypatch.setattr(hub.socket, "create_connection", slow)
    assert "did not answer" in hub.unreachable("http://example.invalid:81")


def test_a_reachable_hub_is_left_to_huggingface(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setenv(hub.OFFLINE, "0")
        assert hub.check_source("allenai/OLMoE") == ""


# --- signals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gap_s", [None, 0.0, pytest.param(0.3, marks=pytest.mark.full)])
def test_ctrl_c_ends_serve_with_130_and_no_traceback(tmp_path, gap_s):
    """Once, twice at once, and again while it ends."""
    run = RunConfig(
        run_id="r", model="m", method="fedavg", method_options={}, rounds=1, seed=0, training=TrainingConfig()
    )
    unit = UnitInfo(key="dense", kind="dense", trainable=True), {"weight": ("F32", np.zeros(4, np.float32))}
    create_run(tmp_path / "run", run, RoundPolicy(rounds=1), [unit], [])
    ready = tmp_path / "ready"
    command = [sys.executable, "-m", "edgefed", "serve", "--port", "0", "--state", str(tmp_path / "run")]
    server = subprocess.Popen(
        [*command, "--ready-file", str(ready)], stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )  # fmt: skip
    while not ready.exists():
        assert server.poll() is None
        time.sleep(0.02)
    server.send_signal(signal.SIGINT)
    if gap_s is not None:
        time.sleep(gap_s)
        server.send_signal(signal.SIGINT)
    _, err = server.communicate(timeout=30)
    assert server.returncode == 130
    assert "Traceback" not in err


@pytest.mark.parametrize("after_s", [0.04, pytest.param(0.15, marks=pytest.mark.full)])
def test_ctrl_c_while_modules_load_leaves_no_traceback(tmp_path, after_s):
    slow = "import sys, time; print('up', flush=True); sys.meta_path.insert(0, __import__('slow')); "
    (tmp_path / "slow.py").write_text(
        "import time\ndef find_spec(name, path=None, target=None):\n    time.sleep(0.02)\n    return None\n"
    )
    code = f"{slow}sys.argv = ['edgefed', '--help']; from edgefed.__main__ import main; print('in', flush=True); main()"
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert child.stdout is not None
    assert [child.stdout.readline(), child.stdout.readline()] == ["up\n", "in\n"]
    time.sleep(after_s)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=30)
    assert child.returncode in (-signal.SIGINT, 130)
    assert "Traceback" not in err


def test_processes_of_a_demo_import_the_package_of_their_parent(tmp_path):
    """Not ./edgefed: in a checkout that is another one, without its compiled libraries."""
    other = tmp_path / "edgefed"
    other.mkdir()
    (other / "__init__.py").write_text("")
    (other / "__main__.py").write_text("print('the wrong one')")
    command = [*module_command("edgefed"), "--version"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("edgefed, version")


# --- colors -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pty")
@pytest.mark.parametrize(
    ("variables", "colored"),
    [({"TERM": "xterm"}, True), ({"TERM": "xterm", "NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)],
    ids=["terminal", "NO_COLOR", "dumb"],
)
def test_colors_are_for_terminals_that_want_them(tmp_path, variables, colored):
    import pty

    code = (
        "from edgefed.cli.output import print_error; from edgefed.errors import DataError;"
        "print_error(DataError('no'), as_json=False)"
    )
    clean = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "COLORTERM")}
    ours, theirs = pty.openpty()
    subprocess.run([sys.executable, "-c", code], stderr=theirs, env=clean | variables, check=True, cwd=tmp_path)
    os.close(theirs)
    shown = os.read(ours, 10000)
    os.close(ours)
    assert bool(re.search(rb"\x1b\[[0-9;]*3[0-7]", shown)) == colored  # bold is no color
    assert b"error" in shown
