"""``edgefed bench``: measure this device, see what fits, compare, write a profile."""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click

from edgefed.cli.options import command
from edgefed.config import Setting

if TYPE_CHECKING:
    from edgefed.bench.options import BenchOptions
    from edgefed.bench.report import Report

INTERRUPTED = 130
OUTPUTS = ("json", "csv", "markdown", "plot")


@dataclasses.dataclass
class BenchSettings:
    """What `edgefed bench` takes."""

    quick: Annotated[bool, Setting("About 30 seconds.")] = False
    full: Annotated[bool, Setting("As long as it takes; allocates the whole budget.")] = False
    model: Annotated[
        str | None,
        Setting("tiny, OLMoE-1B-7B, Qwen1.5-MoE-A2.7B, gpt-oss-20b, Qwen3-30B-A3B, Mixtral-8x7B, a folder with a "
                "config.json, or a hub id; of the last two only the configuration is read.", default="OLMoE-1B-7B"),
    ] = None  # fmt: skip
    explain: Annotated[bool, Setting("Show how a training step uses memory, byte by byte.")] = False
    device: Annotated[str | None, Setting("cpu, cuda:N, or the UUID of a GPU or MIG instance; default: the best.")] = (
        None
    )
    memory: Annotated[
        str | None, Setting("Plan with this much memory, e.g. 8GiB, whatever the sensors report.", metavar="SIZE")
    ] = None
    verify: Annotated[bool, Setting("Allocate the whole planned memory, not only a part.")] = False
    sustain: Annotated[float | None, Setting("Length of the sustained run.", minimum=0, metavar="SECONDS")] = None
    no_sustain: Annotated[bool, Setting("Skip the sustained run.")] = False
    repeats: Annotated[
        int | None,
        Setting("Samples of each test; a test with fewer than 7 is never called stable.", default="7", minimum=3,
                maximum=1000, metavar="N"),
    ] = None  # fmt: skip
    state: Annotated[
        Path | None, Setting("Measure the disk of this folder.", default="the folder of temporary files")
    ] = None
    server: Annotated[str | None, Setting("Also measure the connection to this server.", metavar="URL")] = None
    token: Annotated[str | None, Setting("Token of the server.", variable="EDGEFED_TOKEN", secret=True)] = None
    active: Annotated[bool, Setting("Exchange some megabytes with `server` to measure its rates.")] = False
    no_network: Annotated[bool, Setting("Skip the network, whatever the settings say.")] = False
    uplink: Annotated[
        str | None,
        Setting("Show upload times for this uplink: 10mbit, 1.5MB/s, or fibre, cable, dsl, lte, 5g, wifi-bad, "
                "starlink.", metavar="LINE"),
    ] = None  # fmt: skip
    json: Annotated[str | None, Setting("Write the report as JSON; - is stdout.", metavar="PATH|-")] = None
    csv: Annotated[str | None, Setting("Write the tests as CSV.", metavar="PATH|-")] = None
    markdown: Annotated[str | None, Setting("Write the tables as Markdown.", metavar="PATH|-")] = None
    plot: Annotated[Path | None, Setting("Draw memory and what fits: .png or .svg.")] = None
    compare: Annotated[
        tuple[Path, Path] | None, Setting("Compare two reports; nothing is measured.", metavar="A.json B.json")
    ] = None
    device_profile: Annotated[
        str | None,
        Setting("Use a device profile in place of the device; nothing is measured.", formerly="profile"),
    ] = None
    list_profiles: Annotated[bool, Setting("List the device profiles.")] = False
    as_profile: Annotated[
        str | None, Setting("Write a device profile of the measurements to stdout.", metavar="NAME")
    ] = None


@command("bench", BenchSettings)
def bench_command(settings: BenchSettings) -> None:
    """Measure this device and show which models fit.

    Measures memory, bandwidth, compute, training, disk and network in about two minutes. The default and the --full run
    leave edgefed-bench-DATE.json and .png in this folder unless another output is named.
    """
    if settings.list_profiles:
        _list_profiles(settings.json)
        return
    if settings.compare:
        _compare(*settings.compare, settings.json)
        return
    outputs = _check_outputs(settings)
    from edgefed.cli.output import TerminalProgress

    options = _options(settings)
    from edgefed.bench.run import run_bench, stand_in

    if settings.as_profile:
        _profile_text(settings, None)  # an invalid name is reported before anything is measured

    report = stand_in(options) if options.profile else run_bench(options, TerminalProgress())
    _write(report, settings, outputs)
    if report.interrupted:
        click.get_current_context().exit(INTERRUPTED)


def _options(settings: BenchSettings) -> BenchOptions:
    """The options of the run. Raises ConfigError for settings that contradict each other."""
    import tempfile

    from edgefed.bench.options import BenchOptions
    from edgefed.costs.shapes import KNOWN_SHAPES
    from edgefed.embedded import resolve_model
    from edgefed.errors import ConfigError
    from edgefed.hardware.memory import parse_bytes
    from edgefed.hub import check_source

    if settings.device_profile and settings.device:
        raise ConfigError(f"`device` has no effect beside `device_profile={settings.device_profile}`")
    if settings.device_profile and settings.as_profile:
        raise ConfigError("`as_profile` writes measurements, and with `device_profile` nothing is measured")
    if settings.active and (not settings.server or settings.no_network):
        raise ConfigError("`active` measures the connection to `server`, which is missing")
    if settings.no_sustain and settings.sustain:
        raise ConfigError(f"`sustain={settings.sustain:g}` and `no_sustain` contradict each other")
    if settings.explain and settings.device_profile and not settings.model:
        raise ConfigError(
            "`explain` with `device_profile` needs a `model`", remedy="Add `model=OLMoE-1B-7B`, for example."
        )
    if settings.model is not None and settings.model.lower() not in map(str.lower, KNOWN_SHAPES):
        check_source(resolve_model(settings.model))  # before torch is loaded
    if settings.state is not None and not settings.state.is_dir():
        raise ConfigError(f"`state={settings.state}` is not a directory", remedy="Pass one on the disk to measure.")
    sustain_s = 0.0 if settings.no_sustain else settings.sustain
    return BenchOptions(
        mode=_mode(settings),
        device=settings.device,
        memory_bytes=parse_bytes(settings.memory) if settings.memory else None,
        model=settings.model,
        explain=settings.explain,
        server=settings.server,
        token=settings.token,
        active=settings.active,
        network=not settings.no_network,
        sustain_s=sustain_s,
        repeats=settings.repeats,
        verify=settings.verify,
        folder=settings.state or Path(tempfile.gettempdir()),
        uplink=settings.uplink,
        profile=settings.device_profile,
    )


def _mode(settings: BenchSettings) -> str:
    from edgefed.errors import ConfigError

    if settings.quick and settings.full:
        raise ConfigError("`quick` and `full` contradict each other", remedy="Set one of them.")
    return "quick" if settings.quick else "full" if settings.full else "default"


def _check_outputs(settings: BenchSettings) -> dict[str, Path]:
    """The files to write, by setting.

    Raises ConfigError now for what would fail after two minutes, and for two documents on stdout.
    """
    from edgefed.bench.formats import check_writable
    from edgefed.errors import ConfigError

    named = {name: value for name in OUTPUTS if (value := getattr(settings, name)) is not None}
    on_stdout = [f"`{name}`" for name, path in named.items() if str(path) == "-"]
    if settings.as_profile:
        on_stdout.append("`as_profile`")
    if len(on_stdout) > 1:
        raise ConfigError(f"{' and '.join(on_stdout)} cannot all go to stdout", remedy="Pass files for all but one.")
    if on_stdout == ["`plot`"]:
        raise ConfigError("`plot` needs a file that ends in .png or .svg")
    files = {name: Path(path) for name, path in named.items() if str(path) != "-"}
    measures = not settings.device_profile
    if not named and not settings.as_profile and measures and not settings.quick:
        stem = f"edgefed-bench-{datetime.datetime.now():%Y%m%d-%H%M%S}"
        files = {"json": Path(f"{stem}.json"), "plot": Path(f"{stem}.png")}
    plot = files.get("plot")
    if plot is not None and plot.suffix.lower() not in (".png", ".svg"):
        raise ConfigError(f"`plot` {plot} ends in neither .png nor .svg")
    for path in files.values():
        check_writable(path)
    return files


def _write(report: Report, settings: BenchSettings, files: dict[str, Path]) -> None:
    """Write the requested document or the tables to stdout, and the files."""
    from edgefed.bench.formats import to_csv, to_markdown, write_text
    from edgefed.bench.report import to_json
    from edgefed.cli.bench_tables import print_report
    from edgefed.cli.output import print_note

    texts = {"json": to_json, "csv": to_csv, "markdown": to_markdown}
    for name, path in files.items():
        if name in texts:
            write_text(path, texts[name](report))
        else:
            from edgefed.bench.plot import save_picture

            save_picture(path, report)
    piped = next((name for name in texts if getattr(settings, name) == "-"), None)
    if settings.as_profile:
        click.echo(_profile_text(settings, report), nl=False)
    elif piped:
        click.echo(texts[piped](report), nl=False)
    else:
        print_report(report, list(files.values()))
        return
    for path in files.values():
        print_note(f"written: {path}")


def _profile_text(settings: BenchSettings, report: Report | None) -> str:
    from edgefed.bench.formats import to_profile
    from edgefed.hardware.probe import probe_device

    assert settings.as_profile is not None
    return to_profile(settings.as_profile, probe_device(settings.device), report)


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
        raise ConfigError("`list_profiles` writes JSON to stdout only: `json=-`")
