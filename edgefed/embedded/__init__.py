"""Data and a model that need no download: text silos and a tiny model.

`silos` splits the source text of Python's standard library into one client per package, with different distributions.
`tiny/` is a tiny mixture-of-experts model; `benchmarks/pretrain_tiny.py` trained it. Both are for demonstrations and
tests, not for evaluation, because the text changes with the Python version.
"""

from __future__ import annotations

import os
import pathlib

__all__ = ["TINY", "resolve_model", "tiny_model_directory"]

TINY = "tiny"
"""Name of the packaged model, accepted wherever a model is required."""


def tiny_model_directory() -> pathlib.Path:
    """Return the folder of the packaged tiny model, for `AutoModelForCausalLM.from_pretrained`.

    The folder is not checked here; without package data, loading it fails with an error that names the folder.
    """
    return pathlib.Path(__file__).resolve().parent / "tiny"


def resolve_model(name: str | pathlib.Path) -> str:
    """Return the source that transformers loads for ``name``: the packaged folder for `tiny`, else ``name`` itself.

    A Path other than `tiny`, and ``~/name``, become paths that no hub id looks like.
    """
    if str(name) == TINY:
        return str(tiny_model_directory())
    if isinstance(name, str) and not name.startswith("~"):
        return name
    path = pathlib.Path(name).expanduser()
    return str(path) if path.is_absolute() else os.path.join(os.curdir, path)
