"""The memory model against hand-computed numbers, against tensors really allocated, and against its own promises."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgefed.costs.activations import INDEX_BYTES, activations, corrected
from edgefed.costs.memory import (
    STORAGE_BYTES,
    Correction,
    StepSetup,
    compute_budget,
    profiling_memory,
    training_memory,
)
from edgefed.costs.shapes import KNOWN_SHAPES, uniform_shape
from edgefed.costs.step_setup import CORRECTED_MARGIN, MEASURED_BYTES
from edgefed.errors import ConfigError

GIB = 2**30
SMALL = uniform_shape(
    "small", hidden_size=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, vocab_size=100, num_experts=4,
    top_k=2, expert_width=16,
)  # fmt: skip
"""An expert has 8 x 32 + 16 x 8 = 384 numbers, attention 8 x 8 + 2 x 8 x 4 + 8 x 8 = 192, the router 8 x 4 = 32."""
OLMOE = KNOWN_SHAPES["OLMoE-1B-7B"]


def parts(setup: StepSetup, resident: int, trainable: int, shape=SMALL) -> dict[str, int]:
    return training_memory(shape, setup, resident, trainable).parts


def test_a_measured_step_has_room_for_reading_what_was_recorded():
    setup = StepSetup(1, 8, experts="lora")
    plain, measured = (training_memory(OLMOE, setup, 8, 4, measured=found) for found in (False, True))
    each, frozen = MEASURED_BYTES["lora"]
    grown = measured.phases["optimizer"] - plain.phases["optimizer"]
    assert grown == pytest.approx(16 * 4 * (each + frozen), rel=0.02)
    assert {**measured.phases, "optimizer": 0} == pytest.approx({**plain.phases, "optimizer": 0}, rel=1e-3)
    assert measured.total_bytes >= measured.phases["optimizer"]


# --- by hand -----------------------------------------------------------------------------------------------------


def test_weights_and_states_in_full_training():
    found = parts(StepSetup(1, 4, "float32"), resident=3, trainable=1)
    layer = 192 + 32 + 16  # attention, router, two norms
    assert found["dense"] == 4 * (2 * 100 * 8 + 8 + 2 * layer)
    assert found["resident experts"] == 4 * 2 * 2 * 384
    assert found["trainable experts"] == 4 * 2 * 384
    # two moments of one expert and the router in each layer, and a step counter for each of their three tensors
    assert found["optimizer"] == 2 * (2 * 4 * (384 + 32) + 3 * 4)


def test_gradients_at_the_optimizer_phase():
    setup = StepSetup(1, 1, "float32", chunked_loss=True)
    estimate = training_memory(SMALL, setup, 4, 4)
    assert estimate.phase in ("backward", "optimizer")
    largest = 8 * 32 * 4
    static = sum(estimate.parts[name] for name in ("dense", "resident experts", "trainable experts", "optimizer"))
    assert estimate.phases["optimizer"] - estimate.parts["workspace"] == static + 2 * 4 * (4 * 384 + 32) + 3 * largest


def test_lora_states_are_float32_whatever_the_weights_are():
    found = parts(StepSetup(1, 4, "bfloat16", experts="lora", lora_rank=2, router="none"), resident=3, trainable=1)
    adapter = 2 * (8 + 32) + 2 * (16 + 8)
    assert found["trainable experts"] == 2 * (2 * 384 + 4 * adapter)
    assert found["resident experts"] == 2 * 2 * (2 * 384 + 4 * adapter), "a frozen expert carries what others learned"
    assert found["optimizer"] == 2 * (8 * adapter + 4 * 4)


def test_loss_phase_holds_three_float32_copies_of_the_logits():
    estimate = training_memory(OLMOE, StepSetup(1, 512, "bfloat16"), 8, 1)
    assert estimate.phase == "loss"
    assert estimate.parts["logits"] == 12 * 512 * 50304
    chunked = training_memory(OLMOE, StepSetup(1, 512, "bfloat16", chunked_loss=True), 8, 1)
    saved = estimate.total_bytes - estimate.parts["workspace"] - chunked.phases["loss"] + chunked.parts["workspace"]
    assert saved == 12 * 256 * 50304


def test_activations_of_olmoe():
    """Two layers at 512 tokens keep 180.8 MiB when their experts train (measured with saved-tensor hooks)."""
    raw = activations(OLMOE, StepSetup(1, 512, "bfloat16"), (64,) * 16, (64,) * 16)
    assert (raw.outside[1] + raw.inside[1]) * 2 == pytest.approx(180.8 * 2**20, rel=0.05)


def test_native_kernels_keep_the_up_projection_and_nothing_else_of_a_pair():
    """Whoever learns; so a trained expert costs its weights, gradients and moments, and no activations."""
    setup = StepSetup(1, 512, "bfloat16", kernels="native")
    some, all_trainable = (activations(OLMOE, setup, (64,) * 16, (count,) * 16) for count in (1, 64))
    pairs = 512 * 8
    assert some.inside == all_trainable.inside == [pairs * (2 * 2 * 1024 + INDEX_BYTES) + 2 * 512 * 2048] * 16
    reference = activations(OLMOE, StepSetup(1, 512, "bfloat16"), (64,) * 16, (64,) * 16)
    assert all_trainable.inside[0] < 0.4 * reference.inside[0]
    assert all_trainable.outside == reference.outside
    # Their backward pass holds what was kept until the last gradient is made, the reference's lets go on the way.
    moments = training_memory(OLMOE, dataclasses.replace(setup, chunked_loss=True), 64, 64).phases
    assert moments["backward"] > moments["loss"]


def test_quantized_experts_change_nothing_of_what_is_kept():
    for kernels in ("reference", "native"):
        dense = StepSetup(1, 512, kernels=kernels)
        packed = dataclasses.replace(dense, expert_storage="nf4")
        assert activations(OLMOE, dense, (64,) * 16, (4,) * 16) == activations(OLMOE, packed, (64,) * 16, (4,) * 16)


def test_scores_are_not_scaled_by_what_a_step_of_another_length_says():
    shape = uniform_shape(
        "scores", hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=16, vocab_size=100,
        num_experts=4, top_k=2, expert_width=32, scores="float32",
    )  # fmt: skip
    setup = StepSetup(1, 256, "float32")
    raw = activations(shape, setup, (4, 4), (1, 1))
    assert raw.scores == [0, 4 * 4 * 256 * 256], "nothing flows into the first layer's attention"
    half = corrected(raw, Correction(0.5, 0, "a test"))
    expected = CORRECTED_MARGIN * (0.5 * (raw.outside[1] - raw.scores[1]) + raw.scores[1])
    assert half.outside[1] == pytest.approx(expected)


def test_checkpointing_keeps_one_layer_and_the_inputs():
    plain = training_memory(OLMOE, StepSetup(1, 2048, chunked_loss=True), 64, 1)
    again = training_memory(OLMOE, StepSetup(1, 2048, chunked_loss=True, checkpointing=True), 64, 1)
    raw = activations(OLMOE, StepSetup(1, 2048, checkpointing=True), (64,) * 16, (1,) * 16)
    layer = raw.outside[1] + raw.inside[1]
    inputs = 16 * 2048 * 2048 * 2
    assert plain.phases["loss"] - again.phases["loss"] == pytest.approx(1.05 * 16 * layer - inputs, rel=0.04)


def test_quantized_storage():
    assert STORAGE_BYTES["nf4"] == 0.5625
    assert STORAGE_BYTES["nf4_dq"] == pytest.approx(0.51587, abs=1e-5)
    setup = StepSetup(1, 512, expert_storage="nf4_dq", dense_storage="nf4_dq")
    found = parts(setup, 64, 1, OLMOE)
    expert = 3 * 2048 * 1024
    assert expert * STORAGE_BYTES["nf4_dq"] / 2**20 == pytest.approx(3.1, abs=0.05)
    assert found["resident experts"] == pytest.approx(16 * 63 * expert * STORAGE_BYTES["nf4_dq"], abs=1)
    assert found["trainable experts"] == 16 * expert * 2, "what trains in full is not quantized"
    assert found["dense"] / GIB == pytest.approx(0.52, abs=0.005)
    assert found["workspace"] > 0, "weights are decoded somewhere"


@pytest.mark.parametrize(
    ("name", "gib"),
    [("Qwen1.5-MoE-A2.7B", 1.76), ("Qwen3-30B-A3B", 1.62), ("gpt-oss-20b", 2.47), ("Mixtral-8x7B", 1.14)],
)
def test_dense_part_with_nf4_linears(name, gib):
    found = parts(StepSetup(1, 512, dense_storage="nf4_dq"), 1, 1, KNOWN_SHAPES[name])
    assert found["dense"] / GIB == pytest.approx(gib, abs=0.01)


def test_optimizers():
    def states(optimizer: str, device: str = "cpu") -> int:
        return parts(StepSetup(1, 512, optimizer=optimizer, device=device, router="none"), 1, 1, OLMOE)["optimizer"]

    numbers = 16 * 3 * 2048 * 1024
    assert states("adamw") == pytest.approx(4 * numbers, rel=1e-4)
    assert states("adamw_8bit") == pytest.approx(2.03125 * numbers, rel=1e-3)
    assert states("paged_adamw_8bit", "cuda") == 0
    assert states("paged_adamw_8bit", "unified") == states("adamw_8bit"), "there is nowhere to page to"


# --- promises ----------------------------------------------------------------------------------------------------

SETUPS = st.builds(
    StepSetup,
    batch_size=st.integers(1, 8),
    sequence_length=st.integers(1, 600),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    expert_storage=st.sampled_from([None, "int8", "nf4_dq"]),
    dense_storage=st.sampled_from([None, "nf4"]),
    experts=st.sampled_from(["full", "lora", "none"]),
    router=st.sampled_from(["full", "lora", "none"]),
    attention=st.sampled_from(["full", "lora", "none"]),
    lora_rank=st.integers(1, 32),
    optimizer=st.sampled_from(["adamw", "adamw_8bit", "paged_adamw_8bit"]),
    checkpointing=st.booleans(),
    chunked_loss=st.booleans(),
    device=st.sampled_from(["cpu", "cuda", "unified"]),
    kernels=st.sampled_from(["reference", "native"]),
)
CORRECTIONS = st.one_of(
    st.none(),
    st.builds(
        Correction,
        activation_scale=st.floats(0.3, 2),
        overhead_bytes=st.just(0),
        origin=st.just("test"),
        expert_scale=st.floats(0.3, 2),
        loss_scale=st.floats(0.3, 2),
        transient_scale=st.floats(0, 2),
        forward_scale=st.floats(0, 2),
        process_bytes=st.integers(0, 10**6),
    ),
)


@settings(max_examples=150, deadline=None)
@given(SETUPS, CORRECTIONS, st.lists(st.integers(0, 4), min_size=2, max_size=2), st.data())
def test_more_of_anything_never_needs_less(setup, correction, resident, data):
    trainable = [data.draw(st.integers(0, count)) for count in resident]

    def total(setup=setup, resident=resident, trainable=trainable) -> int:
        return training_memory(SMALL, setup, resident, trainable, correction).total_bytes

    before = total()
    layer = data.draw(st.integers(0, 1))
    more = [min(4, count + (index == layer)) for index, count in enumerate(resident)]
    if 2 * trainable[layer] >= more[layer]:  # below, another frozen expert takes tokens away from the trainable ones
        assert total(resident=more) >= before
    both = [min(m, t + (i == layer)) for i, (m, t) in enumerate(zip(more, trainable, strict=True))]
    if 2 * trainable[layer] >= resident[layer]:
        assert total(resident=more, trainable=both) >= before
    assert (
        total(trainable=[min(k, t + (i == layer)) for i, (k, t) in enumerate(zip(resident, trainable, strict=True))])
        >= before
    )
    for name in ("batch_size", "sequence_length", "lora_rank"):
        assert total(setup=dataclasses.replace(setup, **{name: getattr(setup, name) + 1})) >= before
    with_it, without = (dataclasses.replace(setup, chunked_loss=flag) for flag in (True, False))
    assert total(setup=with_it) <= total(setup=without)
    assert sum(training_memory(SMALL, setup, resident, trainable, correction).parts.values()) == before
    estimate = training_memory(SMALL, setup, resident, trainable, correction)
    assert max(estimate.phases.values()) == estimate.total_bytes
    assert min(estimate.parts.values()) >= 0


@settings(max_examples=100, deadline=None)
@given(SETUPS, CORRECTIONS, st.integers(0, 4_000_000))
def test_a_budget_is_never_exceeded_and_never_wasted(setup, correction, usable):
    found = compute_budget(SMALL, setup, usable, correction)
    room = usable - (correction.process_bytes if correction else 0)
    trains = int(setup.experts != "none")

    def total(resident: int, trainable: int) -> int:
        return training_memory(SMALL, setup, resident, trainable, correction).total_bytes

    assert 0 <= found.trainable_per_layer <= found.resident_per_layer <= 4 or not trains
    for count, estimate in (
        (found.profile_per_layer, lambda resident: profiling_memory(SMALL, setup, resident).total_bytes),
        (found.resident_per_layer, lambda resident: total(resident, trains)),
        (found.trainable_per_layer, lambda resident: total(resident, resident)),
    ):
        assert count == 0 or estimate(count) <= room
        if trains and count < 4:
            assert estimate(count + 1) > room
    assert set(found.limits) == {"profile", "resident", "trainable"}
    larger = compute_budget(SMALL, setup, usable + 100_000, correction)
    assert larger.trainable_per_layer >= found.trainable_per_layer


def test_the_limit_is_said_in_words():
    setup = StepSetup(1, 512, checkpointing=True, chunked_loss=True)
    found = compute_budget(OLMOE, setup, 1 * GIB)
    assert (found.profile_per_layer, found.resident_per_layer, found.trainable_per_layer) == (0, 0, 0)
    assert found.limit.startswith("one expert per layer would need ")
    assert "1024.0 MiB are usable" in found.limit
    assert "most of it is dense" in found.limit
    assert compute_budget(OLMOE, setup, 500 * GIB).limit == "nothing: all 64 experts of a layer fit"
    some = compute_budget(OLMOE, setup, 12 * GIB)
    assert 0 < some.trainable_per_layer < some.resident_per_layer <= 64
    assert f"{some.trainable_per_layer + 1} experts per layer would need" in some.limits["trainable"]
    untrained = compute_budget(OLMOE, dataclasses.replace(setup, experts="none"), 12 * GIB)
    assert untrained.trainable_per_layer == 0
    assert untrained.limits["trainable"] == "no expert trains in this run"


def test_budgets_of_known_devices():
    """Experts per layer on idle devices, 512 tokens, NF4 weights: profiled, trained by LoRA of rank 16, kept while one
    trains in full. LoRA numbers are above a sum of everything: gradients and logits do not exist at the same time.
    """
    how = dict(expert_storage="nf4_dq", dense_storage="nf4_dq", checkpointing=True, chunked_loss=True, router="none")
    expected = {
        ("OLMoE-1B-7B", 3.5, "unified"): (58, 35, 45),
        ("OLMoE-1B-7B", 4.1, "cuda"): (64, 43, 56),
        ("Qwen3-30B-A3B", 10.2, "unified"): (77, 45, 65),
        ("gpt-oss-20b", 13.8, "cuda"): (32, 29, 27),
        ("Mixtral-8x7B", 3.5, "unified"): (0, 0, 0),
        ("Mixtral-8x7B", 48.6, "unified"): (8, 8, 6),
        ("Mixtral-8x7B", 129.2, "cuda"): (8, 8, 8),
    }
    for (name, gib, device), numbers in expected.items():
        shape, usable = KNOWN_SHAPES[name], int(gib * GIB)
        lora = StepSetup(1, 512, experts="lora", lora_rank=16, device=device, **how)
        full = StepSetup(1, 512, optimizer="adamw_8bit", device=device, **how)
        found = compute_budget(shape, full, usable)
        by_lora = compute_budget(shape, lora, usable).trainable_per_layer
        assert (found.profile_per_layer, by_lora, found.resident_per_layer) == pytest.approx(numbers, abs=1), name


def test_impossible_counts_are_named():
    setup = StepSetup(1, 8)
    with pytest.raises(ConfigError, match=r"found \[2, 2\] trainable of \[1, 1\] resident"):
        training_memory(SMALL, setup, 1, 2)
    with pytest.raises(ConfigError, match="resident experts of 2 MoE layers are needed"):
        training_memory(SMALL, setup, [1, 1, 1], 1)
    with pytest.raises(ConfigError, match="none negative"):
        training_memory(SMALL, setup, -1, 0)
    assert training_memory(SMALL, setup, 99, 99) == training_memory(SMALL, setup, 4, 4)
    with pytest.raises(
        ConfigError, match="invalid optimizer 'sgd', expected one of adamw, adamw_8bit, paged_adamw_8bit"
    ):
        StepSetup(1, 8, optimizer="sgd")
    with pytest.raises(ConfigError, match="batch_size must be at least 1"):
        StepSetup(0, 8)


def test_streaming_holds_one_expert():
    setup = StepSetup(1, 512)
    streamed = profiling_memory(OLMOE, setup, 0, residency="expert")
    assert streamed.parts["resident experts"] == 3 * 2048 * 1024 * 2
    assert streamed.total_bytes < profiling_memory(OLMOE, setup, 2).total_bytes


def test_needs_no_torch():
    code = "import edgefed.costs.memory, edgefed.costs.shapes, sys; print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
