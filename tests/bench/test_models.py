"""The models that are measured: built at their real width, with fewer layers, and what fits of them."""

import dataclasses

import pytest
import torch

from edgefed.bench import training_step
from edgefed.bench.compute import Stopwatch, expert_forward
from edgefed.bench.models import KNOWN_CONFIGS, build_model, find_model, known_name, shortened
from edgefed.bench.planning import fit_curve, fits_of, upload_bytes
from edgefed.bench.statistics import Sampling
from edgefed.bench.training_step import StepWork, depths, measure_training
from edgefed.costs.memory import StepSetup
from edgefed.costs.shapes import KNOWN_SHAPES
from edgefed.errors import ModelNotFound
from edgefed.hardware.facts import Reading, Reason
from edgefed.kernels.dispatch import why_not_native
from edgefed.kernels.masked_experts import backend_for
from edgefed.moe.model_shape import shape_from_config
from edgefed.moe.units import TrainScope

GIB = 2**30
SHORT = Sampling(repeats=3, limit_s=0.3)


@pytest.mark.parametrize("name", KNOWN_CONFIGS)
def test_a_known_model_is_built_with_the_sizes_that_are_planned_with(name):
    """The configuration for speed and the shape for memory describe the same model."""
    model = find_model(name.upper())
    assert set(KNOWN_CONFIGS) == set(KNOWN_SHAPES)
    assert model.dtype is torch.bfloat16
    built = shape_from_config(model.config)
    assert built.num_parameters == model.shape.num_parameters
    assert (built.experts_per_layer, built.top_k) == (model.shape.experts_per_layer, model.shape.top_k)
    cut = shape_from_config(shortened(model.config, 2))
    assert [layer.parameters_per_expert for layer in cut.layers] == [
        layer.parameters_per_expert for layer in model.shape.layers[:2]
    ]
    assert model.config.get_text_config().num_hidden_layers == len(model.shape.layers)  # the original is untouched


def test_names_are_known_in_any_case_but_only_whole(tmp_path):
    assert known_name("olmoe-1b-7b") == "OLMoE-1B-7B"
    assert known_name("olmoe") is None
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        find_model(str(tmp_path))


def small_model():
    model = find_model("tiny")
    return dataclasses.replace(model, folder=None)  # random weights, as for any other


def test_a_model_of_random_weights_trains_and_profiles_at_two_depths():
    model = small_model()
    setup = StepSetup(batch_size=2, sequence_length=16, dtype="float32")
    work = StepWork(4, 4, 2, 16, memory_bytes=GIB, limit_s=0.3, whole_below_bytes=0)
    assert depths(model, setup, work) == (1, 2)
    missing = Reading.missing(Reason.ABSENT, "nothing")
    entries = list(measure_training(Stopwatch("cpu"), SHORT, model, setup, work, lambda: missing))
    assert [entry.name for entry in entries] == ["train step", "profile", "energy"]
    assert all(entry.derived and entry.median > 0 for entry in entries[:2])
    assert entries[2].verdict == "skipped"
    assert entries[0].params["layers"] == [1, 2]
    assert entries[0].params["layers_of"] == 4


def test_a_slow_step_is_computed_from_small_ones(monkeypatch):
    built = []

    def build(model, depth, resident, trainable, *rest, **options):
        built.append((depth, resident, trainable))
        return build_model(model, depth, resident, trainable, *rest, **options)

    monkeypatch.setattr(training_step, "build_model", build)
    setup = StepSetup(batch_size=8, sequence_length=128, dtype="float32")
    work = StepWork(12, 4, 8, 128, memory_bytes=GIB, limit_s=1e-6, whole_below_bytes=0)
    seconds = training_step.seconds_of_step(Stopwatch("cpu"), SHORT, small_model(), setup, work)
    assert seconds > 0
    top_k = small_model().shape.top_k
    assert built == [(1, top_k, 1), (2, top_k, 1)]


def test_what_is_computed_from_small_steps_is_what_a_linear_step_takes():
    work = StepWork(21, 6, 8, 128, memory_bytes=GIB, limit_s=1, whole_below_bytes=0)
    small = training_step.SmallSteps.of(work, 8)
    assert (small.work.resident, small.work.trainable, small.times) == (8, 1, 16)
    head_s, slope_s, update_s = 0.5, 0.2, 0.1  # of 64 tokens, and of one expert
    parts = [training_step.StepParts(head_s + depth * slope_s, depth * update_s) for depth in (1, 2)]
    assert small.extrapolate(*parts, (1, 2), 16) == pytest.approx(16 * (head_s + 16 * slope_s) + 16 * 6 * update_s)
    everything = training_step.SmallSteps.of(dataclasses.replace(work, trainable=21), 8)
    assert everything.work.trainable == 8


def test_joules_per_token_come_from_the_devices_counter():
    model, count = small_model(), iter(range(10, 10**6, 10))
    setup = StepSetup(batch_size=2, sequence_length=16, dtype="float32")
    work = StepWork(4, 4, 2, 16, memory_bytes=GIB, limit_s=0.3, whole_below_bytes=GIB)
    energy = list(
        measure_training(Stopwatch("cpu"), SHORT, model, setup, work, lambda: Reading.of(float(next(count)), "test"))
    )[2]
    assert energy.measured
    assert energy.median > 0
    assert energy.better == "lower"


def test_nothing_is_built_where_two_layers_do_not_fit():
    setup = StepSetup(batch_size=2, sequence_length=16, dtype="float32")
    work = StepWork(4, 4, 2, 16, memory_bytes=2**20, limit_s=0.3, whole_below_bytes=0)
    with pytest.raises(MemoryError, match="of tiny fit"):
        next(measure_training(Stopwatch("cpu"), SHORT, small_model(), setup, work, lambda: None))


def test_only_planned_experts_are_built():
    moe, plan, _ = build_model(small_model(), 2, 3, 1, TrainScope(), torch.device("cpu"))
    assert len(moe.layers) == 2
    assert not moe.missing()
    assert [(len(plan.resident(layer)), len(plan.trainable(layer))) for layer in range(2)] == [(3, 1), (3, 1)]


def test_experts_are_as_many_as_fit_and_at_least_one():
    shape = dict(hidden_size=64, expert_width=32, num_experts=8, top_k=2, tokens=16, dtype=torch.float32, model="toy")
    one = 3 * 64 * 32 * 4
    entry = expert_forward(Stopwatch("cpu"), SHORT, free_bytes=4 * 5 * one, **shape)
    assert entry.params["experts"] == 5
    assert entry.median > 0
    with pytest.raises(MemoryError):
        expert_forward(Stopwatch("cpu"), SHORT, free_bytes=one, **shape)


@pytest.mark.parametrize(("environment", "kernel"), [("reference", "reference"), ("native", "native"), (None, None)])
def test_the_entry_names_the_kernel_that_ran(monkeypatch, environment, kernel):
    if environment is None:
        monkeypatch.delenv("EDGEFED_KERNELS", raising=False)
        kernel, _ = backend_for("cpu", torch.float32)
    else:
        monkeypatch.setenv("EDGEFED_KERNELS", environment)
    if kernel == "native" and (reason := why_not_native()):
        pytest.skip(reason)
    shape = dict(hidden_size=64, expert_width=32, num_experts=4, top_k=2, tokens=16, dtype=torch.float32, model="toy")
    entry = expert_forward(Stopwatch("cpu"), SHORT, free_bytes=GIB, **shape)
    assert entry.params["kernel"] == kernel


def test_more_memory_never_fits_fewer_experts_and_unknown_memory_fits_nothing():
    for shape in KNOWN_SHAPES.values():
        shares = fit_curve(shape, 100 * GIB, "adamw_8bit", "cuda").shares
        assert list(shares) == sorted(shares)
        assert shares[0] == 0
        assert shares[-1] <= 1
    assert not list(fits_of(shape, "now", None, "adamw", "cpu"))


def test_an_upload_has_the_size_of_the_trained_parameters():
    """One OLMoE expert in bfloat16: 3 * 2048 * 1024 * 2 bytes; its rank 16 adapter: 147456 float32."""
    olmoe = KNOWN_SHAPES["OLMoE-1B-7B"]
    assert upload_bytes(olmoe, "full", 1) == 16 * 3 * 2048 * 1024 * 2
    assert upload_bytes(olmoe, "lora", 64) == 16 * 64 * 16 * (2048 + 2 * 1024 + 1024 + 2048) * 4


def test_fits_name_their_limit():
    fits = {(f.mode, f.storage): f for f in fits_of(KNOWN_SHAPES["Mixtral-8x7B"], "now", 4 * GIB, "adamw_8bit", "cuda")}
    assert len(fits) == 7
    more = {
        f.storage: f for f in fits_of(KNOWN_SHAPES["Mixtral-8x7B"], "now", 8 * GIB, "adamw", "cuda") if f.mode == "lora"
    }
    assert more["nf4 streamed"].experts > more["nf4"].experts
    assert fits["full", "bfloat16"].experts == 0
    assert "would need" in fits["full", "bfloat16"].limit
    assert fits["full", "bfloat16"].upload_bytes is None
