"""Invitations, keys of devices, signed requests, and clients that are removed or banned: real servers over loopback."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

import httpx
import pytest
import toy_run
from click.testing import CliRunner
from test_tls import serving
from toy_run import make_run, register_message

from edgefed.agent.addresses import parse_link
from edgefed.agent.transport import AggregatorClient
from edgefed.aggregator.access import Access
from edgefed.cli.main import cli
from edgefed.errors import ConfigError, StaleRequest, StorageError, Unauthorized, UnknownClient
from edgefed.protocol import routes
from edgefed.protocol.messages import Heartbeat, encode_message
from edgefed.protocol.signing import Signer, body_digest, is_genuine, new_key, parse_signature, public_key

BEAT = Heartbeat(phase="train", fraction=0.5, server_round=1)


def edgefed(*words: object) -> str:
    """What a command prints on stdout. Raises the error that the command reports."""
    done = CliRunner().invoke(cli, [str(word) for word in words], standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return done.stdout


def device(url: str, client_id: str, key: str, **options: object) -> AggregatorClient:
    return AggregatorClient(url, client_id, toy_run.KEY + client_id, device_key=key, **options)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server that other machines could reach and that admits by invitation only; it has made its own token."""
    folder = make_run(tmp_path_factory.mktemp("access") / "state")
    with serving(folder, host="0.0.0.0", token=None, invite_only=True) as running:
        running.folder = folder
        yield running


@pytest.fixture
def link(server) -> str:
    """A join link of `edgefed invite`, with the address that this machine has for itself."""
    found = json.loads(edgefed("invite", "--state", server.folder, "--json", "--address", server.url))
    return found["link"]


def test_a_device_joins_by_link_and_then_signs_every_request(server, link, tmp_path):
    parsed, key = parse_link(link), new_key()
    assert parsed.address.startswith("https://")
    assert parsed.pin == parse_link(server.join_url).pin
    secret = parsed.invitation.partition(".")[2]
    assert secret.encode() not in b"".join(p.read_bytes() for p in server.folder.glob("access.db*"))
    with device(link, "ada", key) as client:
        assert client.status().state == "waiting"  # a device may look before it joins
        client.register(register_message("ada"))
        client.heartbeat(BEAT)
    with device(server.join_url, "ada", key) as again:  # the link is used up; the key is not
        again.register(register_message("ada"))
        unit = again.manifest().units[0]
        again.download(unit.sha256, unit.size_bytes, tmp_path / "blob")
    with device(link, "eve", new_key()) as other, pytest.raises(Unauthorized, match="used up"):
        other.register(register_message("eve"))
    with device(server.join_url, "ada", "") as unsigned, pytest.raises(Unauthorized):
        unsigned.register(register_message("ada"))
    with device(server.join_url, "ada", new_key()) as stolen, pytest.raises(Unauthorized):
        stolen.register(register_message("ada"))


def test_the_token_of_an_invite_only_server_opens_what_can_be_read(server):
    token = (server.folder / "token").read_text().strip()
    assert (server.folder / "token").stat().st_mode & 0o077 == 0
    with device(server.join_url, "mallory", new_key(), token=token) as client:
        assert client.status().state == "waiting"
        with pytest.raises(Unauthorized, match="needs an invitation"):
            client.register(register_message("mallory"))
    with device(server.join_url, "mallory", new_key()) as client, pytest.raises(UnknownClient):
        client.status()


def test_a_recorded_request_cannot_be_sent_again_nor_changed(server, link):
    key = new_key()
    with device(link, "bo", key) as client:
        run = client.register(register_message("bo")).run
    path, body, now = routes.path_for(routes.HEARTBEAT, client_id="bo"), encode_message(BEAT), round(time.time() * 1000)
    signer = Signer(key)
    sent = signer.header(run.run_id, "POST", path, now, body_digest(body))
    old = signer.header(run.run_id, "POST", path, now - 600_000, body_digest(body))
    other_run = signer.header("run-2", "POST", path, now, body_digest(body))
    with httpx.Client(verify=False, base_url=server.url, trust_env=False) as http:

        def post(signature: str, content: bytes = body, to: str = path) -> int:
            key_header = {routes.CLIENT_KEY_HEADER: toy_run.KEY + "bo", routes.SIGNATURE_HEADER: signature}
            return http.post(to, content=content, headers=key_header).status_code

        assert post(sent) == 200
        assert post(sent) == StaleRequest.http_status
        assert post(old) == StaleRequest.http_status
        assert post(other_run) == 401
        assert post(signer.header(run.run_id, "POST", path, now, body_digest(b"{}"))) == 401  # another body
        assert post(signer.header(run.run_id, "POST", path, now, "stream")) == 401
        leave = routes.path_for(routes.LEAVE, client_id="bo")
        assert post(signer.header(run.run_id, "POST", path, now, body_digest(body)), to=leave) == 401
        assert post("nonsense") == 400


def test_a_device_with_a_wrong_clock_follows_the_servers(server, link, monkeypatch):
    real = time.time
    monkeypatch.setattr("edgefed.agent.channel.time.time", lambda: real() - 20 * 365 * 86400)  # no clock battery
    with device(link, "cy", new_key()) as client:
        client.register(register_message("cy"))
        client.heartbeat(BEAT)
    assert "cy" in server.active.access.devices


def test_clients_are_listed_banned_and_removed_while_the_server_runs(server):
    links = [json.loads(edgefed("invite", "--state", server.folder, "--json"))["link"] for _ in range(2)]
    keys = dict(zip(("dan", "eli"), (new_key(), new_key()), strict=True))
    clients = {}
    for (name, key), link in zip(keys.items(), links, strict=True):
        clients[name] = device(f"{server.url}#{link.partition('#')[2]}", name, key)
        clients[name].register(register_message(name, name=f"{name}'s laptop"))
    shown = edgefed("clients", "--state", server.folder)
    assert "dan's laptop" in shown
    assert "invitation" in shown
    edgefed("clients", "ban", "dan's laptop", "--state", server.folder)
    edgefed("clients", "remove", "eli", "--state", server.folder)
    until = time.monotonic() + 10
    while "eli" in server.active.clients or server.active.clients["dan"].joined:
        assert time.monotonic() < until
        time.sleep(0.05)
    with clients["dan"] as client, pytest.raises(Unauthorized, match="banned"):
        client.heartbeat(BEAT)
    with clients["eli"] as client:
        with pytest.raises(UnknownClient):
            client.heartbeat(BEAT)
        with pytest.raises(Unauthorized):  # its invitation is used up
            client.register(register_message("eli"))
    assert "unknown" not in edgefed("clients", "unban", "dan", "--state", server.folder)


def test_a_server_with_a_token_binds_a_client_to_its_key_and_serves_old_clients(tmp_path):
    with serving(make_run(tmp_path / "state")) as server, contextlib.ExitStack() as stack:
        token, key = "correct-horse-battery", new_key()
        old = stack.enter_context(AggregatorClient(server.url, "old", toy_run.KEY + "old", token))
        old.register(register_message("old"))
        old.heartbeat(BEAT)
        new = stack.enter_context(device(server.url, "new", key, token=token))
        new.register(register_message("new"))
        new.heartbeat(BEAT)
        thief = stack.enter_context(AggregatorClient(server.url, "new", toy_run.KEY + "new", token))
        with pytest.raises(Unauthorized, match="signed"):
            thief.heartbeat(BEAT)
        # The scheme of a token is read in either case.
        headers = {routes.TOKEN_HEADER: f"bearer {token}"}
        assert httpx.get(server.url + routes.STATUS, headers=headers, trust_env=False).status_code == 200
        headers = {routes.TOKEN_HEADER: f"basic {token}"}
        assert httpx.get(server.url + routes.STATUS, headers=headers, trust_env=False).status_code == 401


def test_invitations_expire_are_revoked_and_admit_so_many(state):
    now = 1000.0
    access = Access(state, clock=lambda: now)
    with contextlib.closing(access):
        short, secret = access.invite(expires_s=60, label="short")
        several, _ = access.invite(uses=2)
        assert access.check_invitation(secret) == short.id
        with pytest.raises(Unauthorized, match="unknown"):
            access.check_invitation(f"{short.id}.{'x' * 32}")
        now += 61
        with pytest.raises(Unauthorized, match="expired"):
            access.check_invitation(secret)
        shown = edgefed("invite", "--list", "--state", state)
        assert "0 of 2" in shown
        edgefed("invite", "--revoke", several.id, "--state", state)
        assert access.refresh()
        assert access.invitations[several.id].problem(now) == "revoked"
        with pytest.raises(ConfigError, match="unknown invitation"):
            access.revoke("nothing")
    with pytest.raises(StorageError, match="no run"):
        edgefed("invite", "--state", state.parent / "nothing")
    with pytest.raises(ConfigError, match="has not run yet"):
        edgefed("invite", "--state", state)


def test_signatures_are_of_one_key_and_one_request():
    key = new_key()
    header = Signer(key).header("run", "GET", "/v1/status?x=1", 5, body_digest(b""))
    signature = parse_signature(header)
    assert signature.public_key == public_key(key)
    assert is_genuine(signature, "run", "GET", "/v1/status?x=1")
    assert not is_genuine(signature, "run", "GET", "/v1/status")
    assert not is_genuine(parse_signature(header.replace(" 5 ", " 6 ")), "run", "GET", "/v1/status?x=1")


def test_the_state_of_a_run_is_private(server):
    assert {path.name for path in Path(server.folder).iterdir()} >= {"access.db", "token"}
    assert (server.folder / "access.db").stat().st_mode & 0o077 == 0
