"""Takes a classifier apart at its last linear layer: what comes before it is the extractor, the layer is the header.

The layer is found by what it does, not by its name (`fc`, `classifier.6`, `heads.head`, `head`): numbers are put in the
place of its output, and the model must give exactly these numbers, in training and in evaluation. So nothing stands
between it and the logits, neither a softmax nor a dropout. Then it is taken out, and the model must give what would
have gone into it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgefed.errors import ModelError
from edgefed.personal.batches import Inputs
from edgefed.personal.user_code import users_code

CONTRACT = (
    "Let package.module:function return a module with `extractor` and `header`, where the header maps the features "
    "(B, width) to logits."
)
_LAST_OPERATIONS = {"a softmax": F.softmax, "a log-softmax": F.log_softmax, "a sigmoid": lambda x, dim: x.sigmoid()}


class Features(nn.Module):
    """A user's model, called as it wants to be: a tensor is its first argument, a mapping its arguments by name; of an
    object or a mapping that it returns, as transformers' do, the logits are taken.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, inputs: Inputs) -> Tensor:
        output = self.model(**inputs) if isinstance(inputs, Mapping) else self.model(inputs)
        if isinstance(output, Mapping) and "logits" in output:
            return output["logits"]
        return getattr(output, "logits", output)


def split_model(model: nn.Module, sample: Inputs, name: str) -> tuple[Features, nn.Linear]:
    """(extractor, header) of a classifier; ``model`` is changed. ``sample``: a batch of two examples at least.

    Parameters stay the ones they were, tied or frozen. Raises ModelError: the model cannot take the sample, or there
    is no such layer, or something acts on its output.
    """
    extractor = Features(model)
    calls = _linear_calls(extractor, sample, name)
    output = run(extractor, sample, name)
    if not isinstance(output, Tensor):
        raise ModelError(
            f"{name} returned {_kind(output)}, not logits", remedy=f"Return the logits, a tensor. Or: {CONTRACT}"
        )
    shape = output.shape
    candidates = [layer for layer in reversed(calls) if calls[layer] == [shape]]
    for layer in candidates:
        if all(_is_last(extractor, layer, shape, sample, name, training) for training in (False, True)):
            _take_out(extractor, layer)
            _check_features(extractor, layer, sample, name)
            return extractor, layer
    raise _no_split_point(extractor, candidates, shape, sample, name)


@torch.no_grad()
def run(module: nn.Module, inputs: Inputs, name: str, training: bool = False) -> object:
    """What the user's module gives; its modes and buffers stay as they were. Raises ModelError for what it raises."""
    with _left_as_it_was(module):
        module.train(training)
        remedy = (
            f"Make the model for such a batch ({describe_inputs(inputs)}), or convert it at the begin of its forward."
        )
        with users_code(f"{name} cannot take {describe_inputs(inputs)}", remedy):
            return module(inputs)


def describe_inputs(inputs: Inputs) -> str:
    """Shapes and types, for a message."""
    if isinstance(inputs, Tensor):
        size = "x".join(map(str, inputs.shape[1:]))
        return f"{len(inputs)} {'images' if inputs.dim() == 4 else 'examples'} of {size} in {_type(inputs)}"
    return ", ".join(f"{key} {'x'.join(map(str, value.shape))} in {_type(value)}" for key, value in inputs.items())


@contextlib.contextmanager
def _left_as_it_was(module: nn.Module) -> Iterator[None]:
    modes = {part: part.training for part in module.modules()}
    lazy = nn.parameter.UninitializedBuffer
    kept = {name: value.clone() for name, value in module.named_buffers() if not isinstance(value, lazy)}
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training
        for name, value in module.named_buffers():
            if name in kept:
                value.copy_(kept[name])


def _linear_calls(model: nn.Module, sample: Inputs, name: str) -> dict[nn.Linear, list[torch.Size]]:
    """Every linear layer that a pass calls, in the order of the first call, with its outputs' shapes."""
    calls: dict[nn.Linear, list[torch.Size]] = {}

    def record(layer: nn.Linear, _: object, output: Tensor) -> None:
        calls.setdefault(layer, []).append(output.shape)

    hooks = [part.register_forward_hook(record) for part in model.modules() if isinstance(part, nn.Linear)]
    try:
        run(model, sample, name)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _with_output(
    model: nn.Module, layer: nn.Linear, values: Tensor, sample: Inputs, name: str, training: bool
) -> object:
    """The model's output when ``layer`` gives ``values``."""
    hook = layer.register_forward_hook(lambda *_: values.clone())
    try:
        return run(model, sample, name, training)
    finally:
        hook.remove()


def _is_last(model: nn.Module, layer: nn.Linear, shape: torch.Size, sample: Inputs, name: str, training: bool) -> bool:
    values = torch.randn(shape, dtype=layer.weight.dtype)
    output = _with_output(model, layer, values, sample, name, training)
    return isinstance(output, Tensor) and output.shape == shape and torch.equal(output, values)


def _take_out(model: nn.Module, layer: nn.Module) -> None:
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child is layer:
                setattr(parent, key, nn.Identity())


def _check_features(extractor: Features, layer: nn.Linear, sample: Inputs, name: str) -> None:
    """Without its last layer, the model must give what went into that layer. Raises ModelError."""
    seen: list[Tensor] = []

    def record(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])

    hooks = [part.register_forward_pre_hook(record) for part in extractor.modules() if isinstance(part, nn.Identity)]
    try:
        for training in (False, True):
            seen.clear()
            features = run(extractor, sample, f"{name} without its last linear layer", training)
            if not (isinstance(features, Tensor) and any(torch.equal(features, given) for given in seen)):
                raise ModelError(
                    f"{name} does not give the {layer.in_features} features when its last linear layer is taken out",
                    remedy=CONTRACT,
                )
    finally:
        for hook in hooks:
            hook.remove()


def _no_split_point(
    model: nn.Module, candidates: list[nn.Linear], shape: torch.Size, sample: Inputs, name: str
) -> ModelError:
    for layer in candidates:
        values = torch.randn(shape, dtype=layer.weight.dtype)
        output = _with_output(model, layer, values, sample, name, training=False)
        for operation, function in _LAST_OPERATIONS.items():
            if (
                isinstance(output, Tensor)
                and output.shape == shape
                and torch.allclose(output, function(values, dim=-1))
            ):
                return ModelError(
                    f"{name} ends in {operation}; a model gives logits, cross-entropy does the rest",
                    remedy="Leave out what comes after its last linear layer.",
                )
        if isinstance(output, Tensor) and torch.equal(output, values):
            return ModelError(
                f"{name} does something after its last linear layer that it only does in training (a dropout?)",
                remedy="Put it before the layer.",
            )
    return ModelError(
        f"{name} has no split point: no torch.nn.Linear in it gives its output {tuple(shape)}", remedy=CONTRACT
    )


def _kind(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
