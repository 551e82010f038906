"""What `edgefed status` draws."""

from __future__ import annotations

import io
import re

import msgspec
import pytest
from rich.console import Console
from sample_status import DEVICE, METRICS, client_of, status_of

from edgefed.cli.status import render_status
from edgefed.protocol.comparison import Comparison
from edgefed.protocol.messages import Status


def drawn(status: Status, width: int = 140, height: int | None = None) -> str:
    console = Console(width=width, emoji=False, record=True, file=io.StringIO())
    console.print(render_status(status, height))
    return console.export_text()


@pytest.mark.parametrize(("method", "there", "absent"), [
    ("fedmoe", ["accuracy", "62.5 %"], ["experts", "25 %", "77"]),
    ("hfedmoe", ["experts changed", "25 %", "77"], ["accuracy", "62.5 %"]),
])  # fmt: skip
def test_accuracy_stands_where_clients_have_no_experts(method, there, absent):
    text = drawn(status_of(method, [client_of("kitchen")]))
    assert all(each in text for each in ("kitchen", "round 2 of 3", "2.000 -> 1.500", "######......", *there)), text
    assert not any(each in text for each in absent), text


def test_a_line_tells_the_bytes_of_compressed_rounds_by_kind():
    status = status_of("hfedmoe", [client_of("kitchen")])
    assert "round 1: up" not in drawn(status)
    metrics = {
        **METRICS, "bytes_up_experts": 2 << 20, "bytes_up_routers": 1 << 10, "bytes_up_changes": 2 << 20,
        "upload_ratio": 107.8, "bytes_down_changes": 3 << 20, "bytes_down_saved": 61 << 20, "residual_norm": 1.5,
        "change_norm": 2.0, "model_residual_norm": 1.0, "model_step_norm": 4.0,
    }  # fmt: skip
    done = msgspec.structs.replace(status.history[0], metrics=metrics, downloaded_bytes=4 << 20)
    text = " ".join(drawn(msgspec.structs.replace(status, history=(done,)), width=400).split())
    assert (
        "round 1: up experts 2.0 MiB, routers 1.0 KiB (1/108 of whole ones); down whole 1.0 MiB, changes 3.0 MiB in "
        "place of 64.0 MiB; left for later (L2 norm) 75 % of the updates, 25 % of the step"
    ) in text


def test_a_finished_client_is_not_said_to_train():
    text = drawn(status_of("hfedmoe", [client_of("a", state="done"), client_of("b", state="finished")]))
    assert "######" not in text
    comparing = drawn(status_of("hfedmoe", [client_of("a", state="finished", phase="evaluate")]))
    assert "evaluate" in comparing


def test_clients_that_are_gone_are_counted_apart():
    states = ("training", "waiting", "left", "lost", "left")
    text = drawn(status_of("hfedmoe", [client_of(f"c{number}", state=each) for number, each in enumerate(states)]))
    assert "2 clients, 1 lost, 2 left (at least 1)" in text, text
    assert "   1 client (at least 1)" in drawn(status_of("hfedmoe", [client_of("a")]))


def test_the_comparison_of_each_client_stands_side_by_side_with_a_verdict():
    found = {
        "kitchen": Comparison(server_round=4, num_tokens=4096, before=5.26, global_model=4.45, device=4.6, alone=4.87),
        "vm": Comparison(server_round=4, num_tokens=2048, before=5.54, global_model=4.71, device=4.8, alone=4.61),
    }
    clients = [client_of(name, number, comparison=each) for number, (name, each) in enumerate(found.items())]
    text = drawn(status_of("hfedmoe", clients, state="finished"), 60)
    assert "5.260         4.450        4.600  4.870" in text, text
    mean = r"mean +5\.400 +4\.580 +4\.700 +4\.740"
    assert re.search(mean, text), text
    late = client_of("late", 2, comparison=Comparison(server_round=4))  # joined when the run was over
    assert re.search(mean, drawn(status_of("hfedmoe", [*clients, late], state="finished"), 60))
    flat = " ".join(text.split())
    assert "on average 0.16 nats better than training alone (better for 1 of 2)" in flat, text


def test_slices_are_shown_as_a_share_of_neurons():
    text = drawn(status_of("slices", [client_of("a", metrics={"neuron_share": 0.07}), client_of("b", metrics={})]))
    assert " neurons " in text, text
    assert " 7 % " in text, text


def test_the_own_model_stands_beside_the_global_one():
    found = Comparison(server_round=4, num_tokens=4096, before=5.26, global_model=4.45, own=4.3, device=4.6, alone=4.87)
    text = drawn(status_of("slices", [client_of("a", comparison=found)], state="finished"), 80)
    assert re.search(r"4\.450 +4\.300 +4\.600", text), text
    flat = " ".join(text.split())
    assert "the global model with their private parts is on average 0.57 nats better than training alone" in flat, text


def test_a_budget_that_has_changed_since_is_not_explained():
    assert "1.0 GiB of 16.0" in drawn(status_of("hfedmoe", [client_of("a", device=DEVICE)]))
    assert "1.0 GiB of 16.0" not in drawn(status_of("hfedmoe", [client_of("a", device=DEVICE, memory_bytes=2 << 30)]))


@pytest.mark.parametrize("width", [60, 80, 100, 140])
@pytest.mark.parametrize("compared", [False, True])
def test_ten_clients_fit_a_terminal_of_24_lines(width, compared):
    comparison = Comparison(server_round=4, before=5.0, global_model=4.0) if compared else None
    clients = [client_of(f"client-{i}", i, device=DEVICE, comparison=comparison) for i in range(10)]
    text = drawn(status_of("hfedmoe", clients, rounds=9), width, 24).rstrip("\n")
    assert len(text.splitlines()) <= 24, text
    assert all(f"client-{i}" in text for i in range(10)), text
    assert text.count("2.000 -> 1.500") >= 12, text  # each client, and rounds


def test_names_of_devices_that_wrap_are_counted():
    device = msgspec.structs.replace(DEVICE, name="Intel(R) Xeon(R) Processor of this machine")
    clients = [client_of(f"client-{i}", i, device=device) for i in range(4)]
    for height in range(14, 40):
        text = drawn(status_of("hfedmoe", clients, rounds=3), 80, height).rstrip("\n")
        assert len(text.splitlines()) <= height, text


def test_of_a_hundred_clients_those_that_train_are_shown():
    clients = [client_of(f"idle-{i}", i, state="lost") for i in range(99)] + [client_of("busy", 99)]
    text = drawn(status_of("hfedmoe", clients, rounds=3), 80, 24)
    assert len(text.rstrip("\n").splitlines()) <= 24, text
    assert "busy" in text
    assert "more" in text


def test_names_are_not_read_as_markup():
    assert "[red]:boom:[/]" in drawn(status_of("hfedmoe", [client_of("[red]:boom:[/]")]))
