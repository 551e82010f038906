"""Ask torch about CUDA. The only file of this package that imports torch, and only inside functions.

Asking a device for its properties initialises CUDA in this process, which costs no GPU memory; `free_bytes` creates a
context on the device (some hundred MB) and is called only if NVML does not report free memory.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

from edgefed.errors import first_line
from edgefed.hardware.facts import Reading, Reason


@dataclasses.dataclass(frozen=True)
class CudaDevice:
    """One device as torch numbers it. If torch does not report them, ``uuid`` is empty and ``integrated`` None."""

    index: int
    name: str
    uuid: str
    compute_capability: tuple[int, int]
    integrated: bool | None
    total_bytes: int
    runs_here: bool
    """Whether this torch has code for the device's architecture."""


@dataclasses.dataclass(frozen=True)
class CudaReport:
    """Versions, whether CUDA can be used, and torch's devices in its order."""

    version: Reading[str]
    cuda_version: Reading[str]
    available: Reading[bool]
    devices: tuple[CudaDevice, ...] = ()


def not_asked() -> CudaReport:
    """The report when torch is left out."""
    missing = Reading.missing(Reason.ABSENT, "torch", "not asked")
    return CudaReport(missing, missing, missing)


def ask_torch() -> CudaReport:
    """Versions, whether CUDA can be used and if not why, and the devices. Never raises: a broken torch is a reason."""
    try:
        import torch
    except Exception as error:  # a wheel for another CUDA or another processor raises OSError, ImportError, others
        reason = Reason.ABSENT if isinstance(error, ModuleNotFoundError) else Reason.FAILED
        missing = Reading.missing(reason, "import torch", f"{type(error).__name__}: {error}")
        return CudaReport(missing, missing, missing)
    version = Reading.of(str(torch.__version__), "torch.__version__")
    built_for = getattr(torch.version, "cuda", None) or getattr(torch.version, "hip", None)
    if not built_for:
        missing = Reading.missing(Reason.ABSENT, "torch.version.cuda", "torch is a build for the CPU")
        return CudaReport(version, missing, missing)
    cuda_version = Reading.of(str(built_for), "torch.version.cuda")
    source = "torch.cuda.is_available"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns with the text that init() raises below
            usable = torch.cuda.is_available() and torch.cuda.device_count() > 0
            if not usable:
                torch.cuda.init()  # type: ignore[no-untyped-call]
                return CudaReport(version, cuda_version, _unusable(source, "no CUDA device is visible"))
            devices = tuple(_device(torch, index) for index in range(torch.cuda.device_count()))
    except Exception as error:  # RuntimeError, AssertionError, DeferredCudaCallError: torch has many for one thing
        return CudaReport(version, cuda_version, _unusable(source, first_line(error)))
    return CudaReport(version, cuda_version, Reading.of(True, source), devices)


def _unusable(source: str, text: str) -> Reading[bool]:
    return Reading.missing(Reason.FAILED, source, text)


def _device(torch: Any, index: int) -> CudaDevice:
    properties = torch.cuda.get_device_properties(index)
    integrated = getattr(properties, "is_integrated", None)
    capability = (int(properties.major), int(properties.minor))
    return CudaDevice(
        index=index,
        name=str(properties.name),
        uuid=str(getattr(properties, "uuid", "") or ""),
        compute_capability=capability,
        integrated=None if integrated is None else bool(integrated),
        total_bytes=int(properties.total_memory),
        runs_here=bool(getattr(torch.version, "hip", None)) or has_code_for(capability, torch.cuda.get_arch_list()),
    )


def has_code_for(capability: tuple[int, int], architectures: list[str]) -> bool:
    """Whether a build with these architectures runs on a device.

    ``sm_86`` runs on its own major version from its minor version on; ``compute_80`` is compiled on any newer device;
    ``sm_90a`` and ``sm_100f`` are exact or family builds and run on their own capability only. True for an empty list.
    """
    for architecture in architectures:
        kind, _, digits = architecture.partition("_")
        exact = digits.rstrip("0123456789") != ""
        number = digits.rstrip("abcdefghijklmnopqrstuvwxyz")
        if not number.isdecimal() or len(number) < 2:
            continue
        built = (int(number[:-1]), int(number[-1]))
        if kind == "compute" and not exact and built <= capability:
            return True
        if kind == "sm" and built[0] == capability[0] and (built == capability or not exact and built <= capability):
            return True
    return not architectures


def free_bytes(index: int) -> Reading[int]:
    """Return the free memory of a discrete GPU that NVML does not report.

    Creates a CUDA context, and may fail on a busy device.
    """
    source = "torch.cuda.mem_get_info"
    try:
        import torch

        return Reading.of(int(torch.cuda.mem_get_info(index)[0]), source)
    except Exception as error:
        return Reading.missing(Reason.FAILED, source, first_line(error))
