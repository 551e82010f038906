"""The shared extractors G(theta) that travel: small, the same for every client, known by name.

An extractor is made from its name and a seed alone (for text also from the size of the run's vocabulary), on the
aggregator and on a client; only its tensors cross the wire.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from edgefed.methods.fedmoe import IMAGES, TEXT, extractor_task
from edgefed.personal.batches import Inputs
from edgefed.personal.networks import CNNS, IMAGE_SHAPE, cnn_features
from edgefed.personal.text_encoder import TEXT_SMALL, EncoderShape, TextEncoder, masked_mean, running_mean

EXTRACTOR_UNIT = "extractor"
"""Key of the one unit that theta is on the wire."""


class SharedExtractor(nn.Module):
    """inputs -> (B, width), or (B, T, width) for one answer per token. ``gate_features``: what the gate sees of an
    input, flat (B, gate_in); per token (B, T, gate_in).
    """

    task: str
    width: int
    gate_in: int

    def gate_features(self, inputs: Inputs) -> Tensor:
        raise NotImplementedError


class CnnExtractor(SharedExtractor):
    """The extractor of one of the paper's CNNs, for 32x32 RGB images; 665,048 parameters for cnn5."""

    task = IMAGES

    def __init__(self, name: str):
        super().__init__()
        shape = CNNS[name]
        self.features = cnn_features(shape)
        self.width = shape.hidden[1]
        channels, height, width = IMAGE_SHAPE
        self.gate_in = channels * height * width

    def forward(self, inputs: Tensor) -> Tensor:
        return self.features(inputs)

    def gate_features(self, inputs: Tensor) -> Tensor:
        """The image itself, flat."""
        return inputs.flatten(1)


class TextExtractor(SharedExtractor):
    """`TextEncoder` over the aggregator's tokens; inputs {"input_ids", "attention_mask"}, (B, T) each, padding last.

    ``per_token``: one vector per token, for next-token prediction, and neither it nor what the gate sees with it
    depends on later tokens; otherwise the mean over the text, for classification.
    """

    task = TEXT

    def __init__(self, vocab_size: int, per_token: bool = False, shape: EncoderShape = TEXT_SMALL):
        super().__init__()
        self.encoder = TextEncoder(vocab_size, shape)
        self.per_token = per_token
        self.width = self.gate_in = shape.width

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        mask = inputs["attention_mask"]
        hidden = self.encoder(inputs["input_ids"], mask, causal=self.per_token)
        return hidden if self.per_token else masked_mean(hidden, mask)

    def gate_features(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Mean of the tokens' embeddings, detached: the gate learns from what the text is, and teaches theta nothing.
        Per token: of those up to it.
        """
        vectors = self.encoder.embedding(inputs["input_ids"]).detach()
        return (running_mean if self.per_token else masked_mean)(vectors, inputs["attention_mask"])


def make_extractor(name: str, seed: int, *, vocab_size: int | None = None, per_token: bool = False) -> SharedExtractor:
    """The extractor with the first weights of a run: the same for the same seed.

    ``vocab_size``: ids of the aggregator's tokenizer, for text. ``per_token``: as `TextExtractor` has it; the weights
    are the same. Raises ConfigError for an unknown name, ValueError for text without a vocabulary.
    """
    task = extractor_task(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if task == IMAGES:
            return CnnExtractor(name)
        if vocab_size is None:
            raise ValueError(f"the extractor {name} needs the size of a vocabulary")
        return TextExtractor(vocab_size, per_token)
