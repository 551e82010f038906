"""What the user's code raises, as a sentence that names the place in the user's file."""

from __future__ import annotations

import os
import sysconfig
import traceback
from pathlib import Path

import torch

_LIBRARIES = tuple(
    str(Path(folder).resolve()) + os.sep
    for folder in (
        *(str(sysconfig.get_path(kind)) for kind in ("stdlib", "platstdlib", "purelib", "platlib")),
        str(Path(torch.__file__).parent),
        str(Path(__file__).parents[1]),
    )
)
"""Folders of code that is not the user's."""


def error_text(error: BaseException) -> str:
    """Type, first line of the message, and the innermost place in the user's code."""
    text = str(error).strip().splitlines()
    summary = f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
    if isinstance(error, SyntaxError) and error.filename:
        return f"{type(error).__name__}: {error.msg} ({error.filename}, line {error.lineno})"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
    return f"{summary} ({frames[-1].filename}, line {frames[-1].lineno})" if frames else summary


def _is_users(filename: str) -> bool:
    return not filename.startswith("<") and not str(Path(filename).resolve()).startswith(_LIBRARIES)
