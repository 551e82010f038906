"""Examples of a FedMoE client, in memory, and the batches that its mixture is trained on.

ImageSamples    labelled images
TextSamples     labelled texts as token ids of two tokenizers: that of the run, which the shared extractor reads, and
that of the client's own model; truncated to a length, padded to the longest text of a batch
TokenSamples    text in blocks of equal length, for next-token prediction. Both models predict the same tokens, so
both must have the same vocabulary
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edgefed.errors import ConfigError, DataError
from edgefed.training.data import Example
from edgefed.training.encoding import IGNORED_LABEL, TokenBlocks, encode_examples

IntArray: TypeAlias = npt.NDArray[np.int64]
Inputs: TypeAlias = Tensor | Mapping[str, Tensor]
"""Inputs of an extractor: one tensor (B, ...), or tensors by name, as a tokenizer returns them."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """Inputs and labels of some examples."""

    shared: Inputs
    """Inputs of the shared extractor."""
    own: Inputs
    """Inputs of the client's own model; they differ from ``shared`` if its tokenizer does."""
    labels: Tensor
    """int64: classes (B,), or next tokens (B, T) with -100 at positions without a loss."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``."""
        return Batch(_moved(self.shared, device), _moved(self.own, device), self.labels.to(device))


def _moved(inputs: Inputs, device: torch.device | str) -> Inputs:
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    return {name: tensor.to(device) for name, tensor in inputs.items()}


class Samples(Protocol):
    """Labelled examples of one client."""

    classes: tuple[str, ...]
    """Names of the classes, in the order of their labels."""
    labels: IntArray
    """(N,) int64 class of each example."""

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def batch(self, indices: IntArray) -> Batch:
        """The examples of these indices, on the CPU."""
        ...

    def subset(self, indices: IntArray) -> Samples:
        """These examples alone, with the same classes."""
        ...


def batches(samples: Samples, batch_size: int, rng: np.random.Generator | None = None) -> Iterator[Batch]:
    """All examples once, shuffled if ``rng`` is given.

    A last batch of one example joins the batch before it, unless ``batch_size`` is 1: normalised by its own statistics,
    a single example becomes zero.
    """
    order = np.arange(len(samples)) if rng is None else rng.permutation(len(samples))
    starts = list(range(0, len(order), batch_size))
    if batch_size > 1 and len(starts) > 1 and len(order) - starts[-1] == 1:
        starts.pop()
    for start, end in zip(starts, [*starts[1:], len(order)], strict=True):
        yield samples.batch(order[start:end])


def num_batches(num_examples: int, batch_size: int) -> int:
    """Number of batches that `batches` yields."""
    whole, rest = divmod(num_examples, batch_size)
    return max(1, whole) if rest == 1 else whole + (rest > 0)


def hold_out(samples: Samples, share: float, seed: int) -> tuple[Samples, Samples]:
    """(training, held-out) examples; see `held_out_rows`."""
    train, held_out = held_out_rows(samples.labels, share, seed)
    return samples.subset(train), samples.subset(held_out)


def held_out_rows(labels: IntArray, share: float, seed: int) -> tuple[IntArray, IntArray]:
    """Indices of (training, held-out) examples, ``share`` of each class held out, but never all of it."""
    rng = np.random.default_rng(seed)
    train, held_out = [], []
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        count = min(int(round(share * len(rows))), len(rows) - 1)
        held_out.append(rows[:count])
        train.append(rows[count:])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(held_out))


class ImageSamples:
    """Labelled images (N, H, W, C) uint8 with labels (N,). Inputs of a batch are float32 (B, C, H, W) in -1..1."""

    def __init__(self, images: npt.NDArray[np.uint8], labels: IntArray, classes: tuple[str, ...]):
        self.images, self.labels, self.classes = images, labels, classes

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: IntArray) -> Batch:
        """These examples; both models see the same pixels."""
        chosen = torch.from_numpy(self.images[indices]).permute(0, 3, 1, 2).contiguous()
        pixels = chosen.to(torch.float32).div_(127.5).sub_(1.0)
        return Batch(pixels, pixels, torch.from_numpy(self.labels[indices]))

    def subset(self, indices: IntArray) -> ImageSamples:
        """These examples alone, with the same classes."""
        return ImageSamples(self.images[indices], self.labels[indices], self.classes)


_ENCODED_AT_ONCE = 256


@dataclasses.dataclass(frozen=True)
class TokenRows:
    """N token sequences of different lengths, concatenated."""

    ids: npt.NDArray[np.int32]
    """(tokens,)"""
    starts: IntArray
    """(N + 1,): where each sequence begins, and the end."""
    padding: int
    """The id that fills up a batch."""
    max_length: int
    """Number of tokens to which texts are truncated."""
    num_truncated: int
    """Number of texts that were longer."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def batch(self, indices: IntArray) -> dict[str, Tensor]:
        """{"input_ids", "attention_mask"}, int64 (B, T), where T is the longest; padding comes last and is masked."""
        lengths = self.starts[indices + 1] - self.starts[indices]
        places = np.arange(lengths.max(initial=1))
        mask = places < lengths[:, None]  # (B, T)
        tokens = np.full(mask.shape, self.padding, np.int64)
        tokens[mask] = self.ids[(self.starts[indices][:, None] + places)[mask]]
        return {"input_ids": torch.from_numpy(tokens), "attention_mask": torch.from_numpy(mask.astype(np.int64))}

    def subset(self, indices: IntArray) -> TokenRows:
        """These sequences alone."""
        rows = [self.ids[self.starts[index] : self.starts[index + 1]] for index in indices]
        return _concatenated(rows, self.padding, self.max_length, self.num_truncated)


class TextSamples:
    """Labelled texts; see `text_samples`."""

    def __init__(self, shared: TokenRows, own: TokenRows, labels: IntArray, classes: tuple[str, ...]):
        self.shared, self.own, self.labels, self.classes = shared, own, labels, classes

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: IntArray) -> Batch:
        """These examples, as ids of both tokenizers."""
        shared = self.shared.batch(indices)
        own = shared if self.own is self.shared else self.own.batch(indices)
        return Batch(shared, own, torch.from_numpy(self.labels[indices]))

    def subset(self, indices: IntArray) -> TextSamples:
        """These examples alone, with the same classes."""
        shared = self.shared.subset(indices)
        own = shared if self.own is self.shared else self.own.subset(indices)
        return TextSamples(shared, own, self.labels[indices], self.classes)


class TokenSamples:
    """Blocks of text for next-token prediction. All examples have label 0.

    Labels of a batch are (B, T): the next token, or -100 at the end of a block and at positions without a loss.
    """

    classes: tuple[str, ...] = ()
    evaluation_batch = 8
    """Examples per batch of an evaluation; small, because logits are (B, T, vocabulary)."""

    def __init__(self, blocks: TokenBlocks):
        self.blocks = blocks
        self.labels: IntArray = np.zeros(len(blocks), np.int64)

    def __len__(self) -> int:
        return len(self.blocks)

    def batch(self, indices: IntArray) -> Batch:
        """These blocks; both models see the same tokens."""
        ids, labels = self.blocks.input_ids[indices], self.blocks.labels[indices]
        following = torch.full_like(labels, IGNORED_LABEL)
        following[:, :-1] = labels[:, 1:]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return Batch(inputs, inputs, following)

    def subset(self, indices: IntArray) -> TokenSamples:
        """These blocks alone."""
        return TokenSamples(TokenBlocks(self.blocks.input_ids[indices], self.blocks.labels[indices]))


def text_samples(
    texts: Sequence[str],
    labels: IntArray,
    classes: tuple[str, ...],
    *,
    shared_tokenizer: Any,
    own_tokenizer: Any,
    length: int,
) -> TextSamples:
    """Tokenize labelled texts with both tokenizers, truncated to ``length`` tokens each.

    Raises DataError for a text without tokens, ConfigError for a length below 1.
    """
    shared = tokenize(texts, shared_tokenizer, length)
    same = same_vocabulary(shared_tokenizer, own_tokenizer)
    return TextSamples(shared, shared if same else tokenize(texts, own_tokenizer, length), labels, classes)


def token_samples(examples: Collection[Example], tokenizer: Any, length: int) -> TokenSamples:
    """Text records (`edgefed.training.records`) in blocks of ``length`` tokens, for next-token prediction.

    No examples give no blocks. Raises DataError if no token of the text has a loss.
    """
    if not examples:
        empty = torch.zeros(0, length, dtype=torch.int64)
        return TokenSamples(TokenBlocks(empty, empty))
    return TokenSamples(encode_examples(examples, tokenizer, length))


def tokenize(texts: Sequence[str], tokenizer: Any, length: int) -> TokenRows:
    """Tokenize texts, with the tokenizer's special tokens, truncated to ``length`` or to the model's maximum length.

    Raises DataError for a text without tokens, ConfigError for a length below 1.
    """
    length = min(length, getattr(tokenizer, "model_max_length", length))
    if length < 1:
        raise ConfigError(f"the maximum length of a text must be at least 1 token, found {length}")
    rows: list[npt.NDArray[np.int32]] = []
    num_truncated = 0
    for start in range(0, len(texts), _ENCODED_AT_ONCE):
        some = list(texts[start : start + _ENCODED_AT_ONCE])
        encoded = tokenizer(some, verbose=False)["input_ids"]
        for place, ids in enumerate(encoded):
            if not ids or not some[place].strip():
                raise DataError(
                    f"text {start + place + 1} of {len(texts)} is empty: it has no tokens", remedy="Remove it."
                )
            if len(ids) > length:
                # The tokenizer truncates, so that its special tokens stay at the end.
                ids = tokenizer([some[place]], truncation=True, max_length=length)["input_ids"][0]
                num_truncated += 1
            rows.append(np.asarray(ids, np.int32))
    return _concatenated(rows, padding_id(tokenizer), length, num_truncated)


def padding_id(tokenizer: Any) -> int:
    """The id that fills up a batch. It is masked, so any id works for a tokenizer without a padding token."""
    for name in ("pad_token_id", "eos_token_id"):
        if (found := getattr(tokenizer, name, None)) is not None:
            return int(found)
    return 0


def same_vocabulary(first: Any, second: Any) -> bool:
    """Whether every id stands for the same token in both tokenizers."""
    return first is second or bool(first.get_vocab() == second.get_vocab())


def check_same_vocabulary(shared_tokenizer: Any, own_tokenizer: Any, model: str) -> None:
    """Raise ConfigError unless the client's model and the run have the same vocabulary."""
    if same_vocabulary(shared_tokenizer, own_tokenizer):
        return
    shared, own = shared_tokenizer.get_vocab(), own_tokenizer.get_vocab()
    same = sum(own.get(token) == number for token, number in shared.items())
    raise ConfigError(
        f"next-token prediction needs the run's vocabulary: {model} has {len(own)} tokens, the run {len(shared)}, and "
        f"{same} of them have the same id in both",
        remedy="Join a run that is served with this model's tokenizer (`tokenizer`), pass a model with the "
        "run's tokenizer, or label the texts and join with `task=text`, where tokenizers may differ.",
    )


def _concatenated(
    rows: Sequence[npt.NDArray[np.int32]], padding: int, max_length: int, num_truncated: int
) -> TokenRows:
    starts: IntArray = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(row) for row in rows], out=starts[1:])
    return TokenRows(
        np.concatenate(rows) if rows else np.zeros(0, np.int32), starts, padding, max_length, num_truncated
    )
