"""Choice of backends: explicit requests are met or refused by name; automatic choices are logged once, with reasons."""

from __future__ import annotations

import subprocess
import sys

import pytest

from edgefed.errors import ConfigError
from edgefed.kernels import dispatch
from edgefed.native import NativeUnavailable


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Every test starts with the backends registered on import, without cached choices and log records."""
    with dispatch.temporary_backends():
        monkeypatch.delenv("EDGEFED_KERNELS", raising=False)
        monkeypatch.delenv("EDGEFED_ISA", raising=False)
        yield


@pytest.fixture
def without_native(monkeypatch):
    def missing(path=None):
        raise NativeUnavailable("it was not built")

    monkeypatch.setattr(dispatch, "load_native", missing)


def test_auto_falls_back_and_logs_it_once(without_native, caplog):
    with caplog.at_level("INFO"):
        assert [dispatch.choose("masked_experts", "cpu") for _ in range(3)] == ["reference"] * 3
    said = [record.message for record in caplog.records]
    assert said == ["masked_experts on cpu uses reference (not native: it was not built)"]


def test_a_requested_backend_that_cannot_run_is_an_error_with_its_reason(without_native):
    with pytest.raises(ConfigError, match="masked_experts with the requested backend 'native': it was not built"):
        dispatch.choose("masked_experts", "cpu", "native")
    with pytest.raises(ConfigError, match="native.*runs on cpu"):
        dispatch.choose("masked_experts", "cuda", "native")
    with pytest.raises(ConfigError, match="'quantum'.*expected one of .*reference"):
        dispatch.choose("masked_experts", "cpu", "quantum")


def test_the_environment_variable_applies_only_to_auto(monkeypatch, without_native):
    monkeypatch.setenv("EDGEFED_KERNELS", "reference")
    assert dispatch.choose("quantize_experts", "cpu") == "reference"
    monkeypatch.setenv("EDGEFED_KERNELS", "quantum")
    assert dispatch.choose("quantize_experts", "cpu", "reference") == "reference"
    with pytest.raises(ConfigError, match="EDGEFED_KERNELS"):
        dispatch.choose("quantize_experts", "cpu")


def test_a_new_backend_is_preferred_where_it_can_run():
    broken = ["no such device"]
    dispatch.register_backend(
        "masked_experts", "fast", "cpu", lambda device: broken[0] if broken else None, lambda device: "wings"
    )
    row = next(row for row in dispatch.backend_table() if row.name == "fast")
    assert (row.available, row.reason) == (False, "no such device")
    assert dispatch.choose("masked_experts", "cpu") != "fast"
    broken.clear()
    dispatch.register_backend(
        "masked_experts", "fast", "cpu", lambda device: None, lambda device: "wings", before="native"
    )
    assert dispatch.choose("masked_experts", "cpu") == "fast" == dispatch.choose("masked_experts", "cpu", "fast")
    assert dispatch.choose("masked_experts", "mps") == "reference"
    assert [row.name for row in dispatch.backend_table()].count("fast") == 1


def test_the_table_has_every_operation_and_a_reference_for_each():
    rows = dispatch.backend_table()
    for operation in dispatch.OPERATIONS:
        own = [row for row in rows if row.operation == operation]
        assert own[-1].name == "reference"
        assert own[-1].available
        assert all(row.reason for row in own)


def test_the_table_needs_no_torch():
    code = "import edgefed.kernels.dispatch as d, sys; d.choose('masked_experts', 'cpu'); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def announce_gpu():
    """Make the Triton and CUDA backends available, as on a machine with a GPU, without the need of a proof."""
    for row in dispatch.backend_table():
        if row.device_type == "cuda":
            dispatch.register_backend(row.operation, row.name, row.device_type, lambda device: None)


def test_what_a_backend_needs_is_asked_of_each_device_by_its_number():
    asked = []

    def why_not(device):
        asked.append(device)
        return "compute capability 7.5 is below 8.0" if device == "cuda:0" else None

    dispatch.register_backend("masked_experts", "triton", "cuda", why_not, needs_proof=False)
    dispatch.register_backend("masked_experts", "cuda", "cuda", lambda device: "no library")
    assert dispatch.choose("masked_experts", "cuda:0") == "reference"
    assert dispatch.choose("masked_experts", "cuda:1") == "triton"
    assert asked == ["cuda:0", "cuda:1"]
    rows = {(row.operation, row.name): row for row in dispatch.backend_table("cuda:0")}
    assert not rows["masked_experts", "triton"].available
    assert rows["masked_experts", "reference"].available


def test_unproved_backends_run_only_by_name(monkeypatch):
    for operation in dispatch.OPERATIONS:
        for name in ("triton", "cuda"):
            dispatch.register_backend(operation, name, "cuda", lambda device: None, needs_proof=True)
        assert dispatch.choose(operation, "cuda:0") == "reference"
        monkeypatch.setenv("EDGEFED_KERNELS", "triton")
        assert dispatch.choose(operation, "cuda:0") == "triton"
        monkeypatch.delenv("EDGEFED_KERNELS")


def test_the_environment_variable_applies_to_devices_with_that_backend(monkeypatch):
    announce_gpu()
    expected = dispatch.choose("quantize_experts", "cpu")
    monkeypatch.setenv("EDGEFED_KERNELS", "cuda")
    assert dispatch.choose("quantize_experts", "cuda") == "cuda"
    assert dispatch.choose("quantize_experts", "cpu") == expected


def test_a_backend_that_does_not_support_a_call_is_skipped_and_logged(monkeypatch, caplog):
    announce_gpu()
    tried = []

    def run(name):
        tried.append(name)
        if name != "reference":
            raise dispatch.Unsupported(f"{name} has no such shape")
        return "done"

    with caplog.at_level("INFO"):
        for _ in range(2):
            assert dispatch.run_best("masked_experts", "cuda", "auto", run) == "done"
    assert tried == ["triton", "cuda", "reference"] * 2
    said = [record.message for record in caplog.records if "no such shape" in record.message]
    assert said == [
        "masked_experts on cuda uses reference (not triton: triton has no such shape; not cuda: cuda has no such shape)"
    ]
    with pytest.raises(ConfigError, match="requested backend 'triton': triton has no such shape"):
        dispatch.run_best("masked_experts", "cuda", "triton", run)
    # The variable is a request for all operations: a call that the backend does not support runs with another one.
    monkeypatch.setenv("EDGEFED_KERNELS", "triton")
    assert dispatch.run_best("masked_experts", "cuda", "auto", run) == "done"


def test_an_error_of_a_backend_is_raised(monkeypatch):
    def run(name):
        raise IndexError("slot 7")

    with pytest.raises(IndexError, match="slot 7"):
        dispatch.run_best("masked_experts", "cpu", "auto", run)
