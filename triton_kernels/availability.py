"""Whether these kernels can run here. The check works without triton and without a GPU; it imports torch lazily."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re

MIN_TRITON = (3, 3)
MIN_CAPABILITY = (8, 0)


def triton_version() -> str | None:
    """Return the version of the installed triton, or None."""
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # built from source, on the path
        import triton

        return str(triton.__version__)


def version_numbers() -> tuple[int, ...]:
    """Return the major and minor version of the installed triton, (0, 0) without triton."""
    return tuple(int(part) for part in re.findall(r"\d+", triton_version() or "0.0")[:2])


def why_not(device: str = "cuda") -> str | None:
    """Return why the kernels cannot run on a GPU ("cuda:1"; "cuda" is the current one), in one clause, or None."""
    version = triton_version()
    if version is None:
        return "triton is not installed"
    if version_numbers() < MIN_TRITON:
        return f"triton {version} is older than {'.'.join(map(str, MIN_TRITON))}"
    import torch

    if not torch.cuda.is_available() or torch.version.cuda is None:
        return "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability(torch.device(device))
    if capability < MIN_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}"
    return None


def detail(device: str = "cuda") -> str:
    """Describe what the kernels run with. Call it only if `why_not` is None."""
    import torch

    major, minor = torch.cuda.get_device_capability(torch.device(device))
    return f"triton {triton_version()}, compute capability {major}.{minor}"
