"""A model that a user wrote: ``package.module:function``, imported from this machine and called.

The name comes from a flag of this device and from nowhere else; nothing that crosses the wire gets here. The user's
code runs, so whatever it raises is told with its place in the user's file, as an error of edgefed.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from edgefed.errors import ModelError, ModelNotFound

_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
_LIBRARIES = tuple(
    str(Path(folder).resolve()) + os.sep
    for folder in (
        *(sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")),
        Path(torch.__file__).parent,
        Path(__file__).parents[1],
    )
)
"""Where code lies that the user did not write."""


def is_code(spec: str) -> bool:
    """Whether ``spec`` reads as ``package.module:function``."""
    return _NAME.fullmatch(spec) is not None


def build_model(spec: str, values: Mapping[str, object]) -> nn.Module:
    """Import the function ``spec`` and call it with those of ``values`` that it has parameters for; one that takes any
    keyword, as torchvision's do, gets ``num_classes``.

    Modules are found as ``python -m`` finds them: in the working directory first. Raises ModelNotFound without such a
    module or function, ModelError when the code raises or gives something else than a model with values on the CPU.
    """
    function = _import_function(spec)
    arguments = _accepted(spec, function, values)
    with users_code(f"{spec} failed", "Correct the function; edgefed calls it as it stands here."):
        model = function(**arguments)
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"{spec} returned {_kind(model)}, not a torch.nn.Module",
            remedy=f"Return the model from {spec}.",
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError(
            f"{spec} returned a model whose parameters have no values (device meta)",
            remedy="Return a model with initialised weights.",
        )
    return model.cpu()


@contextlib.contextmanager
def users_code(what: str, remedy: str) -> Iterator[None]:
    """Run the user's code: the working directory comes first in imports, and what is raised becomes a ModelError."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    except (Exception, SystemExit) as error:  # a script may end the process when it is imported
        raise ModelError(f"{what}: {fault_text(error)}", remedy=remedy) from error
    finally:
        with contextlib.suppress(ValueError):  # the code may have changed the path itself
            sys.path.remove(here)


def fault_text(error: BaseException) -> str:
    """Kind, first line of the message and the innermost place in code that is no library's."""
    text = str(error).strip().splitlines()
    said = f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
    if isinstance(error, SyntaxError) and error.filename:
        return f"{type(error).__name__}: {error.msg} ({error.filename}, line {error.lineno})"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
    return f"{said} ({frames[-1].filename}, line {frames[-1].lineno})" if frames else said


def _import_function(spec: str) -> Callable[..., object]:
    module_name, _, names = spec.partition(":")
    importlib.invalidate_caches()
    with users_code(f"{module_name} cannot be imported", f"See that `python -c 'import {module_name}'` works here."):
        try:
            found: object = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            missing = error.name or ""
            if module_name != missing and not module_name.startswith(f"{missing}."):
                raise
            found = None
    if found is None:
        if module_name.endswith(".py"):
            remedy = f"Pass {module_name.removesuffix('.py')}:{names}, without .py, from the folder of the file."
        else:
            remedy = "Start in the folder that holds it, or install it; a module is named as in an import."
        raise ModelNotFound(f"there is no module {module_name!r} in {os.getcwd()} or installed", remedy=remedy)
    for name in names.split("."):
        if not hasattr(found, name):
            theirs = [key for key, value in vars(found).items() if getattr(value, "__module__", None) == module_name]
            raise ModelNotFound(
                f"{module_name} has no {names!r}; it has {', '.join(sorted(theirs)[:10]) or 'no function'}",
                remedy="Name the function that returns your model.",
            )
        found = getattr(found, name)
    if not callable(found):
        raise ModelError(
            f"{spec} is {_kind(found)}, not a function", remedy="Name the function that returns your model."
        )
    return found


def _accepted(spec: str, function: Callable[..., object], values: Mapping[str, object]) -> dict[str, object]:
    """Those values that the function takes by name. Raises ModelError when it wants more than there is."""
    if isinstance(function, type) and function.__init__ is nn.Module.__init__:  # takes any keyword, and refuses it
        return {}
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # written in C
        return {}
    names = {parameter.name for parameter in parameters if parameter.kind is not parameter.POSITIONAL_ONLY}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        names.add("num_classes")
    missing = [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        and not (parameter.name in values and parameter.name in names)
    ]
    if missing:
        raise ModelError(
            f"{spec} wants {', '.join(missing)}, and edgefed gives {', '.join(values)} only",
            remedy="Give its other parameters defaults, or name a function without them.",
        )
    return {name: value for name, value in values.items() if name in names}


def _is_users(filename: str) -> bool:
    return not filename.startswith("<") and not str(Path(filename).resolve()).startswith(_LIBRARIES)


def _kind(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
