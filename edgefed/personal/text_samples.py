"""A client's text as its mixture sees it: as ids of the aggregator's tokenizer, and as ids of its own model's.

`TextSamples`       labelled texts, each with both tokenizers, cut at a length, padded to the longest of a batch
`TokenSamples`      unlabelled text in equal blocks of one tokenizer, for next-token prediction: the logits of both
                    models are of the same tokens, so both must have the same vocabulary
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgefed.errors import ConfigError, DataError
from edgefed.personal.batches import Batch
from edgefed.training.data import Example
from edgefed.training.encoding import IGNORED_LABEL, TokenBlocks, encode_examples

_ENCODED_AT_ONCE = 256


@dataclasses.dataclass(frozen=True)
class TokenRows:
    """N token sequences of different lengths, one behind the other. ``ids`` (tokens,) int32, ``starts`` (N + 1,) int64.

    ``padding``: the id that fills a batch. ``cut``: how many texts were longer than ``longest``, at which all are cut.
    """

    ids: np.ndarray
    starts: np.ndarray
    padding: int
    longest: int
    cut: int

    def __len__(self) -> int:
        return len(self.starts) - 1

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        """{"input_ids", "attention_mask"}, int64 (B, T), T the longest of them; padding comes last and is masked."""
        lengths = self.starts[indices + 1] - self.starts[indices]
        places = np.arange(lengths.max(initial=1))
        mask = places < lengths[:, None]  # (B, T)
        tokens = np.full(mask.shape, self.padding, np.int64)
        tokens[mask] = self.ids[(self.starts[indices][:, None] + places)[mask]]
        return {"input_ids": torch.from_numpy(tokens), "attention_mask": torch.from_numpy(mask.astype(np.int64))}

    def subset(self, indices: np.ndarray) -> TokenRows:
        """Only these sequences."""
        rows = [self.ids[self.starts[index] : self.starts[index + 1]] for index in indices]
        return _joined(rows, self.padding, self.longest, self.cut)


class TextSamples:
    """Labelled texts, in memory; implements `edgefed.personal.batches.Samples`. See `text_samples`."""

    def __init__(self, shared: TokenRows, own: TokenRows, labels: np.ndarray, classes: tuple[str, ...]):
        self.shared, self.own, self.labels, self.classes = shared, own, labels, classes

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: np.ndarray) -> Batch:
        shared = self.shared.batch(indices)
        own = shared if self.own is self.shared else self.own.batch(indices)
        return Batch(shared, own, torch.from_numpy(self.labels[indices]))

    def subset(self, indices: np.ndarray) -> TextSamples:
        shared = self.shared.subset(indices)
        own = shared if self.own is self.shared else self.own.subset(indices)
        return TextSamples(shared, own, self.labels[indices], self.classes)


class TokenSamples:
    """Blocks of text for next-token prediction, in memory; implements `Samples`, with one class for all.

    Labels of a batch are (B, T): the next token of each, -100 at the end of a block and where nothing is learned.
    """

    classes: tuple[str, ...] = ()
    evaluation_batch = 8
    """Logits are (B, T, vocabulary): fewer examples at once than elsewhere."""

    def __init__(self, blocks: TokenBlocks):
        self.blocks = blocks
        self.labels = np.zeros(len(blocks), np.int64)

    def __len__(self) -> int:
        return len(self.blocks)

    def batch(self, indices: np.ndarray) -> Batch:
        ids, labels = self.blocks.input_ids[indices], self.blocks.labels[indices]
        following = torch.full_like(labels, IGNORED_LABEL)
        following[:, :-1] = labels[:, 1:]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return Batch(inputs, inputs, following)

    def subset(self, indices: np.ndarray) -> TokenSamples:
        return TokenSamples(TokenBlocks(self.blocks.input_ids[indices], self.blocks.labels[indices]))


def text_samples(
    texts: Sequence[str],
    labels: np.ndarray,
    classes: tuple[str, ...],
    *,
    shared_tokenizer: Any,
    own_tokenizer: Any,
    length: int,
) -> TextSamples:
    """Labelled texts as ids of both tokenizers (transformers', or what is called as they are), at most ``length`` each.

    Raises DataError for a text without a token, ConfigError for a length below 1.
    """
    shared = tokenize(texts, shared_tokenizer, length)
    same = same_vocabulary(shared_tokenizer, own_tokenizer)
    return TextSamples(shared, shared if same else tokenize(texts, own_tokenizer, length), labels, classes)


def token_samples(examples: Sequence[Example], tokenizer: Any, length: int) -> TokenSamples:
    """Text (records as `edgefed.training.records` has them) in blocks of ``length`` tokens, for next-token prediction.
    No examples give no blocks. Raises DataError when nothing can be learned from the text.
    """
    if not examples:
        nothing = torch.zeros(0, length, dtype=torch.int64)
        return TokenSamples(TokenBlocks(nothing, nothing))
    return TokenSamples(encode_examples(examples, tokenizer, length))


def tokenize(texts: Sequence[str], tokenizer: Any, length: int) -> TokenRows:
    """Each text as ids, with the special tokens that the tokenizer adds by itself, cut at ``length`` or at what the
    tokenizer says its model takes. Raises DataError for a text without a token, ConfigError for a length below 1.
    """
    length = min(length, getattr(tokenizer, "model_max_length", length))
    if length < 1:
        raise ConfigError(f"texts cannot be cut at {length} tokens")
    rows, cut = [], 0
    for start in range(0, len(texts), _ENCODED_AT_ONCE):
        some = list(texts[start : start + _ENCODED_AT_ONCE])
        encoded = tokenizer(some, verbose=False)["input_ids"]
        for place, ids in enumerate(encoded):
            if not ids or not some[place].strip():
                raise DataError(
                    f"text {start + place + 1} of {len(texts)} is empty: the tokenizer makes no token of it",
                    remedy="Leave it out.",
                )
            if len(ids) > length:
                # By the tokenizer: what it puts at the end of a text belongs at the end of a cut one, too.
                ids = tokenizer([some[place]], truncation=True, max_length=length)["input_ids"][0]
                cut += 1
            rows.append(np.asarray(ids, np.int32))
    return _joined(rows, padding_id(tokenizer), length, cut)


def padding_id(tokenizer: Any) -> int:
    """The id that fills a batch; it is masked, so any does where the tokenizer names none."""
    for name in ("pad_token_id", "eos_token_id"):
        if (found := getattr(tokenizer, name, None)) is not None:
            return found
    return 0


def same_vocabulary(first: Any, second: Any) -> bool:
    """Whether every id stands for the same token in both; names of tokenizers say nothing."""
    return first is second or first.get_vocab() == second.get_vocab()


def check_same_vocabulary(shared_tokenizer: Any, own_tokenizer: Any, model: str) -> None:
    """Raise ConfigError unless next tokens of the client's model are the aggregator's."""
    if same_vocabulary(shared_tokenizer, own_tokenizer):
        return
    shared, own = shared_tokenizer.get_vocab(), own_tokenizer.get_vocab()
    alike = sum(own.get(token) == number for token, number in shared.items())
    raise ConfigError(
        f"next-token prediction needs one vocabulary: {model} has {len(own)} tokens, the run {len(shared)}, and "
        f"{alike} of them have the same id in both",
        remedy="Join a run that is served with this model's tokenizer (`tokenizer`), pass a model with the "
        "run's tokenizer, or label the texts and join with `task=text`, where tokenizers may differ.",
    )


def _joined(rows: list[np.ndarray], padding: int, longest: int, cut: int) -> TokenRows:
    starts = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(row) for row in rows], out=starts[1:])
    return TokenRows(np.concatenate(rows) if rows else np.zeros(0, np.int32), starts, padding, longest, cut)
