"""Backends of masked experts on the CPU that are good, wrong, slow, hanging or crashing, for tests of the proof.

Imported by the tests and, as their plugin, by the process that runs proofs.
"""

import os
import signal
import sys
import time
import types

import torch

from edgefed.kernels import dispatch, native_experts
from edgefed.kernels.masked_experts import IMPLEMENTATIONS, masked_experts_reference


def good(hidden, indices, weights, slots, activation, is_transposed):
    return native_experts.masked_experts(hidden, indices, weights, slots, activation, is_transposed)


def wrong_output(hidden, *rest, **options):
    return good(hidden, *rest, **options) * 1.2


def wrong_gradient(hidden, *rest, **options):
    return good(hidden, *rest, **options) + (hidden - hidden.detach())


def not_a_number(*arguments, **options):
    return good(*arguments, **options) * float("nan")


def flaky(*arguments, **options):
    out = good(*arguments, **options)
    return out + torch.rand((), generator=torch.Generator().manual_seed(time.perf_counter_ns())) * 1e-6


def slow(*arguments, **options):
    time.sleep(0.05)
    return masked_experts_reference(*arguments, **options)


def hanging(*arguments, **options):
    time.sleep(600)


def crashing(*arguments, **options):
    os.kill(os.getpid(), signal.SIGSEGV)


def raising(*arguments, **options):
    raise RuntimeError("ptxas fatal: out of registers\nand more")


def unsupported(*arguments, **options):
    raise dispatch.Unsupported("no kernel for it")


ALL = (good, wrong_output, wrong_gradient, not_a_number, flaky, slow, hanging, crashing, raising, unsupported)


def register(*names, needs_proof=True):
    """Register stand-ins by name, the first one first."""
    for function in ALL:
        name = function.__name__
        if name in names or not names:
            module = types.ModuleType(f"standin_{name}")
            module.masked_experts, module.why_not = function, lambda *arguments: None
            module.Unsupported = dispatch.Unsupported
            sys.modules[module.__name__] = module
            IMPLEMENTATIONS[name] = (module.__name__, ())
            dispatch.register_backend("masked_experts", name, "cpu", lambda device: None, needs_proof=needs_proof)


if "pytest" not in sys.modules:  # in the process that runs proofs
    register()
