"""The other end of `edgefed.doctor.isolation`: a process that runs checks and may die of them.

Started as a script, not as a module, so that nothing but the standard library is imported before the parent's
``sys.path`` is in place. Reads one JSON request a line from stdin and answers with one JSON line each:

    {"path": [...]}                                                                  first, no answer
    {"target": "package.module:function", "arguments": {...}, "timeout_s": 60}    -> {"value": ...} or {"raised": ...}

What the checks and their libraries print goes to stderr. A hung check ends the process from a thread of the
interpreter itself, even when nobody is left who would kill it.
"""

import contextlib
import faulthandler
import importlib
import json
import os
import sys
from typing import Any


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


def kernel_table() -> list[list[object]]:
    """[operation, backend, kind of device, can run, why not or with what] of every implementation of the kernels."""
    from edgefed.kernels.dispatch import backend_table

    return [[row.operation, row.name, row.device_type, row.available, row.reason] for row in backend_table()]


def recording(device: str | None, ask_torch: bool) -> object:
    """Every raw reading, as `edgefed.hardware.recording` writes them."""
    from edgefed.hardware.recording import record_readings

    return record_readings(device, ask_torch=ask_torch)


GRACE_S = 5.0
"""Seconds beyond a check's limit before the worker ends itself; its parent acts first."""


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Call the target. An exception is an answer, too: its type, text, and what an edgefed error carries beyond."""
    try:
        module, _, function = request["target"].partition(":")
        return {"value": getattr(importlib.import_module(module), function)(**request["arguments"])}
    except Exception as error:  # whatever a broken package raises is the finding
        kind = type(error).__name__
        return {
            "raised": {
                "type": kind,
                "text": str(error) or kind,
                "code": getattr(error, "code", None),
                "remedy": getattr(error, "remedy", None),
            }
        }


def main() -> None:
    """Answer requests from stdin until it is closed."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.path[:] = json.loads(sys.stdin.readline())["path"]
    for line in sys.stdin:
        request = json.loads(line)
        # A debugger's and a sandbox's stderr may have no descriptor; the parent's time limit stands without this one.
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            faulthandler.dump_traceback_later(request["timeout_s"] + GRACE_S, exit=True)
        reply = answer(request)
        faulthandler.cancel_dump_traceback_later()
        try:
            text = json.dumps(reply)
        except (TypeError, ValueError) as error:
            text = json.dumps({"raised": {"type": "TypeError", "text": f"{request['target']}: {error}"}})
        replies.write(text + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
