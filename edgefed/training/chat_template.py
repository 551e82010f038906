"""Conversations as a tokenizer's chat template writes them, and which characters of the result are in the loss.

A template that marks the assistant's turns with ``{% generation %}`` says itself what is in the loss. For any other
template, `ChatTemplate` renders the conversation twice: once as it is, and once with every content replaced by a
placeholder. The text between placeholders (the outline) is the template's own, so contents, headers and end marks are
found in one pass, in time linear in the conversation's length. A turn begins where it departs from the generation
prompt, so that a ``<think>`` block that only the generation prompt opens, or only the finished turn closes, is handled.
It ends behind its end mark. A turn that the template rewrites once further turns follow (Qwen3 drops the reasoning)
is not in the loss.
"""

from __future__ import annotations

import functools
import os.path
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from edgefed.errors import DataError
from edgefed.training.instruction_template import instruction_template
from edgefed.training.records import Example, Segment, written_arguments

_MARKS_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TESTS_FOR_NONE = re.compile(r"\bcontent['\"]?\]?\s+is\s+(not\s+)?none\b")
_PLACEHOLDER = re.compile("\U0010fffd([0-9]+)\U0010fffc")  # private use: no template and no tokenizer knows them
_MAX_REASON_CHARS = 160
_MAX_MARK_CHARS = 64

_TAG = r"</?[A-Za-z_]\w*>|<\|[^|<>]*\|>"
"""What looks like a mark, for tokenizers that spell theirs in ordinary tokens."""

Message = Mapping[str, Any]
Spans = list[tuple[int, int]]


class ConversationRefused(Exception):
    """A conversation cannot be trained on with this template; the text of the exception is the reason."""


@dataclass(frozen=True)
class Layout:
    """An example as text.

    Attributes:
        text: what is tokenized.
        spans: (start, end) of the characters in the loss, in order, neither empty nor overlapping.
        special_tokens: whether the tokenizer's own special tokens go around the text; a template writes them itself.
        skipped_turns: number of assistant turns that are not in the loss because the template rewrites them.

    """

    text: str
    spans: Spans
    special_tokens: bool = True
    skipped_turns: int = 0


class ChatTemplate:
    """The chat template of a tokenizer; `instruction_template` if it has none.

    Raises:
        DataError: there are several templates and no default.

    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._default = "" if getattr(tokenizer, "chat_template", None) else instruction_template(tokenizer)
        self._source(None)
        self._names: Mapping[str, Any] = tokenizer.special_tokens_map
        added = [str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values()]
        alternatives = "|".join(re.escape(token) for token in sorted(added, key=len, reverse=True))
        self._special = re.compile(alternatives or r"(?!)")
        self._mark = re.compile(f"{alternatives}|{_TAG}" if alternatives else _TAG)

    def lay_out(self, example: Example) -> Layout:
        """Render a conversation and find the assistant's turns in it.

        Raises:
            ConversationRefused: the template refuses it or fails, or no assistant turn can be located.

        """
        trainable = [index for index, segment in enumerate(example.segments) if segment.in_loss]
        tools = example.tools
        refusal: ConversationRefused | None = None
        for messages in self._forms(example.segments):
            try:
                return self._lay_out(messages, trainable, tools)
            except ConversationRefused as error:
                refusal = refusal or error
        assert refusal is not None, "there is one form at least"
        raise refusal

    def _lay_out(self, messages: Sequence[Message], trainable: Sequence[int], tools: Any) -> Layout:
        if _MARKS_GENERATION.search(self._source(tools)):
            text, spans = self._render(messages, tools, mask=True)
            if spans:
                return Layout(text, self._with_end_marks(text, spans, messages), special_tokens=False)
        text, _ = self._render(messages, tools)
        turns = _Turns(self, messages, tools, text)
        found = turns.locate(trainable)
        if not found:
            raise ConversationRefused("no assistant turn can be located in the text that the chat template writes")
        skipped = len(trainable) - len(found)
        return Layout(text[: turns.text_end], _merged(found), special_tokens=False, skipped_turns=skipped)

    def writes(self, field: str) -> bool:
        """Whether the template uses ``field`` of a message or, for ``"tools"``, of the record."""
        names = ("reasoning_content", "reasoning", "thinking") if field in _REASONING else (field,)
        return any(re.search(rf"\b{name}\b", self._source(None)) for name in names)

    def prompt(self, messages: Sequence[Message]) -> str:
        """Return the text of ``messages`` with the generation prompt. Raises ConversationRefused."""
        return self._render(messages, None, ask=True)[0]

    def render(self, messages: Sequence[Message], tools: Any, *, ask: bool = False) -> str | None:
        """Return the text of ``messages``, with the generation prompt if asked; None where there is none."""
        try:
            return self._render(messages, tools, ask=ask)[0] if messages else None
        except ConversationRefused:
            return None

    def end_mark(self, text: str, tail: str | None) -> int:
        """Length of the end mark that ``text``, which follows an assistant's content, begins with.

        ``tail`` is what follows a content that ends its conversation. The mark is what both have in common, without a
        part of a special token, or the first special token.
        """
        common = len(os.path.commonprefix([text, tail or ""]))
        common = min(self.before_mark(text, common), self.before_mark(tail or "", common))
        if common:
            return common
        first = self._special.match(text)
        return first.end() if first else 0

    def before_mark(self, text: str, position: int) -> int:
        """``position``, or the start of the special token or tag of ``text`` that it lies in."""
        for match in self._mark.finditer(text, max(0, position - _MAX_MARK_CHARS), position + _MAX_MARK_CHARS):
            if match.start() < position < match.end():
                return match.start()
        return position

    def marks(self, text: str) -> list[int]:
        """Return where the special tokens and tags of ``text`` begin."""
        return [match.start() for match in self._mark.finditer(text)]

    def _source(self, tools: Any) -> str:
        if self._default:
            return self._default
        try:
            return str(self._tokenizer.get_chat_template(tools=tools))
        except ValueError as error:
            raise DataError(
                f"none of the tokenizer's chat templates is the default: {', '.join(self._tokenizer.chat_template)}",
                remedy="Name one of them `default` in the model's tokenizer files.",
            ) from error

    def _forms(self, segments: Sequence[Segment]) -> Iterator[list[Message]]:
        """Yield the messages as templates take them, which differ where there are tool calls.

        A turn without text has no content, where the template tests for that, or an empty one. The arguments of calls
        are objects, or JSON text.
        """
        messages: list[Message] = [segment.message() for segment in segments]
        if any("tool_calls" in message for message in messages):
            if _TESTS_FOR_NONE.search(self._source(None)):
                without = [{**m, "content": m["content"] or None} if "tool_calls" in m else m for m in messages]
                yield from (without, [written_arguments(message) for message in without])
            yield from (messages, [written_arguments(message) for message in messages])
        else:
            yield messages

    def _render(
        self, messages: Sequence[Message], tools: Any, *, ask: bool = False, mask: bool = False
    ) -> tuple[str, Spans]:
        from transformers.utils.chat_template_utils import render_jinja_template

        render = cast(Callable[..., tuple[list[str], list[Spans]]], render_jinja_template)
        try:
            texts, spans = render(
                [messages],
                tools=tools,
                chat_template=self._source(tools),
                add_generation_prompt=ask,
                return_assistant_tokens_mask=mask,
                **self._names,
            )
        except Exception as error:  # templates are programs: they refuse with a TemplateError and fail with anything
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            reason = str(error) if type(error).__name__ == "TemplateError" else reason
            raise ConversationRefused(f"the chat template refuses it: {reason[:_MAX_REASON_CHARS]}") from error
        return texts[0], [(start, end) for start, end in spans[0] if end > start] if mask else []

    def _with_end_marks(self, text: str, spans: Spans, messages: Sequence[Message]) -> Spans:
        """Extend the template's own spans over the end mark where they leave it out."""
        last = messages[-1]["role"] == "assistant"
        tail = text[spans[-1][1] :] if last else str(self._names.get("eos_token") or "")
        starts = [start for start, _ in spans[1:]] + [len(text)]
        closed = []
        for (start, end), limit in zip(spans, starts, strict=True):
            mark = self._mark.match(text, end)
            if mark and tail.startswith(mark.group()):
                end = mark.end()
            closed.append((start, min(end, limit)))
        return _merged(closed)


class _Turns:
    """Locates the assistant's turns of one conversation in its rendered text."""

    def __init__(self, template: ChatTemplate, messages: Sequence[Message], tools: Any, text: str):
        self._template, self._messages, self._tools, self._text = template, messages, tools, text
        self._marked = [_with_placeholder(index, message) for index, message in enumerate(messages)]
        self._prompts: dict[str, str | None] = {}
        self._rewrites_all: bool | None = None

    def locate(self, trainable: Sequence[int]) -> Spans:
        """Spans of the turns of the messages ``trainable``; those that cannot be located are left out."""
        outline = self._template.render(self._marked, self._tools)
        found = self._follow(outline, set(trainable)) if outline else {}
        for index in trainable:
            # With tool calls, or behind a message without text, the outline has no border that could be found.
            if index not in found and (not outline or not self._has_borders(index)):
                span = self._compare_prefixes(index)
                if span:
                    found[index] = span
        return sorted(span for index, span in found.items() if self._is_written(index, *span))

    def _is_written(self, index: int, start: int, end: int) -> bool:
        """Whether a turn without text has its tool calls. Some templates leave them out: the turn is empty then."""
        calls = self._messages[index].get("tool_calls")
        if self._messages[index].get("content") or not isinstance(calls, list):
            return True
        functions = [call.get("function", call) for call in calls if isinstance(call, dict)]
        return any(str(function.get("name")) in self._text[start:end] for function in functions)

    def _has_borders(self, index: int) -> bool:
        """Whether placeholders stand in for the content of a message and of the one before."""
        return all(self._marked[i] is not self._messages[i] for i in (max(0, index - 1), index))

    def _follow(self, outline: str, trainable: set[int]) -> dict[int, tuple[int, int]]:
        """Walk along the rendered text and the outline: message index -> span."""
        places = list(_PLACEHOLDER.finditer(outline))
        borders = [0, *(place.end() for place in places)]
        found: dict[int, tuple[int, int]] = {}
        position = 0
        for number, place in enumerate(places):
            index, header = int(place[1]), outline[borders[number] : place.start()]
            is_last = number + 1 == len(places)
            following = outline[place.end() :] if is_last else outline[place.end() : places[number + 1].start()]
            prompt = self._prompt_length(index, header)
            common = _common(header, self._text, position)
            expected = following
            if not is_last and self._messages[following_index := int(places[number + 1][1])]["role"] == "assistant":
                expected = following[: self._prompt_length(following_index, following)]
            end = self._content_end(index, position + common, expected) if common == len(header) else None
            rewritten = end is None
            if end is None:
                end = self._text.find(expected, position + common) if expected else len(self._text)
                if end < 0:
                    break
            closes = is_last and index == len(self._messages) - 1
            if index in trainable and self._has_borders(index) and (not rewritten or self._rewritten(index, closes)):
                mark = self.text_end - end if closes else self._template.end_mark(following, self._last_tail[0])
                start = position + self._template.before_mark(header, min(common, prompt))
                if start < end + mark:
                    found[index] = start, end + mark
            position = end
        return found

    def _content_end(self, index: int, start: int, expected: str) -> int | None:
        """End of a message's content that stands at ``start``, with ``expected`` behind it; None if it does not."""
        content = self._messages[index]["content"]
        for text in dict.fromkeys((content, content.rstrip(), content.lstrip(), content.strip())):
            if self._text.startswith(text, start) and self._text.startswith(expected, start + len(text)):
                return start + len(text)
        return None

    def _rewritten(self, index: int, closes: bool) -> bool:
        """Whether a turn whose content the template changes is in the loss.

        It is where the change does not depend on what follows. Looked at once: templates treat all turns alike.
        """
        if closes:
            return True
        if self._rewrites_all is None:
            self._rewrites_all = self._compare_prefixes(index, whole_turn=True) is not None
        return self._rewrites_all

    def _prompt_length(self, index: int, header: str) -> int:
        """How much of ``header``, what precedes the content of a message, the model is given when it is asked."""
        if index == 0 or self._messages[index]["role"] != "assistant":
            return len(header)
        role = self._messages[index - 1]["role"]
        if role not in self._prompts:
            asked = self._template.render(self._marked[:index], self._tools, ask=True)
            self._prompts[role] = None if asked is None else _PLACEHOLDER.split(asked)[-1]
        prompt = self._prompts[role]
        return len(header) if prompt is None else _common(prompt, header, 0)

    @functools.cached_property
    def _last_tail(self) -> tuple[str | None, str]:
        """What follows the content of the first assistant turn with text when nothing else does, in two parts.

        The second part is a generation prompt that the template was not asked for, as Command R's, and mostly "".
        Such a template writes the same whether it is asked or not, and begins an answer behind a question. What a
        further question leaves of the first part is the end mark, without a token that every turn begins with.
        """
        answers = (i for i, message in enumerate(self._messages) if message["role"] == "assistant")
        first = next((i for i in answers if self._marked[i] is not self._messages[i]), 0)
        before, turn = self._marked[:first], self._marked[first : first + 1]
        closed = self._template.render([*before, *turn], self._tools)
        if closed is None:
            return None, ""
        tail = _PLACEHOLDER.split(closed)[-1]
        plain, asked = (self._template.render(before, self._tools, ask=ask) for ask in (False, True))
        if plain is None or plain != asked or before[-1]["role"] != "user":
            return tail, ""
        again = _PLACEHOLDER.split(self._template.render([*before, *turn, before[-1]], self._tools) or "")
        place = again.index(str(first)) if str(first) in again[1::2] else 0
        header, following = (again[place - 1], again[place + 1]) if place else ("", "")
        question_end = _PLACEHOLDER.split(plain)[-1]
        if header.startswith(question_end) and header != question_end:
            return tail, ""
        end = self._template.before_mark(tail, _common(tail, following, 0))
        *others, last = [0, *self._template.marks(tail[:end])]
        end = last if len(others) > 1 and end < len(tail) else end
        return tail[:end], tail[end:]

    @functools.cached_property
    def text_end(self) -> int:
        """End of the text without a generation prompt that was not asked for."""
        return len(self._text.removesuffix(self._last_tail[1]))

    def _without_empty_frame(self, turn: str, start: int) -> int | None:
        """End of a turn in the text that is ``turn`` without the empty think block that a last turn gets."""
        frame = _FRAME.match(turn)
        for cut in range(frame.end() + 1 if frame else 0):
            if self._text.startswith(turn[cut:], start):
                return start + len(turn) - cut
        return None

    def _compare_prefixes(self, index: int, whole_turn: bool = False) -> tuple[int, int] | None:
        """Span of a turn by rendering the conversation up to it: exact, in time of the conversation's length.

        None where an earlier part is rendered differently. ``whole_turn``: None, too, where the turn itself is.
        """
        before = self._template.render(self._messages[:index], self._tools)
        asked = self._template.render(self._messages[:index], self._tools, ask=True)
        after = self._template.render(self._messages[: index + 1], self._tools)
        if before is None or asked is None or after is None:
            return None
        before, after = (text.removesuffix(self._last_tail[1]) for text in (before, after))
        start = self._template.before_mark(self._text, _common(asked, self._text, 0))
        end = self._template.before_mark(self._text, _common(after, self._text, 0))
        if end < len(after):
            unframed = None if whole_turn else self._without_empty_frame(after[start:], start)
            if unframed is not None:
                end = unframed
            elif whole_turn:
                return None
            else:  # the end mark differs once others follow
                end += self._template.end_mark(self._text[end:], after[end:])
        if index == len(self._messages) - 1:
            end = self.text_end
        border = self._template.before_mark(asked, _common(before, asked, 0))
        return (start, end) if border <= start < end else None


_FRAME = re.compile(r"\s*(?:</?\w+>\s*)*")
"""Tags without text, as an empty think block, and the white space around them."""

_REASONING = ("reasoning_content", "reasoning", "thinking")


def _with_placeholder(index: int, message: Message) -> Message:
    """Return the message with a placeholder as its content; the message itself without text or with tool calls."""
    if not message.get("content") or message.get("tool_calls"):
        return message
    return {**message, "content": f"\U0010fffd{index}\U0010fffc"}


def _common(prefix: str, text: str, position: int) -> int:
    """Length of the common prefix of ``prefix`` and ``text[position:]``."""
    return len(os.path.commonprefix([prefix, text[position : position + len(prefix)]]))


def _merged(spans: Spans) -> Spans:
    """Sorted spans without overlaps; those that touch become one."""
    merged: Spans = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged
