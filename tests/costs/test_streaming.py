"""Streamed experts: the memory and the time that the formulas predict, and when the search streams."""

from __future__ import annotations

import dataclasses

import pytest

from edgefed.costs.fallbacks import MAX_SLOWDOWN, fit, next_fallback
from edgefed.costs.memory import MemoryEstimate, training_memory
from edgefed.costs.price import LossPrice
from edgefed.costs.search import FallbackSearch
from edgefed.costs.shapes import KNOWN_SHAPES
from edgefed.costs.step_setup import StepPlan, StepSetup, describe
from edgefed.costs.streaming import StreamRates, slowdown, streamed_bytes
from edgefed.errors import BudgetTooSmall
from edgefed.expert_records import ExpertPlan

OLMOE = KNOWN_SHAPES["OLMoE-1B-7B"]
GIB = 2**30
ADAPTERS = StepSetup(1, 512, experts="lora", router="none", expert_storage="nf4", checkpointing=True, kernels="native")
STREAMED = dataclasses.replace(ADAPTERS, streamed_layers=16)
ALL = (64,) * 16


def needs(setup, resident=ALL, trainable=ALL, shape=OLMOE):
    return training_memory(shape, setup, resident, trainable)


def test_all_experts_of_olmoe_train_with_adapters_in_the_memory_of_one_layer():
    matrices = 1024 * 6291456  # 64 experts of 16 layers, three matrices of 2048 x 1024
    weights = matrices // 2 + matrices // 64 * 4
    assert streamed_bytes(OLMOE, STREAMED, ALL, ALL) == weights
    resident, streamed = needs(ADAPTERS), needs(STREAMED)
    assert resident.parts["trainable experts"] - weights == streamed.parts["trainable experts"], "the adapters"
    assert streamed.parts["resident experts"] == weights // 16
    gpu = dataclasses.replace(STREAMED, device="cuda")
    assert needs(gpu).parts["resident experts"] == 2 * weights // 16, "two buffers"
    for part in ("dense", "gradients", "optimizer", "activations", "logits"):
        assert resident.parts[part] == streamed.parts[part]


def test_layers_that_are_not_streamed_are_resident_as_before():
    matrices = 64 * 6291456
    layer = matrices // 2 + matrices // 64 * 4

    def experts(setup):
        parts = needs(setup).parts
        return parts["resident experts"] + parts["trainable experts"]

    for count in range(2, 17):
        some = dataclasses.replace(ADAPTERS, streamed_layers=count)
        assert sum(some.streams(ordinal, 16) for ordinal in range(16)) == count
        assert streamed_bytes(OLMOE, some, ALL, ALL) == count * layer
        assert experts(ADAPTERS) - experts(some) == (count - 1) * layer, "one layer of them is in memory"
        on_gpu = dataclasses.replace(some, device="cuda")
        assert experts(ADAPTERS) - experts(on_gpu) == (count - 2) * layer, "two buffers"
    four = dataclasses.replace(ADAPTERS, streamed_layers=4)
    assert [layer for layer in range(16) if four.streams(layer, 16)] == [3, 7, 11, 15], "reads beside three layers each"


def test_experts_that_train_in_full_stay():
    full = dataclasses.replace(ADAPTERS, experts="full")
    streamed = dataclasses.replace(full, streamed_layers=16)
    eight = (8,) * 16
    frozen = needs(full, ALL, eight).parts["resident experts"]
    assert streamed_bytes(OLMOE, streamed, ALL, eight) == frozen
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
    half = dataclasses.replace(STREAMED, streamed_layers=8)
    ratio = slowdown(OLMOE, half, ALL, ALL, slow) / slowdown(OLMOE, STREAMED, ALL, ALL, slow)
    assert ratio == pytest.approx((1 + 1 / 16) / (2 + 1 / 16), rel=1e-3), "half the bytes, and a layer ahead of them"
    two = dataclasses.replace(STREAMED, streamed_layers=2, device="cuda")
    assert slowdown(OLMOE, two, ALL, ALL, slow) == 1.0, "both stay in their buffers"


# --- the search -------------------------------------------------------------------------------------------------------

LAYERS, EXPERTS = 4, 16
WANTED = StepPlan(StepSetup(4, 128, dtype="float32", experts="lora", expert_storage="nf4"), 64, 64)


def layout_of(layers, experts):
    def share(total):
        return [total // layers + (layer < total % layers) for layer in range(layers)]

    def layout(resident, trainable):
        frozen = [range(low, high) for low, high in zip(share(trainable), share(resident), strict=True)]
        return ExpertPlan.of([experts] * layers, [range(count) for count in share(trainable)], frozen)

    return layout


def simple(setup, resident, trainable):
    """An expert takes 10, of which 9 stream and 1 stays, a third of both in NF4; each token takes 1."""
    streams = [setup.streams(layer, LAYERS) for layer in range(LAYERS)]
    near = sum(count for count, far in zip(resident, streams, strict=True) if not far)
    ahead = max((count for count, far in zip(resident, streams, strict=True) if far), default=0)
    experts = sum(resident) + 9 * (near + ahead)
    if setup.expert_storage == "nf4" and not WANTED.setup.expert_storage:
        experts //= 3
    parts = {"dense": 100, "experts": experts, "activations": setup.tokens}
    return MemoryEstimate(parts, {"step": sum(parts.values())})


def search(slower=1.0, **changes):
    problems = {name: "not here" for name in ("chunked_loss", "checkpointing", "adamw_8bit")}
    price = LossPrice.of(None, [EXPERTS] * LAYERS, 128)
    how = dict(
        estimate=simple, layout=layout_of(LAYERS, EXPERTS), price=price, num_layers=LAYERS, run_sequence_length=128,
        problems=problems,
    )  # fmt: skip
    return FallbackSearch(**{**how, "may_stream": True, "slowdown": lambda step_plan: slower, **changes})


def test_experts_stream_rather_than_leave_or_see_shorter_texts():
    whole = 100 + 640 + 512
    assert fit(search(), WANTED, whole) == (WANTED, []), "what fits is not streamed"
    found, (fallback,) = fit(search(), WANTED, whole - 1)
    assert fallback.name == "streamed experts"
    assert fallback.sentence.startswith("frozen experts of 2 of 4 layers streamed, a layer at a time")
    assert not fallback.keeps_plan
    assert found == streaming(2), "with one of them in memory, one makes room"
    assert "frozen experts of 2 layers streamed" in describe(found, 64)
    assert WANTED.rank() > found.rank() > streaming(3).rank()
    assert next_fallback(search(), WANTED).step_plan == found


def streaming(layers):
    return dataclasses.replace(WANTED, setup=dataclasses.replace(WANTED.setup, streamed_layers=layers))


def test_as_many_layers_are_streamed_as_the_memory_needs():
    layer, whole = 9 * 16, 100 + 640 + 512
    for more in (1, 2, 3):
        assert fit(search(), WANTED, whole - more * layer)[0] == streaming(more + 1)
        assert next_fallback(search(), WANTED, more * layer).step_plan == streaming(more + 1)
    assert next_fallback(search(), streaming(2), layer).step_plan == streaming(3), "a step further down"
    assert next_fallback(search(), streaming(4)).name == "shorter sequence"


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_device_of_12_gib_uses_its_memory(kind):
    """OLMoE with adapters in bfloat16: frozen experts take 12 GiB, of which most stay in memory."""
    setup = dataclasses.replace(ADAPTERS, expert_storage=None, chunked_loss=True, device=kind)
    olmoe = search(
        estimate=lambda *plan: training_memory(OLMOE, *plan), layout=layout_of(16, 64), num_layers=16,
        price=LossPrice.of(None, ALL, 512), run_sequence_length=512, problems={"nf4_experts": "expert_storage=full"},
    )  # fmt: skip
    found, _ = fit(olmoe, StepPlan(setup, 1024, 1024), 12 * GIB)
    assert (found.resident, found.setup.expert_storage, found.setup.sequence_length) == (1024, None, 512)
    assert 4 <= found.setup.streamed_layers < 12
    assert 0.9 * 12 * GIB < olmoe.needs_bytes(found) <= 12 * GIB


def test_a_step_that_takes_too_long_keeps_fewer_experts_instead():
    slow = search(slower=1.01 * MAX_SLOWDOWN)
    found, _ = fit(slow, WANTED, 700)
    assert not found.setup.streamed_layers
    assert found == fit(search(may_stream=False), WANTED, 700)[0]
    assert next_fallback(slow, WANTED).name == "shorter sequence"
    assert fit(search(slower=MAX_SLOWDOWN), WANTED, 700)[0].setup.streamed_layers == 4


def test_what_is_too_slow_to_stream_in_full_precision_is_streamed_in_nf4():
    wanted = dataclasses.replace(WANTED, setup=dataclasses.replace(WANTED.setup, expert_storage=None))
    problems = dict.fromkeys(("chunked_loss", "checkpointing", "adamw_8bit", "int8_experts"), "not here")
    by_storage = search(
        problems=problems, slowdown=lambda plan: 1.9 if plan.setup.expert_storage == "nf4" else 2.1,
        estimate=lambda setup, *counts: simple(dataclasses.replace(setup, expert_storage=None), *counts)
        if not setup.streamed_layers else simple(setup, *counts),
    )  # fmt: skip
    found, path = fit(by_storage, wanted, 900)
    assert (found.setup.expert_storage, found.resident, found.setup.sequence_length) == ("nf4", 64, 128)
    assert found.setup.streamed_layers
    assert {fallback.name for fallback in path} == {"streamed experts", "experts in NF4"}
    slower = dataclasses.replace(by_storage, slowdown=lambda plan: 8.0 if plan.setup.expert_storage == "nf4" else 9.0)
    assert not fit(slower, wanted, 900)[0].setup.streamed_layers
    found, _ = fit(dataclasses.replace(slower, all_experts=True), wanted, 700)
    assert found.setup.streamed_layers
    assert found.setup.expert_storage == "nf4", "the quicker of two that are too slow"


def test_a_method_that_needs_every_expert_streams_however_long_it_takes():
    slow = search(slower=100.0, all_experts=True)
    with pytest.raises(BudgetTooSmall):
        fit(dataclasses.replace(slow, may_stream=False), WANTED, 800)
    found, _ = fit(slow, WANTED, 800)
    assert found.setup.streamed_layers
    assert (found.resident, found.trainable) == (64, 64)
