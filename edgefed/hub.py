"""Whether a model can be found, checked before torch is loaded: a folder, a copy in the hub's cache, or the hub itself.

huggingface_hub tries an unreachable hub six times for each file, which takes minutes. One connection with a time limit
decides here; without the hub, a model that was downloaded before is used from its cache. `push_folder` uploads an
export.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from edgefed.errors import ConfigError, EdgefedError, ModelNotFound, NetworkError, Unauthorized, first_line

CONNECT_S = 3.0
"""Time limit of the connection to the hub, with the look-up of its name."""
HUB_REMEDY = (
    "If this machine cannot reach the hub, download the checkpoint elsewhere (`hf download NAME --local-dir FOLDER`), "
    "copy the folder and pass its path; `tiny` needs no download."
)
OFFLINE = "HF_HUB_OFFLINE"


def check_source(source: str) -> str:
    """Check that a checkpoint folder exists, or that a hub id can be downloaded or is in the cache. Returns a note.

    The note is empty, or says that the cached copy is used because the hub cannot be reached; HF_HUB_OFFLINE is then
    set for this process and its children. Raises ModelNotFound.
    """
    folder = Path(source)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelNotFound(f"not a Hugging Face checkpoint: {str(folder)!r} has no config.json")
        return ""
    if folder.exists():
        raise ModelNotFound(f"a checkpoint is a folder, {source!r} is not")
    if looks_like_path(source):
        raise ModelNotFound(f"the checkpoint folder {source!r} does not exist")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        raise ModelNotFound(f"{source!r} is neither a local folder nor a hub id, OWNER/NAME")
    forbidden = asked_offline()
    reason = f"{OFFLINE} is set" if forbidden else unreachable(endpoint())
    if not reason:
        return ""
    if not is_cached(source):
        raise ModelNotFound(
            f"{source!r} is not a local folder, and the hub cannot be used: {reason}; {cache_folder()} has no copy",
            remedy=HUB_REMEDY,
        )
    go_offline()
    return "" if forbidden else f"the hub cannot be used ({reason}): taking the copy of {source} in the cache"


def check_push(repository: str) -> None:
    """Raise an error if a folder cannot be uploaded to a repository of the hub; asks the hub who the user is.

    Raises ConfigError (name, no token), NetworkError (no connection), Unauthorized (token refused).
    """
    from huggingface_hub import HfApi, get_token

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ConfigError(f"a repository of the hub is OWNER/NAME; found {repository!r}")
    reason = f"{OFFLINE} is set" if asked_offline() else unreachable(endpoint())
    if reason:
        raise NetworkError(f"cannot push to {repository!r}: {reason}", remedy="Export without `push_to_hub`.")
    if not get_token():
        raise ConfigError(
            f"cannot push to {repository!r}: there is no token of the hub",
            remedy="Run `hf auth login`, or set HF_TOKEN to a token that may write.",
        )
    with _hub_errors(repository):
        HfApi(endpoint=endpoint()).whoami()


def push_folder(folder: Path, repository: str) -> str:
    """Upload a folder and return the address of the commit. A repository that does not exist is created, private.

    Raises NetworkError or Unauthorized; the folder stays.
    """
    from huggingface_hub import HfApi

    hub = HfApi(endpoint=endpoint())
    with _hub_errors(repository, f"; {str(folder)!r} is complete"):
        hub.create_repo(repository, private=True, exist_ok=True)
        commit = hub.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Upload a model trained with edgefed"
        )
    return str(commit.commit_url)


@contextlib.contextmanager
def _hub_errors(repository: str, state: str = "") -> Iterator[None]:
    """Raise an EdgefedError for what the hub's library raises."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        refused = error.response is not None and error.response.status_code in (401, 403)
        kind: type[EdgefedError] = Unauthorized if refused else NetworkError
        remedy = "Use a token that may write to this repository (`hf auth login`)." if refused else None
        raise kind(f"the hub refuses the push to {repository!r}: {first_line(error)}{state}", remedy=remedy) from error
    except (OSError, httpx.HTTPError, ValueError, RuntimeError) as error:  # RuntimeError: a file, for any reason
        reason = first_line(error) + (f" {first_line(error.__cause__)}" if error.__cause__ else "")
        raise NetworkError(f"cannot push to {repository!r}: {reason}{state}") from error


def asked_offline() -> bool:
    """Whether the user forbids connections to the hub."""
    return os.environ.get(OFFLINE, "").upper() in ("1", "ON", "YES", "TRUE")


def go_offline() -> None:
    """Keep the hub's libraries in this process and its children from trying to connect again."""
    os.environ[OFFLINE] = "1"
    if (constants := sys.modules.get("huggingface_hub.constants")) is not None:
        constants.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]  # it has read the environment already


def looks_like_path(source: str) -> bool:
    """Whether a name can only be a path: hub ids are NAME or OWNER/NAME."""
    return source.startswith((".", "/", "~", "\\")) or source.count("/") > 1 or source.endswith("/") or "\\" in source


def cache_folder() -> Path:
    """Where huggingface_hub keeps what it has downloaded."""
    if cache := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(cache).expanduser()
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(home).expanduser() / "hub"


def is_cached(source: str) -> bool:
    """Whether the configuration of a hub model is in the cache."""
    snapshots = cache_folder() / f"models--{source.replace('/', '--')}" / "snapshots"
    return any(snapshots.glob("*/config.json"))


def endpoint() -> str:
    """Address of the hub."""
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


@functools.cache
def unreachable(url: str) -> str:
    """Why no connection to ``url``, or to the proxy that leads there, opens within `CONNECT_S`; "" if one does."""
    address = urlsplit(url)
    proxy = None if proxy_bypass(address.hostname or "") else getproxies().get(address.scheme)
    target = urlsplit(proxy if proxy is None or "://" in proxy else f"http://{proxy}") if proxy else address
    host = target.hostname or ""
    try:
        port = target.port or (443 if target.scheme == "https" else 80)
    except ValueError:
        return ""  # an odd address of a proxy is for huggingface_hub to judge
    found: list[str] = []

    def connect() -> None:
        try:
            socket.create_connection((host, port), CONNECT_S).close()
        except OSError as error:
            found.append(f"no connection to {host}:{port}: {error.strerror or error}")
        else:
            found.append("")

    # In a thread: the look-up of a name has no time limit of its own.
    thread = threading.Thread(target=connect, name="edgefed-hub", daemon=True)
    thread.start()
    thread.join(CONNECT_S)
    return found[0] if found else f"{host}:{port} did not answer within {CONNECT_S:.0f} s"
