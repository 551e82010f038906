"""The clients of `bench_aggregator` and `bench_control_calls`: raw HTTP, which costs the shared processors little."""

from __future__ import annotations

import concurrent.futures
import hashlib
import http.client
import itertools
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from edgefed.protocol import PROTOCOL_VERSION, routes
from edgefed.protocol.frames import encode_header
from edgefed.protocol.messages import (
    ExpertReport,
    Manifest,
    Register,
    TensorInfo,
    UnitInfo,
    UpdateMeta,
    decode_message,
    encode_message,
)

SHAPE = (128, 512)
"""One tensor is 256 KiB; an expert has three of them."""
KEY = "benchmark client key "


class Member:
    """One client of the crowd, with one keep-alive connection. ``tls``: the server's certificate is known to it."""

    def __init__(self, url: str, number: int, tls: ssl.SSLContext | None = None):
        self.client_id = f"client-{number:03d}"
        host, port = url.partition("//")[2].partition("#")[0].split(":")
        options = {"timeout": 300, "blocksize": routes.CHUNK_BYTES}
        self._http = (
            http.client.HTTPConnection(host, int(port), **options)
            if tls is None
            else http.client.HTTPSConnection(host, int(port), context=tls, **options)
        )
        self._block = np.random.default_rng(number).standard_normal(SHAPE, dtype=np.float32).tobytes()

    def call(self, verb: str, template: str, body: object = None, query: str = "", **values: object) -> bytes:
        path = routes.path_for(template, client_id=self.client_id, **values)
        headers = {routes.CLIENT_KEY_HEADER: KEY + self.client_id}
        if isinstance(body, tuple):  # (chunks, length)
            body, length = body
            headers["content-length"] = str(length)
        for last in (False, True):
            try:
                self._http.request(verb, path + query, body=body, headers=headers)
                response = self._http.getresponse()
                break
            except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
                self._http.close()  # kept alive for longer than the server waits
                if last or "content-length" in headers:
                    raise
        content = response.read()
        if response.status != 200:
            raise RuntimeError(f"{verb} {path}: {response.status} {content[:300]!r}")
        return content

    def hang_up(self) -> None:
        """Close the connection; the next call opens another."""
        self._http.close()

    def register(self) -> None:
        message = Register(
            protocol_version=PROTOCOL_VERSION, client_id=self.client_id, client_key=KEY + self.client_id, name="bench",
            memory_bytes=0, expert_share=1.0, compute_share=1.0, num_examples=10, edgefed_version="bench",
        )  # fmt: skip
        self.call("POST", routes.REGISTER, encode_message(message))

    def download(self, units: tuple[UnitInfo, ...]) -> int:
        buffer, total = bytearray(routes.CHUNK_BYTES), 0
        for unit in units:
            path = routes.path_for(routes.BLOB, sha256=unit.sha256)
            self._http.request("GET", path, headers={routes.CLIENT_KEY_HEADER: KEY + self.client_id})
            response = self._http.getresponse()
            while count := response.readinto(buffer):
                total += count
        return total

    def prepare(self, units: list[UnitInfo]) -> None:
        """The update and its hash, before any clock runs."""
        infos = [
            TensorInfo(name=f"{unit.key}|{info.name}", dtype="F32", shape=info.shape)
            for unit in units
            for info in unit.tensors
        ]
        self._head, self._blocks = encode_header(infos), len(infos)
        digest = hashlib.sha256()
        for chunk in self.chunks():
            digest.update(chunk)
        reports = tuple(
            ExpertReport(layer=unit.layer, expert=unit.expert, usage=0.5, importance=1.0, steps=4, tokens=100)
            for unit in units
        )
        self.meta = UpdateMeta(
            client_id=self.client_id, server_round=1, attempt=1, sha256=digest.hexdigest(),
            size_bytes=len(self._head) + self._blocks * len(self._block), num_examples=10, num_tokens=1000,
            experts=reports, metrics={"loss": 1.0},
        )  # fmt: skip

    def chunks(self) -> Iterator[bytes]:
        return itertools.chain([self._head], itertools.repeat(self._block, self._blocks))

    def upload(self) -> None:
        place = {"server_round": 1, "attempt": 1}
        self.call("PUT", routes.UPLOAD, (self.chunks(), self.meta.size_bytes), "?offset=0", **place)

    def commit(self) -> None:
        self.call("POST", routes.COMMIT, encode_message(self.meta), server_round=1, attempt=1)


def trust(certificate: Path | None) -> ssl.SSLContext | None:
    """TLS of a client that knows the certificate; None for plain HTTP."""
    return ssl.create_default_context(cafile=str(certificate)) if certificate else None


def crowd(url: str, clients: int, share: float, certificate: Path | None = None) -> dict:
    """Play all clients, phase by phase, all at once within a phase. Returns seconds and rates."""
    tls = trust(certificate)
    members = [Member(url, number, tls) for number in range(clients)]
    seconds: dict[str, float] = {}

    def phase(name: str, work: Callable[[Member], object]) -> None:
        started = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(len(members)) as pool:
            list(pool.map(work, members))
        seconds[name] = time.monotonic() - started

    phase("register", Member.register)
    manifest = decode_message(members[0].call("GET", routes.MANIFEST, server_round=1), Manifest)
    for number, member in enumerate(members):  # windows that overlap, so that experts have several holders
        count = round(share * len(manifest.units))
        first = number * len(manifest.units) // clients
        member.prepare([manifest.units[(first + at) % len(manifest.units)] for at in range(count)])
    model_bytes = sum(unit.size_bytes for unit in manifest.units)
    phase("download", lambda member: member.download(manifest.units))
    phase("upload", Member.upload)
    phase("commit", Member.commit)
    started = time.monotonic()
    while b'"server_round":2' not in members[0].call("GET", routes.MANIFEST, server_round="latest"):
        time.sleep(0.02)
    seconds["next_model"] = time.monotonic() - started
    uploaded = sum(member.meta.size_bytes for member in members)
    return {
        "model_mb": round(model_bytes / 1e6, 1),
        "downloaded_mb": round(clients * model_bytes / 1e6, 1),
        "uploaded_mb": round(uploaded / 1e6, 1),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "download_mb_per_s": round(clients * model_bytes / 1e6 / seconds["download"]),
        "upload_mb_per_s": round(uploaded / 1e6 / seconds["upload"]),
        "upload_and_commit_mb_per_s": round(uploaded / 1e6 / (seconds["upload"] + seconds["commit"])),
    }
