"""The ladder of savings, by hand and by property: its order, its end, and that what it finds does fit."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgefed.errors import BudgetTooSmall
from edgefed.experts import ExpertPlan
from edgefed.moe.memory import MemoryEstimate, StepSetup, training_memory
from edgefed.moe.shapes import KNOWN_SHAPES
from edgefed.training.shrinking import SHORTEST_SEQUENCE, Ladder, Load, describe, fit, next_rung

LAYERS, EXPERTS = 4, 16
WANTED = Load(StepSetup(4, 128, dtype="float32"), LAYERS * EXPERTS, LAYERS * EXPERTS)


def layout(held, trained):
    """The same number of experts in each layer, as far as it goes; the trained ones are the first."""
    share = lambda total: [total // LAYERS + (layer < total % LAYERS) for layer in range(LAYERS)]  # noqa: E731
    return ExpertPlan.of(
        [EXPERTS] * LAYERS,
        [range(count) for count in share(trained)],
        [range(low, high) for low, high in zip(share(trained), share(held), strict=True)],
    )


def simple(setup, kept, tuned):
    """Bytes in round numbers: an expert 10, three times as much more if it trains, halved by 8 bit; the rest a step."""
    training = 30 if setup.experts == "full" else 2
    parts = {
        "dense": 1000,
        "experts": 10 * sum(kept) + training * sum(tuned) // (2 if setup.optimizer != "adamw" else 1),
        "activations": setup.tokens // (8 if setup.checkpointing else 1),
        "logits": setup.tokens // (4 if setup.chunked_loss else 1),
    }
    return MemoryEstimate(parts, {"step": sum(parts.values())})


def ladder(**changes):
    return Ladder(**{"estimate": simple, "layout": layout, "num_layers": LAYERS, "run_sequence_length": 128, **changes})


FULL = ladder().needs_bytes(WANTED)  # 1000 + 64 * 40 + 512 + 512


def test_what_fits_stays_as_it_is():
    assert FULL == 4584
    assert fit(ladder(), WANTED, FULL) == (WANTED, [])


@pytest.mark.parametrize(
    ("usable", "names"),
    [
        (FULL - 1, ["chunked loss"]),  # saves 384
        (FULL - 385, ["chunked loss", "checkpointing"]),  # 448 more
        (FULL - 385 - 448, ["chunked loss", "checkpointing", "8-bit optimizer"]),  # 960 more
        (FULL - 385 - 448 - 960, ["chunked loss", "checkpointing", "8-bit optimizer", "shorter sequence"]),
    ],
)
def test_rungs_are_taken_in_the_stated_order(usable, names):
    load, rungs = fit(ladder(), WANTED, usable)
    assert [rung.name for rung in rungs] == names
    assert ladder().needs_bytes(load) <= usable and (load.held, load.trained) == (64, 64)
    assert all(rung.keeps_plan and rung.saved_bytes > 0 and "saves about" in rung.sentence for rung in rungs)
    assert rungs[-1].load == load
    assert sum(rung.saved_bytes for rung in rungs) == FULL - ladder().needs_bytes(load)


def test_savings_that_are_not_there_are_passed_over():
    without = ladder(problems={"adamw_8bit": "bitsandbytes is not installed", "chunked_loss": "more terms"})
    load, rungs = fit(without, WANTED, FULL - 449)
    assert [rung.name for rung in rungs] == ["checkpointing", "shorter sequence"]
    assert load.setup.optimizer == "adamw" and not load.setup.chunked_loss


def test_a_rung_that_helps_nothing_is_not_taken():
    """Where the optimiser is the peak, neither the loss nor the activations are."""

    def peak(setup, kept, tuned):
        static = 1000 + 10 * sum(kept)
        phases = {"loss": static + setup.tokens, "optimizer": static + 100 * sum(tuned)}
        return MemoryEstimate({"all": max(phases.values())}, phases)

    load, rungs = fit(ladder(estimate=peak), WANTED, 1000 + 640 + 6399)
    assert [rung.name for rung in rungs] == ["fewer trained"]
    assert load.setup == WANTED.setup and load.held == 64 and load.trained == 63
    assert next_rung(ladder(estimate=peak), WANTED).name == "fewer trained"


def test_trained_experts_freeze_first_then_fewer_are_held_never_below_one_a_layer():
    least_setup = dataclasses.replace(
        WANTED.setup, chunked_loss=True, checkpointing=True, optimizer="adamw_8bit", sequence_length=32
    )
    seen = []
    for usable in range(2600, 1180, -20):
        load, _ = fit(ladder(), WANTED, usable)
        seen.append((load.held, load.trained))
        assert ladder().needs_bytes(load) <= usable
        assert load.held >= load.trained >= LAYERS
        if load.held < 64:
            assert load.trained == max(LAYERS, -(-load.held // 4))  # freezing is done before experts are left out
    for more, less in zip(seen, seen[1:], strict=False):
        assert sum(less) <= 1.06 * sum(more)  # a saving is taken where it leaves more than 5 %
    assert seen[-1][0] < 12 and any(held == 64 > trained for held, trained in seen)
    least = ladder().needs_bytes(Load(least_setup, LAYERS, LAYERS))
    assert fit(ladder(), WANTED, least)[0] == Load(least_setup, LAYERS, LAYERS)
    with pytest.raises(BudgetTooSmall, match=r"one expert in each of the 4 MoE layers needs .* with every saving") as e:
        fit(ladder(), WANTED, least - 1)
    assert "Give the device 1 B more" in e.value.remedy


def test_with_adapters_an_expert_goes_with_its_adapter():
    """Freezing an adapter frees next to nothing: holding all and training a quarter would be the worse trade."""
    wanted = dataclasses.replace(WANTED, setup=dataclasses.replace(WANTED.setup, experts="lora"))
    load, rungs = fit(ladder(), wanted, 1500)
    assert load.held == load.trained < 64
    assert "fewer trained" not in [rung.name for rung in rungs]


def test_the_context_is_not_shortened_for_a_handful_of_experts():
    """Half of the tokens save 96 bytes, less than the 150 that training one expert more would take."""

    def heavy(setup, kept, tuned):
        parts = simple(setup, kept, tuned).parts
        parts = {**parts, "experts": 10 * parts["experts"]}
        return MemoryEstimate(parts, {"step": sum(parts.values())})

    rest = 1000 + 512 // 8 + 512 // 4
    load, _ = fit(ladder(estimate=heavy), WANTED, rest + 64 * 100 + 30 * 150)
    assert load.setup.sequence_length == 128 and (load.held, load.trained) == (64, 30)
    tight, _ = fit(ladder(estimate=heavy), WANTED, rest + 4 * 250)  # where it leaves one more in four, it is
    assert tight.setup.sequence_length <= 128 and tight.held >= 4


def test_a_method_that_needs_all_experts_gives_up_none():
    load, rungs = fit(ladder(all_experts=True), WANTED, FULL - 1500)
    assert load.held == load.trained == 64 and len(rungs) >= 3
    with pytest.raises(BudgetTooSmall, match="all 64 experts needs") as caught:
        fit(ladder(all_experts=True), WANTED, 1500)
    assert "hfedmoe, random" in caught.value.remedy
    load = WANTED
    while rung := next_rung(ladder(all_experts=True), load):
        load = rung.load
    assert load.held == load.trained == 64 and load.setup.sequence_length == SHORTEST_SEQUENCE


def test_going_down_one_by_one_reaches_the_same_end_and_has_one():
    load, names, needs = WANTED, [], [FULL]
    while rung := next_rung(ladder(), load):
        assert rung.load.rank() < load.rank()
        load = rung.load
        names.append(rung.name)
        needs.append(ladder().needs_bytes(load))
        assert needs[-2] - needs[-1] == rung.saved_bytes > 0
    assert load.held == load.trained == LAYERS
    first = [name for i, name in enumerate(names) if name not in names[:i]]
    assert first == [
        "chunked loss", "checkpointing", "8-bit optimizer", "shorter sequence", "fewer trained", "fewer held",
    ]  # fmt: skip
    assert names.count("shorter sequence") == 2 and len(names) < 24


@pytest.mark.parametrize(("asked", "shortest"), [(128, 32), (100, 32), (512, 128), (40, 32), (24, 24)])
def test_sequences_keep_a_quarter_and_32_tokens(asked, shortest):
    steps = ladder(run_sequence_length=asked)
    assert steps.shortest_sequence == shortest
    load = dataclasses.replace(WANTED, setup=dataclasses.replace(WANTED.setup, sequence_length=asked))
    while rung := next_rung(steps, load):
        load = rung.load
        assert load.setup.sequence_length >= shortest


def test_words_for_people():
    load, _ = fit(ladder(), WANTED, 2300)
    words = describe(load, 64)
    assert words.startswith("64 of 64 experts held") and "chunked loss, checkpointing, 8-bit optimizer" in words
    assert describe(WANTED, 64) == "64 of 64 experts held"


@settings(max_examples=40, deadline=None)
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

    def plan(held, trained):
        rows = []
        for layer in range(layers):
            row = np.zeros(per_layer[layer], dtype=np.int8)
            row[: held // layers + (layer < held % layers)] = 1
            row[: trained // layers + (layer < trained % layers)] = 2
            rows.append(row)
        return ExpertPlan(tuple(rows))

    steps = Ladder(lambda s, kept, tuned: training_memory(shape, s, kept, tuned), plan, layers, 512)
    wanted = Load(StepSetup(1, 512, experts=mode), sum(per_layer), sum(per_layer))
    usable = int(share * steps.needs_bytes(wanted))
    try:
        load, rungs = fit(steps, wanted, usable)
    except BudgetTooSmall:
        with pytest.raises(BudgetTooSmall):
            fit(steps, wanted, int(usable * less))
        return
    assert steps.needs_bytes(load) <= usable
    assert layers <= load.trained <= load.held <= wanted.held and load.setup.sequence_length >= 128
    assert (load == wanted) == (not rungs)
    try:
        smaller, _ = fit(steps, wanted, int(usable * less))
    except BudgetTooSmall:
        return
    assert smaller.held + smaller.trained <= 1.06 * (load.held + load.trained)


# --- experts in 4 bits --------------------------------------------------------------------------------------------


def packed(setup, kept, tuned):
    """As `simple`, but weights that do not learn take a quarter in NF4, for 40 bytes of room to unpack one."""
    estimate = simple(setup, kept, tuned)
    if setup.expert_storage != "nf4":
        return estimate
    frozen = sum(kept) - sum(tuned) if setup.experts == "full" else sum(kept)
    parts = {**estimate.parts, "experts": estimate.parts["experts"] - 15 * frozen // 2, "workspace": 40}
    return MemoryEstimate(parts, {"step": sum(parts.values())})


def test_experts_are_packed_before_the_context_is_shortened_where_adapters_learn():
    wanted = dataclasses.replace(WANTED, setup=dataclasses.replace(WANTED.setup, experts="lora"))
    steps = ladder(estimate=packed)
    small = dataclasses.replace(wanted.setup, chunked_loss=True, checkpointing=True, optimizer="adamw_8bit")
    need = steps.needs_bytes(dataclasses.replace(wanted, setup=small))
    load, rungs = fit(steps, wanted, need - 1)
    assert rungs[-1].name == "experts in NF4" and not rungs[-1].keeps_plan
    assert "kept in 4 bits (NF4), saves about 440 B" in rungs[-1].sentence
    assert load.setup.expert_storage == "nf4" and load.setup.sequence_length == 128 and load.held == load.trained == 64
    assert "experts in NF4" in describe(load, 64)
    without = ladder(estimate=packed, problems={"nf4_experts": "no kernel"})
    load, rungs = fit(without, wanted, need - 1)
    assert load.setup.expert_storage is None and rungs[-1].name == "shorter sequence"
    with pytest.raises(BudgetTooSmall, match="without nf4 experts: no kernel"):
        fit(without, wanted, 100)


def test_packing_is_no_use_where_every_expert_learns_in_full_and_comes_with_the_first_frozen_one():
    steps = ladder(estimate=packed)
    load, rungs = WANTED, []
    while (rung := next_rung(steps, load)) is not None and len(rungs) < 99:
        assert steps.needs_bytes(rung.load) == steps.needs_bytes(load) - rung.saved_bytes
        rungs.append(rung)
        load = rung.load
    names = [rung.name for rung in rungs]
    assert names.count("experts in NF4") == 1
    place = names.index("experts in NF4")
    assert names[place - 1] == "fewer trained" and "fewer held" not in names[:place]
    assert load.setup.expert_storage == "nf4" and load.held == LAYERS


def test_a_frozen_expert_is_packed_rather_than_left_out():
    """Between two budgets with the same savings, NF4 holds more; and a load without it stands higher."""
    for usable in range(1900, 1300, -50):
        with_it, _ = fit(ladder(estimate=packed), WANTED, usable)
        without, _ = fit(ladder(estimate=packed, problems={"nf4_experts": "told so"}), WANTED, usable)
        assert with_it.held + with_it.trained >= without.held + without.trained
        assert ladder(estimate=packed).needs_bytes(with_it) <= usable
        if with_it.setup.expert_storage:
            assert with_it.held > without.held
            plain = dataclasses.replace(with_it, setup=dataclasses.replace(with_it.setup, expert_storage=None))
            assert plain.rank() > with_it.rank()
    assert with_it.setup.expert_storage == "nf4"


def test_what_must_be_packed_from_the_start_stays_packed():
    wanted = dataclasses.replace(WANTED, setup=dataclasses.replace(WANTED.setup, expert_storage="int8"))
    load, rungs = fit(ladder(), wanted, 1500)
    assert load.setup.expert_storage == "int8" and "experts in NF4" not in [rung.name for rung in rungs]
    while (rung := next_rung(ladder(), load)) is not None:
        load = rung.load
        assert load.setup.expert_storage == "int8"


def offloading(setup, kept, tuned):
    """`simple`, where offloading leaves one layer of experts."""
    plain = simple(setup, kept, tuned)
    return MemoryEstimate(plain.parts | {"experts": 10 * max(kept)}, plain.phases) if setup.offload else plain


EXACT = {"nf4_experts": "told so", "adamw_8bit": "told so"}
OFFLOADS = dict(estimate=offloading, may_offload=True, all_experts=True, problems=EXACT)


def test_experts_are_offloaded_before_sequences_get_shorter_and_are_placed_anew():
    load, rungs = fit(ladder(**OFFLOADS), WANTED, 2000)
    assert [rung.name for rung in rungs] == ["chunked loss", "checkpointing", "offloaded experts"]
    assert [rung.keeps_plan for rung in rungs] == [True, True, False]
    assert load.setup.offload and (load.held, load.trained) == (64, 64) and load.setup.sequence_length == 128
    assert describe(load, 64).endswith("chunked loss, checkpointing, experts offloaded")
    resident = dataclasses.replace(load, setup=dataclasses.replace(load.setup, offload=False))
    assert resident.rank() > load.rank()
    assert next_rung(ladder(**OFFLOADS), resident).load == load
    assert next_rung(ladder(**OFFLOADS), load).name == "shorter sequence"
    with pytest.raises(BudgetTooSmall, match="all 64 experts needs"):
        fit(ladder(**OFFLOADS), WANTED, 1100)


def test_other_methods_never_offload():
    with pytest.raises(BudgetTooSmall):
        fit(ladder(**OFFLOADS | {"may_offload": False}), WANTED, 2000)
