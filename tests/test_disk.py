"""Durable files: what a failing disk is called, and hashes."""

import errno
import hashlib
import os
import stat
from pathlib import Path

import pytest

from edgefed import disk
from edgefed.errors import DiskFull, StateLocked, StorageError


@pytest.mark.parametrize("number", sorted(disk.FULL))
def test_a_full_disk_raises_disk_full(number):
    with pytest.raises(DiskFull, match="cannot write a blob: ") as caught, disk.disk_errors("write a blob"):
        raise OSError(number, "No space left on device")
    assert caught.value.__cause__.errno == number


def test_other_errors_name_the_action_and_the_file(tmp_path):
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


@pytest.mark.skipif(os.name == "nt", reason="folders cannot be locked there")
def test_a_folder_that_cannot_be_locked_is_locked_by_its_file(tmp_path, monkeypatch, caplog):
    def flock(handle, operation):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EBADF, "Bad file descriptor")  # NFS
        real(handle, operation)

    import fcntl

    real = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", flock)
    with caplog.at_level("INFO"):
        lock = disk.FolderLock(tmp_path, "lock")
    assert f"{tmp_path} is locked by its file" in caplog.text
    with pytest.raises(StateLocked):
        disk.FolderLock(tmp_path, "lock")
    lock.release()
    disk.FolderLock(tmp_path, "lock").release()


def test_a_durable_write_is_atomic(tmp_path, monkeypatch):
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


@pytest.mark.parametrize("number", sorted(disk.CANNOT_SYNC))
def test_a_folder_without_sync_support_is_logged_once(tmp_path, monkeypatch, caplog, number):
    """Some FUSE, SMB and 9p mounts refuse to sync a folder; the files on them are synced as ever."""

    def refuse(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, f"refused with {number}")

    monkeypatch.setattr(os, "fsync", refuse)
    for content in (b"one", b"two"):
        disk.write_durably(tmp_path / "record", content)
    assert (tmp_path / "record").read_bytes() == b"two"
    assert [record.message for record in caplog.records if f"refused with {number}" in record.message] == [
        record.message for record in caplog.records if record.name == "edgefed.disk"
    ]
    assert len(caplog.records) == 1


def test_a_failed_sync_of_a_folder_is_an_error(tmp_path, monkeypatch):
    def broken(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(StorageError, match="Input/output error"):
        disk.write_durably(tmp_path / "record", b"one")


@pytest.mark.parametrize("size", [0, 1, disk.READ_BYTES, disk.READ_BYTES + 1])
def test_hash_file(tmp_path, size):
    data = bytes(range(256)) * (size // 256 + 1)
    (tmp_path / "file").write_bytes(data[:size])
    assert disk.hash_file(tmp_path / "file") == (hashlib.sha256(data[:size]).hexdigest(), size)
    with pytest.raises(StorageError, match="cannot read"):
        disk.hash_file(Path(tmp_path / "none"))


@pytest.mark.parametrize("in_kernel", [True, False])
def test_ranges_of_files_are_read_and_copied(tmp_path, monkeypatch, in_kernel):
    data = os.urandom(disk.READ_BYTES + 1000)
    (tmp_path / "a").write_bytes(data)
    if not in_kernel:
        monkeypatch.setattr(os, "copy_file_range", _refuse_to_copy, raising=False)
    parts = [(3, 10), (0, 0), (100, disk.READ_BYTES + 900), (0, 7)]
    ranges = [disk.FileRange(tmp_path / "a", start, size) for start, size in parts]
    expected = b"".join(data[start : start + size] for start, size in parts)
    assert b"".join(bytes(chunk) for chunk in disk.read_ranges(ranges)) == expected
    with (tmp_path / "b").open("wb", buffering=0) as file:
        for each in ranges:
            disk.copy_range(each, file)
    assert (tmp_path / "b").read_bytes() == expected


def _refuse_to_copy(*arguments):
    raise OSError(errno.EXDEV, "Invalid cross-device link")


def test_a_range_that_its_file_does_not_have(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    beyond = disk.FileRange(tmp_path / "a", 2, 4)
    with pytest.raises(StorageError, match="too short: 1 of 4 bytes at 2"):
        list(disk.read_ranges([beyond]))
    with (tmp_path / "b").open("wb", buffering=0) as file, pytest.raises(StorageError, match="too short: 1 of"):
        disk.copy_range(beyond, file)
    with pytest.raises(StorageError, match="No such file"):
        list(disk.read_ranges([disk.FileRange(tmp_path / "none", 0, 1)]))
