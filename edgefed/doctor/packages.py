"""Python and the installed packages, from their metadata alone: nothing is imported, so nothing can break.

The supported ranges are those of edgefed's own metadata; they stand nowhere else.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from edgefed.doctor.finding import Finding, Group, State

MINIMUM_PYTHON = (3, 10)


OPTIONAL = {
    "triton": "Triton compiles kernels for a GPU; each kernel of edgefed has a PyTorch form, which is then used.",
    "bitsandbytes": "It has optimizers with 8-bit and paged state; without it AdamW needs the memory of full state.",
    "onnx": "edgefed exports Hugging Face checkpoints, which need no onnx.",
}
"""Packages that may be missing -> what they would give and what happens without."""

VersionOf = Callable[[str], "str | None"]


def installed_version(name: str) -> str | None:
    """Version of a distribution, None when it is not installed or its metadata cannot be read."""
    try:
        return importlib.metadata.version(name) or None
    except (importlib.metadata.PackageNotFoundError, OSError, KeyError, TypeError, UnicodeDecodeError):
        return None


def own_requirements() -> list[str] | None:
    """The requirement lines of the installed edgefed; None when it is not installed as a package."""
    try:
        return importlib.metadata.requires("edgefed") or []
    except (importlib.metadata.PackageNotFoundError, OSError):
        return None


def package_findings(requirements: Sequence[str] | None, version_of: VersionOf = installed_version) -> list[Finding]:
    """Findings about Python, the required packages, the optional ones, and packages that are in the way."""
    return [
        _python(sys.version_info[:3], sys.maxsize),
        *_required(requirements, version_of),
        *(_optional(name, version_of) for name in OPTIONAL),
        *_in_the_way(version_of),
        *_kernel_name_clash(),
    ]


def _python(version: tuple[int, int, int], largest: int) -> Finding:
    found = f"{platform.python_implementation()} {'.'.join(map(str, version))}, {platform.machine()}"
    if largest < 2**32:
        return Finding(
            Group.PACKAGES, "python", State.PROBLEM, f"{found}, 32 bit", "There is no PyTorch for 32-bit Python.",
            "Install a 64-bit system and Python.",
        )  # fmt: skip
    if version[:2] < MINIMUM_PYTHON:
        return Finding(
            Group.PACKAGES, "python", State.PROBLEM, found, "edgefed needs Python 3.10 or newer.",
            "Make a virtual environment with a newer Python.", "python3.10 -m venv .venv",
        )  # fmt: skip
    return Finding(Group.PACKAGES, "python", State.OK, found)


def _required(requirements: Sequence[str] | None, version_of: VersionOf) -> list[Finding]:
    if requirements is None:
        return [
            Finding(
                Group.PACKAGES, "edgefed", State.WARNING, "runs from a folder and is not installed",
                "Which versions of its packages it needs is written in its metadata, which is not here.",
                "Install it from that folder.", "pip install -e .",
            )
        ]  # fmt: skip
    findings, good = [], []
    for line in requirements:
        needed = parse_requirement(line)
        if needed is None:
            continue
        name, bounds = needed
        version = version_of(name)
        requested = f"{name}{','.join(operator + bound for operator, bound in bounds)}"
        if version is None:
            findings.append(
                Finding(
                    Group.PACKAGES, name, State.PROBLEM, "not installed", f"edgefed needs {requested}.",
                    "Install it." if name != "torch" else "Install the PyTorch that fits this machine (pytorch.org).",
                    f"pip install '{requested}'",
                )
            )  # fmt: skip
        elif not within_bounds(version, bounds):
            findings.append(
                Finding(
                    Group.PACKAGES, name, State.PROBLEM, version, f"edgefed was written for {requested}.",
                    "Install a version of that range.", f"pip install '{requested}'",
                )
            )  # fmt: skip
        else:
            good.append(f"{name} {version}")
    if good:
        findings.insert(0, Finding(Group.PACKAGES, "required packages", State.OK, ", ".join(good)))
    return findings


def _optional(name: str, version_of: VersionOf) -> Finding:
    version = version_of(name)
    if version is None:
        return Finding(Group.PACKAGES, name, State.NOTE, "not installed", f"Optional. {OPTIONAL[name]}")
    return Finding(Group.PACKAGES, name, State.OK, version)


def _in_the_way(version_of: VersionOf) -> list[Finding]:
    """The retired package ``pynvml``, which provides or wraps the module that nvidia-ml-py is."""
    version = version_of("pynvml")
    if version is None:
        return []
    command = "pip uninstall --yes pynvml && pip install --force-reinstall nvidia-ml-py"
    if _release(version) < (12,):
        return [
            Finding(
                Group.PACKAGES, "pynvml", State.WARNING, f"{version} hides nvidia-ml-py",
                "Its folder has the same module name and is years old: calls that new drivers need are missing, so "
                "a GPU may look absent or its memory unknown.",
                "Remove it and put nvidia-ml-py back.", command,
            )
        ]  # fmt: skip
    return [
        Finding(
            Group.PACKAGES, "pynvml", State.NOTE, f"{version} is installed besides nvidia-ml-py",
            "It is retired and only puts an import hook in front of nvidia-ml-py that warns.",
            "Remove it unless another program wants it.", command,
        )
    ]  # fmt: skip


def _kernel_name_clash() -> list[Finding]:
    """``triton_kernels`` is another project's module; transformers imports it for gpt-oss."""
    try:
        bare = importlib.util.find_spec("triton_kernels")
        own = importlib.util.find_spec("edgefed.triton_kernels")
    except (ImportError, ValueError):
        return []
    if bare is None or own is None or not bare.origin or not own.origin:
        return []
    if Path(bare.origin).resolve() != Path(own.origin).resolve():
        return []
    return [
        Finding(
            Group.PACKAGES, "triton_kernels", State.WARNING, f"the bare name leads to {Path(bare.origin).parent}",
            "transformers imports a package of that name for gpt-oss and would get edgefed's folder.",
            "Start `edgefed` from another folder, or as the installed command instead of `python -m edgefed`.",
        )
    ]  # fmt: skip


def parse_requirement(line: str) -> tuple[str, list[tuple[str, str]]] | None:
    """``torch>=2.4,<3 ; marker`` as (name, [(">=", "2.4"), ("<", "3")]); None when it does not apply here.

    A marker is looked at for extras, which never apply, and for ``python_version``.
    """
    requirement, _, marker = line.partition(";")
    if "extra" in marker:
        return None
    asked = re.search(r"python_version\s*(<=|>=|<|>|==)\s*[\"']([\d.]+)[\"']", marker)
    if asked and not _holds(sys.version_info[:2], asked[1], _release(asked[2])):
        return None
    match = re.match(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)", requirement)
    if not match:
        return None
    return match[1], re.findall(r"(~=|==|!=|<=|>=|<|>)\s*([\w.+!-]+)", requirement[match.end() :])


def within_bounds(version: str, bounds: Sequence[tuple[str, str]]) -> bool:
    """Whether a version is in a range, by its release numbers only.

    Unlike PEP 440, ``2.8.0a0+nv25.6`` is 2.8: device makers ship such builds, and they are what has to be used there.
    """
    return all(_holds(_release(version), operator, _release(bound)) for operator, bound in bounds)


def _release(version: str) -> tuple[int, ...]:
    match = re.match(r"v?(?:\d+!)?(\d+(?:\.\d+)*)", version.strip())
    return tuple(int(part) for part in match[1].split(".")) if match else ()


def _holds(found: tuple[int, ...], operator: str, bound: tuple[int, ...]) -> bool:
    width = max(len(found), len(bound))
    one, other = (numbers + (0,) * (width - len(numbers)) for numbers in (found, bound))
    if operator == "~=":
        return one >= other and found[: len(bound) - 1] == bound[:-1]
    return {
        ">=": one >= other, "<=": one <= other, ">": one > other, "<": one < other, "==": one == other,
        "!=": one != other,
    }[operator]  # fmt: skip
