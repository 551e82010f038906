"""Streamed experts: the memory and the time that the formulas predict, and when the search streams."""

from __future__ import annotations

import dataclasses

import pytest

from edgefed.costs.fallbacks import MAX_SLOWDOWN, FallbackSearch, fit, next_fallback
from edgefed.costs.memory import MemoryEstimate, training_memory
from edgefed.costs.price import LossPrice
from edgefed.costs.shapes import KNOWN_SHAPES
from edgefed.costs.step_setup import StepPlan, StepSetup, describe
from edgefed.costs.streaming import StreamRates, slowdown, streamed_bytes
from edgefed.errors import BudgetTooSmall
from edgefed.expert_records import ExpertPlan

OLMOE = KNOWN_SHAPES["OLMoE-1B-7B"]
GIB = 2**30
ADAPTERS = StepSetup(1, 512, experts="lora", router="none", expert_storage="nf4", checkpointing=True, kernels="native")
STREAMED = dataclasses.replace(ADAPTERS, streamed=True)
ALL = (64,) * 16


def needs(setup, resident=ALL, trainable=ALL, shape=OLMOE):
    return training_memory(shape, setup, resident, trainable)


def test_all_experts_of_olmoe_train_with_adapters_in_the_memory_of_one_layer():
    matrices = 1024 * 6291456  # 64 experts of 16 layers, three matrices of 2048 x 1024
    weights = matrices // 2 + matrices // 64 * 4
    assert streamed_bytes(OLMOE, ADAPTERS, ALL, ALL) == weights
    resident, streamed = needs(ADAPTERS), needs(STREAMED)
    assert resident.parts["trainable experts"] - weights == streamed.parts["trainable experts"], "the adapters"
    assert streamed.parts["resident experts"] == weights // 16
    gpu = dataclasses.replace(STREAMED, device="cuda")
    assert needs(gpu).parts["resident experts"] == 2 * weights // 16, "two buffers"
    for part in ("dense", "gradients", "optimizer", "activations", "logits"):
        assert resident.parts[part] == streamed.parts[part]


def test_experts_that_train_in_full_stay():
    full = dataclasses.replace(ADAPTERS, experts="full")
    streamed = dataclasses.replace(full, streamed=True)
    eight = (8,) * 16
    frozen = needs(full, ALL, eight).parts["resident experts"]
    assert streamed_bytes(OLMOE, full, ALL, eight) == frozen
    assert needs(streamed, ALL, eight).parts["trainable experts"] == needs(full, ALL, eight).parts["trainable experts"]
    assert needs(streamed, ALL, eight).parts["resident experts"] == frozen // 16
    assert needs(streamed, eight, eight).total_bytes == needs(full, eight, eight).total_bytes, "nothing is frozen"


def test_a_step_takes_as_long_as_its_reads_where_these_are_slower():
    read = 2 * streamed_bytes(OLMOE, STREAMED, ALL, ALL)
    fast = StreamRates(1e11, 1e10, 1e15)
    assert slowdown(OLMOE, STREAMED, ALL, ALL, fast) == pytest.approx(1.0, abs=1e-3)
    slow = dataclasses.replace(fast, stream_bytes_per_s=1e7)
    halved = dataclasses.replace(slow, stream_bytes_per_s=5e6)
    assert slowdown(OLMOE, STREAMED, ALL, ALL, halved) == pytest.approx(2 * slowdown(OLMOE, STREAMED, ALL, ALL, slow))
    quick = dataclasses.replace(slow, flops_per_s=1e30, memory_bytes_per_s=1e30)
    assert slowdown(OLMOE, STREAMED, ALL, ALL, quick) > 1e3 * read / 1e7


# --- the search -------------------------------------------------------------------------------------------------------

LAYERS, EXPERTS = 4, 16
WANTED = StepPlan(StepSetup(4, 128, dtype="float32", experts="lora", expert_storage="nf4"), 64, 64)


def layout(resident, trainable):
    share = lambda total: [total // LAYERS + (layer < total % LAYERS) for layer in range(LAYERS)]  # noqa: E731
    return ExpertPlan.of(
        [EXPERTS] * LAYERS,
        [range(count) for count in share(trainable)],
        [range(low, high) for low, high in zip(share(trainable), share(resident), strict=True)],
    )


def simple(setup, resident, trainable):
    """An expert takes 10, of which 9 stream and 1 stays; each token takes 1."""
    experts = sum(resident) + 9 * max(resident) if setup.streamed else 10 * sum(resident)
    parts = {"dense": 100, "experts": experts, "activations": setup.tokens}
    return MemoryEstimate(parts, {"step": sum(parts.values())})


def search(slower=1.0, **changes):
    problems = {name: "not here" for name in ("chunked_loss", "checkpointing", "adamw_8bit")}
    price = LossPrice.of(None, [EXPERTS] * LAYERS, 128)
    how = dict(
        estimate=simple, layout=layout, price=price, num_layers=LAYERS, run_sequence_length=128, problems=problems
    )  # fmt: skip
    return FallbackSearch(**{**how, "may_stream": True, "slowdown": lambda step_plan: slower, **changes})


def test_experts_stream_rather_than_leave_or_see_shorter_texts():
    whole = 100 + 640 + 512
    assert fit(search(), WANTED, whole) == (WANTED, []), "what fits is not streamed"
    found, (fallback,) = fit(search(), WANTED, whole - 1)
    assert fallback.name == "streamed experts"
    assert not fallback.keeps_plan
    assert found == dataclasses.replace(WANTED, setup=dataclasses.replace(WANTED.setup, streamed=True))
    assert "frozen experts streamed" in describe(found, 64)
    assert WANTED.rank() > found.rank()
    assert next_fallback(search(), WANTED).step_plan == found
    assert next_fallback(search(), found).name == "shorter sequence"


def test_a_step_that_takes_too_long_keeps_fewer_experts_instead():
    slow = search(slower=1.01 * MAX_SLOWDOWN)
    found, _ = fit(slow, WANTED, 700)
    assert not found.setup.streamed
    assert found == fit(search(may_stream=False), WANTED, 700)[0]
    assert next_fallback(slow, WANTED).name == "shorter sequence"
    assert fit(search(slower=MAX_SLOWDOWN), WANTED, 700)[0].setup.streamed


def test_a_method_that_needs_every_expert_streams_however_long_it_takes():
    slow = search(slower=100.0, all_experts=True)
    with pytest.raises(BudgetTooSmall):
        fit(dataclasses.replace(slow, may_stream=False), WANTED, 800)
    found, _ = fit(slow, WANTED, 800)
    assert found.setup.streamed
    assert (found.resident, found.trainable) == (64, 64)
