"""The budget policy: hand-computed cases of each kind of memory, every missing reading, and what must always hold."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgefed.errors import ConfigError
from edgefed.hardware.budget import plan_budget
from edgefed.hardware.facts import (
    DeviceFacts,
    DriverFacts,
    GpuFacts,
    GpuProcess,
    HostFacts,
    MemoryKind,
    Reading,
    Reason,
    TegraFacts,
    TorchFacts,
)
from edgefed.hardware.occupancy import OwnMemory
from edgefed.hardware.policy import BudgetPolicy, policy_from_environment

GIB, MIB = 2**30, 2**20


def absent(source="test"):
    return Reading.missing(Reason.ABSENT, source)


def of(value, source="test"):
    return Reading.of(value, source)


def process(pid, name, size):
    return GpuProcess(pid, of(name), absent() if size is None else of(size))


def make_host(**known):
    fields = {field.name: absent(field.name) for field in dataclasses.fields(HostFacts)}
    fields |= {"system": "linux", "machine": "x86_64", "is_wsl": False}
    return HostFacts(**{**fields, **known})


def make_gpu(**known):
    fields = {field.name: absent(field.name) for field in dataclasses.fields(GpuFacts)}
    fields |= {"nvml_index": 0, "cuda_index": 0, "is_mig": False, "own_bytes": of(0), "processes": of(())}
    return GpuFacts(**{**fields, "display_active": of(False), **known})


def make_tegra(**known):
    return TegraFacts(**{**{field.name: absent() for field in dataclasses.fields(TegraFacts)}, **known})


def make_facts(kind, *, gpu=None, host=None, tegra=None, torch=None):
    return DeviceFacts(
        kind=kind, evidence=(), gpu=gpu, gpus=(gpu,) if gpu else (), host=host or make_host(), tegra=tegra,
        driver=DriverFacts(gpu is not None, absent(), absent(), absent()),
        torch=torch or TorchFacts(absent(), absent(), absent()), notes=(),
    )  # fmt: skip


def rtx(total=8 * GIB, free=7 * GIB, **known):
    gpu = make_gpu(
        memory_total_bytes=of(total, "NVML memory v2"), memory_free_bytes=of(free, "NVML memory v2"), **known
    )
    return make_facts(MemoryKind.DISCRETE, gpu=gpu)


def jetson(total=16 * GIB, available=14 * GIB, gpu=None, **known):
    host = make_host(memory_total_bytes=of(total, "MemTotal"), memory_available_bytes=of(available, "MemAvailable"),
                     **known)  # fmt: skip
    return make_facts(MemoryKind.UNIFIED, gpu=gpu or make_gpu(cuda_total_bytes=of(total, "CUDA")), host=host,
                      tegra=make_tegra())  # fmt: skip


def laptop(total=16 * GIB, available=12 * GIB, **known):
    host = make_host(memory_total_bytes=of(total, "MemTotal"), memory_available_bytes=of(available, "MemAvailable"),
                     **known)  # fmt: skip
    return make_facts(MemoryKind.CPU, host=host)


def without(facts, part, name, reason=Reason.NOT_SUPPORTED):
    lost = Reading.missing(reason, f"sensor of {name}", "said no")
    return dataclasses.replace(facts, **{part: dataclasses.replace(getattr(facts, part), **{name: lost})})


def steps(budget):
    return {term.name: term.size_bytes for term in budget.terms}


# discrete ------------------------------------------------------------------------------------------------------------


def test_discrete_by_hand():
    budget = plan_budget(rtx())  # (min(7, 0.95 * 8) - 0.40 - max(0.5, 4 % of 8)) * 0.92
    assert budget.now_bytes == pytest.approx((7 - 0.40 - 0.5) * 0.92 * GIB, abs=8)
    assert budget.ideal_bytes == pytest.approx((7.6 - 0.40 - 0.5) * 0.92 * GIB, abs=8)
    assert budget.kind is MemoryKind.DISCRETE
    assert "device" in budget.covers
    assert steps(budget)["used by the driver"] == GIB


def test_discrete_never_takes_the_last_twentieth():
    budget = plan_budget(rtx(total=24 * GIB, free=24 * GIB))
    assert budget.now_bytes == pytest.approx((22.8 - 0.40 - 0.96) * 0.92 * GIB, abs=8)  # 4 % of 24 is above 0.5
    assert budget.now_bytes == budget.ideal_bytes
    assert steps(budget)["above 95%"] == pytest.approx(1.2 * GIB, abs=1)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (dict(display_active=of(True)), "a display is active"),
        (dict(display_active=absent()), "unknown"),
    ],
)
def test_discrete_leaves_a_desktop_room_to_grow(change, why):
    budget = plan_budget(rtx(**change))
    assert budget.now_bytes == pytest.approx((7 - 0.40 - 1.0) * 0.92 * GIB, abs=8)
    assert why in next(term.origin for term in budget.terms if term.name == "headroom")


def test_a_mig_instance_has_no_display():
    assert steps(plan_budget(rtx(display_active=absent(), is_mig=True)))["headroom"] == GIB // 2


def test_wsl_gets_a_desktops_headroom_and_a_warning():
    facts = rtx()
    budget = plan_budget(dataclasses.replace(facts, host=make_host(is_wsl=True)))
    assert steps(budget)["headroom"] == GIB
    assert any("WSL2" in note for note in budget.notes)


def test_expandable_segments_waste_less():
    assert plan_budget(rtx(), policy=BudgetPolicy(expandable_segments=True)).now_bytes == pytest.approx(
        (7 - 0.40 - 0.5) * 0.97 * GIB, abs=8
    )


@pytest.mark.parametrize(
    ("environ", "expandable"),
    [
        ({}, False),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, True),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64, expandable_segments:true"}, True),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, True),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}, False),
        ({"PYTORCH_CUDA_ALLOC_CONF": "nonsense,,:"}, False),
    ],
)
def test_policy_follows_the_allocators_settings(environ, expandable):
    assert policy_from_environment(environ).expandable_segments is expandable


def test_the_line_for_people_names_who_holds_the_memory():
    others = (process(11, "Xorg", int(0.6 * GIB)), process(12, "firefox", int(0.3 * GIB)), process(13, "tiny", MIB))
    budget = plan_budget(rtx(free=int(7.1 * GIB), processes=of(others)))
    assert budget.origin.startswith("5.7 GiB of 8.0: 0.9 used by others (Xorg 0.6, firefox 0.3), ")
    assert "0.4 CUDA context, 0.5 headroom" in budget.origin
    assert "\n" not in budget.origin


def test_processes_without_sizes_leave_the_sum_alone():
    budget = plan_budget(rtx(processes=of((process(11, "dwm.exe", None),))))
    assert steps(budget)["used by others"] == GIB
    assert plan_budget(rtx(processes=absent())).now_bytes == budget.now_bytes == plan_budget(rtx()).now_bytes


def test_nothing_left_is_zero_with_a_reason():
    budget = plan_budget(rtx(free=GIB // 2, processes=of((process(9, "game", 7 * GIB),))))
    assert budget.now_bytes == 0
    assert sum(term.signed_bytes for term in budget.terms) == 0
    assert any("nothing is left" in note and "7.0 GiB of 8.0 GiB used by others" in note for note in budget.notes)
    assert any("wanted, not enough was left" in term.origin for term in budget.terms)


def test_a_limit_of_zero_everywhere_does_not_crash():
    budget = plan_budget(laptop(cgroup_limit_bytes=of(0), cgroup_used_bytes=of(0)))
    assert budget.now_bytes == 0
    assert any("0 MiB container limit" in note for note in budget.notes)


def test_much_less_than_idle_is_said():
    assert any("6.2 GiB could be used" in note for note in plan_budget(rtx(free=4 * GIB)).notes)
    assert plan_budget(rtx()).notes == ()


def test_a_running_agent_measures_what_it_measured_before_it_ran():
    before = plan_budget(rtx())
    context, reserved = int(0.40 * GIB), 3 * GIB
    own = OwnMemory(torch_reserved_bytes=reserved, context_bytes=context)
    listed = plan_budget(rtx(free=7 * GIB - reserved - context, own_bytes=of(reserved + context)), own=own)
    assert listed.now_bytes == before.now_bytes
    without_size = dataclasses.replace(own, context_bytes=None)  # then NVML's bytes less torch's are the context
    again = plan_budget(rtx(free=7 * GIB - reserved - context, own_bytes=of(reserved + context)), own=without_size)
    assert again.now_bytes == before.now_bytes
    unlisted = plan_budget(rtx(free=7 * GIB - reserved - context, own_bytes=absent()), own=own)
    assert unlisted.now_bytes == before.now_bytes  # WSL2: torch's word, and the context is out of `free` already
    in_container = plan_budget(rtx(free=7 * GIB - reserved - context, own_bytes=of(0)), own=own)
    assert in_container.now_bytes == before.now_bytes


@pytest.mark.parametrize("context_bytes", [int(0.7 * GIB), None], ids=["measured", "NVML less torch"])
def test_a_measured_context_replaces_the_assumed_one(context_bytes):
    own = OwnMemory(torch_reserved_bytes=GIB, context_bytes=context_bytes)
    budget = plan_budget(rtx(free=5 * GIB, own_bytes=of(GIB + int(0.7 * GIB))), own=own)
    assert steps(budget)["CUDA context"] == int(0.7 * GIB)
    assert budget.ideal_bytes == pytest.approx((7.6 - 0.7 - 0.5) * 0.92 * GIB, abs=8)


def test_before_the_first_kernel_the_context_may_still_grow():
    budget = plan_budget(rtx(own_bytes=of(int(0.1 * GIB))), own=OwnMemory())
    assert steps(budget)["CUDA context"] == int(0.40 * GIB)


def test_ideal_is_never_below_now():
    own = OwnMemory(torch_reserved_bytes=3 * GIB, context_bytes=GIB)  # unlisted: the context is not taken off again
    budget = plan_budget(rtx(total=24 * GIB, free=20 * GIB, own_bytes=absent()), own=own)
    assert budget.now_bytes == budget.ideal_bytes == pytest.approx((22.8 - 0.96) * 0.92 * GIB, abs=8)


# unified -------------------------------------------------------------------------------------------------------------


def test_unified_by_hand():
    budget = plan_budget(jetson())  # (14 - max(1, 1.6) - 1.2 - 0.25) * 0.94
    assert budget.now_bytes == pytest.approx((14 - 1.6 - 1.2 - 0.25) * 0.94 * GIB, abs=8)
    idle = 16 * (1 - 0.015) - 1.25
    assert budget.ideal_bytes == pytest.approx((idle - 1.6 - 1.2 - 0.25) * 0.94 * GIB, abs=8)


def test_unified_ignores_nvml_memory():
    carve_out = make_gpu(memory_total_bytes=of(8 * GIB), memory_free_bytes=of(GIB), cuda_total_bytes=of(16 * GIB))
    assert plan_budget(jetson(gpu=carve_out)).now_bytes == plan_budget(jetson()).now_bytes


def test_unified_is_bounded_by_the_cuda_pool():
    budget = plan_budget(jetson(gpu=make_gpu(cuda_total_bytes=of(10 * GIB, "CUDA"))))
    assert budget.now_bytes == pytest.approx((10 - 1.6 - 1.2 - 0.25) * 0.94 * GIB, abs=8)
    assert steps(budget)["beyond the CUDA pool"] == 4 * GIB
    unknown = plan_budget(jetson(gpu=make_gpu()))
    assert unknown.now_bytes == plan_budget(jetson()).now_bytes
    assert any("CUDA pool is unknown" in note for note in unknown.notes)


def test_unified_works_without_any_gpu_handle():
    facts = dataclasses.replace(jetson(), gpu=None, gpus=())
    assert plan_budget(facts).now_bytes == plan_budget(jetson()).now_bytes


def test_unified_with_huge_pages_counts_them_alone():
    budget = plan_budget(jetson(huge_pages_total=of(4096), huge_pages_free_bytes=of(8 * GIB, "HugePages_Free")))
    assert budget.now_bytes == pytest.approx((8 - 1.6 - 1.2 - 0.25) * 0.94 * GIB, abs=8)
    assert budget.ideal_bytes == budget.now_bytes
    assert any("huge pages" in note and "nr_hugepages" in note for note in budget.notes)
    none = plan_budget(jetson(huge_pages_total=of(0), huge_pages_free_bytes=of(0)))
    assert none.now_bytes == plan_budget(jetson()).now_bytes


def test_unified_knows_what_is_loaded_already():
    own = OwnMemory(rss_bytes=GIB)
    budget = plan_budget(jetson(available=13 * GIB), own=own)  # our own GiB is gone from MemAvailable, 0.2 to come
    assert budget.now_bytes == pytest.approx((13 - 1.6 - 0.2 - 0.25) * 0.94 * GIB, abs=8)
    assert steps(budget)["used by this process"] == GIB
    assert steps(budget)["used by others"] == 2 * GIB


def test_a_running_agent_on_a_jetson_measures_what_it_measured_before():
    rss, reserved, context = int(1.2 * GIB), 4 * GIB, int(0.25 * GIB)
    own = OwnMemory(rss_bytes=rss, torch_reserved_bytes=reserved, context_bytes=context)
    available = 14 * GIB - rss - reserved - context
    before = plan_budget(jetson()).now_bytes
    assert plan_budget(jetson(available=available), own=own).now_bytes == before  # Orin: NVML does not list us
    listed = make_gpu(cuda_total_bytes=of(16 * GIB), own_bytes=of(reserved + context))
    assert plan_budget(jetson(available=available, gpu=listed), own=own).now_bytes == before  # Thor, GB10


@pytest.mark.parametrize("charged", [True, False], ids=["GPU pages charged", "GPU pages not charged"])
def test_a_container_on_a_jetson_may_charge_gpu_pages_or_not(charged):
    limit = of(8 * GIB, "memory.max")
    before = plan_budget(jetson(cgroup_limit_bytes=limit, cgroup_used_bytes=of(GIB))).now_bytes
    assert before == pytest.approx((7 - 1.0 - 1.2 - 0.25) * 0.94 * GIB, abs=8)
    rss, reserved = int(1.2 * GIB), 2 * GIB
    own = OwnMemory(rss_bytes=rss, torch_reserved_bytes=reserved, context_bytes=int(0.25 * GIB))
    used = GIB + rss + (reserved if charged else 0)
    running = jetson(available=14 * GIB - rss - reserved, cgroup_limit_bytes=limit, cgroup_used_bytes=of(used))
    after = plan_budget(running, own=own).now_bytes
    assert after == pytest.approx(before + (0.25 if charged else 0.25 + 1.0) * 0.94 * GIB, rel=0.05)


def test_jetson_notes():
    budget = plan_budget(jetson(largest_free_block_bytes=of(256 * 1024), zram_used_bytes=of(GIB)))
    assert any("256 KiB" in note and "reboot" in note for note in budget.notes)
    assert any("zram holds 1.0 GiB" in note for note in budget.notes)
    assert plan_budget(jetson(largest_free_block_bytes=of(4 * MIB), zram_used_bytes=of(0))).notes == ()


# cpu -----------------------------------------------------------------------------------------------------------------


def test_cpu_by_hand():
    budget = plan_budget(laptop())  # (12 - max(1, 1.6)) * 0.95, for the whole process
    assert budget.now_bytes == pytest.approx((12 - 1.6) * 0.95 * GIB, abs=8)
    assert "process" in budget.covers
    small = plan_budget(laptop(total=8 * GIB, available=4 * GIB))
    assert small.now_bytes == pytest.approx((4 - 1.0) * 0.95 * GIB, abs=8)


def test_cpu_counts_the_memory_of_this_process():
    running = plan_budget(laptop(available=7 * GIB), own=OwnMemory(rss_bytes=5 * GIB))
    assert running.now_bytes == plan_budget(laptop()).now_bytes
    assert plan_budget(laptop(available=7 * GIB, own_rss_bytes=of(5 * GIB))).now_bytes == running.now_bytes


def test_cpu_in_a_container_keeps_a_reserve_of_the_container():
    inside = dict(cgroup_limit_bytes=of(8 * GIB, "memory.max"), cgroup_used_bytes=of(2 * GIB, "memory.current"))
    budget = plan_budget(laptop(total=256 * GIB, available=200 * GIB, **inside))
    assert budget.now_bytes == pytest.approx((6 - 1.0) * 0.95 * GIB, abs=8)
    assert budget.origin.startswith("4.8 GiB of 8.0 (container limit): 2.0 used by others, 1.0 reserved for the system")
    assert [term.origin for term in budget.terms[:2]] == ["memory.max", "memory.current, less our own"]
    roomy = plan_budget(laptop(cgroup_limit_bytes=of(64 * GIB), cgroup_used_bytes=of(0)))
    assert roomy.now_bytes == plan_budget(laptop()).now_bytes
    running = plan_budget(laptop(total=256 * GIB, available=199 * GIB, **inside), own=OwnMemory(rss_bytes=GIB))
    assert running.now_bytes == pytest.approx((7 - 1.0) * 0.95 * GIB, abs=8)  # one of the two used is our own


def test_a_container_above_its_limit_has_no_room():
    facts = laptop(cgroup_limit_bytes=of(8 * GIB), cgroup_used_bytes=of(10 * GIB))
    assert plan_budget(facts, own=OwnMemory(rss_bytes=GIB)).now_bytes == 0
    ours = plan_budget(facts, own=OwnMemory(rss_bytes=5 * GIB))  # 2 above the limit: 3 of our 5 are what we may have
    assert ours.now_bytes == pytest.approx((3 - 1) * 0.95 * GIB, abs=8)


def test_the_tighter_of_host_and_container_decides():
    facts = laptop(total=64 * GIB, available=10 * GIB, cgroup_limit_bytes=of(16 * GIB), cgroup_used_bytes=of(7 * GIB))
    budget = plan_budget(facts)  # 10 - 6.4 on the host, 9 - 1.6 under the limit
    assert budget.now_bytes == pytest.approx((10 - 6.4) * 0.95 * GIB, abs=8)
    assert "container" not in budget.origin


def test_cpu_zram_is_noted():
    assert any("zram" in note for note in plan_budget(laptop(zram_used_bytes=of(GIB))).notes)


# which memory, and the owner's limit ---------------------------------------------------------------------------------


def test_a_gpu_that_torch_cannot_use():
    facts = rtx()
    reason = Reading.missing(Reason.NOT_SUPPORTED, "torch", "built for the CPU")
    host = laptop().host
    unusable = dataclasses.replace(
        facts, gpu=dataclasses.replace(facts.gpu, cuda_index=None), host=host,
        torch=TorchFacts(of("2.4"), absent(), reason),
    )  # fmt: skip
    assert plan_budget(unusable).now_bytes == plan_budget(facts).now_bytes
    training = plan_budget(unusable, for_training=True)
    assert training.kind is MemoryKind.CPU
    assert training.now_bytes == plan_budget(laptop()).now_bytes
    assert any("built for the CPU" in note for note in training.notes)
    assert plan_budget(facts, for_training=True) == plan_budget(facts)


def test_no_gpu_is_planned_above_what_cuda_has():
    """NVML may know the whole GPU, or another MIG instance, where CUDA sees one of 10 GiB."""
    gpu = make_gpu(memory_total_bytes=of(80 * GIB), memory_free_bytes=of(80 * GIB), cuda_total_bytes=of(10 * GIB))
    budget = plan_budget(make_facts(MemoryKind.DISCRETE, gpu=gpu))
    assert 0 < budget.now_bytes < budget.ideal_bytes + 1 < 10 * GIB
    assert steps(budget)["beyond CUDA's total"] == 66 * GIB


def test_file_pages_of_this_process_are_not_given_back_twice():
    """The container's use leaves reclaimable file pages out, so only the rest of the resident memory is added."""
    host = make_host(
        memory_total_bytes=of(64 * GIB), memory_available_bytes=of(60 * GIB), cgroup_limit_bytes=of(8 * GIB),
        cgroup_used_bytes=of(2 * GIB), own_rss_bytes=of(3 * GIB), own_file_bytes=of(2 * GIB),
    )  # fmt: skip
    budget = plan_budget(make_facts(MemoryKind.CPU, host=host))
    assert steps(budget)["container limit"] == 8 * GIB
    assert steps(budget)["used by others"] == GIB


def test_the_owners_limit_wins():
    budget = plan_budget(rtx(), override_bytes=2 * GIB)
    assert (budget.now_bytes, budget.ideal_bytes) == (2 * GIB, 2 * GIB)
    assert budget.measured_bytes == plan_budget(rtx()).now_bytes
    assert budget.origin == "2.0 GiB by `memory`; 5.6 GiB could be used"
    assert budget.notes == ()
    assert sum(term.signed_bytes for term in budget.terms) == 2 * GIB


def test_a_limit_just_above_the_available_memory_is_taken_with_a_warning():
    measured = plan_budget(rtx()).now_bytes
    assert plan_budget(rtx(), override_bytes=measured).notes == ()
    assert len(plan_budget(rtx(), override_bytes=measured + 1).notes) == 1


def test_a_limit_above_the_available_memory_is_taken_with_a_warning():
    budget = plan_budget(rtx(), override_bytes=20 * GIB)
    assert budget.now_bytes == 20 * GIB
    assert steps(budget) == {"`memory`": 20 * GIB}
    assert any("`memory` 20.0 GiB is more than the 5.6 GiB" in note for note in budget.notes)


def test_a_limit_without_a_measurement():
    budget = plan_budget(without(rtx(), "gpu", "memory_free_bytes"), override_bytes=GIB)
    assert budget.now_bytes == GIB
    assert budget.measured_bytes is None
    assert any("sensor of memory_free_bytes" in note for note in budget.notes)
    assert any("unchecked" in note for note in budget.notes)
    assert not any("set `memory`" in note for note in budget.notes)


@pytest.mark.parametrize("size", [0, -1])
def test_a_limit_of_nothing_is_refused(size):
    with pytest.raises(ConfigError, match="more than 0"):
        plan_budget(rtx(), override_bytes=size)


# what is unknown stays unknown ---------------------------------------------------------------------------------------


LIMITED = dict(cgroup_limit_bytes=of(8 * GIB), cgroup_used_bytes=of(GIB))


@pytest.mark.parametrize(
    ("facts", "part", "name", "ideal"),
    [
        (rtx(), "gpu", "memory_free_bytes", True),
        (rtx(), "gpu", "memory_total_bytes", False),
        (jetson(), "host", "memory_available_bytes", True),
        (jetson(), "host", "memory_total_bytes", False),
        (jetson(**LIMITED), "host", "cgroup_used_bytes", True),
        (jetson(huge_pages_total=of(8), huge_pages_free_bytes=of(1)), "host", "huge_pages_free_bytes", True),
        (laptop(), "host", "memory_available_bytes", True),
        (laptop(), "host", "memory_total_bytes", False),
        (laptop(**LIMITED), "host", "cgroup_used_bytes", True),
    ],
)
@pytest.mark.parametrize("reason", list(Reason))
def test_a_missing_reading_makes_the_budget_unknown(facts, part, name, ideal, reason):
    budget = plan_budget(without(facts, part, name, reason))
    assert budget.now_bytes is None
    assert budget.terms == ()
    assert (budget.ideal_bytes is not None) is ideal
    said = [note for note in budget.notes if f"sensor of {name}" in note]
    assert len(said) == 1
    assert str(reason) in said[0]
    assert budget.origin == f"unknown: {said[0]}"
    assert budget.notes[-1].startswith("set `memory`")
    if reason is Reason.LOST:
        assert "dmesg" in said[0]
    if reason is Reason.NO_PERMISSION:
        assert "MIG" in said[0]


def test_total_memory_of_a_gpu_may_come_from_cuda():
    facts = without(rtx(cuda_total_bytes=of(8 * GIB, "CUDA")), "gpu", "memory_total_bytes")
    assert plan_budget(facts).now_bytes == plan_budget(rtx()).now_bytes


def test_a_discrete_device_without_a_gpu_is_unknown():
    budget = plan_budget(make_facts(MemoryKind.DISCRETE))
    assert budget.now_bytes is None
    assert "no GPU" in budget.origin


@pytest.mark.parametrize("reason", [Reason.FAILED, Reason.NO_PERMISSION])
def test_an_unreadable_limit_stops_only_inside_a_container(reason):
    unreadable = dict(cgroup_limit_bytes=Reading.missing(reason, "memory.max"))
    inside = plan_budget(laptop(**unreadable, container=of("docker")))
    assert inside.now_bytes is None
    assert any("memory.max" in note for note in inside.notes)
    outside = plan_budget(laptop(**unreadable))
    assert outside.now_bytes == plan_budget(laptop()).now_bytes
    assert any("memory.max" in note for note in outside.notes)


# what always holds ---------------------------------------------------------------------------------------------------

sizes = st.one_of(
    st.integers(0, 300 * GIB), st.integers(0, 64).map(lambda n: n * GIB), st.integers(0, 4096), st.just(2**62)
)
totals = st.one_of(st.integers(1, 300 * GIB), st.integers(1, 256).map(lambda n: n * GIB))
missing = st.sampled_from(list(Reason)).map(lambda reason: Reading.missing(reason, "sensor"))


def maybe(values):
    return st.one_of(values.map(of), values.map(of), values.map(of), missing)


processes = maybe(st.lists(st.tuples(st.integers(1, 99), maybe(sizes)), max_size=4).map(
    lambda pairs: tuple(GpuProcess(pid, of("x"), size) for pid, size in pairs)
))  # fmt: skip
hosts = st.builds(
    make_host, memory_total_bytes=maybe(totals), memory_available_bytes=maybe(sizes), own_rss_bytes=maybe(sizes),
    huge_pages_total=maybe(st.sampled_from([0, 0, 0, 512])), huge_pages_free_bytes=maybe(sizes),
    swap_total_bytes=maybe(sizes), swap_used_bytes=maybe(sizes), zram_used_bytes=maybe(sizes),
    largest_free_block_bytes=maybe(sizes), is_wsl=st.booleans(), container=maybe(st.just("docker")),
    cgroup_limit_bytes=st.one_of(st.builds(absent), maybe(sizes)), cgroup_used_bytes=maybe(sizes),
)  # fmt: skip
gpus = st.builds(
    make_gpu, memory_total_bytes=maybe(totals), memory_free_bytes=maybe(sizes), own_bytes=maybe(sizes),
    cuda_total_bytes=maybe(totals), display_active=maybe(st.booleans()), is_mig=st.booleans(), processes=processes,
    cuda_index=st.sampled_from([None, 0]),
)  # fmt: skip
devices = st.builds(
    make_facts, st.sampled_from(list(MemoryKind)), gpu=st.one_of(st.none(), gpus, gpus), host=hosts,
    tegra=st.one_of(st.none(), st.builds(make_tegra)),
)  # fmt: skip
owns = st.one_of(st.none(), st.builds(OwnMemory, sizes, sizes, st.one_of(st.none(), st.integers(0, 2 * GIB))))


def held_bytes(facts, own, kind):
    """The most that this process can be said to hold in the memory that is meant."""
    rss = max((own.rss_bytes if own else 0), facts.host.own_rss_bytes.value or 0)
    on_gpu = max((own.torch_reserved_bytes if own else 0), (facts.gpu and facts.gpu.own_bytes.value) or 0)
    return rss if kind is MemoryKind.CPU else on_gpu


@settings(max_examples=400, deadline=None)
@given(devices, owns, st.booleans())
def test_never_above_what_is_free_never_negative_never_made_up(facts, own, for_training):
    budget = plan_budget(facts, own=own, for_training=for_training)
    kind = budget.kind
    free = {
        MemoryKind.DISCRETE: facts.gpu.memory_free_bytes if facts.gpu else absent(),
        MemoryKind.UNIFIED: facts.host.huge_pages_free_bytes
        if facts.host.huge_pages_total.value
        else facts.host.memory_available_bytes,
        MemoryKind.CPU: facts.host.memory_available_bytes,
    }[kind]
    if not free.known:
        assert budget.now_bytes is None
    if budget.now_bytes is None:
        assert budget.terms == ()
        assert len(budget.notes) >= 2
        assert budget.origin.startswith("unknown: ")
    else:
        assert 0 <= budget.now_bytes <= free.value + held_bytes(facts, own, kind)
        assert all(term.size_bytes > 0 and term.origin and not term.adds for term in budget.terms[1:])
        assert budget.terms[0].adds
        assert sum(term.signed_bytes for term in budget.terms) == budget.now_bytes
        assert budget.ideal_bytes is not None
        assert budget.ideal_bytes >= budget.now_bytes
        if kind is not MemoryKind.DISCRETE and facts.host.cgroup_limit_bytes.known:
            assert budget.now_bytes <= facts.host.cgroup_limit_bytes.value
    assert budget.ideal_bytes is None or budget.ideal_bytes >= 0
    assert "\n" not in budget.origin
    assert all(note and "\n" not in note for note in budget.notes)


@settings(max_examples=300, deadline=None)
@given(devices, owns, st.integers(0, 200 * GIB))
def test_more_free_memory_is_never_a_smaller_budget(facts, own, more):
    def grown(part, *names):
        values = {name: getattr(part, name).map(lambda size: size + more) for name in names}
        return dataclasses.replace(part, **values)

    richer = dataclasses.replace(
        facts,
        gpu=facts.gpu and grown(facts.gpu, "memory_free_bytes"),
        host=grown(facts.host, "memory_available_bytes", "huge_pages_free_bytes"),
    )
    poor, rich = plan_budget(facts, own=own), plan_budget(richer, own=own)
    assert (poor.now_bytes is None) == (rich.now_bytes is None)
    assert poor.now_bytes is None or poor.now_bytes <= rich.now_bytes


@settings(max_examples=200, deadline=None)
@given(devices, owns, sizes, sizes)
def test_swap_is_never_counted(facts, own, total, used):
    host = dataclasses.replace(facts.host, swap_total_bytes=of(total), swap_used_bytes=of(used))
    assert plan_budget(dataclasses.replace(facts, host=host), own=own) == plan_budget(facts, own=own)


@settings(max_examples=200, deadline=None)
@given(devices, owns, st.integers(1, 2**40))
def test_the_owners_limit_always_wins(facts, own, limit):
    free, bound = plan_budget(facts, own=own), plan_budget(facts, own=own, override_bytes=limit)
    assert bound.now_bytes == bound.ideal_bytes == limit
    assert bound.measured_bytes == free.now_bytes
    assert sum(term.signed_bytes for term in bound.terms) == limit
    above = free.now_bytes is not None and limit > free.now_bytes
    assert any("is more than the" in note for note in bound.notes) is above
    assert "`memory`" in bound.origin


@settings(max_examples=200, deadline=None)
@given(totals, sizes, st.integers(0, 40 * GIB), st.sampled_from(["discrete", "cpu"]))
def test_what_the_process_takes_for_itself_changes_nothing(total, free, taken, kind):
    free = min(free, total)
    taken = min(taken, free)
    if kind == "cpu":
        before = plan_budget(laptop(total=total, available=free))
        after = plan_budget(laptop(total=total, available=free - taken), own=OwnMemory(rss_bytes=taken))
    else:
        context = int(0.40 * GIB)
        taken = max(0, min(taken, free - context))
        if taken == 0 or free < context:
            return
        before = plan_budget(rtx(total=total, free=free))
        own = OwnMemory(torch_reserved_bytes=taken, context_bytes=context)
        after = plan_budget(rtx(total=total, free=free - taken - context, own_bytes=of(taken + context)), own=own)
    assert after.now_bytes == before.now_bytes
