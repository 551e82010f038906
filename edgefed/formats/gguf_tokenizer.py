"""Write a tokenizer into a GGUF file, in the terms of llama.cpp.

Byte-level BPE is its model "gpt2" with merges, and one of the named pre-tokenizers, which is found by the patterns that
the tokenizer splits with. BPE with a byte fallback, which transformers makes of SentencePiece, is its model "llama":
the score of a token is minus the rank of its first merge, which merges in the same order.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgefed.errors import ConfigError
from edgefed.formats.gguf_metadata import REMEDY

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SUFFIX = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_PATTERNS = {
    "gpt-2": (_GPT2,),
    "qwen2": (_CONTRACTIONS + _WORDS + r"\p{N}" + _REST,),
    "llama-bpe": (_CONTRACTIONS + _WORDS + r"\p{N}{1,3}" + _REST,),
    "gpt-4o": (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "deepseek-v3": (
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\\r\\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
        "| ?[\\p{P}\\p{S}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
    ),
}
"""Name of a pre-tokenizer of llama.cpp -> the patterns by which it splits, one after the other."""
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
"""Special token in transformers -> in the keys of GGUF."""


def write_tokenizer(writer: Any, folder: Path, *, rows: int) -> None:
    """Add the tokenizer of a checkpoint to a ``gguf.GGUFWriter``; without one, write that there is no vocabulary.

    ``rows``: rows of the embedding; ids without a token get a placeholder. Raises ConfigError if llama.cpp has no such
    tokenizer.
    """
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        writer.add_tokenizer_model("no_vocab")
        return
    from edgefed.training.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refused(f"its class {type(tokenizer).__name__} has no tokenizer.json")
    described = json.loads(backend.to_str())
    model = described["model"]
    if model["type"] != "BPE":
        raise _refused(f"its model is {model['type']}, not BPE")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    tokens, kinds = _tokens(tokenizer, model, rows)
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix(_adds_space(described))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(described))
        writer.add_token_merges(merges)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    for name, key in _SPECIAL.items():
        token = getattr(tokenizer, f"{name}_token_id")
        if token is not None:
            writer.add_uint32(f"tokenizer.ggml.{key}_token_id", token)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)


def _tokens(tokenizer: Any, model: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Text and type of every id."""
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, kinds = [], []
    for number in range(rows):
        token = by_id.get(number)
        if token is None:
            token, kind = f"[PAD{number}]", _UNUSED
        elif number == tokenizer.unk_token_id and model.get("byte_fallback"):
            kind = _UNKNOWN
        elif number in added:
            kind = _CONTROL if added[number].special or token.startswith("<|") else _USER_DEFINED
        elif model.get("byte_fallback") and token.startswith("<0x") and len(token) == len("<0xFF>"):
            kind = _BYTE
        else:
            kind = _NORMAL
        tokens.append(token)
        kinds.append(kind)
    return tokens, kinds


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", ""), rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _pre_tokenizer(described: dict[str, Any]) -> str:
    """Name of llama.cpp's pre-tokenizer. Raises ConfigError."""
    normalizer = described.get("normalizer") or {}
    if normalizer and normalizer.get("type") not in ("NFC", None) and normalizer.get("normalizers") != []:
        raise _refused(f"it normalizes by {normalizer.get('type')}")
    step = described["pre_tokenizer"] or {}
    steps = step.get("pretokenizers", [step])
    patterns: list[str] = []
    for step in steps:
        if step.get("type") == "Split":
            patterns.append(step["pattern"].get("Regex") or "")
        elif step.get("type") == "ByteLevel":
            if step.get("add_prefix_space"):
                raise _refused("it adds a space before a text")
            if step.get("use_regex", True):
                patterns.append(_GPT2)
        else:
            raise _refused(f"it splits by {step.get('type')}")
    for name, known in _PATTERNS.items():
        if tuple(patterns) == known:
            return name
    raise _refused(f"it splits by {patterns}")


def _adds_space(described: dict[str, Any]) -> bool:
    """Whether a SentencePiece tokenizer puts a space before a text."""
    normalizer = described.get("normalizer") or {}
    steps = [*normalizer.get("normalizers", [normalizer]), described.get("pre_tokenizer") or {}]
    return any(
        step.get("type") == "Prepend" or (step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never")
        for step in steps
    )


def _refused(reason: str) -> ConfigError:
    return ConfigError(f"cannot export GGUF: llama.cpp has no such tokenizer: {reason}", remedy=REMEDY)
