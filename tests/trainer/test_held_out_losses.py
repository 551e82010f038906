"""Evaluations around training: how much text they take, and which are not repeated."""

import json
from collections import Counter

import msgspec
import pytest
import torch

from edgefed.aggregator.blobs import BlobStore
from edgefed.aggregator.rounds import RoundPolicy
from edgefed.embedded import tiny_model_directory
from edgefed.expert_records import ActivationProfile, ExpertPlan
from edgefed.progress import NullProgress
from edgefed.protocol.messages import Assignment, RunConfig, TrainingConfig
from edgefed.runs import RunReader, import_model
from edgefed.trainer import reports
from edgefed.trainer.evaluation import held_out_sample
from edgefed.trainer.local_trainer import LocalTrainer
from edgefed.trainer.planner import DeviceLimits
from edgefed.trainer.ports import FormulaCosts, ProcessMemory
from edgefed.training.encoding import TokenBlocks
from edgefed.training.steps import StepsOutcome

TRAINING = TrainingConfig(local_steps=2, batch_size=2, sequence_length=32, profile_tokens=512)


def blocks_of(count, length=128):
    ids = torch.arange(count).unsqueeze(1).expand(count, length)
    return TokenBlocks(ids, ids)


def tokens(training, count, length=128):
    return held_out_sample(blocks_of(count, length), training).num_tokens


def test_an_evaluation_is_a_share_of_what_a_round_trains_on():
    round_tokens = 100 * 8 * 128
    training = TrainingConfig(local_steps=100)
    assert tokens(training, 1000) == 4096  # evaluation_tokens
    assert tokens(msgspec.structs.replace(training, evaluation_tokens=0), 1000) == 0.05 * round_tokens
    assert tokens(msgspec.structs.replace(training, evaluation_share=0.02), 1000) == 0.02 * round_tokens
    assert tokens(msgspec.structs.replace(training, evaluation_share=1.0, evaluation_tokens=0), 1000) == 1000 * 128
    assert tokens(TrainingConfig(), 1000) == 1024


def test_an_evaluation_has_a_batch_and_no_more_than_there_is():
    assert tokens(TrainingConfig(local_steps=1), 1000) == 8 * 128
    assert tokens(TrainingConfig(local_steps=1), 3) == 3 * 128
    assert tokens(TrainingConfig(local_steps=1, batch_size=1, evaluation_tokens=64), 3) == 128  # a block is whole


def test_a_sample_is_spread_over_the_text():
    rows = held_out_sample(blocks_of(1000), TrainingConfig()).input_ids[:, 0].tolist()
    assert rows == sorted(rows)
    assert rows[0] == 0
    assert rows[-1] == 999


class Counted(NullProgress):
    def __init__(self):
        self.evaluations = []
        self.messages = []

    def phase(self, name, total=None, unit="B"):
        if name == "evaluate":
            self.evaluations.append(total)

    def message(self, text):
        if text.startswith("evaluation:"):
            self.messages.append(text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluations")
    lines = [{"text": f"def function_{i}(argument):\n    return argument + {i}\n" * 8} for i in range(60)]
    (folder / "notes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


class Device:
    """A trainer with a run of its own, whose global model never changes."""

    def __init__(self, folder, state, method, training=TRAINING, **ports):
        self.run = RunConfig(
            run_id="run", model="tiny", method=method, method_options={}, rounds=9, seed=3, training=training
        )
        if not (folder / method).exists():
            import_model(str(tiny_model_directory()), folder / method, self.run, RoundPolicy(rounds=9, min_clients=1))
        self._blobs, self._state = BlobStore(folder / method), state
        with RunReader(folder / method) as reader:
            self._manifest = reader.manifest()
        memory, limits = ProcessMemory(4 << 30), DeviceLimits(expert_share=0.5)
        self.trainer = LocalTrainer(
            str(folder / "notes.jsonl"), state, limits, "me", memory, held_out_share=0.5, **ports
        )

    def train(self, server_round):
        """(metrics, evaluations, messages) of a round."""
        progress = Counted()
        manifest = msgspec.structs.replace(self._manifest, server_round=server_round)
        update = self.trainer.train_round(
            self.run, manifest, Assignment(server_round=server_round, deadline_s=None, seed=0),
            lambda items: {item.sha256: self._blobs.path(item.sha256) for item in items}, progress,
            self._state / "update",
        )  # fmt: skip
        return update.metrics, progress.evaluations, progress.messages


REUSED = "evaluation: the weights are as in an earlier evaluation, whose loss is used"


def test_weights_that_stay_on_the_device_are_evaluated_once(folder, tmp_path):
    device = Device(folder, tmp_path, "local")
    first, evaluations, messages = device.train(1)
    assert evaluations == [64, 64]
    assert messages[0].startswith("evaluation: 64 of ")
    assert messages[0].endswith("held-out tokens, at most 5 % of what a round trains on, or one batch")
    second, evaluations, messages = device.train(2)
    assert evaluations == [64]
    assert messages == [REUSED]
    assert second["held_out_loss_before"] == first["held_out_loss_after"]
    assert second["held_out_loss_after"] != first["held_out_loss_after"]


def test_a_global_model_that_did_not_change_is_evaluated_once(folder, tmp_path):
    """Nothing was aggregated: the device begins a second time with the weights that it evaluated."""
    device = Device(folder, tmp_path / "a", "random")
    first, evaluations, _ = device.train(1)
    assert len(evaluations) == 2
    second, evaluations, messages = device.train(2)
    assert len(evaluations) == 1
    assert messages == [REUSED]
    assert second["held_out_loss_before"] == first["held_out_loss_before"]


def test_other_experts_are_evaluated(folder, tmp_path):
    device = Device(folder, tmp_path, "hfedmoe")  # draws experts anew in each round
    first, evaluations, _ = device.train(1)
    second, again, messages = device.train(2)
    assert len(evaluations) == len(again) == 2
    assert messages == []
    assert second["held_out_loss_before"] != first["held_out_loss_before"]


class ThreeSeconds(FormulaCosts):
    def step_seconds(self, setup, plan):
        return 3.0


def test_evaluations_and_steps_follow_the_settings_of_the_run(folder, tmp_path):
    training = msgspec.structs.replace(TRAINING, evaluate_every=2, round_seconds=7.0, local_steps=4)
    device = Device(folder, tmp_path, "random", training, costs=ThreeSeconds(measures_steps=False))
    losses = ("held_out_loss_before", "held_out_loss_after")
    for server_round, evaluated in ((1, True), (2, False), (9, True)):
        metrics, evaluations, _ = device.train(server_round)
        assert [name in metrics for name in losses] == [evaluated] * 2
        assert bool(evaluations) is evaluated
        assert metrics["train_steps"] == 2


def test_many_experts_without_load_are_reported():
    plan = ExpertPlan.full([8, 8])
    record = ActivationProfile(())

    def note(starved):
        outcome = StepsOutcome(1.0, 1, 100, 1.0, Counter(), record, 0, starved_experts=starved)
        return reports.starved_note(plan, outcome)

    assert note(0) == note(4) == ""
    assert note(5).startswith("experts: 5 of 16 resident experts got less than a tenth of an even load.")
    assert "`balancing`" in note(5)
