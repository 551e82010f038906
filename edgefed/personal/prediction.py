"""Predictions of a FedMoE client's mixture, from its state folder alone: the training data is not needed."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from edgefed.errors import ConfigError, DataError, StateCorrupt
from edgefed.methods.fedmoe import IMAGES, TEXT
from edgefed.personal.extractors import make_extractor
from edgefed.personal.glyphs import is_glyphs, load_glyphs
from edgefed.personal.labelled_text import load_labelled_texts
from edgefed.personal.local_training import Evaluation, evaluate, evaluation_batches
from edgefed.personal.mixture import Gate, LocalMixture
from edgefed.personal.models import load_model
from edgefed.personal.networks import PersonalModel
from edgefed.personal.sample_files import load_image_files, load_images
from edgefed.personal.samples import IntArray, Samples, text_samples
from edgefed.personal.state import LOCAL_PARTS, MOMENTUM, files_folder, load_tensors, newest_state, read_state
from edgefed.personal.tasks import own_text_model
from edgefed.training.tokenizer import load_tokenizer, vocabulary_size


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The most probable class of an example.

    ``probability``: of that class. ``shared_weight``: weight of the shared extractor in the mixture; the rest is the
    device's own.
    """

    label: str
    probability: float
    shared_weight: float


class Predictor:
    """A client's mixture: its own model, the shared extractor and the gate, ready to predict.

    Raises ConfigError if ``state`` has no mixture, or one that predicts no class; StateCorrupt, ModelError,
    ModelNotFound.
    """

    def __init__(self, state: str | Path) -> None:
        path = newest_state(Path(state))
        tensors, facts = read_state(path)
        if "task" not in facts:
            raise StateCorrupt(
                f"{path} does not name its task: an earlier version wrote it", remedy="Join its run for one more round."
            )
        if facts["task"] not in (IMAGES, TEXT):
            raise ConfigError(
                f"the mixture in {state} predicts tokens, not classes", remedy="Predict with a task images or text."
            )
        self.task, self.model = facts["task"], facts["model"]
        self.classes = tuple(facts["classes"].split("\n"))
        self.server_round = int(path.stem.removeprefix("round-"))
        """The last round that the mixture was trained in."""
        self._length = int(facts["length"])
        own: PersonalModel
        if self.task == IMAGES:
            shared = make_extractor(facts["extractor"], 0)
            own = load_model(self.model, task=IMAGES, num_classes=len(self.classes), seed=0)
        else:
            self._tokenizer = load_tokenizer(files_folder(path.parent))
            shared = make_extractor(facts["extractor"], 0, vocab_size=vocabulary_size(self._tokenizer))
            own, self._own_tokenizer = own_text_model(self.model, len(self.classes), self._tokenizer, self._length)
        width, kind = facts["gate"].split()
        self._mixture = LocalMixture(shared, copy.deepcopy(own), Gate(shared.gate_in, int(width), kind))
        weights = {name: tensor for name, tensor in tensors.items() if not name.startswith(MOMENTUM)}
        load_tensors(self._mixture, weights, ("shared.", *LOCAL_PARTS))
        self._mixture.eval()

    @torch.inference_mode()
    def predict(self, inputs: str | Path | Sequence[str | Path]) -> list[Prediction]:
        """Predict texts, or image files; images of another size are scaled to 32x32. Raises DataError."""
        given = [inputs] if isinstance(inputs, (str, Path)) else list(inputs)
        if not given:
            return []
        labels = np.zeros(len(given), np.int64)
        samples: Samples
        if self.task == IMAGES:
            samples = load_image_files([Path(each) for each in given])
        else:
            samples = self._texts([str(text) for text in given], labels)
        found = []
        for batch in evaluation_batches(samples):
            logits, gate = self._mixture(batch)
            probabilities, places = logits.float().softmax(-1).max(-1)
            for place, probability, weights in zip(places, probabilities, gate, strict=True):
                found.append(Prediction(self.classes[int(place)], float(probability), float(weights[0])))
        return found

    @torch.inference_mode()
    def evaluate(self, data: str, *, resize: bool = False) -> Evaluation:
        """Loss and accuracy on labelled examples, as `edgefed join` takes them. Raises DataError."""
        if self.task == TEXT:
            texts = load_labelled_texts(data)
            return evaluate(self._mixture, self._texts(texts.texts, self._numbers(texts.labels, texts.classes, data)))
        images = load_glyphs(data) if is_glyphs(data) else load_images(data, resize=resize)
        images.labels = self._numbers(images.labels, images.classes, data)
        return evaluate(self._mixture, images)

    def _texts(self, texts: Sequence[str], labels: IntArray) -> Samples:
        return text_samples(
            texts, labels, self.classes, shared_tokenizer=self._tokenizer, own_tokenizer=self._own_tokenizer,
            length=self._length,
        )  # fmt: skip

    def _numbers(self, labels: IntArray, classes: tuple[str, ...], data: str) -> IntArray:
        """The labels as numbers of this model's classes."""
        unknown = [name for number, name in enumerate(classes) if name not in self.classes and (labels == number).any()]
        if unknown:
            raise DataError(
                f"{data} has examples of {', '.join(unknown[:5])}; the model knows {', '.join(self.classes[:10])}",
                remedy="Leave these examples out.",
            )
        numbers = np.array([self.classes.index(name) if name in self.classes else -1 for name in classes], np.int64)
        return numbers[labels]
