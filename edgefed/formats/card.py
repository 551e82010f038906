"""What an export says of itself: `RECORD_FILE`, where it is from, and the model card: no data of its run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from edgefed import __version__
from edgefed.errors import StateCorrupt
from edgefed.progress import counted
from edgefed.protocol.messages import RoundStatus
from edgefed.protocol.privacy import PrivacyStatus

RECORD_FILE, CARD_FILE = "edgefed.json", "README.md"
"""In the folder of an export."""
_LOSSES = {"train_loss": "Training loss", "held_out_loss_before": "Held-out loss before training"}
"""Metric of a round -> its row in the card."""


class ExportRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Where an exported model is from. ``server_round``: the model at the start of this round.

    ``source``: a run's folder, its server, or a device. ``own_units``: parts that are the device's own. ``unchanged``:
    no client has changed the model yet. ``planned_experts``: the experts that a device's plan has, if the export has no
    others; 0: it has all. ``privacy``: what the model reveals of a client at most; None: without noise.
    """

    model: str
    method: str
    run_id: str
    rounds: int
    server_round: int
    source: Literal["run", "server", "device"]
    own_units: int = 0
    unchanged: bool = False
    planned_experts: int = 0
    privacy: PrivacyStatus | None = None
    edgefed_version: str = __version__

    def __str__(self) -> str:
        if self.server_round > self.rounds:
            when = f"after all {counted(self.rounds, 'round')}"
        elif self.server_round == 1:
            when = f"before round 1 of {self.rounds}"
        else:
            when = f"after round {self.server_round - 1} of {self.rounds}"
        whose = f"this device's own model ({self.own_units} parts of its own)" if self.own_units else "the global model"
        changed = "; no client has changed it: it is the model that the run began with" if self.unchanged else ""
        planned = f"; only the {self.planned_experts} experts of this device's plan" if self.planned_experts else ""
        return f"{whose} of {self.model} {when}, method {self.method}{changed}{planned}"


def read_record(folder: Path) -> ExportRecord | None:
    """Where a checkpoint is from; None if edgefed has not exported it."""
    path = folder / RECORD_FILE
    if not path.exists():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=ExportRecord)
    except msgspec.DecodeError as error:
        raise StateCorrupt(f"{path} is not a file that edgefed wrote: {error}") from error


def model_card(base_card: str, record: ExportRecord, rounds: Sequence[RoundStatus], hub_name: bool) -> str:
    """Return the card of an export: that of the base model, if any, and how the model was made.

    ``rounds``: those that made the model; none where they are not known. ``hub_name``: the base model is one of the
    hub, and the metadata name it. The metadata of the base's card stay, with its licence; a card without any gets some.
    """
    metadata, text = _split(base_card)
    lines = [line for line in metadata.splitlines() if not line.startswith("base_model:")]
    if hub_name:
        lines.append(f"base_model: {record.model}")
    if not any(line.startswith("tags:") for line in lines):
        lines += ["tags:", "- federated-learning"]
    licence = re.search(r"^license: *(.+)$", metadata, re.MULTILINE)
    facts = {
        "Base model": record.model,
        "Licence of the base model": licence.group(1).strip() if licence else "not stated in its card",
        "Method": record.method,
        "Rounds": f"{record.server_round - 1} of {record.rounds}",
        **_measured(rounds),
        "Privacy": _privacy(record.privacy),
        "Made with": f"edgefed {record.edgefed_version}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    head = "\n".join(["---", *lines, "---", ""])
    section = (
        f"# Federated fine-tuning\n\nThis is {record}. The data of a run stay on its devices.\n\n"
        f"| | |\n|---|---|\n{table}\n"
    )
    return head + (f"\n{text.strip()}\n" if text.strip() else "") + "\n" + section


def _measured(rounds: Sequence[RoundStatus]) -> dict[str, str]:
    """Clients and losses of the rounds."""
    if not rounds:
        return {}
    sizes = sorted(done.participants for done in rounds)
    per_round = str(sizes[0]) if sizes[0] == sizes[-1] else f"{sizes[0]} to {sizes[-1]}"
    found = {
        "Clients in a round": per_round,
        "Updates that counted": str(sum(done.updates for done in rounds)),
    }
    for name, label in _LOSSES.items():
        having = [done for done in rounds if name in done.metrics]
        if having:
            first, last = having[0], having[-1]
            found[label] = (
                f"{first.metrics[name]:.4g} in round {first.server_round}, {last.metrics[name]:.4g} in round "
                f"{last.server_round}"
            )
    return found


def _privacy(privacy: PrivacyStatus | None) -> str:
    if privacy is None:
        return "No noise was added, so differential privacy is not guaranteed."
    return (
        f"Client-level differential privacy of the weights: {privacy} (noise multiplier {privacy.noise:g}, clip "
        f"{privacy.clip:g}). Numbers that clients reported are not covered."
    )


def _split(card: str) -> tuple[str, str]:
    """Metadata and text of a card."""
    found = re.match(r"---\r?\n(.*?)\r?\n---\r?\n?(.*)", card, re.DOTALL)
    return (found.group(1), found.group(2)) if found else ("", card)
