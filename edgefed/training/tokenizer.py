"""Tokenizers: load one, check it against a model, and turn laid-out text into ids with a loss mask."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from edgefed.errors import CheckpointError, ModelNotFound
from edgefed.training.chat_template import Layout
from edgefed.training.instruction_template import instruction_template, special_tokens_around

CHAT_TEMPLATE_FILE = "chat_template.jinja"
"""Where transformers looks for the chat template of a checkpoint."""

_PROBE = "The quick brown fox jumps over 13 lazy dogs."
_ANCHORS = ("\n", "a", ".", " ")
"""Texts to put before a text whose beginning is not the beginning of the input."""

_BATCH_CHARS = 1 << 18
_BATCH_TEXTS = 256
"""Most characters and texts of a tokenizer call: enough for its threads, little enough memory for offsets."""


def load_tokenizer(source: str | Path) -> Any:
    """Load the tokenizer of a checkpoint, a folder or a hub id; code that comes with it is never run.

    A tokenizer without a chat template gets edgefed's `instruction_template`.

    Raises:
        ModelNotFound: there is none, or it has no vocabulary. transformers makes an empty tokenizer of a folder
            without tokenizer files.

    """
    remedy = "Put tokenizer.json and tokenizer_config.json beside the model's config.json."
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelNotFound(
            f"no tokenizer that transformers can load in {source}: {str(error).splitlines()[0]}", remedy=remedy
        ) from error
    ids = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    if not set(ids) - {tokenizer.unk_token_id}:
        raise ModelNotFound(
            f"no tokenizer files in {source}: the vocabulary has {len(tokenizer)} tokens and none for plain text",
            remedy=remedy,
        )
    if not tokenizer.chat_template:
        tokenizer.chat_template = instruction_template(tokenizer)
    return tokenizer


def write_chat_template(folder: Path) -> None:
    """Write `instruction_template` to a checkpoint folder if its tokenizer has no template. Raises ModelNotFound."""
    tokenizer = load_tokenizer(folder)
    template = instruction_template(tokenizer)
    if tokenizer.chat_template == template:
        (folder / CHAT_TEMPLATE_FILE).write_text(template, encoding="utf-8")


def vocabulary_size(tokenizer: Any) -> int:
    """One more than the largest id of a tokenizer."""
    return int(max(tokenizer.get_vocab().values())) + 1


def check_vocabulary(tokenizer: Any, embedding_rows: int, model: str) -> None:
    """Raise CheckpointError where the tokenizer has ids for which the model has no embedding."""
    size = vocabulary_size(tokenizer)
    if size > embedding_rows:
        raise CheckpointError(
            f"the tokenizer of {model} has {size} tokens, its embedding only {embedding_rows} rows",
            remedy="Use the tokenizer that belongs to the model, or resize the model's embedding.",
        )


class TextEncoder:
    """Token ids and loss masks of laid-out examples.

    Text on both sides of a border of the loss is tokenized together. Where a token would span the border, the sides are
    tokenized one after the other, as at inference, where the prompt stands alone; the tokenizer then puts no space in
    front of the second. Special tokens that the tokenizer itself puts around a text (``<s>``) are added, except to what
    a chat template has written.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._has_offsets = bool(getattr(tokenizer, "is_fast", False))
        self._added: dict[int, Any] = dict(getattr(tokenizer, "added_tokens_decoder", {}))
        self._prefix, self._suffix = special_tokens_around(tokenizer)

    def encode(self, layouts: Iterator[Layout]) -> Iterator[tuple[list[int], list[bool]]]:
        """Yield (ids, in_loss) of each layout, closed by the end-of-text token."""
        for group in _grouped(layouts):
            uniform = [_whole(layout) is not None for layout in group]
            plain = iter(self._ids([each.text for each, same in zip(group, uniform, strict=True) if same]))
            mixed = iter(self._mixed([each for each, same in zip(group, uniform, strict=True) if not same]))
            for layout, same in zip(group, uniform, strict=True):
                if same:
                    ids = next(plain)
                    in_loss = [bool(_whole(layout))] * len(ids)
                else:
                    ids, in_loss = next(mixed)
                yield self._closed(layout, ids, in_loss)

    def encode_prompt(self, layout: Layout) -> list[int]:
        """Ids of a text that is to be continued: with the special tokens in front, without those at the end."""
        (ids,) = self._ids([layout.text]) if layout.text else ([],)
        return [*self._prefix, *ids] if layout.special_tokens else ids

    def _closed(self, layout: Layout, ids: list[int], in_loss: list[bool]) -> tuple[list[int], list[bool]]:
        """Put the special tokens around the ids of a text."""
        ends_in_loss = bool(layout.spans) and layout.spans[-1][1] == len(layout.text)
        if layout.special_tokens:
            ids = [*self._prefix, *ids, *self._suffix]
            in_loss = [*[False] * len(self._prefix), *in_loss, *[ends_in_loss] * len(self._suffix)]
        # Some chat templates close with it themselves, with a line end behind it.
        end = self._tokenizer.eos_token_id
        if end not in ids[-1:] and (layout.special_tokens or end not in ids[-2:]):
            ids, in_loss = [*ids, end], [*in_loss, ends_in_loss]
        return ids, in_loss

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        # verbose=False: whole documents are longer than the model's window, and are cut into blocks afterwards.
        encoded = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)
        return [list(ids) for ids in encoded["input_ids"]]

    def _mixed(self, layouts: Sequence[Layout]) -> Iterator[tuple[list[int], list[bool]]]:
        """Yield (ids, in_loss) of texts that are in the loss in parts."""
        if not layouts:
            return
        if not self._has_offsets:
            for layout in layouts:
                yield self._in_parts(layout.text, _borders(layout.spans, len(layout.text)))
            return
        encoded = self._tokenizer(
            [layout.text for layout in layouts],
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        for layout, ids, offsets in zip(layouts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            places = self._places(ids, offsets)
            borders, spanned = self._settle(ids, places, _borders(layout.spans, len(layout.text)))
            yield self._in_parts(layout.text, borders) if spanned else (list(ids), _mask(places, borders))

    def _places(self, ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """(start, end) of the characters of each token. Some tokenizers leave white space out of their offsets.

        It belongs to the token behind it, except behind a special token that takes it.
        """
        places, end_before, takes_space = [], 0, False
        for token, (start, end) in zip(ids, offsets, strict=True):
            if token not in self._added and not takes_space:
                start = min(start, end_before)  # the bytes of one character share its place
            end_before = max(end_before, end)
            places.append((start, end_before))
            takes_space = token in self._added and self._added[token].rstrip
        return places

    def _settle(
        self, ids: Sequence[int], places: Sequence[tuple[int, int]], borders: Sequence[tuple[int, bool]]
    ) -> tuple[list[tuple[int, bool]], bool]:
        """Return the borders, those in a special token moved behind it, and whether another token spans one."""
        moved, spanned, token = [], False, 0
        for position, in_loss in borders:
            while token < len(places) and places[token][1] <= position:
                token += 1
            if token < len(places) and places[token][0] < position:
                if ids[token] in self._added:
                    position = places[token][1]
                else:
                    spanned = True
            moved.append((position, in_loss))
        return moved, spanned

    def _in_parts(self, text: str, borders: list[tuple[int, bool]]) -> tuple[list[int], list[bool]]:
        """(ids, in_loss) of a text whose parts between borders are tokenized one by one."""
        ends = [*(position for position, _ in borders[1:]), len(text)]
        parts = [(text[start:end], in_loss) for (start, in_loss), end in zip(borders, ends, strict=True) if start < end]
        encoded = [*self._ids([parts[0][0]]), *self._continuations([part for part, _ in parts[1:]])]
        ids = [token for part in encoded for token in part]
        return ids, [in_loss for part, (_, in_loss) in zip(encoded, parts, strict=True) for _ in part]

    def _continuations(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts that do not begin the input, so without what a tokenizer puts before a beginning."""
        found: dict[int, list[int]] = {}
        for anchor in _ANCHORS:
            missing = [index for index in range(len(texts)) if index not in found]
            if not missing:
                break
            before, *encoded = self._ids([anchor, *(anchor + texts[index] for index in missing)])
            for index, ids in zip(missing, encoded, strict=True):
                if ids[: len(before)] == before:
                    found[index] = ids[len(before) :]
        alone = iter(self._ids([text for index, text in enumerate(texts) if index not in found]))
        return [found[index] if index in found else next(alone) for index in range(len(texts))]


def _grouped(layouts: Iterator[Layout]) -> Iterator[list[Layout]]:
    """Groups of layouts for one tokenizer call each."""
    group: list[Layout] = []
    size = 0
    for layout in layouts:
        if group and (size + len(layout.text) > _BATCH_CHARS or len(group) == _BATCH_TEXTS):
            yield group
            group, size = [], 0
        group.append(layout)
        size += len(layout.text)
    if group:
        yield group


def _whole(layout: Layout) -> bool | None:
    """Whether all of a text is in the loss (True) or none (False); None in parts."""
    if not layout.spans:
        return False
    return True if layout.spans == [(0, len(layout.text))] else None


def _borders(spans: Sequence[tuple[int, int]], length: int) -> list[tuple[int, bool]]:
    """(position, whether what follows is in the loss), from position 0 on."""
    borders = [(0, False)] if not spans or spans[0][0] > 0 else []
    for start, end in spans:
        borders.append((start, True))
        if end < length:
            borders.append((end, False))
    return borders


def _mask(places: Sequence[tuple[int, int]], borders: Sequence[tuple[int, bool]]) -> list[bool]:
    """Whether each token begins in a part that is in the loss."""
    mask, following = [], 0
    in_loss = False
    for start, _ in places:
        while following < len(borders) and borders[following][0] <= start:
            in_loss = borders[following][1]
            following += 1
        mask.append(in_loss)
    return mask
