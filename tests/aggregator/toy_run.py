"""A model of a few kilobytes, a method of ten lines, and scripted clients."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import msgspec
import numpy as np

from edgefed.aggregator.active_run import ActiveRun
from edgefed.aggregator.creation import RawTensors, create_run
from edgefed.aggregator.rounds import RoundPolicy
from edgefed.aggregator.service import Service
from edgefed.methods.interface import Assigning, ExpertMethod, UnitMerge
from edgefed.protocol.frames import encode_header, map_tensor, read_header, storage_dtype
from edgefed.protocol.messages import (
    ExpertAssignment,
    ExpertReport,
    Manifest,
    Register,
    RunConfig,
    TensorInfo,
    TrainingConfig,
    UnitInfo,
    UpdateMeta,
    decode_message,
)
from edgefed.protocol.server_optimizer import ServerOptimizer

LAYERS, EXPERTS, HIDDEN = 2, 3, 8
KEY = "k" * 32

Tensors = dict[str, tuple[str, np.ndarray]]


class Mean(ExpertMethod):
    """FedAvg over the clients of a unit, by number of examples; router rows: the clients where the expert is resident.

    ``assigns``: each client trains one expert, another one each round; experts idle for long come with it.
    """

    name = "mean"

    def __init__(self, row_routers: bool = False, assigns: bool = False):
        self.row_routers, self._assigning = row_routers, Assigning() if assigns else None

    @property
    def assigning(self) -> Assigning | None:
        return self._assigning

    def assign_experts(self, surveys, coverage, server_round, seed):
        idle = [(layer, int(e)) for layer, rounds in enumerate(coverage.idle_rounds) for e in np.flatnonzero(rounds)]
        return {
            client: ExpertAssignment(tune=((0, int(survey.utility[0][0] or 0)),), explore=tuple(idle))
            for client, survey in surveys.items()
        }

    def plan_merge(self, contributions, units) -> dict[str, UnitMerge]:
        plan = {}
        for unit in units:
            weights = tuple(
                (c.client_id, self._weight(c, unit))
                for c in sorted(contributions, key=lambda c: c.client_id)
                if unit.key in c.units
            )
            if weights:
                plan[unit.key] = UnitMerge(weights)
        return plan

    def _weight(self, contribution, unit):
        if not (self.row_routers and unit.kind == "router"):
            return float(contribution.num_examples)
        resident = [(unit.layer, expert) in contribution.experts for expert in range(EXPERTS)]
        return np.array(resident, dtype=np.float64) * contribution.num_examples


def make_method(name: str, options: dict) -> Mean:
    return Mean(**options)


NewUnit = tuple[UnitInfo, RawTensors]


def new_unit(key: str, kind: str, layer: int, expert: int, trainable: bool, tensors: RawTensors) -> NewUnit:
    """A unit and its tensors, as `RunWriter.add_unit` takes them."""
    return UnitInfo(key=key, kind=kind, layer=layer, expert=expert, trainable=trainable), tensors


def new_units(rng: np.random.Generator, *, hidden: int = HIDDEN, experts: int = EXPERTS) -> list[NewUnit]:
    """Experts (F32, two tensors), routers (F32, with a bias), one frozen BF16 unit, one trainable F16 unit."""

    def f32(*shape: int) -> tuple[str, np.ndarray]:
        return "F32", rng.standard_normal(shape, dtype=np.float32)

    units = [
        new_unit(
            "embed", "dense", -1, -1, False, {"weight": ("BF16", rng.integers(0, 2**14, (16, hidden), np.uint16))}
        ),
        new_unit("norm", "dense", -1, -1, True, {"weight": ("F16", rng.standard_normal(hidden).astype(np.float16))}),
    ]
    for layer in range(LAYERS):
        units.append(
            new_unit(
                f"layer{layer}.router", "router", layer, -1, True, {"w": f32(experts, hidden), "norm": f32(hidden)}
            )
        )
        for expert in range(experts):
            tensors = {"up": f32(4, hidden), "down": f32(hidden, 4)}
            units.append(new_unit(f"layer{layer}.expert{expert}", "expert", layer, expert, True, tensors))
    return units


def run_config(rounds: int = 2, server_optimizer: ServerOptimizer | None = None, **options: object) -> RunConfig:
    return RunConfig(
        run_id="run-1", model="toy", method="mean", method_options=options, rounds=rounds, seed=3,
        training=TrainingConfig(), server_optimizer=server_optimizer,
    )  # fmt: skip


def make_run(
    folder: Path, *, options: dict | None = None, hidden: int = HIDDEN, experts: int = EXPERTS,
    server_optimizer: ServerOptimizer | None = None, training: TrainingConfig | None = None,
    pace: float = 0.0, **policy: object,
) -> Path:  # fmt: skip
    """Create a run for two clients and two rounds, unless ``policy`` says otherwise."""
    rules = RoundPolicy(**{"rounds": 2, "min_clients": 2, **policy})
    folder.parent.mkdir(exist_ok=True)
    config = folder.parent / "config.json"
    config.write_text('{"model_type": "toy"}')
    units = new_units(np.random.default_rng(0), hidden=hidden, experts=experts)
    run = run_config(rules.rounds, server_optimizer, **(options or {}))
    run = msgspec.structs.replace(run, training=training or run.training, pace=pace)
    create_run(folder, run, rules, units, [config])
    return folder


def register_message(client_id: str, **changes: object) -> Register:
    facts: dict = {
        "protocol_version": 1, "client_id": client_id, "client_key": KEY + client_id, "name": f"device of {client_id}",
        "memory_bytes": 2**30, "expert_share": 0.5, "compute_share": 1.0, "num_examples": 1000,
        "edgefed_version": "0.1.0",
    }  # fmt: skip
    return Register(**{**facts, **changes})


@dataclasses.dataclass
class Update:
    """One client's update: the bytes of its frame, and its meta."""

    frame: bytes
    meta: UpdateMeta


def frame_of(tensors: Tensors) -> bytes:
    """A frame as bytes. The shapes in the header are those of the arrays."""
    infos = [TensorInfo(name=name, dtype=dtype, shape=array.shape) for name, (dtype, array) in tensors.items()]
    return encode_header(infos) + b"".join(np.ascontiguousarray(array).tobytes() for _, array in tensors.values())


def trained(units: list[UnitInfo], seed: int) -> Tensors:
    """Made-up new values of some units, under their names in an update."""
    rng, tensors = np.random.default_rng(seed), {}
    for unit in units:
        for info in unit.tensors:
            values = rng.standard_normal(info.shape).astype(storage_dtype(info.dtype))
            tensors[f"{unit.key}|{info.name}"] = (info.dtype, values)
    return tensors


def report(layer: int, expert: int, **changes: float) -> ExpertReport:
    facts: dict = {"layer": layer, "expert": expert, "usage": 0.5, "importance": 1.0, "steps": 4, "tokens": 100}
    return ExpertReport(**{**facts, **changes})


def make_update(
    manifest: Manifest,
    client_id: str,
    tensors: Tensors,
    *,
    num_examples: int = 10,
    attempt: int = 1,
    **changes: object,
) -> Update:
    """Wrap tensors as an update, with a report for each expert in it."""
    keys = {name.split("|")[0] for name in tensors}
    reports = tuple(
        report(unit.layer, unit.expert) for unit in manifest.units if unit.kind == "expert" and unit.key in keys
    )
    frame = frame_of(tensors)
    facts: dict = {
        "client_id": client_id, "server_round": manifest.server_round, "attempt": attempt,
        "sha256": hashlib.sha256(frame).hexdigest(), "size_bytes": len(frame), "num_examples": num_examples,
        "num_tokens": 1000, "experts": reports, "metrics": {"loss": float(num_examples)},
    }  # fmt: skip
    return Update(frame, UpdateMeta(**{**facts, **changes}))


def unit_values(path: Path) -> dict[str, np.ndarray]:
    """The raw tensors of a blob."""
    return {name: np.array(map_tensor(path, entry)) for name, entry in read_header(path).items()}


def weighted_mean(pairs: list[tuple[float, np.ndarray]]) -> np.ndarray:
    """sum(w x) / sum(w) in extended precision: the oracle of every aggregation test."""
    total = np.longdouble(0)
    sums = np.zeros(pairs[0][1].shape, dtype=np.longdouble)
    for weight, values in pairs:
        sums += np.longdouble(weight) * values.astype(np.longdouble)
        total += np.longdouble(weight)
    return (sums / total).astype(np.float64)


class Toy:
    """A run open in this process, and what clients do to it."""

    def __init__(self, folder: Path, **options: object):
        self.now = 1000.0
        self.folder = folder
        self.run = ActiveRun(folder, make_method, clock=lambda: self.now, fold_threads=1, **options)
        self.service = Service(self.run)

    def close(self) -> None:
        self.run.close()

    def reopen(self, **options: object) -> Toy:
        """Close, and open the same folder again as a new process would."""
        self.close()
        return Toy(self.folder, **options)

    def join(self, *client_ids: str) -> None:
        for client_id in client_ids:
            self.service.register(register_message(client_id))

    def assignment(self, client_id: str):
        return self.service.assignment(client_id, KEY + client_id)

    def manifest(self, which: str = "latest") -> Manifest:
        return decode_message(self.service.manifest(which), Manifest)

    def update(self, client_id: str, seed: int, *, share: float = 1.0, **changes) -> Update:
        """An update of the trainable units, or of the first ``share`` of them."""
        manifest = self.manifest()
        units = [unit for unit in manifest.units if unit.trainable]
        return make_update(manifest, client_id, trained(units[: round(len(units) * share)], seed), **changes)

    def put(self, client_id: str, data: bytes, *, offset: int = 0, attempt: int = 1, server_round: int = 1) -> int:
        key = KEY + client_id
        name, writer = self.service.open_upload(client_id, key, server_round, attempt, offset, len(data))
        try:
            writer.write(data)
        finally:
            arrived = self.service.close_upload(name, writer)
        return arrived

    def commit(self, meta: UpdateMeta):
        client_id = meta.client_id
        return self.service.commit(client_id, KEY + client_id, meta.server_round, meta.attempt, meta)

    def send(self, update: Update):
        meta = update.meta
        self.put(meta.client_id, update.frame, attempt=meta.attempt, server_round=meta.server_round)
        return self.commit(meta)

    def blobs(self, which: str = "latest") -> dict[str, str]:
        """{unit key: sha256} of a manifest."""
        return {unit.key: unit.sha256 for unit in self.manifest(which).units}

    def values(self, which: str = "latest") -> Tensors:
        """Every tensor of a model, raw, as it can be downloaded."""
        return {
            f"{unit.key}|{name}": values
            for unit in self.manifest(which).units
            for name, values in unit_values(self.service.blob(unit.sha256)[0]).items()
        }
