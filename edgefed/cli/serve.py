"""``edgefed serve``: import a model once, then coordinate rounds until the run is over."""

from __future__ import annotations

import secrets
from pathlib import Path

import click

from edgefed.protocol.messages import RunConfig, TrainingConfig
from edgefed.protocol.routes import DEFAULT_HOST, DEFAULT_PORT

TRAINED = click.Choice(["full", "lora", "none"])


@click.command("serve")
@click.option(
    "--model", help="`tiny`, a Hugging Face checkpoint folder, or a hub id. Default: tiny, or the run in --state."
)
@click.option("--method", help="hfedmoe (default), flux, fedmoe, or a baseline: see the README.")
@click.option("--extractor", help="With fedmoe: the small network that clients share, cnn1 to cnn5 or text-small. "
              "Default: cnn5.")  # fmt: skip
@click.option("--tokenizer", help="With --extractor text-small: whose tokens it reads, `tiny`, a checkpoint folder, or "
              "a hub id. Default: tiny.")  # fmt: skip
@click.option(
    "--option", "options", multiple=True, metavar="NAME=VALUE", help="A hyper-parameter of the method; repeatable."
)
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--min-clients", type=click.IntRange(min=1), default=2, show_default=True,
              help="A round opens when so many clients are there.")  # fmt: skip
@click.option("--clients-per-round", type=click.IntRange(min=1), help="Draw so many clients a round; default: all.")
@click.option(
    "--quorum", type=click.IntRange(min=1), help="Close a round at so many updates; default: all participants."
)
@click.option("--deadline", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS",
              help="Close a round after so long with what has come; default: none.")  # fmt: skip
@click.option("--client-timeout", type=click.FloatRange(min=1), default=60.0, show_default=True, metavar="SECONDS",
              help="A silent client is not waited for any longer.")  # fmt: skip
@click.option("--state", type=click.Path(path_type=Path), default="edgefed-run", show_default=True,
              help="Folder of the run; an existing run goes on where it was.")  # fmt: skip
@click.option("--host", default=DEFAULT_HOST, show_default=True)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=DEFAULT_PORT, show_default=True, help="0 takes any free one."
)
@click.option(
    "--token",
    envvar="EDGEFED_TOKEN",
    help="Secret that every client must present; required unless --host is this machine only.",
)
@click.option(
    "--train-experts", "experts", type=TRAINED, default="full", show_default=True, help="How experts are trained."
)
@click.option(
    "--train-router", "router", type=TRAINED, default="full", show_default=True, help="How routers are trained."
)
@click.option(
    "--train-attention",
    "attention",
    type=TRAINED,
    default="none",
    show_default=True,
    help="How attention weights are trained.",
)
@click.option("--lora-rank", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--lora-alpha", type=click.FloatRange(min=0, min_open=True), default=16.0, show_default=True)
@click.option("--local-steps", type=click.IntRange(min=1), default=20, show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--sequence-length", type=click.IntRange(min=2), default=128, show_default=True)
@click.option("--learning-rate", type=click.FloatRange(min=0, min_open=True), default=5e-4, show_default=True)
@click.option("--weight-decay", type=click.FloatRange(min=0), default=0.0, show_default=True)
@click.option("--missing", type=click.Choice(["renormalize", "skip"]), default="renormalize", show_default=True,
              help="Tokens routed to an expert that a client does not hold.")  # fmt: skip
@click.option("--profile-tokens", type=click.IntRange(min=0), default=16384, show_default=True,
              help="Most tokens of its training text that a client profiles; 0 means all.")  # fmt: skip
@click.option("--evaluation-tokens", type=click.IntRange(min=0), default=4096, show_default=True,
              help="Most tokens of its held-out text that a client evaluates; 0 means all.")  # fmt: skip
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--keep-rounds", type=click.IntRange(min=0), default=2, show_default=True,
              help="Rounds whose global model stays on disk; 0 keeps all.")  # fmt: skip
@click.option("--exit-when-finished", is_flag=True, help="End after the last round instead of serving the final model.")
@click.option(
    "--ready-file", type=click.Path(path_type=Path), help="Write the address here once connections are accepted."
)
@click.pass_context
def serve_command(ctx: click.Context, **flags: object) -> None:
    """Coordinate a run: hand out the global model, collect what clients trained, aggregate, repeat."""
    from edgefed.aggregator.server import ServerConfig, bind, check_token, run_server
    from edgefed.aggregator.store import has_run
    from edgefed.cli.output import print_note
    from edgefed.methods.fedmoe import FedMoE, extractor_task

    state: Path = flags["state"]
    check_token(flags["host"], flags["token"])
    bind(flags["host"], flags["port"]).close()  # nobody should wait for an import to learn that the port is taken
    if has_run(state):
        run = _check_resumed(ctx, state)
        print_note(f"continuing the run in {state}")
    else:
        run, policy, source = _new_run(ctx, flags)
        print_note(f"importing {run.model} into {state}")
        from edgefed.runs import import_in_subprocess

        import_in_subprocess(source, state, run, policy)

    flags_to_join = "--data FILE"
    if run.method == FedMoE.name:
        flags_to_join = f"--task {extractor_task(run.model)} --data DATA --model MODEL"

    def on_ready(url: str) -> None:
        print_note(f"clients join with: edgefed join {url} {flags_to_join}")

    config = ServerConfig(
        state_folder=state,
        host=flags["host"],
        port=flags["port"],
        token=flags["token"],
        ready_file=flags["ready_file"],
        exit_when_finished=flags["exit_when_finished"],
        keep_rounds=flags["keep_rounds"],
    )
    run_server(config, on_ready=on_ready)


def _new_run(ctx: click.Context, flags: dict):
    from edgefed.aggregator.rounds import RoundPolicy
    from edgefed.config import parse_assignments
    from edgefed.embedded import TINY, resolve_model
    from edgefed.errors import ConfigError
    from edgefed.methods.registry import check_training, make_method

    model, method = flags["model"] or TINY, flags["method"] or "hfedmoe"
    options = parse_assignments(flags["options"], "--option")
    # What is unknown or does not go together is told now, not in the first round.
    made, tokenizer = make_method(method, options), ""
    if made.personal:
        model, tokenizer = _check_personal(ctx, flags)
        source = model
    elif flag := next((name for name in ("extractor", "tokenizer") if flags[name]), None):
        raise ConfigError(
            f"--{flag} {flags[flag]} was given with --method {method}", remedy=f"--{flag} is for fedmoe alone."
        )
    else:
        source = resolve_model(model)
    check_training(made, flags["experts"])
    if {flags["experts"], flags["router"], flags["attention"]} == {"none"}:
        raise ConfigError("nothing would be trained: experts, router and attention are all none")
    training = TrainingConfig(**{name: flags[name] for name in TrainingConfig.__struct_fields__ if name in flags})
    run = RunConfig(
        run_id=secrets.token_hex(8),
        model=model,
        method=method,
        method_options=dict(options),
        rounds=flags["rounds"],
        seed=flags["seed"],
        training=training,
        tokenizer=tokenizer,
    )
    policy = RoundPolicy(
        rounds=flags["rounds"],
        min_clients=flags["min_clients"],
        quorum=flags["quorum"],
        deadline_s=flags["deadline"],
        clients_per_round=flags["clients_per_round"],
        client_timeout_s=flags["client_timeout"],
    )
    policy.check()
    return run, policy, source


def _check_personal(ctx: click.Context, flags: dict) -> tuple[str, str]:
    """(extractor, its tokenizer or "") of a run whose clients have models of their own. Raises ConfigError for flags
    that mean nothing.
    """
    from edgefed.embedded import TINY
    from edgefed.errors import ConfigError
    from edgefed.methods.fedmoe import TEXT, FedMoE, extractor_task
    from edgefed.methods.registry import method_options

    name = flags["extractor"] or "cnn5"
    reads_text = extractor_task(name) == TEXT
    if flags["tokenizer"] and not reads_text:
        raise ConfigError(
            f"--tokenizer {flags['tokenizer']} says nothing to {name}, which sees images",
            remedy="Leave it out, or pass --extractor text-small.",
        )
    for flag in ("model", *TRAINING):
        if flag == "sequence_length" and reads_text:
            continue
        if ctx.get_parameter_source(flag) not in (None, click.core.ParameterSource.DEFAULT):
            raise ConfigError(
                f"{_option(ctx, flag)} says nothing to fedmoe: its clients train models of their own",
                remedy=f"Its own settings go with --option: {', '.join(method_options(FedMoE.name))}.",
            )
    return name, (flags["tokenizer"] or TINY) if reads_text else ""


def _option(ctx: click.Context, name: str) -> str:
    return next(param.opts[0] for param in ctx.command.params if param.name == name)


TRAINING = (
    "experts", "router", "attention", "lora_rank", "lora_alpha", "local_steps", "batch_size", "sequence_length",
    "learning_rate", "weight_decay", "missing", "profile_tokens", "evaluation_tokens",
)  # fmt: skip
FIXED = ("model", "extractor", "tokenizer", "method", "rounds", "seed", *TRAINING)
"""Flags that are fixed when a run begins."""


def _check_resumed(ctx: click.Context, state: Path) -> RunConfig:
    """The run in the folder. Refuses a flag that contradicts it: silently ignoring it would be a surprise."""
    from edgefed.errors import ConfigError
    from edgefed.runs import RunReader

    with RunReader(state) as reader:
        run = reader.run
    for name in FIXED:
        if ctx.get_parameter_source(name) in (None, click.core.ParameterSource.DEFAULT):
            continue
        asked, option = ctx.params[name], _option(ctx, name)
        kept = "model" if name == "extractor" else name
        found = getattr(run if hasattr(run, kept) else run.training, kept)
        if asked is not None and asked != found:
            raise ConfigError(
                f"{option} {asked} was asked for, but the run in {state} has {found}",
                remedy="Leave the flag out to continue that run, or start a new one with another --state.",
            )
    return run
