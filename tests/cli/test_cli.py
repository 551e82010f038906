"""The command line as a person meets it: help, results, and every mistake with a remedy and no traceback."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from edgefed.aggregator.rounds import RoundPolicy
from edgefed.api.server import Server
from edgefed.cli.main import VERBS, main
from edgefed.config import fields_of, load_settings, parse_assignments, parse_share
from edgefed.errors import ConfigError, ModelNotFound
from edgefed.protocol.messages import RunConfig, TrainingConfig
from edgefed.runs import import_extractor


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Run the command line in an empty folder; returns (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EDGEFED_TOKEN", raising=False)

    def call(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in words])
        captured = capsys.readouterr()
        return end.value.code, captured.out, captured.err

    return call


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("def add(a, b):\n    return a + b\n\n" * 300)
    return path


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def refused(result, status, code, *texts):
    """A mistake: named, with a remedy on the second line, on stderr only, and no traceback."""
    assert result[0] == status, result
    assert not result[1]
    assert f"error[{code}]" in result[2]
    assert "Traceback" not in result[2]
    joined = " ".join(result[2].split())
    for text in texts:
        assert text in joined, joined
    assert len(result[2].strip().splitlines()) >= 2


def test_help_and_version(run):
    status, out, _ = run("--help")
    assert status == 0
    assert all(f"{verb} " in out and summary in out for verb, summary in VERBS.items())
    status, out, _ = run("--version")
    assert status == 0
    assert out.startswith("edgefed, version ")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(run, verb):
    status, out, _ = run(verb, "--help")
    assert status == 0
    assert f"edgefed {verb}" in out


def test_wrong_words_are_usage_errors(run):
    for words in (["trian"], ["join"], ["serve", "--rounds", "0"], ["serve", "--port", "99999"], ["export"]):
        status, _, err = run(*words)
        assert status == 2
        assert "Traceback" not in err
        assert err.strip()


def test_unknown_method_and_option(run):
    refused(run("serve", "--method", "fedprox", "--port", 0), 2, "unknown-method", "methods are hfedmoe")
    refused(run("serve", "--option", "gamma=1", "--port", 0), 2, "config", "no option 'gamma'", "lambda=0.5")
    refused(run("serve", "--option", "lambda", "--port", 0), 2, "config", "is not NAME=VALUE")
    refused(run("serve", "--option", "beta=much", "--port", 0), 2, "config", "must be float")
    refused(run("demo", "--method", "fedprox"), 2, "unknown-method", "fedprox")
    refused(run("demo", "--clients", 50), 2, "config", "1 to 9")


def test_nothing_to_train(run):
    nothing = ("--train-experts", "none", "--train-router", "none")
    refused(run("serve", "--port", 0, *nothing), 2, "config", "nothing would be trained")


def test_a_state_folder_that_cannot_be_used_is_refused_before_anything_else(run, text):
    for state in (text, text / "run"):
        for command in (("serve", "--model", "nobody/nothing"), ("join", "http://127.0.0.1:1", "--data", text)):
            refused(run(*command, "--state", state), 7, "storage", f"{text} is a file", "Choose another --state")


def test_a_port_in_use_and_an_open_host(run):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        refused(run("serve", "--port", port), 8, "port-in-use", str(port), "Choose another --port")
    refused(run("serve", "--host", "0.0.0.0", "--port", 0), 8, "missing-token", "--token")


def test_object_storage_that_cannot_be_used_is_reported_before_the_model(run):
    found = run("serve", "--model", "nobody/nothing", "--port", 0, "--blobs", "ftp://host/prefix")
    refused(found, 2, "config", "object storage")  # invalid, or without obstore no package for it


def test_a_wrong_model_path(run, tmp_path):
    refused(run("profile", "--model", tmp_path / "nowhere", "--data", "silo:http"), 3, "model-not-found", "nowhere")
    for name in ("./nowhere", "../no/where", "~/nowhere", "a/b/nowhere"):
        refused(run("serve", "--model", name, "--port", 0), 3, "model-not-found", f"{Path(name).name}' does not exist")
    with pytest.raises(ModelNotFound, match="'./no/where' does not exist"):
        Server(model=Path("no/where"), port=0).serve()
    (tmp_path / "empty").mkdir()
    refused(run("profile", "--model", tmp_path / "empty", "--data", "silo:http"), 3, "model-not-found", "config.json")
    # The importer is a process of its own; what it finds comes out the same.
    refused(run("serve", "--model", tmp_path / "empty", "--port", 0), 3, "model-not-found", "has no config.json")
    assert not (tmp_path / "edgefed-run" / "edgefed.db").exists()


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("absent.txt", None, ["file not found"]),
        ("empty.txt", b"", ["is empty"]),
        ("blank.jsonl", b"\n\n", ["empty"]),
        ("bad.jsonl", b'{"text": 1}\n{broken\n[]\n', ["line 1", "line 2"]),
        ("image.png", b"\x89PNG", ["unknown suffix", ".jsonl"]),
        ("latin.txt", b"caf\xe9 " * 50, ["UTF-8"]),
    ],
)
def test_unusable_data_is_refused(run, tmp_path, name, content, texts):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    refused(run("join", "http://127.0.0.1:1", "--data", path), 4, "data", name, *texts)


def test_an_unknown_silo(run):
    refused(run("join", "http://127.0.0.1:1", "--data", "silo:nosuch"), 4, "data", "nosuch", "asyncio")


def test_wrong_sizes_shares_and_addresses(run, text):
    address = "http://127.0.0.1:1"
    refused(run("join", address, "--data", text, "--memory", "lots"), 2, "config", "memory size", "2GiB")
    refused(run("join", address, "--data", text, "--experts", "150%"), 2, "config", "--experts", "25%")
    refused(run("join", address, "--data", text, "--compute", "0"), 2, "config", "--compute")
    refused(run("join", "ftp://example.org", "--data", text), 2, "config", "http")
    refused(run("status", "127.0.0.1:8470"), 2, "config", "http")


def test_an_unreachable_server(run):
    refused(run("status", f"http://127.0.0.1:{free_port()}"), 8, "server-unreachable", "edgefed serve")


def test_errors_are_json_for_programs(run, tmp_path):
    status, out, err = run("status", f"http://127.0.0.1:{free_port()}", "--json")
    assert status == 8
    assert not out
    assert json.loads(err)["error"]["code"] == "server-unreachable"


def test_export_without_a_run_is_refused(run, tmp_path):
    refused(run("export", "--state", tmp_path / "none", tmp_path / "model"), 7, "storage", "no run in")


def test_the_demo_does_not_empty_a_foreign_folder(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    refused(run("demo", "--out", tmp_path / "mine"), 2, "config", "holds no earlier demo")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_profile_draws_and_reports(run, text, tmp_path):
    words = ("profile", "--data", text, "--tokens", 512, "--plot", tmp_path / "map.png")
    status, out, _ = run(*words)
    assert status == 0
    assert out.count("of 16 used") == 4
    assert "busiest experts" in out
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    status, out, _ = run(*words, "--json")
    record = json.loads(out)
    assert record["num_tokens"] == 512
    assert sum(record["layers"][0]["tokens_per_expert"]) == 2 * 512


def test_settings_come_from_the_file_then_variables_then_flags(run, tmp_path, monkeypatch):
    (tmp_path / "edgefed.toml").write_text('[serve]\nmethod = "from-file"\nport = 0\n')
    assert "from-file" in run("serve")[2]
    monkeypatch.setenv("EDGEFED_SERVE_METHOD", "from-variable")
    assert "from-variable" in run("serve")[2]
    assert "from-flag" in run("serve", "--method", "from-flag")[2]


def test_settings_have_the_names_of_the_flags(run, tmp_path):
    """The README's example, and flags whose parameters are called otherwise."""
    path = tmp_path / "edgefed.toml"
    path.write_text('[serve]\nport = 0\noption = ["lambda=0.25", "gamma=1"]\nmin-clients = 3\n')
    assert "no option 'gamma'" in run("serve")[2]
    path.write_text('[serve]\nport = 0\ntrain-experts = "none"\ntrain-router = "none"\n')
    assert "nothing would be trained" in run("serve")[2]
    path.write_text("[serve]\nmin_clients = 3\n")
    assert "has no setting 'min_clients'" in run("serve")[2]


def test_variables_have_the_names_of_the_flags(run, monkeypatch):
    monkeypatch.setenv("EDGEFED_SERVE_PORT", "0")
    monkeypatch.setenv("EDGEFED_SERVE_OPTION", "gamma=1")
    assert "no option 'gamma'" in run("serve")[2]
    monkeypatch.delenv("EDGEFED_SERVE_OPTION")
    monkeypatch.setenv("EDGEFED_SERVE_TRAIN_EXPERTS", "none")
    monkeypatch.setenv("EDGEFED_SERVE_TRAIN_ROUTER", "none")
    assert "nothing would be trained" in run("serve")[2]


def test_all_errors_of_a_settings_file_are_reported_together(tmp_path):
    path = tmp_path / "settings.toml"
    path.write_text("[serve]\nmetod = 1\nmin-clients = 3\n[train]\nx = 1\n")
    known = {"serve": {field.flag: field for field in fields_of(Server)}}
    with pytest.raises(ConfigError, match=r"\[serve\] has no setting 'metod'; \[train\] is not a table"):
        load_settings(path, known)
    path.write_text("[serve\n")
    with pytest.raises(ConfigError, match="is not valid TOML"):
        load_settings(path, {})
    with pytest.raises(ConfigError, match="cannot read"):
        load_settings(tmp_path / "absent.toml", {})


def test_shares_and_assignments():
    assert parse_share("25%", "experts") == parse_share("0.25", "experts") == 0.25
    assert parse_assignments(("a=1", "b=x=y"), "options") == {"a": "1", "b": "x=y"}
    with pytest.raises(ConfigError, match="sets a twice"):
        parse_assignments(("a=1", "a=2"), "options")


def test_a_closed_pipe_gives_no_traceback(text):
    child = subprocess.run(
        f"{sys.executable} -m edgefed profile --data {text} --tokens 256 --json | head -c 10",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in child.stderr
    assert len(child.stdout) == 10


FEDMOE = ("serve", "--method", "fedmoe", "--port", 0)


def test_flags_of_a_run_of_text(run):
    refused(run(*FEDMOE, "--tokenizer", "tiny"), 2, "config", "--tokenizer tiny has no effect with cnn5", "text-small")
    refused(run("serve", "--tokenizer", "tiny", "--port", 0), 2, "config", "--method hfedmoe", "for fedmoe only")
    refused(run(*FEDMOE, "--sequence-length", 64), 2, "config", "--sequence-length has no effect with fedmoe")
    text = (*FEDMOE, "--extractor", "text-small")
    refused(run(*text, "--local-steps", 64), 2, "config", "--local-steps has no effect with fedmoe")
    refused(run(*text, "--tokenizer", "./none"), 3, "model-not-found", "no tokenizer that transformers can load")


def test_a_run_keeps_its_tokenizer_and_length(run, tmp_path):
    config = RunConfig(
        run_id="t1", model="text-small", method="fedmoe", method_options={}, rounds=1, seed=0,
        training=TrainingConfig(sequence_length=64), tokenizer="tiny",
    )  # fmt: skip
    import_extractor(tmp_path / "run", config, RoundPolicy(rounds=1, min_clients=1))
    again = (*FEDMOE, "--extractor", "text-small", "--rounds", 1, "--state", "run")
    refused(run(*again, "--tokenizer", "./mine"), 2, "config", "--tokenizer ./mine was asked for", "has tiny")
    refused(run(*again, "--sequence-length", 32), 2, "config", "--sequence-length 32 was asked for", "has 64")


def test_joining_needs_a_model_for_a_task(run, text):
    join = ("join", "http://127.0.0.1:9", "--data", "none.jsonl")
    refused(run(*join[:-1], text, "--task", "next-token"), 2, "config", "--model is missing", "text-gru")
    refused(run(*join, "--task", "text", "--model", "text-cnn"), 4, "data", "file not found")
    refused(run(*join, "--model", "text-cnn"), 2, "config", "--task")


@pytest.mark.parametrize(
    ("given", "found"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")]
)
def test_threads_hardly_spin_while_they_wait_unless_the_user_wants_it(given, found):
    """The variable must be set before torch is imported."""
    code = (
        "import os, sys; from edgefed.cli.main import main; assert 'torch' not in sys.modules\n"
        "try: main(['--version'])\n"
        "except SystemExit: print(os.environ.get('GOMP_SPINCOUNT'))"
    )
    inherited = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=inherited | given, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == found, done.stderr
