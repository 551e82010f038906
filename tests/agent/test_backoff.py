"""Pure tests: no socket, no real waiting."""

from __future__ import annotations

import functools
import random
import threading
import time

import pytest

from edgefed.agent.backoff import BackoffSchedule, Retry, is_transient
from edgefed.errors import (
    DiskFull,
    EdgefedError,
    InvalidUpdate,
    NetworkError,
    ProtocolError,
    ServerUnreachable,
    Unauthorized,
)
from edgefed.progress import StopRequested, run_interruptibly


class FakeTime:
    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def clock(self) -> float:
        return self.now


class TopOfRange(random.Random):
    """Draws the upper end, so that the limits themselves show."""

    def uniform(self, a: float, b: float) -> float:
        return b


def failing(times: int, error: EdgefedError):
    left = [times]

    def request() -> str:
        if left[0]:
            left[0] -= 1
            raise error.with_traceback(None)  # one object raised again would collect thousands of frames
        return "answer"

    return request


def make_retry(fake: FakeTime, **options) -> Retry:
    return Retry(threading.Event(), sleep=fake.sleep, clock=fake.clock, **{"rng": TopOfRange(), **options})


def test_limits_double_up_to_the_cap():
    schedule = BackoffSchedule(first_s=0.5, factor=2.0, cap_s=30.0)
    assert [schedule.limit_s(n) for n in range(1, 9)] == [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert schedule.limit_s(10**9) == 30  # no overflow after a year without a server


def test_waits_follow_the_schedule_and_reset_on_success():
    fake = FakeTime()
    retry = make_retry(fake)
    assert retry.run(failing(3, ServerUnreachable("gone"))) == "answer"
    assert fake.slept == [0.5, 1, 2]
    retry.run(failing(2, ServerUnreachable("gone")))
    assert fake.slept[3:] == [0.5, 1]


def test_jitter_covers_the_whole_range_and_is_seeded():
    runs = []
    for _ in range(2):
        fake = FakeTime()
        make_retry(fake, rng=random.Random(3), schedule=BackoffSchedule(1.0, 1.0, 1.0)).run(
            failing(400, ServerUnreachable("gone"))
        )
        runs.append(fake.slept)
    assert runs[0] == runs[1]
    assert min(runs[0]) < 0.05
    assert max(runs[0]) > 0.95
    assert 0.4 < sum(runs[0]) / 400 < 0.6


def test_moving_bytes_reset_the_schedule():
    fake = FakeTime()
    retry = make_retry(fake)
    failures = iter(range(6))

    def request() -> None:
        number = next(failures, None)
        if number is None:
            return
        if number == 3:
            retry.note_progress()
        raise ServerUnreachable("cut")

    retry.run(request)
    assert fake.slept == [0.5, 1, 2, 0.5, 1, 2]


def test_retries_end_exactly_at_the_time_limit():
    fake = FakeTime()
    with pytest.raises(ServerUnreachable):
        make_retry(fake).run(failing(10**6, ServerUnreachable("gone")), give_up_after_s=60)
    assert fake.now == pytest.approx(60)


def test_retries_never_end_without_a_time_limit():
    fake = FakeTime()
    assert make_retry(fake).run(failing(3000, ServerUnreachable("gone"))) == "answer"
    assert fake.now > 24 * 3600


def received(error: EdgefedError, status: int) -> EdgefedError:
    error.received_status = status  # type: ignore[attr-defined]
    return error


def foreign(error: EdgefedError) -> EdgefedError:
    error.foreign = True  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    ("error", "before", "after"),
    [
        (ServerUnreachable("refused"), True, True),
        (received(DiskFull("on the server"), 507), True, True),
        (DiskFull("here"), False, False),  # waiting does not help; the user must know
        (received(EdgefedError("bug in the server"), 500), True, True),
        (received(InvalidUpdate("NaN"), 422), False, False),
        (received(Unauthorized("token"), 401), False, False),
        (foreign(ProtocolError("a web page")), False, True),  # before joining: a wrong address
        (foreign(NetworkError("certificate")), False, True),
        (NetworkError("other"), False, False),
    ],
)
def test_which_errors_are_transient(error, before, after):
    assert (is_transient(error, joined=False), is_transient(error, joined=True)) == (before, after)
    fake = FakeTime()
    if after:
        assert make_retry(fake).run(failing(1, error), joined=True) == "answer"
    else:
        with pytest.raises(type(error)):
            make_retry(fake).run(failing(1, error), joined=True)
        assert fake.slept == []


@pytest.mark.parametrize(
    ("error", "ends"),
    [
        (ServerUnreachable("refused"), True),
        (received(DiskFull("on the server"), 507), False),
        (foreign(received(EdgefedError("a proxy's page"), 502)), True),
    ],
)
def test_the_limit_before_joining_ends_with_an_answer_of_an_edgefed_server(error, ends):
    retry, errors = make_retry(fake := FakeTime()), [error] + 40 * [ServerUnreachable("it restarts")]

    def request():
        if errors:
            raise errors.pop(0)
        return "answer"

    call = functools.partial(retry.run, request, joined=False, give_up_after_s=20.0, until_answered=True)
    if ends:
        with pytest.raises(ServerUnreachable):
            call()
        assert 20 <= sum(fake.slept) < 60
    else:
        assert call() == "answer"
        assert sum(fake.slept) > 60


def test_other_exceptions_propagate():
    with pytest.raises(ZeroDivisionError):
        make_retry(FakeTime()).run(lambda: 1 / 0)


def test_stop_interrupts_a_wait():
    stop = threading.Event()
    retry = Retry(stop, schedule=BackoffSchedule(30.0, 1.0, 30.0), rng=TopOfRange())
    threading.Timer(0.1, stop.set).start()
    started = time.monotonic()
    with pytest.raises(StopRequested):
        retry.run(failing(1, ServerUnreachable("gone")))
    assert time.monotonic() - started < 5


def test_stop_interrupts_a_blocked_request():
    stop, release = threading.Event(), threading.Event()
    threading.Timer(0.1, stop.set).start()
    started = time.monotonic()
    with pytest.raises(StopRequested):
        run_interruptibly(lambda: release.wait(20), stop)
    assert time.monotonic() - started < 5
    release.set()
    with pytest.raises(StopRequested):
        run_interruptibly(lambda: pytest.fail("nothing starts after a stop"), stop)


def test_interruptible_requests_return_results_and_raise_errors():
    stop = threading.Event()
    assert run_interruptibly(lambda: 5, stop) == 5
    with pytest.raises(ServerUnreachable, match="gone"):
        run_interruptibly(failing(1, ServerUnreachable("gone")), stop)
