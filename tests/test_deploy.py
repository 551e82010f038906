"""The files of deploy/, with the programs that read them; each test is skipped where its program is missing."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "aggregator"))
import toy_run
from server_process import Client, ServerProcess

from edgefed.aggregator.tls import make_certificate
from edgefed.errors import Unauthorized

DEPLOY = Path(__file__).parents[1] / "deploy"
TOKEN = "a-token-that-nobody-guesses"


def program(name: str) -> str:
    path = shutil.which(name, path="/usr/sbin:/usr/bin:/usr/local/bin") or shutil.which(name)
    return path or pytest.skip(f"no {name}")


def test_systemd_accepts_the_unit(tmp_path):
    verify = program("systemd-analyze")
    text = (DEPLOY / "edgefed.service").read_text()
    unit = tmp_path / "edgefed.service"
    unit.write_text(text.replace("/opt/edgefed/bin/edgefed", "/bin/true"))
    done = subprocess.run([verify, "verify", "--man=no", str(unit)], capture_output=True, text=True)
    assert (done.returncode, [line for line in done.stderr.splitlines() if "edgefed" in line]) == (0, [])
    scored = subprocess.run(
        [verify, "security", "--offline=true", "--no-pager", "--threshold=20", str(unit)],
        capture_output=True,
        text=True,
    )
    assert scored.returncode == 0, scored.stdout[-300:]


def test_the_dockerfile_has_valid_instructions():
    parser = pytest.importorskip("dockerfile")
    commands = parser.parse_file(str(DEPLOY / "Dockerfile"))
    words = [command.cmd.lower() for command in commands]
    assert words.count("from") == 2
    assert words[-2:] == ["entrypoint", "cmd"]
    entry, arguments = commands[-2].value, commands[-1].value
    assert entry == ("edgefed",)
    from edgefed.cli.main import verb_command

    flags = {option for parameter in verb_command(arguments[0]).params for option in parameter.opts}
    assert {word for word in arguments if word.startswith("--")} <= flags


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def nginx(folder: Path, upstream: str, port: int) -> list[str]:
    """nginx with the site of deploy/ on ``port``, with TLS."""
    certificate, key = make_certificate("127.0.0.1")
    (folder / "cert.pem").write_bytes(certificate)
    (folder / "key.pem").write_bytes(key)
    live = "/etc/letsencrypt/live/train.example.org"
    site = (DEPLOY / "nginx.conf").read_text()
    for old, new in (
        ("127.0.0.1:8470", upstream), ("listen 443", f"listen 127.0.0.1:{port}"), ("listen [::]:443 ssl http2;", ""),
        (f"{live}/fullchain.pem", f"{folder}/cert.pem"), (f"{live}/privkey.pem", f"{folder}/key.pem"),
    ):  # fmt: skip
        assert old in site
        site = site.replace(old, new)
    temporary = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in ("proxy", "fastcgi", "uwsgi", "scgi"))
    (folder / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log;\nevents {{}}\n"
        f"http {{ access_log off; client_body_temp_path {folder}/body;\n{temporary}{site} }}\n"
    )
    command = [program("nginx"), "-p", str(folder), "-e", f"{folder}/error.log", "-c", f"{folder}/nginx.conf"]
    checked = subprocess.run([*command, "-t"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    return command


def caddy(folder: Path, upstream: str, port: int) -> list[str]:
    """Caddy with the site of deploy/ on ``port``, without TLS: it would ask for a certificate."""
    site = (DEPLOY / "Caddyfile").read_text()
    site = site.replace("train.example.org", f"http://127.0.0.1:{port}").replace("127.0.0.1:8470", upstream)
    (folder / "Caddyfile").write_text("{\n\tadmin off\n}\n" + site)
    command = [program("caddy"), "run", "--adapter", "caddyfile", "--config", f"{folder}/Caddyfile"]
    checked = subprocess.run([command[0], "validate", *command[2:]], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    return command


@pytest.mark.full
@pytest.mark.parametrize(("make", "scheme"), [(nginx, "https"), (caddy, "http")], ids=["nginx", "caddy"])
def test_a_round_through_a_reverse_proxy(tmp_path, make, scheme):
    state = toy_run.make_run(tmp_path / "state", rounds=1, min_clients=1, hidden=65536)
    program(make.__name__)
    server = ServerProcess(state, token=TOKEN)
    port = free_port()
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    with (tmp_path / "proxy.log").open("wb") as log:
        proxy = subprocess.Popen(
            make(tmp_path, server.url.removeprefix("http://"), port), stdout=log, stderr=log, env=environment
        )
    try:
        until = time.monotonic() + 20
        while not answers(port):
            assert time.monotonic() < until, (tmp_path / "proxy.log").read_text()
            time.sleep(0.05)
        client = Client(f"{scheme}://127.0.0.1:{port}", "anna", token=TOKEN, verify=False)
        client.register()
        client.assignment(wait_s=2.0)
        manifest = client.manifest()
        values = toy_run.trained([unit for unit in manifest.units if unit.trainable], 1)
        update = toy_run.make_update(manifest, "anna", values)
        assert len(update.frame) > 2**23, "more than a proxy passes by default"
        client.send(update)
        final = client.wait_for_round(2)
        assert len(client.blob(final.units[0].sha256).content) == final.units[0].size_bytes
        stranger = Client(f"{scheme}://127.0.0.1:{port}", "anna", token="a-wrong-token-of-somebody", verify=False)
        stranger.http.headers["x-forwarded-for"] = "203.0.113.9"
        with pytest.raises(Unauthorized):
            stranger.status()
        assert "from 127.0.0.1" in server.log.read_text()
        assert "203.0.113.9" not in server.log.read_text(), "nobody passes for another address"
    finally:
        Client.close_all()
        proxy.terminate()
        proxy.wait(10)
        server.kill()
