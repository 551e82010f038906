"""The host's files: what they say, and what is made of those that are absent, empty, forbidden or garbage."""

import os

import pytest
from edgefed_fake_machine import MEMINFO, PC, write_root
from hypothesis import given
from hypothesis import strategies as st

from edgefed.hardware import host_files
from edgefed.hardware.facts import Reading, Reason
from edgefed.hardware.host_files import Files, read_host

KIB = 1024


def host_of(tmp_path, files):
    return read_host(Files(write_root(tmp_path, files)))


def test_a_desktop(plain_machine):
    plain_machine.files(
        {
            "/proc/buddyinfo": "Node 0, zone      DMA      1     0   2\nNode 0, zone   Normal   9437   7106      0\n",
            "/proc/sys/kernel/osrelease": "6.8.0-45-generic\n",
        }
    )
    host = read_host(Files(plain_machine.root))
    assert host.memory_total_bytes.value == 32768000 * KIB
    assert host.memory_available_bytes.value == 24576000 * KIB
    assert host.swap_total_bytes.value == 2048000 * KIB
    assert host.swap_used_bytes.value == 100000 * KIB
    assert (host.huge_pages_total.value, host.huge_pages_free_bytes.value) == (4, 3 * 2048 * KIB)
    assert host.swapped_out_pages.value == 40
    assert host.largest_free_block_bytes.value == 4 * os.sysconf("SC_PAGE_SIZE")
    assert (host.cpu_count.value, host.load_average.value) == (2, 0.52)
    assert host.cpu_name.value == "AMD Ryzen 7 5800X 8-Core Processor"
    assert host.kernel.value == "6.8.0-45-generic"
    assert not host.is_wsl
    assert host.container.reason is host.battery.reason is Reason.ABSENT
    assert host.zram_used_bytes.reason is host.cgroup_limit_bytes.reason is host.cpu_quota.reason is Reason.ABSENT
    assert host.own_rss_bytes.value > 2**20


def test_an_old_kernel_gives_an_estimate_that_says_so(tmp_path):
    meminfo = MEMINFO.replace("MemAvailable", "MemSomething")
    available = host_of(tmp_path, {"/proc/meminfo": meminfo}).memory_available_bytes
    assert available.value == (8192000 + 15360000 - 512000) * KIB
    assert "estimate" in available.source


@pytest.mark.parametrize(
    ("meminfo", "total", "available"),
    [
        ("", Reason.FAILED, Reason.FAILED),
        (b"\x00\xff\xfe\x80garbage\n\x01", Reason.FAILED, Reason.FAILED),
        ("MemTotal: -5 kB\nMemAvailable: -1 kB\n", Reason.FAILED, Reason.FAILED),
        ("MemTotal: many kB\nMemAvailable: 10 kB\n", Reason.FAILED, None),
        ("MemTotal: 0 kB\nMemAvailable: 0 kB\n", Reason.IMPLAUSIBLE, None),
        ("MemTotal: 100 kB\nMemAvailable: 200 kB\n", None, Reason.IMPLAUSIBLE),
        ("MemTotal: 99999999999999999999999999 kB\n", Reason.FAILED, Reason.FAILED),
        ("MemTotal: 9999999999999999999 kB\n", Reason.FAILED, Reason.FAILED),
        ("MemTotal:\nMemAvailable:\n", Reason.FAILED, Reason.FAILED),
        ("MemTotal: 100 kB\nMemFree: 10 kB\n", None, Reason.FAILED),  # without Cached: nothing to estimate from
    ],
)
def test_a_meminfo_that_makes_no_sense(tmp_path, meminfo, total, available):
    host = host_of(tmp_path, {"/proc/meminfo": meminfo})
    assert (host.memory_total_bytes.reason, host.memory_available_bytes.reason) == (total, available)


@pytest.mark.parametrize("content", [b"", b"\xff\x00\x80" * 50, b"nonsense\n", b"-1\n", b"9" * 5000, b"\n\n\n"])
def test_garbage_in_any_file_gives_a_reason_and_no_error(tmp_path, content):
    paths = [*PC, "/proc/swaps", "/proc/buddyinfo", "/proc/self/cgroup", "/proc/1/cgroup", "/sys/fs/cgroup/memory.max",
             "/sys/fs/cgroup/cpu.max", "/sys/class/power_supply/BAT0/type", "/sys/class/power_supply/BAT0/capacity",
             "/proc/sys/kernel/osrelease", "/sys/firmware/devicetree/base/model"]  # fmt: skip
    host = host_of(tmp_path, dict.fromkeys(paths, content))
    readings = [value for value in vars(host).values() if isinstance(value, Reading)]
    assert all(reading.known or reading.detail for reading in readings)
    assert not host.memory_total_bytes.known
    assert not host.cgroup_limit_bytes.known


def test_a_folder_or_a_pipe_in_the_place_of_a_file(tmp_path):
    (tmp_path / "proc" / "meminfo").mkdir(parents=True)
    os.mkfifo(tmp_path / "proc" / "vmstat")
    host = read_host(Files(tmp_path))
    assert host.memory_total_bytes.reason is host.swapped_out_pages.reason is Reason.FAILED
    assert "not a regular file" in host.memory_total_bytes.detail


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_is_forbidden(tmp_path):
    write_root(tmp_path, PC)
    (tmp_path / "proc/meminfo").chmod(0)
    assert read_host(Files(tmp_path)).memory_total_bytes.reason is Reason.NO_PERMISSION


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (PermissionError(13, "Permission denied"), Reason.NO_PERMISSION),
        (PermissionError(1, "Operation not permitted"), Reason.NO_PERMISSION),
        (OSError(19, "No such device"), Reason.ABSENT),
        (OSError(5, "Input/output error"), Reason.FAILED),
        (OSError(11, "Resource temporarily unavailable"), Reason.FAILED),
    ],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path, monkeypatch, error, reason):
    write_root(tmp_path, PC)

    def refuse(*_):
        raise error

    monkeypatch.setattr(host_files.os, "read", refuse)
    text = Files(tmp_path).text("/proc/meminfo")
    assert text.reason is reason
    assert text.detail == error.strerror
    assert text.source == "/proc/meminfo"


def test_a_path_that_no_file_can_have(tmp_path):
    files = Files(tmp_path)
    assert files.text("/proc/\0").reason is Reason.FAILED
    assert files.text("/" + "x" * 5000).reason is Reason.ABSENT
    assert not files.exists("/proc/\0")
    assert files.names("/proc/\0") == ()


def test_a_file_is_read_to_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(host_files, "READ_LIMIT", 10)
    write_root(tmp_path, {"/a": "0123456789abc"})
    assert Files(tmp_path).text("/a").value == "0123456789"


def test_compressed_swap_counts_the_memory_it_takes(tmp_path):
    swaps = "Filename\tType\tSize\tUsed\tPriority\n/dev/zram0 partition 650173 2048 5\n/dev/sda2 partition 9 9 -2\n"
    used = host_of(tmp_path, {"/proc/swaps": swaps}).zram_used_bytes
    assert used.value == 2048 * KIB
    assert "before compression" in used.source
    used = host_of(tmp_path, {"/sys/block/zram0/mm_stat": "2097152 524288 700416 0 700416 0 0 0 0\n"}).zram_used_bytes
    assert used.value == 700416
    assert host_of(tmp_path, {"/proc/swaps": "Filename\n/dev/sda2 partition 9 9 -2\n"}).zram_used_bytes.reason


@pytest.mark.parametrize(
    ("files", "percent", "plugged"),
    [
        ({"BAT0/type": "Battery", "BAT0/capacity": "83", "BAT0/status": "Discharging"}, 83, False),
        ({"BAT0/type": "Battery", "BAT0/capacity": "83", "AC/type": "Mains", "AC/online": "1"}, 83, True),
        ({"BAT0/type": "Battery", "BAT0/capacity": "83", "AC/type": "Mains", "AC/online": "0"}, 83, False),
        ({"BAT0/type": "Battery", "BAT0/capacity": "5", "BAT0/status": "Unknown"}, 5, None),
        ({"BAT0/type": "Battery", "BAT0/capacity": "40", "BAT1/type": "Battery", "BAT1/capacity": "60"}, 50, None),
    ],
)
def test_the_battery(tmp_path, files, percent, plugged):
    battery = host_of(
        tmp_path, {f"/sys/class/power_supply/{name}": f"{text}\n" for name, text in files.items()}
    ).battery
    assert (battery.value.percent, battery.value.plugged) == (percent, plugged)


@pytest.mark.parametrize("capacity", ["-3", "101", "full", ""])
def test_a_battery_without_readings_is_none(tmp_path, capacity):
    base = "/sys/class/power_supply/BAT0"
    assert not host_of(tmp_path, {f"{base}/type": "Battery\n", f"{base}/capacity": capacity}).battery.known


def test_the_battery_of_a_mouse_is_not_the_machines(tmp_path):
    base = "/sys/class/power_supply/hid-0"
    files = {f"{base}/type": "Battery\n", f"{base}/scope": "Device\n", f"{base}/capacity": "90\n"}
    assert host_of(tmp_path, files).battery.reason is Reason.ABSENT


@pytest.mark.parametrize(
    ("files", "name"),
    [
        ({"/.dockerenv": ""}, "docker"),
        ({"/run/.containerenv": 'engine="podman-4.9"\n'}, "podman"),
        ({"/run/systemd/container": "lxc\n"}, "lxc"),
        ({"/proc/1/cgroup": "3:memory:/docker/0123456789abcdef\n"}, "docker"),
        ({"/proc/1/cgroup": "0::/kubepods.slice/kubepods-burstable.slice/x\n", "/.dockerenv": ""}, "kubernetes"),
        ({"/proc/self/cgroup": "1:name=systemd:/lxc/box\n"}, "lxc"),
    ],
)
def test_the_container_that_we_are_in(plain_machine, files, name):
    plain_machine.files(files)
    assert read_host(Files(plain_machine.root)).container.value == name


@pytest.mark.parametrize(
    ("variable", "value", "name"),
    [("container", "podman", "podman"), ("KUBERNETES_SERVICE_HOST", "10.0.0.1", "kubernetes")],
)
def test_the_container_that_the_environment_names(plain_machine, monkeypatch, variable, value, name):
    monkeypatch.setenv(variable, value)
    assert read_host(Files(plain_machine.root)).container.value == name


def test_wsl_is_recognised_by_its_kernel_or_by_its_variable(plain_machine, monkeypatch):
    files = Files(plain_machine.root)
    assert not host_files.is_wsl(files)
    monkeypatch.setenv("WSL_DISTRO_NAME", "Ubuntu")
    assert host_files.is_wsl(files)
    monkeypatch.delenv("WSL_DISTRO_NAME")
    plain_machine.files({"/proc/sys/kernel/osrelease": "5.15.167.4-Microsoft-standard-WSL2\n"})
    assert host_files.is_wsl(files)


def test_a_raspberry_pi_is_known_by_its_board(tmp_path):
    host = host_of(
        tmp_path,
        {
            "/proc/cpuinfo": "processor\t: 0\nSerial\t\t: 1000000012345678\nModel\t\t: Raspberry Pi 5\n",
            "/sys/firmware/devicetree/base/model": "Raspberry Pi 5 Model B Rev 1.0\0",
        },
    )
    assert host.cpu_name.value == "Raspberry Pi 5"
    assert host.board.value == "Raspberry Pi 5 Model B Rev 1.0"


def test_this_machine_answers():
    from pathlib import Path

    host = read_host(Files(Path("/")))
    assert host.own_rss_bytes.value > 2**20
    assert host.cpu_count.value >= 1
    assert host.memory_total_bytes.value >= host.memory_available_bytes.value > 0


def test_another_system_is_asked_through_psutil(tmp_path, monkeypatch):
    files = Files(tmp_path)
    files.is_real = True  # a system without /proc
    monkeypatch.setitem(host_files._QUESTIONS, "system", ("platform.system", True, lambda: "darwin"))
    monkeypatch.setitem(host_files._QUESTIONS, "battery", ("psutil", False, lambda: {"percent": 71.0, "plugged": True}))
    host = read_host(files)
    assert host.system == "darwin"
    assert host.memory_total_bytes.source == "psutil.virtual_memory"
    assert host.memory_total_bytes.value >= host.memory_available_bytes.value > 0
    assert (host.battery.value.percent, host.battery.value.plugged) == (71.0, True)


@given(st.text(max_size=300))
def test_meminfo_never_gives_an_invalid_size(text):
    assert all(0 <= size < host_files.LARGEST for size in host_files.parse_meminfo(text).values())


@given(st.dictionaries(st.from_regex(r"[A-Z][a-z]{1,9}", fullmatch=True), st.integers(0, 2**49), max_size=8))
def test_meminfo_gives_back_what_was_written(fields):
    text = "".join(f"{name}:   {value} kB\n" for name, value in fields.items())
    assert host_files.parse_meminfo(text) == {name: value * KIB for name, value in fields.items()}


@given(st.text(max_size=300))
def test_buddyinfo_is_a_size_or_a_reason(text):
    block = host_files.largest_free_block(Reading.of(text, "x"), 4096)
    assert not block.known or 0 <= block.value <= 2**32


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=13))
def test_the_largest_block_is_the_last_column_that_is_not_empty(counts):
    line = "Node 0, zone   Normal " + " ".join(map(str, counts)) + "\n"
    largest = host_files.largest_free_block(Reading.of(line, "x"), 4096).value
    filled = [order for order, count in enumerate(counts) if count]
    assert largest == (4096 << filled[-1] if filled else 0)
