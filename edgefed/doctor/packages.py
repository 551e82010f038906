"""Findings about Python, the installed packages and the torch build.

Packages are judged by their metadata alone: nothing is imported, so nothing can break. The supported ranges are those
of edgefed's own metadata. A worker process asks torch for its build; `torch_findings` compares the build with driver
and GPU.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import platform
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from edgefed.doctor.finding import Finding, Group, State
from edgefed.hardware.cuda import has_code_for
from edgefed.hardware.facts import DeviceFacts

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
        python_finding(sys.version_info[:3], sys.maxsize),
        *_required(requirements, version_of),
        *(_optional(name, version_of) for name in OPTIONAL),
        *_in_the_way(version_of),
        *name_clash_findings(),
    ]


def python_finding(version: tuple[int, int, int], largest: int) -> Finding:
    """Whether this Python is new enough and a 64-bit build (``largest``: its `sys.maxsize`)."""
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


def name_clash_findings() -> list[Finding]:
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


@dataclasses.dataclass(frozen=True)
class TorchBuild:
    """What `edgefed.doctor.queries.torch_build` found. ``cuda`` is None in a build without CUDA.

    ``architectures`` as ``torch.cuda.get_arch_list`` names them: sm_80, sm_120a, compute_90. ``cpu_level`` is the
    vector level that torch's CPU kernels use: DEFAULT, AVX2, AVX512, NEON.
    """

    version: str
    cuda: str | None
    architectures: tuple[str, ...]
    cuda_available: bool
    cuda_error: str
    devices: tuple[tuple[str, tuple[int, int]], ...]
    visible_devices: str | None
    threads: int
    cpu_level: str


def torch_findings(
    facts: DeviceFacts, build: TorchBuild, install_command: str, *, gpu_requested: bool
) -> list[Finding]:
    """Findings about torch and the chosen GPU.

    ``install_command`` is the line that installs a torch for this machine. Without ``gpu_requested`` a GPU that torch
    cannot use is a warning, because the device then trains on its CPU; with it, a problem.
    """
    built_for = f"CUDA {build.cuda}" if build.cuda else "the CPU only"
    findings = [
        Finding(
            Group.TORCH, "torch", State.OK,
            f"{build.version}, built for {built_for}; CPU kernels at {build.cpu_level}, {build.threads} threads",
        )
    ]  # fmt: skip
    if facts.gpu is None:
        return findings
    name = facts.gpu.name.value or "the GPU"
    capability = facts.gpu.compute_capability.value
    worse = State.PROBLEM if gpu_requested else State.WARNING

    def unusable(found: str, why: str, fix: str, command: str = "") -> list[Finding]:
        cost = "`device` asks for the GPU." if gpu_requested else "Until then, the device trains on its CPU."
        return [
            *findings,
            Finding(Group.TORCH, "torch on the GPU", worse, found, f"{why} {cost}".strip(), fix, command),
        ]

    if not build.cuda:
        return unusable(
            f"torch {build.version} is a CPU build, and there is {name}", "It has no code for a GPU.",
            "Install a torch with CUDA.", install_command,
        )  # fmt: skip
    if not build.cuda_available:
        if build.visible_devices is not None and build.visible_devices.strip() in ("", "-1", "NoDevFiles"):
            return unusable(
                f"CUDA_VISIBLE_DEVICES is {build.visible_devices!r}", "It hides every GPU from torch.",
                "Unset it, or name the GPU.", "unset CUDA_VISIBLE_DEVICES",
            )  # fmt: skip
        driver = facts.driver.cuda_driver_version.value
        if driver and _number(driver)[:1] < _number(build.cuda)[:1]:
            return unusable(
                f"torch {build.version} needs a driver for CUDA {build.cuda}, this one ends at CUDA {driver}",
                build.cuda_error,
                "Update the NVIDIA driver, or install a torch built for an older CUDA.", install_command,
            )  # fmt: skip
        return unusable(
            f"torch {build.version} for CUDA {build.cuda} finds no GPU: {build.cuda_error or 'no reason given'}",
            f"NVML sees {name}.", "Reboot or reload the driver; in a container, start it with --gpus all.",
        )  # fmt: skip
    if capability and build.architectures and not has_code_for(capability, list(build.architectures)):
        return unusable(
            f"torch {build.version} has no code for {name} (compute capability {capability[0]}.{capability[1]}), only "
            f"for {', '.join(build.architectures)}",
            "Every kernel would fail with 'no kernel image is available'.", "Install another build of torch.",
            install_command,
        )  # fmt: skip
    if facts.gpu.cuda_index is None:
        hidden = f"CUDA_VISIBLE_DEVICES is {build.visible_devices!r}" if build.visible_devices is not None else ""
        seen = ", ".join(device for device, _ in build.devices) or "none"
        return unusable(
            f"torch sees {seen}, and not {name}", f"{hidden}." if hidden else "",
            "Choose a GPU that torch sees, or correct CUDA_VISIBLE_DEVICES.",
        )  # fmt: skip
    findings.append(Finding(Group.TORCH, "torch on the GPU", State.OK, f"torch can use {name}"))
    if capability and capability < (8, 0):
        findings.append(
            Finding(
                Group.TORCH, "bfloat16", State.NOTE, f"compute capability {capability[0]}.{capability[1]} has none",
                "torch emulates it: right, but several times slower than float16.",
            )
        )  # fmt: skip
    return findings


def recorded_torch_findings(facts: DeviceFacts, install_command: str) -> list[Finding]:
    """What a recording says of torch on its GPU: whether it could be used, and torch's reason."""
    torch = facts.torch
    if facts.gpu is None or not torch.version.known:
        return []
    name = facts.gpu.name.value or "the GPU"
    if facts.trains_on_gpu:
        return [Finding(Group.TORCH, "torch on the GPU", State.OK, f"torch {torch.version.value} can use {name}")]
    reason = "it lists other GPUs only" if torch.cuda_available.value else torch.cuda_available.describe()
    return [
        Finding(
            Group.TORCH, "torch on the GPU", State.WARNING, f"torch {torch.version.value} cannot use {name}: {reason}",
            "Until then, the device trains on its CPU.", "Install a torch that fits GPU and driver.", install_command,
        )
    ]  # fmt: skip


def install_command(facts: DeviceFacts) -> str:
    """Return the pip line for a torch that fits the GPU and driver here; `edgefed.doctor.jetson` has those of Jetsons.

    Any build for CUDA 12 runs on any driver for CUDA 12, so the older one serves old drivers and GPUs.
    CUDA 13 builds begin at compute capability 7.5.
    """
    if facts.gpu is None:
        return "pip install --force-reinstall torch"
    driver = _number(facts.driver.cuda_driver_version.value or "13.0")
    capability = facts.gpu.compute_capability.value
    if driver < (12, 8) or capability is not None and capability < (7, 5):
        index = "cu126" if driver >= (12,) else "cu118"
    else:
        index = "cu130" if driver >= (13,) else "cu128"
    return f"pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/{index}"


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
