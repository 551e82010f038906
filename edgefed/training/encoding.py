"""Token blocks: examples become ids, and a mask says which of them are learned from.

Knows tokenizers and their chat templates, but no files and no model. `edgefed.training.data` is the way in.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from edgefed.errors import DataError
from edgefed.training.records import Example

IGNORED_LABEL = -100  # what transformers and torch's cross entropy leave out of the loss

_ENCODE_BATCH = 256  # examples a tokenizer call: enough for its threads, little enough memory


@dataclass(frozen=True)
class TokenBlocks:
    """Text as equal blocks of token ids, without padding.

    Attributes:
        input_ids: (N, S) int64.
        labels: (N, S) int64; the same ids where learned from, -100 elsewhere. Not shifted: transformers shifts.

    """

    input_ids: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def num_tokens(self) -> int:
        """All tokens, learned from or not: N * S."""
        return self.input_ids.numel()

    def shortened(self, length: int) -> TokenBlocks:
        """The same text in blocks of ``length`` tokens: (N, S) becomes (N * (S // length), length).

        What does not fill the last block of a row is dropped, and so are blocks without a label that the shifted loss
        would see. These blocks themselves where they are no longer than ``length``, or no block would be left.
        Raises ValueError below 2 tokens.
        """
        if length < 2:
            raise ValueError(f"blocks need at least 2 tokens, not {length}")
        width = self.input_ids.shape[1]
        if width <= length:
            return self
        used = width // length * length
        input_ids, labels = (t[:, :used].reshape(-1, length) for t in (self.input_ids, self.labels))
        keep = (labels[:, 1:] != IGNORED_LABEL).any(dim=1)
        return TokenBlocks(input_ids[keep], labels[keep]) if keep.any() else self

    def batches(
        self, batch_size: int, generator: torch.Generator | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield one epoch of (input_ids, labels), each (B, S) with B <= batch_size; the last may be smaller.

        The order is that of the text, or shuffled where a generator is given (which is advanced).

        Raises:
            ValueError: `batch_size` is below 1.

        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        for rows in order.split(batch_size):
            yield self.input_ids[rows], self.labels[rows]


def encode_examples(examples: Sequence[Example], tokenizer: Any, sequence_length: int) -> TokenBlocks:
    """Tokenize `examples`, join them with the end-of-text token between, and cut blocks of `sequence_length` tokens.

    The end-of-text token is learned where the text before it is, so that the model learns to stop. What does not fill
    the last block is dropped, unless it is all there is: then it becomes the one, shorter block. Blocks without a
    label that the shifted loss would see are dropped. Prompt and answer get the tokens that the model sees when it
    is given the prompt alone: a token never spans the border of what is learned.

    Chat is laid out by `tokenizer.chat_template` where there is one, else as `role: content` lines of which the
    assistant's contents, with their line ends, are learned.

    Args:
        tokenizer: a transformers tokenizer, or anything with its call, `eos_token_id` and `chat_template`.
        sequence_length: S, at least 2: the first token of a block is never predicted.

    Raises:
        DataError: nothing is left to learn from, the tokenizer has no end-of-text token, or its chat template
            refuses a conversation.
        ValueError: `sequence_length` is below 2.

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
    for start in range(0, len(examples), _ENCODE_BATCH):
        for tokens, learned_from in _encode_batch(examples[start : start + _ENCODE_BATCH], tokenizer):
            ids.extend(tokens)
            labels.extend(learned_from)
    if not ids:
        raise DataError("there is no text to learn from")
    length = min(sequence_length, len(ids))
    used = len(ids) // length * length
    input_ids = torch.frombuffer(ids, dtype=torch.int64)[:used].view(-1, length)
    label_blocks = torch.frombuffer(labels, dtype=torch.int64)[:used].view(-1, length)
    keep = (label_blocks[:, 1:] != IGNORED_LABEL).any(dim=1)  # (N,); a label in front has nothing to be predicted from
    if not keep.any():
        raise DataError(
            f"none of {len(ids)} tokens can be learned from in blocks of {length}",
            remedy="Give more text, a longer `sequence_length`, or records with longer answers.",
        )
    if not keep.all():
        input_ids, label_blocks = input_ids[keep], label_blocks[keep]
    return TokenBlocks(input_ids, label_blocks)


def _encode_batch(examples: Sequence[Example], tokenizer: Any) -> Iterator[tuple[list[int], list[int]]]:
    """Yield (ids, labels) per example, closed by the end-of-text token."""
    all_runs = [_lay_out(example, tokenizer) for example in examples]
    prefixes = [["".join(text for text, _ in runs[: end + 1]) for end in range(len(runs))] for runs in all_runs]
    encoded = iter(_tokenize([text for texts in prefixes for text in texts], tokenizer))
    for runs, texts in zip(all_runs, prefixes, strict=True):
        stages = [next(encoded) for _ in texts]  # ids of ever longer prefixes; the last is the whole example
        ids = stages[-1]
        if any(ids[: len(stage)] != stage for stage in stages):
            # A token spans a border. At inference the prompt stands alone, so the parts are tokenized alone.
            parts = _tokenize([text for text, _ in runs], tokenizer)
        else:
            starts = [0, *(len(stage) for stage in stages)]
            parts = [ids[start:end] for start, end in zip(starts, starts[1:], strict=False)]
        ids = [token for part in parts for token in part]
        labels = [
            token if learn else IGNORED_LABEL for part, (_, learn) in zip(parts, runs, strict=True) for token in part
        ]
        if not ids or ids[-1] != tokenizer.eos_token_id:  # some chat templates close with it themselves
            ids.append(tokenizer.eos_token_id)
            labels.append(tokenizer.eos_token_id if runs[-1][1] else IGNORED_LABEL)
        yield ids, labels


def _tokenize(texts: list[str], tokenizer: Any) -> list[list[int]]:
    # verbose=False: whole documents are longer than the model's window, and are cut into blocks afterwards.
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def _lay_out(example: Example, tokenizer: Any) -> list[tuple[str, bool]]:
    """Return the text of an example as runs (text, learn) in which neighbours differ in `learn`; never empty."""
    if not any(segment.role for segment in example):
        pieces = [(segment.text, segment.learn) for segment in example]
    elif getattr(tokenizer, "chat_template", None):
        pieces = _lay_out_by_template(example, tokenizer)
    else:
        pieces = []
        for segment in example:
            pieces += [(f"{segment.role}: ", False), (f"{segment.text}\n", segment.learn)]
    runs: list[tuple[str, bool]] = []
    for text, learn in pieces:
        if runs and runs[-1][1] == learn:
            runs[-1] = (runs[-1][0] + text, learn)
        elif text:
            runs.append((text, learn))
    return runs or [("", False)]


def _lay_out_by_template(example: Example, tokenizer: Any) -> list[tuple[str, bool]]:
    """Render a conversation with the tokenizer's template and find the assistant's turns in it.

    A turn begins where the template would ask for an answer and ends where the conversation up to it ends, so the
    end-of-turn mark is learned. Where a template has no such borders, because it refuses or rewrites a part of a
    conversation, the bare content is searched for; a turn that it left out or changed is not learned.
    """
    from jinja2 import TemplateError

    messages = [{"role": segment.role, "content": segment.text} for segment in example]

    def render(count: int, ask: bool) -> str | None:
        if count == 0:  # transformers takes no empty conversation
            return None
        try:
            return tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=ask)
        except TemplateError:
            return None

    whole = render(len(messages), ask=False)
    if whole is None:
        raise DataError(
            f"the tokenizer's chat template refuses a conversation of {', '.join(m['role'] for m in messages)}",
            remedy="Write the conversations in the order of roles that the model knows, usually user and assistant.",
        )
    pieces, cursor = [], 0
    for index, segment in enumerate(example):
        if not segment.learn:
            continue
        before, after = render(index, ask=True), render(index + 1, ask=False)
        if before and after and whole.startswith(after) and after.startswith(before) and len(before) >= cursor:
            start, end = len(before), len(after)
        else:
            content = segment.text.strip()
            # Behind what precedes it where that is known: the question may hold the same words.
            start = whole.find(content, max(cursor, len(before)) if before and whole.startswith(before) else cursor)
            end = start + len(content)
            if start < 0:
                continue
        pieces += [(whole[cursor:start], False), (whole[start:end], True)]
        cursor = end
    return [*pieces, (whole[cursor:], False)]
