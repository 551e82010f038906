"""Flux: roles by utility, budgets, coverage, and weights of clients in the average."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgefed.errors import BudgetTooSmall, ConfigError
from edgefed.expert_records import ActivationProfile, ExpertPlan, LayerProfile
from edgefed.methods.flux import Flux, complete_utilities
from edgefed.methods.interface import Contribution, Coverage, DeviceBudget, RoundContext
from edgefed.methods.pace import paced_limits, round_trip_rate
from edgefed.protocol.messages import ExpertAssignment, ExpertReport, ExpertSurvey, TensorInfo, UnitInfo

SIZES = (8, 8)
NO_IDLE = Coverage((np.zeros(8, int), np.zeros(8, int)))


def record(frequencies) -> ActivationProfile:
    layers = []
    for row in np.asarray(frequencies, dtype=float):
        zeros = np.zeros(len(row))
        layers.append(LayerProfile(100, row * 100, row * 50, row, zeros, zeros, row * 50))
    return ActivationProfile(tuple(layers))


def rng(seed=0):
    return np.random.default_rng(seed)


FREQUENCY = ((0.9, 0.5, 0.3, 0.1, 0.1, 0.05, 0.03, 0.02), (0.2, 0.25, 0.3, 0.25, 0.25, 0.25, 0.25, 0.25))


def survey(utility, frequency=FREQUENCY, tune_slots=6, rate=None, train_slots=None, down=None) -> ExpertSurvey:
    return ExpertSurvey(
        utility=tuple(map(tuple, utility)), frequency=tuple(map(tuple, frequency)), tune_slots=tune_slots,
        train_slots=train_slots, upload_bytes_per_s=rate, download_bytes_per_s=down,
    )  # fmt: skip


UNKNOWN = ((None,) * 8,) * 2


def test_exploitation_grows_to_its_limit():
    method = Flux(eps_start=0.3, eps_step=0.25, eps_max=0.9)
    assert [method.exploitation(server_round) for server_round in (1, 2, 3, 4, 9)] == [0.3, 0.55, 0.8, 0.9, 0.9]


@pytest.mark.parametrize(("slots", "merged"), [(16, 0), (15, 4), (9, 4), (8, 4), (6, 3), (4, 2), (3, 0), (2, 0)])
def test_slots_for_merged_experts(slots, merged):
    """A quarter of 16 experts, one per layer to half of the slots; none if all experts fit, or with too few slots."""
    assert Flux().merged_slots(slots, SIZES) == merged


def test_the_first_plan_trains_the_most_frequent_and_explores_others():
    method = Flux(eps_start=0.5, pace="own")
    plan = method.plan_experts(record(FREQUENCY), SIZES, DeviceBudget(12), rng())
    assert plan.num_resident == 8, "4 of the 12 slots are left for merged experts"
    assert plan.num_trainable == 4
    assert plan.trainable(0).tolist() == [0, 1, 2], "normalised frequencies .45, .25, .15 beat .15 of the flat layer"
    assert plan.trainable(1).tolist() == [2]
    explored = {(layer, int(e)) for layer in (0, 1) for e in plan.frozen(layer)}
    assert len(explored) == 4
    draws = {method.plan_experts(record(FREQUENCY), SIZES, DeviceBudget(12), rng(s)) for s in range(6)}
    assert len(draws) > 1, "explored experts are drawn at random"


@pytest.mark.parametrize(("share", "trainable"), [(0.02, 1), (0.19, 3), (1.0, 4)])
def test_a_device_without_a_known_upload_rate_trains_few_experts(share, trainable):
    own = Flux(eps_start=0.5, pace="own").plan_experts(record(FREQUENCY), SIZES, DeviceBudget(12), rng())
    plan = Flux(eps_start=0.5, first_share=share).plan_experts(record(FREQUENCY), SIZES, DeviceBudget(12), rng())
    best = [(0, 0), (0, 1), (0, 2), (1, 2)]
    assert [(layer, e) for layer, e in best if e in plan.trainable(layer)] == best[:trainable]
    assert plan.num_trainable == trainable
    resident = [sorted(found.resident(layer).tolist()) for found in (plan, own) for layer in (0, 1)]
    assert resident[:2] == resident[2:], "the others are resident and frozen"


def test_room_for_all_trains_all_and_too_little_is_refused():
    for method in (Flux(pace="own"), Flux(first_share=1.0)):
        plan = method.plan_experts(record(FREQUENCY), SIZES, DeviceBudget(16), rng())
        assert plan == ExpertPlan.full(SIZES)
        with pytest.raises(BudgetTooSmall):
            method.plan_experts(record(FREQUENCY), SIZES, DeviceBudget(1), rng())
    few = Flux().plan_experts(record(FREQUENCY), SIZES, DeviceBudget(16), rng())
    assert few.num_resident == 16
    assert few.num_trainable == 1


def test_an_assignment_is_followed_as_far_as_it_fits():
    wanted = ExpertAssignment(tune=((0, 5), (1, 7), (0, 6), (0, 1)), explore=((1, 1), (1, 2), (0, 0), (0, 2)))
    context = RoundContext(server_round=2, assignment=wanted)
    for pace in ("own", "fleet"):
        whole = Flux(pace=pace).plan_experts(record(FREQUENCY), SIZES, DeviceBudget(12), rng(), context)
        assert [whole.trainable(layer).tolist() for layer in (0, 1)] == [[1, 5, 6], [7]]
        assert [whole.frozen(layer).tolist() for layer in (0, 1)] == [[0, 2], [1, 2]]
    paced = Flux().plan_experts(record(FREQUENCY), SIZES, DeviceBudget(8), rng(), context)
    assert paced.num_trainable == paced.num_resident == 4, "less memory does not change what the uplink can send"
    half = Flux(pace="own").plan_experts(record(FREQUENCY), SIZES, DeviceBudget(8), rng(), context)
    assert [half.trainable(layer).tolist() for layer in (0, 1)] == [[5], [7]], (
        "the most useful first, one in each layer"
    )
    assert half.num_resident == 4
    bad = RoundContext(assignment=ExpertAssignment(tune=((0, 8),), explore=()))
    with pytest.raises(ConfigError, match="expert 8 of layer 0 does not exist"):
        Flux().plan_experts(record(FREQUENCY), SIZES, DeviceBudget(8), rng(), bad)


def test_with_fleet_pace_a_layer_may_have_no_trainable_expert_but_always_a_resident_one():
    wanted = ExpertAssignment(tune=((0, 5), (0, 6)), explore=((0, 0), (0, 1), (1, 1), (1, 2)))
    context = RoundContext(server_round=2, assignment=wanted)
    plan = Flux().plan_experts(record(FREQUENCY), SIZES, DeviceBudget(6), rng(), context)
    assert [plan.trainable(layer).tolist() for layer in (0, 1)] == [[5, 6], []]
    assert [plan.frozen(layer).tolist() for layer in (0, 1)] == [[], [1]]
    everything = ExpertAssignment(
        tune=((1, 3),), explore=tuple((layer, e) for layer in (0, 1) for e in range(8) if (layer, e) != (1, 3))
    )
    room = RoundContext(server_round=2, assignment=everything)
    plan = Flux().plan_experts(record(FREQUENCY), SIZES, DeviceBudget(16), rng(), room)
    assert [plan.trainable(layer).tolist() for layer in (0, 1)] == [[], [3]]
    assert plan.num_resident == 16


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 16), st.integers(0, 40), st.data())
def test_plans_fit_the_budget_and_train_in_every_layer(slots, server_round, data):
    pairs = [(layer, e) for layer in (0, 1) for e in range(8)]
    shuffled = data.draw(st.permutations(pairs))
    cut = data.draw(st.integers(0, 16))
    tune_cut = data.draw(st.integers(0, cut))
    assignment = ExpertAssignment(tune=tuple(shuffled[:tune_cut]), explore=tuple(shuffled[tune_cut:cut]))
    for context in (RoundContext(server_round + 1), RoundContext(server_round + 1, assignment=assignment)):
        for pace in ("own", "fleet"):
            plan = Flux(pace=pace).plan_experts(record(FREQUENCY), SIZES, DeviceBudget(slots), rng(), context)
            assert plan.num_resident <= slots - Flux().merged_slots(slots, SIZES)
            assert all(len(plan.resident(layer)) >= 1 for layer in (0, 1))
            assert plan.num_trainable >= 1
            assert pace == "fleet" or all(len(plan.trainable(layer)) >= 1 for layer in (0, 1))


def test_utilities_that_were_not_measured_are_estimated_from_frequencies():
    utility = ([4.5, None, 3.0, None, None, None, None, None], [None] * 8)
    first, second = complete_utilities(survey(utility))
    np.testing.assert_allclose(first[[0, 1, 2]], [4.5, 7.5 * 0.5, 3.0])  # ratios 5 and 10, their median 7.5
    np.testing.assert_allclose(second, 7.5 * np.array(FREQUENCY[1]))
    np.testing.assert_allclose(complete_utilities(survey(UNKNOWN))[0], FREQUENCY[0])


def test_the_aggregator_assigns_the_best_experts_and_draws_those_to_explore():
    high = [[0.0] * 7 + [9.0], [5.0, 4.0, 3.0, 2.0, 1.0, 0.5, 0.2, 0.1]]
    surveys = {"x": survey(high), "y": survey(UNKNOWN, tune_slots=4)}
    given = Flux(eps_start=0.5).assign_experts(surveys, NO_IDLE, 1, 7)
    assert given["x"].tune == ((0, 7), (1, 0), (1, 1))
    assert len(given["x"].explore) == 3
    assert not set(given["x"].explore) & set(given["x"].tune)
    assert given["y"].tune == ((0, 0), (1, 2)), "never measured: by frequency, one in each layer"
    renamed = Flux(eps_start=0.5).assign_experts({"b": surveys["x"], "a": surveys["y"]}, NO_IDLE, 1, 7)
    assert renamed == {"b": given["x"], "a": given["y"]}, "ids are drawn at random and must not matter"
    later = Flux(eps_start=0.5).assign_experts(surveys, NO_IDLE, 2, 7)
    assert later["x"].explore != given["x"].explore


def test_the_pace_is_the_geometric_mean_of_the_times_of_all_clients():
    """Times per byte of an expert, in millionths: a 8/4 = 2, b 8/1 = 8, their mean 4: b can send 4 by then, a 16."""
    a, b, silent = (survey(UNKNOWN, tune_slots=8, rate=rate) for rate in (4e6, 1e6, None))
    ones = {"a": 1.0, "b": 1.0, "c": 1.0}
    assert paced_limits({"a": a, "b": b, "c": silent}, ones) == {"b": 4}
    assert paced_limits({"b": b, "c": silent, "a": a}, ones) == {"b": 4}
    assert paced_limits({"a": a, "b": b}, {"a": 1.0, "b": 0.5}) == {"b": 2}, "2 and 4: 2.83; 2.83 are sent by then"
    small = survey(UNKNOWN, tune_slots=8, rate=4e6, train_slots=2)
    assert paced_limits({"a": small, "b": b}, ones) == {"a": 2, "b": 2}, (
        "a has memory to train 2: 0.5 and 8, their mean 2"
    )
    assert paced_limits({"a": a, "b": b}, ones, 0.3) == {"a": 4, "b": 1}, "a pace of 1.2: 4.8 and 1.2"
    large = survey(UNKNOWN, tune_slots=16, rate=1e6)
    assert paced_limits({"a": large, "b": survey(UNKNOWN, tune_slots=4, rate=1e6)}, ones) == {"a": 8}
    creeping = survey(UNKNOWN, tune_slots=8, rate=1.0)
    assert paced_limits({"a": a, "b": creeping}, ones) == {"b": 1}, "every client trains at least one"


def test_downloads_count_as_uploads():
    """An aggregator's narrow downlink makes fast uplinks less of an advantage: 1/4 + 1/1 and 1/1 + 1/1."""
    fast, slow = (survey(UNKNOWN, tune_slots=8, rate=rate, down=1e6) for rate in (4e6, 1e6))
    assert round_trip_rate(fast) == pytest.approx(0.8e6)
    assert round_trip_rate(slow) == pytest.approx(0.5e6)
    assert paced_limits({"a": fast, "b": slow}, {"a": 1.0, "b": 1.0}) == {"b": 6}, "10 and 16: 12.6, times .5"
    assert round_trip_rate(survey(UNKNOWN, rate=4e6)) == 4e6, "its download rate is unknown"
    assert round_trip_rate(survey(UNKNOWN, down=4e6)) is None, "its upload rate is unknown"


@pytest.mark.parametrize("rate", [None, 3e5, 1.7e6])
def test_without_rates_or_with_equal_ones_pace_changes_nothing(rate):
    surveys = {name: survey(UNKNOWN, tune_slots=slots, rate=rate) for name, slots in (("x", 6), ("y", 6), ("z", 6))}
    for server_round in (1, 2, 7):
        paced = Flux(eps_start=0.5).assign_experts(surveys, NO_IDLE, server_round, 7)
        assert paced == Flux(eps_start=0.5, pace="own").assign_experts(surveys, NO_IDLE, server_round, 7)


def test_a_slow_device_trains_what_it_can_send_and_explores_the_next_in_utility():
    high = [[0.0] * 7 + [9.0], [5.0, 4.0, 3.0, 2.0, 1.0, 0.5, 0.2, 0.1]]
    surveys = {"slow": survey(high, tune_slots=8, rate=1e6), "fast": survey(high, tune_slots=8, rate=4e6)}
    paced = Flux(eps_start=0.5).assign_experts(surveys, NO_IDLE, 1, 7)
    own = Flux(eps_start=0.5, pace="own").assign_experts(surveys, NO_IDLE, 1, 7)
    assert paced["fast"] == own["fast"]
    assert len(own["slow"].tune) == 4
    assert paced["slow"].tune == ((0, 7), (1, 0)), "times of 4 and 1, their mean 2"
    assert paced["slow"].explore == ((1, 1), (1, 2), *own["slow"].explore)
    backwards = dict(reversed(surveys.items()))
    assert Flux(eps_start=0.5).assign_experts(backwards, NO_IDLE, 1, 7) == paced


def test_a_device_with_room_for_all_trains_all_with_own_pace_and_fewer_with_fleet_pace():
    surveys = {"a": survey(UNKNOWN, tune_slots=16, rate=4e6), "b": survey(UNKNOWN, tune_slots=16, rate=1e6)}
    given = Flux().assign_experts(surveys, NO_IDLE, 1, 7)
    assert (len(given["a"].tune), len(given["b"].tune), len(given["b"].explore)) == (16, 8, 8)


def test_coverage_reaches_slow_devices_too():
    """A device that trains a single expert exchanges it for the idle expert that is most useful to it."""
    flat, fond = [[1.0] * 8] * 2, [[9.0] * 8, [1.0] * 7 + [6.0]]
    surveys = {"fast": survey(flat, tune_slots=6, rate=1e8), "slow": survey(fond, tune_slots=6, rate=1e5)}
    idle = Coverage((np.zeros(8, int), np.array([0, 0, 0, 0, 0, 0, 0, 6])))
    plain = Flux().assign_experts(surveys, idle, 1, 0)
    assert plain["slow"].tune == ((0, 0),)
    balanced = Flux(coverage="balanced").assign_experts(surveys, idle, 1, 0)
    assert balanced["slow"].tune == ((1, 7),)
    assert balanced["fast"] == plain["fast"]


def test_balanced_coverage_assigns_idle_experts_where_they_are_most_useful():
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
    assert "e1" not in merges, "no token trained it: it does not change"
    assert merges["r"].weights == (("a", 10.0), ("b", 10.0))
    assert "e0" not in Flux().plan_merge([sent("a", (10, 5), steps=0)], units)


@pytest.mark.parametrize(
    "options",
    [
        {"eps_start": 0.0}, {"eps_max": 1.5}, {"eps_step": -0.1}, {"merged_share": 2.0}, {"merge_sizes": "some"},
        {"merge_weights": "none"}, {"coverage": "all"}, {"coverage_rounds": 0}, {"probes": -1}, {"explored": -1},
        {"pace": "slow"}, {"pace_factor": 0.0}, {"first_share": 0.0}, {"refresh_rounds": 0},
    ],
)  # fmt: skip
def test_impossible_options_are_named(options):
    (name,) = options
    with pytest.raises(ConfigError, match=rf"flux: option {name} must be .*, found '?{options[name]}\b"):
        Flux(**options)
