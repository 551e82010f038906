"""The baselines, the registry, and the guarantees of every method."""

import dataclasses
from typing import Annotated

import numpy as np
import pytest
from msgspec import Meta

from edgefed.api.new_run import SMALL_MODEL_BYTES, default_experts
from edgefed.embedded import tiny_model_directory
from edgefed.errors import BudgetTooSmall, ConfigError, UnknownMethod
from edgefed.expert_records import ActivationProfile, ExpertPlan, LayerProfile, MergedGroup, Role
from edgefed.methods.averaging import MeanOfHolders, plan_trainable, select_by_score
from edgefed.methods.interface import FIRST_ROUND, Assigning, Contribution, DeviceBudget, ExpertMethod, Profiling
from edgefed.methods.registry import (
    METHODS,
    check_training,
    make_expert_method,
    make_method,
    method_options,
    register,
)
from edgefed.protocol.messages import ExpertReport, TensorInfo, UnitInfo

EXPERTS_PER_LAYER = (4, 6)


def some_record(seed: int = 0) -> ActivationProfile:
    rng = np.random.default_rng(seed)
    layers = []
    for count in EXPERTS_PER_LAYER:
        gates = rng.dirichlet(np.ones(count), size=50)
        chosen = gates >= np.sort(gates, axis=1)[:, -2:-1]
        layers.append(
            LayerProfile(
                num_tokens=50,
                tokens_per_expert=chosen.sum(0).astype(float),
                gate_sum=gates.sum(0),
                gate_max=gates.max(0),
                gate_log_sum=(gates * np.log(gates)).sum(0),
                gate_complement_log_sum=((1 - gates) * np.log(1 - gates)).sum(0),
                routed_gate_sum=(gates * chosen).sum(0),
                neuron_energy=rng.gamma(0.3, size=(count, 24)),
            )
        )
    return ActivationProfile(tuple(layers))


def units() -> list[UnitInfo]:
    def unit(key, kind, layer=-1, expert=-1):
        tensors = (TensorInfo(name="value", dtype="F32", shape=(2,)),)
        return UnitInfo(
            key=key, kind=kind, layer=layer, expert=expert, trainable=True, sha256="", size_bytes=8, tensors=tensors
        )

    experts = [unit(f"{l}.{e}", "expert", l, e) for l, count in enumerate(EXPERTS_PER_LAYER) for e in range(count)]  # noqa: E741
    return [*experts, unit("r0", "router", 0), unit("r1", "router", 1), unit("d", "dense")]


def contribution(client: str, examples: int, keys: list[str]) -> Contribution:
    reports = {}
    for key in keys:
        if "." in key:
            layer, expert = map(int, key.split("."))
            reports[layer, expert] = ExpertReport(
                layer=layer, expert=expert, usage=0.5, importance=0.5, steps=2, tokens=7
            )
    return Contribution(client_id=client, num_examples=examples, experts=reports, units=frozenset(keys))


@pytest.mark.parametrize("name", [name for name, kind in METHODS.items() if not kind.personal])
@pytest.mark.parametrize("budget", [2, 5, 10])
def test_a_plan_fits_the_budget_and_has_an_expert_in_each_layer(name, budget):
    method = make_method(name)
    if method.requirements.all_experts and budget < 10:
        with pytest.raises(BudgetTooSmall, match=f"trains all 10 experts, this device holds {budget}"):
            method.plan_experts(some_record(), EXPERTS_PER_LAYER, DeviceBudget(budget), np.random.default_rng(0))
        return
    plan = method.plan_experts(some_record(), EXPERTS_PER_LAYER, DeviceBudget(budget), np.random.default_rng(0))
    if plan.neurons:
        assert budget - 0.5 < sum(mask.mean(axis=1).sum() for mask in plan.neurons) <= budget
    merged = 0 if plan.neurons else budget - plan.num_resident
    assert merged == (method.merged_slots(budget, EXPERTS_PER_LAYER) if method.merging else 0)
    assert all(len(plan.resident(layer)) >= 1 for layer in range(2))
    assert plan.num_trainable >= 1
    if name != "flux":  # trains few before its upload rate is known
        assert all(len(plan.trainable(layer)) >= 1 for layer in range(2))


@pytest.mark.parametrize("name", METHODS)
def test_merges_only_name_what_was_uploaded_and_ignore_arrival_order(name):
    method = make_method(name)
    clients = [contribution("b", 3, ["0.1", "r0", "d"]), contribution("a", 1, ["0.1", "1.5", "r0", "r1"])]
    merges, reverse = method.plan_merge(clients, units()), method.plan_merge(clients[::-1], units())
    sent = {c.client_id: c.units for c in clients}
    for key, merge in merges.items():
        assert all(key in sent[client] for client, _ in merge.weights)
        assert [client for client, _ in merge.weights] == sorted(client for client, _ in merge.weights)
        assert [np.asarray(w).tolist() for _, w in merge.weights] == [
            np.asarray(w).tolist() for _, w in reverse[key].weights
        ]
    assert set(merges) == (set() if name == "local" else {"0.1", "1.5", "r0", "r1", "d"})


@pytest.mark.parametrize("name", [name for name, kind in METHODS.items() if not kind.personal])
def test_an_expert_gets_no_weight_exactly_where_its_report_does_not_count(name):
    method, rng = make_expert_method(name), np.random.default_rng(0)
    for _ in range(40):
        usage, (steps, tokens) = float(rng.choice([0.0, 0.05, 0.1, 0.13, 0.5])), rng.integers(2, size=2).tolist()
        report = ExpertReport(layer=0, expert=1, usage=usage, importance=0.5, steps=steps, tokens=tokens)
        sent = [Contribution("a", 3, {(0, 1): report}, frozenset({"0.1", "r0"}))]
        assert ("0.1" in method.plan_merge(sent, units())) == (name != "local" and method.counts(report, 4))


def test_fedavg_weights_by_examples():
    merges = make_method("fedavg").plan_merge([contribution("b", 3, ["d"]), contribution("a", 1, ["d"])], units())
    assert merges["d"].weights == (("a", 1.0), ("b", 3.0))


@pytest.mark.parametrize("name", ["fmd", "fmq"])
def test_the_whole_model_baselines_merge_as_fedavg_does(name):
    sent = [contribution("b", 3, ["d", "0.1"]), contribution("a", 1, ["d"])]
    assert make_method(name).plan_merge(sent, units()) == make_method("fedavg").plan_merge(sent, units())


def test_a_method_that_needs_a_mode_of_training_refuses_others():
    check_training(make_method("fmq"), "lora")
    check_training(make_method("fmd"), "full")
    with pytest.raises(ConfigError, match="fmq trains experts as 'lora'; asked for 'full'") as caught:
        check_training(make_method("fmq"), "full")
    assert caught.value.remedy == "Set `train_experts=lora`."


def test_experts_train_by_adapters_unless_the_model_is_small(tmp_path):
    method = make_method("slices")
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(SMALL_MODEL_BYTES)
    assert default_experts(str(tmp_path), method) == ("full", "")
    with (tmp_path / "more.safetensors").open("wb") as file:
        file.truncate(1 << 30)
    assert default_experts(str(tmp_path), method) == ("lora", "the checkpoint has 1.2 GiB")
    assert default_experts("allenai/OLMoE-1B-7B-0924", method)[0] == "lora"
    assert default_experts(str(tiny_model_directory()), method)[0] == "full"
    assert default_experts(str(tiny_model_directory()), make_method("fmq"))[0] == "lora"


def test_random_plans_depend_on_the_generator_only():
    method = make_method("random")

    def draw(seed):
        return method.plan_experts(None, EXPERTS_PER_LAYER, DeviceBudget(5), np.random.default_rng(seed))

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(8)}) > 3


def test_random_covers_every_expert_in_the_long_run():
    method, seen = make_method("random"), set()
    for seed in range(60):
        plan = method.plan_experts(None, EXPERTS_PER_LAYER, DeviceBudget(3), np.random.default_rng(seed))
        seen.update(plan.resident_keys())
    assert len(seen) == sum(EXPERTS_PER_LAYER)


def test_local_chooses_like_hfedmoe_and_exchanges_nothing():
    local, hfedmoe = make_method("local"), make_method("hfedmoe", {"exploration": 0.0})
    arguments = (some_record(), EXPERTS_PER_LAYER, DeviceBudget(5), np.random.default_rng(0))
    assert local.plan_experts(*arguments) == hfedmoe.plan_experts(*arguments)
    assert not local.exchanges


def test_options_are_read_from_text_and_checked():
    assert make_method("hfedmoe", {"lambda": "0.25", "reprofile": "true", "mi": "bernoulli"}).lambda_ == 0.25
    assert method_options("hfedmoe")["tau"] == 0.5
    with pytest.raises(ConfigError, match="no option 'gamma'; its options are lambda=0.5"):
        make_method("hfedmoe", {"gamma": 1})
    assert make_method("flux", {"probes": "2", "eps_start": 1}).probes == 2
    with pytest.raises(ConfigError, match="option probes must be int, found '2.5'"):
        make_method("flux", {"probes": "2.5"})
    with pytest.raises(ConfigError, match="option beta must be float, found 'much'"):
        make_method("hfedmoe", {"beta": "much"})
    with pytest.raises(
        UnknownMethod, match="unknown method 'fedprox'; the methods are hfedmoe, flux, fedmoe, fedavg, fmd, fmq, fmes,"
    ):
        make_method("fedprox")


def test_a_user_defined_method(registry):
    @register
    @dataclasses.dataclass(frozen=True)
    class LargestGate(MeanOfHolders):
        """Train the experts with the largest mean gate probability."""

        sharpness: Annotated[float, Meta(gt=0)] = 1.0

        name = "largest_gate"
        profiling = Profiling()

        def plan_experts(self, profile, experts_per_layer, budget, rng, context=FIRST_ROUND):
            scores = [layer.mean_gate**self.sharpness for layer in profile.layers]
            used = [layer.tokens_per_expert > 0 for layer in profile.layers]
            return plan_trainable(experts_per_layer, select_by_score(scores, used, budget.resident_experts))

        def expert_importance(self, layer):
            return layer.mean_gate

    method = make_expert_method("largest_gate", {"sharpness": "2"})
    assert (method.sharpness, method.profiling, method.merging) == (2.0, Profiling(), None)
    plan = method.plan_experts(some_record(), EXPERTS_PER_LAYER, DeviceBudget(5), np.random.default_rng(0))
    assert plan.num_trainable == 5
    with pytest.raises(ConfigError, match="option sharpness must be above 0, found 0.0"):
        make_method("largest_gate", {"sharpness": 0.0})
    assert register(LargestGate) is LargestGate, "the same class may be registered again"


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"name": "fedavg"}, "name 'fedavg' is already used by edgefed.methods.fedavg.FedAvg"),
        ({"name": "My Method"}, "invalid method name 'My Method'"),
        ({}, "invalid method name None"),
        ({"name": "empty"}, "does not define plan_experts, expert_importance"),
        (
            {"name": "assigns", "assigning": Assigning(), "plan_experts": print, "expert_importance": print},
            "does not define assign_experts",
        ),
    ],
)
def test_an_incomplete_method_is_refused(registry, attributes, message):
    kind = dataclasses.dataclass(frozen=True)(type("Own", (MeanOfHolders,), attributes))
    with pytest.raises(ConfigError, match=message):
        register(kind)
    with pytest.raises(ConfigError, match="derived from neither"):
        register(dataclasses.dataclass(type("Other", (), {"name": "other"})))
    with pytest.raises(TypeError, match="must be a dataclass"):
        register(type("Plain", (), {"name": "plain"}))
    assert registry == METHODS


def test_an_option_has_a_simple_type(registry):
    @dataclasses.dataclass(frozen=True)
    class Odd(ExpertMethod):
        rates: tuple = ()

        name = "odd"

    with pytest.raises(TypeError, match="Odd.rates: options must be bool, int, float, str or Literal"):
        register(Odd)


def test_a_personal_method_has_no_experts_to_plan():
    with pytest.raises(ConfigError, match="clients of 'fedmoe' train models of their own"):
        make_expert_method("fedmoe")
    assert make_method("fedmoe").personal


def test_plan_slots_are_dense_with_trainable_experts_first():
    plan = ExpertPlan.of((6,), trainable=[(4, 1)], frozen=[(0,)])
    assert plan.resident(0).tolist() == [1, 4, 0]
    assert plan.slots(0).tolist() == [2, 0, -1, -1, 1, -1]
    assert (plan.num_resident, plan.num_trainable) == (3, 2)
    assert ExpertPlan.from_dict(plan.to_dict()) == plan
    assert ExpertPlan.full((2, 3), Role.FROZEN).num_trainable == 0
    with pytest.raises(ValueError, match="found 6"):
        ExpertPlan.of((6,), trainable=[(6,)])


def test_members_of_a_merged_expert_share_a_slot_behind_the_others():
    roles = np.array([Role.MERGED, Role.TRAINABLE, Role.MERGED, Role.ABSENT, Role.MERGED, Role.FROZEN], dtype=np.int8)
    plan = ExpertPlan((roles,), ((MergedGroup((0, 4), (0.25, 0.75)), MergedGroup((2,), (1.0,))),))
    assert plan.resident(0).tolist() == [1, 5]
    assert plan.slots(0).tolist() == [2, 0, 3, -1, 2, 1]
    assert (plan.num_resident, plan.num_trainable, plan.num_slots(0)) == (4, 1, 4)
    assert plan.resident_keys() == [(0, expert) for expert in (0, 1, 2, 4, 5)]
    assert ExpertPlan.from_dict(plan.to_dict()) == plan
    assert hash(ExpertPlan.from_dict(plan.to_dict())) == hash(plan)
    with pytest.raises(ValueError, match="others have the role MERGED"):
        ExpertPlan((roles,), ((MergedGroup((0, 2), (0.5, 0.5)),),))
    for experts, weights in (((4, 0), (0.5, 0.5)), ((0, 4), (0.5, 0.6)), ((0,), (0.5, 0.5)), ((), ())):
        with pytest.raises(ValueError, match="merged expert"):
            MergedGroup(experts, weights)


def test_records_add_up_and_survive_json():
    import json

    one, two = some_record(1), some_record(2)
    both = one + two
    assert both.num_tokens == 100
    np.testing.assert_allclose(both.layers[1].gate_sum, one.layers[1].gate_sum + two.layers[1].gate_sum)
    np.testing.assert_array_equal(both.layers[0].gate_max, np.maximum(one.layers[0].gate_max, two.layers[0].gate_max))
    again = ActivationProfile.from_dict(json.loads(json.dumps(both.to_dict())))
    np.testing.assert_array_equal(again.layers[0].gate_log_sum, both.layers[0].gate_log_sum)
    assert again.num_tokens == 100
