"""The run in numbers, in the text format of Prometheus (version 0.0.4). Pure.

Counters are sums over the finished rounds, which are stored with the run, so a restart does not reset them. Clients
have no series of their own: there may be thousands, and STATUS tells of each.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Iterator, Mapping

from edgefed import __version__
from edgefed.protocol.coverage import ExpertCoverage
from edgefed.protocol.messages import Status

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
RUN_STATES = ("waiting", "training", "aggregating", "finished")
CLIENT_STATES = ("waiting", "training", "done", "finished", "lost", "left")
LOSSES = {"train_loss": "train", "held_out_loss_before": "held_out_before", "held_out_loss_after": "held_out_after"}
"""Metrics of a round that are exported as a loss, and their label."""
KINDS = ("experts", "routers", "dense", "adapters")
LEFT = {"updates": ("residual_norm", "change_norm"), "step": ("model_residual_norm", "model_step_norm")}
"""What compression leaves for later, of the updates and of the model's step: the metrics of the part and the whole."""

Samples = Iterable[tuple[Mapping[str, str], float]]


def metrics_text(status: Status, coverage: ExpertCoverage, connections: Mapping[str, int], free_bytes: int) -> str:
    """Every metric of a run. ``connections``: {"known" or "stranger": number}; ``free_bytes``: of the disk."""
    return "".join(_metric(*metric) for metric in _metrics(status, coverage, connections, free_bytes))


def _metrics(
    status: Status, coverage: ExpertCoverage, connections: Mapping[str, int], free_bytes: int
) -> Iterator[tuple[str, str, str, Samples]]:
    """(name, type, help, samples) of each metric."""
    run, history = status.run, status.history
    last = history[-1] if history else None
    clients = collections.Counter(client.state for client in status.clients)
    labels = {"run_id": run.run_id, "method": run.method, "model": run.model, "version": __version__}
    yield "edgefed_info", "gauge", "The run and the version of the server.", [(labels, 1)]
    yield (
        *("edgefed_state", "gauge", "1 for the state of the run, 0 for the others."),
        [({"state": name}, float(status.state == name)) for name in RUN_STATES],
    )
    yield "edgefed_rounds", "gauge", "Rounds of the run.", [({}, run.rounds)]
    yield "edgefed_rounds_aggregated_total", "counter", "Rounds that were aggregated.", [({}, len(history))]
    undone = sum(done.undone is not None for done in history)
    yield "edgefed_rounds_undone_total", "counter", "Rounds that a later one undid.", [({}, undone)]
    yield (
        *("edgefed_clients", "gauge", "Clients by their state."),
        [({"state": name}, clients[name]) for name in CLIENT_STATES],
    )
    yield "edgefed_min_clients", "gauge", "Clients that a round needs.", [({}, status.min_clients)]
    yield "edgefed_updates_waiting", "gauge", "Updates of the current round so far.", [({}, status.updates_received)]
    used = sum(done.updates for done in history)
    yield "edgefed_updates_aggregated_total", "counter", "Updates that counted.", [({}, used)]
    aside = sum(len(done.set_aside) for done in history)
    yield "edgefed_updates_set_aside_total", "counter", "Accepted updates that did not count.", [({}, aside)]
    received = sum(done.uploaded_bytes for done in history)
    yield "edgefed_received_bytes_total", "counter", "Bytes of the updates that counted.", [({}, received)]
    sent = sum(done.downloaded_bytes for done in history)
    yield "edgefed_sent_bytes_total", "counter", "Bytes that clients downloaded in finished rounds.", [({}, sent)]

    def total(name: str) -> float:
        return sum(done.metrics.get(name, 0.0) for done in history)

    yield (
        *(
            "edgefed_received_kind_bytes_total",
            "counter",
            "Bytes of tensors in the updates that counted, by their kind.",
        ),
        [({"kind": kind}, total(f"bytes_up_{kind}")) for kind in KINDS],
    )
    yield (
        *("edgefed_changes_bytes_total", "counter", "Bytes that came or went as changes, encoded."),
        [({"direction": way}, total(f"bytes_{way}_changes")) for way in ("up", "down")],
    )
    yield (
        "edgefed_sent_saved_bytes_total",
        "counter",
        "Bytes that changes have saved.",
        [({}, total("bytes_down_saved"))],
    )
    if last and (ratio := last.metrics.get("upload_ratio")):
        text = "Uncompressed bytes per byte received, in the last finished round."
        yield "edgefed_upload_ratio", "gauge", text, [({}, ratio)]
    if last:
        norms = {of: [last.metrics.get(name, 0.0) for name in names] for of, names in LEFT.items()}
        text = "Share of the L2 norm that the last finished round left for later."
        shares = [({"of": of}, part / whole) for of, (part, whole) in norms.items() if whole]
        yield "edgefed_residual_share", "gauge", text, shares
    yield (
        "edgefed_round_seconds_total",
        "counter",
        "Time of the finished rounds.",
        [({}, sum(d.seconds for d in history))],
    )
    losses = [({"kind": label}, last.metrics[name]) for name, label in LOSSES.items() if last and name in last.metrics]
    yield "edgefed_loss_nats", "gauge", "Mean losses of the last finished round, in nats per token.", losses
    trained = sum(count > 0 for row in coverage.updates for count in row)
    yield "edgefed_experts", "gauge", "Experts of the model.", [({}, sum(coverage.experts_per_layer))]
    yield "edgefed_experts_trained", "gauge", "Experts that the last finished round trained.", [({}, trained)]
    yield (
        *("edgefed_connections", "gauge", "Open connections, by whether they have shown a secret."),
        [({"kind": kind}, count) for kind, count in sorted(connections.items())],
    )
    yield "edgefed_free_bytes", "gauge", "Free space of the disk with the state folder.", [({}, free_bytes)]
    peak = status.memory_peak_bytes
    yield "edgefed_memory_peak_bytes", "gauge", "Largest resident memory of the server so far.", [({}, peak)]


def _metric(name: str, kind: str, text: str, samples: Samples) -> str:
    lines = [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
    for labels, value in samples:
        inside = ",".join(f'{label}="{_escaped(found)}"' for label, found in labels.items())
        lines.append(f"{name}{{{inside}}} {_number(value)}" if inside else f"{name} {_number(value)}")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if value == int(value) else repr(float(value))
