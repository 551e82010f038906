"""Long polls: requests that wait until their answer changes.

One task asks again for all of them, some at a time. A thousand polls that each wake up at every change, or every few
seconds, would keep all other requests waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from edgefed.aggregator.wire import until_disconnect
from edgefed.protocol.messages import AssignmentReply, Wait

ASK_S = 5.0
"""All polls are asked again at least this often, which marks their clients as live. News ring the bell."""
ASKED_TOGETHER = 32
"""Polls that are asked in one go: a few milliseconds."""
EARLIER = 0.2
"""Long polls end by up to this share of their time early, so that those that began together do not end together."""

Ask = Callable[[], AssignmentReply]


class Bell:
    """News for those that wait. `ring` may be called from any thread once the loop is known."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Set the event loop of those that wait."""
        self._loop = loop

    def ring(self) -> None:
        """Wake all that listen, from any thread."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        event, self._event = self._event, asyncio.Event()
        event.set()

    def listen(self) -> asyncio.Event:
        """The event of the next ring. Listen first, then check, then wait: so no ring is missed."""
        return self._event


class LongPolls:
    """The polls in progress. ``run`` calls a blocking function in a thread; ``closing``: whether the server stops."""

    def __init__(
        self, bell: Bell, run: Callable[..., Awaitable[list[AssignmentReply | Exception]]], closing: Callable[[], bool]
    ):
        self._bell, self._run, self._closing = bell, run, closing
        self._waiting: dict[asyncio.Future[AssignmentReply], Ask] = {}

    async def answer(self, ask: Ask, wait_s: float, receive: Receive) -> AssignmentReply:
        """What ``ask`` returns, which blocks; a `Wait` only after about ``wait_s`` seconds.

        Raises the errors of ``ask``, ClientDisconnect.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + wait_s - random.uniform(0.0, EARLIER) * max(0.0, wait_s - ASK_S)
        news: asyncio.Future[AssignmentReply] = loop.create_future()
        self._waiting[news] = ask  # before the first question, so that no news is missed
        try:
            answer = await self._answer(ask)
            if not isinstance(answer, Wait) or self._closing() or (left_s := until - loop.time()) <= 0:
                return answer
            gone = asyncio.ensure_future(until_disconnect(receive))
            try:
                events: set[asyncio.Future[Any]] = {news, gone}
                await asyncio.wait(events, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            finally:
                gone.cancel()
            if news.done():
                return news.result()
            if gone.done():
                raise ClientDisconnect
            return await self._answer(ask)
        finally:
            del self._waiting[news]
            if not news.cancel():
                news.exception()  # not reported as lost where nobody has waited for it

    async def _answer(self, ask: Ask) -> AssignmentReply:
        (answer,) = await self._run(_answers, [ask])
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def watch_forever(self, every_s: float) -> None:
        """Ask again for all polls at each ring, and at least every ``every_s`` seconds, until cancelled."""
        while True:
            ring, polls = self._bell.listen(), list(self._waiting.items())
            for first in range(0, len(polls), ASKED_TOGETHER):
                some = [(news, ask) for news, ask in polls[first : first + ASKED_TOGETHER] if not news.done()]
                for (news, _), answer in zip(some, await self._run(_answers, [ask for _, ask in some]), strict=True):
                    if news.done():
                        continue  # its client has hung up meanwhile
                    if isinstance(answer, Exception):
                        news.set_exception(answer)
                    elif not isinstance(answer, Wait) or self._closing():
                        news.set_result(answer)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(ring.wait(), every_s)


def _answers(asks: Sequence[Ask]) -> list[AssignmentReply | Exception]:
    answers: list[AssignmentReply | Exception] = []
    for ask in asks:
        try:
            answers.append(ask())
        except Exception as error:
            answers.append(error)
    return answers
