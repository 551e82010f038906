"""Who runs what: explicit wishes are kept or refused by name, automatic choices are said once, with their reason."""

from __future__ import annotations

import subprocess
import sys

import pytest

from edgefed.errors import ConfigError
from edgefed.kernels import dispatch
from edgefed.native import NativeUnavailable


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Every test starts with the backends that are announced on import, nothing chosen and nothing said."""
    monkeypatch.setattr(dispatch, "_backends", list(dispatch._backends))
    monkeypatch.setattr(dispatch, "_chosen", {})
    monkeypatch.setattr(dispatch, "_logged", set())
    monkeypatch.delenv("EDGEFED_KERNELS", raising=False)
    monkeypatch.delenv("EDGEFED_ISA", raising=False)


@pytest.fixture
def without_native(monkeypatch):
    def missing(path=None):
        raise NativeUnavailable("it was not built")

    monkeypatch.setattr(dispatch, "load_native", missing)


def test_auto_falls_back_aloud_and_once(without_native, caplog):
    with caplog.at_level("INFO"):
        assert [dispatch.choose("masked_experts", "cpu") for _ in range(3)] == ["reference"] * 3
    said = [record.message for record in caplog.records]
    assert said == ["masked_experts on cpu uses reference (not native: it was not built)"]


def test_a_wish_that_cannot_be_met_is_an_error_with_its_reason(without_native):
    with pytest.raises(ConfigError, match="'native' of masked_experts was asked for, but it was not built"):
        dispatch.choose("masked_experts", "cpu", "native")
    with pytest.raises(ConfigError, match="native.*is for cpu"):
        dispatch.choose("masked_experts", "cuda", "native")
    with pytest.raises(ConfigError, match="'quantum'.*there are .*reference"):
        dispatch.choose("masked_experts", "cpu", "quantum")


def test_the_environment_speaks_for_auto_only(monkeypatch, without_native):
    monkeypatch.setenv("EDGEFED_KERNELS", "reference")
    assert dispatch.choose("quantize_experts", "cpu") == "reference"
    monkeypatch.setenv("EDGEFED_KERNELS", "quantum")
    assert dispatch.choose("quantize_experts", "cpu", "reference") == "reference"
    with pytest.raises(ConfigError, match="EDGEFED_KERNELS"):
        dispatch.choose("quantize_experts", "cpu")


def test_a_new_backend_is_preferred_where_it_can_run():
    broken = ["no such device"]
    dispatch.register_backend("masked_experts", "fast", "cpu", lambda: broken[0] if broken else None, lambda: "wings")
    row = next(row for row in dispatch.backend_table() if row.name == "fast")
    assert (row.available, row.reason) == (False, "no such device")
    assert dispatch.choose("masked_experts", "cpu") != "fast"
    broken.clear()
    dispatch.register_backend("masked_experts", "fast", "cpu", lambda: None, lambda: "wings", before="native")
    assert dispatch.choose("masked_experts", "cpu") == "fast" == dispatch.choose("masked_experts", "cpu", "fast")
    assert dispatch.choose("masked_experts", "mps") == "reference"
    assert [row.name for row in dispatch.backend_table()].count("fast") == 1


def test_the_table_has_every_operation_and_a_reference_for_each():
    rows = dispatch.backend_table()
    for operation in dispatch.OPERATIONS:
        own = [row for row in rows if row.operation == operation]
        assert own[-1].name == "reference" and own[-1].available and all(row.reason for row in own)


def test_asking_needs_no_torch():
    code = "import edgefed.kernels.dispatch as d, sys; d.choose('masked_experts', 'cpu'); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
