"""A simulation as a whole: every method on the same fleet, data and seed.

result = simulate(load_simulation(Path("fleet.toml")), Path("out"), on_event=print)
result.run("hfedmoe").seconds_to(2.5)
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from edgefed.costs.shapes import KNOWN_SHAPES
from edgefed.disk import disk_errors, write_durably
from edgefed.embedded import resolve_model
from edgefed.errors import ConfigError, StateCorrupt
from edgefed.hardware.memory import set_up_allocator
from edgefed.moe.model_shape import shape_from_config
from edgefed.simulation.config import SimulationConfig, split_records
from edgefed.simulation.device_rates import Calibration, CostShape, device_rates, memory_budget
from edgefed.simulation.ray_engine import RayEngine
from edgefed.simulation.result import RoundResult, SimulationResult
from edgefed.simulation.simulated_device import SharedModel
from edgefed.simulation.simulated_run import Score, SimulatedRun

RESULT_FILE = "simulation.json"
CONFIG_FILE = "config.json"
FORMAT = 3
"""Of the files in the output folder."""


ENGINES = ("built-in", "ray")


@dataclasses.dataclass(frozen=True)
class SimulationEvent:
    """Progress of a simulation.

    ``ended`` is set when a round has ended, also one of an earlier process; ``client`` when one begins to train.
    """

    label: str
    server_round: int
    client: str = ""
    clients_done: int = 0
    clients: int = 0
    ended: RoundResult | None = None
    message: str = ""


def simulate(
    config: SimulationConfig,
    out: Path,
    on_event: Callable[[SimulationEvent], None] = lambda event: None,
    *,
    score: Score | None = None,
    calibration: Calibration | None = None,
    engine: str = "built-in",
    workers: int | None = None,
) -> SimulationResult:
    """Run every method of ``config`` and write ``out/simulation.json``.

    An interrupted simulation of the same configuration in ``out`` is continued. The result depends only on the
    configuration (and the kernels and thread count of this machine), not on how long anything took.

    Args:
        config: What to simulate.
        out: Folder for results and state.
        on_event: Called with each event.
        score: Further metrics of the global model after each round; see `simulated_run.Score`.
        calibration: Share of the roofline that work achieves.
        engine: "built-in" trains one client after another, "ray" side by side; with the same result.
        workers: With "ray": processes; None: as many as there is room for.

    Raises:
        ConfigError: ``out`` holds something else; an unknown engine, or more workers than Ray has CPUs for.
        DataError, ModelError, StorageError: Data, model or disk cannot be used.
    """
    import torch

    from edgefed.moe.loading import load_config

    if engine not in ENGINES:
        raise ConfigError(f"`engine` is {engine!r}, expected one of {', '.join(ENGINES)}")
    if workers is not None and engine != "ray":
        raise ConfigError(f"`workers` has no effect with `engine={engine}`", remedy="Remove it, or set `engine=ray`.")
    set_up_allocator()
    torch.set_num_threads(config.threads)
    _claim(out, config)
    calibration = calibration or Calibration()
    source = resolve_model(config.model)
    shape = shape_from_config(load_config(source), config.model)
    charged = CostShape.same(shape, config.gpu_optimizer)
    if config.cost_shape is not None:
        charged = CostShape(
            KNOWN_SHAPES[config.cost_shape], shape.experts_per_layer, gpu_optimizer=config.gpu_optimizer
        )
    for device in config.fleet:
        device_rates(device)  # raises for an incomplete profile before anything starts
    budgets = {device.name: memory_budget(device) for device in config.fleet}
    if config.split is not None:
        data = split_records(config.split, [device.name for device in config.fleet], out / "data", config.seed)
    else:
        data = {device.name: device.data for device in config.fleet}
    shared = SharedModel(out / "model")
    runs = []
    with RayEngine(out, config.threads, workers) if engine == "ray" else contextlib.nullcontext() as processes:
        for choice in config.methods:
            shared.forget()
            run = SimulatedRun(
                config, choice, out / choice.label, source, shape, charged, budgets, data, shared,
                lambda **event: on_event(SimulationEvent(**event)), score, calibration, processes,
            )  # fmt: skip
            runs.append(run.play())
    result = SimulationResult(
        model=config.model,
        cost_shape=config.cost_shape,
        seed=config.seed,
        rounds=config.rounds,
        target_loss=config.target_loss,
        budgets=budgets,
        profiles={device.name: device.profile.id for device in config.fleet},
        runs=tuple(runs),
    )
    write_durably(out / RESULT_FILE, json.dumps(result.to_dict(), indent=1).encode())
    return result


def _claim(out: Path, config: SimulationConfig) -> None:
    """Make ``out``, or check that it is of the same simulation. More methods may be added to one later."""
    mark = {"format": FORMAT, "config": fingerprint(config)}
    path, remedy = out / CONFIG_FILE, "Choose another `out` folder, or delete this one."
    with disk_errors(out):
        if path.exists():
            try:
                found = json.loads(path.read_text())
                same_format = found.get("format") == FORMAT
            except (ValueError, AttributeError) as error:
                raise StateCorrupt(f"{path} is not a file that edgefed wrote: {error}", remedy=remedy) from error
            if not same_format:
                raise ConfigError(f"{out} holds a simulation of another version of edgefed", remedy=remedy)
            if found != mark:
                raise ConfigError(f"{out} holds a simulation with other settings", remedy=remedy)
            return
        if out.exists() and any(out.iterdir()):
            raise ConfigError(f"{out} is not empty and holds no simulation", remedy="Choose another `out` folder.")
        out.mkdir(parents=True, exist_ok=True)
    write_durably(path, json.dumps(mark).encode())


def fingerprint(config: SimulationConfig) -> str:
    """Hash of everything that a result depends on, but for the list of methods, the evaluation target and the data."""
    fixed = dataclasses.replace(config, target_loss=None)
    text = repr([getattr(fixed, field.name) for field in dataclasses.fields(fixed) if field.name != "methods"])
    return hashlib.sha256(text.encode()).hexdigest()
