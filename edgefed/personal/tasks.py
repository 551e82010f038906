"""What a device brings to FedMoE: its labelled data and a model of its own (`edgefed join --task ... --model ...`).

A task is opened in two steps. Data and model are read when it is made, so that a bad file is told before the server
hears of the device; what needs the run (the shared extractor, its tokenizer) is made when the first round begins.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from edgefed.embedded.glyphs import is_glyphs, load_glyphs
from edgefed.errors import ConfigError
from edgefed.methods.fedmoe import IMAGES, NEXT_TOKEN, TASKS, TEXT, extractor_task
from edgefed.personal.batches import Samples, hold_out
from edgefed.personal.extractors import SharedExtractor, make_extractor
from edgefed.personal.gate import Gate
from edgefed.personal.mixture import LocalMixture
from edgefed.personal.models import load_model
from edgefed.personal.networks import PersonalModel
from edgefed.personal.sample_files import load_images
from edgefed.personal.state import LOCAL_PARTS, MOMENTUM, load_tensors, read_state

DEFAULT_LENGTH = 128
"""Tokens of a text that are looked at, where the run's --sequence-length is not known."""


@dataclasses.dataclass(frozen=True)
class OpenTask:
    """A task within a run: the shared extractor, its weights still the seed's, and examples as both models see them.
    ``notes``: what the user should hear of it."""

    shared: SharedExtractor
    own: PersonalModel
    train: Samples
    held_out: Samples
    notes: tuple[str, ...] = ()


class PersonalTask(Protocol):
    """``identity`` names the device and its data; it seeds what is random. ``model`` is what ``own`` was made from."""

    identity: str
    model: str
    num_examples: int
    classes: tuple[str, ...]
    problems: tuple[str, ...]

    def open(self, extractor: str, files: Mapping[str, Path], seed: int, length: int = DEFAULT_LENGTH) -> OpenTask:
        """For the run of ``extractor``, whose files are named by ``files``; text is cut at ``length`` tokens.
        Raises ConfigError when it does not fit."""
        ...


class ImageTask:
    """Images and a classifier of them."""

    def __init__(self, data: str, model: str, name: str, held_out_share: float, resize: bool = False):
        notes: list[str] = []
        samples = load_glyphs(data) if is_glyphs(data) else load_images(data, resize=resize, tell=notes.append)
        self.problems = tuple(notes)
        digest = hashlib.sha256(samples.images.tobytes() + samples.labels.tobytes()).hexdigest()
        self.identity, self.model, self.classes = f"{name}/{digest}", model, samples.classes
        self._train, self._held_out = hold_out(samples, held_out_share, seed=0)
        self.num_examples = len(self._train)
        example = self._train.batch(np.arange(min(2, self.num_examples))).own
        self._own = load_model(
            model, task=IMAGES, num_classes=len(samples.classes), seed=seed_of(self.identity), sample=example
        )

    def open(self, extractor: str, files: Mapping[str, Path], seed: int, length: int = DEFAULT_LENGTH) -> OpenTask:
        """The extractor of ``extractor``, beside the model made before."""
        check_task(IMAGES, extractor)
        return OpenTask(make_extractor(extractor, seed), self._own, self._train, self._held_out)


def make_task(
    task: str, data: str, model: str | None, name: str, held_out_share: float, resize: bool = False
) -> PersonalTask:
    """A task by name. ``resize``: scale images of another size. Raises ConfigError, DataError, ModelError."""
    if task not in TASKS:
        raise ConfigError(f"there is no task {task!r}; the tasks are {', '.join(TASKS)}")
    if not model:
        raise ConfigError(
            f"--task {task} trains a model of yours, and --model is missing",
            remedy="Pass --model cnn1 to cnn5 (text: text-gru, text-cnn), package:function, or a checkpoint folder.",
        )
    if task != IMAGES:
        from edgefed.personal import text_tasks  # with transformers, which images do without

        kind = text_tasks.TextTask if task == TEXT else text_tasks.NextTokenTask
        return kind(data, model, name, held_out_share)
    return ImageTask(data, model, name, held_out_share, resize)


def load_mixture(path: Path, task: PersonalTask, files: Mapping[str, Path]) -> LocalMixture:
    """The mixture in a state file (`edgefed.personal.state`), in evaluation mode: a model of ``task``'s own kind, with
    the weights of the file. ``files``: those of the run. Raises StateCorrupt, ConfigError."""
    tensors, facts = read_state(path)
    opened = task.open(facts["extractor"], files, seed=0)
    width, kind = facts["gate"].split()
    gate = Gate(opened.shared.gate_in, int(width), kind)
    mixture = LocalMixture(opened.shared, copy.deepcopy(opened.own), gate)
    weights = {name: tensor for name, tensor in tensors.items() if not name.startswith(MOMENTUM)}
    load_tensors(mixture, weights, ("shared.", *LOCAL_PARTS))
    return mixture.eval()


def check_task(task: str, extractor: str) -> None:
    """Raise ConfigError unless the run's extractor is for this task."""
    wanted = extractor_task(extractor)
    if wanted != (TEXT if task == NEXT_TOKEN else task):
        raise ConfigError(
            f"this device has {task}, the run's extractor {extractor} is for {wanted}",
            remedy=f"Join with --task {wanted} and such data, or a run with another extractor.",
        )


def seed_of(identity: str) -> int:
    """A seed from an identity: the same device with the same data draws the same again."""
    return zlib.crc32(identity.encode())
