"""A Jetson's files: Orin's and Thor's, whole, in part, and broken."""

import pytest
from edgefed_fake_machine import INA, ORIN, PC, THOR, write_root
from hypothesis import given
from hypothesis import strategies as st

from edgefed.hardware.facts import Reading, Reason
from edgefed.hardware.host_files import Files
from edgefed.hardware.tegra import read_tegra


def tegra_of(tmp_path, files):
    return read_tegra(Files(write_root(tmp_path, files)))


def test_an_orin(tmp_path):
    tegra = tegra_of(tmp_path, ORIN)
    assert (tegra.l4t.value, tegra.jetpack.value, tegra.soc.value) == ("36.4.4", "6.2.1", "tegra234")
    assert tegra.model.value == "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
    assert (tegra.gpu_clock_mhz.value, tegra.gpu_clock_max_mhz.value) == (306, 1020)
    assert (tegra.gpu_governor.value, tegra.gpu_load_percent.value) == ("nvhost_podgov", 37.5)
    assert tegra.temperatures_celsius.value == {"cpu-thermal": 48.625, "tj-thermal": 49.312}  # cv0 is switched off
    assert tegra.temperature_celsius.value == 49.312
    assert "tj-thermal" in tegra.temperature_celsius.source
    assert tegra.power_rails_watts.value == {"VDD_IN": 6.0, "VDD_CPU_GPU_CV": 1.5}  # no NC, no sum
    assert tegra.power_watts.value == 6.0
    assert "VDD_IN" in tegra.power_watts.source
    assert tegra.power_mode.value == "MAXN_SUPER"
    assert tegra.nvmap_used_bytes.value == 612344 * 1024
    assert tegra.memory_clock_mhz.reason is Reason.ABSENT


def test_a_thor(tmp_path):
    tegra = tegra_of(tmp_path, THOR)
    assert (tegra.l4t.value, tegra.jetpack.value, tegra.soc.value) == ("38.4.0", "7.1", "tegra264")
    assert tegra.gpu_clock_mhz.value == 1575
    assert tegra.memory_clock_mhz.value == 4266
    assert tegra.gpu_load_percent.reason is Reason.ABSENT
    assert tegra.nvmap_used_bytes.reason is Reason.FAILED
    assert tegra.power_watts.value == 38.25
    assert tegra.temperature_celsius.value == 41.5


def test_a_machine_that_is_not_a_jetson(tmp_path):
    assert tegra_of(tmp_path, PC) is None
    assert tegra_of(tmp_path, {"/proc/device-tree/compatible": "raspberrypi,5-model-b\0brcm,bcm2712\0"}) is None


def test_a_container_on_a_jetson_knows_its_kernel_at_least(tmp_path):
    tegra = tegra_of(tmp_path, {**PC, "/proc/version": ORIN["/proc/version"]})
    assert tegra is not None
    assert tegra.l4t.reason is tegra.soc.reason is tegra.power_watts.reason is Reason.ABSENT


@pytest.mark.parametrize(
    ("release", "revision", "l4t", "jetpack"),
    [
        ("36", "3.0", "36.3.0", "6.0"),
        ("36", "4.0", "36.4.0", "6.1"),
        ("36", "4.3", "36.4.3", "6.2"),
        ("36", "4.7", "36.4.7", "6.2.1"),
        ("36", "4.9", "36.4.9", ">= 6"),
        ("36", "5.0", "36.5.0", "6.2.2"),
        ("38", "2.1", "38.2.1", "7.0"),
        ("39", "2.1", "39.2.1", "7.2.1"),
        ("39", "9.9", "39.9.9", ">= 7"),
        ("35", "6.1", "35.6.1", "5.1.x"),
        ("32", "7.1", "32.7.1", ">= 4"),
    ],
)
def test_the_release_tells_the_jetpack(tmp_path, release, revision, l4t, jetpack):
    line = f"# R{release} (release), REVISION: {revision}, GCID: 1, BOARD: generic\n"
    tegra = tegra_of(tmp_path, {"/etc/nv_tegra_release": line})
    assert (tegra.l4t.value, tegra.jetpack.value) == (l4t, jetpack)


def test_a_release_of_the_future(tmp_path):
    tegra = tegra_of(tmp_path, {"/etc/nv_tegra_release": "# R47 (release), REVISION: 1.0, GCID: 1\n"})
    assert tegra.l4t.value == "47.1.0"
    assert tegra.jetpack.reason is Reason.FAILED


def test_without_a_rail_for_the_whole_module_the_rails_are_summed(tmp_path):
    files = {path: text for path, text in ORIN.items() if "in1_" not in path and "curr1_" not in path}
    files |= {f"{INA}/in3_label": "VDD_SOC\n"}
    tegra = tegra_of(tmp_path, files)
    assert tegra.power_watts.value == pytest.approx(1.5 + 0.5)
    assert "sum of" in tegra.power_watts.source


def test_without_tj_the_gpus_temperature_is_the_headline(tmp_path):
    zone = "/sys/class/thermal/thermal_zone"
    tegra = tegra_of(tmp_path, {**ORIN, f"{zone}2/type": "gpu-thermal\n", f"{zone}2/temp": "45000\n"})
    assert tegra.temperature_celsius.value == 45
    assert "gpu-thermal" in tegra.temperature_celsius.source


def test_zones_may_stand_below_virtual_devices_only(tmp_path):
    files = {path.replace("/sys/class/thermal", "/sys/devices/virtual/thermal"): text for path, text in ORIN.items()}
    assert tegra_of(tmp_path, files).temperature_celsius.value == 49.312


@pytest.mark.parametrize(
    ("files", "mode"),
    [
        ({"/etc/nvpmodel.conf": ""}, "mode 2"),
        ({"/var/lib/nvpmodel/status": "pmode:0000 fmode:quiet\n"}, "15W"),
        ({"/var/lib/nvpmodel/status": "pmode:0007\n"}, "mode 7"),
    ],
)
def test_the_power_mode(tmp_path, files, mode):
    assert tegra_of(tmp_path, {**ORIN, **files}).power_mode.value == mode


@pytest.mark.parametrize("content", [b"", b"\xff\x00\x80", b"-1", b"nonsense", b"9" * 60, b"0"])
def test_garbage_in_any_file_gives_a_reason_and_no_error(tmp_path, content):
    files = dict.fromkeys(ORIN, content)
    files["/proc/device-tree/compatible"] = "nvidia,tegra234\0"
    tegra = tegra_of(tmp_path, files)
    for name, reading in vars(tegra).items():
        assert isinstance(reading, Reading), name
        assert reading.known or (reading.detail and reading.reason), name
    for name in ("l4t", "jetpack", "gpu_clock_mhz", "gpu_clock_max_mhz", "temperature_celsius", "power_mode"):
        assert not getattr(tegra, name).known, name


@given(st.text(max_size=200))
def test_no_release_text_is_an_error(text):
    class Texts:
        def text(self, path):
            return Reading.of(text, path)

        def names(self, path):
            return ("17000000.gpu", "thermal_zone0", "1-0040", "hwmon1")

        def exists(self, path):
            return True

        def ask(self, name):
            return Reading.missing(Reason.ABSENT, name)

    tegra = read_tegra(Texts())
    assert tegra is None or isinstance(tegra.l4t, Reading)
