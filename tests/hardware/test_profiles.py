"""Device profiles: the shipped files, the strict reader, finding, matching, merging, standing in, writing."""

import contextlib
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgefed.errors import ConfigError, UnknownProfile
from edgefed.hardware.budget import plan_budget
from edgefed.hardware.facts import (
    DeviceFacts,
    DriverFacts,
    GpuFacts,
    HostFacts,
    MemoryKind,
    Reading,
    Reason,
    TegraFacts,
    TorchFacts,
)
from edgefed.hardware.policy import BudgetPolicy
from edgefed.hardware.profile_files import (
    BASES,
    FIGURES,
    DeviceProfile,
    Figure,
    MatchRule,
    PowerMode,
    parse_profile,
    plain_name,
    to_toml,
)
from edgefed.hardware.profiles import (
    check_distinct,
    effective,
    facts_of,
    find_profile,
    in_power_mode,
    load_profiles,
    match_profile,
    profile_of,
)

GIB, MIB = 2**30, 2**20
ROOT = Path(__file__).parents[2]
SHIPPED = load_profiles()

IDS = {
    "jetson-orin-nano-8gb", "jetson-orin-nx-16gb", "jetson-agx-orin-64gb", "jetson-agx-thor", "rtx-3060-12gb",
    "rtx-4060-laptop-8gb", "rtx-4070", "rtx-4090", "rtx-5090", "rtx-3090", "gtx-1660-ti", "t4", "a10g", "h200",
    "dgx-spark", "rpi-5", "rpi-5-16gb", "apple-m1", "apple-m2", "apple-m4", "apple-m4-pro", "apple-m4-max",
    "cpu-vm-2core",
}  # fmt: skip


def absent():
    return Reading.missing(Reason.ABSENT, "test")


def of(value):
    return Reading.of(value, "test")


def make_facts(kind, *, gpu=None, total=None, cpu=None, board=None, tegra=None, cpus=None, system="linux", free=None):
    """A device as sensors see it: ``total`` is the GPU's memory when it is discrete, the host's otherwise."""
    discrete = kind is MemoryKind.DISCRETE
    host = {field.name: absent() for field in dataclasses.fields(HostFacts)}
    host |= {"system": system, "machine": "x86_64", "is_wsl": False}
    host |= {name: of(value) for name, value in (("cpu_name", cpu), ("board", board), ("cpu_count", cpus)) if value}
    if total and not discrete:
        host["memory_total_bytes"] = of(total)
    if free is not None and not discrete:
        host["memory_available_bytes"] = of(free)
    chip = None
    if gpu is not None:
        fields = {field.name: absent() for field in dataclasses.fields(GpuFacts)}
        fields |= {"nvml_index": 0, "cuda_index": 0, "is_mig": False, "name": of(gpu)}
        if discrete and total:
            fields["memory_total_bytes"] = of(total)
        if discrete and free is not None:
            fields["memory_free_bytes"] = of(free)
        chip = GpuFacts(**fields)
    jetson = None
    if tegra:
        jetson = TegraFacts(**{**{f.name: absent() for f in dataclasses.fields(TegraFacts)}, "model": of(tegra)})
    return DeviceFacts(
        kind, (), chip, (chip,) if chip else (), HostFacts(**host), jetson,
        DriverFacts(True, absent(), absent(), absent()), TorchFacts(absent(), absent(), absent()), (),
    )  # fmt: skip


# the shipped files ---------------------------------------------------------------------------------------------------


def test_the_table_of_devices_is_complete():
    assert set(SHIPPED) == IDS
    assert list(SHIPPED) == sorted(SHIPPED)
    load_profiles().clear()
    assert set(load_profiles()) == IDS, "a caller cannot spoil what others load"


@pytest.mark.parametrize("profile", SHIPPED.values(), ids=SHIPPED)
def test_every_shipped_profile_is_whole(profile):
    figures = profile.figures
    assert {"memory_total", "memory_visible", "memory_idle", "bandwidth", "bf16", "power_limit"} - set(figures) <= (
        {"power_limit"} if profile.id == "cpu-vm-2core" else set()
    )
    for figure in [*figures.values(), *(each for mode in profile.power_modes for each in mode.figures.values())]:
        assert figure.basis in BASES
        assert len(figure.source) > 3
        assert "from memory" not in figure.note or figure.basis == "derived", (
            "an unchecked figure is not from a data sheet"
        )
    visible, total = profile.value("memory_visible"), profile.value("memory_total")
    assert visible <= total * 1.001
    assert visible > 0.85 * total * 10**9 / GIB
    assert profile.value("memory_idle") < visible / 4
    assert profile.typical_disk
    assert profile.typical_network
    if profile.kind is not MemoryKind.CPU:
        capability = tuple(int(part) for part in profile.value("capability").split("."))
        shared = {(7, 5): 64, (8, 7): 163, (8, 6): 99, (8, 9): 99, (12, 0): 99, (12, 1): 99, (9, 0): 227, (11, 0): 227}
        assert profile.value("shared_memory") == shared[capability]
        assert profile.value("bf16") is (capability >= (8, 0))
        assert ("bf16_tflops" in figures) is profile.value("bf16")
        assert profile.value("fp16_tflops") > 0
    else:
        assert "capability" not in figures
        assert "bf16_tflops" not in figures
        assert "metal_fp16_tflops" in figures or "fp32_tflops" in figures


def test_the_figures_are_those_of_the_table():
    table = {  # GB/s, 16-bit TFLOPS
        "jetson-orin-nano-8gb": (102, 16.7), "jetson-orin-nx-16gb": (102, 15.0), "jetson-agx-orin-64gb": (204.8, 42.6),
        "jetson-agx-thor": (273, 258), "rtx-3060-12gb": (360, 25.5), "rtx-4060-laptop-8gb": (256, 23.2),
        "rtx-4070": (504, 58.3), "rtx-4090": (1008, 165.2), "rtx-5090": (1792, 209.5), "rtx-3090": (936, 71.2),
        "gtx-1660-ti": (288, 10.9), "t4": (320, 65.1), "a10g": (600, 70), "h200": (4800, 989), "dgx-spark": (273, 125),
    }  # fmt: skip
    found = {id: (SHIPPED[id].value("bandwidth"), SHIPPED[id].value("fp16_tflops")) for id in table}
    assert found == table


@pytest.mark.parametrize("profile", SHIPPED.values(), ids=SHIPPED)
def test_a_stand_in_is_recognised_and_can_be_planned_on(profile):
    facts = facts_of(profile)
    assert match_profile(facts) == profile
    assert facts.kind is profile.kind
    assert facts.trains_on_gpu is (profile.kind is not MemoryKind.CPU)
    budget = plan_budget(facts)
    assert 0 < budget.now_bytes < profile.value("memory_visible") * GIB
    assert budget.now_bytes <= budget.ideal_bytes <= 1.15 * budget.now_bytes
    assert budget.terms[0].origin == f"profile {profile.id}"


@pytest.mark.parametrize(
    ("id", "usable_gib"),
    [
        ("jetson-orin-nano-8gb", 3.5), ("jetson-orin-nx-16gb", 10.2), ("jetson-agx-orin-64gb", 48.6),
        ("jetson-agx-thor", 99.7), ("gtx-1660-ti", 4.1), ("rtx-4060-laptop-8gb", 6.1), ("rtx-3060-12gb", 9.9),
        ("rtx-4090", 21.4), ("rtx-5090", 28.7), ("dgx-spark", 98.8), ("h200", 129.2),
        ("t4", 13.3),  # a T4 that shows 15.0 GiB; one without ECC, 15.6 GiB, would have 13.8
    ],
)  # fmt: skip
def test_budgets_of_idle_devices(id, usable_gib):
    """Independent estimates of the same policy; they let discrete cards use the last 5 %, which we leave."""
    budget = plan_budget(facts_of(SHIPPED[id]), policy=BudgetPolicy(expandable_segments=True))
    assert budget.now_bytes / GIB == pytest.approx(usable_gib, rel=0.05)


def test_a_wheel_has_them(tmp_path):
    """Built as pip does, from a copy, without the native part; only the list of files is looked at."""
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.partition(".")[0]) < 77:
        pytest.skip(f"setuptools {setuptools.__version__} is too old to build edgefed without isolation")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("edgefed", "profiles", "triton_kernels", "csrc"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path), "."]
    built = subprocess.run(
        build, cwd=source, capture_output=True, text=True, timeout=200, env={**os.environ, "EDGEFED_NATIVE": "0"}
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert {f"edgefed/profiles/{id}.toml" for id in IDS} <= inside
    assert "edgefed/profiles/__init__.py" in inside


# the reader ----------------------------------------------------------------------------------------------------------

VALID = """
schema = "edgefed.profile/1"
id = "my-card"
name = "My Card"
kind = "discrete"
[match]
gpu = ["my card"]
[figures]
memory_visible = { value = 12, unit = "GiB", basis = "measured", source = "nvidia-smi" }
memory_idle = { value = 0.4, unit = "GiB", basis = "derived", source = "desktop" }
bandwidth = { value = 300, unit = "GB/s", basis = "datasheet", source = "maker", low = 280, high = 310 }
"""


def test_a_small_profile_is_enough():
    profile = parse_profile(VALID, "mine.toml")
    assert profile.value("bandwidth") == 300
    assert profile.value("bf16_tflops") is None
    assert profile.figures["bandwidth"].high == 310
    with pytest.raises(KeyError):
        profile.value("bandwith")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('schema = "edgefed.profile/1"', 'schema = "edgefed.profile/9"', "schema is 'edgefed.profile/9'"),
        ('id = "my-card"', 'id = "My Card"', "id has 'My Card'"),
        ('id = "my-card"', "id = 3", "id is 3"),
        ('name = "My Card"', "", "name is None"),
        ('kind = "discrete"', 'kind = "quantum"', "kind is 'quantum'"),
        ("[match]", "[mach]", "mach is not a key"),
        ('["my card"]', '["NVIDIA My Card"]', "expected the plain name 'my card'"),
        ('["my card"]', '["my card", "my card"]', "has the same name twice"),
        ('["my card"]', '"my card"', "expected a list"),
        ("[match]", "[match]\nfallback_cpus = -1", "match.fallback_cpus is -1"),
        ("[match]", "[match]\nany_memory = 1", "match.any_memory is 1"),
        ("[match]", "[typical]\ndisk = 5\n[match]", "typical.disk is 5"),
        ("memory_idle", "memory_idel", "figures.memory_idel is not a key"),
        ("memory_idle", "memory_idel", "figures.memory_idle is missing"),
        ('unit = "GB/s"', 'unit = "MB/s"', "figures.bandwidth.unit is 'MB/s', expected 'GB/s'"),
        ("value = 300", "value = -3", "figures.bandwidth.value is -3"),
        ("value = 300", "value = 3e9", "expected a number of GB/s from 0.5 to 50000"),
        ("value = 300", "value = nan", "figures.bandwidth.value is nan"),
        ("value = 300", "value = true", "figures.bandwidth.value is True"),
        ("value = 300", "value = '300'", "figures.bandwidth.value is '300'"),
        ("value = 300", "value = 200", "between its low and high"),
        ("high = 310", "heigh = 310", "figures.bandwidth.heigh is not a key"),
        ('basis = "datasheet"', 'basis = "rumour"', "figures.bandwidth.basis is 'rumour'"),
        (', source = "maker"', "", "figures.bandwidth.source is None"),
        ('source = "maker"', 'source = " "', "figures.bandwidth.source is ' '"),
        ("bandwidth = {", "bandwidth = 5 #", "figures.bandwidth is 5"),
        ("bandwidth = {", "bandwidth = 5\nbandwidth = {", "is not valid TOML"),
        ("[figures]", "[[power_modes]]\nname='15W'\ndisk_read = 3\n[figures]", "power_modes[0].disk_read is not a key"),
        ("[figures]", "[[power_modes]]\n[figures]", "power_modes[0].name is None"),
        ("[figures]", "[[power_modes]]\nname='a'\n[[power_modes]]\nname='a'\n[figures]", "another mode has already"),
        ("[figures]", "[power_modes]\n[figures]", "power_modes must be tables"),
        ("[figures]", "[figures]\ncapability = { value = 8.9, basis = 'measured', source = 'torch' }", "such as"),
        (
            "[figures]",
            "[figures]\nbf16 = { value = 1, basis = 'measured', source = 'torch' }",
            "expected true or false",
        ),
    ],
)
def test_errors_name_file_and_key(old, new, said):
    assert old in VALID
    with pytest.raises(ConfigError) as caught:
        parse_profile(VALID.replace(old, new, 1), "mine.toml")
    assert said in str(caught.value)
    assert str(caught.value).startswith("mine.toml")


def test_all_problems_of_a_file_are_named_at_once():
    broken = VALID.replace("discrete", "other").replace("GB/s", "furlongs").replace("my-card", "MINE")
    with pytest.raises(ConfigError) as caught:
        parse_profile(broken, "mine.toml")
    assert str(caught.value).count(";") == 2


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60), st.integers(0, 20), st.text(alphabet='{}[]=",. \nabc019-', max_size=12))
def test_garbage_is_refused_by_name_and_never_crashes(text, line, inserted):
    lines = VALID.splitlines()
    lines.insert(line % len(lines), inserted)
    for candidate in (text, "\n".join(lines)):
        with contextlib.suppress(ConfigError):
            parse_profile(candidate, "mine.toml")
            continue
        with pytest.raises(ConfigError, match=r"^mine\.toml"):
            parse_profile(candidate, "mine.toml")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(id="rtx-3060-12gb"), "both called 'rtx-3060-12gb'"),
        (dict(aliases=("cpu-vm",)), "both called 'cpu-vm'"),
        (dict(match=MatchRule(gpu=("rtx 3060",))), "both have match.gpu 'rtx 3060'"),
        (dict(match=MatchRule(cpu=("apple m4",))), "both have match.cpu 'apple m4'"),
    ],
)
def test_profiles_that_collide_are_refused(change, said):
    mine = parse_profile(VALID, "mine.toml")
    check_distinct([*SHIPPED.values(), mine])
    with pytest.raises(ConfigError, match=re.escape(said)):
        check_distinct([*SHIPPED.values(), dataclasses.replace(mine, **change)])


# finding -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "id"),
    [
        ("jetson-orin-nano-8gb", "jetson-orin-nano-8gb"), ("jetson-orin-nano-8gb-super", "jetson-orin-nano-8gb"),
        ("cpu-vm", "cpu-vm-2core"), ("rpi-5-8gb", "rpi-5"), ("RTX-4090", "rtx-4090"), ("rtx 4090", "rtx-4090"),
    ],
)  # fmt: skip
def test_profiles_are_found_by_id_and_alias(name, id):
    assert find_profile(name).id == id


@pytest.mark.parametrize(
    ("name", "close"),
    [("rtx-3060", "rtx-3060-12gb"), ("jetson-orin-nano", "jetson-orin-nano-8gb"), ("rtx-4080", "rtx-4070"),
     ("h100", "h200"), ("", "a10g, apple-m1"), ("quantum", "available: a10g, apple-m1")],
)  # fmt: skip
def test_an_unknown_profile_names_close_ones(name, close):
    with pytest.raises(UnknownProfile) as caught:
        find_profile(name)
    assert close in str(caught.value)
    assert repr(name) in str(caught.value)


def test_a_file_of_the_owner_is_a_profile(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text(VALID)
    assert find_profile(str(path)).id == "my-card"
    path.write_text(VALID.replace("GiB", "MiB"))
    with pytest.raises(ConfigError, match="my.toml is not a valid device profile: .*memory_visible.unit"):
        find_profile(str(path))
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not valid TOML"):
        find_profile(str(path))
    for name in (str(tmp_path / "other.toml"), str(tmp_path) + "/", "./no\0.toml"):
        with pytest.raises(UnknownProfile, match="cannot read"):
            find_profile(name)


# matching ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("NVIDIA GeForce GTX 1660 Ti with Max-Q Design", "gtx 1660 ti"),
        ("GeForce RTX 2070 with Max-Q", "rtx 2070"),
        ("NVIDIA GeForce RTX 4060 Laptop GPU", "rtx 4060 laptop gpu"),
        ("Orin (nvgpu)", "orin"), ("NVIDIA_DGX_Spark", "dgx spark"), ("  Apple   M4 Pro ", "apple m4 pro"),
        ("NVIDIA A100-SXM4-40GB", "a100-sxm4-40gb"), ("", ""),
    ],
)  # fmt: skip
def test_plain_names(name, plain):
    assert plain_name(name) == plain
    assert plain_name(plain) == plain


@pytest.mark.parametrize(
    ("gpu", "mib", "id"),
    [
        ("NVIDIA GeForce RTX 3060", 12288, "rtx-3060-12gb"),
        ("NVIDIA GeForce RTX 3060", 8192, None),
        ("NVIDIA GeForce RTX 3060 Ti", 8192, None),
        ("NVIDIA GeForce RTX 3060 Laptop GPU", 6144, None),
        ("NVIDIA GeForce RTX 4060 Laptop GPU", 8188, "rtx-4060-laptop-8gb"),
        ("NVIDIA GeForce RTX 4060", 8188, None),
        ("NVIDIA GeForce RTX 4090", 24564, "rtx-4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16376, None),
        ("GeForce GTX 1660 Ti with Max-Q Design", 5944, "gtx-1660-ti"),
        ("Tesla T4", 15109, "t4"), ("NVIDIA T4", 15360, "t4"), ("NVIDIA A10G", 22731, "a10g"),
        ("NVIDIA A10", 23028, None),
        ("NVIDIA H200", 143771, "h200"), ("NVIDIA H200 NVL", 143771, None), ("NVIDIA H200 MIG 1g.18gb", 16384, None),
        ("NVIDIA H200", 16384, None), ("NVIDIA GeForce RTX 4090", None, None),
    ],
)  # fmt: skip
def test_cards_match_by_name_and_memory(gpu, mib, id):
    found = match_profile(make_facts(MemoryKind.DISCRETE, gpu=gpu, total=mib and mib * MIB))
    assert (found.id if found else None) == id


@pytest.mark.parametrize(
    ("facts", "id"),
    [
        (dict(tegra="NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", total=7802076 * 1024,
              gpu="Orin (nvgpu)"), "jetson-orin-nano-8gb"),
        (dict(board="NVIDIA Jetson Orin Nano Developer Kit", total=7619 * MIB), "jetson-orin-nano-8gb"),
        (dict(tegra="NVIDIA Jetson Orin Nano Developer Kit", total=int(3.6 * GIB)), None),
        (dict(tegra="NVIDIA Orin NX Developer Kit", total=15388 * MIB), "jetson-orin-nx-16gb"),
        (dict(tegra="NVIDIA Jetson Orin NX Engineering Reference Developer Kit", total=7619 * MIB), None),
        (dict(tegra="NVIDIA Jetson AGX Orin Developer Kit", total=int(61.3 * GIB)), "jetson-agx-orin-64gb"),
        (dict(tegra="NVIDIA Jetson AGX Orin Developer Kit", total=int(30 * GIB)), None),
        (dict(tegra="NVIDIA Jetson AGX Thor Developer Kit", gpu="NVIDIA Thor", total=int(122.8 * GIB)),
         "jetson-agx-thor"),
        (dict(gpu="NVIDIA Thor", total=int(122.8 * GIB)), "jetson-agx-thor"),
        (dict(gpu="NVIDIA GB10", total=int(121.7 * GIB)), "dgx-spark"),
        (dict(gpu="Orin (nvgpu)", total=7619 * MIB), None),  # 8 GB Nano or 8 GB NX: the chip alone does not say
        (dict(gpu="NVIDIA GH200 480GB", total=480 * GIB), None),
    ],
)  # fmt: skip
def test_boards_match_by_model_and_memory(facts, id):
    found = match_profile(make_facts(MemoryKind.UNIFIED, **facts))
    assert (found.id if found else None) == id


@pytest.mark.parametrize(
    ("facts", "id"),
    [
        (dict(board="Raspberry Pi 5 Model B Rev 1.0", cpu="Cortex-A76", total=int(7.87 * GIB), cpus=4), "rpi-5"),
        (dict(cpu="Raspberry Pi 5 Model B Rev 1.1", total=int(15.8 * GIB), cpus=4), "rpi-5-16gb"),
        (dict(board="Raspberry Pi 4 Model B Rev 1.5", total=int(7.8 * GIB), cpus=8), None),
        (dict(cpu="Apple M4", total=16 * GIB, cpus=10, system="darwin"), "apple-m4"),
        (dict(cpu="Apple M4 Pro", total=24 * GIB, cpus=12, system="darwin"), "apple-m4-pro"),
        (dict(cpu="Apple M3", total=24 * GIB, cpus=4, system="darwin"), None),
        (dict(cpu="Intel(R) Xeon(R) Processor", total=24 * GIB, cpus=2), "cpu-vm-2core"),
        (dict(cpu="AMD EPYC 9654", total=512 * GIB, cpus=96), None),
        (dict(cpu="AMD EPYC 9654", total=512 * GIB), None),
    ],
)  # fmt: skip
def test_hosts_match_by_board_or_processor(facts, id):
    found = match_profile(make_facts(MemoryKind.CPU, **facts))
    assert (found.id if found else None) == id


def test_a_kind_matches_only_its_own_profiles():
    assert match_profile(make_facts(MemoryKind.UNIFIED, gpu="NVIDIA GeForce RTX 4090", total=24564 * MIB)) is None
    idle_jetson = make_facts(MemoryKind.CPU, board="NVIDIA Jetson Orin Nano Developer Kit", total=7619 * MIB, cpus=6)
    assert match_profile(idle_jetson) is None


# power modes and merging ---------------------------------------------------------------------------------------------


def test_power_modes_change_what_they_change():
    nano = SHIPPED["jetson-orin-nano-8gb"]
    assert [mode.name for mode in nano.power_modes] == ["7W", "15W", "25W", "MAXN_SUPER"]
    slow = in_power_mode(nano, "15W")
    assert (slow.value("bandwidth"), slow.value("bf16_tflops"), slow.value("gpu_clock")) == (68, 10.2, 625)
    assert slow == in_power_mode(nano, "MODE_15W")
    assert slow.value("memory_visible") == nano.value("memory_visible")
    fast = in_power_mode(nano, "MAXN SUPER")
    assert fast.value("bandwidth") == 102
    assert not fast.figures["bf16_tflops"].note.endswith("is not known")
    odd = in_power_mode(nano, "CUSTOM")
    assert odd.value("bandwidth") == 102
    assert "what CUSTOM gives is not known" in odd.figures["bandwidth"].note
    assert in_power_mode(SHIPPED["rtx-4090"], "15W") == SHIPPED["rtx-4090"]


def test_measured_figures_override_the_profile():
    measured = Figure(91.0, "GB/s", "measured", "edgefed bench")
    nano = SHIPPED["jetson-orin-nano-8gb"]
    mine = effective(nano, {"bandwidth": measured}, power_mode="15W")
    assert mine.figures["bandwidth"] == measured
    assert mine.value("bf16_tflops") == 10.2
    assert nano.value("bandwidth") == 102


# writing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", SHIPPED.values(), ids=SHIPPED)
def test_a_written_file_reads_back_the_same(profile):
    assert parse_profile(to_toml(profile), "round.toml") == profile


words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(str.strip)


@settings(max_examples=150, deadline=None)
@given(
    words, words, st.floats(0.1, 8000), st.floats(0.5, 50_000), st.booleans(),
    st.lists(words, max_size=3), st.sampled_from(BASES),
)  # fmt: skip
def test_any_profile_survives_the_file(name, source, memory, bandwidth, truth, notes, basis):
    profile = DeviceProfile(
        id="x-1.5", name=name, kind=MemoryKind.UNIFIED, notes=tuple(notes), display=truth, machine="aarch64",
        match=MatchRule(board=(plain_name("Some Board"),), any_memory=truth, fallback_cpus=int(truth)),
        power_modes=(PowerMode(name, {"bandwidth": Figure(bandwidth, "GB/s", basis, source, note=source)}),),
        figures={
            "memory_visible": Figure(memory, "GiB", basis, source, low=0.1, high=8192.0),
            "memory_idle": Figure(0.0, "GiB", basis, source),
            "bf16": Figure(truth, "", basis, source),
            "capability": Figure("12.1", "", basis, source),
        },
    )  # fmt: skip
    assert parse_profile(to_toml(profile), "round.toml") == profile


def test_a_profile_of_a_measured_device():
    facts = make_facts(MemoryKind.DISCRETE, gpu="NVIDIA GeForce RTX 3060", total=12288 * MIB, free=11 * GIB)
    measured = {"bandwidth": Figure(318.0, "GB/s", "measured", "edgefed bench", low=310.0, high=320.0)}
    profile = profile_of("my-desk", facts, measured)
    assert parse_profile(to_toml(profile), "my-desk.toml") == profile
    assert profile.figures["bandwidth"].value == 318
    assert profile.figures["fp16_tflops"].basis == "derived"
    assert profile.value("memory_visible") == 12
    assert profile.value("memory_idle") == 1
    assert (
        plan_budget(facts_of(profile)).now_bytes
        == plan_budget(
            dataclasses.replace(facts, gpu=dataclasses.replace(facts.gpu, display_active=of(False)))
        ).now_bytes
    )
    assert profile.match == MatchRule(gpu=("rtx 3060",))


def test_a_profile_of_a_device_that_nobody_knows():
    facts = make_facts(MemoryKind.CPU, cpu="Loongson 3A6000", total=16 * GIB, free=14 * GIB, cpus=4)
    profile = profile_of("loong", facts, {})
    assert set(profile.figures) == {"memory_visible", "memory_idle", "cpu_count"}, "a stand-in's figures are not its"
    assert profile.match.cpu == ("loongson 3a6000",)
    assert profile.name == "Loongson 3A6000"
    assert match_profile(facts_of(profile)).id == "cpu-vm-2core"
    board = make_facts(MemoryKind.UNIFIED, tegra="NVIDIA Jetson Orin Nano Developer Kit", total=7619 * MIB)
    assert profile_of("nano", board, {}).power_modes == SHIPPED["jetson-orin-nano-8gb"].power_modes


@pytest.mark.parametrize("name", ["My Laptop", "", "-x", "a/b", "ü", "x" * 64])
def test_a_profile_needs_an_id(name):
    facts = make_facts(MemoryKind.CPU, cpu="c", total=GIB, free=GIB)
    with pytest.raises(ConfigError, match="is not a profile id"):
        profile_of(name, facts, {})


def test_a_profile_needs_memory():
    with pytest.raises(ConfigError, match="memory of this device is unknown"):
        profile_of("x", make_facts(MemoryKind.CPU, cpu="c"), {})


def test_every_figure_has_a_rule():
    for key, kind in FIGURES.items():
        assert kind in (str, bool) or (isinstance(kind, tuple) and kind[0] and kind[1] < kind[2]), key
