"""Run every check, dangerous ones in a worker process, and collect the findings.

A check that raises becomes a finding itself; only a wrong option (a device name, an address) ends the examination.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from edgefed.disk import write_durably
from edgefed.doctor import host, jetson, packages, sensors
from edgefed.doctor.finding import Diagnosis, Finding, Group, State
from edgefed.doctor.kernel_findings import REBUILD, backend_findings, proof_findings
from edgefed.doctor.packages import TorchBuild, install_command, recorded_torch_findings, torch_findings
from edgefed.errors import ConfigError, DeviceNotFound, StorageError
from edgefed.hardware.budget import plan_budget
from edgefed.hardware.facts import DeviceFacts
from edgefed.isolation.worker import Outcome, Worker
from edgefed.kernels.proof import prove_again, standard_cases

IMPORT_LIMIT_S = 180.0
"""For importing torch and starting CUDA: over a minute from a cold SD card."""
KERNEL_LIMIT_S = 120.0
"""For one kernel, compiling it included."""
SENSOR_LIMIT_S = 30.0
KERNELS = "edgefed.doctor.kernel_runs"
SHORT_ROWS = "NF4 of short rows"
QUERIES = "edgefed.doctor.queries"
QUICK = "no kernel was run and nothing was written to the disk (`quick`): the arithmetic was not checked"
NO_SERVER = "the connection to a server was not tested (set `server`); a client needs no open port"
REPLAYED = "a recording was examined, not this machine: sensors only, no packages, kernels, disk or network"


OnCheck = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Options:
    """What to examine. ``device`` None takes the best one; ``state`` is where `edgefed join` keeps its files."""

    device: str | None = None
    state: Path = Path("edgefed-client")
    server: str | None = None
    token: str | None = None
    quick: bool = False
    prove: bool = False

    @property
    def gpu_requested(self) -> bool:
        """Whether ``device`` names a GPU."""
        return self.device not in (None, "auto", "cpu")


def examine(options: Options, on_check: OnCheck = lambda name: None) -> Diagnosis:
    """Examine this machine. ``on_check`` gets the name of the next check.

    Raises ConfigError when an option itself is wrong; a device that is not there is a problem, not an error.
    """
    findings: list[Finding] = []
    left_out = [QUICK] if options.quick else []
    on_check("packages")
    findings += _guarded(Group.PACKAGES, lambda: packages.package_findings(packages.own_requirements()))
    with Worker() as worker:
        if not options.quick:
            on_check("native part")
            findings.append(native_finding(worker))
        # Without torch first: a driver that hangs is then found in seconds, and by its own name.
        on_check("sensors")
        alone = worker.call(f"{QUERIES}:sensors", SENSOR_LIMIT_S, device=None, ask_torch=False)
        on_check("torch")
        build, torch_errors = _torch(worker, SENSOR_LIMIT_S if alone.died else IMPORT_LIMIT_S)
        facts, sensor_errors = _sensors(worker, options, alone, ask_torch=build is not None)
        findings += sensor_errors
        if facts is not None:
            findings += judge_facts(facts, gpu_requested=options.gpu_requested)
            command = torch_command(facts)
            if build is not None:
                findings += _guarded(
                    Group.TORCH, lambda: torch_findings(facts, build, command, gpu_requested=options.gpu_requested)
                )
        if not any(finding.name == "torch" and finding.state is State.PROBLEM for finding in findings):
            findings += torch_errors  # otherwise the check of packages has reported it
        if build is not None and facts is not None and not options.quick:
            findings += _kernels(worker, facts, on_check)
        if build is not None:
            on_check("kernel backends")
            place = _training_device(facts)
            findings += backend_findings(worker.call(f"{QUERIES}:kernel_table", IMPORT_LIMIT_S, device=place))
            if options.prove and any(f.group is Group.TORCH and f.state is State.PROBLEM for f in findings):
                left_out.append("the kernels were not proved, because torch has a problem on this device")
            elif options.prove:
                prove_again(place, standard_cases(), on_message=on_check)  # torch is sound: this process may import it
            findings += proof_findings(worker.call(f"{QUERIES}:kernel_verdicts", IMPORT_LIMIT_S, device=place), place)
    on_check("disk")
    findings += _guarded(
        Group.HOST,
        lambda: [
            host.disk_finding(host.probe_disk(options.state, write=not options.quick), options.state),
            host.clock_finding(time.time(), host.installed_time_s()),
        ],
    )
    server = options.server
    if server is None:
        left_out.append(NO_SERVER)
    else:
        on_check("server")
        findings += _guarded(Group.NETWORK, lambda: host.server_findings(server, options.token))
    return Diagnosis(_device_name(facts, options.device), tuple(findings), facts, tuple(left_out), not options.quick)


def examine_recording(facts: DeviceFacts) -> Diagnosis:
    """What the recorded sensors of another machine, or of this one at another time, say."""
    findings = [*judge_facts(facts), *recorded_torch_findings(facts, torch_command(facts))]
    return Diagnosis(_device_name(facts, None), tuple(findings), facts, (REPLAYED,), arithmetic_ran=False)


def judge_facts(facts: DeviceFacts, *, gpu_requested: bool = False) -> list[Finding]:
    """Every finding that follows from the hardware facts alone. The same facts give the same findings."""

    def of_memory() -> list[Finding]:
        return sensors.memory_findings(facts, plan_budget(facts, for_training=True), plan_budget(facts))

    return [
        *_guarded(Group.GPU, lambda: sensors.gpu_findings(facts, gpu_requested=gpu_requested)),
        *_guarded(Group.MEMORY, of_memory),
        *_guarded(Group.JETSON, lambda: jetson.jetson_findings(facts)),
        *_guarded(Group.HOST, lambda: host.host_findings(facts)),
    ]


def torch_command(facts: DeviceFacts) -> str:
    """The line that installs a torch for this machine: a Jetson's own route, or PyTorch's."""
    route = jetson.wheel_route(facts.tegra.l4t.value) if facts.tegra is not None else None
    return route.command if route is not None else install_command(facts)


def _guarded(group: Group, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """The check's findings, or one that says that the check itself failed. ConfigError passes: the user's mistake."""
    try:
        return list(check())
    except ConfigError:
        raise
    except Exception as caught:  # an unexpected error must not end the examination
        text = f"the check failed: {type(caught).__name__}: {caught}"
        return [
            Finding(
                group, "check", State.PROBLEM, text, "This is a bug of edgefed; the check gave no result.",
                "Report it with a recording (`record` of `edgefed doctor`).",
            )
        ]  # fmt: skip


def native_finding(worker: Worker) -> Finding:
    """Whether the native library works: its fold, compared with numpy."""
    outcome = worker.call(f"{KERNELS}:native_fold", KERNEL_LIMIT_S)
    if outcome.ok:
        return Finding(Group.NATIVE, "native library", State.OK, str(outcome.value))
    if outcome.failure.startswith("NativeUnavailable"):
        return Finding(
            Group.NATIVE, "native library", State.NOTE, outcome.failure.partition(": ")[2],
            "Only an aggregator uses it. Without it, updates are folded with numpy: same bits, slower.",
            "Where a C++ compiler is present, install edgefed again from its source folder.", REBUILD,
        )  # fmt: skip
    return Finding(
        Group.NATIVE, "native library", State.PROBLEM, _words(outcome),
        "Aggregates of a server on this machine would be wrong, or the server would die.",
        "Build it again on this machine, from edgefed's source folder.", REBUILD,
    )  # fmt: skip


def _torch(worker: Worker, limit_s: float) -> tuple[TorchBuild | None, list[Finding]]:
    outcome = worker.call(f"{QUERIES}:torch_build", limit_s)
    if outcome.ok:
        return msgspec.convert(outcome.value, TorchBuild), []
    absent = outcome.failure.startswith("ModuleNotFoundError: No module named 'torch'")
    return None, [
        Finding(
            Group.TORCH, "torch", State.PROBLEM,
            "not installed" if absent else f"importing it fails: {outcome.failure}",
            "Training needs it.", "Install the PyTorch that fits this machine (pytorch.org).",
            "pip install torch" if absent else "pip install --force-reinstall torch",
        )
    ]  # fmt: skip


def _sensors(
    worker: Worker, options: Options, alone: Outcome, *, ask_torch: bool
) -> tuple[DeviceFacts | None, list[Finding]]:
    """Return the facts of the requested device; if it is not found, those of the best one and a problem.

    ``alone`` is the result without torch. It replaces a failed result with torch; after a crash no second call is made.
    """
    if alone.died:
        return None, [_sensor_problem(alone, "Memory and GPU of this device are unknown.")]
    outcome = worker.call(f"{QUERIES}:sensors", SENSOR_LIMIT_S, device=options.device, ask_torch=ask_torch)
    problems = []
    if isinstance(outcome.error, DeviceNotFound):
        problems.append(
            Finding(
                Group.GPU, "device", State.PROBLEM, outcome.failure, "`device` asks for it.", outcome.error.remedy
            )
        )  # fmt: skip
        outcome = worker.call(f"{QUERIES}:sensors", SENSOR_LIMIT_S, device=None, ask_torch=ask_torch)
    if isinstance(outcome.error, ConfigError):
        raise outcome.error
    if not outcome.ok:
        problems.append(_sensor_problem(outcome, "The sensors below were read without torch." if alone.ok else ""))
        outcome = alone
    return (msgspec.convert(outcome.value, DeviceFacts) if outcome.ok else None), problems


def _sensor_problem(outcome: Outcome, why: str) -> Finding:
    return Finding(
        Group.GPU, "sensors", State.PROBLEM, f"they cannot be read: {outcome.failure}", why,
        "Run `nvidia-smi`: if it fails or hangs as well, reinstall the driver or reboot.", "nvidia-smi",
    )  # fmt: skip


def _kernels(worker: Worker, facts: DeviceFacts, on_check: OnCheck) -> list[Finding]:
    """Run the arithmetic where training would run it."""
    on_gpu = facts.trains_on_gpu
    device = _training_device(facts)
    findings = []
    command = torch_command(facts)

    def run(name: str, target: str, state: State, why: str, fix: str, command: str, at: Worker, **more: object) -> bool:
        on_check(name)
        outcome = at.call(f"{KERNELS}:{target}", KERNEL_LIMIT_S, device=device, **more)
        if outcome.ok:
            findings.append(Finding(Group.TORCH, name, State.OK, f"on {device}: {outcome.value}"))
        else:
            findings.append(Finding(Group.TORCH, name, state, f"on {device}: {_words(outcome)}", why, fix, command))
        return outcome.ok

    build = "Install a torch built for this machine."
    for dtype, state, why in (
        ("float32", State.PROBLEM, "Training results would be wrong."),
        ("bfloat16", State.PROBLEM, "Published Mixture-of-Experts models are stored in bfloat16."),
        ("float16", State.WARNING, "Models that are stored in float16 cannot be trained here."),
    ):
        run(f"matmul {dtype}", "matmul", state, why, build, command, worker, dtype=dtype)
    run("expert layer", "masked_experts", State.PROBLEM, "Every round trains it.", build, command, worker)
    if packages.installed_version("bitsandbytes"):
        findings += bitsandbytes_findings(worker, facts, device, on_check)
    if packages.installed_version("triton"):
        # Triton reads this when it is imported, so the interpreter needs a process of its own.
        with Worker(None if on_gpu else {"TRITON_INTERPRET": "1"}) as another:
            run(
                "triton kernel", "triton_kernel", State.WARNING, "Kernels fall back to their slower PyTorch versions.",
                "Install the Triton that belongs to this torch; it also needs a C compiler.",
                "pip install --force-reinstall triton", another,
            )  # fmt: skip
    return findings


def bitsandbytes_findings(worker: Worker, facts: DeviceFacts, device: str, on_check: OnCheck) -> list[Finding]:
    """Which kernels of bitsandbytes are right on the device: each is run."""
    l4t = (facts.tegra.l4t.value or "") if facts.tegra is not None else ""
    fix, command = "Install another version, or leave it out.", "pip install --force-reinstall bitsandbytes"
    if l4t.startswith("36."):
        fix, command = "Build it on this Jetson; the wheel is for another CUDA.", jetson.BITSANDBYTES_BUILD
    findings = []
    for name, target, options, why in (
        ("bitsandbytes 4-bit", "nf4", {"columns": 64}, "Its models in NF4 cannot run; edgefed reads and trains them."),
        (SHORT_ROWS, "nf4", {"columns": 16}, "Matrices with rows that are no multiple of 64 cannot be in its NF4."),
        ("bitsandbytes 8-bit", "int8_product", {}, "Its models in 8 bits cannot run; edgefed reads and trains them."),
        ("bitsandbytes AdamW", "eight_bit_step", {}, "A plan keeps the state of AdamW in full, which takes memory."),
    ):
        on_check(name)
        outcome = worker.call(f"{KERNELS}:{target}", KERNEL_LIMIT_S, device=device, **options)
        found = f"on {device}: {outcome.value if outcome.ok else _words(outcome)}"
        if outcome.ok and name != SHORT_ROWS:
            findings.append(Finding(Group.TORCH, name, State.OK, found))
        elif not outcome.ok and name != SHORT_ROWS:
            findings.append(Finding(Group.TORCH, name, State.WARNING, found, why, fix, command))
        elif not outcome.ok and findings[0].state is State.OK:
            findings.append(Finding(Group.TORCH, name, State.NOTE, found, why))
    return findings


def _training_device(facts: DeviceFacts | None) -> str:
    """The device that training uses, as torch names it."""
    on_gpu = facts is not None and facts.trains_on_gpu and facts.gpu is not None
    return f"cuda:{facts.gpu.cuda_index}" if on_gpu and facts is not None and facts.gpu is not None else "cpu"


def _words(outcome: Outcome) -> str:
    """Why a kernel run failed; a wrong result needs no exception's name."""
    return outcome.failure.removeprefix("WrongResult: ")


def _device_name(facts: DeviceFacts | None, asked: str | None) -> str:
    if facts is None:
        return asked or "this device"
    if facts.gpu is not None and facts.gpu.name.value:
        return facts.gpu.name.value
    if facts.tegra is not None and facts.tegra.model.value:
        return facts.tegra.model.value
    return facts.host.cpu_name.value or "this device"


@dataclasses.dataclass(frozen=True)
class Recorded:
    """``without_torch`` says why torch's part is missing; empty when it is there."""

    size_bytes: int
    without_torch: str = ""


def record_to(path: Path, device: str | None, *, force: bool) -> Recorded:
    """Read every sensor and write the recording to ``path``, whole or not at all.

    Raises ConfigError when ``path`` exists and not ``force``, DeviceNotFound, and StorageError when it cannot be
    written or the sensors cannot be read.
    """
    if path.exists() and not force:
        raise ConfigError(f"{path} already exists", remedy="Choose another name, or set `force` to replace it.")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ConfigError(
            f"cannot write {path}: not a file in an existing folder", remedy="Pass a file in an existing folder."
        )
    without_torch = ""
    with Worker() as worker:
        outcome = worker.call(f"{QUERIES}:recording", IMPORT_LIMIT_S, device=device, ask_torch=True)
        if outcome.died:
            without_torch = outcome.failure
            outcome = worker.call(f"{QUERIES}:recording", SENSOR_LIMIT_S, device=device, ask_torch=False)
    if outcome.error is not None:
        raise outcome.error
    if not outcome.ok:
        raise StorageError(
            f"the sensors cannot be read: {outcome.failure}",
            remedy="Run `nvidia-smi`: if it fails or hangs as well, reinstall the driver or reboot.",
        )
    data = json.dumps(outcome.value, indent=1, sort_keys=True).encode()
    write_durably(path.absolute(), data, mode=0o644)
    return Recorded(len(data), without_torch)
