"""What a device brings to FedMoE: labelled data or text, and a model of its own.

A task is opened in two steps. Data and model are read when it is made, so that a bad file is reported before the device
registers. What depends on the run (the shared extractor, its tokenizer) is made when the first round starts.

For text, the run's tokenizer comes with its manifest; the shared extractor reads with it. The device's model reads with
its own tokenizer, or with that of the run if it comes from the user's code.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import shutil
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from edgefed.errors import ConfigError, MalformedMessage, ModelError
from edgefed.methods.fedmoe import IMAGES, NEXT_TOKEN, TASKS, TEXT, extractor_task
from edgefed.personal.extractors import SharedExtractor, make_extractor
from edgefed.personal.glyphs import is_glyphs, load_glyphs
from edgefed.personal.labelled_text import load_labelled_texts
from edgefed.personal.mixture import Gate, LocalMixture
from edgefed.personal.models import load_model
from edgefed.personal.networks import PersonalModel
from edgefed.personal.sample_files import load_images
from edgefed.personal.samples import (
    Inputs,
    Samples,
    check_same_vocabulary,
    held_out_rows,
    hold_out,
    text_samples,
    token_samples,
    tokenize,
)
from edgefed.personal.state import LOCAL_PARTS, MOMENTUM, load_tensors, read_state
from edgefed.personal.text_models import check_causal, load_text_model
from edgefed.personal.user_code import is_code
from edgefed.training.data import load_corpus
from edgefed.training.records import AUTOMATIC, RecordFields
from edgefed.training.tokenizer import load_tokenizer, vocabulary_size

DEFAULT_LENGTH = 128
"""Maximum number of tokens of a text, where the run's sequence length is not known."""


@dataclasses.dataclass(frozen=True)
class OpenTask:
    """A task within a run: both models with their initial weights, and the examples as they read them."""

    shared: SharedExtractor
    own: PersonalModel
    train: Samples
    held_out: Samples
    notes: tuple[str, ...] = ()
    """Messages for the user."""


class PersonalTask(Protocol):
    """Data and model of a device."""

    kind: str
    """One of `TASKS`."""
    identity: str
    """Device and data; seeds everything random."""
    model: str
    """What the device's model was loaded from."""
    num_examples: int
    """Training examples, or records of text."""
    classes: tuple[str, ...]
    """Names of the classes; () for next-token prediction."""
    num_present: int
    """Number of classes of which there are examples; a file may name more."""
    problems: tuple[str, ...]
    """Problems of the data, for the user."""

    def open(self, extractor: str, files: Mapping[str, Path], seed: int, length: int = DEFAULT_LENGTH) -> OpenTask:
        """Prepare for a run with this extractor and these files; texts are truncated to ``length`` tokens.

        Raises ConfigError if the task does not fit the run.
        """
        ...


class ImageTask:
    """Labelled images and a model that classifies them."""

    kind = IMAGES

    def __init__(self, data: str, model: str, name: str, held_out_share: float, resize: bool = False):
        notes: list[str] = []
        samples = load_glyphs(data) if is_glyphs(data) else load_images(data, resize=resize, report=notes.append)
        self.problems = tuple(notes)
        digest = hashlib.sha256(samples.images.tobytes() + samples.labels.tobytes()).hexdigest()
        self.identity, self.model, self.classes = f"{name}/{digest}", model, samples.classes
        self.num_present = len(np.unique(samples.labels))
        self._train, self._held_out = hold_out(samples, held_out_share, seed=0)
        self.num_examples = len(self._train)
        example = self._train.batch(np.arange(min(2, self.num_examples))).own
        self._own = load_model(
            model, task=IMAGES, num_classes=len(samples.classes), seed=seed_of(self.identity), sample=example
        )

    def open(self, extractor: str, files: Mapping[str, Path], seed: int, length: int = DEFAULT_LENGTH) -> OpenTask:
        """Make the shared extractor; the model exists already."""
        check_task(IMAGES, extractor)
        return OpenTask(make_extractor(extractor, seed), self._own, self._train, self._held_out)


def make_task(
    task: str,
    data: str,
    model: str | None,
    name: str,
    held_out_share: float,
    resize: bool = False,
    fields: RecordFields = AUTOMATIC,
) -> PersonalTask:
    """Make a task by name. Raises ConfigError, DataError, ModelError.

    ``resize``: scale images to 32x32. ``fields``: names of the fields of records, for next-token prediction.
    """
    if task not in TASKS:
        raise ConfigError(f"unknown task {task!r}; the tasks are {', '.join(TASKS)}")
    if not model:
        raise ConfigError(
            f"`task={task}` trains a model of your own, and `model` is missing",
            remedy="Set `model` to cnn1 to cnn5 (text: text-gru, text-cnn), package:function, or a checkpoint folder.",
        )
    if task == TEXT:
        return TextTask(data, model, name, held_out_share)
    if task == NEXT_TOKEN:
        return NextTokenTask(data, model, name, held_out_share, fields)
    return ImageTask(data, model, name, held_out_share, resize)


def load_mixture(path: Path, task: PersonalTask, files: Mapping[str, Path]) -> LocalMixture:
    """Load a mixture from a state file (`edgefed.personal.state`), in evaluation mode.

    ``task`` provides the model, ``files`` are those of the run. Raises StateCorrupt, ConfigError.
    """
    tensors, facts = read_state(path)
    opened = task.open(facts["extractor"], files, seed=0)
    width, kind = facts["gate"].split()
    gate = Gate(opened.shared.gate_in, int(width), kind)
    mixture = LocalMixture(opened.shared, copy.deepcopy(opened.own), gate)
    weights = {name: tensor for name, tensor in tensors.items() if not name.startswith(MOMENTUM)}
    load_tensors(mixture, weights, ("shared.", *LOCAL_PARTS))
    return mixture.eval()


def check_task(task: str, extractor: str) -> None:
    """Raise ConfigError unless the run's extractor supports this task."""
    wanted = extractor_task(extractor)
    if wanted != (TEXT if task == NEXT_TOKEN else task):
        raise ConfigError(
            f"the task of this device is {task}, but the run's extractor {extractor} is for {wanted}",
            remedy=f"Join with `task={wanted}` and such data, or a run with another extractor.",
        )


def seed_of(identity: str) -> int:
    """A seed from an identity: the same device with the same data draws the same numbers."""
    return zlib.crc32(identity.encode())


_TRIED = 2
"""Number of examples on which a model of the user's code is tried."""


class TextTask:
    """Labelled texts and a model that classifies them."""

    kind = TEXT

    def __init__(self, data: str, model: str, name: str, held_out_share: float):
        labelled = load_labelled_texts(data)
        self.identity, self.model, self.classes = f"{name}/{labelled.sha256}", model, labelled.classes
        self.problems = tuple(f"line {each.line}: {each.reason}" for each in labelled.problems)
        self._texts, self._labels = labelled.texts, labelled.labels
        self.num_present = len(np.unique(labelled.labels))
        self._train, self._held_out = held_out_rows(labelled.labels, held_out_share, seed=0)
        self.num_examples = len(self._train)
        self._seed = seed_of(self.identity)
        # The user's code is called when the vocabulary of the run is known.
        self._own = None if _is_code(model) else load_text_model(
            model, num_classes=len(self.classes), task=TEXT, seed=self._seed
        )  # fmt: skip

    def open(self, extractor: str, files: Mapping[str, Path], seed: int, length: int = DEFAULT_LENGTH) -> OpenTask:
        """Tokenize every text with both tokenizers."""
        check_task(TEXT, extractor)
        tokenizer = unpack_tokenizer(files)
        own = self._own or own_text_model(
            self.model, len(self.classes), tokenizer, length, self._seed, self._texts[:_TRIED]
        )
        samples = text_samples(
            self._texts, self._labels, self.classes, shared_tokenizer=tokenizer, own_tokenizer=own[1], length=length
        )
        notes = [
            f"{rows.num_truncated} of {len(rows)} texts are truncated to {rows.max_length} tokens of {whose} tokenizer"
            for rows, whose in ((samples.shared, "the run's"), (samples.own, "its own"))
            if rows.num_truncated
        ]
        shared = make_extractor(extractor, seed, vocab_size=vocabulary_size(tokenizer))
        train, held_out = samples.subset(self._train), samples.subset(self._held_out)
        return OpenTask(shared, own[0], train, held_out, tuple(dict.fromkeys(notes)))


class NextTokenTask:
    """Text and a language model that predicts its next tokens."""

    kind = NEXT_TOKEN
    classes: tuple[str, ...] = ()
    num_present = 0

    def __init__(self, data: str, model: str, name: str, held_out_share: float, fields: RecordFields = AUTOMATIC):
        self._corpus = load_corpus(data, held_out_share, 0, fields)
        self.identity, self.model = f"{name}/{self._corpus.sha256}", model
        self.problems = tuple(map(str, self._corpus.problems))
        self.num_examples = len(self._corpus.train)
        self._seed = seed_of(self.identity)
        self._own = None if _is_code(model) else load_text_model(
            model, num_classes=None, task=NEXT_TOKEN, seed=self._seed
        )  # fmt: skip

    def open(self, extractor: str, files: Mapping[str, Path], seed: int, length: int = DEFAULT_LENGTH) -> OpenTask:
        """Divide the text into blocks of ``length`` tokens. Raises ConfigError if the model has another vocabulary."""
        check_task(NEXT_TOKEN, extractor)
        tokenizer = unpack_tokenizer(files)
        vocab_size = vocabulary_size(tokenizer)
        if self._own is not None:
            check_same_vocabulary(tokenizer, self._own[1], self.model)
            length = min(length, self._own[1].model_max_length)
        train, held_out = (
            token_samples(part, tokenizer, length) for part in (self._corpus.train, self._corpus.held_out)
        )
        if self._own is None:
            few = train.batch(np.arange(min(_TRIED, len(train)))).own
            own = _from_code(self.model, NEXT_TOKEN, vocab_size, self._seed, few, tokenizer)
            check_causal(own.extractor, vocab_size, self.model)
        else:
            own = self._own[0]
        shared = make_extractor(extractor, seed, vocab_size=vocab_size, per_token=True)
        return OpenTask(shared, own, train, held_out)


def unpack_tokenizer(files: Mapping[str, Path]) -> Any:
    """Load the run's tokenizer from the files of its manifest. Raises MalformedMessage, ModelNotFound."""
    with tempfile.TemporaryDirectory(prefix="edgefed-tokenizer-") as folder:
        for name, path in files.items():
            if Path(name).name != name:  # a name with a folder could write anywhere
                raise MalformedMessage(f"invalid file name {name[:80]!r} in the manifest: it must not contain a folder")
            shutil.copyfile(path, Path(folder) / name)
        return load_tokenizer(folder)


def own_text_model(
    model: str, num_classes: int, tokenizer: Any, length: int, seed: int = 0, sample: Sequence[str] = ("a b", "c d")
) -> tuple[PersonalModel, Any]:
    """(a client's model that classifies texts, its tokenizer). Code is called with the run's ``tokenizer``.

    It is tried on ``sample``. Raises ConfigError, ModelError, ModelNotFound, CheckpointError.
    """
    if not _is_code(model):
        return load_text_model(model, num_classes=num_classes, task=TEXT, seed=seed)
    few = tokenize(sample, tokenizer, length).batch(np.arange(len(sample)))
    return _from_code(model, TEXT, num_classes, seed, few, tokenizer), tokenizer


def _is_code(model: str) -> bool:
    return is_code(model) and not Path(model).exists()


def _from_code(spec: str, task: str, outputs: int, seed: int, sample: Inputs, tokenizer: Any) -> PersonalModel:
    vocab_size = vocabulary_size(tokenizer)
    model = load_model(spec, task=task, num_classes=outputs, seed=seed, sample=sample, vocab_size=vocab_size)
    with torch.no_grad():
        features = model.eval().extractor(sample)
    wanted = 3 if task == NEXT_TOKEN else 2
    if features.dim() != wanted:
        raise ModelError(
            f"{spec}'s extractor gives {tuple(features.shape)}, `task={task}` needs one vector per "
            f"{'token' if task == NEXT_TOKEN else 'text'}",
            remedy="Pool over the tokens for text, and not for next-token; the function may have a parameter `task`.",
        )
    return model
