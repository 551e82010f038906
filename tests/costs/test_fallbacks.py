"""The search of savings, by hand and by property: its order, its end, and that what it finds does fit."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgefed.costs.fallbacks import fit, next_fallback
from edgefed.costs.memory import MemoryEstimate, training_memory
from edgefed.costs.price import LossPrice
from edgefed.costs.search import SHORTEST_SEQUENCE, FallbackSearch
from edgefed.costs.shapes import KNOWN_SHAPES
from edgefed.costs.step_setup import StepPlan, StepSetup, describe
from edgefed.errors import BudgetTooSmall
from edgefed.expert_records import ExpertPlan

LAYERS, EXPERTS = 4, 16
WANTED = StepPlan(StepSetup(4, 128, dtype="float32"), LAYERS * EXPERTS, LAYERS * EXPERTS)


def layout(resident, trainable):
    """The same number of experts in each layer, as far as it goes; the trainable ones come first."""
    share = lambda total: [total // LAYERS + (layer < total % LAYERS) for layer in range(LAYERS)]  # noqa: E731
    return ExpertPlan.of(
        [EXPERTS] * LAYERS,
        [range(count) for count in share(trainable)],
        [range(low, high) for low, high in zip(share(trainable), share(resident), strict=True)],
    )


def simple(setup, kept, trainable):
    """Bytes in round numbers: an expert 10, three times as much more if it trains, halved by 8 bit; the rest a step."""
    training = 30 if setup.experts == "full" else 2
    parts = {
        "dense": 1000,
        "experts": 10 * sum(kept) + training * sum(trainable) // (2 if setup.optimizer != "adamw" else 1),
        "activations": setup.tokens // (8 if setup.checkpointing else 1),
        "logits": setup.tokens // (4 if setup.chunked_loss else 1),
    }
    return MemoryEstimate(parts, {"step": sum(parts.values())})


def search(**changes):
    """By default no expert can be quantized: `simple` counts nothing for it."""
    given = {
        "estimate": simple, "layout": layout, "price": LossPrice.of(None, [EXPERTS] * LAYERS, 128),
        "num_layers": LAYERS, "run_sequence_length": 128, "problems": {"nf4_experts": "told so"},
    }  # fmt: skip
    return FallbackSearch(**{**given, **changes})


FULL = search().needs_bytes(WANTED)  # 1000 + 64 * 40 + 512 + 512


def test_a_smaller_rank_is_taken_where_more_experts_make_up_for_it():
    """What an adapter takes grows with its rank, here to more than its expert; a rank costs less than experts."""

    def adapters(setup, kept, trainable):
        parts = simple(setup, kept, trainable).parts | {"adapters": setup.lora_rank * sum(trainable)}
        return MemoryEstimate(parts, {"step": sum(parts.values())})

    price = LossPrice.of(None, [EXPERTS] * LAYERS, 128, lora_rank=32)
    wanted = dataclasses.replace(WANTED, setup=dataclasses.replace(WANTED.setup, experts="lora", lora_rank=32))
    given = search(estimate=adapters, price=price, smaller_ranks=(16, 8))
    full = given.needs_bytes(wanted)
    assert fit(given, wanted, full) == (wanted, [])
    plan, path = fit(given, wanted, full - 1500)
    assert (plan.setup.lora_rank, plan.resident, plan.trainable) == (16, 64, 64)
    assert path[0].sentence == "adapters of rank 16 instead of 32 (saves 1.0 KiB)"
    assert not any(fallback.keeps_plan for fallback in path[:1])
    alone, _ = fit(dataclasses.replace(given, smaller_ranks=()), wanted, full - 1500)
    assert alone.setup.lora_rank == 32
    assert alone.trainable < 64
    assert given.cost(plan) < given.cost(alone)
    with pytest.raises(BudgetTooSmall):
        fit(given, wanted, 1000)
    fallback = next_fallback(given, wanted, 1500)
    assert fallback.step_plan.setup.lora_rank == 32, "in the middle of a round the rank stays"


def test_what_fits_stays_as_it_is():
    assert FULL == 4584
    assert fit(search(), WANTED, FULL) == (WANTED, [])


@pytest.mark.parametrize(
    ("usable", "names"),
    [
        (FULL - 1, ["chunked loss"]),  # saves 384
        (FULL - 385, ["chunked loss", "checkpointing"]),  # 448 more
        (FULL - 385 - 448, ["chunked loss", "checkpointing", "8-bit optimizer"]),  # 960 more
    ],
)
def test_fallbacks_are_taken_in_the_stated_order(usable, names):
    step_plan, fallbacks = fit(search(), WANTED, usable)
    assert [fallback.name for fallback in fallbacks] == names
    assert search().needs_bytes(step_plan) <= usable
    assert (step_plan.resident, step_plan.trainable) == (64, 64)
    assert all(
        fallback.keeps_plan and fallback.saved_bytes > 0 and "(saves " in fallback.sentence for fallback in fallbacks
    )
    assert fallbacks[-1].step_plan == step_plan
    assert sum(fallback.saved_bytes for fallback in fallbacks) == FULL - search().needs_bytes(step_plan)


def test_savings_that_are_not_there_are_passed_over():
    without = search(
        problems={"nf4_experts": "told so", "adamw_8bit": "bitsandbytes is not installed", "chunked_loss": "more terms"}
    )
    step_plan, fallbacks = fit(without, WANTED, FULL - 449)
    assert [fallback.name for fallback in fallbacks] == ["checkpointing", "fewer trainable"]
    assert step_plan.setup.optimizer == "adamw"
    assert not step_plan.setup.chunked_loss


def test_a_rung_that_helps_nothing_is_not_taken():
    """Where the optimizer is the peak, neither the loss nor the activations are."""

    def peak(setup, kept, trainable):
        static = 1000 + 10 * sum(kept)
        phases = {"loss": static + setup.tokens, "optimizer": static + 100 * sum(trainable)}
        return MemoryEstimate({"all": max(phases.values())}, phases)

    step_plan, fallbacks = fit(search(estimate=peak), WANTED, 1000 + 640 + 6399)
    assert [fallback.name for fallback in fallbacks] == ["fewer trainable"]
    assert step_plan.setup == WANTED.setup
    assert step_plan.resident == 64
    assert step_plan.trainable == 63
    assert next_fallback(search(estimate=peak), WANTED).name == "fewer trainable"


def test_less_memory_costs_more_expected_loss_down_to_one_expert_a_layer():
    least_setup = dataclasses.replace(
        WANTED.setup, chunked_loss=True, checkpointing=True, optimizer="adamw_8bit", sequence_length=32
    )
    costs, seen = [], []
    for usable in range(2600, 1180, -60):
        step_plan, _ = fit(search(), WANTED, usable)
        seen.append((step_plan.resident, step_plan.trainable))
        costs.append(search().cost(step_plan))
        assert search().needs_bytes(step_plan) <= usable
        assert step_plan.resident >= step_plan.trainable >= LAYERS
    assert all(less >= more / 1.02 for more, less in zip(costs, costs[1:], strict=False))
    assert seen[-1][0] < 12
    assert any(resident == 64 > trainable for resident, trainable in seen), "freezing is cheaper than leaving out"
    least = search().needs_bytes(StepPlan(least_setup, LAYERS, LAYERS))
    assert fit(search(), WANTED, least)[0] == StepPlan(least_setup, LAYERS, LAYERS)
    with pytest.raises(BudgetTooSmall, match=r"one expert in each of the 4 MoE layers needs .* with every saving") as e:
        fit(search(), WANTED, least - 1)
    assert "Give the device 1 B more" in e.value.remedy


def test_with_adapters_an_expert_goes_with_its_adapter():
    """Freezing an adapter frees next to nothing."""
    wanted = dataclasses.replace(WANTED, setup=dataclasses.replace(WANTED.setup, experts="lora"))
    step_plan, fallbacks = fit(search(), wanted, 1500)
    assert step_plan.resident < 64
    assert "fewer resident" in [fallback.name for fallback in fallbacks]


@pytest.mark.parametrize(("usable", "experts"), [(2200, "full"), (1700, "lora")])
def test_no_other_plan_that_fits_has_a_lower_expected_loss(usable, experts):
    wanted = dataclasses.replace(WANTED, setup=dataclasses.replace(WANTED.setup, experts=experts))
    steps = search()
    step_plan, _ = fit(steps, wanted, usable)
    small = dataclasses.replace(wanted.setup, chunked_loss=True, checkpointing=True, optimizer="adamw_8bit")
    others = (
        StepPlan(dataclasses.replace(small, sequence_length=length), resident, trainable)
        for length in (128, 64, 32)
        for resident in range(LAYERS, 65, 6)
        for trainable in range(LAYERS, resident + 1, 6)
    )
    best = min(steps.cost(other) for other in others if steps.needs_bytes(other) <= usable)
    assert steps.cost(step_plan) <= 1.02 * best


def test_the_context_is_not_shortened_for_a_handful_of_experts():
    """Half of the tokens save 96 bytes, less than the 150 that training one expert more would take."""

    def heavy(setup, kept, trainable):
        parts = simple(setup, kept, trainable).parts
        parts = {**parts, "experts": 10 * parts["experts"]}
        return MemoryEstimate(parts, {"step": sum(parts.values())})

    rest = 1000 + 512 // 8 + 512 // 4
    step_plan, _ = fit(search(estimate=heavy), WANTED, rest + 64 * 100 + 30 * 150)
    assert step_plan.setup.sequence_length == 128
    assert (step_plan.resident, step_plan.trainable) == (64, 30)
    tight, _ = fit(search(estimate=heavy), WANTED, rest + 4 * 250)  # where it leaves one more in four, it is
    assert tight.setup.sequence_length <= 128
    assert tight.resident >= 4


def test_a_method_that_needs_all_experts_gives_up_none():
    step_plan, fallbacks = fit(search(all_experts=True), WANTED, FULL - 1500)
    assert step_plan.resident == step_plan.trainable == 64
    assert len(fallbacks) >= 3
    with pytest.raises(BudgetTooSmall, match="all 64 experts needs") as caught:
        fit(search(all_experts=True), WANTED, 1500)
    assert "hfedmoe, random" in caught.value.remedy
    step_plan = WANTED
    while fallback := next_fallback(search(all_experts=True), step_plan):
        step_plan = fallback.step_plan
    assert step_plan.resident == step_plan.trainable == 64
    assert step_plan.setup.sequence_length == SHORTEST_SEQUENCE


def test_going_down_one_by_one_reaches_the_same_end_and_has_one():
    step_plan, names, needs = WANTED, [], [FULL]
    while fallback := next_fallback(search(), step_plan):
        assert fallback.step_plan.rank() < step_plan.rank()
        step_plan = fallback.step_plan
        names.append(fallback.name)
        needs.append(search().needs_bytes(step_plan))
        assert needs[-2] - needs[-1] == fallback.saved_bytes > 0
    assert step_plan.resident == step_plan.trainable == LAYERS
    first = [name for i, name in enumerate(names) if name not in names[:i]]
    assert first == [
        "chunked loss", "checkpointing", "8-bit optimizer", "shorter sequence", "fewer trainable", "fewer resident",
    ]  # fmt: skip
    assert names.count("shorter sequence") == 2
    assert len(names) < 24


@pytest.mark.parametrize(("asked", "shortest"), [(128, 32), (100, 32), (512, 128), (40, 32), (24, 24)])
def test_sequences_keep_a_quarter_and_32_tokens(asked, shortest):
    steps = search(run_sequence_length=asked)
    assert steps.shortest_sequence == shortest
    step_plan = dataclasses.replace(WANTED, setup=dataclasses.replace(WANTED.setup, sequence_length=asked))
    while fallback := next_fallback(steps, step_plan):
        step_plan = fallback.step_plan
        assert step_plan.setup.sequence_length >= shortest


def test_words_for_people():
    step_plan, _ = fit(search(), WANTED, 2300)
    words = describe(step_plan, 64)
    assert words.startswith("64 of 64 experts resident")
    assert "chunked loss, checkpointing, 8-bit optimizer" in words
    assert describe(WANTED, 64) == "64 of 64 experts resident"


@settings(max_examples=15, deadline=None)
@given(
    name=st.sampled_from(sorted(KNOWN_SHAPES)),
    mode=st.sampled_from(["full", "lora", "none"]),
    share=st.floats(0.001, 1.2),
    less=st.floats(0.5, 1.0),
)
def test_whatever_the_model_what_is_found_fits_and_falls_with_the_budget(name, mode, share, less):
    shape = KNOWN_SHAPES[name]
    per_layer = shape.experts_per_layer
    layers = len(per_layer)

    def plan(resident, trainable):
        rows = []
        for layer in range(layers):
            row = np.zeros(per_layer[layer], dtype=np.int8)
            row[: resident // layers + (layer < resident % layers)] = 1
            row[: trainable // layers + (layer < trainable % layers)] = 2
            rows.append(row)
        return ExpertPlan(tuple(rows))

    steps = FallbackSearch(
        lambda s, kept, trainable: training_memory(shape, s, kept, trainable), plan,
        LossPrice.of(None, per_layer, 512), layers, 512,
    )  # fmt: skip
    wanted = StepPlan(StepSetup(1, 512, experts=mode), sum(per_layer), sum(per_layer))
    usable = int(share * steps.needs_bytes(wanted))
    try:
        step_plan, fallbacks = fit(steps, wanted, usable)
    except BudgetTooSmall:
        with pytest.raises(BudgetTooSmall):
            fit(steps, wanted, int(usable * less))
        return
    assert steps.needs_bytes(step_plan) <= usable
    assert layers <= step_plan.trainable <= step_plan.resident <= wanted.resident
    assert step_plan.setup.sequence_length >= 128
    assert (step_plan == wanted) == (not fallbacks)
    try:
        smaller, _ = fit(steps, wanted, int(usable * less))
    except BudgetTooSmall:
        return
    assert steps.cost(smaller) >= steps.cost(step_plan) / 1.02


# --- experts in 4 bits --------------------------------------------------------------------------------------------


def packed(setup, kept, trainable):
    """As `simple`, but weights that do not learn take a quarter in NF4, for 40 bytes of room to unpack one."""
    estimate = simple(setup, kept, trainable)
    if setup.expert_storage != "nf4":
        return estimate
    frozen = sum(kept) - sum(trainable) if setup.experts == "full" else sum(kept)
    parts = {**estimate.parts, "experts": estimate.parts["experts"] - 15 * frozen // 2, "workspace": 40}
    return MemoryEstimate(parts, {"step": sum(parts.values())})


def test_experts_are_packed_before_the_context_is_shortened_where_adapters_learn():
    wanted = dataclasses.replace(WANTED, setup=dataclasses.replace(WANTED.setup, experts="lora"))
    steps = search(estimate=packed, problems={})
    small = dataclasses.replace(wanted.setup, chunked_loss=True, checkpointing=True, optimizer="adamw_8bit")
    need = steps.needs_bytes(dataclasses.replace(wanted, setup=small))
    step_plan, fallbacks = fit(steps, wanted, need - 100)
    assert fallbacks[-1].name == "experts in NF4"
    assert not fallbacks[-1].keeps_plan
    assert "frozen experts in NF4 (saves 440 B)" in fallbacks[-1].sentence
    assert step_plan.setup.expert_storage == "nf4"
    assert step_plan.setup.sequence_length == 128
    assert step_plan.resident == step_plan.trainable == 64
    assert "experts in NF4" in describe(step_plan, 64)
    without = search(estimate=packed, problems={"nf4_experts": "no kernel"})
    step_plan, fallbacks = fit(without, wanted, need - 100)
    assert step_plan.setup.expert_storage is None
    assert fallbacks[-1].name == "fewer resident"
    with pytest.raises(BudgetTooSmall, match="without nf4 experts: no kernel"):
        fit(without, wanted, 100)


def test_packing_is_no_use_where_every_expert_learns_in_full_and_comes_with_the_first_frozen_one():
    steps = search(estimate=packed, problems={})
    step_plan, fallbacks = WANTED, []
    while (fallback := next_fallback(steps, step_plan)) is not None and len(fallbacks) < 99:
        assert steps.needs_bytes(fallback.step_plan) == steps.needs_bytes(step_plan) - fallback.saved_bytes
        fallbacks.append(fallback)
        step_plan = fallback.step_plan
    names = [fallback.name for fallback in fallbacks]
    assert names.count("experts in NF4") == 1
    place = names.index("experts in NF4")
    assert names[place - 1] == "fewer trainable"
    assert "fewer resident" not in names[:place]
    assert step_plan.setup.expert_storage == "nf4"
    assert step_plan.resident == LAYERS


def test_a_frozen_expert_is_packed_rather_than_left_out():
    """Between two budgets with the same savings, NF4 holds more; and a step_plan without it stands higher."""
    for usable in range(1900, 1300, -200):
        with_it, _ = fit(search(estimate=packed, problems={}), WANTED, usable)
        without, _ = fit(search(estimate=packed, problems={"nf4_experts": "told so"}), WANTED, usable)
        assert with_it.resident + with_it.trainable >= without.resident + without.trainable
        assert search(estimate=packed, problems={}).needs_bytes(with_it) <= usable
        if with_it.setup.expert_storage:
            assert search(estimate=packed, problems={}).cost(with_it) < search().cost(without)
            plain = dataclasses.replace(with_it, setup=dataclasses.replace(with_it.setup, expert_storage=None))
            assert plain.rank() > with_it.rank()
    assert with_it.setup.expert_storage == "nf4"


def test_what_must_be_packed_from_the_start_stays_packed():
    wanted = dataclasses.replace(WANTED, setup=dataclasses.replace(WANTED.setup, expert_storage="int8"))
    step_plan, fallbacks = fit(search(), wanted, 1500)
    assert step_plan.setup.expert_storage == "int8"
    assert "experts in NF4" not in [fallback.name for fallback in fallbacks]
    while (fallback := next_fallback(search(), step_plan)) is not None:
        step_plan = fallback.step_plan
        assert step_plan.setup.expert_storage == "int8"


def offloading(setup, kept, trainable):
    """`simple`, where offloading leaves one layer of experts."""
    plain = simple(setup, kept, trainable)
    return MemoryEstimate(plain.parts | {"experts": 10 * max(kept)}, plain.phases) if setup.offload else plain


EXACT = {"nf4_experts": "told so", "adamw_8bit": "told so"}
OFFLOADS = dict(estimate=offloading, may_offload=True, all_experts=True, problems=EXACT)


def test_experts_are_offloaded_before_sequences_get_shorter_and_are_placed_anew():
    step_plan, fallbacks = fit(search(**OFFLOADS), WANTED, 2000)
    assert [fallback.name for fallback in fallbacks] == ["chunked loss", "checkpointing", "offloaded experts"]
    assert [fallback.keeps_plan for fallback in fallbacks] == [True, True, False]
    assert step_plan.setup.offload
    assert (step_plan.resident, step_plan.trainable) == (64, 64)
    assert step_plan.setup.sequence_length == 128
    assert describe(step_plan, 64).endswith("chunked loss, checkpointing, experts offloaded")
    resident = dataclasses.replace(step_plan, setup=dataclasses.replace(step_plan.setup, offload=False))
    assert resident.rank() > step_plan.rank()
    assert next_fallback(search(**OFFLOADS), resident).step_plan == step_plan
    assert next_fallback(search(**OFFLOADS), step_plan).name == "shorter sequence"
    with pytest.raises(BudgetTooSmall, match="all 64 experts needs"):
        fit(search(**OFFLOADS), WANTED, 1100)


def test_other_methods_never_offload():
    with pytest.raises(BudgetTooSmall):
        fit(search(**OFFLOADS | {"may_offload": False}), WANTED, 2000)


@pytest.mark.parametrize(
    ("missing", "name"),
    [
        (1, "chunked loss"),
        (384, "chunked loss"),
        (385, "checkpointing"),
        (449, "8-bit optimizer"),
        (960, "8-bit optimizer"),
    ],
)
def test_the_first_fallback_that_frees_what_is_missing_is_taken_alone(missing, name):
    fallback = next_fallback(search(), WANTED, missing)
    assert fallback.name == name
    assert fallback.saved_bytes >= missing
    changed = [
        field.name
        for field in dataclasses.fields(StepSetup)
        if getattr(fallback.step_plan.setup, field.name) != getattr(WANTED.setup, field.name)
    ]
    assert len(changed) == 1
    assert fallback.keeps_plan


def test_several_fallbacks_together_free_what_none_frees_alone():
    fallback = next_fallback(search(), WANTED, 961)
    assert fallback.keeps_plan
    assert fallback.saved_bytes >= 961
    assert fallback.sentence.count("(saves ") == 3
    assert (fallback.step_plan.resident, fallback.step_plan.trainable) == (64, 64)


def test_no_more_experts_go_than_what_is_missing_takes():
    fallback = next_fallback(search(), WANTED, 2300)
    step_plan = fallback.step_plan
    assert not fallback.keeps_plan
    assert step_plan.trainable < step_plan.resident == 64
    assert search().needs_bytes(step_plan) <= FULL - 2300
    one_more = dataclasses.replace(step_plan, trainable=step_plan.trainable + 1)
    assert search().needs_bytes(one_more) > FULL - 2300


def test_where_nothing_frees_enough_the_smallest_plan_is_left_and_then_nothing():
    fallback = next_fallback(search(), WANTED, 10**9)
    assert (fallback.step_plan.resident, fallback.step_plan.trainable) == (LAYERS, LAYERS)
    assert fallback.step_plan.setup.sequence_length == SHORTEST_SEQUENCE
    assert next_fallback(search(), fallback.step_plan, 10**9) is None
    every = next_fallback(search(all_experts=True), WANTED, 10**9)
    assert every.step_plan.resident == every.step_plan.trainable == 64
    assert next_fallback(search(all_experts=True), every.step_plan, 10**9) is None
