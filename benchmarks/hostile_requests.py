"""Requests that no client sends: mutated messages, paths, headers, bodies and updates. Deterministic for a seed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
from urllib.parse import quote

TEXTS = (
    "", "\x00", "../../../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%00", "a" * 65, "A" * 5000, "\u202e", "😀" * 50,
    "'; DROP TABLE clients;--", "${jndi:ldap://x}", "-1", "1e309", "NaN", "0x10", "１２", " 1", "+1", "1_0", "9" * 400,
    str(2**63), "latest", "CON", "\r\nX-Evil: 1", "*", "?", "#", "//", ".", "..", "~", "\\",
)  # fmt: skip
VALUES = (
    None, True, 0, -1, 2**31, 2**53, 2**63, 2**64, -(2**63), 10**30, 1.5, -0.0, 1e308, 1e-320, "", "\x00", "a" * 300,
    [], [[]], {}, [None], "NaN", {"type": "wait"},
)  # fmt: skip
VERBS = ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "CONNECT", "get", "", "PRI", "A" * 300)
HEADERS = (
    "Range", "Expect", "Transfer-Encoding", "Content-Type", "Content-Encoding", "Upgrade", "Connection", "TE",
    "X-Forwarded-For", "X-Edgefed-Signature", "X-Edgefed-Instance", "Trailer",
)  # fmt: skip
HEADER_VALUES = (
    "bytes=0-", "bytes=5-2", "bytes=0-0,1-1", "bytes=99999999999999999999-", "100-continue", "chunked", "gzip", "h2c",
    "chunked, chunked", "close", "upgrade", "\xb2", "a" * 20000, "", f"{'A' * 43} 5 {'B' * 16} stream {'C' * 86}",
)  # fmt: skip
LENGTHS = ("", "-1", "abc", "9" * 20, str(10**15), "0x10", "1e3", "+5", "5,5", "5\r\nContent-Length: 6")
CHUNKS = (
    b"5\r\nhello\r\n", b"5;e=" + b"e" * 200 + b"\r\nhello\r\n", b"fffffffffffffff\r\nx", b"-5\r\nhello\r\n", b"g\r\n",
    b"5\r\nhell\r\n", b"0\r\n\r\n", b"0\r\nX-T: 1\r\n\r\n", b"0\r\nT: " + b"t" * 9000 + b"\r\n\r\n",
)  # fmt: skip
GARBAGE = (
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x99" * 80, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\r\n" * 50,
    b"GET / HTTP/0.9\n\n", b"GET\r\n\r\n", b"\x00" * 1000, b"A" * 70000,
)  # fmt: skip


class Hostile:
    """Makes requests as one client of a run. ``blob``: hash of a blob of it; ``token``: the server's, or None.

    ``guesses``: some tokens are wrong. The server then soon refuses most requests of this address unseen.
    """

    def __init__(self, seed: int, client_id: str, key: str, blob: str, token: str | None, *, guesses: bool = False):
        self.random, self._id, self._key, self._blob = random.Random(seed), client_id, key, blob
        self._token, self._guesses = token, guesses

    def request(self) -> bytes:
        """The bytes of one request."""
        kind = self.random.choices(("json", "bytes", "heads", "lines", "chunks", "garbage"), (35, 15, 18, 15, 12, 5))[0]
        return getattr(self, f"_{kind}")()

    def frame(self, whole: bytes) -> bytes:
        """An update file with something wrong, made from a right one."""
        pick = self.random
        size = int.from_bytes(whole[:8], "little")
        head, body = json.loads(whole[8 : 8 + size]), whole[8 + size :]
        name = pick.choice([key for key in head if key != "__metadata__"])
        change = pick.randrange(9)
        if change == 0:
            return whole[: pick.randrange(len(whole))]
        if change == 1:
            return pick.choice((2**63, 2**64 - 1, 0, 1, 2**40)).to_bytes(8, "little") + whole[8:]
        if change == 2:
            head[name]["data_offsets"] = pick.choice(([0, 0], [5, 1], [-1, 3], [0, 2**70], "x", [1], [0.0, 4.0], None))
        elif change == 3:
            head[name]["dtype"] = pick.choice(("F64", "BF16", "I8", "", None, 5, [], "F32\x00"))
        elif change == 4:
            head[name]["shape"] = pick.choice(([], [0], [-1], [2**40, 2**40], "x", [1.0], None, [2**39] * 3))
        elif change == 5:
            body = b"\xff" * len(body)  # NaN everywhere
        elif change == 6:
            head["evil|x"] = {"dtype": "F32", "shape": [0], "data_offsets": [len(body), len(body)]}
        elif change == 7:
            del head[name]
        else:
            body += b"x" * pick.randrange(1, 100)
        encoded = json.dumps(head).encode()
        return len(encoded).to_bytes(8, "little") + encoded + body

    def _path(self) -> str:
        pick = self.random
        text = quote(pick.choice(TEXTS))
        client = pick.choice((self._id, self._id, self._id, self._id.upper(), "nobody", text))
        number = pick.choice(("1", "1", "2", "0", "-1", "01", "1.0", text))
        blob = pick.choice((self._blob, self._blob.upper(), self._blob[:-1], "0" * 64, "../" * 5 + "edgefed.db", text))
        path = pick.choice((
            "/v1/clients", f"/v1/clients/{client}/heartbeat", f"/v1/clients/{client}/leave",
            f"/v1/clients/{client}/assignment", f"/v1/manifests/{number}", f"/v1/blobs/{blob}", "/v1/status",
            f"/v1/clients/{client}/rounds/{number}/uploads/{number}", "/v1/health", "/v1/probe", "/", "/metrics",
            f"/v1/clients/{client}/rounds/{number}/uploads/{number}/commit", "/v1/coverage",
        ))  # fmt: skip
        if pick.random() < 0.2:
            at = pick.randrange(len(path) + 1)
            path = pick.choice((path + "/", path.replace("/", "//", 2), "/.." + path, path.replace("/v1", "/v1/../v1"),
                                f"http://evil.example:80{path}", path[:at] + pick.choice(TEXTS) + path[at:],
                                path + "/" + "a/" * pick.randrange(500)))  # fmt: skip
        if pick.random() < 0.4:
            path += f"?{pick.choice(('wait_s', 'offset', 'bytes', 'rows', 'check', 'x'))}={quote(pick.choice(TEXTS))}"
        return path

    def _headers(self) -> list[tuple[str, str]]:
        pick = self.random
        found = [
            ("Host", "127.0.0.1"),
            ("X-Edgefed-Client-Key", pick.choice((self._key,) * 8 + ("", "\xff", "a" * 9000))),
        ]
        if self._token is not None:
            right = f"Bearer {self._token}"
            wrong = ("Bearer", "", "Basic eA==", "Invitation 12345678.x", f"Bearer {self._token[:-1]}")
            found.append(("Authorization", pick.choice((right,) * 12 + wrong) if self._guesses else right))
        if pick.random() < 0.3:
            found.append((pick.choice(HEADERS), pick.choice(HEADER_VALUES)))
        if pick.random() < 0.1:
            found.append((pick.choice(("Bad Name", "X\x00", "", "x" * 1000)), pick.choice(TEXTS)))
        return found

    def _build(self, verb: str, path: str, headers: list[tuple[str, str]], body: bytes) -> bytes:
        version = self.random.choice(("HTTP/1.1",) * 15 + ("HTTP/1.0", "HTTP/2.0", "http/1.1", ""))
        end = self.random.choice(("\r\n",) * 20 + ("\n", "\r"))
        lines = [f"{verb} {path} {version}", *(f"{name}: {value}" for name, value in headers), "Connection: close"]
        return (end.join(lines) + end + end).encode("latin-1", "replace") + body

    def _message(self) -> dict[str, object]:
        device = {"name": "d", "kind": "cpu", "trains_on": "cpu", "total_bytes": 5}
        return self.random.choice((
            {"protocol_version": 1, "client_id": self._id, "client_key": self._key, "name": "n", "memory_bytes": 1,
             "expert_share": 1.0, "compute_share": 1.0, "num_examples": 1, "edgefed_version": "x", "device": device},
            {"phase": "train", "fraction": 0.5, "server_round": 1, "budget_bytes": 5},
            {"reason": "no"},
            {"client_id": self._id, "server_round": 1, "attempt": 1, "sha256": "0" * 64, "size_bytes": 5,
             "num_examples": 5, "num_tokens": 5, "metrics": {"loss": 1.0},
             "experts": [{"layer": 0, "expert": 3, "usage": 0.5, "importance": 1.0, "steps": 1, "tokens": 1}]},
        ))  # fmt: skip

    def _json(self) -> bytes:
        pick, message = self.random, self._message()
        for _ in range(pick.randrange(4)):
            inside: object = message
            while True:
                keys = list(inside) if isinstance(inside, dict) else list(range(len(inside)))  # type: ignore[arg-type]
                if not keys:
                    break
                key = pick.choice(keys)
                if isinstance(inside[key], dict | list) and inside[key] and pick.random() < 0.6:  # type: ignore[index]
                    inside = inside[key]  # type: ignore[index]
                    continue
                if pick.random() < 0.25:
                    del inside[key]  # type: ignore[attr-defined]
                else:
                    inside[key] = pick.choice(VALUES)  # type: ignore[index]
                break
        route = {"client_key": "", "fraction": f"/{self._id}/heartbeat", "reason": f"/{self._id}/leave"}
        ending = next((end for name, end in route.items() if name in message), f"/{self._id}/rounds/1/uploads/1/commit")
        body = json.dumps(message).encode("utf-8", "surrogatepass")
        path = f"/v1/clients{ending}" if pick.random() < 0.85 else self._path()
        return self._build("POST", path, [*self._headers(), ("Content-Length", str(len(body)))], body)

    def _bytes(self) -> bytes:
        body = self.random.choice((
            b"[" * 100000, b'{"a":' * 50000, b"\xef\xbb\xbf{}", b"1" * 5000, os.urandom(self.random.randrange(3000)),
            b'"' + b"\\u0000" * 1000 + b'"',
        ))  # fmt: skip
        return self._build("POST", self._path(), [*self._headers(), ("Content-Length", str(len(body)))], body)

    def _heads(self) -> bytes:
        body = b"x" * self.random.randrange(200)
        length = self.random.choice((*LENGTHS, str(len(body) + 50), str(max(0, len(body) - 5))))
        return self._build(
            self.random.choice(VERBS[:3]), self._path(), [*self._headers(), ("Content-Length", length)], body
        )

    def _lines(self) -> bytes:
        headers = self._headers()
        return self._build(
            self.random.choice(VERBS), self._path(), headers[: self.random.randrange(len(headers) + 1)], b""
        )

    def _chunks(self) -> bytes:
        own = f"/v1/clients/{self._id}"
        verb, path = self.random.choice((
            ("POST", f"{own}/heartbeat"), ("PUT", f"{own}/rounds/1/uploads/2?offset=0"),
            ("POST", "/v1/clients"), ("POST", "/v1/probe"), ("GET", "/v1/status"), ("PUT", f"/v1/blobs/{self._blob}"),
        ))  # fmt: skip
        headers = [*self._headers(), ("Transfer-Encoding", self.random.choice(("chunked", "Chunked", "xchunked")))]
        return self._build(verb, path, headers, b"".join(self.random.choices(CHUNKS, k=self.random.randrange(5))))

    def _garbage(self) -> bytes:
        return self.random.choice((*GARBAGE, os.urandom(self.random.randrange(1, 400))))


def send(port: int, data: bytes, *, patience_s: float = 0.5, limit_s: float = 12.0) -> str:
    """Send bytes and read the answer: its status, "closed" without one, or "hang".

    After ``patience_s`` without an answer this side is closed, as an incomplete request waits for its rest.
    """
    status, got = "hang", b""
    with socket.create_connection(("127.0.0.1", port), timeout=limit_s) as peer:
        peer.settimeout(patience_s)
        with contextlib.suppress(OSError):
            peer.sendall(data)
        half = False
        while True:
            try:
                part = peer.recv(65536)
            except TimeoutError:
                if half:
                    break
                half = True
                peer.settimeout(limit_s)
                try:
                    peer.shutdown(socket.SHUT_WR)
                except OSError:
                    part = b""
                else:
                    continue
            except OSError:
                part = b""
            if not part:
                status = "closed"
                break
            got += part
    words = got.replace(b"HTTP/1.1 100 \r\n\r\n", b"").split(b" ", 2)
    return words[1].decode("latin-1") if len(words) > 1 and words[1].isdigit() else status
