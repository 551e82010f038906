"""The model that a client brings, by name, from a checkpoint folder, or from its own code (the setting `model`).

    cnn1 .. cnn5                 the paper's
    FOLDER                       an image classifier of transformers (`image_checkpoint`)
    package.module:function      code of this machine's user (`user_code`), called with those of num_classes, task,
                                 seed and (text) vocab_size that it has parameters for

What the function returns is either a module with ``extractor`` and ``header`` (and ``width``, checked where it is
there), or any classifier, which is taken apart at its last linear layer (`splitting`). Inputs are float32 images
(B, 3, 32, 32) in [-1, 1], or the tensors of a tokenizer by name. Every model is tried on a sample of the client's own
data before it joins, in training and in evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from edgefed.errors import ConfigError, DataError, ModelError, ModelNotFound
from edgefed.methods.fedmoe import IMAGES
from edgefed.personal.batches import Inputs
from edgefed.personal.image_checkpoint import load_image_checkpoint
from edgefed.personal.networks import CNNS, IMAGE_SHAPE, PersonalModel, make_cnn
from edgefed.personal.splitting import CONTRACT, Features, describe_inputs, run, split_model
from edgefed.personal.user_code import build_model, fault_text, is_code

TRIED_EXAMPLES = 4
"""A model is tried on batches of so many and of one fewer: its last batch will be of another size than the others."""


def load_model(
    spec: str, *, task: str, num_classes: int, seed: int, sample: Inputs | None = None, vocab_size: int | None = None
) -> PersonalModel:
    """The model that ``spec`` names, for ``num_classes`` classes; new weights are drawn from ``seed``.

    ``sample``: a batch of the client's data; without one images of 3x32x32 are assumed. ``vocab_size``: that of the
    tokenizer, for text. Raises ConfigError (no such kind of model for the task), ModelNotFound, CheckpointError, and
    ModelError: the code fails, the model has no split point, widths or numbers of classes do not match, or it refuses
    the sample.
    """
    if sample is None:
        if task != IMAGES:
            raise ValueError(f"a model for {task} needs a sample")
        sample = torch.zeros(2, *IMAGE_SHAPE)
    sample = _few(sample)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if is_code(spec) and not Path(spec).exists():
            values = {"num_classes": num_classes, "task": task, "seed": seed}
            return _from_code(spec, values if vocab_size is None else {**values, "vocab_size": vocab_size}, sample)
        if task != IMAGES:
            raise ConfigError(
                f"model {spec!r} is not a package.module:function, which is what a model for {task} is loaded from here"
            )
        if spec in CNNS:
            return checked(make_cnn(spec, num_classes), spec, num_classes, sample)
        if not Path(spec).is_dir():
            raise ModelNotFound(
                f"model {spec!r} is neither a folder here nor a package.module:function",
                remedy=f"Pass {', '.join(CNNS)}, the folder of an image classifier, or package.module:function.",
            )
        extractor, header = load_image_checkpoint(Path(spec), num_classes=num_classes, sample=sample)
        return checked(PersonalModel(extractor, header, header.in_features), spec, num_classes, sample)


def fault_of_users_code(spec: str, error: Exception) -> ModelError | None:
    """What to tell when training with the model of ``spec`` raised ``error``; None where it is no code of a user."""
    if not is_code(spec):
        return None
    return ModelError(f"{spec} fails in training: {fault_text(error)}", remedy="Mend it and join again.")


def checked(model: PersonalModel, name: str, num_classes: int, sample: Inputs) -> PersonalModel:
    """The model, tried on a sample: shapes and number of classes are what they should be. Raises ModelError."""
    _try(model, name, num_classes, sample, training=False)
    _try(model, name, num_classes, _rows(sample, len(_first(sample)) - 1), training=True)
    others = [key for key, value in model.state_dict().items() if not isinstance(value, Tensor)]
    if others:
        raise ModelError(
            f"{name} keeps {others[0]!r} in its state, which is no tensor", remedy="Make it a tensor, or no state."
        )
    return model


def _from_code(spec: str, values: Mapping[str, int | str], sample: Inputs) -> PersonalModel:
    model, num_classes = build_model(spec, values), values["num_classes"]
    extractor, header = getattr(model, "extractor", None), getattr(model, "header", None)
    if not (isinstance(extractor, nn.Module) and isinstance(header, nn.Module)):
        extractor, header = split_model(model, sample, spec)
        return checked(PersonalModel(extractor, header, header.in_features), spec, num_classes, sample)
    parts = {*extractor.parameters(), *header.parameters()}
    outside = [name for name, value in model.named_parameters() if value.requires_grad and value not in parts]
    if outside:
        raise ModelError(
            f"{spec} has parameters that are neither its extractor's nor its header's, {outside[0]!r} first",
            remedy="Move them into one of the two: only extractor and header are called and trained.",
        )
    if isinstance(sample, Mapping):
        extractor = Features(extractor)
    width = getattr(model, "width", None)
    if width is None:
        width = _width(run(extractor, sample, f"{spec}'s extractor"), sample, spec)
    if not isinstance(width, int):
        raise ModelError(
            f"{spec} says its width is {width!r}, not a whole number", remedy="Leave it out, or correct it."
        )
    return checked(PersonalModel(extractor, header, width), spec, num_classes, sample)


def _try(model: PersonalModel, name: str, num_classes: int, sample: Inputs, training: bool) -> None:
    features = run(model.extractor, sample, f"{name}'s extractor", training)
    width = _width(features, sample, name)
    if width != model.width:
        raise ModelError(
            f"{name} says its width is {model.width}, its extractor gives {width} features",
            remedy=f"Set width to {width}, or leave it out: it is measured.",
        )
    logits = run(model.header, features, f"{name}'s header", training)
    if not isinstance(logits, Tensor) or logits.shape[:-1] != features.shape[:-1]:
        raise ModelError(
            f"{name}'s header gives {_shape(logits)} for features of {_shape(features)}, not (..., classes)",
            remedy=CONTRACT,
        )
    if logits.shape[-1] != num_classes:
        raise ModelError(
            f"{name} has {logits.shape[-1]} outputs, the data have {num_classes} classes",
            remedy=f"Give the function a parameter `num_classes`: edgefed calls it with {num_classes}.",
        )
    if num_classes > 1:
        for given, what in ((logits, "probabilities"), (logits.exp(), "logarithms of probabilities")):
            if (given >= 0).all() and torch.allclose(given.sum(-1), torch.ones(given.shape[:-1], dtype=given.dtype)):
                raise ModelError(
                    f"{name}'s header gives {what}, not logits", remedy="Leave out its softmax: cross-entropy has it."
                )


def _width(features: object, sample: Inputs, name: str) -> int:
    """Last dimension of (B, width), or for inputs by name (B, T, width). Raises ModelError for another shape."""
    text = isinstance(sample, Mapping)
    rows = len(_first(sample))
    right = (
        isinstance(features, Tensor) and features.is_floating_point() and features.dim() in ((2, 3) if text else (2,))
    )
    if not right or len(features) != rows:
        wanted = f"({rows}, width) or ({rows}, tokens, width)" if text else f"({rows}, width)"
        raise ModelError(
            f"{name}'s extractor gives {_shape(features)} for {describe_inputs(sample)}, not features {wanted}",
            remedy="Pool or flatten the features at the end of the extractor.",
        )
    return features.shape[-1]


def _few(sample: Inputs) -> Inputs:
    """`TRIED_EXAMPLES` examples, repeated if there are fewer; quick with a large model. Raises DataError."""
    if not len(_first(sample)):
        raise DataError("there is no example to try the model with")
    return _rows(sample, TRIED_EXAMPLES)


def _rows(sample: Inputs, count: int) -> Inputs:
    if isinstance(sample, Mapping):
        return {key: _rows(value, count) for key, value in sample.items()}
    return sample[torch.arange(count) % len(sample)]


def _first(sample: Inputs) -> Tensor:
    return next(iter(sample.values())) if isinstance(sample, Mapping) else sample


def _shape(value: object) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"
