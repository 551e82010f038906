"""Operations and bytes of a step, against counts by hand."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgefed.costs.roofline import Op, distinct_experts, forward_pass, training_step
from edgefed.costs.shapes import uniform_shape
from edgefed.costs.step_setup import StepSetup

SHAPE = uniform_shape(
    "small", hidden_size=8, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=4, vocab_size=32, num_experts=4,
    top_k=2, expert_width=16,
)  # fmt: skip
SETUP = StepSetup(batch_size=2, sequence_length=16, dtype="float32")
W = 3 * 8 * 16  # parameters of an expert: 384
TOKENS = 32


def flops(ops) -> float:
    return sum(op.flops for op in ops)


def moved(ops) -> float:
    return sum(op.bytes for op in ops)


def experts_op(ops) -> Op:
    """The largest operation of the layers: their experts."""
    return max(ops, key=lambda op: op.flops)


def test_an_operation_takes_what_its_slower_half_takes():
    assert Op(100.0, 10.0).seconds(50.0, 10.0) == 2.0
    assert Op(100.0, 40.0).seconds(50.0, 10.0) == 4.0


def test_distinct_experts_by_hand():
    assert distinct_experts(4, 2, 1) == 2
    assert distinct_experts(4, 2, 2) == pytest.approx(4 * (1 - 0.25))
    assert distinct_experts(1, 2, 5) == 1
    assert distinct_experts(0, 2, 5) == 0


def test_forward_of_experts_by_hand():
    ops = forward_pass(SHAPE, SETUP, [4, 4], TOKENS).forward
    found = experts_op(ops)
    assert found.flops == 2 * (TOKENS * 2) * W
    weights = distinct_experts(4, 2, TOKENS) * W * 4
    assert found.bytes == pytest.approx(weights + TOKENS * 2 * 4 * (2 * 8 + 3 * 16))


def test_nothing_but_the_output_embedding_is_added_for_logits():
    without, with_logits = (
        forward_pass(SHAPE, SETUP, [4, 4], TOKENS, logits=logits).forward for logits in (False, True)
    )
    assert flops(with_logits) - flops(without) == 2 * TOKENS * 8 * 32


def test_all_tuned_doubles_the_experts_backward_pass():
    """DX and dW: twice the forward pass where gradients flow on, in the first layer, where none do, only part of it."""
    frozen = training_step(SHAPE, SETUP, [4, 4], [0, 0], [0, 0])
    trainable = training_step(SHAPE, SETUP, [4, 4], [4, 4], [1, 1])
    pairs = TOKENS * 2
    first_layer = 2 * pairs * W / 3  # through the down projection only
    assert flops(trainable.backward) - flops(frozen.backward) == pytest.approx(2 * (2 * pairs * W) + first_layer)
    assert flops(trainable.forward) == flops(frozen.forward)


def test_the_optimizer_moves_seven_numbers_a_parameter_and_clipping_three():
    setup = dataclasses.replace(SETUP, router="none")
    step = training_step(SHAPE, setup, [4, 4], [1, 2], [0.5, 0.5])
    assert moved(step.optimizer) == 3 * W * 4 * 10
    eight_bit = training_step(SHAPE, dataclasses.replace(setup, optimizer="adamw_8bit"), [4, 4], [1, 2], [0.5, 0.5])
    assert moved(eight_bit.optimizer) == 3 * W * (3 * 4 + 4 + 3 * 4)


def test_checkpointing_runs_the_layers_once_more_and_a_chunked_loss_the_head():
    plain = training_step(SHAPE, SETUP, [4, 4], [4, 4], [1, 1])
    chunked = training_step(SHAPE, dataclasses.replace(SETUP, chunked_loss=True), [4, 4], [4, 4], [1, 1])
    head = 2 * TOKENS * 8 * 32
    assert flops(chunked.backward) - flops(plain.backward) == head
    again = training_step(SHAPE, dataclasses.replace(SETUP, checkpointing=True), [4, 4], [4, 4], [1, 1])
    assert flops(again.backward) > flops(plain.backward) + 0.99 * (flops(plain.forward) - head)


def test_quantized_weights_are_read_packed_and_for_many_tokens_decoded_once():
    few, many = 8, 512
    plain = experts_op(forward_pass(SHAPE, SETUP, [4, 4], few).forward)
    packed = experts_op(forward_pass(SHAPE, SETUP, [4, 4], few, storage="nf4").forward)
    hit = distinct_experts(4, 2, few)
    assert plain.bytes - packed.bytes == pytest.approx(hit * W * (4 - 0.5625))
    plain = experts_op(forward_pass(SHAPE, SETUP, [4, 4], many).forward)
    packed = experts_op(forward_pass(SHAPE, SETUP, [4, 4], many, storage="nf4").forward)
    assert packed.bytes - plain.bytes == pytest.approx(distinct_experts(4, 2, many) * W * (0.5625 + 2 * 4 - 4))


def test_tuned_experts_are_never_read_packed():
    setup = dataclasses.replace(SETUP, expert_storage="nf4", batch_size=1)
    every = experts_op(training_step(SHAPE, setup, [4, 4], [4, 4], [1, 1]).forward)
    plain = experts_op(
        training_step(SHAPE, dataclasses.replace(setup, expert_storage=None), [4, 4], [4, 4], [1, 1]).forward
    )
    assert every.bytes == plain.bytes


def test_adapters_train_instead_of_weights():
    setup = dataclasses.replace(SETUP, experts="lora", router="none", lora_rank=2)
    step = training_step(SHAPE, setup, [4, 4], [4, 4], [1, 1])
    parameters = 2 * (8 + 32) + 2 * (16 + 8)
    assert moved(step.optimizer) == 8 * parameters * 4 * 10


@given(
    held=st.lists(st.integers(1, 4), min_size=2, max_size=2),
    share=st.floats(0, 1),
    more=st.integers(0, 3),
    batch=st.integers(1, 4),
)
def test_more_work_never_takes_less(held, share, more, batch):
    setup = dataclasses.replace(SETUP, batch_size=batch)
    larger = dataclasses.replace(setup, batch_size=batch + more)
    trainable = [1, 1]
    seconds = [
        sum(op.seconds(1e3, 1e3) for phase in (step.forward, step.backward, step.optimizer) for op in phase)
        for step in (
            training_step(SHAPE, setup, held, trainable, [share, share]),
            training_step(SHAPE, larger, held, trainable, [share, share]),
            training_step(SHAPE, larger, held, held, [1.0, 1.0]),
        )
    ]
    assert seconds[0] <= seconds[1] <= seconds[2]
