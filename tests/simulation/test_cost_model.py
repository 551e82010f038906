"""From facts of a round to seconds on a device, by hand and by what must not get smaller."""

import dataclasses
import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgefed.costs.shapes import KNOWN_SHAPES, uniform_shape
from edgefed.costs.step_setup import StepSetup
from edgefed.errors import ConfigError
from edgefed.hardware.facts import MemoryKind
from edgefed.hardware.profiles import find_profile
from edgefed.protocol.changes import encode_blob_change, to_steps
from edgefed.protocol.frames import write_frame
from edgefed.protocol.messages import TensorInfo, UnitInfo
from edgefed.simulation.config import LINKS, Link, SimulatedDevice
from edgefed.simulation.device_rates import Calibration, CostShape, device_rates, memory_budget
from edgefed.simulation.simulated_device import CountingFetch
from edgefed.simulation.virtual_clock import CostModel, RoundWork

GIB = 2**30
OLMOE = KNOWN_SHAPES["OLMoE-1B-7B"]
CHARGED = CostShape(OLMOE, (16, 16))
EXACT = Calibration(1.0, 1.0, 1.0)
SETUP = StepSetup(batch_size=4, sequence_length=128, dtype="float32")
EXPERT_BYTES = 3 * 2048 * 1024 * 2


def model(**changes) -> CostModel:
    given = {"charged": CHARGED, "ratios": {}, "server_bytes_per_s": 1e12, "num_clients": 1, "calibration": EXACT}
    return CostModel(**{**given, **changes})


def device(profile: str = "rtx-4090", **changes) -> SimulatedDevice:
    return SimulatedDevice("d", find_profile(profile), LINKS["fibre"], "x.txt", **changes)


def work(**changes) -> RoundWork:
    given = {
        "resident": (8, 8),
        "trainable": (4, 4),
        "trainable_pairs": (0.5, 0.5),
        "setup": SETUP,
        "steps": 2,
        "tokens": 1024,
    }
    return RoundWork(**{**given, **changes})


def times(done: RoundWork, on: SimulatedDevice | None = None, usable: int = 16 * GIB, **changes):
    return model(**changes).client_times(done, device_rates(on or device()), usable)


def test_transfers_by_hand():
    on = dataclasses.replace(device(), link=Link(down_mbit=80, up_mbit=8, latency_ms=500))
    found = times(
        work(down={"expert": 20_000_000, "dense": 10_000_000}, up={"expert": 1_000_000}), on, ratios={"expert": 2.0}
    )
    assert found.parts["download"] == pytest.approx(50e6 / 10e6 + 0.5)
    assert found.parts["upload"] == pytest.approx(2e6 / 1e6 + 0.5)


def test_the_aggregators_link_is_shared():
    found = times(work(up={"expert": 10_000_000}), server_bytes_per_s=8e6, num_clients=4)
    assert found.parts["upload"] == pytest.approx(10e6 / 2e6 + 0.008)


def test_counts_of_the_model_become_those_of_the_cost_shape():
    assert CHARGED.counts((8, 1)) == (32,) * 8 + (4,) * 8
    assert CHARGED.counts((0, 16)) == (0,) * 8 + (64,) * 8
    assert CHARGED.experts_ratio == 1024 / 32
    odd = CostShape(OLMOE, (6, 6, 6))
    assert odd.counts((1, 2, 3)) == (11,) * 6 + (22,) * 5 + (32,) * 5


def test_byte_ratios_take_the_whole_cost_shape_for_the_whole_model():
    def unit(key: str, kind: str, size: int) -> UnitInfo:
        return UnitInfo(key=key, kind=kind, layer=-1, expert=-1, trainable=True, sha256="", size_bytes=size, tensors=())

    units = [unit("a", "expert", 100), unit("b", "expert", 300), unit("c", "dense", 50), unit("a:lora", "expert", 8)]
    setup = StepSetup(1, 1, dtype="bfloat16", lora_rank=8)
    ratios = CHARGED.byte_ratios(units, setup)
    assert ratios["expert"] * 400 == 1024 * EXPERT_BYTES
    assert ratios["expert:lora"] * 8 == 1024 * 4 * 8 * ((2048 + 2048) + (1024 + 2048))
    # Experts, dense tensors and routers are all there is.
    assert 400 * ratios["expert"] + 50 * ratios["dense"] + 16 * 2048 * 64 * 2 == OLMOE.num_parameters * 2
    assert ratios["file"] == 1
    tensors = (TensorInfo(name="w.lora_a", dtype="F32", shape=(8, 2)),)
    units[-1] = msgspec.structs.replace(units[-1], tensors=tensors)
    assert CHARGED.byte_ratios(units, dataclasses.replace(setup, lora_rank=2)) == ratios, "of a device of rank 2"


def test_experts_are_loaded_from_disk_over_the_host_link():
    on = device(disk_read_mb_s=1000.0)
    rates = device_rates(on)
    found = times(work(steps=0, trainable=(8, 8)), on)
    loaded = 16 * 32 * EXPERT_BYTES
    assert found.parts["load"] == pytest.approx(loaded / 1e9 + loaded / rates.host_link)
    unified = device("jetson-orin-nano-8gb", disk_read_mb_s=1000.0)
    assert times(work(steps=0, trainable=(8, 8)), unified).parts["load"] == pytest.approx(loaded / 1e9)


def test_a_profile_after_the_upload_is_no_part_of_the_round():
    now = times(work(profile_tokens=2048, profile_storage="nf4"))
    later = times(work(waiting_profile_tokens=2048, profile_storage="nf4"))
    assert now.parts["profile"] == pytest.approx(later.in_wait)
    assert now.in_wait == 0
    assert later.parts["profile"] == 0
    assert times(work()).parts["profile"] == 0


def test_merging_reads_members_and_comparing_reads_everything():
    on = device(disk_read_mb_s=1.0)  # so slow that nothing else counts
    merged = times(work(groups=(1, 1), members=(4, 4)), on).parts["merge"]
    assert merged == pytest.approx(16 * 16 * EXPERT_BYTES / 1e6, rel=1e-3)
    compared = times(work(groups=(1, 1), members=(4, 4), compares=True), on).parts["merge"]
    assert compared - merged == pytest.approx(1024 * EXPERT_BYTES / 1e6, rel=1e-3)
    assert times(work(), on).parts["merge"] == 0


def test_offloading_costs_nothing_where_everything_fits_and_the_disk_where_nothing_does():
    everything = work(resident=(16, 16), trainable=(16, 16), trainable_pairs=(1.0, 1.0), steps=1, offloads=True)
    assert times(everything, usable=200 * GIB).parts["offload"] == 0
    discrete = times(everything, device(host_memory_bytes=64 * GIB)).parts["offload"]
    small_host = times(everything, device(host_memory_bytes=8 * GIB)).parts["offload"]
    assert 0 < discrete < small_host
    rates = device_rates(device())
    weights = 1024 * EXPERT_BYTES  # in for the forward pass, again for the backward pass, gradients out
    assert discrete >= 2 * weights / rates.host_link
    unified = times(everything, device("jetson-orin-nano-8gb"), usable=4 * GIB).parts["offload"]
    assert unified > discrete


def test_exploring_is_charged_for_the_experts_of_the_cost_shape():
    plain = times(work(evaluated_tokens=5120)).parts["evaluate"]
    assert times(work(explored_tokens=5120)).parts["explore"] == pytest.approx(32 * plain)


def test_a_share_of_the_roofline_divides_each_phase():
    whole = times(work()).parts["train"]
    assert times(work(), calibration=Calibration(0.5, 0.5, 0.5)).parts["train"] == pytest.approx(2 * whole)
    with pytest.raises(ConfigError, match="backward is 0"):
        Calibration(0.5, 0.0, 0.5)


def test_gpus_are_charged_with_the_optimizer_that_was_asked_for():
    assert CHARGED.setup(SETUP, MemoryKind.UNIFIED).optimizer == "adamw_8bit"
    assert CHARGED.setup(SETUP, MemoryKind.CPU).optimizer == "adamw"
    own = CostShape.same(uniform_shape(
        "own", hidden_size=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8, vocab_size=9, num_experts=2,
        top_k=1, expert_width=4), "adamw")  # fmt: skip
    assert own.setup(SETUP, MemoryKind.DISCRETE) == dataclasses.replace(SETUP, device="cuda")


@pytest.mark.parametrize("name", ["rtx-4090", "rtx-3060-12gb", "rtx-4060-laptop-8gb", "jetson-orin-nano-8gb", "rpi-5"])
def test_every_device_of_a_usual_fleet_has_rates_and_a_budget(name):
    on = device(name)
    rates = device_rates(on)
    assert rates.flops(2) >= rates.flops(4) > 0
    assert rates.bandwidth > 0
    assert rates.disk_read > 0
    assert (rates.host_link is None) == (rates.kind is not MemoryKind.DISCRETE)
    assert 0 < memory_budget(on) < on.profile.value("memory_visible") * GIB
    assert memory_budget(dataclasses.replace(on, memory_bytes=GIB)) == GIB


def test_work_survives_json():

    done = work(groups=(1, 2), members=(3, 4), down={"expert": 5})
    assert msgspec.json.decode(msgspec.json.encode(done), type=RoundWork) == done


@settings(deadline=None, max_examples=30)
@given(
    resident=st.integers(1, 16), more=st.integers(0, 15), steps=st.integers(0, 3), extra=st.integers(0, 3),
    profile=st.integers(0, 4096), size=st.integers(0, 10**9),
)  # fmt: skip
def test_more_to_do_never_takes_less(resident, more, steps, extra, profile, size):
    less = work(
        resident=(resident, resident), trainable=(1, 1), steps=steps, profile_tokens=profile, down={"expert": size}
    )
    larger = msgspec.structs.replace(
        less,
        resident=(min(16, resident + more),) * 2,
        steps=steps + extra,
        profile_tokens=2 * profile,
        down={"expert": 2 * size},
    )
    for on in (device(), device("jetson-orin-nano-8gb"), device("rpi-5")):
        first, second = times(less, on), times(larger, on)
        assert all(second.parts[part] >= first.parts[part] * (1 - 1e-12) for part in first.parts)


@settings(deadline=None, max_examples=20)
@given(factor=st.floats(1, 100))
def test_a_faster_link_is_never_slower(factor):
    slow = dataclasses.replace(device(), link=Link(10, 5, 10))
    fast = dataclasses.replace(slow, link=Link(10 * factor, 5 * factor, 10))
    done = work(down={"expert": 10**8}, up={"expert": 10**7})
    for part in ("download", "upload"):
        assert times(done, fast).parts[part] <= times(done, slow).parts[part]


def test_the_calibration_is_the_recorded_one():
    recorded = json.loads((Path(__file__).parents[2] / "benchmarks/results/virtual_clock.json").read_text())
    for phase in ("forward", "backward", "optimizer"):
        assert getattr(Calibration(), phase) == pytest.approx(recorded["calibration"][phase], abs=0.006)
    predicted = [row["error"] for row in recorded["rows"][1:]]
    assert len(predicted) >= 3
    assert max(map(abs, predicted)) < 0.25


def test_steps_on_the_way_down_have_as_many_bits_in_every_dtype(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.standard_normal(100_000).astype(np.float32)
    for name in ("old", "new"):
        sha256, size_bytes = write_frame(tmp_path / name, {"w": ("F32", values)})
        values = (values + to_steps(rng.standard_normal(len(values)) * 1e-2, 7)).astype(np.float32)
    tensors = (TensorInfo(name="w", dtype="F32", shape=(len(values),)),)
    unit = UnitInfo(key="e", kind="expert", trainable=True, tensors=tensors, sha256="new", size_bytes=size_bytes)
    sizes = {}
    for width in (0, 4, 2):
        fetch = CountingFetch(lambda name: tmp_path / name, {"old"}, {"e": "old"}, width)
        fetch([unit])
        sizes[width] = fetch.take()["expert"]
    assert sizes[0] == sizes[4] == len(encode_blob_change(tmp_path / "old", tmp_path / "new"))
    assert sizes[2] == pytest.approx(2 * sizes[0], rel=0.02), "charged at 2 bytes a weight, these are the same bits"
