"""Which experts each client holds and trains, from the updates of a round: for the status, not for the aggregation."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from edgefed.aggregator.records import UpdateRecord
from edgefed.aggregator.slices import read_rows
from edgefed.protocol.coverage import ClientExperts, ExpertCoverage
from edgefed.protocol.frames import read_header, split_update_name, update_name
from edgefed.protocol.messages import NEURON_INDEX, Manifest, UnitInfo
from edgefed.protocol.slices import neuron_table


def no_coverage(experts_per_layer: Sequence[int]) -> ExpertCoverage:
    """The coverage before the first round."""
    zeros = tuple((0,) * size for size in experts_per_layer)
    return ExpertCoverage(
        server_round=0,
        experts_per_layer=tuple(experts_per_layer),
        updates=zeros,
        neurons=tuple((0.0,) * size for size in experts_per_layer),
        trained_in=zeros,
        clients={},
    )


def cover_round(
    before: ExpertCoverage,
    manifest: Manifest,
    updates: Sequence[UpdateRecord],
    folder: Path,
    known: Collection[str],
) -> ExpertCoverage:
    """The coverage after the ``updates`` of a round were aggregated; their files are in ``folder``.

    Clients without an update keep what they had, as long as they are ``known``. Raises StorageError.
    """
    sizes, server_round = manifest.experts_per_layer, manifest.server_round
    experts = [unit for unit in manifest.units if unit.kind == "expert" and unit.trainable]
    covered = {(unit.layer, unit.expert): np.zeros(_num_neurons(unit), dtype=bool) for unit in experts}
    counts = [np.zeros(size, dtype=np.int64) for size in sizes]
    clients = {client_id: held for client_id, held in before.clients.items() if client_id in known}
    for update in updates:
        shares: dict[tuple[int, int], float] = {}
        for unit, rows in _trained_rows(folder / update.file_name, experts):
            place = (unit.layer, unit.expert)
            covered[place][rows] = True
            shares[place] = max(shares.get(place, 0.0), len(covered[place][rows]) / len(covered[place]))
        for layer, expert in shares:
            counts[layer][expert] += 1
        clients[update.client_id] = _client_experts(server_round, len(sizes), update, shares)
    trained_in = [list(row) for row in before.trained_in]
    neurons = [[0.0] * size for size in sizes]
    for (layer, expert), mask in covered.items():
        neurons[layer][expert] = float(mask.mean())
        if counts[layer][expert]:
            trained_in[layer][expert] = server_round
    return ExpertCoverage(
        server_round=server_round,
        experts_per_layer=sizes,
        updates=tuple(tuple(row.tolist()) for row in counts),
        neurons=tuple(map(tuple, neurons)),
        trained_in=tuple(map(tuple, trained_in)),
        clients=clients,
    )


def _num_neurons(unit: UnitInfo) -> int:
    """Rows of the unit's neuron table; a unit that is exchanged whole counts as one."""
    table = neuron_table(unit)
    return 1 if table is None else table.shape[0]


def _trained_rows(path: Path, experts: Sequence[UnitInfo]) -> list[tuple[UnitInfo, np.ndarray | slice]]:
    """The expert units in an update file, each with the rows of its neurons."""
    header = {update_name(*split_update_name(name)[:2]): entry for name, entry in read_header(path).items()}
    found: list[tuple[UnitInfo, np.ndarray | slice]] = []
    for unit in experts:
        index = header.get(update_name(unit.key, NEURON_INDEX)) if neuron_table(unit) is not None else None
        if index is not None:
            found.append((unit, read_rows(path, index.start, index.info.shape[0])))
        elif update_name(unit.key, unit.tensors[0].name) in header:
            found.append((unit, slice(None)))
    return found


def _client_experts(
    server_round: int, num_layers: int, update: UpdateRecord, shares: dict[tuple[int, int], float]
) -> ClientExperts:
    """What one client held: the experts that it reported and those that it trained."""
    reports = () if update.meta is None else update.meta.experts
    held: list[set[int]] = [set() for _ in range(num_layers)]
    for layer, expert in [*((report.layer, report.expert) for report in reports), *shares]:
        held[layer].add(expert)
    resident = tuple(tuple(sorted(row)) for row in held)
    trained = tuple(
        tuple(round(shares.get((layer, expert), 0.0), 4) for expert in row) for layer, row in enumerate(resident)
    )
    return ClientExperts(server_round=server_round, resident=resident, trained=trained)
