"""A TCP proxy on loopback with the manners of a poor line: a rate, a delay, silence."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time

BLOCK = 8 * 1024


class Bucket:
    """Hands out at most ``rate`` bytes per second, with no more than one block saved up. None: no limit."""

    def __init__(self, rate: float | None) -> None:
        self.rate = rate
        self._free_at = 0.0

    async def take(self, size: int) -> None:
        if self.rate is None:
            return
        now = time.monotonic()
        self._free_at = max(self._free_at, now - BLOCK / self.rate) + size / self.rate
        if self._free_at > now:
            await asyncio.sleep(self._free_at - now)


class ThrottlingProxy:
    """Forwards to ``target_port``. ``up`` and ``down``: bytes per second of all connections together.

    ``delay_s`` holds every block back that long, without slowing the line. While ``silent`` is set connections stay
    open and nothing moves, as behind a router that forgot them. `drop` cuts all connections.
    """

    def __init__(self, target_port: int, *, up: float | None = None, down: float | None = None, delay_s: float = 0.0):
        self.target_port = target_port
        self.up, self.down = Bucket(up), Bucket(down)
        self.delay_s = delay_s
        self.silent = False
        self.moved = {"up": 0, "down": 0}
        self._writers: set[asyncio.StreamWriter] = set()
        self._connections: set[asyncio.Task[None]] = set()
        started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main(started)), daemon=True)
        self._thread.start()
        assert started.wait(10)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> ThrottlingProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join(10)
        assert not self._thread.is_alive()

    def drop(self) -> None:
        self._loop.call_soon_threadsafe(self._abort)

    def _abort(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _main(self, started: threading.Event) -> None:
        self._loop, self._closing = asyncio.get_running_loop(), asyncio.Event()
        # A small limit, so that the proxy itself buffers next to nothing.
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=BLOCK)
        self.port = server.sockets[0].getsockname()[1]
        started.set()
        await self._closing.wait()
        server.close()
        self._abort()
        self.silent = False
        while self._connections:
            for task in self._connections:
                task.cancel()
            await asyncio.sleep(0.01)

    async def _serve(self, near: asyncio.StreamReader, near_out: asyncio.StreamWriter) -> None:
        try:
            far, far_out = await asyncio.open_connection("127.0.0.1", self.target_port, limit=BLOCK)
        except OSError:
            near_out.close()
            return
        self._writers |= {near_out, far_out}
        # Tasks of their own: the stream server reports the cancellation of its callback's task as an error.
        for pump in (self._pump(near, far_out, "up"), self._pump(far, near_out, "down")):
            task = asyncio.ensure_future(pump)
            self._connections.add(task)
            task.add_done_callback(self._connections.discard)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, way: str) -> None:
        pending: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(64)
        delivering = asyncio.ensure_future(self._deliver(pending, sink, way))
        try:
            with contextlib.suppress(OSError):
                while data := await source.read(BLOCK):
                    await getattr(self, way).take(len(data))
                    await pending.put((time.monotonic() + self.delay_s, data))
            await pending.put((0.0, b""))
            await delivering
        finally:
            delivering.cancel()

    async def _deliver(self, pending: asyncio.Queue[tuple[float, bytes]], sink: asyncio.StreamWriter, way: str) -> None:
        with contextlib.suppress(OSError):
            while True:
                due, data = await pending.get()
                if not data:
                    break
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                while self.silent:
                    await asyncio.sleep(0.01)
                sink.write(data)
                await sink.drain()
                self.moved[way] += len(data)
        with contextlib.suppress(OSError, RuntimeError):
            sink.close()
