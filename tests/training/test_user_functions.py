"""Functions of the user: what they get, and what is said of one that fails."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from edgefed.errors import ConfigError
from edgefed.training.user_functions import UserFunctions


class Toy(nn.Module):
    """Logits (B, S, 5) from ids."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 5)
        self.device, self.config = torch.device("cpu"), SimpleNamespace(get_text_config=SimpleNamespace)

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.table(input_ids))


IDS = torch.tensor([[1, 2, 3]])


def wrong(result):
    return lambda logits, labels: result


@pytest.mark.parametrize(
    ("result", "found"),
    [(3.0, "found float"), (None, "found NoneType"), (torch.ones(2), r"shape \[2\]"), (torch.ones(()), r"shape \[\]")],
)
def test_a_loss_must_return_a_scalar_with_a_gradient(result, found):
    with pytest.raises(ConfigError, match=f"`loss` .*must return a scalar tensor with a gradient, .*{found}"):
        UserFunctions(loss=wrong(result)).batch_loss(Toy(), IDS, IDS)


def test_a_loss_gets_logits_and_labels():
    model = Toy()
    loss = UserFunctions(loss=lambda logits, labels: (logits.shape[1] + labels[0, 1]) * logits.mean()[None])
    loss.batch_loss(model, IDS, IDS).backward()
    assert model.table.weight.grad.abs().sum() > 0


def test_an_error_of_on_step_names_the_function():
    def show(server_round, step, loss):
        raise KeyError("nothing")

    with pytest.raises(ConfigError, match="`on_step` .*show failed: KeyError: 'nothing' .*test_user_func"):
        UserFunctions(on_step=show).stepped(1, 2, 3.0)


def test_an_evaluation_that_fails_costs_its_numbers_only():
    told: list[str] = []
    model = Toy().train()
    functions = UserFunctions(evaluate=lambda module: {"a": 1, "b": float("nan"), "train_loss": 2.0})
    assert functions.metrics_of(model, {"train_loss": 1.0}, told.append) == {"a": 1.0}
    assert "left out: b, train_loss" in told[0]
    for bad in ((lambda module: 1 / 0), (lambda module: 3), (lambda module: {"a": "x"})):
        assert UserFunctions(evaluate=bad).metrics_of(model, {}, told.append) == {}
    assert "ZeroDivisionError" in told[1]
    assert all("this round has none of its numbers" in each for each in told[1:])
    assert model.training
