"""What `edgefed status` draws."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from edgefed.cli.status import render_status
from edgefed.protocol.messages import ClientStatus, RoundStatus, RunConfig, Status, TrainingConfig


def drawn(method: str, name: str = "kitchen", width: int = 140) -> str:
    metrics = {"held_out_loss_before": 2.0, "held_out_loss_after": 1.5, "held_out_accuracy_after": 0.625}
    client = ClientStatus(
        client_id="c1", name=name, state="training", phase="train", fraction=0.5, memory_bytes=1 << 30,
        expert_share=0.25, rounds_done=1, uploaded_bytes=1 << 20, downloaded_bytes=1 << 21, last_seen_s=1.0,
        metrics=metrics,
    )  # fmt: skip
    done = RoundStatus(
        server_round=1, participants=2, updates=1, seconds=3.0, uploaded_bytes=1 << 20, experts_changed=77,
        metrics=metrics,
    )  # fmt: skip
    run = RunConfig(
        run_id="r", model="m", method=method, method_options={}, rounds=3, seed=0, training=TrainingConfig()
    )  # fmt: skip
    status = Status(
        run=run, state="training", server_round=2, min_clients=1, quorum=1, deadline_s=None, updates_received=0,
        clients=(client,), history=(done,), memory_peak_bytes=50 << 20,
    )  # fmt: skip
    console = Console(width=width, emoji=False, record=True, file=io.StringIO())
    console.print(render_status(status, width))
    return console.export_text()


@pytest.mark.parametrize(("method", "there", "absent"), [
    ("fedmoe", ["accuracy", "62.5 %"], ["experts", "25 %", "77"]),
    ("hfedmoe", ["experts changed", "25 %", "77"], ["accuracy", "62.5 %"]),
])  # fmt: skip
def test_accuracy_stands_where_clients_have_no_experts(method, there, absent):
    text = drawn(method)
    assert all(each in text for each in ("kitchen", "round 2 of 3", "2.000 > 1.500", "######......", *there)), text
    assert not any(each in text for each in absent), text


@pytest.mark.parametrize("width", [80, 100, 110, 140])
def test_values_keep_their_units_on_narrow_terminals(width):
    text = drawn("hfedmoe", "a name of twenty one", width)
    assert all(each in text for each in ("a name of twenty one", "25 %", "2.000 > 1.500", "1 s ago")), text
    assert ("2.0 MiB" in text) == (width >= 98), text
    assert "\u2026" not in text.partition("round  updates")[0], text


def test_names_are_not_read_as_markup():
    assert "[red]:boom:[/]" in drawn("hfedmoe", "[red]:boom:[/]")
