"""Object storage between the server and the devices: they read blobs from it and write updates to it by signed URLs.

    {prefix}/{run_id}/blobs/{sha256}                            a blob; its content never changes, so caches may keep it
    {prefix}/{run_id}/updates/{client}-{round}-{attempt}/00000  a piece of an update: `PIECE_BYTES`, the last one less

The state folder stays complete: every blob is in it, and an update is copied into it, hashed and checked before it is
acknowledged. So the bucket may be lost at any time: it is filled again, and devices send again what was in it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import datetime
import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from edgefed.aggregator.uploads import UploadFolder, UploadName
from edgefed.errors import ChecksumMismatch, ConfigError, ObjectStorageError, OffsetMismatch, first_line
from edgefed.protocol.messages import UploadState

logger = logging.getLogger(__name__)

PIECE_BYTES = 8 * 1024 * 1024
"""A connection that breaks costs a device at most one piece; a request to the bucket costs a few milliseconds."""
URLS_AT_ONCE = 16
"""URLs of pieces in one answer: a device asks the server once for 128 MiB."""
URL_S = 3600.0
"""How long a URL is valid. The bucket compares times when a transfer starts, so a slow one does not expire."""
RETRY_S = 5.0
"""Pause between two tries to fill the bucket while it does not answer."""
PUBLISH_THREADS = 8
CALL_S, CONNECT_S = 60, 10
MAX_CACHED_URLS = 200_000


class Bucket:
    """The part of a bucket that belongs to one run. Thread-safe.

    Methods raise ObjectStorageError if the bucket does not answer, does not exist, or refuses the credentials.
    """

    def __init__(self, url: str, run_id: str, *, url_s: float = URL_S):
        """Connect to ``url``, ``s3://bucket/prefix``, or one of ``gs://`` or ``az://``. Raises ConfigError.

        Credentials and endpoint come from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION,
        AWS_ENDPOINT_URL and others). ``url_s``: how long signed URLs are valid.
        """
        self.url, self._url_s = url, url_s
        self._obstore, self._store = _open_store(url)
        self._root = f"{run_id}/"
        self._lock = threading.Lock()
        self._urls: dict[str, tuple[float, str]] = {}

    # --- blobs --------------------------------------------------------------------------------------------------------

    def synchronize(self, blobs: Mapping[str, int], path_of: Callable[[str], Path]) -> None:
        """Upload those of ``blobs`` {sha256: size} that are missing or of another size, and delete others."""
        found = self._list("blobs/")
        self.delete_blobs(name for name in found if name not in blobs)
        self._put_all([sha256 for sha256, size_bytes in blobs.items() if found.get(sha256) != size_bytes], path_of)

    def publish(self, names: Collection[str], path_of: Callable[[str], Path], cancelled: threading.Event) -> None:
        """Upload blobs, and try again while the bucket does not answer, until ``cancelled``."""
        while not cancelled.is_set():
            try:
                self._put_all(names, path_of)
                return
            except ObjectStorageError as error:
                logger.error("%s; the round continues once it answers, trying again in %.0f s", error, RETRY_S)
            cancelled.wait(RETRY_S)

    def put_blob(self, sha256: str, path: Path) -> None:
        """Upload one blob, also if it is there."""
        with self._errors():
            self._obstore.put(self._store, f"{self._root}blobs/{sha256}", path)

    def blob_url(self, sha256: str) -> str:
        """A URL that reads a blob, valid for at least half of ``url_s``. The same for all devices for some time."""
        now = time.monotonic()
        with self._lock:
            made_at, url = self._urls.get(sha256, (-self._url_s, ""))
        if now - made_at >= self._url_s / 2:
            url = self._sign("GET", [f"blobs/{sha256}"])[0]
            with self._lock:
                if len(self._urls) >= MAX_CACHED_URLS:
                    self._urls.clear()
                self._urls[sha256] = now, url
        return url

    def delete_blobs(self, names: Iterator[str] | Collection[str]) -> None:
        """Delete blobs by SHA-256."""
        self._delete([f"blobs/{sha256}" for sha256 in names])

    # --- updates ------------------------------------------------------------------------------------------------------

    def upload_state(self, name: UploadName, limit_bytes: int) -> UploadState:
        """How much of an update is in the bucket, and the URLs of the pieces to write next."""
        offset = sum(self._pieces(name))
        first, end = offset // PIECE_BYTES, -(-limit_bytes // PIECE_BYTES)
        paths = [_piece(name, number) for number in range(first, min(first + URLS_AT_ONCE, end))]
        urls = tuple(self._sign("PUT", paths)) if paths else ()
        return UploadState(offset=offset, status="partial", urls=urls, piece_bytes=PIECE_BYTES)

    def collect(self, name: UploadName, size_bytes: int, uploads: UploadFolder) -> None:
        """Append to the upload in the state folder what it lacks of the ``size_bytes`` of an update.

        Raises OffsetMismatch if bytes are missing in the bucket too, ChecksumMismatch if it has more.
        """
        offset = uploads.offset(name)
        if offset >= size_bytes:
            return
        sizes = self._pieces(name)
        if sum(sizes) < size_bytes:
            raise OffsetMismatch(
                f"{sum(sizes)} of {size_bytes} bytes have arrived in the object storage", offset=sum(sizes)
            )
        if sum(sizes) > size_bytes:
            self.delete_update(name)
            raise ChecksumMismatch(f"{sum(sizes)} bytes have arrived, the update has {size_bytes}")
        writer = uploads.open(name, offset, size_bytes)
        try:
            for number, size in enumerate(sizes):
                if (begin := max(0, offset - number * PIECE_BYTES)) < size:
                    writer.write(self._read(_piece(name, number), begin, size))
        finally:
            uploads.close(name, writer)

    def delete_update(self, name: UploadName) -> None:
        """Delete what has arrived of an update. Best effort: the end of the round deletes what is left."""
        folder = f"updates/{name.stem}/"
        with contextlib.suppress(ObjectStorageError):
            self._delete([folder + piece for piece in self._list(folder)])

    def end_rounds(self, oldest: int) -> None:
        """Delete the updates of rounds before ``oldest``."""
        names = [name for name in self._list("updates/") if _round_of(name) < oldest]
        self._delete([f"updates/{name}" for name in names])

    def _pieces(self, name: UploadName) -> list[int]:
        """Sizes of an update's pieces from the first one on, up to the first that is missing or not full."""
        found = self._list(f"updates/{name.stem}/")
        sizes: list[int] = []
        while (size := found.get(f"{len(sizes):05d}")) is not None and size <= PIECE_BYTES:
            sizes.append(size)
            if size < PIECE_BYTES:
                break
        return sizes

    # --- the store ----------------------------------------------------------------------------------------------------

    def _put_all(self, names: Collection[str], path_of: Callable[[str], Path]) -> None:
        names = [sha256 for sha256 in names if path_of(sha256).is_file()]  # not what waits for a copy (`Repairs`)
        with concurrent.futures.ThreadPoolExecutor(PUBLISH_THREADS, thread_name_prefix="publish") as pool:
            try:
                list(pool.map(lambda sha256: self.put_blob(sha256, path_of(sha256)), names))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _list(self, folder: str) -> dict[str, int]:
        """{name below ``folder``: size in bytes}."""
        prefix = self._root + folder
        with self._errors():
            batches = list(self._obstore.list(self._store, prefix=prefix.rstrip("/")))
        return {each["path"].removeprefix(prefix): each["size"] for batch in batches for each in batch}

    def _read(self, path: str, start: int, end: int) -> bytes:
        with self._errors():
            return bytes(self._obstore.get_range(self._store, self._root + path, start=start, end=end))

    def _delete(self, paths: list[str]) -> None:
        if paths:
            with self._errors():
                self._obstore.delete(self._store, [self._root + path for path in paths])

    def _sign(self, method: str, paths: list[str]) -> list[str]:
        with self._errors():
            expires = datetime.timedelta(seconds=self._url_s)
            return list(self._obstore.sign(self._store, method, [self._root + path for path in paths], expires))

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn errors of the store into ObjectStorageError."""
        try:
            yield
        except (self._obstore.exceptions.BaseError, OSError) as error:
            reason = str(error).split("\n\nDebug source", 1)[0]
            raise ObjectStorageError(f"object storage {self.url}: {' '.join(reason.split())[:400]}") from error


def check_url(url: str) -> None:
    """Raise ConfigError if ``url`` names no object storage, or obstore is missing. Does not ask the storage."""
    _open_store(url)


def _open_store(url: str) -> tuple[Any, Any]:
    """Obstore and its store of ``url``. Raises ConfigError."""
    try:
        import obstore
        from obstore.store import AzureStore, GCSStore, S3Store, from_url
    except ImportError as error:
        raise ConfigError("object storage needs obstore", remedy="pip install 'edgefed[s3]'") from error
    plain = any(os.environ.get(name, "").startswith("http://") for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT"))
    options: dict[str, Any] = {
        "client_options": {"timeout": f"{CALL_S}s", "connect_timeout": f"{CONNECT_S}s", "allow_http": plain},
        "retry_config": {"max_retries": 2, "retry_timeout": datetime.timedelta(seconds=2 * CONNECT_S)},
    }
    remedy = "Give `blobs` as s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX."
    try:
        store: Any = from_url(url, **options)
    except (obstore.exceptions.BaseError, ValueError, OSError) as error:
        raise ConfigError(f"invalid object storage {url!r}: {first_line(error)}", remedy=remedy) from error
    if not isinstance(store, (S3Store, GCSStore, AzureStore)):
        raise ConfigError(f"object storage {url!r} makes no signed URLs", remedy=remedy)
    return obstore, store


def _piece(name: UploadName, number: int) -> str:
    return f"updates/{name.stem}/{number:05d}"


def _round_of(path: str) -> int:
    """The round of a piece; 0, which is over, of any other object."""
    name = UploadName.parse(path.split("/", 1)[0])
    return 0 if name is None else name.server_round
