"""AdamW in 16 bits: updates that plain rounding loses, float16's epsilon, and where torch's own is used."""

from __future__ import annotations

import math
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from edgefed.methods.hfedmoe import HFedMoE
from edgefed.moe.units import TrainScope
from edgefed.protocol.messages import TrainingConfig
from edgefed.training import savings
from edgefed.training.encoding import TokenBlocks
from edgefed.training.loss import batch_loss
from edgefed.training.optimizers import (
    AdamW,
    clip_gradients,
    learning_rate_at,
    moments_of,
    needs_stochastic_rounding,
    resume_moments,
)
from edgefed.training.savings import make_optimizer
from edgefed.training.step_clock import StepClock
from edgefed.training.steps import run_steps

sys.path.insert(0, str(Path(__file__).parent))
import toy_training  # noqa: E402


def train(dtype, learning_rate, steps=40, optimizer=None, seed=0):
    """Weights before and after steps of AdamW with noisy gradients of one sign."""
    generator = torch.Generator().manual_seed(1)
    start = (0.02 * torch.randn(64, 64, generator=generator)).to(dtype)
    weight = nn.Parameter(start.clone())
    make = optimizer or (lambda p: make_optimizer(p, "adamw", learning_rate=learning_rate, weight_decay=0.0, seed=seed))
    trained = make([weight])
    for _ in range(steps):
        weight.grad = (1e-3 * (1 + 0.1 * torch.randn(64, 64, generator=generator))).to(dtype)
        trained.step()
    return start.float(), weight.detach().float()


@pytest.mark.parametrize("learning_rate", [1e-6, 1e-5, 1e-4])
def test_small_rates_move_bfloat16_weights_as_far_as_float32_ones(learning_rate):
    start, after = train(torch.bfloat16, learning_rate)
    _, exact = train(torch.float32, learning_rate)
    expected = (exact - train(torch.float32, learning_rate, steps=0)[1]).mean()
    assert (after - start).mean() == pytest.approx(float(expected), rel=0.05)
    torch_start, lost = train(
        torch.bfloat16, learning_rate, optimizer=lambda p: torch.optim.AdamW(p, lr=learning_rate, weight_decay=0.0)
    )
    if learning_rate <= 1e-5:
        assert abs((lost - torch_start).mean()) < 0.5 * abs(expected)  # what plain rounding leaves


class PlainlyRounded(torch.optim.SGD):
    """With the interface that bitsandbytes' optimizers have for subclasses; a step moves a weight by the rate."""

    def __init__(self, parameters, lr, weight_decay):
        super().__init__(parameters, lr=lr)

    def step(self):
        for group in self.param_groups:
            for index, parameter in enumerate(group["params"]):
                self.update_step(group, parameter, 0, index)

    @torch.no_grad()
    def update_step(self, group, p, gindex, pindex):
        assert p.grad.dtype == p.dtype
        p -= group["lr"] * p.grad.sign()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("eight_bit", ["bitsandbytes", "its interface"])
def test_8_bit_state_loses_no_updates_of_16_bit_weights(monkeypatch, dtype, eight_bit):
    optim = types.SimpleNamespace(AdamW8bit=PlainlyRounded)
    if eight_bit == "bitsandbytes":
        optim = pytest.importorskip("bitsandbytes").optim
    else:
        monkeypatch.setitem(sys.modules, "bitsandbytes", types.SimpleNamespace(optim=optim))
        monkeypatch.setattr(savings, "eight_bit_problem", lambda *_: "")

    def make(name):
        return lambda p: make_optimizer(p, name, learning_rate=1e-5, weight_decay=0.0)

    start, after = train(dtype, 1e-5, optimizer=make("adamw_8bit"))
    assert (after - start).mean() == pytest.approx(-40e-5, rel=0.05)
    if dtype == torch.bfloat16:
        start, plain = train(dtype, 1e-5, optimizer=lambda p: optim.AdamW8bit(p, lr=1e-5, weight_decay=0.0))
        assert abs((plain - start).mean()) < 0.5 * 40e-5  # what it leaves by itself


@pytest.mark.parametrize("gradient", [1e-3, 1e-5, 0.0])
def test_float16_stays_finite_and_moves(gradient):
    weight = nn.Parameter(torch.full((32,), 0.1, dtype=torch.float16))
    optimizer = make_optimizer([weight], "adamw", learning_rate=1e-3, weight_decay=0.0)
    for _ in range(20):
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
    moved = 0.1 - weight.detach().float().mean()
    assert torch.isfinite(weight).all()
    assert float(moved) == pytest.approx(0.02 if gradient else 0.0, rel=0.1, abs=1e-4)
    assert optimizer.state[weight]["exp_avg"].dtype == torch.float16  # no more memory


def test_rounding_depends_on_the_seed_alone():
    assert torch.equal(train(torch.bfloat16, 1e-5)[1], train(torch.bfloat16, 1e-5)[1])
    assert not torch.equal(train(torch.bfloat16, 1e-5, seed=1)[1], train(torch.bfloat16, 1e-5, seed=2)[1])


@pytest.mark.parametrize(
    ("dtype", "learning_rate", "expected"),
    [
        (torch.float32, 1e-9, False),
        (torch.bfloat16, 1e-5, True),
        (torch.bfloat16, 5e-4, False),
        (torch.float16, 5e-4, True),
    ],
)
def test_where_stochastic_rounding_is_used(dtype, learning_rate, expected):
    weight = nn.Parameter((0.02 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))).to(dtype))
    assert needs_stochastic_rounding(weight, learning_rate) is expected
    optimizer = make_optimizer([weight], "adamw", learning_rate=learning_rate, weight_decay=0.0)
    assert isinstance(optimizer, AdamW) is expected


def test_without_rounding_it_is_torchs_adamw_bit_for_bit():
    options = {"lr": 0.01, "weight_decay": 0.1}
    ours = train(torch.float32, 0.0, optimizer=lambda p: AdamW(p, **options))[1]
    theirs = train(torch.float32, 0.0, optimizer=lambda p: torch.optim.AdamW(p, foreach=False, **options))[1]
    assert torch.equal(ours, theirs)
    weight = nn.Parameter(torch.ones(2))
    assert AdamW([weight], **options).step(lambda: 3.0) == 3.0


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("learning_rate", [1e-5, 1e-2])
def test_training_in_float16_follows_float32(tmp_path, mode, learning_rate):
    losses = {}
    for dtype in (torch.float16, torch.float32):
        scope = TrainScope(experts=mode, router="none" if mode == "lora" else "full", lora_rank=4)
        model = toy_training.make_device("olmoe", tmp_path / str(dtype), scope, range(8), dtype=dtype)
        parameters = list(model.trainable_parameters())
        optimizer = make_optimizer(parameters, "adamw", learning_rate=learning_rate, weight_decay=0.01)
        losses[dtype] = []
        for _ in range(12):
            optimizer.zero_grad()
            loss = batch_loss(model.module, *toy_training.batch())
            loss.backward()
            optimizer.step()
            losses[dtype].append(loss.item())
        assert all(torch.isfinite(parameter).all() for parameter in parameters)
    assert losses[torch.float16] == pytest.approx(losses[torch.float32], rel=0.03)


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1]),
        ("constant", 2, [0.25, 0.75, 1, 1]),
        ("linear", 0, [0.875, 0.625, 0.375, 0.125]),
        ("linear", 2, [0.25, 0.75, 0.75, 0.25]),
        ("cosine", 0, [(1 + math.cos(math.pi * x / 8)) / 2 for x in (1, 3, 5, 7)]),
    ],
)
def test_a_schedule_runs_over_the_whole_run(schedule, warmup, expected):
    training = TrainingConfig(learning_rate=2.0, schedule=schedule, warmup_rounds=warmup)
    rates = [learning_rate_at(training, 4, server_round, 0.5) for server_round in (1, 2, 3, 4)]
    assert rates == pytest.approx([2.0 * factor for factor in expected])
    assert learning_rate_at(training, 4, 4, 0.999) > 0


@pytest.mark.parametrize(("max_norm", "expected"), [(0.0, 5.0), (1.0, 1.0), (10.0, 5.0)])
def test_gradients_are_clipped_unless_the_limit_is_0(max_norm, expected):
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    clip_gradients([weight], max_norm)
    assert float(weight.grad.norm()) == pytest.approx(expected)


@pytest.mark.parametrize(("limit_s", "step_s", "steps"), [(10.0, 3.0, 3), (1.0, 3.0, 1), (9.0, 3.0, 3), (0.0, 3.0, 5)])
def test_a_round_has_the_steps_that_its_time_allows(tmp_path, limit_s, step_s, steps):
    model = toy_training.make_device("olmoe", tmp_path, TrainScope(), range(8))
    training = TrainingConfig(local_steps=5, batch_size=2, sequence_length=20, schedule="linear", round_seconds=limit_s)
    rates = []
    outcome = run_steps(
        model, model.plan, HFedMoE(), TokenBlocks(*toy_training.batch(rows=8)), training, compute_share=1.0, seed=1,
        private_step=rates.append, clock=StepClock(limit_s, step_s),
    )  # fmt: skip
    assert (outcome.steps, outcome.num_tokens, outcome.interrupted) == (steps, steps * 2 * 20, False)
    used = [(step + 0.5) / 5 for step in range(steps)]
    if limit_s:
        ends = [max(limit_s, (step + 1) * step_s) for step in range(steps)]
        used = [max(share, (step + 0.5) * step_s / ends[step]) for step, share in enumerate(used)]
        assert rates[-1] > 0
    assert rates == pytest.approx([training.learning_rate * (1 - share) for share in used])


def test_measured_steps_decide_whether_another_one_fits():
    clock = StepClock(10.0)
    for seconds, fits, share in ((6.0, False, 0.75), (1.0, False, 8.75 / 10.5), (0.2, True, 0.84)):
        clock.count(seconds)
        assert clock.has_time is fits
        assert clock.share == pytest.approx(share)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_moments_go_on_as_if_nothing_had_happened(dtype):
    def steps(weight, optimizer, first, last):
        for step in range(first, last):
            weight.grad = torch.randn(16, generator=torch.Generator().manual_seed(step)).to(dtype)
            optimizer.step()

    def make(weight):
        return make_optimizer(
            [weight], "adamw", learning_rate=1e-2 if dtype == torch.float32 else 1e-5, weight_decay=0.1
        )

    whole, parts = (nn.Parameter(torch.ones(16, dtype=dtype)) for _ in range(2))
    optimizer = make(whole)
    steps(whole, optimizer, 0, 6)
    before, after = make(parts), make(parts)
    steps(parts, before, 0, 3)
    kept = {name: value.clone() for name, value in moments_of(before, parts).items()}
    assert resume_moments(after, parts, kept)
    steps(parts, after, 3, 6)
    assert float(after.state[parts]["step"]) == 6
    if dtype == torch.float32:
        assert torch.equal(whole, parts)
        assert all(torch.equal(optimizer.state[whole][name], after.state[parts][name]) for name in ("exp_avg", "step"))
    else:  # rounded at random
        assert set(kept) == {"exp_avg", "exp_avg_root", "step"}
    other = nn.Parameter(torch.ones(4, 4, dtype=dtype))
    assert not resume_moments(make(other), other, kept)
    assert moments_of(make(other), other) == {}


def test_rounds_with_evaluation():
    training = TrainingConfig(evaluate_every=3)
    assert [number for number in range(1, 10) if training.evaluates(number, 9)] == [1, 4, 7, 9]
    assert [training.evaluated_before(number) for number in (4, 7, 9)] == [1, 4, 7]
    assert all(TrainingConfig().evaluates(number, 9) for number in range(1, 10))
    for name, value in (("evaluate_every", 0), ("evaluate_every", 10), ("round_seconds", -1.0)):
        assert f"`{name}` is {value}" in TrainingConfig(**{name: value}).problems(9)[0]
