"""Sizes as people write them, and host budgets that never promise what is not there."""

import psutil
import pytest

from edgefed.errors import ConfigError
from edgefed.hardware import memory


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GiB", 2 << 30), ("2G", 2 << 30), ("2GB", 2 * 10**9), ("1.5 MiB", 3 << 19), ("512", 512), ("64kb", 64000)],
)
def test_sizes_are_read(text, size):
    assert memory.parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "much", "-2GiB", "0", "2 XiB", "GiB", "nan"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match="no memory size"):
        memory.parse_bytes(text)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (11_600_000, "11.1 MiB"), (3 << 40, "3072 GiB")]
)
def test_sizes_are_written(size, text):
    assert memory.format_bytes(size) == text


def test_budget_stays_below_what_is_available():
    budget = memory.budget_from_host()
    assert 0 <= budget.size_bytes < psutil.virtual_memory().available
    assert "for the system" in budget.origin


def test_a_container_limit_wins(tmp_path):
    folder = tmp_path / "sys/fs/cgroup"
    folder.mkdir(parents=True)
    (folder / "memory.max").write_text("1500000000\n")
    (folder / "memory.current").write_text("500000000\n")
    assert memory.cgroup_room_bytes(tmp_path) == 10**9
    assert memory.budget_from_host(tmp_path).size_bytes == 0  # 1 GB less the reserve of at least 1 GiB
    assert memory.budget_from_host(tmp_path).origin.startswith("container limit")


@pytest.mark.parametrize("limit", ["max", "9223372036854771712"])
def test_no_limit_is_no_limit(tmp_path, limit):
    folder = tmp_path / "sys/fs/cgroup"
    folder.mkdir(parents=True)
    (folder / "memory.max").write_text(limit)
    (folder / "memory.current").write_text("500000000\n")
    assert memory.cgroup_room_bytes(tmp_path) is None


def test_peak_is_at_least_now():
    assert memory.process_peak_rss_bytes() >= memory.process_rss_bytes() * 0.9 > 1 << 20
