"""A round proves the kernels that its device needs proof of, and starts again without one that fails in it."""

from __future__ import annotations

import pytest
import torch
from device_bench import trainer_of

from edgefed.kernels import dispatch, native_experts, proof, verdicts
from edgefed.kernels.verdicts import Verdict

NATIVE = pytest.mark.skipif(dispatch.why_not_native() is not None, reason="the native kernels fail here on purpose")


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEFED_CACHE", str(tmp_path / "cache"))
    verdicts.reload_verdicts()
    with dispatch.temporary_backends():
        yield
    verdicts.reload_verdicts()


@NATIVE
def test_a_round_goes_on_with_another_backend_when_one_fails_in_a_backward_pass(bench, data, tmp_path, monkeypatch):
    def fails(*arguments):
        raise RuntimeError("illegal instruction in the kernel")

    monkeypatch.setattr(native_experts, "backward", fails)
    table = bench("hfedmoe")
    _, update = table.round(trainer_of(data, tmp_path, share=0.25), tmp_path / "update")
    assert update.metrics["experts_trained"] > 0
    rows = verdicts.verdicts_of("cpu").all()
    assert {(row.backend, row.state) for row in rows} == {("native", "failed")}


def test_a_round_proves_what_it_will_run(bench, data, tmp_path, monkeypatch):
    asked = []

    def prove(device, cases, **options):
        asked.append((device, list(cases), options["limit_s"]))
        return []

    monkeypatch.setattr(proof, "prove", prove)
    table = bench("hfedmoe")
    table.round(trainer_of(data, tmp_path, share=0.25, name="a"), tmp_path / "update")
    assert asked == []  # nothing on this device needs proof
    dispatch.register_backend("masked_experts", "new", "cpu", lambda device: None, needs_proof=True)
    dispatch.register_backend("masked_experts", "native", "cpu", lambda device: "set aside")
    table.round(trainer_of(data, tmp_path, share=0.25, name="b"), tmp_path / "update")
    ((device, cases, limit_s),) = asked
    assert (device, limit_s) == ("cpu", proof.TRAINING_LIMIT_S)
    likely = cases[0]
    assert (likely.operation, likely.trains) == ("masked_experts", "weights")
    wanted = verdicts.verdicts_of("cpu").wanted()
    trained = [case for case in wanted if case.trains == "weights"]
    assert trained, wanted
    assert {(case.hidden, case.width, case.dtype) for case in trained} == {(likely.hidden, likely.width, likely.dtype)}


def test_training_is_planned_with_kernels_once_every_case_of_training_is_proved():
    from edgefed.moe.layer_runtime import training_kernels

    dispatch.register_backend("masked_experts", "native", "cpu", lambda device: None, needs_proof=True)
    one, other = (case for case in proof.standard_cases() if case.trains == "weights" and not case.rank)
    assert training_kernels((), torch.bfloat16, "cpu") == "reference"
    store = verdicts.verdicts_of("cpu")
    store.record(Verdict(one, "native", "proved", ms=1.0, reference_ms=2.0))
    assert training_kernels((), torch.bfloat16, "cpu") == "native"
    assert training_kernels((), torch.float16, "cpu") == "reference"
    store.record(Verdict(other, "native", "wrong"))
    assert training_kernels((), torch.bfloat16, "cpu") == "reference"
