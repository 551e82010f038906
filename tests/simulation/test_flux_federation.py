"""Flux with real processes over loopback: unequal budgets, and an agent that dies and comes back."""

from __future__ import annotations

import json
import signal

from edgefed.aggregator.store import Store
from edgefed.expert_records import ExpertPlan
from edgefed.runs import RunReader
from edgefed.trainer.saved_plan import PLAN_FILE


def test_flux_runs_with_unequal_devices_and_survives_an_agents_death(serve, processes, wait_for, tmp_path):
    server, url = serve(
        "--method", "flux", "--option", "probes=1", "--option", "eps_start=0.5", "--option", "coverage=balanced",
        "--rounds", 3, "--min-clients", 2, "--client-timeout", 5, "--local-steps", 2, "--batch-size", 2,
        "--sequence-length", 64, "--profile-tokens", 512, "--evaluation-tokens", 256, "--exit-when-finished",
    )  # fmt: skip

    def join(name: str, silo: str, share: str):
        return processes(
            "-m", "edgefed", "join", url, "--data", f"silo:{silo}", "--experts", share, "--state", tmp_path / name,
            "--name", name, "--json", log=tmp_path / f"{name}.log",
        )  # fmt: skip

    large, small = join("large", "asyncio", "50%"), join("small", "email", "25%")

    def round_of(name: str) -> int:
        path = tmp_path / name / PLAN_FILE
        return json.loads(path.read_text())["profile_round"] if path.exists() else 0

    wait_for(lambda: round_of("large") >= 1 and round_of("small") >= 1, "the first round")
    small.send_signal(signal.SIGKILL)
    small.wait()
    small = join("small", "email", "25%")
    assert large.wait(timeout=300) == 0, (tmp_path / "large.log").read_text()
    assert small.wait(timeout=300) == 0, (tmp_path / "small.log").read_text()
    assert server.wait(timeout=60) == 0

    plans = {
        name: ExpertPlan.from_dict(json.loads((tmp_path / name / PLAN_FILE).read_text())["plan"])
        for name in ("large", "small")
    }
    assert plans["large"].num_resident == 32
    assert plans["small"].num_resident == 16
    assert sum(len(groups) for groups in plans["large"].merged) == 16
    with RunReader(tmp_path / "run") as reader:
        assert reader.last_round == 4
    store = Store(tmp_path / "run", read_only=True)
    clients = {client.name: client for client in store.clients()}
    store.close()
    assert clients["large"].survey.tune_slots == 16
    assert clients["small"].survey.tune_slots == 8
    measured = [u for row in clients["large"].survey.utility for u in row if u is not None]
    assert len(measured) > 16, "utilities of three rounds: the assignments moved on"
