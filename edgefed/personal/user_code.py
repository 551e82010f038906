"""A model in the user's own code: ``package.module:function``, imported from this machine and called.

The name comes from a setting of this device and from nowhere else; nothing from the network reaches this module. Any
exception of the user's code becomes an error of edgefed that names the place in the user's file.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping

from torch import nn

from edgefed.errors import ModelError, ModelNotFound
from edgefed.training.user_errors import error_text

_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def is_code(spec: str) -> bool:
    """Whether ``spec`` has the form ``package.module:function``."""
    return _NAME.fullmatch(spec) is not None


def build_model(spec: str, values: Mapping[str, object]) -> nn.Module:
    """Import the function ``spec`` and call it with those of ``values`` that it has parameters for.

    A function with ``**kwargs``, as in torchvision, gets ``num_classes``. Modules are found as with ``python -m``: in
    the working directory first.

    Raises:
        ModelNotFound: no such module or function.
        ModelError: the code raises, or does not return a model with initialised weights.
    """
    function = _import_function(spec)
    arguments = _accepted(spec, function, values)
    with user_code_errors(f"{spec} failed", "Fix the function."):
        model = function(**arguments)
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"{spec} returned {_kind(model)}, not a torch.nn.Module",
            remedy=f"Return the model from {spec}.",
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError(
            f"{spec} returned a model with uninitialised parameters (device meta)",
            remedy="Return a model with initialised weights.",
        )
    return model.cpu()


@contextlib.contextmanager
def user_code_errors(what: str, remedy: str) -> Iterator[None]:
    """Run the user's code with the working directory first on the import path; exceptions become ModelError."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    except (Exception, SystemExit) as error:  # a script may exit when it is imported
        raise ModelError(f"{what}: {error_text(error)}", remedy=remedy) from error
    finally:
        with contextlib.suppress(ValueError):  # the code may have changed the path
            sys.path.remove(here)


def _import_function(spec: str) -> Callable[..., object]:
    module_name, _, names = spec.partition(":")
    importlib.invalidate_caches()
    with user_code_errors(
        f"cannot import {module_name}", f"Make sure that `python -c 'import {module_name}'` works here."
    ):
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
            remedy = "Run in the folder that contains it, or install it; write the module as in an import statement."
        raise ModelNotFound(
            f"module {module_name!r} not found in {os.getcwd()} or among the installed packages", remedy=remedy
        )
    for name in names.split("."):
        if not hasattr(found, name):
            defined = [key for key, value in vars(found).items() if getattr(value, "__module__", None) == module_name]
            raise ModelNotFound(
                f"{names!r} not found in {module_name}; it defines {', '.join(sorted(defined)[:10]) or 'no function'}",
                remedy="Name the function that returns your model.",
            )
        found = getattr(found, name)
    if not callable(found):
        raise ModelError(
            f"{spec} is {_kind(found)}, not a function", remedy="Name the function that returns your model."
        )
    return found


def _accepted(spec: str, function: Callable[..., object], values: Mapping[str, object]) -> dict[str, object]:
    """The values that the function has parameters for. Raises ModelError if it requires others."""
    if isinstance(function, type) and function.__init__ is nn.Module.__init__:  # type: ignore[misc]
        return {}  # nn.Module declares any keyword and then rejects it
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
            f"{spec} requires {', '.join(missing)}; edgefed passes only {', '.join(values)}",
            remedy="Give these parameters default values, or use a function without them.",
        )
    return {name: value for name, value in values.items() if name in names}


def _kind(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
