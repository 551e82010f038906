"""Agents on one machine: who counts as another agent, and what share of the memory each plans with."""

import contextlib
import dataclasses
import os
import subprocess
import sys

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgefed.hardware.budget import plan_budget
from edgefed.hardware.occupancy import HOST, AgentRegistry, OtherAgent, agents_folder, fair_share
from edgefed.hardware.profiles import facts_of, find_profile

GIB = 2**30
AGENT = """
import sys
from pathlib import Path
from edgefed.hardware.occupancy import AgentRegistry
AgentRegistry(Path(sys.argv[1])).enter(sys.argv[2], int(sys.argv[3]) or None)
print("entered", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def agent(folder, memory=HOST, limit_bytes=0):
    """Another process that has registered; it ends when the block does."""
    command = [sys.executable, "-c", AGENT, str(folder), memory, str(limit_bytes)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "entered\n"
        try:
            yield process
        finally:
            process.stdin.close()
            process.wait(30)


@pytest.mark.parametrize(
    ("total", "limits", "share"),
    [
        (12, [], 12),
        (12, [None], 6),
        (12, [None, None], 4),
        (12, [2], 10),
        (12, [100], 6),  # a limit above the share does not bind
        (12, [2, None], 5),
        (12, [1, 3, None], 4),
        (0, [None], 0),
        (-5, [None], 0),
    ],
)
def test_the_share_of_one_agent(total, limits, share):
    assert fair_share(total, limits) == share


@given(st.integers(0, 2**40), st.lists(st.none() | st.integers(1, 2**40), max_size=5))
def test_the_shares_of_all_agents_fit(total, limits):
    """Agents without a limit get a share each, the others their limit at most: never more than there is."""
    share = fair_share(total, limits)
    assert share + sum(share if limit is None else min(limit, share) for limit in limits) <= total


def test_living_agents_in_the_same_memory_are_found(tmp_path):
    registry = AgentRegistry(tmp_path)
    registry.enter(HOST)
    assert registry.others(HOST) == ()  # not this process itself
    with agent(tmp_path, limit_bytes=GIB) as first, agent(tmp_path, "GPU-1") as second, agent(tmp_path, "") as third:
        found = registry.others(HOST)
        assert {other.pid for other in found} == {first.pid, third.pid}  # one that has not probed yet may be any
        assert {other.limit_bytes for other in found} == {GIB, None}
        assert all(other.rss_bytes > 0 for other in found)
        assert {other.pid for other in registry.others("GPU-1")} == {second.pid, third.pid}


def test_an_agent_that_ended_leaves_nothing_behind(tmp_path):
    with agent(tmp_path) as ended:
        pass
    assert [file.stem for file in tmp_path.iterdir()] == [str(ended.pid)]
    assert AgentRegistry(tmp_path).others(HOST) == ()
    assert list(tmp_path.iterdir()) == []


def test_a_later_process_with_the_same_pid_is_not_an_agent(tmp_path):
    with agent(tmp_path) as other:
        file = tmp_path / f"{other.pid}.json"
        entry = msgspec.json.decode(file.read_bytes())
        file.write_bytes(msgspec.json.encode({**entry, "started_s": entry["started_s"] - 60}))
        assert AgentRegistry(tmp_path).others(HOST) == ()


def test_leaving_and_damaged_entries(tmp_path):
    registry = AgentRegistry(tmp_path)
    registry.enter(HOST)
    assert [file.stem for file in tmp_path.iterdir()] == [str(os.getpid())]
    registry.leave()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "7.json").write_text("{")
    assert registry.others(HOST) == ()


def test_a_folder_that_cannot_be_used_means_no_other_agents(tmp_path):
    (tmp_path / "file").write_text("x")
    registry = AgentRegistry(tmp_path / "file")
    registry.enter(HOST)
    registry.leave()
    assert registry.others(HOST) == ()


def test_the_folder_belongs_to_this_user_and_pid_namespace(monkeypatch):
    monkeypatch.delenv("EDGEFED_AGENTS", raising=False)
    assert agents_folder().name.startswith("edgefed-agents")
    monkeypatch.setenv("EDGEFED_AGENTS", "/elsewhere")
    assert str(agents_folder()) == "/elsewhere"


def test_two_agents_plan_no_more_than_the_machine_has():
    facts = facts_of(find_profile("rpi-5"))
    alone = plan_budget(facts)
    other = OtherAgent(pid=7, rss_bytes=0, limit_bytes=None)
    shared = plan_budget(facts, others=[other])
    assert shared.now_bytes == alone.now_bytes // 2
    assert sum(term.signed_bytes for term in shared.terms) == shared.now_bytes
    assert "pid 7" in shared.origin
    assert any("another edgefed agent" in note for note in shared.notes)
    limited = plan_budget(facts, others=[OtherAgent(7, 0, GIB)])
    assert limited.now_bytes == alone.now_bytes - GIB
    by_the_owner = plan_budget(facts, override_bytes=alone.now_bytes, others=[other])
    assert by_the_owner.now_bytes == alone.now_bytes  # the owner's limit wins, with a warning
    assert any("is more than the" in note for note in by_the_owner.notes)


def test_memory_of_other_agents_counts_as_shared():
    """An agent that already uses half of the memory leaves the other half, not a quarter."""
    facts = facts_of(find_profile("rpi-5"))
    alone = plan_budget(facts)
    half = alone.now_bytes // 2
    available = facts.host.memory_available_bytes.value - int(half / 0.95)
    busy = dataclasses.replace(
        facts, host=dataclasses.replace(facts.host, memory_available_bytes=facts.host.memory_available_bytes.map(
            lambda _: available))
    )  # fmt: skip
    shared = plan_budget(busy, others=[OtherAgent(7, half, None)])
    assert shared.now_bytes == pytest.approx(half, rel=0.01)
