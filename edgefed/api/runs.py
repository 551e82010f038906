"""`simulate` a fleet of devices, `export` the model of a run, and read the `comparisons` of its clients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgefed.errors import ConfigError

if TYPE_CHECKING:
    from edgefed.exporting import Dtype, Format, OnnxExperts
    from edgefed.progress import ProgressSink
    from edgefed.protocol.comparison import Comparison
    from edgefed.simulation.config import SimulationConfig
    from edgefed.simulation.result import SimulationResult
    from edgefed.simulation.simulate import SimulationEvent


def comparisons(run: str | Path, *, token: str | None = None) -> dict[str, Comparison]:
    """What clients compared at the end of a run, {client: held-out losses on its own text}; empty before the end.

    >>> edgefed.comparisons("edgefed-run")["kitchen"].global_model                        # doctest: +SKIP

    ``run``: the folder of a run, the address of its server, or the state folder of a device, which knows its own only.
    ``token``: of the server. Raises StateCorrupt, StorageError, and where the server is asked ServerUnreachable and
    Unauthorized.
    """
    from edgefed.aggregator.store import has_run

    if "://" in str(run):
        from edgefed.agent.transport import AggregatorClient
        from edgefed.protocol.comparison import comparisons_by_name

        with AggregatorClient(str(run), "status", "status", token) as server:
            clients = server.status().clients
        return comparisons_by_name(clients)
    if has_run(Path(run)):
        from edgefed.runs import RunReader

        with RunReader(Path(run)) as reader:
            return reader.comparisons()
    from edgefed.trainer.comparison import load_comparison

    found = load_comparison(Path(run))
    return {} if found is None else {"this device": found}


def simulate(
    config: str | Path | SimulationConfig,
    out: str | Path = "edgefed-simulation",
    *,
    methods: Sequence[str] = (),
    rounds: int | None = None,
    seed: int | None = None,
    compression: str | None = None,
    on_event: Callable[[SimulationEvent], None] | None = None,
    engine: Literal["built-in", "ray"] = "built-in",
    workers: int | None = None,
) -> SimulationResult:
    """Simulate a fleet: devices train one after another on this machine, in the virtual time of their profiles.

    >>> result = edgefed.simulate("fleet.toml", out="results", on_event=print)            # doctest: +SKIP
    >>> result.run("hfedmoe").rounds[-1].loss                                             # doctest: +SKIP

    ``config`` is a TOML file or an object. ``methods`` selects some of its methods by their labels; ``rounds``,
    ``seed`` and ``compression`` replace its values. A simulation that was interrupted continues with the same ``out``.
    With ``engine="ray"`` the devices of a round train side by side in ``workers`` processes of Ray, or as many as it
    has room for; the result is the same.

    Raises ConfigError, UnknownMethod, UnknownProfile, DataError, ModelError, StorageError.
    """
    from edgefed.simulation.simulate import simulate as run_simulation

    settings = simulation_settings(config, methods=methods, rounds=rounds, seed=seed, compression=compression)
    return run_simulation(settings, Path(out), on_event or (lambda event: None), engine=engine, workers=workers)


def simulation_settings(
    config: str | Path | SimulationConfig,
    *,
    methods: Sequence[str] = (),
    rounds: int | None = None,
    seed: int | None = None,
    compression: str | None = None,
) -> SimulationConfig:
    """What `simulate` runs for these arguments. Raises ConfigError, UnknownMethod, UnknownProfile."""
    settings: SimulationConfig
    if isinstance(config, (str, Path)):
        from edgefed.simulation.config_file import load_simulation

        settings = load_simulation(Path(config))
    else:
        settings = config
    labels = [choice.label for choice in settings.methods]
    if unknown := [name for name in methods if name not in labels]:
        raise ConfigError(f"{config} has no method {', '.join(unknown)}; its methods are {', '.join(labels)}")
    if methods:
        chosen = tuple(choice for choice in settings.methods if choice.label in methods)
        settings = dataclasses.replace(settings, methods=chosen)
    return dataclasses.replace(
        settings,
        rounds=settings.rounds if rounds is None else rounds,
        seed=settings.seed if seed is None else seed,
        compression=settings.compression if compression is None else compression,
    )


def export(
    run: str | Path,
    target: str | Path,
    *,
    format: Format = "hf",
    dtype: Dtype = "auto",
    server_round: int | Literal["best"] | None = None,
    global_model: bool = False,
    token: str | None = None,
    onnx_experts: OnnxExperts = "products",
    base: str | None = None,
    planned: bool = False,
    push_to_hub: str | None = None,
    progress: ProgressSink | None = None,
) -> Path:
    """Write the model of a run to the folder ``target``, and return that folder.

    >>> edgefed.export("edgefed-run", "model", format="hf")                               # doctest: +SKIP

    ``run``: the folder of a run, the address of its server, or the state folder of a device, which exports what it has:
    its own weights where the method exchanges none, otherwise the global model of its last round. ``global_model``:
    of a device, the newest global model, from its server. ``format``: "hf", a Hugging Face checkpoint with adapters
    merged; "peft", the adapters alone, which ``peft.PeftModel.from_pretrained`` loads on the base model;
    "gguf-adapter", the adapters for llama.cpp; "gguf" and "onnx", the merged model for llama.cpp and for onnxruntime.
    ``dtype``: of the weights: "auto" (the model's own), "float32", "float16" or "bfloat16"; with "gguf" also "q8_0" and
    "q4_0"; with "onnx" "float32" or "int8".
    ``server_round``: the model at the start of this round; None: the newest; "best": of the models that clients have
    evaluated, the one with the smallest held-out loss, the median over clients. ``token``: of the server.
    ``onnx_experts``: "products" of matrices, the fastest on a CPU, or the "operator" MoE of onnxruntime.
    "safetensors-delta" writes the tensors that differ from the checkpoint that the run began with; ``run`` may be such
    a folder, which becomes the checkpoint again. ``base``: that checkpoint, if it is not what the run's model names.
    ``planned``: of a device, with "onnx": what it computes with, the experts, slices and merged experts of its plan.
    ``push_to_hub``: also upload the folder to this repository of the Hugging Face hub, OWNER/NAME, which is created,
    private, if it does not exist.

    Raises ConfigError (unknown format, one that cannot hold what the run trained, round not stored, target not empty,
    no model was evaluated), StorageError, StateCorrupt, and where the server is asked ServerUnreachable, Unauthorized,
    NotFound.
    """
    from edgefed.exporting import DTYPES, FORMATS, ONNX_EXPERTS, export_model
    from edgefed.formats import DELTA_FILE

    settings = (("format", format, FORMATS), ("dtype", dtype, DTYPES), ("onnx_experts", onnx_experts, ONNX_EXPERTS))
    for setting, value, known in settings:
        if value not in known:
            raise ConfigError(f"invalid `{setting}`: {value!r}; expected one of {', '.join(known)}")
    is_delta = (Path(run) / DELTA_FILE).is_file()
    if onnx_experts != "products" and format != "onnx":
        raise ConfigError(f"`onnx_experts` is of format=onnx; found format={format}")
    if base is not None and not is_delta and format != "safetensors-delta":
        raise ConfigError(f"`base` is of format=safetensors-delta, and of the folder of a delta; found format={format}")
    if push_to_hub is not None:
        from edgefed.hub import check_push

        check_push(push_to_hub)
    if is_delta:
        from edgefed.formats.delta import apply_delta

        if format != "hf" or dtype != "auto" or planned:
            raise ConfigError(f"{run} is a delta: make a checkpoint of it first, with format=hf and dtype=auto")
        if server_round is not None or global_model:
            raise ConfigError(f"{run} is a delta of one model: `server_round` and `global_model` have no meaning")
        folder = apply_delta(Path(run), Path(target), base_folder=base)
    else:
        folder = export_model(
            run, Path(target), server_round, format=format, dtype=dtype, global_model=global_model, token=token,
            onnx_experts=onnx_experts, base=base, planned=planned, progress=progress,
        )  # fmt: skip
    if push_to_hub is not None:
        from edgefed.hub import push_folder

        push_folder(folder, push_to_hub)
    return folder
