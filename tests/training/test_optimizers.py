"""AdamW in 16 bits: updates that plain rounding loses, float16's epsilon, and where torch's own is used."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edgefed.training.optimizers import AdamW, needs_stochastic_rounding
from edgefed.training.savings import make_optimizer


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
