"""An image classifier from a folder that transformers' `save_pretrained` wrote, as a client's model.

The images reach it the way it was trained: normalised by the mean and deviation of its `preprocessor_config.json`, and
enlarged to `image_size` of its `config.json` if it refuses them as they are. Code from a checkpoint is never run.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from edgefed.errors import CheckpointError, ModelError, UnsupportedArchitecture, first_line
from edgefed.personal.splitting import Features, run, split_model

logger = logging.getLogger(__name__)


class Prepared(nn.Module):
    """Images (B, C, H, W) in [-1, 1] -> the model's output, normalised and enlarged before as it wants them.

    ``size``: (height, width), None: as they come. ``mean``, ``deviation``: per channel, of pixels in 0..1.
    """

    def __init__(
        self, model: nn.Module, size: tuple[int, int] | None, mean: Sequence[float], deviation: Sequence[float]
    ):
        super().__init__()
        self.model = model
        self.size = size
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(deviation).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> object:
        pixels = ((images + 1) / 2 - self.mean) / self.deviation
        if self.size is not None:
            pixels = F.interpolate(pixels, self.size, mode="bilinear", align_corners=False, antialias=True)
        return self.model(pixels)


def load_image_checkpoint(folder: Path, *, num_classes: int, sample: Tensor) -> tuple[Features, nn.Linear]:
    """(extractor, header) of the checkpoint. Its header stays if it has ``num_classes`` outputs; otherwise, and where
    the checkpoint has none, a new one is drawn from torch's generator, which is said.

    Raises ModelNotFound, UnsupportedArchitecture, CheckpointError, or ModelError when it cannot take the sample.
    """
    model, missing = _load_classifier(folder)
    mean, deviation = _normalisation(folder, sample.shape[1])
    prepared = Prepared(model, None, mean, deviation)
    prepared.size = _needed_size(prepared, folder, sample)
    names = {parameter: name for name, parameter in model.named_parameters()}
    extractor, header = split_model(prepared, sample, str(folder))
    fresh = {names[parameter] for parameter in header.parameters()}
    if lost := sorted(missing - fresh):
        raise CheckpointError(f"{str(folder)!r} lacks {len(lost)} tensors of the model, the first is {lost[0]!r}")
    if missing or header.out_features != num_classes:
        was = "none" if missing else f"one for {header.out_features} classes"
        logger.warning("%s: a new header for %d classes; the checkpoint has %s", folder, num_classes, was)
        header = nn.Linear(header.in_features, num_classes, bias=header.bias is not None)
    return extractor, header


def _load_classifier(folder: Path) -> tuple[nn.Module, set[str]]:
    """The model in float32, and the names of the parameters that the checkpoint does not have."""
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
        raise CheckpointError(f"the weights of {str(folder)!r} cannot be read: {first_line(error)}") from error
    except (ValueError, TypeError, ImportError) as error:
        raise UnsupportedArchitecture(
            f"{str(folder)!r} holds a {config.model_type}, no image classifier of transformers: {first_line(error)}",
            remedy="Pass the folder of an image classifier, or package.module:function that returns a model.",
        ) from error
    if wrong := sorted(str(entry) for entry in info.get("mismatched_keys") or ()):
        raise CheckpointError(f"{str(folder)!r} has tensors of another shape than config.json says: {wrong[0]}")
    return model, set(info.get("missing_keys") or ())


def _normalisation(folder: Path, channels: int) -> tuple[list[float], list[float]]:
    """Mean and deviation of pixels in 0..1 that the checkpoint wants; without a word, 0.5. Raises CheckpointError."""
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
        raise CheckpointError(f"{str(path)!r}: image_mean and image_std need {channels} numbers, the latter above 0")
    return found


def _needed_size(prepared: Prepared, folder: Path, sample: Tensor) -> tuple[int, int] | None:
    """The size the images must have for the model; None: it takes them. Raises ModelError when no size is taken."""
    try:
        run(copy.deepcopy(prepared), sample, str(folder))  # a pass may change a model for good: Swin's windows shrink
        return None
    except ModelError:
        size = getattr(prepared.model.config, "image_size", None)
        size = (size, size) if isinstance(size, int) else tuple(size or ())
        if len(size) != 2 or size == tuple(sample.shape[2:]):
            raise
    prepared.size = size
    run(prepared, sample, str(folder))
    logger.warning("%s: images are enlarged from %dx%d to %dx%d, which it needs", folder, *sample.shape[2:], *size)
    return size
