"""Parts of the creation of a run: its privacy settings, and what is said while a model is imported."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from edgefed.errors import ConfigError

if TYPE_CHECKING:
    from edgefed.aggregator.rounds import RoundPolicy
    from edgefed.api.server import Server
    from edgefed.methods.interface import Method
    from edgefed.protocol.privacy import PrivacyConfig

DEFAULT_DELTA = 1e-5


def privacy_of(server: Server) -> PrivacyConfig | None:
    """The settings of differential privacy; None without noise. Raises ConfigError if they are incomplete."""
    from edgefed.protocol.privacy import PrivacyConfig

    if server.dp_noise is None:
        for name in ("dp_clip", "dp_delta"):
            if getattr(server, name) is not None:
                raise ConfigError(f"`{name}` has no effect without `dp_noise`", remedy="Set `dp_noise`, or remove it.")
        return None
    if server.dp_clip is None:
        raise ConfigError(
            "`dp_noise` needs `dp_clip`: the longest change of a client",
            remedy="Set `dp_clip` to about the L2 norm of a typical change; the server logs it with -v.",
        )
    return PrivacyConfig(noise=server.dp_noise, clip=server.dp_clip, delta=server.dp_delta or DEFAULT_DELTA)


def check_private(server: Server, privacy: PrivacyConfig, method: Method, policy: RoundPolicy) -> RoundPolicy:
    """The policy of a run with differential privacy: without the limits that depend on other clients.

    Raises ConfigError for a method or setting that it excludes, and if the accountant is not installed.
    """
    from edgefed.aggregator.privacy import check_privacy

    check_privacy(privacy)
    if method.personal or method.requirements.neurons:
        raise ConfigError(f"`dp_noise` has no effect with `method={method.name}`", remedy="Choose another method.")
    check_not_robust(server)
    return dataclasses.replace(policy, clip=None, rollback=None, robust="mean")


def other_privacy(server: Server, found: PrivacyConfig | None) -> str:
    """The first setting that differs from those of a run that continues; "" if none does. Raises as `check_private`."""
    for name in ("noise", "clip", "delta"):
        wanted = getattr(server, f"dp_{name}")
        if wanted is not None and wanted != getattr(found, name, None):
            return f"`dp_{name}={wanted}`"
    if found is not None:
        check_not_robust(server)
    return ""


def check_not_robust(server: Server) -> None:
    """Raise ConfigError for a defence that lets one client's data decide how much another counts."""
    for name in ("clip", "rollback", "max_examples"):
        if getattr(server, name):
            raise ConfigError(
                f"`{name}` cannot be combined with `dp_noise`: it depends on the data of other clients",
                remedy="Remove it; `dp_clip` limits what a client can change.",
            )
    if server.robust not in (None, "mean"):
        raise ConfigError(f"`robust={server.robust}` cannot be combined with `dp_noise`", remedy="Remove it.")


def import_watch(folder: Path, model: str, source: str, report: Callable[[str], None]) -> Callable[[float], None]:
    """What says how far an import is: bytes of the run's folder against those of the checkpoint."""
    from edgefed.disk import folder_bytes
    from edgefed.hardware.memory import format_bytes
    from edgefed.progress import remaining

    total = sum(path.stat().st_size for path in Path(source).glob("*.safetensors"))

    def say(seconds: float) -> None:
        written = folder_bytes(folder)
        amount = f"{format_bytes(written)} of {format_bytes(total)}, " if written and total else ""
        report(f"importing {model}: {amount}{remaining(written, total, seconds)}")

    return say
