"""Durable files: what a failing disk is called, and hashes."""

import errno
import hashlib
from pathlib import Path

import pytest

from edgefed import disk
from edgefed.errors import DiskFull, StorageError


@pytest.mark.parametrize("number", sorted(disk._FULL))
def test_a_full_disk_has_its_own_error(number):
    with pytest.raises(DiskFull, match="cannot write a blob: ") as caught, disk.disk_errors("write a blob"):
        raise OSError(number, "No space left on device")
    assert caught.value.__cause__.errno == number


def test_other_errors_name_what_was_tried_and_the_file(tmp_path):
    missing = tmp_path / "none"
    with pytest.raises(StorageError) as caught, disk.disk_errors(missing):
        missing.open()
    assert str(caught.value) == f"cannot use {missing}: No such file or directory"
    with pytest.raises(StorageError) as caught, disk.disk_errors("tidy the uploads"):
        missing.open()
    assert str(caught.value) == f"cannot tidy the uploads: No such file or directory: {str(missing)!r}"
    with pytest.raises(StorageError, match="cannot read a: broken$"), disk.disk_errors("read a"):
        raise OSError("broken")
    with pytest.raises(ZeroDivisionError), disk.disk_errors("divide"):
        _ = 1 / 0


def test_a_durable_write_replaces_the_whole_file_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "record"
    disk.write_durably(path, b"old")
    assert path.stat().st_mode & 0o777 == 0o600

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk, "sync_file", full)
    with pytest.raises(DiskFull):
        disk.write_durably(path, b"new")
    assert path.read_bytes() == b"old"
    monkeypatch.undo()
    disk.write_durably(path, b"new")
    assert [file.name for file in tmp_path.iterdir()] == ["record"]
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("size", [0, 1, disk.READ_BYTES, disk.READ_BYTES + 1])
def test_hash_file(tmp_path, size):
    data = bytes(range(256)) * (size // 256 + 1)
    (tmp_path / "file").write_bytes(data[:size])
    assert disk.hash_file(tmp_path / "file") == (hashlib.sha256(data[:size]).hexdigest(), size)
    with pytest.raises(StorageError, match="cannot read"):
        disk.hash_file(Path(tmp_path / "none"))
