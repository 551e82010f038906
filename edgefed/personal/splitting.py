"""Splits a classifier at its last linear layer: the layer is the header, everything before it the extractor.

The layer is found by its function, not by its name (`fc`, `classifier.6`, `heads.head`, `head`): its output is replaced
by random numbers, and the model must return exactly these, in training and in evaluation mode. So there is nothing
between the layer and the logits, neither a softmax nor a dropout. Then the layer is replaced by the identity, and the
model must return what would have been the layer's input.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgefed.errors import ModelError
from edgefed.personal.samples import Inputs
from edgefed.personal.user_code import user_code_errors

CONTRACT = (
    "Return a module with `extractor` and `header` from package.module:function; the header maps features (B, width) "
    "to logits."
)
_LAST_OPERATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "a softmax": lambda x: F.softmax(x, dim=-1),
    "a log-softmax": lambda x: F.log_softmax(x, dim=-1),
    "a sigmoid": torch.sigmoid,
}


class Features(nn.Module):
    """A user's model behind one calling convention.

    A tensor is passed as the first argument, a mapping as keyword arguments. If the model returns an object or a
    mapping with logits, as those of transformers do, the output is the logits.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, inputs: Inputs) -> Any:
        """The output of the model; nothing is known of its type."""
        output = self.model(**inputs) if isinstance(inputs, Mapping) else self.model(inputs)
        if isinstance(output, Mapping) and "logits" in output:
            return output["logits"]
        return getattr(output, "logits", output)


def split_model(model: nn.Module, sample: Inputs, name: str) -> tuple[Features, nn.Linear]:
    """(extractor, header) of a classifier, which is changed in place; ``sample`` has at least two examples.

    The parameters stay the same objects, tied or frozen. Raises ModelError if the model rejects the sample, if there is
    no such layer, or if an operation follows it.
    """
    extractor = Features(model)
    calls = _linear_calls(extractor, sample, name)
    output = run(extractor, sample, name)
    if not isinstance(output, Tensor):
        raise ModelError(
            f"{name} returned {_kind(output)}, not logits", remedy=f"Return the logits, a tensor, or: {CONTRACT}"
        )
    shape = output.shape
    candidates = [layer for layer in reversed(calls) if calls[layer] == [shape]]
    for layer in candidates:
        if all(_is_last(extractor, layer, shape, sample, name, training) for training in (False, True)):
            _remove(extractor, layer)
            _check_features(extractor, layer, sample, name)
            return extractor, layer
    raise _no_split_point(extractor, candidates, shape, sample, name)


@torch.no_grad()
def run(module: nn.Module, inputs: Inputs, name: str, training: bool = False) -> object:
    """The output of the user's module; its modes and buffers are restored. Raises ModelError for any exception."""
    with _restored(module):
        module.train(training)
        remedy = f"Change the model to accept such a batch ({describe_inputs(inputs)}), or convert it in forward."
        with user_code_errors(f"{name} rejects {describe_inputs(inputs)}", remedy):
            output: object = module(inputs)
            return output


def describe_inputs(inputs: Inputs) -> str:
    """Shapes and types of inputs, for a message."""
    if isinstance(inputs, Tensor):
        size = "x".join(map(str, inputs.shape[1:]))
        return f"{len(inputs)} {'images' if inputs.dim() == 4 else 'examples'} of {size} in {_type(inputs)}"
    return ", ".join(f"{key} {'x'.join(map(str, value.shape))} in {_type(value)}" for key, value in inputs.items())


@contextlib.contextmanager
def _restored(module: nn.Module) -> Iterator[None]:
    modes = {part: part.training for part in module.modules()}
    lazy = nn.parameter.UninitializedBuffer
    saved = {name: value.clone() for name, value in module.named_buffers() if not isinstance(value, lazy)}
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training
        for name, value in module.named_buffers():
            if name in saved:
                value.copy_(saved[name])


def _linear_calls(model: nn.Module, sample: Inputs, name: str) -> dict[nn.Linear, list[torch.Size]]:
    """The linear layers that a forward pass calls, in order of their first call, with their output shapes."""
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
    """The model's output when ``layer`` returns ``values``."""
    hook = layer.register_forward_hook(lambda *_: values.clone())
    try:
        return run(model, sample, name, training)
    finally:
        hook.remove()


def _is_last(model: nn.Module, layer: nn.Linear, shape: torch.Size, sample: Inputs, name: str, training: bool) -> bool:
    values = torch.randn(shape, dtype=layer.weight.dtype)
    output = _with_output(model, layer, values, sample, name, training)
    return isinstance(output, Tensor) and output.shape == shape and torch.equal(output, values)


def _remove(model: nn.Module, layer: nn.Module) -> None:
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
                    f"{name} does not return the {layer.in_features} features when its last linear layer is removed",
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
            if isinstance(output, Tensor) and output.shape == shape and torch.allclose(output, function(values)):
                return ModelError(
                    f"{name} ends in {operation}; a model must return logits",
                    remedy="Remove what follows its last linear layer; the cross-entropy applies it.",
                )
        if isinstance(output, Tensor) and torch.equal(output, values):
            return ModelError(
                f"{name} has an operation after its last linear layer that acts only in training, such as dropout",
                remedy="Move it before the layer.",
            )
    return ModelError(
        f"{name} has no split point: none of its torch.nn.Linear layers returns its output {tuple(shape)}",
        remedy=CONTRACT,
    )


def _kind(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
