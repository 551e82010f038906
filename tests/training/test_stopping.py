"""The sequential test that ends a profile: when it stops, what it estimates, and what it never does."""

import dataclasses
import functools
import operator

import numpy as np
import pytest

from edgefed.expert_records import ActivationProfile, ExpertPlan, LayerProfile, MergedGroup, Role
from edgefed.training.profiling import activation_error
from edgefed.training.stopping import (
    FIRST_BLOCKS,
    FIRST_TOKENS,
    MAX_FREQUENCY_ERROR,
    SequentialTest,
    Sufficiency,
    num_first_blocks,
    plan_agreement,
    slice_agreement,
)

TOKENS = 128
EXPERTS, TOP_K = 32, 4


def block_of(counts):
    counts = np.asarray(counts, dtype=np.float64)
    return ActivationProfile((LayerProfile(TOKENS, counts, counts, counts, -counts, -counts, counts),))


def text(shares, num_blocks, seed, burst=2):
    """Blocks whose tokens choose experts by ``shares``, ``burst`` tokens alike: blocks differ as those of texts do."""
    rng = np.random.default_rng(seed)
    return [block_of(burst * rng.multinomial(TOKENS * TOP_K // burst, shares)) for _ in range(num_blocks)]


def best(count):
    """The choice of the ``count`` most frequent experts."""

    def choice(profile):
        order = np.argsort(-profile.layers[0].tokens_per_expert, kind="stable")
        return ExpertPlan.of(profile.experts_per_layer, [order[:count]])

    return choice


def run(blocks, choice, agreement=0.95, seed=0):
    """(blocks that were profiled, the test)."""
    test = SequentialTest(len(blocks), TOKENS, choice, agreement, seed)
    done = 0
    while more := test(blocks[:done]):
        done += more
    return done, test


def added(blocks):
    return functools.reduce(operator.add, blocks)


CLEAR = np.repeat([4.0, 1.0], [8, 24])
RAMP = np.linspace(1.0, 6.0, EXPERTS)
CLOSE = np.linspace(1.0, 1.3, EXPERTS)


def test_a_clear_choice_ends_the_profile_early():
    blocks = text(CLEAR / CLEAR.sum(), 128, seed=1)
    done, test = run(blocks, best(8))
    assert done <= 32
    assert test.result.num_tokens == done * TOKENS
    assert test.result.total_tokens == 128 * TOKENS
    assert plan_agreement(best(8)(added(blocks[:done])), best(8)(added(blocks))) >= 0.95
    assert activation_error(added(blocks[:done]), added(blocks)) < MAX_FREQUENCY_ERROR


def test_a_close_choice_takes_more_text_than_a_clear_one():
    clear, _ = run(text(CLEAR / CLEAR.sum(), 128, seed=1), best(8))
    close, test = run(text(CLOSE / CLOSE.sum(), 128, seed=1), best(8))
    assert close > 2 * clear
    assert test.result.agreement - test.result.agreement_spread >= 0.95


def test_frequencies_must_be_known_whatever_the_choice():
    """A choice that never changes still needs frequencies, which weigh merged experts and go to the aggregator."""
    everything = functools.partial(ExpertPlan.full, [EXPERTS])
    few, _ = run(text(CLEAR / CLEAR.sum(), 128, seed=2, burst=1), lambda profile: everything())
    many, test = run(text(CLEAR / CLEAR.sum(), 128, seed=2, burst=64), lambda profile: everything())
    assert many > few
    assert test.result.agreement == 1
    assert test.result.frequency_error + test.result.error_spread <= MAX_FREQUENCY_ERROR


def test_estimates_are_as_large_as_the_real_differences():
    """Means over texts: the estimate of a stage against what the rest of the text shows."""
    real, estimated, errors, estimated_errors = [], [], [], []
    for seed in range(20):
        blocks = text(RAMP / RAMP.sum(), 64, seed=seed)
        test = SequentialTest(len(blocks), TOKENS, best(12), 0.999, seed)
        test(blocks[:16])
        part, whole = added(blocks[:16]), added(blocks)
        real.append(plan_agreement(best(12)(part), best(12)(whole)))
        errors.append(activation_error(part, whole))
        estimated.append(test.result.agreement)
        estimated_errors.append(test.result.frequency_error)
    assert 0.8 < np.mean(real) < 0.95  # the texts are such that it matters
    assert np.mean(estimated) == pytest.approx(np.mean(real), abs=0.05)
    assert np.mean(estimated_errors) == pytest.approx(np.mean(errors), rel=0.15)


def test_the_same_text_and_seed_give_the_same_result():
    blocks = text(CLEAR / CLEAR.sum(), 96, seed=4)
    first, again, other = (run(blocks, best(8), seed=seed)[1].result for seed in (5, 5, 6))
    assert first == again
    assert other != first


def test_one_takes_everything():
    done, test = run(text(CLEAR / CLEAR.sum(), 40, seed=1), best(8), agreement=1.0)
    assert done == 40
    assert test.result == Sufficiency(40 * TOKENS, 40 * TOKENS)
    assert test.result.uses_all
    assert str(test.result) == "all 5,120 tokens"


@pytest.mark.parametrize("num_blocks", [1, 3, 8, 17])
def test_short_texts_are_taken_whole_or_end_at_a_stage(num_blocks):
    done, test = run(text(CLOSE / CLOSE.sum(), num_blocks, seed=0), best(8))
    assert done == num_blocks
    assert test.result.agreement == 1
    assert test.result.frequency_error == 0


def test_a_first_stage_has_enough_tokens_and_blocks():
    assert num_first_blocks(1000, 128) == FIRST_TOKENS // 128
    assert num_first_blocks(1000, 2048) == FIRST_BLOCKS
    assert num_first_blocks(5, 128) == 5


def test_stages_grow_within_limits_and_are_announced():
    stages = []
    blocks = text(CLOSE / CLOSE.sum(), 512, seed=3)
    test = SequentialTest(len(blocks), TOKENS, best(8), 0.999, 0, stages.append)
    done = 0
    while more := test(blocks[:done]):
        assert not done or 1.2 * done <= done + more <= 2 * done or done + more == len(blocks)
        done += more
    assert done == len(blocks)
    assert sum(stages) == done * TOKENS


def test_agreement_counts_experts_with_their_roles():
    expected = ExpertPlan.of([4], [[0, 1]], [[2]])
    assert plan_agreement(expected, expected) == 1
    assert plan_agreement(ExpertPlan.of([4], [[0, 2]], [[1]]), expected) == pytest.approx(1 / 3)
    assert plan_agreement(ExpertPlan.of([4], [[3]]), expected) == 0
    merged = ExpertPlan(
        (np.array([Role.TRAINABLE, Role.MERGED, Role.MERGED, Role.ABSENT], dtype=np.int8),),
        ((MergedGroup((1, 2), (0.5, 0.5)),),),
    )
    assert plan_agreement(ExpertPlan.of([4], [[0]]), merged) == 1  # merged experts do not count


def test_agreement_of_slices_is_what_their_neurons_add():
    profile = with_energy(added(text(CLEAR / CLEAR.sum(), 1, seed=0)), [[16.0, 9.0], [4.0, 1.0]])

    best_two = slices([[1, 1], [0, 0]])
    assert slice_agreement(best_two, best_two, profile) == 1
    assert slice_agreement(slices([[1, 0], [1, 0]]), best_two, profile) == pytest.approx((4 + 2) / (4 + 3))
    assert slice_agreement(slices([[1, 1], [1, 0]]), best_two, profile) == 1


def slices(mask):
    mask = np.array(mask, dtype=np.bool_)
    return ExpertPlan((np.where(mask.any(axis=1), Role.TRAINABLE, Role.ABSENT).astype(np.int8),), neurons=(mask,))


def with_energy(profile, energy):
    layer = dataclasses.replace(profile.layers[0], neuron_energy=np.array(energy))
    return ActivationProfile((layer,))


@pytest.mark.parametrize(("noise", "ends"), [(0.5, True), (4.0, False)])
def test_slices_end_when_their_neurons_add_as_much(noise, ends):
    """Of groups of blocks, whose energies vary by ``noise`` between blocks."""
    rng = np.random.default_rng(0)
    energy = rng.lognormal(0.0, 1.5, (EXPERTS, 16))
    blocks = [
        with_energy(block, energy * rng.lognormal(0.0, noise, energy.shape))
        for block in text(CLEAR / CLEAR.sum(), 128, seed=1)
    ]

    def half(profile):
        found = profile.layers[0].neuron_energy
        return slices(found > np.median(found))

    test, done = SequentialTest(len(blocks), TOKENS, half, 0.95), 0
    while more := test([added(blocks[:done][group::8]) for group in range(8) if done]):
        done += more
    assert (done < len(blocks)) == ends
    agreement = slice_agreement(half(added(blocks[:done])), half(added(blocks)), added(blocks))
    assert agreement >= 0.95
    assert agreement == pytest.approx(test.result.agreement, abs=0.03)


def test_the_sentence_for_a_person():
    found = Sufficiency(2048, 16384, 0.974, 0.0613)
    assert str(found) == (
        "2,048 of 16,384 tokens (estimated from these: the plan agrees to 97 % with that of all tokens, "
        "frequencies to 6.1 %)"
    )
    assert not found.uses_all
    assert dataclasses.replace(found, num_tokens=16384).uses_all
