"""What the doctor asks in a worker process: sensors, torch, kernels. Each function returns JSON types."""

from __future__ import annotations

import os


def sensors(device: str | None, ask_torch: bool) -> object:
    """`probe_device`, as JSON types."""
    import msgspec

    from edgefed.hardware.probe import probe_device

    return msgspec.to_builtins(probe_device(device, ask_torch=ask_torch))


def torch_build() -> dict[str, object]:
    """Import torch and say what it was built for and what it finds here; see `edgefed.doctor.packages.TorchBuild`.

    ``cuda_error`` has torch's own words when it was built for CUDA and cannot start it.
    """
    import torch

    cuda_error = ""
    if torch.version.cuda and not torch.cuda.is_available():
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]
        except Exception as error:  # torch has a dozen kinds for this
            cuda_error = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    devices = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        devices.append([torch.cuda.get_device_name(index), list(torch.cuda.get_device_capability(index))])
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "architectures": torch.cuda.get_arch_list() if torch.version.cuda else [],
        "cuda_available": torch.cuda.is_available(),
        "cuda_error": cuda_error,
        "devices": devices,
        "visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "threads": torch.get_num_threads(),
        "cpu_level": torch.backends.cpu.get_cpu_capability(),
    }


def kernel_table(device: str) -> list[list[object]]:
    """[operation, backend, kind of device, can run, why not or with what] of every implementation of the kernels."""
    from edgefed.kernels.dispatch import backend_table

    return [[row.operation, row.name, row.device_type, row.available, row.reason] for row in backend_table(device)]


def kernel_verdicts(device: str) -> object:
    """What is proved of the kernels on a device: where it is written, and the verdicts, as JSON types."""
    import msgspec

    from edgefed.kernels.dispatch import needs_proof
    from edgefed.kernels.verdicts import verdicts_of

    verdicts = verdicts_of(device)
    rows = [[str(row.case), row.backend, row.state, row.describe(), row.when] for row in verdicts.all()]
    waiting = [str(case) for case in verdicts.wanted() if all(row.case != case for row in verdicts.all())]
    found = {"path": str(verdicts.path), "rows": rows, "waiting": waiting, "needed": needs_proof(device)}
    return msgspec.to_builtins(found)


def recording(device: str | None, ask_torch: bool) -> object:
    """Every raw reading, as `edgefed.hardware.recording` writes them."""
    from edgefed.hardware.recording import record_readings

    return record_readings(device, ask_torch=ask_torch)
