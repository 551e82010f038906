"""The upload of an export to the Hugging Face hub, to a stand-in of its HTTP interface on this machine."""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from edgefed import hub
from edgefed.errors import ConfigError, NetworkError, Unauthorized

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of huggingface_hub


class Hub(BaseHTTPRequestHandler):
    """Repositories of one user, whose token is "right"; weights go through LFS, other files into the commit."""

    def answer(self, value, status=200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def handle_request(self):
        body, state = self.body(), self.server
        if self.path.startswith("/put/"):
            state.objects[self.path.removeprefix("/put/")] = body
            self.answer({})
        elif self.headers.get("Authorization") != "Bearer right":
            self.answer({"error": "Invalid credentials"}, 401)
        elif self.path == "/api/whoami-v2":
            self.answer({"name": "me", "type": "user"})
        elif self.path == "/api/repos/create":
            state.created.append(json.loads(body))
            self.answer({"url": f"{state.url}/me/model"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif self.path == "/api/models/me/model/preupload/main":
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
            self.answer({
                "files": [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]
            })  # fmt: skip
        elif self.path == "/me/model.git/info/lfs/objects/batch":
            wanted = json.loads(body)["objects"]
            actions = [{**one, "actions": {"upload": {"href": f"{state.url}/put/{one['oid']}"}}} for one in wanted]
            self.answer({"transfer": "basic", "objects": actions})
        elif self.path == "/api/models/me/model/commit/main" and not state.full:
            state.commits.append([json.loads(line) for line in body.splitlines()])
            self.answer({"success": True, "commitOid": "0" * 40, "commitUrl": f"{state.url}/me/model/commit/1"})
        else:
            self.answer({"error": "no room"}, 507 if state.full else 404)

    do_GET = do_POST = do_PUT = handle_request

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture
def stand_in(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.created, server.objects, server.commits, server.full = [], {}, [], False
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "right")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # content goes through LFS instead
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "README.md").write_text("---\ntags:\n- federated-learning\n---\n")
    return tmp_path


def test_a_folder_is_one_commit_of_a_private_repository(stand_in, folder):
    hub.check_push("me/model")
    assert hub.push_folder(folder, "me/model") == f"{stand_in.url}/me/model/commit/1"
    (created,) = stand_in.created
    assert created["name"] == "model"
    assert created.get("private") or created.get("visibility") == "private"
    assert list(stand_in.objects.values()) == [b"weights"]
    (commit,) = stand_in.commits
    assert {line["value"].get("path") for line in commit[1:]} == {"model.safetensors", "README.md"}


def test_what_stops_a_push_is_named(stand_in, folder, monkeypatch):
    stand_in.full = True
    with pytest.raises(NetworkError, match=rf"refuses the push to 'me/model': .*; {re.escape(repr(str(folder)))} is"):
        hub.push_folder(folder, "me/model")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(Unauthorized, match="refuses the push to 'me/model'"):
        hub.check_push("me/model")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(folder / "none"))
    with pytest.raises(ConfigError, match="there is no token of the hub"):
        hub.check_push("me/model")
    with pytest.raises(ConfigError, match="is OWNER/NAME; found 'model'"):
        hub.check_push("model")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(NetworkError, match="cannot push to 'me/model': no connection to 127.0.0.1:1"):
        hub.check_push("me/model")
