"""The device proves its kernels: what is wrong, slow, hanging or crashing is found out and never used."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import standin_backends
import torch
from torch.nn import functional as F

from edgefed.kernels import dispatch, failures, proof, verdicts
from edgefed.kernels.masked_experts import IMPLEMENTATIONS, SlotWeights, masked_experts
from edgefed.kernels.verdicts import Case, Verdict

CASE = Case("masked_experts", "float32", "dense", 64, 32, 1, 0, "weights", "swiglu")
IMPORTS = ("standin_backends",)
NATIVE = pytest.mark.skipif(dispatch.why_not_native() is not None, reason="the stand-ins use the native kernels")


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """An empty cache, and the stand-ins gone afterwards."""
    monkeypatch.setenv("EDGEFED_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("EDGEFED_KERNELS", raising=False)
    known = dict(IMPLEMENTATIONS)
    verdicts.reload_verdicts()
    with dispatch.temporary_backends():
        yield
    IMPLEMENTATIONS.clear()
    IMPLEMENTATIONS.update(known)
    verdicts.reload_verdicts()


def only(*names):
    """Register these stand-ins instead of the native kernels."""
    dispatch.register_backend("masked_experts", "native", "cpu", lambda device: "set aside")
    standin_backends.register(*names)


def swiglu(up: torch.Tensor) -> torch.Tensor:
    gate, value = up.chunk(2, dim=-1)
    return F.silu(gate) * value


def layer(tokens=2):
    generator = torch.Generator().manual_seed(0)
    slots = [
        SlotWeights(
            torch.randn(64, 64, generator=generator).requires_grad_(),
            torch.randn(64, 32, generator=generator).requires_grad_(),
        )
        for _ in range(2)
    ]
    hidden = torch.randn(tokens, 64, generator=generator).requires_grad_()
    indices = torch.randint(0, 2, (tokens, 2), generator=generator)
    return hidden, indices, torch.rand(tokens, 2, generator=generator), slots


def run():
    """Return the backend that a training call of CASE runs with."""
    hidden, indices, weights, slots = layer()
    with dispatch.observe_backends() as ran:
        out = masked_experts(hidden, indices, weights, slots, activation=swiglu)
    expected = masked_experts(hidden, indices, weights, slots, activation=swiglu, backend="reference")
    torch.testing.assert_close(out, expected)
    return ran["masked_experts"]


def verdict(backend, state, speedup=2.0, case=CASE):
    return Verdict(case, backend, state, "a reason", ms=1.0, reference_ms=speedup, when=verdicts.now())


# --- proofs in a process of their own -----------------------------------------------------------------------------


@NATIVE
@pytest.mark.full
def test_every_backend_gets_the_verdict_that_it_deserves():
    only()
    said = []
    found = proof.prove("cpu", [CASE], on_message=said.append, run_limit_s=4.0, imports=IMPORTS)
    states = {row.backend: row for row in found}
    good = states["good"]  # a right one; whether it is faster depends on the processor
    assert good.state == ("proved" if good.speedup > verdicts.FASTER else "slower")
    assert {name: row.state for name, row in states.items() if row is not good} == {
        "wrong_output": "wrong", "wrong_gradient": "wrong", "not_a_number": "wrong", "flaky": "wrong",
        "slow": "slower", "hanging": "died", "crashing": "died", "raising": "failed", "unsupported": "unsupported",
    }  # fmt: skip
    assert good.speedup > states["slow"].speedup > 0
    assert states["wrong_output"].reason.startswith("the output is off by 20")
    assert states["wrong_gradient"].reason.startswith("gradient 1 is off by")
    assert states["flaky"].reason == "other bits from run to run"
    assert "did not end within 4 s" in states["hanging"].reason
    assert "SIGSEGV" in states["crashing"].reason
    assert states["raising"].reason == "RuntimeError: ptxas fatal: out of registers\nand more"
    assert any("proving good on cpu (1 of 10)" in line for line in said)
    assert run() == ("good" if good.state == "proved" else "reference")

    verdicts.reload_verdicts()  # as another process
    assert {row.backend: row.state for row in verdicts.verdicts_of("cpu").all()} == {
        name: row.state for name, row in states.items()
    }
    assert proof.prove("cpu", [CASE], imports=IMPORTS) == []  # nothing runs twice


@NATIVE
def test_native_kernels_are_proved_as_well():
    standin_backends.register("wrong_gradient")
    found = proof.prove("cpu", [CASE], imports=IMPORTS)
    assert [row.backend for row in found] == ["native", "wrong_gradient"]
    assert found[0].state in ("proved", "slower")  # as busy as this machine is
    assert found[0].ms > 0 < found[0].reference_ms
    assert found[1].state == "wrong"


@pytest.mark.full
def test_proofs_end_in_time_and_leave_no_verdict_of_what_was_cut_short():
    only("hanging")
    said = []
    assert proof.prove("cpu", [CASE], on_message=said.append, limit_s=0.0) == []
    assert said == ["kernels: 1 of 1 proofs are left for later"]
    start = proof.prove("cpu", [CASE], on_message=said.append, limit_s=20.0, imports=IMPORTS)
    assert start == []
    assert "left for later" in said[-1]
    assert verdicts.verdicts_of("cpu").all() == []


def test_another_process_that_proves_is_left_alone():
    only("good")
    said = []
    with verdicts.verdicts_of("cpu").proving() as alone:
        assert alone
        assert proof.prove("cpu", [CASE], on_message=said.append) == []
    assert "another process is proving" in said[0]


# --- what the dispatcher makes of verdicts --------------------------------------------------------------------------


@NATIVE
def test_without_a_verdict_the_reference_runs_and_the_case_is_remembered(caplog):
    only("good")
    with caplog.at_level("INFO"):
        assert [run(), run()] == ["reference"] * 2
    assert caplog.text.count("not good: not proved in this case on this device") == 1
    assert verdicts.verdicts_of("cpu").wanted() == [CASE]


@NATIVE
def test_wanted_cases_are_proved_before_training_and_run_from_then_on():
    only("good")
    assert run() == "reference"
    found = proof.prove_wanted("cpu", imports=IMPORTS)
    assert [row.case for row in found] == [CASE]
    assert run() == ("good" if found[0].state == "proved" else "reference")
    verdicts.verdicts_of("cpu").record(verdict("good", "proved"))
    assert run() == "good"


def test_nothing_is_proved_before_training_where_nothing_needs_it():
    assert proof.prove_wanted("cpu", [CASE], on_message=pytest.fail) == []


@NATIVE
def test_of_several_proved_backends_the_fastest_runs(caplog):
    only("good", "slow")
    store = verdicts.verdicts_of("cpu")
    store.record(verdict("good", "proved", 1.5), verdict("slow", "proved", 1.2))
    with caplog.at_level("INFO"):
        assert run() == "good"
    assert "uses good (proved, 1.5 times the reference's speed" in caplog.text
    store.record(verdict("slow", "proved", 3.0))
    assert run() == "slow"


@NATIVE
@pytest.mark.parametrize("state", ["wrong", "died", "failed", "trying", "slower", "unsupported"])
def test_any_other_verdict_excludes_a_backend(state, caplog):
    only("good")
    verdicts.verdicts_of("cpu").record(verdict("good", state, 0.5))
    with caplog.at_level("INFO"):
        assert run() == "reference"
    assert f"not good: {state}" in caplog.text


@NATIVE
def test_a_backend_that_needs_no_proof_is_excluded_by_a_bad_verdict_only():
    assert run() == "native"
    store = verdicts.verdicts_of("cpu")
    store.record(verdict("native", "slower", 1.0))
    assert run() == "native"
    store.record(verdict("native", "slower", 0.5))
    assert run() == "reference"
    store.record(verdict("native", "wrong"))
    assert run() == "reference"
    store.clear()
    assert run() == "native"


@NATIVE
def test_a_verdict_counts_for_its_case_only():
    only("good")
    verdicts.verdicts_of("cpu").record(verdict("good", "proved"))
    assert run() == "good"
    hidden, indices, weights, slots = layer(tokens=200)
    with dispatch.observe_backends() as ran:
        masked_experts(hidden, indices, weights, slots, activation=swiglu)
        assert ran["masked_experts"] == "reference"  # more rows per expert
        with torch.no_grad():
            masked_experts(*layer()[:3], slots, activation=swiglu)
        assert ran["masked_experts"] == "reference"  # no gradients
    wanted = verdicts.verdicts_of("cpu").wanted()
    assert wanted[0] == CASE  # of the call with the reference, with which `run` compares
    assert wanted[1:] == [dataclasses.replace(CASE, rows=128), dataclasses.replace(CASE, trains="nothing")]


def test_other_versions_start_without_verdicts(monkeypatch):
    verdicts.verdicts_of("cpu").record(verdict("native", "proved"))
    verdicts.reload_verdicts()
    assert verdicts.verdicts_of("cpu").all()
    described = verdicts.describe_device("cpu")
    monkeypatch.setattr(verdicts, "describe_device", lambda device: {**described, "torch": "9.9"})
    verdicts.reload_verdicts()
    assert verdicts.verdicts_of("cpu").all() == []


def test_a_damaged_file_is_an_empty_one_and_a_full_disk_keeps_verdicts_in_memory(caplog, monkeypatch, tmp_path):
    store = verdicts.verdicts_of("cpu")
    store.record(verdict("native", "wrong"))
    store.path.write_text("{not json")
    verdicts.reload_verdicts()
    store = verdicts.verdicts_of("cpu")
    assert store.all() == []
    assert "cannot read" in caplog.text
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGEFED_CACHE", str(tmp_path / "file"))
    store = verdicts.verdicts_of("cpu")
    store.record(verdict("native", "wrong"))
    assert "kept in this process only" in caplog.text
    assert verdicts.has_verdicts("cpu")


def test_the_backends_in_use_with_their_proofs(monkeypatch):
    """What `edgefed bench` shows: which backend runs in each case, since when, how much faster, and what of others."""
    only("good", "slow")
    monkeypatch.delenv("EDGEFED_KERNELS", raising=False)
    unproved = {row.case: row for row in proof.backends_in_use("cpu")}
    assert unproved["masked_experts"].backend == "reference"
    assert unproved["masked_experts"].others == ("good not proved", "slow not proved")
    waiting = dataclasses.replace(CASE, rows=16)
    verdicts.verdicts_of("cpu").want(waiting)
    verdicts.verdicts_of("cpu").record(
        Verdict(CASE, "good", "proved", ms=1.0, reference_ms=2.5, when="2026-11-30T08:00:00Z"),
        Verdict(CASE, "slow", "wrong", "the output is off by 20 %"),
    )
    rows = {row.case: row for row in proof.backends_in_use("cpu")}
    own = rows[str(CASE)]
    assert (own.backend, own.when, own.speedup) == ("good", "2026-11-30T08:00:00Z", 2.5)
    assert own.others == ("slow wrong: the output is off by 20 %",)
    assert rows[str(waiting)].backend == "reference"
    assert rows[str(waiting)].others == ("good not proved", "slow not proved")
    assert "masked_experts" not in rows  # its cases are known
    assert {"quantize_experts", "router_statistics"} <= set(rows)


# --- failures in use ------------------------------------------------------------------------------------------------


@NATIVE
def test_a_failure_in_use_is_recorded_and_the_next_one_runs(caplog):
    only("raising")
    verdicts.verdicts_of("cpu").record(verdict("raising", "proved"))
    assert run() == "reference"
    assert "the backend raising failed and is not used in this case again" in caplog.text
    assert "RuntimeError: ptxas fatal: out of registers" in caplog.text
    verdicts.reload_verdicts()
    assert [(row.case, row.state) for row in verdicts.verdicts_of("cpu").all()] == [(CASE, "failed")]
    caplog.clear()
    assert run() == "reference"
    assert not caplog.text.count("failed and is not used")


def test_a_backend_that_needs_no_proof_is_left_after_a_failure_too():
    dispatch.register_backend("masked_experts", "native", "cpu", lambda device: "set aside")
    standin_backends.register("raising", needs_proof=False)
    assert run() == "reference"
    assert dispatch.choose("masked_experts", "cpu", case=CASE) == "reference"


def test_a_failure_of_the_call_itself_is_nobodys_verdict():
    only()
    verdicts.verdicts_of("cpu").record(verdict("good", "proved"))

    def activation(up):
        raise RuntimeError("the layer is broken")

    with pytest.raises(RuntimeError, match="the layer is broken"):
        masked_experts(*layer()[:3], layer()[3], activation=activation)
    assert [row.state for row in verdicts.verdicts_of("cpu").all()] == ["proved"]


@pytest.mark.parametrize("error", [MemoryError("none"), RuntimeError("CUDA out of memory"), IndexError("slot 7")])
def test_want_of_memory_and_wrong_arguments_are_raised(error):
    def run_it(name):
        raise error

    dispatch.register_backend("masked_experts", "good", "cpu", lambda device: None, before="native")
    with pytest.raises(type(error)):
        dispatch.run_best("masked_experts", "cpu", "auto", run_it)
    assert not verdicts.has_verdicts("cpu")


@NATIVE
def test_a_failing_backward_pass_is_found_by_its_traceback(monkeypatch, caplog):
    hidden, indices, weights, slots = layer()
    out = masked_experts(hidden, indices, weights, slots, activation=swiglu)
    monkeypatch.setattr("edgefed.kernels.native_experts.backward", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        out.sum().backward()
    assert run() == "reference"  # recorded at once, whoever's loop it was
    (row,) = verdicts.verdicts_of("cpu").all()
    assert (row.backend, row.state, row.case.operation) == ("native", "failed", "masked_experts")
    assert "ZeroDivisionError" in row.reason
    assert failures.record_backward_failure("cpu", caught.value) == "native"  # what the trainer asks: no second record
    assert caplog.text.count("the backend native failed") == 1
    assert failures.record_backward_failure("cpu", ValueError("not of a kernel")) == ""
    assert sys.exc_info() == (None, None, None)
