"""The model that a client brings: one of the paper's, an image checkpoint, or the user's own code.

    cnn1 .. cnn5                 the paper's
    FOLDER                       an image classifier in the format of transformers' `save_pretrained`
    package.module:function      the user's code on this machine (`user_code`), called with those of num_classes, task,
                                 seed and (text) vocab_size that it has parameters for

The function returns either a module with ``extractor`` and ``header`` (and optionally ``width``, which is checked), or
any classifier, which is split at its last linear layer (`splitting`). Inputs are float32 images (B, 3, 32, 32) in
-1..1, or the tensors of a tokenizer by name. Every model is tried on a sample of the client's data before it joins, in
training and in evaluation mode.

A checkpoint gets images as in its training: normalised by the mean and deviation in `preprocessor_config.json`, and
resized to `image_size` of `config.json` if it rejects them as they are. Code from a checkpoint is never run.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from edgefed.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ModelError,
    ModelNotFound,
    UnsupportedArchitecture,
    first_line,
)
from edgefed.methods.fedmoe import IMAGES
from edgefed.personal.networks import CNNS, IMAGE_SHAPE, PersonalModel, make_cnn
from edgefed.personal.samples import Inputs
from edgefed.personal.splitting import CONTRACT, Features, describe_inputs, run, split_model
from edgefed.personal.user_code import build_model, is_code
from edgefed.training.user_errors import error_text

TRIED_EXAMPLES = 4
"""A model is tried on a batch of this size and on one smaller by one, since the last batch of an epoch is smaller."""


def load_model(
    spec: str, *, task: str, num_classes: int, seed: int, sample: Inputs | None = None, vocab_size: int | None = None
) -> PersonalModel:
    """Load the model that ``spec`` names.

    Args:
        spec: see the module.
        task: "images", "text" or "next-token".
        num_classes: number of logits.
        seed: new weights are drawn from it.
        sample: a batch of the client's data; None: images of 3x32x32.
        vocab_size: of the tokenizer, for text.

    Raises:
        ConfigError: this kind of model does not support the task.
        ModelNotFound, CheckpointError: nothing can be loaded.
        ModelError: the code fails, the model has no split point, widths or classes do not match, or it rejects the
            sample.
    """
    if sample is None:
        if task != IMAGES:
            raise ValueError(f"load_model needs a sample for {task}")
        sample = torch.zeros(2, *IMAGE_SHAPE)
    sample = _few(sample)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if is_code(spec) and not Path(spec).exists():
            values: dict[str, int | str] = {"num_classes": num_classes, "task": task, "seed": seed}
            if vocab_size is not None:
                values["vocab_size"] = vocab_size
            return _from_code(spec, values, num_classes, sample)
        if task != IMAGES:
            raise ConfigError(f"invalid model {spec!r} for {task}: expected package.module:function")
        if spec in CNNS:
            return checked(make_cnn(spec, num_classes), spec, num_classes, sample)
        if not Path(spec).is_dir():
            raise ModelNotFound(
                f"model {spec!r} is neither a folder nor a package.module:function",
                remedy=f"Pass {', '.join(CNNS)}, the folder of an image classifier, or package.module:function.",
            )
        assert isinstance(sample, Tensor)
        extractor, header = load_image_checkpoint(Path(spec), num_classes=num_classes, sample=sample)
        return checked(PersonalModel(extractor, header, header.in_features), spec, num_classes, sample)


def user_model_error(spec: str, error: Exception) -> ModelError | None:
    """The error to report when training with the user's code raised ``error``; None for a model of another kind."""
    if not is_code(spec):
        return None
    return ModelError(f"{spec} failed during training: {error_text(error)}", remedy="Fix the function and join again.")


def checked(model: PersonalModel, name: str, num_classes: int, sample: Inputs) -> PersonalModel:
    """Return the model after a check of its shapes and number of classes on a sample. Raises ModelError."""
    _try(model, name, num_classes, sample, training=False)
    _try(model, name, num_classes, _rows(sample, len(_first(sample)) - 1), training=True)
    others = [key for key, value in model.state_dict().items() if not isinstance(value, Tensor)]
    if others:
        raise ModelError(
            f"the state of {name} holds {others[0]!r}, which is not a tensor",
            remedy="Make it a tensor, or remove it from the state.",
        )
    return model


def _from_code(spec: str, values: Mapping[str, int | str], num_classes: int, sample: Inputs) -> PersonalModel:
    model = build_model(spec, values)
    extractor, header = getattr(model, "extractor", None), getattr(model, "header", None)
    if not (isinstance(extractor, nn.Module) and isinstance(header, nn.Module)):
        extractor, header = split_model(model, sample, spec)
        return checked(PersonalModel(extractor, header, header.in_features), spec, num_classes, sample)
    parts = {*extractor.parameters(), *header.parameters()}
    outside = [name for name, value in model.named_parameters() if value.requires_grad and value not in parts]
    if outside:
        raise ModelError(
            f"{spec} has parameters outside of its extractor and header, such as {outside[0]!r}",
            remedy="Move them into one of the two; only extractor and header are called and trained.",
        )
    if isinstance(sample, Mapping):
        extractor = Features(extractor)
    width = getattr(model, "width", None)
    if width is None:
        width = _features(run(extractor, sample, f"{spec}'s extractor"), sample, spec).shape[-1]
    if not isinstance(width, int):
        raise ModelError(f"the width of {spec} must be an integer, found {width!r}", remedy="Remove it, or correct it.")
    return checked(PersonalModel(extractor, header, width), spec, num_classes, sample)


def _try(model: PersonalModel, name: str, num_classes: int, sample: Inputs, training: bool) -> None:
    features = _features(run(model.extractor, sample, f"{name}'s extractor", training), sample, name)
    width = features.shape[-1]
    if width != model.width:
        raise ModelError(
            f"the width of {name} is {model.width}, but its extractor returns {width} features",
            remedy=f"Set width to {width}, or remove it; it is then measured.",
        )
    logits = run(model.header, features, f"{name}'s header", training)
    if not isinstance(logits, Tensor) or logits.shape[:-1] != features.shape[:-1]:
        raise ModelError(
            f"the header of {name} returns {_shape(logits)} for features of {_shape(features)}, not (..., classes)",
            remedy=CONTRACT,
        )
    if logits.shape[-1] != num_classes:
        raise ModelError(
            f"{name} has {logits.shape[-1]} outputs, but the data has {num_classes} classes",
            remedy=f"Add a parameter num_classes to the function; edgefed calls it with {num_classes}.",
        )
    if num_classes > 1:
        for given, what in ((logits, "probabilities"), (logits.exp(), "log-probabilities")):
            if (given >= 0).all() and torch.allclose(given.sum(-1), torch.ones(given.shape[:-1], dtype=given.dtype)):
                raise ModelError(
                    f"the header of {name} returns {what}, not logits",
                    remedy="Remove its softmax; the cross-entropy applies it.",
                )


def _features(features: object, sample: Inputs, name: str) -> Tensor:
    """Return ``features`` if they are (B, width), or for inputs by name (B, T, width). Raises ModelError otherwise."""
    text = isinstance(sample, Mapping)
    rows = len(_first(sample))
    dims = (2, 3) if text else (2,)
    if (
        isinstance(features, Tensor)
        and features.is_floating_point()
        and features.dim() in dims
        and len(features) == rows
    ):
        return features
    expected = f"({rows}, width) or ({rows}, tokens, width)" if text else f"({rows}, width)"
    raise ModelError(
        f"the extractor of {name} returns {_shape(features)} for {describe_inputs(sample)}, not features {expected}",
        remedy="Pool or flatten the features at the end of the extractor.",
    )


def _few(sample: Inputs) -> Inputs:
    """`TRIED_EXAMPLES` examples, repeated if there are fewer. Raises DataError without any."""
    if not len(_first(sample)):
        raise DataError("the data is empty: no example to try the model on")
    return _rows(sample, TRIED_EXAMPLES)


def _rows(sample: Inputs, count: int) -> Inputs:
    def first(tensor: Tensor) -> Tensor:
        return tensor[torch.arange(count) % len(tensor)]

    return {key: first(value) for key, value in sample.items()} if isinstance(sample, Mapping) else first(sample)


def _first(sample: Inputs) -> Tensor:
    return next(iter(sample.values())) if isinstance(sample, Mapping) else sample


def _shape(value: object) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"


logger = logging.getLogger(__name__)


class Prepared(nn.Module):
    """A checkpoint that takes images (B, C, H, W) in -1..1, normalised and resized as in its training.

    ``size`` is (height, width), or None for the size of the images; ``mean`` and ``deviation`` are per channel, of
    pixels in 0..1.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self, model: nn.Module, size: tuple[int, int] | None, mean: Sequence[float], deviation: Sequence[float]
    ):
        super().__init__()
        self.model = model
        self.size = size
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(deviation).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> object:
        """The output of the checkpoint."""
        pixels = ((images + 1) / 2 - self.mean) / self.deviation
        if self.size is not None:
            pixels = F.interpolate(pixels, self.size, mode="bilinear", align_corners=False, antialias=True)
        return self.model(pixels)


def load_image_checkpoint(folder: Path, *, num_classes: int, sample: Tensor) -> tuple[Features, nn.Linear]:
    """(extractor, header) of a checkpoint.

    Its header is used if it has ``num_classes`` outputs; otherwise a new one is drawn from torch's generator, with a
    warning in the log.

    Raises ModelNotFound, UnsupportedArchitecture, CheckpointError, or ModelError if it rejects the sample.
    """
    model, missing = _load_classifier(folder)
    mean, deviation = _normalisation(folder, sample.shape[1])
    prepared = Prepared(model, None, mean, deviation)
    prepared.size = _needed_size(prepared, folder, sample)
    names = {parameter: name for name, parameter in model.named_parameters()}
    extractor, header = split_model(prepared, sample, str(folder))
    fresh = {names[parameter] for parameter in header.parameters()}
    if lost := sorted(missing - fresh):
        raise CheckpointError(f"missing tensors in {str(folder)!r}: {len(lost)}, the first is {lost[0]!r}")
    if missing or header.out_features != num_classes:
        found = "none" if missing else f"one for {header.out_features} classes"
        logger.warning("%s: new header for %d classes; the checkpoint has %s", folder, num_classes, found)
        header = nn.Linear(header.in_features, num_classes, bias=header.bias is not None)
    return extractor, header


def _load_classifier(folder: Path) -> tuple[nn.Module, set[str]]:
    """The model in float32, and the names of the parameters that are missing in the checkpoint."""
    from transformers import AutoModelForImageClassification

    from edgefed.moe.loading import load_config, without_progress_bars

    config = load_config(folder)
    config.return_dict = True
    try:
        with without_progress_bars():
            model, info = AutoModelForImageClassification.from_pretrained(
                folder, config=config, dtype=torch.float32, output_loading_info=True, trust_remote_code=False,
                local_files_only=True,
            )  # fmt: skip
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"cannot read the weights of {str(folder)!r}: {first_line(error)}") from error
    except (ValueError, TypeError, ImportError) as error:
        raise UnsupportedArchitecture(
            f"{str(folder)!r} is a {config.model_type}, not an image classifier of transformers: {first_line(error)}",
            remedy="Pass the folder of an image classifier, or package.module:function that returns a model.",
        ) from error
    if wrong := sorted(str(entry) for entry in info.get("mismatched_keys") or ()):
        raise CheckpointError(f"tensors of {str(folder)!r} do not have the shapes of its config.json: {wrong[0]}")
    return model, set(info.get("missing_keys") or ())


def _normalisation(folder: Path, channels: int) -> tuple[list[float], list[float]]:
    """Mean and deviation of pixels in 0..1 in the checkpoint's settings; 0.5 by default. Raises CheckpointError."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return [0.5] * channels, [0.5] * channels
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        if not settings.get("do_normalize", True):
            return [0.0] * channels, [1.0] * channels
        mean, deviation = (settings.get(key, [0.5] * channels) for key in ("image_mean", "image_std"))
        found = [float(value) for value in mean], [float(value) for value in deviation]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"cannot read {str(path)!r}: {error}") from error
    if not all(len(values) == channels for values in found) or not all(value > 0 for value in found[1]):
        raise CheckpointError(f"{str(path)!r}: image_mean and image_std must be {channels} numbers, image_std above 0")
    return found


def _needed_size(prepared: Prepared, folder: Path, sample: Tensor) -> tuple[int, int] | None:
    """The size to which images are resized; None if the model takes them unchanged. Raises ModelError otherwise."""
    try:
        run(
            copy.deepcopy(prepared), sample, str(folder)
        )  # a pass may change a model permanently: the windows of Swin shrink
        return None
    except ModelError:
        size = getattr(prepared.model.config, "image_size", None)
        size = (size, size) if isinstance(size, int) else tuple(size or ())
        if len(size) != 2 or size == tuple(sample.shape[2:]):
            raise
    prepared.size = size
    run(prepared, sample, str(folder))
    logger.warning(
        "%s: images are resized from %dx%d to the %dx%d that the model needs", folder, *sample.shape[2:], *size
    )
    return size
