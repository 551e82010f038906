"""Sizes as people write them, and what this process uses."""

import pytest

from edgefed.errors import ConfigError
from edgefed.hardware import memory


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GiB", 2 << 30),
        ("2G", 2 << 30),
        ("2GB", 2 * 10**9),
        ("1.5 MiB", 3 << 19),
        ("2000000", 2 * 10**6),
        ("8kb", 8000),
    ],
)
def test_sizes_are_read(text, size):
    assert memory.parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "much", "-2GiB", "0", "2 XiB", "GiB", "nan", "2", "512"])
def test_an_invalid_size_is_refused(text):
    with pytest.raises(ConfigError, match="invalid memory size"):
        memory.parse_bytes(text)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (11_600_000, "11.1 MiB"), (3 << 40, "3072 GiB")]
)
def test_sizes_are_written(size, text):
    assert memory.format_bytes(size) == text


def test_peak_is_at_least_now():
    assert memory.process_peak_rss_bytes() >= memory.process_rss_bytes() * 0.9 > 1 << 20
