"""What edgefed can run on without a download: text and a tiny model.

`silos` cuts the source text that every Python ships into one unlike client per package; `pretrain` is the script
that made the tiny mixture-of-experts model in `tiny/`. Both are for demonstrations and tests, not for evidence: the
text changes with the Python version.
"""

from __future__ import annotations

import pathlib

__all__ = ["TINY", "resolve_model", "tiny_model_directory"]

TINY = "tiny"
"""The name that stands for the packaged model wherever a model is asked for."""


def tiny_model_directory() -> pathlib.Path:
    """Return the folder of the packaged tiny model, ready for `AutoModelForCausalLM.from_pretrained`.

    The folder is not checked here: an installation that dropped its package data fails in `from_pretrained`, by name.
    """
    return pathlib.Path(__file__).resolve().parent / "tiny"


def resolve_model(name: str) -> str:
    """Return what transformers is to load for ``name``: the packaged folder for `tiny`, else ``name`` itself."""
    return str(tiny_model_directory()) if name == TINY else name
