"""One record of user text: what it says and which part of it is learned from. Pure; knows no files and no tokenizer.

Record forms of a JSON line, tried in this order:

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
        the assistant's answers are learned
    {"prompt": "...", "completion": "..."}
        the completion is learned
    {"instruction": "...", "response" (or "output"): "...", optional "context" (or "input"): "..."}
        the response is learned
    {"text": "..."}
        all of it is learned

Other fields are ignored. An instruction becomes `### Instruction:`, `### Context:` (when there is one) and
`### Response:` headings; a prompt and its completion are joined as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")

PASSAGE_MIN_CHARS = 1000  # a passage ends at the first empty line after this
PASSAGE_MAX_CHARS = 2000  # or at the line end before this


@dataclass(frozen=True)
class Segment:
    """A piece of an example.

    Attributes:
        text: the characters; for a chat message its bare content.
        learn: whether the loss is taken on it.
        role: the speaker of a chat message, or None. Chat is laid out only where the tokenizer, and with it the
            chat template, is known.

    """

    text: str
    learn: bool
    role: str | None = None


Example = tuple[Segment, ...]


class BadRecord(Exception):
    """A line is no usable record; the text of the exception is the reason."""


def parse_record(line: str) -> Example:
    """Return the example of one JSON line.

    Raises:
        BadRecord: no JSON, no object, no known form, a field of the wrong type, or nothing in a field that needs text.

    """
    record = json_object(line)
    if "messages" in record:
        return _chat_example(record["messages"])
    if "prompt" in record or "completion" in record:
        return Segment(text_field(record, "prompt"), False), Segment(text_field(record, "completion"), True)
    if "instruction" in record:
        answer = "response" if "response" in record else "output" if "output" in record else "response"
        context = "context" if "context" in record else "input"
        return _instruction_example(
            text_field(record, "instruction"), text_field(record, context, optional=True), text_field(record, answer)
        )
    if "text" in record:
        return (Segment(text_field(record, "text"), True),)
    found = ", ".join(sorted(record)[:5]) or "none"
    raise BadRecord(f"no known field: text, prompt + completion, instruction + response or messages; found {found}")


def json_object(line: str) -> dict[str, Any]:
    """Return the object of one JSON line.

    Raises:
        BadRecord: an empty line, no JSON, or something else than an object.

    """
    if not line.strip():
        raise BadRecord("empty line")
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadRecord(f"no valid JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits; a thousand open brackets
        raise BadRecord(f"no valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise BadRecord(f"a record must be a JSON object, this is {_kind(record)}")
    return record


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


def _instruction_example(instruction: str, context: str, response: str) -> Example:
    middle = f"### Context:\n{context}\n\n" if context.strip() else ""
    return Segment(f"### Instruction:\n{instruction}\n\n{middle}### Response:\n", False), Segment(response, True)


def _chat_example(messages: Any) -> Example:
    if not isinstance(messages, list):
        raise BadRecord(f"messages must be a list, this is {_kind(messages)}")
    segments = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise BadRecord(f"message {number} must be an object, this is {_kind(message)}")
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise BadRecord(f"message {number} has the role {role!r:.40}; known are {', '.join(ROLES)}")
        answer = role == "assistant"
        content = text_field(message, "content", may_be_empty=not answer, where=f"message {number}: ")
        segments.append(Segment(content, answer, role))
    if not any(segment.learn for segment in segments):
        raise BadRecord("no assistant message to learn from")
    return tuple(segments)


def text_field(
    record: dict[str, Any], field: str, *, optional: bool = False, may_be_empty: bool = False, where: str = ""
) -> str:
    """Return the string under `field`; "" when it is optional and absent or null.

    Raises:
        BadRecord: it is missing, no string, empty, or no text that can be written as UTF-8.

    """
    value = record.get(field)
    if value is None and optional:
        return ""
    if field not in record:
        raise BadRecord(f"{where}{field} is missing")
    if not isinstance(value, str):
        raise BadRecord(f"{where}{field} must be a string, this is {_kind(value)}")
    if not (value.strip() or optional or may_be_empty):
        raise BadRecord(f"{where}{field} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which no tokenizer takes
        raise BadRecord(f"{where}{field} holds half a surrogate pair, which is no character") from None
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
