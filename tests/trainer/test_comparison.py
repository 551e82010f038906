"""What a device knows of a run's worth: the whole model before and after, its own part, and training alone."""

from __future__ import annotations

import pytest
from device_bench import STEPS, GivenMemory, trainer_of

from edgefed.progress import NullProgress
from edgefed.trainer.comparison import ComparingTrainer
from edgefed.training.encoding import encode_examples
from edgefed.training.loss import evaluate_loss
from edgefed.training.profiling import spread_blocks
from edgefed.training.user_functions import NONE, UserFunctions


class Messages(NullProgress):
    def __init__(self):
        self.messages = []

    def message(self, text):
        self.messages.append(text)


def comparing(data, tmp_path, functions=NONE, **options):
    trainer = trainer_of(data, tmp_path, share=0.25, functions=functions)
    return ComparingTrainer(trainer, tmp_path / "a", **options)


def whole_loss(data, tmp_path):
    """The held-out loss of the packaged model, with transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from edgefed.embedded import tiny_model_directory

    module = AutoModelForCausalLM.from_pretrained(tiny_model_directory())
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_directory())
    held_out = trainer_of(data, tmp_path, name="reference").corpus.held_out
    blocks = spread_blocks(encode_examples(held_out, tokenizer, 64), 256)
    return evaluate_loss(module, blocks, 2), blocks.num_tokens


@pytest.mark.parametrize("memory_bytes", [1 << 40, 1], ids=["all experts in memory", "one expert at a time"])
def test_the_whole_model_is_evaluated_whatever_memory_there_is(bench, data, tmp_path, memory_bytes):
    table = bench("hfedmoe")
    trainer = trainer_of(data, tmp_path, memory=GivenMemory(memory_bytes))
    loss, tokens = trainer.evaluate_whole(table.reader.run, table.reader.manifest(), table.fetch, NullProgress())
    expected, expected_tokens = whole_loss(data, tmp_path)
    assert loss == pytest.approx(expected, rel=1e-4)
    assert tokens == expected_tokens


def test_a_run_of_one_device_equals_training_alone(bench, data, tmp_path):
    """The sibling makes the same steps from the same model with the same experts: nothing of the run leaks into it."""
    table = bench("hfedmoe", {"exploration": 0.0}, rounds=1)
    device = comparing(data, tmp_path, compare_alone=True)
    manifest, update = table.round(device, tmp_path / "update")
    assert {unit.sha256 for unit in manifest.units} <= update.keep
    device.between_rounds(table.fetch, NullProgress())
    progress = Messages()
    found = device.compare(table.reader.run, manifest, table.fetch, progress)
    expected, tokens = whole_loss(data, tmp_path)
    assert found.before == found.global_model == pytest.approx(expected, rel=1e-4)  # nothing was aggregated here
    assert found.num_tokens == tokens
    assert found.device == update.metrics["held_out_loss_after"]
    assert found.alone < update.metrics["held_out_loss_before"]
    assert found.alone == pytest.approx(found.device, rel=0.1)
    assert any(f"1 round of {STEPS} steps" in text for text in progress.messages)


def test_training_alone_is_evaluated_whenever_the_run_is_and_without_the_users_callbacks(bench, data, tmp_path):
    called = []
    functions = UserFunctions(
        on_step=lambda *step: called.append(step[:2]), evaluate=lambda module: called.append("evaluate") or {}
    )
    table = bench("hfedmoe", {"exploration": 0.0}, rounds=3, evaluate_every=2)
    device = comparing(data, tmp_path, functions, compare_alone=True)
    for server_round in (2, 3):  # the first one that it takes part in is not evaluated
        manifest, update = table.round(device, tmp_path / "update", server_round)
    found = device.compare(table.reader.run, manifest, table.fetch, NullProgress())
    assert found.device == update.metrics["held_out_loss_after"]
    assert found.alone < found.device  # nothing was aggregated: the round began anew, training alone went on
    steps = [(server_round, step) for server_round in (2, 3) for step in range(1, STEPS + 1)]
    assert [call for call in called if call != "evaluate"] == steps
    assert called.count("evaluate") <= 2


def test_a_round_without_evaluation_keeps_the_loss_of_the_last_one_with(bench, data, tmp_path):
    table = bench("hfedmoe", rounds=4, evaluate_every=2)
    device = comparing(data, tmp_path)
    losses = [
        table.round(device, tmp_path / "update", server_round)[1].metrics.get("held_out_loss_after")
        for server_round in (1, 2)
    ]
    found = device.compare(table.reader.run, table.reader.manifest(), table.fetch, NullProgress(), "ended early")
    assert losses[1] is None
    assert found.device == losses[0]


def test_the_comparison_survives_a_restart_and_is_made_once(bench, data, tmp_path):
    table = bench("local")  # its own weights stay in the model: the first evaluation must come before
    device = comparing(data, tmp_path)
    manifest, _ = table.round(device, tmp_path / "update")
    device.between_rounds(table.fetch, NullProgress())
    again = comparing(data, tmp_path)
    found = again.compare(table.reader.run, manifest, table.fetch, NullProgress())
    assert None not in (found.before, found.global_model, found.device)
    assert found.alone is None
    assert (
        comparing(data, tmp_path).compare(table.reader.run, manifest, table.fetch, NullProgress(), "asked twice")
        == found
    )


def on_disk(table, kept):
    """A fetch that downloads nothing: what the device was not asked to keep is gone."""

    def fetch(items):
        assert {item.sha256 for item in items} <= kept
        return table.fetch(items)

    return fetch


def test_what_is_not_downloaded_is_not_evaluated_and_said(bench, data, tmp_path):
    table = bench("random")
    device = comparing(data, tmp_path, compare_alone=True)
    manifest, update = table.round(device, tmp_path / "update")
    device.between_rounds(table.fetch, NullProgress())
    found = device.compare(
        table.reader.run, manifest, on_disk(table, update.keep), NullProgress(), "13 GiB to download"
    )
    assert (found.global_model, found.skipped) == (None, "13 GiB to download")
    assert None not in (found.before, found.device, found.alone)


def test_a_device_that_never_trained_compares_nothing(bench, data, tmp_path):
    table = bench("hfedmoe")
    device = comparing(data, tmp_path)
    assert device.compare(table.reader.run, table.reader.manifest(), table.fetch, NullProgress()) is None
    never = comparing(data, tmp_path, evaluation="never")
    table.fetched.clear()
    table.round(never, tmp_path / "update")
    never.between_rounds(table.fetch, NullProgress())
    assert never.compare(table.reader.run, table.reader.manifest(), table.fetch, NullProgress(), "asked").before is None
