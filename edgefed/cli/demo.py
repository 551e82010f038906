"""``edgefed demo``: a whole federation on this machine, with nothing but what the package brings."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any, Literal

from edgefed.cli.options import command
from edgefed.config import Setting
from edgefed.errors import ConfigError
from edgefed.progress import Pulse, format_seconds

if TYPE_CHECKING:
    from rich.console import RenderableType

    from edgefed.cli.tables import FittedTable
    from edgefed.protocol.messages import Status
    from edgefed.simulation.demo import MethodResult
    from edgefed.simulation.personal_demo import PersonalClientResult

USUAL_S, USUAL_METHOD_S, USUAL_PERSONAL_S = 85.0, 45.0, 45.0
"""Time of the demo on two idle cores with its usual settings, of each further method, and of that of fedmoe."""
COMPARED = ("slices", "hfedmoe", "flux", "random", "local", "fedavg")


@dataclasses.dataclass
class DemoSettings:
    """What `edgefed demo` takes."""

    out: Annotated[Path, Setting("Folder for everything the demo writes.")] = Path("edgefed-demo")
    method: Annotated[str, Setting("slices, hfedmoe, flux, fedmoe, or a baseline.")] = "slices"
    compare: Annotated[bool, Setting("Also run the other methods on the same seed, into table and picture.")] = False
    rounds: Annotated[int | None, Setting("Number of rounds.", default="4; fedmoe: 20", minimum=1)] = None
    clients: Annotated[int | None, Setting("Number of clients.", default="4; fedmoe: 5", minimum=1)] = None
    local_steps: Annotated[int | None, Setting("Optimizer steps of a client in a round.", default="12", minimum=1)] = (
        None
    )
    learning_rate: Annotated[float | None, Setting("Learning rate of clients.", default="0.001", above=0)] = None
    private: Annotated[
        Literal["none", "adapter"], Setting("Private part of the clients, which never leaves them.")
    ] = "none"  # fmt: skip
    seed: Annotated[int, Setting("Seed of the run.", minimum=0)] = 0
    json: Annotated[bool, Setting("Print the results as JSON.")] = False

    def given(self, *names: str) -> dict[str, Any]:
        """Those of the named settings that are not None."""
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@command("demo", DemoSettings)
def demo_command(settings: DemoSettings) -> None:
    """Run a whole federation on this machine.

    An aggregator and unequal agents train over loopback, on text or images that come with edgefed.
    """
    from edgefed.cli.output import print_json, stdout_console
    from edgefed.methods.registry import make_method

    out, method = settings.out, settings.method
    made = make_method(method)
    if settings.private != "none" and (made.personal or not made.exchanges):
        raise ConfigError(f"`private` has no effect with {method}: everything is private", remedy="Remove it.")
    if made.personal:  # an unknown method is reported before anything starts
        for name in settings.given("local_steps", "learning_rate"):
            raise ConfigError(f"`{name}` has no effect in the demo of {method}", remedy="Remove it.")
        show_personal_demo(settings)
        return
    started = time.monotonic()
    from edgefed.simulation.demo import RESULT_FILE, DemoConfig, as_dict, run_demo

    methods = (method, *(name for name in COMPARED if settings.compare and name != method))
    given = settings.given("rounds", "clients", "local_steps", "learning_rate")
    config = DemoConfig(out=out, methods=methods, seed=settings.seed, private=settings.private, **given)
    config.check()
    usual_s = USUAL_S + (len(methods) - 1) * USUAL_METHOD_S
    with DemoDisplay(config.rounds, len(methods), usual_s) as display:
        results = run_demo(config, display)
    from edgefed.simulation.evaluation import generate_sample

    sample = generate_sample(out / "model")
    data = as_dict(config, results, sample)
    (out / RESULT_FILE).write_text(json.dumps(data, indent=2) + "\n")
    if settings.json:
        print_json(data)
        return
    console = stdout_console()
    for part in render_results(results):
        console.print(part)
    console.print()
    console.print("the final model continues a prompt:", style="dim")
    for line in sample.splitlines():
        console.print(f"  | {line}", markup=False)
    console.print()
    console.print(f"picture     {out / 'demo.png'}", markup=False)
    console.print(
        f"checkpoint  {out / 'model'}   AutoModelForCausalLM.from_pretrained({str(out / 'model')!r})", markup=False
    )
    console.print(f"{time.monotonic() - started:.0f} s in all", markup=False)


def render_results(results: Sequence[MethodResult]) -> list[RenderableType]:
    """Tables: losses and costs of the first method's clients, and the methods against each other if several ran."""
    from rich.text import Text

    from edgefed.cli.tables import Column, FittedTable, comparison_table
    from edgefed.hardware.memory import format_bytes
    from edgefed.protocol.comparison import overall_verdict

    first = results[0]
    compared = {client.name: client.comparison for client in first.clients}
    sliced = any(client.neuron_shares for client in first.clients)
    clients = FittedTable(
        Column("client", name=True), Column("budget"),
        Column("% of each layer's neurons" if sliced else "resident experts by layer", drop=2),
        Column("trained neurons" if sliced else "trained"),
        Column("down", drop=3), Column("up", drop=1), Column("peak expert memory"), Column("peak RSS", drop=4),
        title=f"{first.method}: what it cost each client",
    )  # fmt: skip
    for client in first.clients:
        clients.add_row(
            client.name, f"{100 * client.expert_share:.0f} %",
            " ".join(f"{100 * share:.0f}" for share in client.neuron_shares) or " ".join(map(str, client.held)),
            f"{100 * fmean(client.neuron_shares):.1f} %" if client.neuron_shares else str(sum(client.trained)),
            format_bytes(client.bytes_down), format_bytes(client.bytes_up),
            format_bytes(client.peak_expert_bytes), format_bytes(client.peak_rss_bytes),
        )  # fmt: skip
    parts: list[RenderableType] = [
        comparison_table(compared), Text(overall_verdict(compared.values())), Text(""), clients,
    ]  # fmt: skip
    if len(results) > 1:
        methods = FittedTable(
            Column("method", name=True), Column("held-out loss, global model"), Column("on device"),
            Column("down", drop=3), Column("up", drop=1), Column("largest expert memory", drop=2),
            Column("smallest", drop=4), Column("server peak", drop=5), title="methods, means over clients",
        )  # fmt: skip
        for result in results:
            everyone = result.clients
            peaks = [client.peak_expert_bytes for client in everyone]
            before, after = (
                sum(getattr(c, at) for c in everyone) / len(everyone) for at in ("device_before", "device_after")
            )
            losses = result.mean_global_losses
            methods.add_row(
                result.method, f"{losses[0]:.3f} -> {losses[-1]:.3f}", f"{before:.3f} -> {after:.3f}",
                format_bytes(sum(c.bytes_down for c in everyone)), format_bytes(sum(c.bytes_up for c in everyone)),
                format_bytes(max(peaks)), format_bytes(min(peaks)), format_bytes(result.server_peak_rss_bytes),
            )  # fmt: skip
        parts += [Text(""), methods]
    return parts


# ``edgefed demo --method fedmoe``: its progress and its table.


def show_personal_demo(settings: DemoSettings) -> None:
    """Run the demo of FedMoE and print its results."""
    from edgefed.cli.output import print_json, stdout_console
    from edgefed.simulation.demo import PICTURE_FILE, RESULT_FILE
    from edgefed.simulation.personal_demo import (
        COMPARED,
        GATES_FILE,
        PersonalDemoConfig,
        as_personal_dict,
        run_personal_demo,
    )

    started = time.monotonic()
    out, given = settings.out, settings.given("rounds", "clients")
    if settings.compare:
        given["compared"] = COMPARED
    config = PersonalDemoConfig(out=out, seed=settings.seed, **given)
    config.check()
    with DemoDisplay(config.rounds, 1, USUAL_PERSONAL_S) as display:
        results = run_personal_demo(config, display)
    data = as_personal_dict(config, results)
    (out / RESULT_FILE).write_text(json.dumps(data, indent=2) + "\n")
    if settings.json:
        print_json(data)
        return
    console = stdout_console()
    console.print(render_clients(results))
    console.print()
    console.print(f"picture     {out / PICTURE_FILE}, {out / GATES_FILE}", markup=False)
    console.print(f"mixtures    {out / 'fedmoe' / 'clients'}/*/personal: they never left their client", markup=False)
    console.print(f"{time.monotonic() - started:.0f} s in all", markup=False)


def render_clients(results: Sequence[PersonalClientResult]) -> FittedTable:
    """A row for each client, and the mean."""
    from edgefed.cli.tables import Column, FittedTable
    from edgefed.hardware.memory import format_bytes

    others = list(results[0].others)
    table = FittedTable(
        Column("client", name=True), Column("model", drop=12, left=True), Column("weights", drop=15),
        Column("classes", drop=13), Column("images", drop=14), Column("up", drop=16), Column("peak RSS", drop=17),
        Column("weight of shared", drop=11), *(Column(name, drop=place) for place, name in enumerate(others)),
        Column("fedmoe"), title="fedmoe: held-out accuracy of each client's own model",
    )  # fmt: skip
    for result in results:
        table.add_row(
            result.name, result.model, f"{result.parameters:,}", str(result.classes), str(result.examples),
            format_bytes(result.bytes_up), format_bytes(result.peak_rss_bytes),
            f"{100 * result.shared_weight:.0f} %", *(f"{100 * result.others[name]:.1f} %" for name in others),
            f"{100 * result.accuracy[-1]:.1f} %",
        )  # fmt: skip
    count = len(results)
    means = [sum(result.others[name] for result in results) / count for name in others]
    means.append(sum(result.accuracy[-1] for result in results) / count)
    table.add_section()
    table.add_row("mean", *[""] * 7, *(f"{100 * mean:.1f} %" for mean in means))
    return table


# What the demo shows while it runs: tables on a terminal, lines elsewhere, and how long it will still take.

START_SHARE, ROUNDS_SHARE, COMPARE_SHARE = 0.24, 0.35, 0.29
"""Shares of a method's time: its processes start, its rounds, and, of the first method, the clients compare. Estimates;
the rest goes into the evaluation of the global models."""
LEAST_SHARE = 0.05
"""Before this share is done, the time that is left is unknown."""
MUCH_LATER = 1.25
LEAST_LEFT_S = 1.0


class DemoDisplay:
    """Live progress of the demo. ``usual_s``: how long it takes on two cores, said at the start.

    A line is printed once, when something has happened. What goes on since, and how long it may take, is a line below
    the table of a terminal; elsewhere it is printed after seconds of silence.
    """

    def __init__(self, rounds: int, methods: int, usual_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.live import Live

        from edgefed.cli.output import stderr_console

        self._console = stderr_console()
        self._rounds, self._num_methods, self._usual_s, self._clock = rounds, methods, usual_s, clock
        self._seen_rounds = self._methods = 0
        self._share = 0.0
        self._started = clock()
        self._due: float | None = None
        self._doing = ""
        self._table: RenderableType = ""
        self._pulse: Pulse | None = None
        live = self._console.is_terminal
        self._live = Live(console=self._console, auto_refresh=False, transient=True) if live else None

    def __enter__(self) -> DemoDisplay:
        if self._live:
            self._live.start()
        self.note(f"with its usual settings, this takes about {format_seconds(self._usual_s)} on two idle cores")
        return self

    def __exit__(self, *_: object) -> None:
        self._end_pulse()
        if self._live:
            self._live.stop()

    def method(self, name: str) -> None:
        """Report the start of a method's run."""
        self._methods += 1
        self._seen_rounds = 0
        self._share = 0.0
        self.note(f"{name}: starting the aggregator and the agents", "starting")

    def status(self, status: Status) -> None:
        """Show the status of the run, and a line for each round that ended since the last call."""
        from edgefed.cli.status import render_status
        from edgefed.methods.registry import is_personal
        from edgefed.progress import round_line

        for done in status.history[self._seen_rounds :]:
            received = f"{done.updates} of {done.participants} clients"
            line = round_line(done.server_round, self._rounds, done.metrics, done.seconds, received)
            self._reach(START_SHARE + ROUNDS_SHARE * done.server_round / self._rounds)
            self.note(f"{status.run.method}: {line}", f"round {min(done.server_round + 1, self._rounds)}")
        ended = status.state == "finished" and self._seen_rounds < len(status.history)
        if ended and self._methods == 1 and not is_personal(status.run.method):
            text = "comparing: the clients evaluate the final model and train alone, as long as the rounds took"
            self.note(text, "comparing")
        self._seen_rounds = len(status.history)
        height = None if self._console.height is None else self._console.height - 1
        self._table = render_status(status, height, devices=False)  # they are all this one
        self._draw()

    def evaluated(self, models: int, of: int) -> None:
        """Report that ``models`` of the global models are evaluated."""
        before = START_SHARE + ROUNDS_SHARE + (COMPARE_SHARE if self._methods == 1 else 0.0)
        self._reach(before + (1 - before) * models / of)
        self.note(f"evaluated {models} of {of} global models", "evaluating")

    def note(self, text: str, doing: str = "") -> None:
        """Print one line, with the time that is left where it is known. ``doing``: what goes on from now, in a word."""
        self._end_pulse()
        if not doing.startswith(("round", "comparing")):
            self._table = ""  # the run is over: its last state says nothing of what goes on
        self._doing = doing or text
        self._draw()
        left = self._left()
        self._console.print(f"{text} ({left})" if left else text, markup=False)
        self._pulse = Pulse(self._still)
        self._pulse.__enter__()

    def _still(self, seconds: float) -> None:
        if self._live:
            self._draw()
        else:
            self._console.print(f"{self._doing}: {self._so_far(seconds)}", markup=False)

    def _so_far(self, seconds: float) -> str:
        return ", ".join(filter(None, [f"{format_seconds(seconds)} so far", self._left()]))

    def _draw(self) -> None:
        from rich.console import Group
        from rich.text import Text

        if self._live:
            footer = ", ".join(filter(None, [self._doing, self._left()]))
            self._live.update(Group(self._table, Text(footer, style="dim", no_wrap=True)), refresh=True)

    def _reach(self, share: float) -> None:
        """Note that this share of the method is done, and estimate when all is done.

        The time left counts down: a new estimate replaces the old one only if it is much later.
        """
        self._share = share
        done = (max(0, self._methods - 1) + share) / self._num_methods
        if done < LEAST_SHARE:
            return
        now = self._clock()
        due = now + (now - self._started) * (1 - done) / done
        if self._due is None or due < self._due or due - now > MUCH_LATER * (self._due - now):
            self._due = due

    def _left(self) -> str:
        """``about 40 s left``; nothing where that is unknown, or past."""
        left = 0.0 if self._due is None else self._due - self._clock()
        return f"about {format_seconds(left)} left" if left >= LEAST_LEFT_S else ""

    def _end_pulse(self) -> None:
        if self._pulse is not None:
            self._pulse.__exit__()
            self._pulse = None
