"""``edgefed join``: take part in a run with this device and its own text."""

from __future__ import annotations

import dataclasses
import platform
import signal
import sys
import threading
from pathlib import Path

import click


@click.command("join")
@click.argument("server")
@click.option("--data", required=True, help="What stays on this device: text as .txt, .jsonl or silo:NAME; with "
              "--task, labelled examples.")  # fmt: skip
@click.option("--task", type=click.Choice(["images", "text", "next-token"]), help="In a run of fedmoe: train a model "
              "of your own, on labelled images or texts, or to continue text.")  # fmt: skip
@click.option(
    "--model",
    help="With --task: cnn1 to cnn5, text-gru, text-cnn, package:function, or a checkpoint "
    "folder (text: also a hub id). It stays here.",
)
@click.option(
    "--resize", is_flag=True, help="With --task images: scale those that are not 32x32, cropped at the centre."
)
@click.option(
    "--memory",
    help="Most memory to use, e.g. 2GiB; default: measured before each round. On a CPU it bounds the process, on a GPU "
    "what torch holds there.",
)
@click.option("--device", help="cpu, cuda, cuda:1, or the UUID of a GPU or MIG instance; default: the best one here.")
@click.option("--profile", help="Plan within the memory of another device, e.g. jetson-orin-nano-8gb.")
@click.option("--experts", default="100%", show_default=True, help="Most of the model's experts to hold, e.g. 25%.")
@click.option(
    "--compute", default="100%", show_default=True, help="Share of the held experts that learn from one batch."
)
@click.option("--expert-storage", type=click.Choice(["auto", "full", "int8", "nf4"]), default="auto", show_default=True,
              help="How experts' weights that do not learn are kept: in 8 or 4 bits, the way they come (full), or in 4 "
              "bits where memory is short (auto).")  # fmt: skip
@click.option("--profile-storage", type=click.Choice(["auto", "full", "int8", "nf4"]), default="auto",
              show_default=True, help="How a profile holds the experts that it runs through: the way they come (full), "
              "in 8 or 4 bits, or the way they come as long as each need be read only once (auto).")  # fmt: skip
@click.option("--held-out", default="10%", show_default=True, help="Share of the records kept for evaluation, or 0.")
@click.option("--state", type=click.Path(path_type=Path), default="edgefed-client", show_default=True,
              help="Folder for identity, downloads and pending updates.")  # fmt: skip
@click.option("--name", default=platform.node() or "device", help="How this device is called in `edgefed status`.")
@click.option("--token", envvar="EDGEFED_TOKEN", help="The server's token.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; default: torch's choice.")
@click.option("--json", "as_json", is_flag=True, help="Print a summary as JSON at the end.")
def join_command(
    server: str, data: str, task: str | None, model: str | None, resize: bool, memory: str | None, device: str | None,
    profile: str | None, experts: str, compute: str, expert_storage: str, profile_storage: str, held_out: str,
    state: Path, name: str, token: str | None, threads: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Join the run at SERVER (http://host:port) and train on DATA until it ends or Ctrl-C."""
    from edgefed.agent.channel import check_base_url
    from edgefed.cli.output import TerminalProgress, print_json, print_note
    from edgefed.config import parse_share
    from edgefed.errors import ConfigError
    from edgefed.hardware.budget import plan_budget
    from edgefed.hardware.memory import format_bytes, parse_bytes
    from edgefed.hardware.profiles import facts_of, find_profile

    check_base_url(server)
    expert_share, compute_share = parse_share(experts, "--experts"), parse_share(compute, "--compute")
    held_out_share = 0.0 if held_out.strip().rstrip("%") in ("0", "0.0") else parse_share(held_out, "--held-out")
    if memory and profile:
        raise ConfigError("--memory and --profile both say how much memory to use", remedy="Pass one of them.")
    if model and not task:
        raise ConfigError(
            f"--model {model} was given without --task",
            remedy="Add --task images, text or next-token, or leave it out.",
        )
    if resize and task != "images":
        raise ConfigError("--resize scales images", remedy="Add --task images, or leave it out.")
    memory_bytes = parse_bytes(memory) if memory else None
    if profile:
        memory_bytes = plan_budget(facts_of(find_profile(profile))).now_bytes

    stop = threading.Event()

    def ask_to_stop(signum: int, frame: object) -> None:
        if stop.is_set():  # the second Ctrl-C does not wait for anything
            sys.exit(130)
        stop.set()

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, ask_to_stop)

    progress = TerminalProgress()
    progress.phase("load")
    import torch

    from edgefed.join import JoinConfig, run_agent

    if threads:
        torch.set_num_threads(threads)
    config = JoinConfig(
        server=server,
        data=data,
        state=state,
        name=name,
        token=token,
        memory_bytes=memory_bytes,
        device=device,
        expert_share=expert_share,
        compute_share=compute_share,
        expert_storage=expert_storage,
        profile_storage=profile_storage,
        held_out_share=held_out_share,
        task=task,
        model=model,
        resize=resize,
    )
    progress.done()
    summary = run_agent(config, progress, stop)
    progress.done()
    if as_json:
        print_json(dataclasses.asdict(summary))
    print_note(
        f"{summary.reason}: {summary.rounds} rounds, {format_bytes(summary.bytes_down)} down, "
        f"{format_bytes(summary.bytes_up)} up"
    )
    if stop.is_set():
        sys.exit(130)
