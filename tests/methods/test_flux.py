"""Flux: roles by utility, budgets, coverage, and which client's expert counts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgefed.errors import BudgetTooSmall, ConfigError
from edgefed.experts import ExpertPlan, LayerRecord, RouterRecord
from edgefed.methods.flux import Flux, complete_utilities
from edgefed.methods.interface import Contribution, Coverage, DeviceBudget, RoundContext
from edgefed.protocol.messages import ExpertAssignment, ExpertReport, ExpertSurvey, TensorInfo, UnitInfo

SIZES = (8, 8)
NO_IDLE = Coverage((np.zeros(8, int), np.zeros(8, int)))


def record(frequencies) -> RouterRecord:
    layers = []
    for row in np.asarray(frequencies, dtype=float):
        zeros = np.zeros(len(row))
        layers.append(LayerRecord(100, row * 100, row * 50, row, zeros, zeros, row * 50))
    return RouterRecord(tuple(layers))


def rng(seed=0):
    return np.random.default_rng(seed)


FREQUENCY = ((0.9, 0.5, 0.3, 0.1, 0.1, 0.05, 0.03, 0.02), (0.2, 0.25, 0.3, 0.25, 0.25, 0.25, 0.25, 0.25))


def survey(utility, frequency=FREQUENCY, tune_slots=6) -> ExpertSurvey:
    return ExpertSurvey(
        utility=tuple(map(tuple, utility)), frequency=tuple(map(tuple, frequency)), tune_slots=tune_slots
    )


UNKNOWN = ((None,) * 8,) * 2


def test_exploitation_grows_to_its_limit():
    method = Flux(eps_start=0.3, eps_step=0.25, eps_max=0.9)
    assert [method.exploitation(server_round) for server_round in (1, 2, 3, 4, 9)] == [0.3, 0.55, 0.8, 0.9, 0.9]


@pytest.mark.parametrize(("held", "merged"), [(16, 0), (15, 4), (9, 4), (8, 4), (6, 3), (4, 2), (3, 0), (2, 0)])
def test_slots_for_merged_experts(held, merged):
    """A quarter of 16 experts, at least one per layer, at most half of what is held; none where all fit, or too few."""
    assert Flux().merged_slots(held, SIZES) == merged


def test_the_first_plan_trains_the_most_frequent_and_explores_others():
    plan = Flux(eps_start=0.5).plan_experts(record(FREQUENCY), SIZES, DeviceBudget(12), rng())
    assert plan.num_resident == 8, "4 of the 12 slots are left for merged experts"
    assert plan.num_tuned == 4
    assert plan.tuned(0).tolist() == [0, 1, 2], "normalised frequencies .45, .25, .15 beat .15 of the flat layer"
    assert plan.tuned(1).tolist() == [2]
    explored = {(layer, int(e)) for layer in (0, 1) for e in plan.frozen(layer)}
    assert len(explored) == 4
    draws = {Flux(eps_start=0.5).plan_experts(record(FREQUENCY), SIZES, DeviceBudget(12), rng(s)) for s in range(6)}
    assert len(draws) > 1, "what is explored is drawn at random"


def test_room_for_all_trains_all_and_too_little_is_refused():
    plan = Flux().plan_experts(record(FREQUENCY), SIZES, DeviceBudget(16), rng())
    assert plan == ExpertPlan.full(SIZES)
    with pytest.raises(BudgetTooSmall):
        Flux().plan_experts(record(FREQUENCY), SIZES, DeviceBudget(1), rng())


def test_an_assignment_is_followed_as_far_as_it_fits():
    wanted = ExpertAssignment(tune=((0, 5), (1, 7), (0, 6), (0, 1)), explore=((1, 1), (1, 2), (0, 0), (0, 2)))
    context = RoundContext(server_round=2, assignment=wanted)
    whole = Flux().plan_experts(record(FREQUENCY), SIZES, DeviceBudget(12), rng(), context)
    assert [whole.tuned(layer).tolist() for layer in (0, 1)] == [[1, 5, 6], [7]]
    assert [whole.frozen(layer).tolist() for layer in (0, 1)] == [[0, 2], [1, 2]]
    half = Flux().plan_experts(record(FREQUENCY), SIZES, DeviceBudget(8), rng(), context)
    assert [half.tuned(layer).tolist() for layer in (0, 1)] == [[5], [7]], "the most useful first, one in each layer"
    assert half.num_resident == 4
    with pytest.raises(ConfigError, match="no such expert"):
        bad = RoundContext(assignment=ExpertAssignment(tune=((0, 8),), explore=()))
        Flux().plan_experts(record(FREQUENCY), SIZES, DeviceBudget(8), rng(), bad)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 16), st.integers(0, 40), st.data())
def test_plans_keep_the_budget_and_tune_in_every_layer(held, server_round, data):
    pairs = [(layer, e) for layer in (0, 1) for e in range(8)]
    shuffled = data.draw(st.permutations(pairs))
    cut = data.draw(st.integers(0, 16))
    tune_cut = data.draw(st.integers(0, cut))
    assignment = ExpertAssignment(tune=tuple(shuffled[:tune_cut]), explore=tuple(shuffled[tune_cut:cut]))
    for context in (RoundContext(server_round + 1), RoundContext(server_round + 1, assignment=assignment)):
        plan = Flux().plan_experts(record(FREQUENCY), SIZES, DeviceBudget(held), rng(), context)
        assert plan.num_resident <= held - Flux().merged_slots(held, SIZES)
        assert all(len(plan.tuned(layer)) >= 1 for layer in (0, 1))


def test_utilities_that_were_not_measured_are_estimated_from_frequencies():
    utility = ([4.5, None, 3.0, None, None, None, None, None], [None] * 8)
    first, second = complete_utilities(survey(utility))
    np.testing.assert_allclose(first[[0, 1, 2]], [4.5, 7.5 * 0.5, 3.0])  # ratios 5 and 10, their median 7.5
    np.testing.assert_allclose(second, 7.5 * np.array(FREQUENCY[1]))
    np.testing.assert_allclose(complete_utilities(survey(UNKNOWN))[0], FREQUENCY[0])


def test_the_aggregator_assigns_each_client_its_best_and_draws_what_is_explored():
    high = [[0.0] * 7 + [9.0], [5.0, 4.0, 3.0, 2.0, 1.0, 0.5, 0.2, 0.1]]
    surveys = {"x": survey(high), "y": survey(UNKNOWN, tune_slots=4)}
    given = Flux(eps_start=0.5).assign_experts(surveys, NO_IDLE, 1, 7)
    assert given["x"].tune == ((0, 7), (1, 0), (1, 1))
    assert len(given["x"].explore) == 3 and not set(given["x"].explore) & set(given["x"].tune)
    assert given["y"].tune == ((0, 0), (1, 2)), "never measured: by frequency, one in each layer"
    renamed = Flux(eps_start=0.5).assign_experts({"b": surveys["x"], "a": surveys["y"]}, NO_IDLE, 1, 7)
    assert renamed == {"b": given["x"], "a": given["y"]}, "ids are drawn at random and must not matter"
    later = Flux(eps_start=0.5).assign_experts(surveys, NO_IDLE, 2, 7)
    assert later["x"].explore != given["x"].explore


def test_balanced_coverage_gives_idle_experts_to_whom_they_are_most_useful():
    flat, fond = [[1.0] * 8] * 2, [[1.0] * 8, [1.0] * 3 + [4.0] + [1.0] * 4]
    surveys = {"x": survey(flat, tune_slots=8), "y": survey(fond, tune_slots=8)}
    idle = Coverage((np.zeros(8, int), np.array([0, 0, 0, 0, 0, 0, 0, 6])))
    plain = Flux(eps_start=0.5).assign_experts(surveys, idle, 1, 0)
    assert all((1, 7) not in given.tune for given in plain.values())
    balanced = Flux(eps_start=0.5, coverage="balanced").assign_experts(surveys, idle, 1, 0)
    assert [(1, 7) in balanced[client].tune for client in "xy"] == [True, False], "its share of x's layer is larger"
    assert len(balanced["x"].tune) == len(plain["x"].tune)
    assert {layer for layer, _ in balanced["x"].tune} == {0, 1}
    recent = Coverage((np.zeros(8, int), np.array([0, 0, 0, 0, 0, 0, 0, 4])))
    assert Flux(eps_start=0.5, coverage="balanced").assign_experts(surveys, recent, 1, 0) == plain


def unit(key, kind, layer=-1, expert=-1):
    tensors = (TensorInfo(name="value", dtype="F32", shape=(2,)),)
    return UnitInfo(
        key=key, kind=kind, layer=layer, expert=expert, trainable=True, sha256="", size_bytes=8, tensors=tensors
    )


def test_experts_are_averaged_by_the_tokens_that_trained_them():
    def sent(client, tokens, steps=3):
        reports = {
            (0, e): ExpertReport(layer=0, expert=e, usage=0.1, importance=0.1, steps=steps, tokens=t)
            for e, t in enumerate(tokens)
        }
        return Contribution(client, 10, reports, frozenset({"e0", "e1", "r"}))

    units = [unit("e0", "expert", 0, 0), unit("e1", "expert", 0, 1), unit("r", "router", 0)]
    merges = Flux().plan_merge([sent("b", (30, 0)), sent("a", (10, 0))], units)
    assert merges["e0"].weights == (("a", 10.0), ("b", 30.0))
    assert "e1" not in merges, "no token trained it: it stays as it was"
    assert merges["r"].weights == (("a", 10.0), ("b", 10.0))
    assert "e0" not in Flux().plan_merge([sent("a", (10, 5), steps=0)], units)


@pytest.mark.parametrize(
    "options",
    [
        {"eps_start": 0.0}, {"eps_max": 1.5}, {"eps_step": -0.1}, {"merged_share": 2.0}, {"merge_sizes": "some"},
        {"merge_weights": "none"}, {"coverage": "all"}, {"coverage_rounds": 0}, {"probes": -1}, {"explored": -1},
    ],
)  # fmt: skip
def test_impossible_options_are_named(options):
    with pytest.raises(ConfigError, match=f"flux: .*{next(iter(options))}"):
        Flux(**options)
