"""The comparison that a device makes at the end of a run: losses of several models on its own held-out text.

    before         the global model before the device's first round
    global model   the global model after the last round
    own            the global model after the last round with the device's private part, if it has one
    this device    the experts that the device holds, after its last local steps, with its private part
    alone          as many local steps of this device without the federation

Losses are mean cross-entropies per predicted token, in nats, all on the same tokens, which never leave the device.
Where clients have models of their own (FedMoE), "this device" is its mixture, "before" and "alone" are its own model
without training and trained without the federation, and there are accuracies as well.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import msgspec

COMPARING_PHASE = "compare"
"""Phase of a device that compares; the server waits for it before it ends."""
FREE_DOWNLOAD_BYTES = 256 * 1024**2
"""A comparison may always download this much; more only as far as the run itself did."""
SAME_NATS = 0.005
"""A smaller difference is shown as none."""
SAME_SHARE = 0.0005


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Losses in nats per token, None where unknown.

    ``server_round``: the manifest that is the final global model. ``before_round``: the manifest that ``before`` is of;
    1 is the imported model. ``num_tokens``: tokens evaluated, or examples. ``skipped``: why ``global_model`` is
    unknown. ``accuracies``: share of right answers, 0 to 1, by the name of a loss; of models of a client's own.
    """

    server_round: int
    before_round: int = 1
    num_tokens: int = 0
    before: float | None = None
    global_model: float | None = None
    own: float | None = None
    device: float | None = None
    alone: float | None = None
    skipped: str = ""
    accuracies: Mapping[str, float] = {}


def is_sound(comparison: Comparison) -> bool:
    """Whether a comparison from the network has possible values."""
    losses = (comparison.before, comparison.global_model, comparison.own, comparison.device, comparison.alone)
    return (
        all(loss is None or (math.isfinite(loss) and 0 <= loss < 1e6) for loss in losses)
        and 0 <= comparison.num_tokens <= 10**12
        and 1 <= comparison.before_round <= 10**9
        and len(comparison.skipped) <= 200
        and comparison.skipped.isprintable()
        and comparison.accuracies.keys() <= {"before", "device", "alone"}
        and all(0 <= share <= 1 for share in comparison.accuracies.values())
    )


class Client(Protocol):
    """What has made a comparison."""

    @property
    def client_id(self) -> str:
        """Random id, hexadecimal."""

    @property
    def name(self) -> str:
        """Name that its owner chose; several clients may have the same."""

    @property
    def comparison(self) -> Comparison | None:
        """None before the end of the run."""


def comparisons_by_name(clients: Sequence[Client]) -> dict[str, Comparison]:
    """The comparisons of clients by name, with a part of the id where several clients have the same name."""
    count = Counter(client.name for client in clients)
    names = [c.name if count[c.name] == 1 else f"{c.name} ({c.client_id[:8]})" for c in clients]
    return {
        name: client.comparison for name, client in zip(names, clients, strict=True) if client.comparison is not None
    }


REFERENCES = (("alone", "training alone"), ("before", "the model before the run"))
OWN_REFERENCES = (("alone", "its model trained alone"), ("before", "its model before training"))


def verdict(comparison: Comparison) -> str:
    """What the federation brought on this device's text, in words. Empty if nothing can be compared."""
    if (share := comparison.accuracies.get("device")) is not None:
        shares = comparison.accuracies
        differences = [f"{_points(share - shares[field])} {name}" for field, name in OWN_REFERENCES if field in shares]
        brought = f": {' and '.join(differences)}" if differences else ""
        return f"This device's mixture answers {100 * share:.1f} % of its held-out examples correctly{brought}."
    ours = [
        (loss, name)
        for loss, name in (
            (comparison.global_model, "the global model"),
            (comparison.own, "the global model with its private part"),
            (comparison.device, "this device's model"),
        )
        if loss is not None
    ]
    parts = []
    for loss, name in sorted(ours):
        differences = []
        for field, other in REFERENCES:
            if (reference := getattr(comparison, field)) is not None:
                since = other if comparison.before_round == 1 else f"the model before round {comparison.before_round}"
                differences.append(f"{_difference(loss, reference)} {since if field == 'before' else other}")
        if differences:
            parts.append(f"{name} is {' and '.join(differences)}")
    return f"On this device's text {'; '.join(parts)}." if parts else ""


def overall_verdict(comparisons: Iterable[Comparison]) -> str:
    """One sentence about the clients that evaluated the global model, by the mean of their losses; empty for none.

    A reference counts if all of them know it. Of clients with models of their own: about their mixtures.
    """
    comparisons = list(comparisons)
    if own := [each.accuracies for each in comparisons if "device" in each.accuracies]:
        return _overall_accuracy(own)
    known = [each for each in comparisons if each.global_model is not None]
    sentences = []
    for ours, model in (("global_model", "the global model"), ("own", "the global model with their private parts")):
        parts = []
        for field, name in REFERENCES:
            pairs = [(getattr(each, ours), getattr(each, field)) for each in known]
            if not pairs or any(None in pair for pair in pairs):
                continue
            found, others = (math.fsum(losses) / len(pairs) for losses in zip(*pairs, strict=True))
            better = sum(loss < other for loss, other in pairs)
            parts.append(f"{_difference(found, others)} {name} (better for {better} of {len(pairs)})")
        if parts:
            sentences.append(f"{model} is on average {' and '.join(parts)}")
    return f"On the clients' own texts {'; '.join(sentences)}." if sentences else ""


def _overall_accuracy(known: Sequence[Mapping[str, float]]) -> str:
    mean = math.fsum(each["device"] for each in known) / len(known)
    parts = []
    for field, name in OWN_REFERENCES:
        if all(field in each for each in known):
            other = math.fsum(each[field] for each in known) / len(known)
            better = sum(each["device"] > each[field] for each in known)
            parts.append(
                f"{_points(mean - other)} {name.replace('its model', 'their models')} "
                f"(better for {better} of {len(known)})"
            )
    brought = f": {' and '.join(parts)}" if parts else ""
    return f"The clients' mixtures answer on average {100 * mean:.1f} % of their held-out examples correctly{brought}."


def _points(difference: float) -> str:
    """``10.2 points more than``, of percentages; or fewer, or as many as."""
    if abs(difference) < SAME_SHARE:
        return "as many as"
    return f"{abs(100 * difference):.1f} points {'more' if difference > 0 else 'fewer'} than"


def _difference(loss: float, other: float) -> str:
    """``0.42 nats better than``, or worse, or as good as."""
    if abs(other - loss) < SAME_NATS:
        return "as good as"
    return f"{abs(other - loss):.2f} nats {'better' if loss < other else 'worse'} than"
