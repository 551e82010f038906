"""The words of a comparison."""

from __future__ import annotations

import json
import math

import msgspec
import pytest

from edgefed.aggregator.creation import create_run
from edgefed.aggregator.rounds import RoundPolicy
from edgefed.aggregator.store import ClientRecord, Store
from edgefed.errors import StateCorrupt
from edgefed.protocol.comparison import Comparison, is_sound, overall_verdict, verdict
from edgefed.protocol.messages import RunConfig, TrainingConfig


@pytest.mark.parametrize(
    ("losses", "text"),
    [
        ({"before": 5.26, "global_model": 4.45, "device": 4.9, "alone": 4.87},
         "the global model is 0.42 nats better than training alone and 0.81 nats better than the model before the run; "
         "this device's model is 0.03 nats worse than training alone and 0.36 nats better than the model before the "
         "run."),
        ({"global_model": 4.45, "device": 4.276, "alone": 4.263},
         "this device's model is 0.01 nats worse than training alone; "
         "the global model is 0.19 nats worse than training alone."),
        ({"before": 5.26, "global_model": 4.45},
         "the global model is 0.81 nats better than the model before the run."),
        ({"before": 5.26, "before_round": 3, "global_model": 5.4},
         "the global model is 0.14 nats worse than the model before round 3."),
        ({"device": 4.263, "alone": 4.266}, "this device's model is as good as training alone."),
    ],
)  # fmt: skip
def test_the_verdict_is_honest_in_both_directions(losses, text):
    assert verdict(Comparison(server_round=6, **losses)) == f"On this device's text {text}"


def test_of_models_of_their_own_the_verdict_tells_of_right_answers():
    first = Comparison(server_round=4, device=0.9, accuracies={"device": 0.812, "alone": 0.71, "before": 0.1})
    second = Comparison(server_round=4, device=0.9, accuracies={"device": 0.6, "alone": 0.702, "before": 0.6})
    assert verdict(first) == (
        "This device's mixture answers 81.2 % of its held-out examples correctly: 10.2 points more than its model "
        "trained alone and 71.2 points more than its model before training."
    )
    assert "10.2 points fewer than its model trained alone and as many as its model before" in verdict(second)
    assert overall_verdict([first, second]) == (
        "The clients' mixtures answer on average 70.6 % of their held-out examples correctly: as many as their models "
        "trained alone (better for 1 of 2) and 35.6 points more than their models before training (better for 1 of 2)."
    )


def test_the_verdict_over_clients_counts_those_that_it_is_true_for():
    first = Comparison(server_round=6, before=5.0, global_model=4.0, alone=4.5)
    second = Comparison(server_round=6, before=3.0, global_model=3.1, alone=3.2)
    assert overall_verdict([first, second]) == (
        "On the clients' own texts the global model is on average 0.30 nats better than training alone (better for 2 "
        "of 2) and 0.45 nats better than the model before the run (better for 1 of 2)."
    )
    unknown = Comparison(server_round=6, before=3.0, global_model=3.1)
    assert "training alone" not in overall_verdict([first, unknown])
    assert overall_verdict([Comparison(server_round=6, before=1.0, skipped="13 GiB to download")]) == ""


def test_comparisons_are_read_from_a_run_and_from_a_device(tmp_path):
    import edgefed

    found = Comparison(server_round=3, before=5.0, global_model=4.0)
    run = RunConfig(
        run_id="r", model="m", method="fedavg", method_options={}, rounds=2, seed=0, training=TrainingConfig()
    )  # fmt: skip
    create_run(tmp_path / "run", run, RoundPolicy(rounds=2, min_clients=1), [], [])
    assert edgefed.comparisons(tmp_path / "run") == {}
    store = Store(tmp_path / "run")
    record = {"key_sha256": "", "memory_bytes": 1, "expert_share": 1.0, "compute_share": 1.0, "num_examples": 1}
    store.save_clients([
        ClientRecord(client_id="a", name="kitchen", comparison=found, **record),
        ClientRecord(client_id="b", name="vm", **record),
    ])  # fmt: skip
    store.close()
    assert edgefed.comparisons(tmp_path / "run") == {"kitchen": found}
    assert edgefed.comparisons(tmp_path) == {}
    record = {"run_id": "r", "comparison": msgspec.to_builtins(found), "rounds": 2, "finished": True}
    (tmp_path / "comparison.json").write_text(json.dumps(record))
    assert edgefed.comparisons(tmp_path) == {"this device": found}
    (tmp_path / "comparison.json").write_text("{")
    with pytest.raises(StateCorrupt, match="comparison.json is damaged"):
        edgefed.comparisons(tmp_path)


def test_there_is_no_verdict_without_two_models():
    assert verdict(Comparison(server_round=6, before=1.0, alone=2.0)) == ""
    assert verdict(Comparison(server_round=6, global_model=1.0)) == ""


@pytest.mark.parametrize(
    "wrong",
    [
        {"before": math.inf},
        {"alone": -0.1},
        {"num_tokens": -1},
        {"accuracies": {"device": 1.1}},
        {"accuracies": {"x": 0.5}},
        {"accuracies": {"alone": math.nan}},
        {"skipped": "x" * 201},
        {"skipped": "\x1b[31m"},
    ],
)
def test_a_comparison_from_the_network_has_possible_values(wrong):
    assert is_sound(Comparison(server_round=1, before=2.0))
    assert not is_sound(Comparison(server_round=1, **wrong))
