"""What `edgefed join` finds out about its device before it trains, and what of it the server hears."""

from __future__ import annotations

import dataclasses

import pytest

from edgefed.aggregator.validate import check_register
from edgefed.errors import BudgetTooSmall, ConfigError, DeviceNotFound
from edgefed.hardware.probe import probe_device
from edgefed.hardware.profiles import facts_of, find_profile
from edgefed.join import DeviceMemory
from edgefed.protocol import PROTOCOL_VERSION
from edgefed.protocol.messages import Register

KIB = 1024


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A host whose /proc says what the test wants, without a GPU."""

    def make(total_kib: int, available_kib: int | None) -> None:
        (tmp_path / "proc").mkdir(exist_ok=True)
        lines = [f"MemTotal: {total_kib} kB"]
        lines += [] if available_kib is None else [f"MemAvailable: {available_kib} kB", "MemFree: 1 kB"]
        (tmp_path / "proc/meminfo").write_text("\n".join(lines) + "\n")

    monkeypatch.setenv("EDGEFED_SYSROOT", str(tmp_path))
    return make


def test_the_budget_is_measured_again_and_reported(machine):
    machine(16 * KIB * KIB, 12 * KIB * KIB)
    memory = DeviceMemory("cpu", None)
    first = memory.first.now_bytes
    assert memory.torch_device == "cpu"
    assert 0 < first < 16 * 2**30
    machine(16 * KIB * KIB, 6 * KIB * KIB)  # another program has started
    assert memory.measure().now_bytes < first - 5 * 2**30
    assert memory.latest.now_bytes == memory.describe().budget_bytes < first


def test_a_new_measurement_respects_the_owners_limit(machine):
    machine(16 * KIB * KIB, 12 * KIB * KIB)
    memory = DeviceMemory("cpu", 2**30)
    machine(16 * KIB * KIB, 1 * KIB * KIB)
    assert memory.measure().now_bytes == memory.first.now_bytes == 2**30


def test_device_facts_are_valid_and_name_no_other_program(machine):
    machine(16 * KIB * KIB, 12 * KIB * KIB)
    device = DeviceMemory("cpu", None).describe()
    assert (device.kind, device.trains_on, device.total_bytes) == ("cpu", "cpu", 16 * 2**30)
    assert "GiB" in device.budget_origin
    assert "(" not in device.budget_origin
    check_register(
        Register(
            protocol_version=PROTOCOL_VERSION,
            client_id="a",
            client_key="k" * 32,
            name="a",
            memory_bytes=1,
            expert_share=1.0,
            compute_share=1.0,
            num_examples=1,
            edgefed_version="0",
            device=device,
        )  # fmt: skip
    )


def test_a_missing_or_full_device_is_an_error_that_names_it(machine):
    machine(16 * KIB * KIB, 12 * KIB * KIB)
    with pytest.raises(DeviceNotFound, match="cuda:7"):
        DeviceMemory("cuda:7", None)
    machine(64 * KIB * KIB, 100 * KIB)  # a reserve of 6.4 GiB, above what this process itself holds
    with pytest.raises(BudgetTooSmall, match="no memory to spare"):
        DeviceMemory("cpu", None)
    machine(2 * KIB * KIB, None)
    with pytest.raises(ConfigError, match="unknown") as caught:
        DeviceMemory("cpu", None)
    assert "`memory`" in caught.value.remedy


def test_a_gpu_that_torch_cannot_use_is_not_monitored(machine, monkeypatch):
    machine(16 * KIB * KIB, 12 * KIB * KIB)
    host, card = probe_device("cpu").host, facts_of(find_profile("rtx-4090"))
    unused = dataclasses.replace(card, host=host, gpu=dataclasses.replace(card.gpu, cuda_index=None, nvml_index=0))
    used = dataclasses.replace(unused, gpu=dataclasses.replace(unused.gpu, cuda_index=0))
    watched = []
    monkeypatch.setattr("edgefed.join.MemorySensors", lambda facts: watched.append(facts.gpu))
    for facts in (unused, used):
        monkeypatch.setattr("edgefed.join.probe_device", lambda device, facts=facts: facts)
        DeviceMemory(None, 2**30).make_watch()
    assert watched == [None, used.gpu]
