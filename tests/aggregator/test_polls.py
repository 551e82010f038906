"""Long polls, and what keeps small requests quick on a crowded server."""

import asyncio
import contextlib
import gc
import threading
from types import SimpleNamespace

import pytest
from starlette.requests import ClientDisconnect

from edgefed.aggregator.app import Endpoints, Work
from edgefed.aggregator.polls import ASKED_TOGETHER, Bell, LongPolls
from edgefed.aggregator.server import rare_collections
from edgefed.errors import IdentityInUse
from edgefed.protocol.messages import Finished, Wait

WAIT = Wait(retry_after_s=1.0, reason="waits")


async def still_there():
    await asyncio.Event().wait()


async def gone():
    return {"type": "http.disconnect"}


@contextlib.asynccontextmanager
async def long_polls(calls, *, every_s=60.0, closing=lambda: False):
    """Polls that are watched; ``calls`` gets the number of questions of each call in a thread."""

    async def run(function, asks):
        calls.append(len(asks))
        await asyncio.sleep(0)
        return function(asks)

    bell = Bell()
    bell.attach(asyncio.get_running_loop())
    polls = LongPolls(bell, run, closing)
    watch = asyncio.create_task(polls.watch_forever(every_s))
    try:
        yield bell, polls
    finally:
        watch.cancel()


def test_a_ring_asks_for_all_polls_in_few_calls_and_ends_those_with_another_answer():
    async def play():
        calls, answers = [], dict.fromkeys(range(200), WAIT)
        async with long_polls(calls) as (bell, polls):
            tasks = {
                number: asyncio.create_task(polls.answer(lambda number=number: answers[number], 20.0, still_there))
                for number in answers
            }
            await asyncio.sleep(0.05)
            calls.clear()
            answers[7] = answers[100] = Finished(server_round=2, reason="done")
            bell.ring()
            await asyncio.wait([tasks[7], tasks[100]], timeout=5)
            await asyncio.sleep(0.05)
            assert {number for number, task in tasks.items() if task.done()} == {7, 100}
            assert tasks[7].result() == answers[7]
            assert len(calls) == -(-200 // ASKED_TOGETHER)
            for task in tasks.values():
                task.cancel()

    asyncio.run(play())


def test_a_poll_hears_of_errors_news_during_its_first_question_and_hang_ups():
    async def play():
        async with long_polls([]) as (bell, polls):

            def refused():
                if replaced:
                    raise IdentityInUse("replaced")
                return WAIT

            replaced = []
            poll = asyncio.create_task(polls.answer(refused, 20.0, still_there))
            await asyncio.sleep(0.02)
            replaced.append(True)
            bell.ring()
            with pytest.raises(IdentityInUse):
                await asyncio.wait_for(poll, 5)
            answers = [WAIT, Finished(server_round=1, reason="done")]

            def changes():
                bell.ring()  # while the first question is asked
                return answers.pop(0) if len(answers) > 1 else answers[0]

            assert isinstance(await asyncio.wait_for(polls.answer(changes, 20.0, still_there), 5), Finished)
            with pytest.raises(ClientDisconnect):
                await polls.answer(lambda: WAIT, 20.0, gone)
            assert await polls.answer(lambda: WAIT, 0.05, still_there) == WAIT

    asyncio.run(play())


def test_polls_are_asked_without_news_too_and_all_end_when_the_server_stops():
    async def play():
        asked, stops = [], []
        async with long_polls([], every_s=0.02, closing=lambda: bool(stops)) as (bell, polls):

            def ask():
                asked.append(1)
                return WAIT

            poll = asyncio.create_task(polls.answer(ask, 20.0, still_there))
            await asyncio.sleep(0.2)
            assert 2 < len(asked) < 15
            stops.append(True)
            bell.ring()
            assert await asyncio.wait_for(poll, 5) == WAIT

    asyncio.run(play())


def test_small_requests_do_not_queue_behind_transfers_and_commits():
    async def play():
        endpoints = Endpoints(SimpleNamespace(closing=False), Bell())
        disk = threading.Event()
        slow = [asyncio.ensure_future(endpoints.run(disk.wait, 20, work=Work.TRANSFER)) for _ in range(50)]
        slow += [asyncio.ensure_future(endpoints.run(disk.wait, 20, work=Work.COMMIT)) for _ in range(50)]
        try:
            assert await asyncio.wait_for(endpoints.run(lambda: "answer"), 5) == "answer"
            assert not any(task.done() for task in slow)
        finally:
            disk.set()
            await asyncio.gather(*slow)
            endpoints.close()

    asyncio.run(play())


def test_collections_are_rare_while_a_server_runs_and_as_before_afterwards():
    before = gc.get_threshold()
    with rare_collections():
        assert gc.get_freeze_count() > 1000
        assert gc.get_threshold() > before
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() == 0
