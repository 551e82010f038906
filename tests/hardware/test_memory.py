"""Sizes as people write them, and what this process uses."""

import os
import platform
import subprocess
import sys

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


# --- the allocator of the C library -----------------------------------------------------------------------------------

FRAGMENTED = """
import sys
import numpy as np
from edgefed.hardware.memory import process_rss_bytes, set_up_allocator, trim_memory
applies = {set_up}
np.ones(2**24, np.uint8)  # freed at once: glibc's threshold would grow to its size
before = process_rss_bytes()
blocks = [np.ones(2**22, np.uint8) for _ in range(40)]
del blocks[::2]
{then}
print(applies, process_rss_bytes() - before)
"""


def freed_and_resident(set_up, then="", **environment):
    """(what `set_up_allocator` said, resident bytes that are not in use) after half of the blocks are freed."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC", "GLIBC"))}
    command = [sys.executable, "-c", FRAGMENTED.format(set_up=set_up, then=then)]
    done = subprocess.run(command, env=inherited | environment, capture_output=True, text=True, check=True)
    applies, grown = done.stdout.split()
    return applies, int(grown) - 20 * 2**22


glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an allocator of glibc")


@glibc
def test_freed_blocks_between_others_are_returned_to_the_system():
    applies, kept = freed_and_resident("set_up_allocator()")
    assert applies == "True"
    assert kept < 4 * 2**20
    assert freed_and_resident("None")[1] > 64 * 2**20  # as the system has it


@glibc
@pytest.mark.parametrize(
    "environment", [{"MALLOC_ARENA_MAX": "4"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=33554432"}]
)
def test_an_allocator_that_the_owner_has_set_up_stays_as_it_is(environment):
    assert freed_and_resident("set_up_allocator()", **environment)[0] == "False"


@pytest.mark.parametrize("given", [{}, {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "7", "LRU_CACHE_CAPACITY": "9"}])
def test_compiled_products_are_bounded_unless_the_owner_has_bounded_them(given):
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    code = (
        "import os; from edgefed.hardware.memory import set_up_allocator; set_up_allocator()\n"
        f"print(*(os.environ[name] for name in {names}))"
    )
    inherited = {key: value for key, value in os.environ.items() if key not in names}
    done = subprocess.run(
        [sys.executable, "-c", code], env=inherited | given, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == list(given.values() or [memory.COMPILED_PRODUCTS] * 2)


@glibc
def test_memory_that_an_allocator_retains_is_returned_when_asked_for():
    assert freed_and_resident("None", then="trim_memory()")[1] < 4 * 2**20
