"""Commands that convert data that edgefed cannot read: one line each, shown in errors."""

from __future__ import annotations

import json
import pathlib
import shlex
from collections.abc import Collection

from edgefed.training.records import PROMPTS, RESPONSES

_MAX_INSPECTED_BYTES = 64 << 20

_COMMANDS = {
    ".pdf": "pdftotext {source} {text}",
    ".docx": "pandoc -t plain -o {text} {source}",
    ".odt": "pandoc -t plain -o {text} {source}",
    ".epub": "pandoc -t plain -o {text} {source}",
    ".html": "pandoc -t plain -o {text} {source}",
    ".zip": "unzip {source} -d {folder}",
    ".zst": "zstd -d {source}",
    ".xz": "xz -dk {source}",
    ".bz2": "bzip2 -dk {source}",
}
_PYTHON = {
    ".xlsx": "import pandas; pandas.read_excel({source!r}).to_json({lines!r}, orient='records', lines=True)",
    ".parquet": "import pandas; pandas.read_parquet({source!r}).to_json({lines!r}, orient='records', lines=True)",
    ".arrow": "import datasets; datasets.Dataset.from_file({source!r}).to_json({lines!r})",
}
_ARRAY_OF = "import json; [print(json.dumps(r)) for r in json.load(open({source!r}))[{key!r}]]"
_OBJECT = "import json; print(json.dumps(json.load(open({source!r}))))"
_PROMPT_NAMES = (*PROMPTS, "title", "source")
_RESPONSE_NAMES = (*RESPONSES, "completion", "summary")
_TEXT_NAMES = ("content", "body", "article", "document", "sentence", "passage")


def python_command(code: str) -> str:
    """The shell command that runs Python code."""
    plain = not any(character in code for character in '"$`\\!')  # what a shell reads within double quotes
    return f'python -c "{code}"' if plain else f"python -c {shlex.quote(code)}"


def how_to_convert(path: pathlib.Path, *, key: str | None = None) -> str:
    """The remedy for a file of another format: the command that converts it.

    ``key``: the file is a JSON object, and the records are the array under this key ("" if there is none).
    """
    lines = str(path.with_name(path.name.removesuffix(path.suffix) + ".jsonl"))
    if key is not None:
        code = (_ARRAY_OF if key else _OBJECT).format(source=str(path), key=key)
        return f"Convert it: {python_command(code)} > {shlex.quote(lines)}"
    if path.suffix.lower() == ".npz":
        return "Labelled images need `task=images`."
    if code := _PYTHON.get(path.suffix.lower(), ""):
        return f"Convert it: {python_command(code.format(source=str(path), lines=lines))}"
    command = _COMMANDS.get(path.suffix.lower(), "cp {source} {text}")
    quoted = {
        "source": shlex.quote(str(path)),
        "text": shlex.quote(str(path.with_name(path.stem + ".txt"))),
        "folder": shlex.quote(str(path.with_name(path.stem))),
    }
    verb = "If it is plain text" if path.suffix.lower() not in _COMMANDS else "Convert it"
    return f"{verb}: {command.format(**quoted)}"


def keyed_array(path: pathlib.Path) -> str:
    """The key of the only array of a JSON object in a file; "" if there is none, or the file is large or invalid."""
    if path.suffix == ".gz" or path.stat().st_size > _MAX_INSPECTED_BYTES:
        return ""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return ""
    arrays = [key for key, item in value.items() if isinstance(item, list)] if isinstance(value, dict) else []
    return arrays[0] if len(arrays) == 1 else ""


def how_to_name_fields(source: str, found: Collection[str]) -> str:
    """The remedy for records without a known form: settings that name the fields, or a command that converts."""
    names = {name.lower(): name for name in found}
    prompt = next((names[name] for name in _PROMPT_NAMES if name in names), None)
    response = next((names[name] for name in _RESPONSE_NAMES if name in names), None)
    if prompt and response:
        return f"Name the fields: `prompt_field={prompt}` `response_field={response}`."
    text = next((names[name] for name in _TEXT_NAMES if name in names), None)
    if text:
        return f"Name the field: `text_field={text}`."
    return "Name the fields with `prompt_field` and `response_field`, or with `text_field`."
