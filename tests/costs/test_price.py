"""The expected loss of plans: its constants, its parts, and that no plan of a grid at real sizes is better."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import bench_plan_price
import numpy as np
import pytest

from edgefed.costs import price
from edgefed.costs.fallbacks import fit
from edgefed.costs.memory import training_memory
from edgefed.costs.price import LossPrice
from edgefed.costs.search import FallbackSearch
from edgefed.costs.shapes import KNOWN_SHAPES
from edgefed.costs.step_setup import StepPlan, StepSetup
from edgefed.expert_records import ActivationProfile, ExpertPlan, LayerProfile
from edgefed.trainer.expert_choice import even_layout

RESULTS = Path(bench_plan_price.__file__).parent / "results" / "plan_price.json"
SIZES = (4, 4)
SETUP = StepSetup(1, 128)


def test_the_constants_are_those_of_the_recorded_rows():
    found = bench_plan_price.fitted(json.loads(RESULTS.read_text())["rows"])
    assert pytest.approx((found["experts_factor"], found["experts_power"]), abs=0.005) == price.EXPERTS_LEFT_OUT
    assert pytest.approx((found["neurons_factor"], found["neurons_power"]), abs=0.005) == price.NEURONS_LEFT_OUT
    assert price.QUANTIZED["nf4"] == pytest.approx(found["nf4"], abs=5e-4)
    assert price.QUANTIZED["int8"] == pytest.approx(found["int8"], abs=5e-4)
    ours = (price.GAIN, price.TRAINED_POWER, price.ADAPTERS, price.HALVING)
    assert ours == pytest.approx([found[name] for name in ("gain", "training_power", "adapters", "halving")], abs=0.005)


def test_what_a_halved_rank_costs_is_that_of_the_recorded_rows():
    rows = json.loads(RESULTS.with_name("plan_price_rank.json").read_text())["rows"]
    assert pytest.approx(bench_plan_price.rank_halving(rows, price.GAIN), abs=5e-4) == price.RANK_HALVING
    given = LossPrice.of(None, SIZES, 128, lora_rank=8)
    setup = dataclasses.replace(SETUP, experts="lora", lora_rank=2)
    assert given.parts(setup, ExpertPlan.full(SIZES))["rank"] == pytest.approx(2 * 0.24 * 0.077)


def test_a_full_plan_is_free_and_each_part_is_its_own():
    even = LossPrice.of(None, SIZES, 128)
    assert even(SETUP, ExpertPlan.full(SIZES)) == 0
    half = ExpertPlan.of(SIZES, [[0, 1], [0, 1]])
    parts = even.parts(SETUP, half)
    assert parts["left out"] == pytest.approx(3.06 * 0.5**1.74)
    assert parts["untrained"] == pytest.approx(0.24 * (1 - 0.5**0.41))
    assert parts["quantized"] == parts["context"] == 0
    frozen = ExpertPlan.of(SIZES, [[0], [0]], [[1, 2, 3], [1, 2, 3]])
    parts = even.parts(dataclasses.replace(SETUP, expert_storage="nf4", sequence_length=32), frozen)
    assert parts["left out"] == 0
    assert parts["quantized"] == pytest.approx(0.75 * 0.008), "of the frozen ones"
    assert parts["context"] == pytest.approx(0.24 * 0.26 * 2)
    adapters = even.parts(dataclasses.replace(SETUP, expert_storage="nf4", experts="lora"), ExpertPlan.full(SIZES))
    assert adapters["quantized"] == pytest.approx(0.008), "of all: their weights do not change"
    words = even.describe(SETUP, half)
    assert words.startswith("least expected loss in this memory, 0.98 nats above a full plan (0.92 left out, 0.06 untr")


def profile(tokens, energy=None):
    zero = np.zeros(4)
    layer = LayerProfile(10, np.array(tokens, dtype=np.float64), zero, zero, zero, zero, zero, neuron_energy=energy)
    return ActivationProfile((layer, layer))


def test_a_profile_says_what_an_expert_and_a_neuron_are_worth():
    used = LossPrice.of(profile([7, 1, 1, 1]), SIZES, 128)
    best, worst = ExpertPlan.of(SIZES, [[0], [0]]), ExpertPlan.of(SIZES, [[3], [3]])
    assert used.parts(SETUP, best)["left out"] == pytest.approx(3.06 * 0.3**1.74)
    assert used.parts(SETUP, worst)["left out"] == pytest.approx(3.06 * 0.9**1.74)
    energy = np.tile([[81.0, 1.0, 0.0, 0.0]], (4, 1))
    sliced = LossPrice.of(profile([1, 1, 1, 1], energy), SIZES, 128, slices=True)
    mask = np.tile([True, False, False, False], (4, 1))
    plan = ExpertPlan(ExpertPlan.full(SIZES).roles, neurons=(mask, mask))
    assert sliced.parts(SETUP, plan)["left out"] == pytest.approx(1.83 * 0.1**2.27)


# --- at the size of real models -------------------------------------------------------------------------------------

SHARES = (1.0, 0.85, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
TRAINED = (1.0, 0.5, 0.25, 0.1, 0.05, 0.02, 0.0)


def search_for(name: str) -> FallbackSearch:
    shape = KNOWN_SHAPES[name]
    sizes = shape.experts_per_layer
    return FallbackSearch(
        lambda setup, resident, trainable: training_memory(shape, setup, resident, trainable),
        even_layout(sizes), LossPrice.of(None, sizes, 512), len(sizes), 512,
    )  # fmt: skip


def best_of_grid(search: FallbackSearch, setup: StepSetup, total: int, usable: int) -> float:
    """The lowest expected loss of a grid of plans that fit, with every saving that changes no loss."""
    small = dataclasses.replace(setup, chunked_loss=True, checkpointing=True, optimizer="adamw_8bit")
    found = []
    for storage, length in itertools.product((None, "int8", "nf4"), (512, 128)):
        case = dataclasses.replace(small, expert_storage=storage, sequence_length=length)
        for share in SHARES:
            resident = max(search.num_layers, int(share * total))
            plans = (StepPlan(case, resident, max(search.num_layers, int(trained * resident))) for trained in TRAINED)
            fitting = next((plan for plan in plans if search.needs_bytes(plan) <= usable), None)
            if fitting:  # with more trainable ones the loss is lower
                found.append(search.cost(fitting))
    return min(found)


CASES = [("OLMoE-1B-7B", 6, "full")]
MORE_CASES = [
    case
    for case in itertools.product(("OLMoE-1B-7B", "Qwen3-30B-A3B"), (4, 6, 8, 12), ("full", "lora"))
    if case not in CASES and case != ("Qwen3-30B-A3B", 4, "full")  # does not fit
]


@pytest.mark.parametrize(
    ("name", "gibibytes", "experts"), [*CASES, *(pytest.param(*case, marks=pytest.mark.full) for case in MORE_CASES)]
)
def test_no_plan_of_a_grid_is_two_per_cent_better(name, gibibytes, experts):
    search, total = search_for(name), sum(KNOWN_SHAPES[name].experts_per_layer)
    setup = StepSetup(1, 512, experts=experts, router="none")
    step_plan, _ = fit(search, StepPlan(setup, total, total), gibibytes << 30)
    assert search.needs_bytes(step_plan) <= gibibytes << 30
    assert search.cost(step_plan) <= 1.02 * best_of_grid(search, setup, total, gibibytes << 30)
    if name == "OLMoE-1B-7B" and gibibytes >= 6:
        assert step_plan.resident >= 0.99 * total, "all experts take 3.6 GiB in NF4"
