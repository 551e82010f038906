"""Somebody who listens on the wire."""

from __future__ import annotations

import contextlib
import socket
import threading


class Wiretap:
    """A TCP proxy on loopback that keeps every byte of both directions."""

    def __init__(self, target_port: int):
        self.heard = {"up": bytearray(), "down": bytearray()}
        self._target = target_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._taps: list[threading.Thread] = []
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._target))
            tap = threading.Thread(target=self._tap, args=(near, far), daemon=True)
            self._taps.append(tap)
            tap.start()

    def _tap(self, near: socket.socket, far: socket.socket) -> None:
        """Both directions of one connection, until both have ended."""
        with near, far:
            up = threading.Thread(target=self._pump, args=(near, far, "up"), daemon=True)
            up.start()
            self._pump(far, near, "down")
            up.join()

    def _pump(self, source: socket.socket, sink: socket.socket, direction: str) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self.heard[direction] += data
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Stop listening and wait for connections to end; call it when both sides have hung up."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self._listener.close()
        self._acceptor.join(10)
        for tap in self._taps:
            tap.join(10)
            assert not tap.is_alive(), "a connection outlived the test"
