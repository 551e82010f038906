"""Token blocks: examples become ids and labels, joined and cut into blocks of one length.

Knows neither files nor models. `edgefed.training.data` reads the examples, `edgefed.training.tokenizer` tokenizes.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from edgefed.errors import DataError
from edgefed.training.chat_template import ChatTemplate, ConversationRefused, Layout
from edgefed.training.records import CHAT_FIELDS, Example
from edgefed.training.tokenizer import TextEncoder

IGNORED_LABEL = -100  # what transformers and torch's cross entropy leave out of the loss

MAX_UNUSED_SHARE = 1 / 32
"""Largest share of the tokens that is dropped because it does not fill the last block."""

_MAX_SHOWN = 10
_HOPELESS_CONVERSATIONS = 1000  # refused without one that is taken: no other will be taken either


@dataclass(frozen=True)
class TokenBlocks:
    """Text as equal blocks of token ids, without padding.

    Attributes:
        input_ids: (N, S) int64.
        labels: (N, S) int64; the same ids where in the loss, -100 elsewhere. Not shifted: transformers shifts.

    """

    input_ids: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        """Number of blocks, N."""
        return self.input_ids.shape[0]

    @property
    def num_tokens(self) -> int:
        """Number of tokens, in the loss or not: N * S."""
        return self.input_ids.numel()

    def shortened(self, length: int) -> TokenBlocks:
        """Return the same text in blocks of ``length`` tokens, cut from each row; self if none is longer.

        A row's rest is kept or dropped as `encode_examples` does. Blocks without a label that the shifted loss sees are
        dropped, unless no block would be left.

        Raises:
            ValueError: ``length`` is below 2.

        """
        if length < 2:
            raise ValueError(f"length must be at least 2, not {length}")
        if self.input_ids.shape[1] <= length:
            return self
        shorter = _cut(self.input_ids, self.labels, length)
        return shorter if len(shorter) else self

    def batches(
        self, batch_size: int, generator: torch.Generator | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield one epoch of (input_ids, labels), each (B, S) with B <= batch_size; the last may be smaller.

        The order is that of the text, or shuffled where a generator is given (which is advanced).

        Raises:
            ValueError: ``batch_size`` is below 1.

        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        for rows in torch.split(order, batch_size):
            yield self.input_ids[rows], self.labels[rows]


def encode_examples(
    examples: Iterable[Example],
    tokenizer: Any,
    sequence_length: int,
    on_message: Callable[[str], None] = lambda message: None,
) -> TokenBlocks:
    """Tokenize ``examples``, put the end-of-text token behind each, and cut the text into blocks of one length.

    The end-of-text token is in the loss where the text before it is, so that the model learns to stop. If the tokens
    behind the last full block are more than 1/32 of all, one more block ends with the last token; it repeats earlier
    tokens, which are not in its loss. Otherwise they are dropped. Text shorter than a block is one shorter block.
    Blocks without a label that the shifted loss sees are dropped.

    Conversations, also instructions with their responses, are laid out by ``tokenizer.chat_template``
    (`edgefed.training.chat_template`), or by `instruction_template` where there is none. Time and memory are linear in
    the text.

    Args:
        examples: what `edgefed.training.data.load_corpus` gives.
        tokenizer: a transformers tokenizer, or an object with its call, ``eos_token_id`` and ``chat_template``.
        sequence_length: S, at least 2: the first token of a block is never predicted.
        on_message: called with each note for the user: conversations that the chat template refuses, by line number;
            message fields that it does not use; the number of unused tokens.

    Raises:
        DataError: nothing is left to train on, the tokenizer has no end-of-text token, or its chat template is broken
            or refuses every conversation.
        ValueError: ``sequence_length`` is below 2.

    """
    if sequence_length < 2:
        raise ValueError(f"sequence_length must be at least 2, not {sequence_length}")
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the tokenizer has no end-of-text token to put between examples",
            remedy="Set eos_token in the tokenizer_config.json of the model.",
        )
    # Flat machine integers: a list of Python ints for 100 MB of text would take gigabytes.
    ids, labels = array("q"), array("q")
    for tokens, in_loss in TextEncoder(tokenizer).encode(_lay_out_all(examples, tokenizer, on_message)):
        ids.extend(tokens)
        labels.extend(token if use else IGNORED_LABEL for token, use in zip(tokens, in_loss, strict=True))
    if not ids:
        raise DataError("there is no text to train on")
    length = min(sequence_length, len(ids))
    row, row_labels = (torch.frombuffer(tokens, dtype=torch.int64).view(1, -1) for tokens in (ids, labels))
    if 0 < (rest := len(ids) % length) <= MAX_UNUSED_SHARE * len(ids):
        on_message(f"{rest} of {len(ids)} tokens do not fill the last block of {length} and are not used")
    blocks = _cut(row, row_labels, length)
    if not len(blocks):
        raise DataError(
            f"none of {len(ids)} tokens is in the loss in blocks of {length}",
            remedy="Give more text, a longer `sequence_length`, or records with longer answers.",
        )
    return blocks


def _cut(input_ids: torch.Tensor, labels: torch.Tensor, length: int) -> TokenBlocks:
    """Cut rows (N, W) into blocks (M, length), without those that have no label the shifted loss sees."""
    width = input_ids.shape[1]
    used = width // length * length
    ids, wanted = (rows[:, :used].reshape(len(rows), -1, length) for rows in (input_ids, labels))  # (N, W // S, S)
    rest = width - used
    if rest > MAX_UNUSED_SHARE * width:
        last = labels[:, -length:].clone()
        # The block before has counted these; the first of the rest is predicted from the token before it.
        last[:, : length - rest] = IGNORED_LABEL
        ids = torch.cat([ids, input_ids[:, None, -length:]], dim=1)
        wanted = torch.cat([wanted, last[:, None]], dim=1)
    ids, wanted = ids.flatten(0, 1), wanted.flatten(0, 1)
    keep = (wanted[:, 1:] != IGNORED_LABEL).any(dim=1)  # a label in front has nothing to be predicted from
    return TokenBlocks(ids, wanted) if keep.all() else TokenBlocks(ids[keep], wanted[keep])


def _lay_out_all(examples: Iterable[Example], tokenizer: Any, on_message: Callable[[str], None]) -> Iterator[Layout]:
    """Yield each example as text and spans; reports conversations that are left out, and fields that are not used."""
    template: ChatTemplate | None = None
    refused: list[str] = []
    fields: Counter[str] = Counter()
    taken = skipped_turns = 0
    for example in examples:
        if not any(segment.role for segment in example.segments):
            yield _lay_out_text(example)
            taken += 1
            continue
        fields.update(field for segment in example.segments for field in segment.fields)
        fields.update(["tools"] if example.tools else [])
        template = template or ChatTemplate(tokenizer)
        try:
            layout = template.lay_out(example)
        except ConversationRefused as error:
            place = f"{example.place}: " if example.place else ""
            refused.append(f"{place}{error}")
            if len(refused) <= _MAX_SHOWN:
                on_message(refused[-1])
            if not taken and len(refused) == _HOPELESS_CONVERSATIONS:
                break
            continue
        taken += 1
        skipped_turns += layout.skipped_turns
        yield layout
    if refused and not taken:
        raise DataError(
            f"the tokenizer's chat template takes none of {len(refused)} conversations: {refused[0]}",
            remedy="Write the conversations in the order of roles that the model knows, or repair the template.",
        )
    if len(refused) > _MAX_SHOWN:
        on_message(f"{len(refused)} conversations are left out in all")
    if skipped_turns:
        on_message(f"{skipped_turns} assistant turns are not in the loss: the chat template rewrites them")
    for field in CHAT_FIELDS:
        if fields[field]:
            used = template is not None and template.writes(field)
            on_message(
                f"chat field {field}, given {fields[field]} times, is "
                + ("written by the chat template" if used else "not used: the chat template does not write it")
            )


def _lay_out_text(example: Example) -> Layout:
    """Return the segments of an example that is no chat, one behind the other."""
    return _joined((segment.text, segment.in_loss) for segment in example.segments)


def _joined(pieces: Iterator[tuple[str, bool]]) -> Layout:
    texts: list[str] = []
    spans: list[tuple[int, int]] = []
    length = 0
    for text, in_loss in pieces:
        end = length + len(text)
        if in_loss and text:
            start = spans.pop()[0] if spans and spans[-1][1] == length else length
            spans.append((start, end))
        texts.append(text)
        length = end
    return Layout("".join(texts), spans)
