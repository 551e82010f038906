"""Rules of the kind, of matching and of torch's architectures, each on the facts that it needs."""

import dataclasses
import sys
import types

import pytest
from edgefed_fake_machine import cuda_device, cuda_report
from hypothesis import given
from hypothesis import strategies as st

from edgefed.hardware import cuda
from edgefed.hardware.facts import GpuFacts, MemoryKind, Reading, Reason
from edgefed.hardware.matching import (
    CARD_FAMILIES,
    SHARED_CAPABILITIES,
    bare_uuid,
    chip_of,
    choose_gpu,
    classify,
    find_gpu,
    match_cuda,
    unlisted_gpu,
)

GIB = 2**30
NO_BOARD = Reading.missing(Reason.ABSENT, "device tree, DMI")
SILENT = Reading.missing(Reason.NOT_SUPPORTED, "NVML GetMemoryInfo v2", "Not Supported")


def gpu_of(**values) -> GpuFacts:
    plain = {"nvml_index", "cuda_index", "is_mig", "mig_index"}
    given = {name: value if name in plain or isinstance(value, Reading) else Reading.of(value, "test")
             for name, value in values.items()}  # fmt: skip
    return dataclasses.replace(unlisted_gpu("test", "not given"), **given)


@pytest.mark.parametrize(
    "name",
    ["NVIDIA GB10", "NVIDIA Thor", "Orin (nvgpu)", "NVIDIA Jetson AGX Orin", "NVIDIA GH200 480GB", "NVIDIA GB200",
     "NVIDIA GB300", "NVIDIA RTX Spark N1X", "GV11B (nvgpu)", "Jetson Xavier NX", "NVIDIA GH200 120GB MIG 1g.12gb"],
)  # fmt: skip
def test_chips_that_share_the_hosts_memory(name):
    assert chip_of(Reading.of(name, "x"))


@pytest.mark.parametrize(
    "name",
    ["NVIDIA GeForce RTX 4090", "NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA B200", "NVIDIA A100-SXM4-40GB",
     "Tesla T4", "NVIDIA A10G", "NVIDIA L40S", "Tesla V100-SXM2-16GB", "NVIDIA GeForce GTX 1660 Ti", "NVIDIA RTX A2000",
     "NVIDIA RTX PRO 6000 Blackwell", "NVIDIA GeForce GT 1030", "Quadro P2000", "NVIDIA TITAN RTX"],
)  # fmt: skip
def test_discrete_cards_are_not_integrated_chips(name):
    assert not chip_of(Reading.of(name, "x"))
    assert CARD_FAMILIES.search(name.lower())


@pytest.mark.parametrize("capability", sorted(SHARED_CAPABILITIES))
def test_a_capability_alone_never_decides(capability):
    gpu = gpu_of(name="NVIDIA Graphics Device", compute_capability=capability, memory_total_bytes=2**34)
    assert classify(gpu, None, NO_BOARD).kind is MemoryKind.DISCRETE
    # with a driver that knows no memory, it is the second sign
    silent = dataclasses.replace(gpu, memory_total_bytes=SILENT)
    assert classify(silent, None, NO_BOARD).kind is MemoryKind.UNIFIED


def test_a_driver_that_knows_no_memory_never_decides_alone():
    gpu = gpu_of(name="NVIDIA Graphics Device", compute_capability=(8, 6), memory_total_bytes=SILENT)
    verdict = classify(gpu, None, NO_BOARD)
    assert verdict.kind is MemoryKind.DISCRETE
    assert "unknown" in verdict.notes[0]
    assert "NVML GetMemoryInfo v2" in verdict.notes[0]
    # CUDA knows its size: nothing is left to guess
    verdict = classify(dataclasses.replace(gpu, cuda_total_bytes=Reading.of(2**34, "CUDA")), None, NO_BOARD)
    assert verdict.kind is MemoryKind.DISCRETE
    assert "the size is the one that CUDA reports" in verdict.notes[0]


def test_not_integrated_does_not_make_a_gh200_discrete():
    gpu = gpu_of(name="NVIDIA GH200 480GB", integrated=False, memory_total_bytes=2**36, compute_capability=(9, 0))
    assert classify(gpu, None, NO_BOARD).kind is MemoryKind.UNIFIED


def test_an_h100_has_the_same_capability_and_is_discrete():
    gpu = gpu_of(name="NVIDIA H100 80GB HBM3", memory_total_bytes=2**36, compute_capability=(9, 0))
    assert classify(gpu, None, NO_BOARD).kind is MemoryKind.DISCRETE


def test_no_gpu_is_the_cpu_with_its_reason():
    verdict = classify(None, None, NO_BOARD, "no NVIDIA driver found")
    assert verdict.kind is MemoryKind.CPU
    assert "no NVIDIA driver found" in verdict.evidence[0]


readings = st.sampled_from([SILENT, Reading.missing(Reason.FAILED, "NVML", "x"), Reading.of(2**34, "NVML"),
                           Reading.missing(Reason.IMPLAUSIBLE, "NVML", "x"), Reading.missing(Reason.LOST, "NVML", "x"),
                           Reading.missing(Reason.NO_PERMISSION, "NVML", "x")])  # fmt: skip
names = st.sampled_from(
    ["NVIDIA GB10", "NVIDIA GeForce RTX 4090", "NVIDIA Graphics Device", "Orin (nvgpu)", "NVIDIA H200"]
)


@given(
    name=st.none() | names,
    memory=readings,
    integrated=st.sampled_from([None, True, False]),
    capability=st.none() | st.sampled_from([*sorted(SHARED_CAPABILITIES), (8, 9), (9, 0)]),
)
def test_every_combination_has_a_kind_with_its_reasons(name, memory, integrated, capability):
    missing = Reading.missing(Reason.FAILED, "x", "y")
    gpu = gpu_of(
        memory_total_bytes=memory,
        name=missing if name is None else name,
        integrated=missing if integrated is None else integrated,
        compute_capability=missing if capability is None else capability,
    )
    verdict = classify(gpu, None, NO_BOARD)
    assert verdict.kind in (MemoryKind.DISCRETE, MemoryKind.UNIFIED)
    assert len(verdict.evidence) >= 2
    named = bool(chip_of(gpu.name))
    if integrated or named:
        assert verdict.kind is MemoryKind.UNIFIED
    elif memory.known:
        assert verdict.kind is MemoryKind.DISCRETE
    elif verdict.kind is MemoryKind.UNIFIED:
        assert memory.reason in (Reason.NOT_SUPPORTED, Reason.IMPLAUSIBLE)
        assert capability in SHARED_CAPABILITIES
    if verdict.kind is MemoryKind.DISCRETE and not memory.known and memory.reason is not Reason.LOST:
        assert any("unknown" in note for note in verdict.notes)


UUIDS = ("11111111-2222-4333-8444-555555555555", "aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee")


def test_uuids_are_compared_without_their_kind():
    assert bare_uuid(f"GPU-{UUIDS[0]}") == bare_uuid(UUIDS[0].upper()) == UUIDS[0]
    assert bare_uuid(f"MIG-GPU-{UUIDS[0]}/7/0") == f"{UUIDS[0]}/7/0"
    assert bare_uuid(None) == ""


def test_without_uuids_one_is_matched_to_one_and_two_to_none():
    orin = gpu_of(nvml_index=0, name="Orin (nvgpu)", compute_capability=(8, 7))
    device = cuda_device(0, "Orin", "00000000-0000-0000-0000-000000000000", (8, 7), integrated=True)
    (matched,) = match_cuda((orin,), cuda_report(device))
    assert (matched.nvml_index, matched.cuda_index, matched.integrated.value) == (0, 0, True)
    assert not matched.uuid.known  # zeros are no name
    twins = (orin, dataclasses.replace(orin, nvml_index=1))
    assert [gpu.cuda_index for gpu in match_cuda(twins, cuda_report(device))] == [None, None, 0]


def test_contradicting_facts_are_not_matched():
    a = gpu_of(nvml_index=0, uuid=f"GPU-{UUIDS[0]}", compute_capability=(8, 9))
    (first, second) = match_cuda((a,), cuda_report(cuda_device(0, "other", UUIDS[1])))
    assert (first.cuda_index, second.cuda_index, second.nvml_index) == (None, 0, None)
    b = gpu_of(nvml_index=0, compute_capability=(7, 5))
    assert [gpu.cuda_index for gpu in match_cuda((b,), cuda_report(cuda_device(0, "x", "", (8, 9))))] == [None, 0]


def test_a_device_hidden_from_torch_is_listed_without_a_number():
    both = tuple(gpu_of(nvml_index=n, uuid=f"GPU-{UUIDS[n]}") for n in range(2))
    matched = match_cuda(both, cuda_report(cuda_device(0, "x", UUIDS[1])))
    assert [gpu.cuda_index for gpu in matched] == [None, 0]
    assert "CUDA_VISIBLE_DEVICES" in matched[0].integrated.detail
    assert choose_gpu(matched).nvml_index == 1


def test_the_uuid_of_a_card_in_mig_mode_means_its_visible_instance():
    parent = gpu_of(nvml_index=0, uuid=f"GPU-{UUIDS[0]}", mig_enabled=True)
    parts = [gpu_of(nvml_index=0, mig_index=n, is_mig=True, uuid=f"MIG-{n}{UUIDS[1][1:]}") for n in range(3)]
    report = cuda_report(cuda_device(0, "x", UUIDS[0]))
    assert [gpu.cuda_index for gpu in match_cuda((parent, *parts), report)] == [None, 0, None, None]
    visible = f"MIG-2{UUIDS[1][1:]}"
    assert [gpu.cuda_index for gpu in match_cuda((parent, *parts), report, visible)] == [None, None, None, 0]
    own = cuda_report(cuda_device(0, "x", f"1{UUIDS[1][1:]}"))
    assert [gpu.cuda_index for gpu in match_cuda((parent, *parts), own)] == [None, None, 0, None]


MIG_PARENT = gpu_of(nvml_index=0, uuid=f"GPU-{UUIDS[0]}", mig_enabled=True)
MIG_PARTS = tuple(
    gpu_of(nvml_index=0, mig_index=n, is_mig=True, uuid=f"MIG-{n}{UUIDS[1][1:]}", mig_ids=(7 + n, 0),
           memory_total_bytes=(n + 1) * 10 * GIB)
    for n in range(3)
)  # fmt: skip


@pytest.mark.parametrize(
    "visible",
    [
        f"MIG-2{UUIDS[1][1:]}",
        f"mig-2{UUIDS[1][1:]}",
        f"MIG-2{UUIDS[1][1:].upper()}",
        f"MIG-2{UUIDS[1][1:8]}",  # the beginning is enough for CUDA
        " MIG-2aaaa ",
        f"MIG-GPU-{UUIDS[0]}/9/0",  # the old form: GPU instance 9, compute instance 0
        f"MIG-GPU-{UUIDS[0].upper()}/9/0",
        f"GPU-{UUIDS[0]},MIG-2{UUIDS[1][1:]}",
    ],
)
def test_the_visible_instance_is_found_by_every_form_of_its_name(visible):
    report = cuda_report(cuda_device(0, "x", UUIDS[0]))
    matched = match_cuda((MIG_PARENT, *MIG_PARTS), report, visible)
    assert [gpu.cuda_index for gpu in matched] == [None, None, None, 0]
    asked = visible.split(",")[-1].strip()
    if len(asked) >= 8:
        assert find_gpu(matched, asked, by_cuda=True).mig_index == 2


def test_an_instance_that_nothing_names_is_the_one_of_cudas_size():
    report = cuda_report(dataclasses.replace(cuda_device(0, "x", UUIDS[0]), total_bytes=20 * GIB - 2**27))
    matched = match_cuda((MIG_PARENT, *MIG_PARTS), report, "0")
    assert [gpu.cuda_index for gpu in matched] == [None, None, 0, None]


def test_the_order_of_visible_instances_is_cudas():
    report = cuda_report(cuda_device(0, "x", UUIDS[0]), cuda_device(1, "x", UUIDS[0]))
    visible = f"MIG-2{UUIDS[1][1:]},MIG-0{UUIDS[1][1:]}"
    matched = match_cuda((MIG_PARENT, *MIG_PARTS), report, visible)
    assert [gpu.cuda_index for gpu in matched] == [None, 1, None, 0]


def test_a_beginning_that_two_uuids_share_names_neither():
    both = tuple(gpu_of(nvml_index=n, uuid=f"GPU-1234567{n}-0000-4000-8000-00000000000{n}") for n in range(2))
    assert find_gpu(both, "GPU-1234567", by_cuda=False) is None
    assert find_gpu(both, "gpu-12345671", by_cuda=False).nvml_index == 1


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((8, 6), ["sm_80", "sm_90"], True),  # the same major version, a later minor
        ((8, 0), ["sm_86"], False),
        ((7, 5), ["sm_80", "sm_90"], False),
        ((12, 1), ["sm_120", "compute_120"], True),
        ((11, 0), ["sm_90", "compute_90"], True),  # compiled on the device
        ((11, 0), ["sm_90a", "sm_120"], False),
        ((9, 0), ["sm_90a"], True),
        ((12, 1), ["sm_120a"], False),
        ((8, 9), [], True),
        ((8, 9), ["garbage", "sm_", "gfx90a"], False),
    ],
)
def test_whether_a_build_runs_on_a_device(capability, architectures, runs):
    assert cuda.has_code_for(capability, architectures) is runs


def broken_torch(monkeypatch, **cuda_functions):
    module = types.ModuleType("torch")
    module.__version__ = "2.9.0+cu130"
    module.version = types.SimpleNamespace(cuda="13.0", hip=None)
    module.cuda = types.SimpleNamespace(**cuda_functions)
    monkeypatch.setitem(sys.modules, "torch", module)


def raises(error):
    def function(*_):
        raise error

    return function


def test_torch_that_is_not_there_or_is_broken(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    report = cuda.ask_torch()
    assert report.version.reason is report.available.reason is Reason.ABSENT
    assert "torch" in report.version.detail

    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "torch":
                raise OSError("libcudart.so.13: cannot open shared object file")

    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    report = cuda.ask_torch()
    assert report.version.reason is Reason.FAILED
    assert "libcudart.so.13" in report.available.detail


def test_why_torch_cannot_use_cuda(monkeypatch):
    broken_torch(
        monkeypatch,
        is_available=lambda: False,
        device_count=lambda: 0,
        init=raises(RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nMore text")),
    )
    report = cuda.ask_torch()
    assert report.cuda_version.value == "13.0"
    assert not report.devices
    assert report.available.detail == "The NVIDIA driver on your system is too old (found version 11040)."
    broken_torch(monkeypatch, is_available=lambda: False, device_count=lambda: 0, init=lambda: None)
    assert "no CUDA device is visible" in cuda.ask_torch().available.detail
    broken_torch(monkeypatch, is_available=raises(RuntimeError("CUDA unknown error")))
    assert cuda.ask_torch().available.detail == "CUDA unknown error"


def test_facts_that_torch_reports_about_a_device(monkeypatch):
    properties = types.SimpleNamespace(
        name="NVIDIA GB10", major=12, minor=1, total_memory=2**37, is_integrated=1, uuid=UUIDS[0]
    )
    broken_torch(
        monkeypatch,
        is_available=lambda: True,
        device_count=lambda: 1,
        get_device_properties=lambda index: properties,
        get_arch_list=lambda: ["sm_120"],
        mem_get_info=lambda index: (2**30, 2**37),
    )
    report = cuda.ask_torch()
    assert report.devices == (cuda.CudaDevice(0, "NVIDIA GB10", UUIDS[0], (12, 1), True, 2**37, True),)
    assert cuda.free_bytes(0).value == 2**30
    broken_torch(monkeypatch, mem_get_info=raises(RuntimeError("CUDA error: devices busy")))
    assert cuda.free_bytes(0).detail == "CUDA error: devices busy"
    del properties.is_integrated, properties.uuid  # an older torch
    broken_torch(monkeypatch, is_available=lambda: True, device_count=lambda: 1, get_arch_list=lambda: [],
                 get_device_properties=lambda index: properties)  # fmt: skip
    (device,) = cuda.ask_torch().devices
    assert device.integrated is None
    assert device.uuid == ""
    assert device.runs_here


def test_the_torch_that_is_installed_answers():
    report = cuda.ask_torch()
    assert report.version.known
    assert report.available.known == bool(report.devices)
    assert report.available.known or report.available.detail
