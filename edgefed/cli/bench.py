"""``edgefed bench``: measure this device, see what fits, compare, write a profile."""

from __future__ import annotations

import datetime
from pathlib import Path

import click

INTERRUPTED = 130
OUTPUTS = ("json_path", "csv_path", "markdown_path", "plot_path")


@click.command("bench")
@click.option("--quick", "mode", flag_value="quick", help="About 30 seconds.")
@click.option("--full", "mode", flag_value="full", help="As long as it takes; allocates the whole budget.")
@click.option(
    "--model",
    help="tiny, OLMoE-1B-7B, Qwen1.5-MoE-A2.7B, gpt-oss-20b, Qwen3-30B-A3B, Mixtral-8x7B, a folder with a config.json, "
    "or a hub id; of the last two only the configuration is read.  [default: OLMoE-1B-7B]",
)
@click.option("--explain", is_flag=True, help="Show where every byte of a training step goes.")
@click.option("--device", help="cpu, cuda:N, or a GPU's or MIG instance's UUID; default: the best.")
@click.option("--memory", metavar="SIZE", help="Plan with so much, such as 8GiB, whatever the sensors say.")
@click.option("--verify", is_flag=True, help="Allocate the whole planned memory, not only a part.")
@click.option("--sustain", type=click.FloatRange(min=0), metavar="SECONDS", help="Length of the sustained run.")
@click.option("--no-sustain", is_flag=True, help="No sustained run.")
@click.option(
    "--repeats",
    type=click.IntRange(3, 1000),
    metavar="N",
    help="Samples of each test; fewer than 7 are never called stable.  [default: 7]",
)
@click.option(
    "--state",
    type=click.Path(path_type=Path),
    help="Measure the disk of this folder.  [default: the folder of temporary files]",
)
@click.option("--server", metavar="URL", help="Measure the line to this aggregator, too.")
@click.option("--token", envvar="EDGEFED_TOKEN", help="The server's token.")
@click.option("--active", is_flag=True, help="Send some megabytes to and from --server to measure its rates.")
@click.option("--no-network", is_flag=True, help="Leave the network alone, whatever the settings say.")
@click.option(
    "--uplink",
    metavar="LINE",
    help="Tell upload times for this uplink: 10mbit, 1.5MB/s, or fibre, cable, dsl, lte, 5g, wifi-bad, starlink.",
)
@click.option("--json", "json_path", metavar="PATH|-", help="Write the report as JSON; - is stdout.")
@click.option("--csv", "csv_path", metavar="PATH|-", help="Write the tests as CSV.")
@click.option("--markdown", "markdown_path", metavar="PATH|-", help="Write the tables as Markdown.")
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), help="Draw memory and what fits: .png or .svg.")
@click.option(
    "--compare",
    nargs=2,
    type=click.Path(path_type=Path),
    metavar="A.json B.json",
    help="Hold two reports against each other; nothing is measured.",
)
@click.option("--profile", help="Let a device profile stand in for the device; nothing is measured.")
@click.option("--list-profiles", is_flag=True, help="Show the device profiles.")
@click.option("--as-profile", metavar="NAME", help="Write a device profile from what was measured to stdout.")
@click.pass_context
def bench_command(ctx: click.Context, **flags: object) -> None:
    """Measure memory, bandwidth, compute, training, disk and network of this device, and what fits on it.

    About two minutes. The default and the --full run leave edgefed-bench-DATE.json and .png in this folder unless
    another output is named.
    """
    if flags["list_profiles"]:
        _list_profiles(flags["json_path"])
        return
    if flags["compare"]:
        _compare(*flags["compare"], flags["json_path"])
        return
    outputs = _check_outputs(flags)
    from edgefed.cli.output import TerminalProgress

    options = _options(flags)
    from edgefed.bench.run import run_bench, stand_in

    if flags["as_profile"]:
        _profile_text(flags, None)  # a name that cannot be is told before anything is measured

    report = stand_in(options) if options.profile else run_bench(options, TerminalProgress())
    _write(report, flags, outputs)
    if report.interrupted:
        ctx.exit(INTERRUPTED)


def _options(flags: dict):
    """What the flags mean. Raises ConfigError for flags that contradict each other."""
    import tempfile

    from edgefed.bench.options import BenchOptions
    from edgefed.errors import ConfigError
    from edgefed.hardware.memory import parse_bytes

    if flags["profile"] and flags["device"]:
        raise ConfigError(f"--profile {flags['profile']} stands in for the device: --device has no meaning beside it")
    if flags["profile"] and flags["as_profile"]:
        raise ConfigError("--as-profile writes what was measured; with --profile nothing is")
    if flags["active"] and (not flags["server"] or flags["no_network"]):
        raise ConfigError("--active measures the line to --server, and there is none")
    if flags["no_sustain"] and flags["sustain"]:
        raise ConfigError(f"--sustain {flags['sustain']:g} and --no-sustain contradict each other")
    if flags["explain"] and flags["profile"] and not flags["model"]:
        raise ConfigError("--explain with --profile needs a --model", remedy="Add --model OLMoE-1B-7B, for one.")
    if flags["state"] is not None and not flags["state"].is_dir():
        raise ConfigError(f"--state {flags['state']} is no folder", remedy="Name a folder on the disk to be measured.")
    sustain_s = 0.0 if flags["no_sustain"] else flags["sustain"]
    return BenchOptions(
        mode=flags["mode"] or "default",
        device=flags["device"],
        memory_bytes=parse_bytes(flags["memory"]) if flags["memory"] else None,
        model=flags["model"],
        explain=flags["explain"],
        server=flags["server"],
        token=flags["token"],
        active=flags["active"],
        network=not flags["no_network"],
        sustain_s=sustain_s,
        repeats=flags["repeats"],
        verify=flags["verify"],
        folder=flags["state"] or Path(tempfile.gettempdir()),
        uplink=flags["uplink"],
        profile=flags["profile"],
    )


def _check_outputs(flags: dict) -> dict[str, Path]:
    """The files to write, by flag. Refuses now what would fail after two minutes, and two documents on one stdout."""
    from edgefed.bench.formats import check_writable
    from edgefed.errors import ConfigError

    named = {name: flags[name] for name in OUTPUTS if flags[name] is not None}
    on_stdout = [name.removesuffix("_path") for name, path in named.items() if str(path) == "-"]
    if flags["as_profile"]:
        on_stdout.append("as-profile")
    if len(on_stdout) > 1:
        raise ConfigError(f"--{' and --'.join(on_stdout)} both want stdout", remedy="Give all but one a file.")
    if on_stdout == ["plot"]:
        raise ConfigError("--plot needs a file that ends in .png or .svg")
    files = {name: Path(path) for name, path in named.items() if str(path) != "-"}
    measures = not flags["profile"]
    if not named and not flags["as_profile"] and measures and flags["mode"] != "quick":
        stem = f"edgefed-bench-{datetime.datetime.now():%Y%m%d-%H%M%S}"
        files = {"json_path": Path(f"{stem}.json"), "plot_path": Path(f"{stem}.png")}
    plot = files.get("plot_path")
    if plot is not None and plot.suffix.lower() not in (".png", ".svg"):
        raise ConfigError(f"--plot {plot} ends in neither .png nor .svg")
    for path in files.values():
        check_writable(path)
    return files


def _write(report, flags: dict, files: dict[str, Path]) -> None:
    """The document that was asked for on stdout, or the tables; and the files."""
    from edgefed.bench.formats import to_csv, to_markdown, write_text
    from edgefed.bench.report import to_json
    from edgefed.cli.bench_tables import print_report
    from edgefed.cli.output import print_note

    texts = {"json_path": to_json, "csv_path": to_csv, "markdown_path": to_markdown}
    for name, path in files.items():
        if name in texts:
            write_text(path, texts[name](report))
        else:
            from edgefed.bench.plot import save_picture

            save_picture(path, report)
    piped = next((name for name in texts if flags[name] == "-"), None)
    if flags["as_profile"]:
        click.echo(_profile_text(flags, report), nl=False)
    elif piped:
        click.echo(texts[piped](report), nl=False)
    else:
        print_report(report, list(files.values()))
        return
    for path in files.values():
        print_note(f"written: {path}")


def _profile_text(flags: dict, report) -> str:
    from edgefed.bench.formats import to_profile
    from edgefed.hardware.probe import probe_device

    return to_profile(flags["as_profile"], probe_device(flags["device"]), report)


def _compare(first: Path, second: Path, json_path: str | None) -> None:
    import dataclasses
    import json

    from edgefed.bench.compare import compare_reports, conditions, differences
    from edgefed.bench.formats import check_writable, write_text
    from edgefed.bench.report import load_report
    from edgefed.cli.bench_tables import print_comparison

    if json_path not in (None, "-"):
        check_writable(Path(json_path))
    a, b = load_report(first), load_report(second)
    rows = compare_reports(a, b)
    if json_path is None:
        print_comparison(str(first), str(second), a, b, rows)
        return
    data = {
        "schema": "edgefed.bench-comparison/1",
        "a": str(first),
        "b": str(second),
        "not_comparable": {"a": conditions(a), "b": conditions(b)},
        "differences": differences(a, b),
        "tests": [dataclasses.asdict(row) for row in rows],
    }
    text = json.dumps(data, indent=2) + "\n"
    if json_path == "-":
        click.echo(text, nl=False)
    else:
        write_text(Path(json_path), text)


def _list_profiles(json_path: str | None) -> None:
    from edgefed.cli.bench_tables import print_profiles
    from edgefed.cli.output import print_json
    from edgefed.errors import ConfigError
    from edgefed.hardware.profiles import load_profiles

    profiles = load_profiles()
    if json_path is None:
        print_profiles(profiles)
    elif json_path == "-":
        figures = {name: {key: f.value for key, f in each.figures.items()} for name, each in profiles.items()}
        print_json({"profiles": figures})
    else:
        raise ConfigError("--list-profiles writes JSON to stdout only: --json -")
