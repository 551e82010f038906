"""Methods that users write: a class in a file or an installed module, registered under its ``name``.

The location comes from a setting of this machine and from nowhere else: the wire carries only the name, so that no
server can make a client import code.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from edgefed.errors import ConfigError, UnknownMethod
from edgefed.methods.interface import Method
from edgefed.methods.options import Value, option_values
from edgefed.methods.registry import register

REMEDY = "Pass file.py:Class or package.module:Class."


def is_location(method: str) -> bool:
    """Whether ``method`` names a class by its location rather than a method by its name."""
    return ":" in method


def load_method(location: str) -> str:
    """Import the class at ``file.py:Class`` or ``package.module:Class``, register it and return its name.

    Modules are found as ``python -m`` finds them: in the working directory first. Raises UnknownMethod when there is
    no such file, module or class, ConfigError when importing it fails or it is not a method.
    """
    place, _, class_name = location.rpartition(":")
    try:
        module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    except (ImportError, OSError) as error:
        raise UnknownMethod(f"cannot import the method {location!r}: {error}", remedy=REMEDY) from error
    except Exception as error:
        raise ConfigError(
            f"importing the method {location!r} failed: {type(error).__name__}: {error}", remedy="Fix the module."
        ) from error
    kind = getattr(module, class_name, None)
    if not isinstance(kind, type):
        raise UnknownMethod(f"{place} has no class {class_name!r}", remedy=REMEDY)
    register(kind)
    return str(kind.name)  # type: ignore[attr-defined]


def name_and_options(method: Method) -> tuple[str, dict[str, Value]]:
    """A method object as its name and its options, as a run's configuration stores it; registers a class of your own.

    Raises ConfigError when another class has the same name.
    """
    register(type(method))
    return method.name, option_values(method)


def _import_file(path: Path) -> ModuleType:
    name = f"edgefed_method_{path.stem}"
    path = path.expanduser().resolve()
    known = sys.modules.get(name)
    if known is not None and known.__file__ == str(path):
        return known
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _import_module(name: str) -> ModuleType:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return importlib.import_module(name)
