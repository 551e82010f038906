"""What a client accepts from a server: names that stay in their folder, sizes that a device can hold, plain text.

A server may be hostile. Its messages are well-formed when they come here; this module bounds what they say. Each check
raises MalformedMessage, which names the field and what was found. Nothing here opens a file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec

from edgefed.errors import MalformedMessage
from edgefed.protocol.frames import COMPRESSIONS
from edgefed.protocol.messages import UNIT_KINDS, Manifest, RunConfig

RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}")
MAX_TEXT_CHARACTERS = 1000
MAX_UNITS, MAX_FILES = 500_000, 64
MAX_FILE_BYTES = 256 * 1024 * 1024
MAX_UNIT_BYTES = 2**42
TRAINING_RANGES: dict[str, tuple[float, float]] = {
    "local_steps": (1, 100_000), "batch_size": (1, 65_536), "sequence_length": (2, 2**20), "learning_rate": (0, 1e3),
    "weight_decay": (0, 1e3), "max_grad_norm": (0, 1e6), "lora_rank": (1, 65_536), "lora_alpha": (0, 1e6),
    "profile_tokens": (0, 10**9), "evaluation_tokens": (0, 10**9), "round_seconds": (0, 1e9),
    "evaluate_every": (1, 10**6), "min_lora_rank": (0, 65_536),
}  # fmt: skip
MAX_ROUND_TOKENS = 10**10
"""Of one device in one round."""
MAX_SIZE, MAX_POSITIONS = 2**20, 2**27
"""Limits of sizes in config.json that no tensor of the manifest bounds, and of lengths in tokens."""
MODEL_SIZES = (
    "hidden_size", "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "vocab_size",
    "d_model", "n_embd", "ffn_dim", "num_experts", "num_local_experts", "n_routed_experts", "num_attention_heads",
    "num_key_value_heads",
)  # fmt: skip
"""Keys of config.json that are dimensions of tensors."""
LAYER_NUMBERS = ("max_window_layers",)
"""Keys that name layers and count none: real configurations have more than the model (dots.llm1: 62)."""
MAX_REPLACEMENT_CHARACTERS, MAX_PATTERN_CHARACTERS = 16, 4096

T = TypeVar("T")


def printable(text: str) -> str:
    """``text`` as one line for a terminal: what is not printable becomes a space, and the end of a long one is cut."""
    line = "".join(character if character.isprintable() else " " for character in text[:MAX_TEXT_CHARACTERS])
    return line if len(text) <= MAX_TEXT_CHARACTERS else f"{line}..."


def printable_message(message: T) -> T:
    """A message with every text made `printable`."""

    def clean(value: Any) -> Any:
        if isinstance(value, str):
            return printable(value)
        if isinstance(value, dict):
            return {clean(key): clean(each) for key, each in value.items()}
        return [clean(each) for each in value] if isinstance(value, (list, tuple)) else value

    return msgspec.convert(clean(msgspec.to_builtins(message)), type=type(message))


def check_run(run: RunConfig) -> None:
    """Check the configuration of a run: its id becomes part of file names, its numbers become work."""
    if RUN_ID.fullmatch(run.run_id) is None:
        raise MalformedMessage(f"invalid run_id {run.run_id[:80]!r}: expected 1 to 64 letters, digits, _ or -")
    if not 1 <= run.rounds <= 10**6:
        raise MalformedMessage(f"the run has {run.rounds} rounds, expected 1..1000000")
    for name, (least, most) in TRAINING_RANGES.items():
        value = getattr(run.training, name)
        if not least <= value <= most:
            raise MalformedMessage(f"training: {name} is {value}, expected {least:g}..{most:g}")
    if run.compression not in COMPRESSIONS:
        raise MalformedMessage(f"unknown compression {run.compression[:40]!r}: expected {', '.join(COMPRESSIONS)}")
    training = run.training
    tokens = training.local_steps * training.batch_size * training.sequence_length
    if tokens > MAX_ROUND_TOKENS:
        raise MalformedMessage(f"training: a round has {tokens:.3g} tokens, expected at most {MAX_ROUND_TOKENS:g}")
    if problems := training.problems(run.rounds):
        raise MalformedMessage(f"training: {printable('; '.join(problems))}")


def check_manifest(manifest: Manifest) -> None:
    """Check names and sizes of a manifest."""
    if len(manifest.units) > MAX_UNITS or len(manifest.files) > MAX_FILES:
        raise MalformedMessage(f"the manifest has {len(manifest.units)} units and {len(manifest.files)} files")
    for unit in manifest.units:
        named = 0 < len(unit.key) <= MAX_TEXT_CHARACTERS and unit.key.isprintable()
        if unit.kind not in UNIT_KINDS or not named or not 0 <= unit.size_bytes <= MAX_UNIT_BYTES:
            raise MalformedMessage(
                f"invalid unit {printable(unit.key)!r}: kind {printable(unit.kind)!r}, {unit.size_bytes} bytes"
            )
        for info in unit.tensors:
            if any(dim < 0 for dim in info.shape) or math.prod(info.shape) > unit.size_bytes:
                raise MalformedMessage(
                    f"tensor {printable(info.name)!r} of unit {unit.key!r} has shape {list(info.shape)[:8]}, "
                    f"more than its {unit.size_bytes} bytes"
                )
    names = [file.name for file in manifest.files]
    for file in manifest.files:
        if FILE_NAME.fullmatch(file.name) is None or names.count(file.name) > 1:
            raise MalformedMessage(f"invalid file name {printable(file.name[:80])!r} in the manifest")
        if not 0 <= file.size_bytes <= MAX_FILE_BYTES:
            raise MalformedMessage(f"file {file.name} has {file.size_bytes} bytes, expected at most {MAX_FILE_BYTES}")


def check_model_config(settings: dict[str, Any], manifest: Manifest) -> None:
    """Check that config.json describes a model no larger than the manifest's, and names no code of a hub."""
    for path, value in _leaves(settings):
        if isinstance(value, str) and any("implementation" in key for key in path) and not value.isidentifier():
            # transformers would load code of this name from a hub
            raise MalformedMessage(f"config.json: {path[-1]} is {printable(value[:80])!r}, which is code elsewhere")
    largest = max((dim for unit in manifest.units for info in unit.tensors for dim in info.shape), default=1)
    for (*_, name), value in _leaves(settings):
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        limit = MAX_POSITIONS if _is_length(name) else max(MAX_SIZE, largest)
        if ("layers" in name and name not in LAYER_NUMBERS) or name in ("n_layer", "depth"):
            limit = len(manifest.units)
        elif name in MODEL_SIZES:
            limit = largest
        elif not _is_size(name) and not _is_length(name):
            continue
        if value > limit:
            raise MalformedMessage(f"config.json: {name} is {value}, and the model's tensors allow {limit} at most")


def _leaves(value: Any, path: tuple[str, ...] = ("",)) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The values of nested settings, each with its keys from the outermost; those of a list have the list's keys."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _leaves(each, (*path, str(key)))
    elif isinstance(value, list):
        for each in value:
            yield from _leaves(each, path)
    else:
        yield path, value


def _is_size(name: str) -> bool:
    return any(word in name for word in ("size", "dim", "rank", "heads", "expert", "width", "group"))


def _is_length(name: str) -> bool:
    return any(word in name for word in ("position", "length", "window", "ctx", "context", "chunk"))


def check_tokenizer(tokenizer: dict[str, Any]) -> None:
    """Check tokenizer.json for what blows up a text or takes for ever: long replacements and nested repetitions."""
    pending: list[Any] = [tokenizer.get(part) for part in ("normalizer", "pre_tokenizer")]
    while pending:
        value = pending.pop()
        if isinstance(value, list):
            pending += value
        elif isinstance(value, dict):
            pending += value.values()
            for field in ("content", "prepend"):
                text = value.get(field)
                if isinstance(text, str) and len(text) > MAX_REPLACEMENT_CHARACTERS:
                    raise MalformedMessage(f"tokenizer.json: a replacement has {len(text)} characters: {text[:20]!r}")
            pattern = value.get("Regex")
            if isinstance(pattern, str) and (len(pattern) > MAX_PATTERN_CHARACTERS or has_nested_repetition(pattern)):
                raise MalformedMessage(f"tokenizer.json: the pattern {printable(pattern[:80])!r} may take for ever")


def has_nested_repetition(pattern: str) -> bool:
    """Whether a group that repeats without limit has a quantifier inside: matching may take exponential time."""
    quantified = [False]
    at = 0
    in_class = False
    while at < len(pattern):
        character = pattern[at]
        step = 1
        if character == "\\":
            step = 2
        elif in_class:
            in_class = character != "]"
        elif character == "[":
            in_class = True
            step = 2 if pattern[at + 1 : at + 2] in ("]", "^") else 1
        elif character == "(":
            quantified.append(False)
            step = 2 if pattern[at + 1 : at + 2] == "?" else 1
        elif character == ")" and len(quantified) > 1:
            inner = quantified.pop()
            rest = pattern[at + 1 :]
            if inner and (rest[:1] in ("*", "+") or re.match(r"\{\d*,\}", rest)):
                return True
            quantified[-1] |= inner
        elif character in "*+?{":
            quantified[-1] = True
        at += step
    return False
