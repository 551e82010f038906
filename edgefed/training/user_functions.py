"""Functions of the user that take part in training: a loss, a callback of each step, an evaluation of each round.

They are given in Python, on this device, and never travel. What they raise becomes an error, or a message, that names
the function and the place in the user's file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import cast

import torch
from transformers import PreTrainedModel

from edgefed.errors import ConfigError, EdgefedError, first_line
from edgefed.kernels.out_of_memory import is_out_of_memory
from edgefed.training.loss import without_router_loss
from edgefed.training.user_errors import error_text

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
OnStep = Callable[[int, int, float], None]
Evaluate = Callable[[PreTrainedModel], Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class UserFunctions:
    """Functions of the user; None for those that are not given.

    ``loss(logits (B, S, V), labels (B, S))`` returns the training loss, a scalar tensor; position i of the logits
    predicts label i + 1, and labels of -100 do not count. ``on_step(server_round, step, loss)`` is called after each
    step, from 1 on. ``evaluate(model)`` returns numbers by name, of the model in evaluation mode after the steps of a
    round, without gradients.
    """

    loss: Loss | None = None
    on_step: OnStep | None = None
    evaluate: Evaluate | None = None

    def batch_loss(self, module: PreTrainedModel, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The user's loss of a batch. Raises ConfigError for what the function raises or for another result."""
        assert self.loss is not None, "there is a loss"
        input_ids, labels = input_ids.to(module.device), labels.to(module.device)
        with without_router_loss(module):
            logits = cast(torch.Tensor, module(input_ids=input_ids, use_cache=False).logits)
        with user_errors("loss", self.loss):
            loss = self.loss(logits, labels)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
            found = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise ConfigError(
                f"`loss` {name_of(self.loss)} must return a scalar tensor with a gradient, found {found}",
                remedy="Fix the function and join again; finished rounds are kept.",
            )
        return loss.reshape(())

    def stepped(self, server_round: int, step: int, loss: float) -> None:
        """Call ``on_step``. Raises ConfigError for what it raises."""
        if self.on_step is not None:
            with user_errors("on_step", self.on_step):
                self.on_step(server_round, step, loss)

    def metrics_of(
        self, module: PreTrainedModel, taken: Mapping[str, float], report: Callable[[str], None]
    ) -> dict[str, float]:
        """The finite numbers of ``evaluate``. What it raises is reported, so that no trained round is lost."""
        if self.evaluate is None:
            return {}
        was_training = module.training
        module.train(False)
        try:
            with user_errors("evaluate", self.evaluate), torch.no_grad():
                found = {str(name): float(value) for name, value in self.evaluate(module).items()}
        except Exception as error:
            if not isinstance(error, ConfigError) and not is_out_of_memory(error):
                raise
            report(f"{first_line(error)}; this round has none of its numbers")
            return {}
        finally:
            module.train(was_training)
        if refused := sorted(name for name, value in found.items() if name in taken or not math.isfinite(value)):
            report(f"`evaluate`: not finite, or a name of edgefed's own, and left out: {', '.join(refused)}")
        return {name: value for name, value in found.items() if name not in refused}


NONE = UserFunctions()


def name_of(function: object) -> str:
    """How the user knows a function."""
    return str(getattr(function, "__qualname__", None) or type(function).__qualname__)


@contextlib.contextmanager
def user_errors(setting: str, function: object) -> Iterator[None]:
    """Turn what a function of the user raises into a ConfigError that names it, except for lack of memory."""
    try:
        yield
    except Exception as error:
        if isinstance(error, EdgefedError) or is_out_of_memory(error):
            raise
        raise ConfigError(
            f"`{setting}` {name_of(function)} failed: {error_text(error)}",
            remedy="Fix the function and join again; finished rounds are kept.",
        ) from error
