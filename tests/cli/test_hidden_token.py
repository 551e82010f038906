"""A token on the command line is moved to where only the owner of the process can read it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgefed.cli.hidden_token import without_token

TOKEN = "Zq7-" + "k" * 28


@pytest.mark.parametrize(
    ("words", "left", "token"),
    [
        (["serve", "--token", TOKEN, "--port", "0"], ["serve", "--port", "0"], TOKEN),
        (["serve", f"--token={TOKEN}"], ["serve"], TOKEN),
        (["serve", "--token", "@file"], ["serve", "--token", "@file"], None),
        (["serve", "--token=@file"], ["serve", "--token=@file"], None),
        (["serve", "--token"], ["serve", "--token"], None),
        (["serve", "--", "--token", TOKEN], ["serve", "--", "--token", TOKEN], None),
        (["serve", "--tokenizer", "tiny"], ["serve", "--tokenizer", "tiny"], None),
    ],
)
def test_only_a_token_given_as_text_is_taken(words, left, token):
    assert without_token(words) == (left, token)


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="/proc shows no command lines here")
def test_the_process_list_does_not_show_the_token(tmp_path):
    command = [sys.executable, "-m", "edgefed", "serve", "--model", "tiny", "--port", "0", "--state", tmp_path / "run"]
    log = tmp_path / "log"
    with log.open("wb") as output:
        server = subprocess.Popen([*command, "--token", TOKEN], stderr=output, cwd=tmp_path)
    try:
        deadline = time.monotonic() + 120
        while b"could read the token" not in log.read_bytes() or TOKEN in _shown(server.pid):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, _shown(server.pid)
            time.sleep(0.05)
        assert "--model\0tiny" in _shown(server.pid)
        assert TOKEN not in log.read_text()
        assert f"EDGEFED_TOKEN={TOKEN}" in Path(f"/proc/{server.pid}/environ").read_text()
        while b"clients join with" not in log.read_bytes():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        assert "--token @FILE" in log.read_text().split("clients join with")[1]
        assert os.stat(f"/proc/{server.pid}/environ").st_mode & 0o077 == 0
    finally:
        server.kill()
        server.wait()


def _shown(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()
