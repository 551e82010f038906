"""A check may raise, crash, hang or print: the worker turns all of it into an outcome, and goes on."""

import os
import signal
import sys
import time

import pytest

from edgefed.errors import DeviceNotFound
from edgefed.isolation.worker import Worker, describe_exit

CHECKS = """
import os, signal, sys, time

def add(one, other):
    return one + other

def fails():
    raise RuntimeError("no kernel image")

def fails_silently():
    raise KeyError

def not_here():
    from edgefed.errors import DeviceNotFound
    raise DeviceNotFound("no cuda:7", remedy="Take another.")

def kills_itself(signal_number):
    print("last words", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal_number)
    time.sleep(60)

def leaves(status):
    os._exit(status)

def sleeps():
    time.sleep(600)

def starts_a_sleeper(note):
    import subprocess
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    open(note, "w").write(str(child.pid))
    time.sleep(600)

def prints():
    print("{\\"value\\": 1}")
    os.system("echo from a child")
    return 2

def returns_a_thing():
    return object()

def environment(name):
    return os.environ.get(name)

def process():
    return os.getpid()

def closes_its_answers():
    os.closerange(3, 64)
    time.sleep(600)
"""


@pytest.fixture
def checks(tmp_path, monkeypatch):
    (tmp_path / "doctor_checks.py").write_text(CHECKS)
    monkeypatch.syspath_prepend(tmp_path)
    return "doctor_checks"


@pytest.fixture
def worker(checks):
    with Worker() as worker:
        yield worker


def test_a_check_returns_its_value(worker, checks):
    outcome = worker.call(f"{checks}:add", 60, one=2, other=3)
    assert outcome.ok
    assert outcome.value == 5
    assert not outcome.died


def test_one_process_serves_many_checks(worker, checks):
    first = worker.call(f"{checks}:process", 60).value
    assert worker.call(f"{checks}:process", 60).value == first != os.getpid()


def test_an_exception_is_an_answer(worker, checks):
    first = worker.call(f"{checks}:process", 60).value
    outcome = worker.call(f"{checks}:fails", 60)
    assert not outcome.ok
    assert outcome.failure == "RuntimeError: no kernel image"
    assert not outcome.died
    assert worker.call(f"{checks}:fails_silently", 60).failure == "KeyError: KeyError"
    assert worker.call(f"{checks}:process", 60).value == first


def test_an_edgefed_error_arrives_as_itself(worker, checks):
    outcome = worker.call(f"{checks}:not_here", 60)
    assert isinstance(outcome.error, DeviceNotFound)
    assert outcome.error.remedy == "Take another."
    assert outcome.failure == "no cuda:7"


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGILL, "an instruction that this processor does not have"),
        (signal.SIGSEGV, "invalid memory access"),
        (signal.SIGABRT, "a library gave up"),
        (signal.SIGKILL, "the memory may have run out"),
    ],
)
def test_a_crash_is_named_and_the_next_check_runs(worker, checks, number, words):
    outcome = worker.call(f"{checks}:kills_itself", 60, signal_number=int(number))
    assert outcome.died
    assert not outcome.ok
    assert signal.Signals(number).name in outcome.failure
    assert words in outcome.failure
    assert "it said: last words" in outcome.failure
    assert worker.call(f"{checks}:add", 60, one=1, other=1).value == 2


def test_a_check_that_leaves_is_named(worker, checks):
    outcome = worker.call(f"{checks}:leaves", 60, status=7)
    assert outcome.died
    assert "exit status 7" in outcome.failure


def test_a_hang_ends_at_its_limit(worker, checks):
    worker.call(f"{checks}:add", 60, one=1, other=1)
    outcome = worker.call(f"{checks}:sleeps", 0.5)
    assert outcome.died
    assert outcome.failure == "did not end within 0.5 s"
    assert worker.call(f"{checks}:add", 60, one=2, other=2).value == 4


@pytest.mark.skipif(os.name != "posix", reason="process groups")
def test_what_a_hung_check_started_ends_with_it(worker, checks, tmp_path):
    note = tmp_path / "pid"
    worker.call(f"{checks}:add", 60, one=1, other=1)
    outcome = worker.call(f"{checks}:starts_a_sleeper", 5, note=str(note))
    assert outcome.died
    child = int(note.read_text())
    end = time.monotonic() + 20
    while True:
        try:
            with open(f"/proc/{child}/stat") as file:
                gone = file.read().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            gone = True
        if gone:
            break
        assert time.monotonic() < end, "the grandchild still runs"
        time.sleep(0.05)


def test_a_worker_that_stops_answering_is_ended(worker, checks):
    worker.call(f"{checks}:add", 60, one=1, other=1)
    outcome = worker.call(f"{checks}:closes_its_answers", 60)
    assert outcome.died
    assert "closed its output" in outcome.failure
    assert worker.call(f"{checks}:add", 60, one=1, other=2).value == 3


def test_printed_output_of_a_check_is_not_its_answer(worker, checks):
    assert worker.call(f"{checks}:prints", 60).value == 2


def test_a_result_that_is_no_json_and_a_target_that_is_not_there(worker, checks):
    assert "not JSON serializable" in worker.call(f"{checks}:returns_a_thing", 60).failure
    assert worker.call("no_such_module_here:x", 60).failure.startswith("ModuleNotFoundError")
    assert worker.call(f"{checks}:no_such_function", 60).failure.startswith("AttributeError")


def test_the_environment_is_set_before_the_first_import(checks):
    with Worker({"TRITON_INTERPRET": "1"}) as worker:
        assert worker.call(f"{checks}:environment", 60, name="TRITON_INTERPRET").value == "1"


def test_no_process_at_all(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with Worker() as worker:
        outcome = worker.call("x:y", 5)
    assert not outcome.ok
    assert outcome.failure.startswith("no process could be started")


def test_exits_in_words():
    assert describe_exit(3) == "ended by itself with exit status 3"
    assert describe_exit(-9).startswith("killed by SIGKILL")
    assert describe_exit(-200) == "killed by signal 200"
