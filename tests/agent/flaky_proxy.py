"""A TCP proxy on loopback that cuts connections after a given number of bytes."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time


class FlakyProxy:
    """Forwards to ``target_port``, and cuts.

    ``cut_down = [n, ...]``: cut a connection after n bytes from the server; ``cut_up``: towards it. Each cut serves one
    connection, the first that carries that many bytes, so that small messages stay whole.
    """

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.cut_down: list[int] = []
        self.cut_up: list[int] = []
        self.cuts_made = 0
        self.latency_s = 0.0
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._relays: list[threading.Thread] = []
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def drop(self) -> None:
        """Cut every connection now; what the proxy had not forwarded yet is lost."""
        with self._lock:
            connections, self._sockets = self._sockets, set()
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Cut everything and wait for the threads, which close their sockets."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self._listener.close()
        self._acceptor.join(10)
        self.drop()
        for relay in self._relays:
            relay.join(10)
            assert not relay.is_alive()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self.target_port), timeout=5)
                except OSError:
                    near.close()
                    continue
                far.settimeout(None)
                with self._lock:
                    self._sockets |= {near, far}
                relay = threading.Thread(target=self._relay, args=(near, far), daemon=True)
                self._relays.append(relay)
                relay.start()

    def _relay(self, near: socket.socket, far: socket.socket) -> None:
        """Both directions of one connection, until both have ended."""
        with near, far:
            up = threading.Thread(target=self._pump, args=(near, far, self.cut_up), daemon=True)
            up.start()
            self._pump(far, near, self.cut_down)
            up.join()
            with self._lock:
                self._sockets -= {near, far}

    def _pump(self, source: socket.socket, sink: socket.socket, cuts: list[int]) -> None:
        moved = 0
        with contextlib.suppress(OSError):
            while data := source.recv(4096):
                if self.latency_s:
                    time.sleep(self.latency_s)
                with self._lock:
                    cut = cuts[0] if cuts and moved + len(data) >= cuts[0] else None
                    if cut is not None:
                        cuts.pop(0)
                        self.cuts_made += 1
                if cut is not None:
                    sink.sendall(data[: max(0, cut - moved)])
                    break
                sink.sendall(data)
                moved += len(data)
            else:
                sink.shutdown(socket.SHUT_WR)
                return
        # The receiver gets every byte before the cut, then an early end; the sender gets a reset.
        with contextlib.suppress(OSError):
            source.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        for end in (sink, source):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
