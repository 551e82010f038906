"""One record of user text: what it says and which part of it is in the loss. Pure; knows no files and no tokenizer.

Record forms, tried in this order:

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
        the assistant's turns are in the loss
    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}], optional "system": "..."}
        the same, as ShareGPT writes it
    {"prompt": "...", "completion": "..."}
        the completion is in the loss
    {"instruction": "...", "response": "...", optional "context" (or "input"): "..."}
        the response is in the loss; the names may be others of `PROMPTS` and `RESPONSES`, in any case
    {"text": "..."}
        all of it is in the loss

`RecordFields` names other fields. A prompt and its completion are joined as they are. An instruction and its response
are a conversation of two turns; a context follows the instruction under the heading `### Context:`. Conversations are
laid out by the model's chat template, or by edgefed's own where it has none (`edgefed.training.chat_template`).

Of a message, ``content`` may be a string or a list of parts of type ``text``, which are joined. An assistant's content
may be missing beside ``tool_calls``. The fields in `CHAT_FIELDS`, and the record's ``tools``, are handed to the
tokenizer's chat template. Other fields are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")

SHARE_GPT_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "observation": "tool",
}  # fmt: skip
"""Speakers of ShareGPT's conversations that are called otherwise in `ROLES`."""

MESSAGE_FIELDS = ("reasoning_content", "reasoning", "thinking", "tool_calls", "tool_call_id", "name")
"""Fields of a message beside role and content that a chat template may write."""

CHAT_FIELDS = (*MESSAGE_FIELDS, "tools")
"""All that a chat template may write beside roles and contents; ``tools`` belongs to the record."""

PASSAGE_MIN_CHARS = 1000  # a passage ends at the first empty line after this
PASSAGE_MAX_CHARS = 2000  # or at the line end before this


@dataclass(frozen=True)
class Segment:
    """A piece of an example.

    Attributes:
        text: the characters; for a chat message its bare content.
        in_loss: whether the loss is taken on it.
        role: the speaker of a chat message, or None. Chat is laid out only where the tokenizer, and with it the
            chat template, is known.
        fields: the message's `MESSAGE_FIELDS` that are given.

    """

    text: str
    in_loss: bool
    role: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def message(self) -> dict[str, Any]:
        """Return the chat message, as chat templates take it."""
        return {"role": self.role, "content": self.text, **self.fields}


@dataclass(frozen=True)
class Example:
    """One record.

    Attributes:
        segments: its pieces, in order.
        place: where the record is, as "line 3" or "b.jsonl line 3"; None if that is not known. Equal records differ in
            it.
        tools: what the assistant may call, as JSON schemas; only for chat.
        read: the fields of the record that the segments are made of; empty for plain text.

    """

    segments: tuple[Segment, ...]
    place: str | None = field(default=None, compare=False)
    tools: list[Any] | None = field(default=None, hash=False)
    read: tuple[str, ...] = field(default=(), compare=False)


class BadRecord(Exception):
    """A line is not a usable record; the text of the exception is the reason."""


PROMPTS = ("instruction", "prompt", "question", "query", "problem", "user", "input", "inputs")
RESPONSES = ("response", "output", "solution", "answer", "assistant", "reply", "target", "targets", "outputs")
"""Names of an instruction and of its response as data sets have them; the first of each that a record has is read."""
CHATS = ("messages", "conversations")
FORM_FIELDS = {*CHATS, "system", "tools", "prompt", "completion", "context", "text", *PROMPTS, *RESPONSES}
"""Every field that a form reads, in lower case."""


@dataclass(frozen=True)
class RecordFields:
    """Names of the fields to read, where they are not those of the forms.

    Attributes:
        prompt: the instruction.
        response: what is to be learned.
        text: plain text, all of it to be learned; excludes the other two.
        deduplicate: use each record once; equal ones are those with the same segments and tools.

    """

    prompt: str | None = None
    response: str | None = None
    text: str | None = None
    deduplicate: bool = False

    def __bool__(self) -> bool:
        return any((self.prompt, self.response, self.text))

    def columns(self, names: Sequence[str]) -> list[str]:
        """The columns to read of a table with the columns ``names``: those in use, or all if no form is complete."""
        given = {name for name in (self.prompt, self.response, self.text) if name}
        answers = {self.response or self.text, *CHATS, "completion", "text", *RESPONSES}
        complete = any(name in answers or name.lower() in answers for name in names)
        return [name for name in names if name in given or name.lower() in FORM_FIELDS or not complete]


AUTOMATIC = RecordFields()
"""The form of each record decides."""


def parse_record(record: Mapping[str, Any], fields: RecordFields = AUTOMATIC, place: str | None = None) -> Example:
    """Return the example of one record.

    Raises:
        BadRecord: no known form, a field of the wrong type, or a required field is empty.

    """
    if fields.text:
        return _plain(record, fields.text, place)
    names = {name.lower(): name for name in record if name not in (fields.prompt, fields.response)}
    asked = fields.prompt or next((names[name] for name in PROMPTS if name in names), None)
    answered = fields.response or next((names[name] for name in RESPONSES if name in names), None)
    if fields:
        return _instruction(record, asked or "instruction", answered or "response", place)
    if "messages" in record:
        return Example(_chat_segments(record["messages"]), place, _tools(record.get("tools")), ("messages",))
    if isinstance(record.get("conversations"), list):
        turns = [_from_share_gpt(turn) for turn in record["conversations"]]
        if (system := text_field(record, "system", optional=True)).strip():
            turns.insert(0, {"role": "system", "content": system})
        return Example(_chat_segments(turns), place, _tools(record.get("tools") or None), ("conversations",))
    has_both = asked is not None and answered is not None
    if {"prompt", "completion"} <= record.keys() or (not has_both and {"prompt", "completion"} & record.keys()):
        pieces = Segment(text_field(record, "prompt"), False), Segment(text_field(record, "completion"), True)
        return Example(pieces, place, read=("prompt", "completion"))
    if asked is not None and (has_both or asked == "instruction"):
        return _instruction(record, asked, answered or "response", place)
    if "text" in record:
        return _plain(record, "text", place)
    found = ", ".join(sorted(record)[:5]) or "none"
    raise BadRecord(f"no known field: text, prompt + completion, instruction + response or messages; found {found}")


def check_object(value: Any) -> dict[str, Any]:
    """Return ``value``, which must be a JSON object. Raises BadRecord."""
    if not isinstance(value, dict):
        raise BadRecord(f"a record must be a JSON object, found {_kind(value)}")
    return value


def json_object(line: str) -> dict[str, Any]:
    """Return the object of one JSON line.

    Raises:
        BadRecord: an empty line, invalid JSON, or not an object.

    """
    if not line.strip():
        raise BadRecord("empty line")
    try:
        record = json.loads(line.rstrip())  # the end of an unfinished line is not column 1 of the next one
    except json.JSONDecodeError as error:
        raise BadRecord(f"invalid JSON: {error.msg.removesuffix(' at')} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits; a thousand open brackets
        raise BadRecord(f"invalid JSON: {error}") from error
    return check_object(record)


def cut_passages(lines: Iterable[str]) -> Iterator[str]:
    """Yield passages of about 1,000-2,000 characters from the lines of a plain text, each line with its line end.

    A passage ends at the first empty line after 1,000 characters, or before the line that would lift it above 2,000;
    a longer line is cut at a space. Only empty lines at the seams are lost.
    """
    passage: list[str] = []
    size = 0
    for whole_line in lines:
        for line in _cut_line(whole_line):
            if size + len(line) > PASSAGE_MAX_CHARS or (size >= PASSAGE_MIN_CHARS and not line.strip()):
                yield from _close_passage(passage)
                passage, size = [], 0
            passage.append(line)
            size += len(line)
    yield from _close_passage(passage)


def _cut_line(line: str) -> Iterator[str]:
    start = 0
    while len(line) - start > PASSAGE_MAX_CHARS:
        space = line.rfind(" ", start, start + PASSAGE_MAX_CHARS)
        end = space + 1 if space > start else start + PASSAGE_MAX_CHARS
        yield line[start:end]
        start = end
    yield line[start:]


def _close_passage(passage: list[str]) -> Iterator[str]:
    text = "".join(passage).strip("\n")
    if text.strip():
        yield text


def instruction_turn(instruction: str, context: str = "") -> str:
    """Return the user's turn of an instruction with an optional context."""
    return f"{instruction}\n\n### Context:\n{context}" if context.strip() else instruction


def _plain(record: Mapping[str, Any], name: str, place: str | None) -> Example:
    return Example((Segment(text_field(record, name), True),), place, read=(name,))


def _instruction(record: Mapping[str, Any], prompt: str, answer: str, place: str | None) -> Example:
    context_field = "context" if "context" in record else "input"
    used = (prompt, answer)  # a field that is named as the prompt is no context
    context = "" if context_field in used else text_field(record, context_field, optional=True)
    instruction, text = text_field(record, prompt), text_field(record, answer)
    turns = Segment(instruction_turn(instruction, context), False, "user"), Segment(text, True, "assistant")
    return Example(turns, place, read=(prompt, *((context_field,) if context.strip() else ()), answer))


def _chat_segments(messages: Any) -> tuple[Segment, ...]:
    if not isinstance(messages, list):
        raise BadRecord(f"messages must be a list, found {_kind(messages)}")
    segments = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise BadRecord(f"message {number} must be an object, found {_kind(message)}")
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise BadRecord(f"message {number} has the role {role!r:.40}; known are {', '.join(ROLES)}")
        fields = {name: message[name] for name in MESSAGE_FIELDS if message.get(name)}
        if "tool_calls" in fields:
            fields["tool_calls"] = _with_arguments(fields["tool_calls"], _parsed)
        _check_characters(json.dumps(fields, ensure_ascii=False), f"message {number}: a field")
        is_answer = role == "assistant"
        content = _content(message, f"message {number}: ", may_be_empty=not is_answer, optional="tool_calls" in fields)
        segments.append(Segment(content, is_answer, role, fields))
    if not any(segment.in_loss for segment in segments):
        raise BadRecord("no assistant message to train on")
    return tuple(segments)


def written_arguments(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a message with the arguments of its tool calls as JSON text, which DeepSeek's chat templates expect."""
    if "tool_calls" not in message:
        return message
    return {**message, "tool_calls": _with_arguments(message["tool_calls"], _as_json)}


def _as_json(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _with_arguments(calls: Any, change: Callable[[Any], Any]) -> Any:
    """Return tool calls with the ``arguments`` of each changed; what has another form than OpenAI's stays as it is."""
    if not isinstance(calls, list):
        return calls
    found = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and "arguments" in function:
            call = {**call, "function": {**function, "arguments": change(function["arguments"])}}
        found.append(call)
    return found


def _parsed(arguments: Any) -> Any:
    """Return the object that OpenAI's files write as JSON in a string: chat templates expect the object."""
    try:
        value = json.loads(arguments) if isinstance(arguments, str) else None
    except ValueError:
        return arguments
    return value if isinstance(value, dict) else arguments


def _from_share_gpt(turn: Any) -> Any:
    """A turn with ``from`` and ``value`` as a message; anything else unchanged."""
    if not isinstance(turn, dict) or "from" not in turn or "role" in turn:
        return turn
    speaker = turn["from"]
    role = SHARE_GPT_ROLES.get(speaker, speaker) if isinstance(speaker, str) else speaker
    return {**turn, "role": role, "content": turn.get("value")}


def _content(message: dict[str, Any], where: str, *, may_be_empty: bool, optional: bool) -> str:
    """Return the text of a message; parts of type ``text`` are joined. Raises BadRecord."""
    parts = message.get("content")
    if isinstance(parts, list):
        for number, part in enumerate(parts, start=1):
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text":
                raise BadRecord(f"{where}content part {number} has the type {kind!r:.40}; only text can be used")
        texts = [text_field(part, "text", may_be_empty=True, where=where) for part in parts]
        message = {"content": "".join(texts)}
    return text_field(message, "content", optional=optional, may_be_empty=may_be_empty, where=where)


def _tools(tools: Any) -> list[Any] | None:
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise BadRecord("tools must be a list of objects")
    _check_characters(json.dumps(tools, ensure_ascii=False), "tools")
    return tools or None


def text_field(
    record: Mapping[str, Any], name: str, *, optional: bool = False, may_be_empty: bool = False, where: str = ""
) -> str:
    """Return the string under ``name``; "" when it is optional and absent or null.

    Raises:
        BadRecord: it is missing, not a string, empty, or cannot be written as UTF-8.

    """
    value = record.get(name)
    if value is None and optional:
        return ""
    if name not in record:
        raise BadRecord(f"{where}{name} is missing")
    if not isinstance(value, str):
        raise BadRecord(f"{where}{name} must be a string, found {_kind(value)}")
    if not (value.strip() or optional or may_be_empty):
        raise BadRecord(f"{where}{name} is empty")
    _check_characters(value, f"{where}{name}")
    return value


def _check_characters(text: str, what: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which no tokenizer takes
        raise BadRecord(f"{what} contains half a surrogate pair, which is not a character") from None


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
