"""The model card of an export: facts of its run, none of its data."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

from edgefed.protocol.messages import RoundStatus
from edgefed.protocol.privacy import PrivacyStatus

_LOSSES = {"train_loss": "Training loss", "held_out_loss_before": "Held-out loss before training"}
"""Metric of a round -> its row in the card."""


class Origin(Protocol):
    """Where a model is from, as `edgefed.exporting.ExportRecord`; its text is a phrase."""

    @property
    def model(self) -> str:
        """The base model."""

    @property
    def method(self) -> str:
        """The method of the run."""

    @property
    def rounds(self) -> int:
        """Rounds of the run."""

    @property
    def server_round(self) -> int:
        """The round that began with the model."""

    @property
    def privacy(self) -> PrivacyStatus | None:
        """What the model reveals of a client at most."""

    @property
    def edgefed_version(self) -> str:
        """The version that exported it."""


def model_card(base_card: str, record: Origin, rounds: Sequence[RoundStatus], hub_name: bool) -> str:
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
