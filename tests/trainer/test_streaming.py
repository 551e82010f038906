"""A device with too little memory streams its frozen experts, and sends what a device with enough memory sends."""

from __future__ import annotations

import pytest
import torch
from device_bench import OnlyWith, trainer_of
from transformers import AutoConfig

from edgefed.bench.planning import planned_kernels
from edgefed.costs.memory import training_memory
from edgefed.costs.step_setup import StepSetup
from edgefed.costs.streaming import StreamRates
from edgefed.disk import filesystem
from edgefed.embedded import tiny_model_directory
from edgefed.errors import BudgetTooSmall, ConfigError
from edgefed.moe.model_shape import shape_from_config
from edgefed.trainer import placement
from edgefed.trainer.ports import FixedMemory, FormulaCosts
from edgefed.trainer.stream_rates import measure_stream_rates

FAST, SLOW = StreamRates(1e9, 1e9, 1e12), StreamRates(1e12, 1e12, 1e3)


@pytest.fixture(autouse=True)
def on_a_disk(tmp_path):
    if filesystem(tmp_path) in ("tmpfs", "ramfs"):
        pytest.skip("tests write to memory here (tmpfs): nothing can be streamed from it")


class Streaming(FormulaCosts):
    """The formulas alone, with rates that are given."""

    def __init__(self, rates):
        super().__init__(measures_steps=False)
        self.stream_rates = lambda setup, stream_bytes, own_bytes: rates


def needs(training, **how):
    config = AutoConfig.from_pretrained(tiny_model_directory())
    setup = StepSetup(
        training.batch_size, training.sequence_length, "float32", experts=training.experts, router=training.router,
        lora_rank=training.lora_rank, kernels=planned_kernels("cpu", torch.float32), chunked_loss=True,
        checkpointing=True, **how,
    )  # fmt: skip
    return training_memory(shape_from_config(config), setup, 999, 999).total_bytes


def poor(table, data, tmp_path, costs=None, name="poor", **limits):
    """A device whose memory is between what streamed and what resident experts in NF4 need."""
    training = table.reader.run.training
    streamed = needs(training, expert_storage="nf4", streamed_layers=4)
    resident = needs(training, expert_storage="nf4")
    assert streamed < 0.9 * resident
    memory = FixedMemory((streamed + resident) // 2)
    return trainer_of(data, tmp_path, memory=memory, name=name, costs=costs or Streaming(FAST), **limits)


ADAPTERS = dict(experts="lora", lora_rank=2, batch_size=1, sequence_length=32)


def test_a_device_that_streams_sends_what_one_with_enough_memory_sends(bench, data, tmp_path):
    table = bench("fmq", rounds=2, **ADAPTERS)
    device = poor(table, data, tmp_path)
    table.round(device, tmp_path / "update")
    step_plan = device.planner.step_plan
    assert step_plan.setup.streamed_layers
    assert device.model.streamed_layers
    assert step_plan.resident == step_plan.trainable == 64
    assert not list((tmp_path / "poor" / placement.OFFLOAD_FOLDER).iterdir()), "no file has a name, though in use"

    savings = {name: True for name in ("chunked_loss", "checkpointing") if getattr(step_plan.setup, name)}
    rich = trainer_of(data, tmp_path, name="poor", folder="rich", costs=OnlyWith(**savings))  # the same draws
    table.round(rich, tmp_path / "expected")
    assert not rich.model.streamed_layers
    assert (tmp_path / "update").read_bytes() == (tmp_path / "expected").read_bytes()

    again = trainer_of(
        data, tmp_path, memory=FixedMemory(device.planner.needs_bytes), name="poor", costs=Streaming(FAST)
    )
    table.round(again, tmp_path / "update-2", server_round=2)  # a restart remembers
    assert again.planner.step_plan == step_plan
    assert again.model.streamed_layers


def test_a_slow_disk_leaves_fewer_experts_unless_the_owner_wants_them_all(bench, data, tmp_path):
    table = bench("random", local_steps=1, **ADAPTERS)
    slow = poor(table, data, tmp_path, Streaming(SLOW), "slow", expert_storage="nf4")
    table.round(slow, tmp_path / "update")
    assert not slow.planner.step_plan.setup.streamed_layers
    assert slow.planner.step_plan.resident < 64
    always = poor(table, data, tmp_path, Streaming(SLOW), "always", expert_storage="nf4", stream_experts="always")
    table.round(always, tmp_path / "update")
    assert always.planner.step_plan.setup.streamed_layers
    assert always.planner.step_plan.resident == 64


@pytest.mark.full
def test_a_device_with_slices_streams_them(bench, data, tmp_path):
    table = bench("slices", local_steps=1, **ADAPTERS)
    device = poor(table, data, tmp_path, stream_experts="always")
    table.round(device, tmp_path / "update")
    step_plan = device.planner.step_plan
    assert device.model.streamed_layers == step_plan.setup.streamed_layers > 0
    assert device.model.plan.neurons


def test_an_owner_can_forbid_it(bench, data, tmp_path):
    table = bench("fmq", local_steps=1, **ADAPTERS)
    with pytest.raises(BudgetTooSmall, match="all 64 experts needs"):
        table.round(poor(table, data, tmp_path, stream_experts="never"), tmp_path / "update")
    wrong = trainer_of(data, tmp_path, name="wrong", stream_experts="sometimes")
    with pytest.raises(ConfigError, match="invalid `stream_experts` 'sometimes', expected one of auto, always, never"):
        table.round(wrong, tmp_path / "update")


def test_the_rates_of_this_machine_are_measured(tmp_path):
    rates = measure_stream_rates(tmp_path / "not-there-yet", "cpu", "float32", cached=False)
    assert rates.flops_per_s > 1e8
    assert rates.memory_bytes_per_s > 1e7
    assert rates.stream_bytes_per_s > 1e6
    assert not list(tmp_path.iterdir()), "no file is left, and no folder made"
    assert FormulaCosts(stream_folder=tmp_path).stream_rates is not None
    assert FormulaCosts().stream_rates is None
