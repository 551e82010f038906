"""Whether the installed torch can use the GPU that is here: its build, the driver, and the code that it brings."""

from __future__ import annotations

import dataclasses
import re

from edgefed.doctor.finding import Finding, Group, State
from edgefed.hardware.cuda import has_code_for
from edgefed.hardware.facts import DeviceFacts


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
    cuda_fault: str
    devices: tuple[tuple[str, tuple[int, int]], ...]
    visible_devices: str | None
    threads: int
    cpu_level: str


def torch_findings(facts: DeviceFacts, build: TorchBuild, install_command: str, *, gpu_asked: bool) -> list[Finding]:
    """Findings about torch and the chosen GPU.

    ``install_command`` is the line that installs a torch for this machine. Without ``gpu_asked`` a GPU that torch
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
    worse = State.PROBLEM if gpu_asked else State.WARNING

    def unusable(found: str, why: str, fix: str, command: str = "") -> list[Finding]:
        cost = "`device` asks for the GPU." if gpu_asked else "Until then this device trains on its CPU."
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
                build.cuda_fault,
                "Update the NVIDIA driver, or install a torch built for an older CUDA.", install_command,
            )  # fmt: skip
        return unusable(
            f"torch {build.version} for CUDA {build.cuda} finds no GPU: {build.cuda_fault or 'it does not say why'}",
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
            "Until then this device trains on its CPU.", "Install a torch that fits GPU and driver.", install_command,
        )
    ]  # fmt: skip


def install_command(facts: DeviceFacts) -> str:
    """The pip line for a torch that fits the GPU and driver here. Jetsons have their own, see `edgefed.doctor.jetson`.

    Any build for CUDA 12 runs on any driver for CUDA 12, so the two kept by PyTorch's index are told apart by age.
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
