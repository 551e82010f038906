"""The run of a `Server`: a new one is made from its settings, one that continues is compared with them."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edgefed.errors import ConfigError

if TYPE_CHECKING:
    from edgefed.aggregator.rounds import RoundPolicy
    from edgefed.api.server import Server
    from edgefed.methods.interface import Method
    from edgefed.protocol.messages import RunConfig, TrainingConfig
    from edgefed.protocol.privacy import PrivacyConfig
    from edgefed.protocol.server_optimizer import ServerOptimizer

Option = float | int | str | bool

DEFAULT_METHOD = "hfedmoe"
DEFAULT_EXTRACTOR = "cnn5"
DEFAULT_DELTA = 1e-5
TRAINING = (
    "train_experts", "train_router", "train_attention", "lora_rank", "lora_alpha", "lora_scaling", "local_steps",
    "min_lora_rank", "round_seconds", "batch_size", "sequence_length", "learning_rate", "schedule", "warmup_rounds",
    "max_grad_norm", "weight_decay", "balancing", "missing", "profile_tokens", "profile_agreement", "evaluation_tokens",
    "evaluation_share", "evaluate_every", "keep_optimizer",
)  # fmt: skip
"""Settings of the training of a language model."""
SMALL_MODEL_BYTES = 256 * 1024**2
"""Largest checkpoint whose experts train in full by default. Full training keeps a gradient and two moments of each
trained weight, and sends the weight in every round."""
OPTIMIZER_SETTINGS = ("learning_rate", "momentum", "beta2", "epsilon")
"""Settings of a server optimizer, without their prefix ``server_``."""


def _method(server: Server) -> tuple[str, dict[str, Option]]:
    """(name, options) of the method; one of the user's own is registered."""
    from edgefed.methods import custom

    options = dict(server.options or {})
    if server.method is None:
        return DEFAULT_METHOD, options
    if isinstance(server.method, str):
        name = custom.load_method(server.method) if custom.is_location(server.method) else server.method
        return name, options
    if options:
        raise ConfigError("`options` are part of a method object", remedy="Set them where the object is made.")
    return custom.name_and_options(server.method)


def create_run(server: Server, report: Callable[[str], None]) -> RunConfig:
    """Import the model into a new run in the state folder. Raises ConfigError, ModelError, StorageError."""
    from edgefed.embedded import TINY, resolve_model
    from edgefed.hub import check_source
    from edgefed.methods.pace import check_pace
    from edgefed.methods.registry import check_alternation, check_ordered, check_ranks, check_training, make_method
    from edgefed.progress import Pulse
    from edgefed.protocol.messages import RunConfig
    from edgefed.runs import import_in_subprocess

    model, tokenizer = str(server.model or TINY), ""
    name, options = _method(server)
    method = make_method(name, options)
    if method.personal:
        model, tokenizer = _extractor(server, name)
        source = model
    else:
        for setting in ("extractor", "tokenizer"):
            if (value := getattr(server, setting)) is not None:
                raise ConfigError(
                    f"`{setting}={value}` has no effect with `method={name}`",
                    remedy=f"Remove `{setting}`: it is for fedmoe only.",
                )
        source = resolve_model(server.model or TINY)
    training = _training(server)
    if server.train_experts is None and not method.personal:
        experts, why = default_experts(source, method)
        training = msgspec.structs.replace(training, experts=experts)
        if why:
            report(f"experts train by LoRA: {why}" if experts == "lora" else f"experts train in full: {why}")
    check_training(method, training.experts)
    check_pace(method, server.pace or 0.0)
    rounds = 5 if server.rounds is None else server.rounds
    if problems := training.problems(rounds):
        raise ConfigError("; ".join(problems))
    check_alternation(method, training, server.max_staleness or 0)
    check_ranks(method, training)
    if {training.experts, training.router, training.attention} == {"none"}:
        raise ConfigError("nothing would be trained: experts, router and attention are all none")
    run = RunConfig(
        run_id=secrets.token_hex(8),
        model=model,
        method=name,
        method_options=options,
        rounds=rounds,
        seed=server.seed or 0,
        training=training,
        tokenizer=tokenizer,
        privacy=privacy_of(server),
        server_optimizer=_server_optimizer(server),
        compression=_compression(server),
        pace=server.pace or 0.0,
    )
    policy = _policy(server, run.rounds)
    if policy.adapter_average == "product":
        check_ordered(run, policy.max_staleness, policy.download_compression)
    if run.privacy is not None:
        policy = check_private(server, run.privacy, method, policy)
    if note := "" if method.personal else check_source(source):
        report(note)
    report(f"importing {run.model} into {server.state}")
    neurons = not method.personal and method.requirements.neurons
    with Pulse(import_watch(server.state, run.model, source, report)):
        import_in_subprocess(source, server.state, run, policy, personal=method.personal, neurons=neurons)
    return run


def _training(server: Server) -> TrainingConfig:
    from edgefed.protocol.messages import TrainingConfig

    given = {name: getattr(server, name) for name in TRAINING if getattr(server, name) is not None}
    if server.adapter_average == "alternate":
        given["lora_factors"] = "alternate"
    return TrainingConfig(**{name.removeprefix("train_"): value for name, value in given.items()})


def default_experts(source: str, method: Method) -> tuple[str, str]:
    """(how experts train by default, the reason or ""): as the method needs, in full in a small model, else by LoRA.

    ``source`` is a checkpoint folder; a model of the hub counts as large.
    """
    from edgefed.hardware.memory import format_bytes

    required = None if method.personal else method.requirements.train_experts
    if required is not None:
        return required, f"the method {method.name} needs it"
    if not Path(source).is_dir():
        return "lora", "the default for a model of the hub"
    size = sum(path.stat().st_size for path in Path(source).glob("*.safetensors"))
    if size <= SMALL_MODEL_BYTES:
        return "full", ""
    return "lora", f"the checkpoint has {format_bytes(size)}"


def _policy(server: Server, rounds: int) -> RoundPolicy:
    from edgefed.aggregator.rounds import RoundPolicy

    defaults: dict[str, Any] = {
        "min_clients": 2, "client_timeout_s": 60.0, "deadline_s": 3600.0, "clip": 2.0, "rollback": 1.5,
    }  # fmt: skip
    policy = RoundPolicy(rounds=rounds, **{**defaults, **policy_settings(server)})
    policy.check()
    return policy


def policy_settings(server: Server) -> dict[str, Any]:
    """The settings of rounds that were given; they also apply to a run that continues."""
    from edgefed.aggregator.rounds import RoundPolicy

    settings = {"deadline_s": server.deadline, "client_timeout_s": server.client_timeout}
    names = {field.name for field in dataclasses.fields(RoundPolicy)} - {"rounds", *settings}
    settings |= {name: getattr(server, name) for name in names}
    switched_off = ("deadline_s", "clip", "rollback", "stop_after")
    given = {name: value for name, value in settings.items() if value is not None}
    return {name: None if name in switched_off and value == 0 else value for name, value in given.items()}


def _extractor(server: Server, method: str) -> tuple[str, str]:
    """(extractor, its tokenizer or "") of a run whose clients have models of their own.

    Raises ConfigError for settings that have no effect there.
    """
    from edgefed.embedded import TINY
    from edgefed.methods.fedmoe import TEXT, extractor_task
    from edgefed.methods.registry import method_options

    name = server.extractor or DEFAULT_EXTRACTOR
    reads_text = extractor_task(name) == TEXT
    if server.tokenizer and not reads_text:
        raise ConfigError(
            f"`tokenizer={server.tokenizer}` has no effect with {name}, which takes images",
            remedy="Remove it, or set `extractor=text-small`.",
        )
    for setting in ("model", *TRAINING):
        if getattr(server, setting) is None or (setting == "sequence_length" and reads_text):
            continue
        raise ConfigError(
            f"`{setting}` has no effect with {method}: its clients train models of their own",
            remedy=f"Set options of the method instead: {', '.join(method_options(method))}.",
        )
    return name, (server.tokenizer or TINY) if reads_text else ""


def continued_run(server: Server) -> RunConfig:
    """The run in the state folder. Raises ConfigError for a setting that contradicts it."""
    from edgefed.methods.options import option_values
    from edgefed.methods.registry import check_alternation, make_method
    from edgefed.runs import RunReader

    with RunReader(server.state) as reader:
        run = reader.run
    method, options = _method(server) if server.method is not None else (None, dict(server.options or {}))
    wanted: dict[str, object] = {"model": server.model and str(server.model), "extractor": server.extractor}
    wanted |= {"method": method, "tokenizer": server.tokenizer, "rounds": server.rounds, "seed": server.seed}
    wanted |= {"pace": server.pace}
    wanted |= {"compression": server.compression and _compression(server)}
    wanted |= {name: getattr(server, name) for name in TRAINING}
    for name, value in wanted.items():
        attribute = "model" if name == "extractor" else name.removeprefix("train_")
        found = getattr(run if hasattr(run, attribute) else run.training, attribute)
        if value is not None and value != found:
            raise _contradiction(server, f"`{name}={value}`", found)
    if asked := _other_optimizer(server, run.server_optimizer):
        raise _contradiction(server, asked, run.server_optimizer or "no server optimizer")
    check_codec(server, run.compression)
    alternates = run.training.lora_factors == "alternate"
    if server.adapter_average is not None and (server.adapter_average == "alternate") != alternates:
        found = "alternating factors" if alternates else "factors that train together"
        raise _contradiction(server, f"`adapter_average={server.adapter_average}`", found)
    check_alternation(make_method(run.method, run.method_options), run.training, server.max_staleness or 0)
    if asked := other_privacy(server, run.privacy):
        raise _contradiction(server, asked, run.privacy or "no noise")
    if options:
        found, wanted_method = (
            option_values(make_method(run.method, {**run.method_options, **more})) for more in ({}, options)
        )
        if differing := [name for name in options if wanted_method[name] != found[name]]:
            asked, has = (
                ", ".join(f"{name}={values[name]}" for name in differing) for values in (wanted_method, found)
            )
            raise _contradiction(server, f"`options` {asked}", has)
    return run


def _contradiction(server: Server, asked: str, found: object) -> ConfigError:
    return ConfigError(
        f"{asked} was asked for, but the run in {server.state} has {found}",
        remedy="Remove the setting to continue that run, or start a new one with another `state`.",
    )


def _server_optimizer(server: Server) -> ServerOptimizer | None:
    """The server optimizer of a new run; None without one. Raises ConfigError for invalid settings."""
    from edgefed.protocol.server_optimizer import ServerOptimizer

    values = {name: getattr(server, f"server_{name}") for name in OPTIMIZER_SETTINGS}
    given = {name: value for name, value in values.items() if value is not None}
    if server.server_optimizer in (None, "none"):
        for name in given:
            raise ConfigError(
                f"`server_{name}` has no effect without `server_optimizer`",
                remedy="Set `server_optimizer`, or remove it.",
            )
        return None
    optimizer = ServerOptimizer(kind=server.server_optimizer, **given)
    if problems := optimizer.problems():
        raise ConfigError("; ".join(problems))
    return optimizer


def _other_optimizer(server: Server, found: ServerOptimizer | None) -> str:
    """The first setting that differs from the server optimizer of a run that continues; "" if none does."""
    kind = "none" if found is None else found.kind
    if server.server_optimizer not in (None, kind):
        return f"`server_optimizer={server.server_optimizer}`"
    for name in OPTIMIZER_SETTINGS:
        wanted = getattr(server, f"server_{name}")
        has = None if found is None else found.rate if name == "learning_rate" else getattr(found, name)
        if wanted not in (None, has):
            return f"`server_{name}={wanted}`"
    return ""


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
    return dataclasses.replace(policy, clip=None, rollback=None, robust="mean", adapter_average="factors")


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
    """Raise ConfigError for a defence that lets one client's data decide how much another counts, and for products."""
    if server.adapter_average == "product":
        raise ConfigError(
            "`adapter_average=product` cannot be combined with `dp_noise`: the noise is on the factors",
            remedy="Remove it.",
        )
    for name in ("clip", "rollback", "max_examples", "stop_after"):
        if getattr(server, name):
            raise ConfigError(
                f"`{name}` cannot be combined with `dp_noise`: it depends on the data of other clients",
                remedy="Remove it; `dp_clip` limits what a client can change.",
            )
    if _is_robust(server):
        raise ConfigError(f"`robust={server.robust}` cannot be combined with `dp_noise`", remedy="Remove it.")


def _compression(server: Server) -> str:
    """`RunConfig.compression`. Raises ConfigError as `check_codec`.

    "auto" leaves the codec to the clients, unless a robust rule needs dense changes: then it is int8. By default it is
    none where factors of two rounds do not compare (`check_ranks`).
    """
    requested = server.compression or "auto"
    if requested == "auto" and _is_robust(server):
        return "int8"
    if server.compression is None and server.min_lora_rank and server.adapter_average == "product":
        return "none"
    check_codec(server, requested)
    return requested


def _is_robust(server: Server) -> bool:
    """Whether a rule replaces the weighted mean."""
    return server.robust not in (None, "mean")


def check_codec(server: Server, compression: str) -> None:
    """Raise ConfigError for a robust rule over sparse changes: the median of numbers that are mostly 0 is 0."""
    if _is_robust(server) and (compression == "auto" or compression.startswith("topk")):
        raise ConfigError(
            f"`robust={server.robust}` cannot be combined with `compression={compression}`: most changes that clients "
            "send would be 0, and so would their median",
            remedy="Set `compression=int4`, or `robust=mean`.",
        )


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
