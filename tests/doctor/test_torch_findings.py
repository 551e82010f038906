"""Why torch cannot use a GPU that is there: each reason by its name, with the line that repairs it."""

import pytest

from edgefed.doctor.finding import State
from edgefed.doctor.packages import TorchBuild, install_command, recorded_torch_findings, torch_findings
from edgefed.hardware.facts import Reading, Reason

PIP = "pip install THIS"


def build(**changes):
    fields = {
        "version": "2.13.0+cu130", "cuda": "13.0", "architectures": ("sm_80", "sm_90", "compute_90"),
        "cuda_available": True, "cuda_error": "", "devices": (("NVIDIA GeForce RTX 4090", (8, 9)),),
        "visible_devices": None, "threads": 8, "cpu_level": "AVX2",
    }  # fmt: skip
    return TorchBuild(**(fields | changes))


def on_gpu(facts, torch, *, gpu_requested=False):
    findings = torch_findings(facts, torch, PIP, gpu_requested=gpu_requested)
    (finding,) = [finding for finding in findings if finding.name == "torch on the GPU"]
    return finding


def test_a_gpu_that_works(device):
    assert on_gpu(device(), build()).state is State.OK


def test_no_gpu_needs_no_cuda(device):
    findings = torch_findings(device("cpu-vm-2core"), build(cuda=None, cuda_available=False), PIP, gpu_requested=False)
    assert [finding.state for finding in findings] == [State.OK]
    assert "the CPU only" in findings[0].found


NO_CUDA_HERE = {"cuda_available": False, "devices": ()}


@pytest.mark.parametrize(
    ("torch", "words"),
    [
        (build(cuda=None, architectures=(), version="2.13.0+cpu", **NO_CUDA_HERE), "is a CPU build"),
        (build(visible_devices="", **NO_CUDA_HERE), "CUDA_VISIBLE_DEVICES is ''"),
        (build(visible_devices="-1", **NO_CUDA_HERE), "CUDA_VISIBLE_DEVICES is '-1'"),
        (build(cuda_error="CUDA unknown error", **NO_CUDA_HERE), "CUDA unknown error"),
        (build(architectures=("sm_100", "sm_120")), "has no code for"),
    ],
)
def test_a_gpu_that_torch_cannot_use(device, torch, words):
    facts = device(gpu={"cuda_index": None})
    finding = on_gpu(facts, torch)
    assert words in finding.found
    assert finding.state is State.WARNING
    assert finding.fix or finding.command
    assert "trains on its CPU" in finding.why
    asked = on_gpu(facts, torch, gpu_requested=True)
    assert asked.state is State.PROBLEM
    assert "`device`" in asked.why


def test_a_driver_older_than_torch(device, parts):
    facts = device(gpu={"cuda_index": None}, driver=parts["driver"]("540.4.0", "12.6"))
    finding = on_gpu(facts, build(cuda_error="The NVIDIA driver is too old", **NO_CUDA_HERE))
    assert "needs a driver for CUDA 13.0, this one ends at CUDA 12.6" in finding.found
    assert finding.command == PIP
    assert "too old" in finding.why
    newer_within_major = on_gpu(facts, build(cuda="12.8", cuda_error="other", **NO_CUDA_HERE))
    assert "ends at CUDA" not in newer_within_major.found  # CUDA 12.8 runs on a driver for 12.6


def test_a_gpu_that_is_hidden_from_torch(device):
    facts = device(gpu={"cuda_index": None})
    finding = on_gpu(facts, build(visible_devices="1", devices=(("NVIDIA T4", (7, 5)),)))
    assert "torch sees NVIDIA T4, and not" in finding.found
    assert "'1'" in finding.why


def test_orin_runs_code_of_its_family(device):
    facts = device("jetson-orin-nano-8gb")
    assert on_gpu(facts, build(architectures=("sm_80", "sm_90"))).state is State.OK
    assert "has no code" in on_gpu(facts, build(architectures=("sm_89", "sm_90"))).found


def test_a_card_without_bfloat16_is_reported(device):
    names = [
        finding.name
        for finding in torch_findings(device("t4"), build(architectures=("sm_75",)), PIP, gpu_requested=False)
    ]
    assert "bfloat16" in names
    names = [finding.name for finding in torch_findings(device(), build(), PIP, gpu_requested=False)]
    assert "bfloat16" not in names


@pytest.mark.parametrize(
    ("profile", "cuda", "index"),
    [
        ("rtx-4090", "13.0", "cu130"), ("rtx-4090", "12.8", "cu128"), ("rtx-4090", "12.4", "cu126"),
        ("rtx-4090", "11.8", "cu118"), ("t4", "13.1", "cu130"),
    ],
)  # fmt: skip
def test_the_command_fits_the_driver(device, parts, profile, cuda, index):
    assert install_command(device(profile, driver=parts["driver"](cuda=cuda))).endswith(index)


def test_the_command_fits_old_cards_and_no_card(device):
    assert install_command(device(gpu={"compute_capability": (6, 1)})).endswith("cu126")
    assert "index-url" not in install_command(device("cpu-vm-2core"))


def test_a_recording_reports_the_torch_that_it_recorded(device):
    (fine,) = recorded_torch_findings(device(), PIP)
    assert fine.state is State.OK
    facts = device(gpu={"cuda_index": None})
    (hidden,) = recorded_torch_findings(facts, PIP)
    assert hidden.state is State.WARNING
    assert hidden.command == PIP
    never_asked = device(torch=Reading.missing(Reason.ABSENT, "torch", "not asked"))
    assert recorded_torch_findings(never_asked, PIP) == []
