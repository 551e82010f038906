"""The device proves its kernels: each backend runs in a process of its own, and what is found becomes a `Verdict`.

    prove("cuda:0", cases, on_message=print)     every backend in every case that has no verdict yet
    prove_wanted("cuda:0", ...)                  the cases that ran without a verdict, before training, in bounded time
    standard_cases(...)                          what training a model of some size will ask for
    backends_in_use("cuda:0")                    which backend runs in each known case, and why

A backend is right if its output and all gradients equal those of float32 within the roundings of its dtype, with the
same bits from run to run; it is used if it also takes at most 1/1.1 of the reference's time, host included. What
crashes or hangs takes only the worker process down. "trying" is written before a backend runs, so that what takes the
whole machine down is not tried again. Nothing here runs inside a training step.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import msgspec

from edgefed.isolation.worker import Outcome, Worker
from edgefed.kernels.dispatch import OPERATIONS, choose, needs_proof, provable_backends
from edgefed.kernels.verdicts import ROWS, Case, Verdict, Verdicts, has_verdicts, now, reload_verdicts, verdicts_of

START_LIMIT_S = 180.0
"""For importing torch and starting CUDA in the worker process: over a minute from a cold SD card."""
RUN_LIMIT_S = 120.0
"""For one backend in one case, compiling it included."""
TRAINING_LIMIT_S = 60.0
"""For all proofs before a round. Cases that do not fit into it wait for the next round."""

RUNS = "edgefed.kernels.proof_runs"

OnMessage = Callable[[str], None]


def prove(
    device: str,
    cases: Iterable[Case],
    *,
    on_message: OnMessage = lambda text: None,
    limit_s: float = float("inf"),
    run_limit_s: float = RUN_LIMIT_S,
    imports: Sequence[str] = (),
    again: bool = False,
) -> list[Verdict]:
    """Prove every backend that can run on ``device`` in every case, and return the new verdicts.

    Args:
        device: "cpu" or "cuda:N".
        cases: in the order of their importance.
        on_message: gets a line before each run and after it.
        limit_s: no run starts after this time; the last one ends in time, too.
        run_limit_s: for one backend in one case; a hung one is ended and never used.
        imports: modules that register further backends, imported in the worker process.
        again: prove cases with a verdict again.

    """
    verdicts = verdicts_of(device)
    pending = [
        (case, backend)
        for case in cases
        for backend in provable_backends(case.operation, device)
        if again or verdicts.get(case, backend) is None
    ]
    pending = list(dict.fromkeys(pending))
    if not pending:
        return []
    found: list[Verdict] = []
    started = time.monotonic()
    with verdicts.proving() as alone:
        if not alone:
            on_message("kernels: another process is proving them; the reference runs until it is done")
            return []
        with Worker() as worker:
            for number, (case, backend) in enumerate(pending, start=1):
                left = limit_s - (time.monotonic() - started)
                if left <= 0:
                    on_message(f"kernels: {len(pending) - number + 1} of {len(pending)} proofs are left for later")
                    break
                on_message(f"kernels: proving {backend} on {device} ({number} of {len(pending)}): {case}")
                start = worker.call(f"{RUNS}:start", min(START_LIMIT_S, left), device=device, imports=list(imports))
                left = limit_s - (time.monotonic() - started)
                verdict = None
                if start.ok and left > 0:
                    verdict = _run(worker, verdicts, device, case, backend, min(run_limit_s, left), left)
                if verdict is None:
                    reason = start.failure or "out of time"
                    on_message(f"kernels: {len(pending) - number + 1} proofs are left for later: {reason}")
                    break
                found.append(verdict)
                on_message(f"kernels: {backend} on {device}: {verdict.describe()}")
    return found


def _run(
    worker: Worker, verdicts: Verdicts, device: str, case: Case, backend: str, limit_s: float, left_s: float
) -> Verdict | None:
    """Prove one backend in one case and record it; None if the time of all proofs ran out first."""
    before = verdicts.get(case, backend)
    verdicts.record(Verdict(case, backend, "trying", "the process or the machine stopped while it ran", when=now()))
    verdict = None
    try:
        outcome = worker.call(f"{RUNS}:prove", limit_s, device=device, case=dataclasses.asdict(case), backend=backend)
        if not (outcome.died and limit_s >= left_s):
            verdict = verdict_from(outcome, case, backend)
    finally:  # interrupted, or out of time: as before
        verdicts.forget((case, backend))
        kept = verdict or before
        if kept is not None:
            verdicts.record(kept)
    return verdict


def verdict_from(outcome: Outcome, case: Case, backend: str) -> Verdict:
    """Return the verdict that a worker's outcome means."""
    if outcome.ok:
        fields = msgspec.convert(outcome.value, dict[str, str | float])
        return msgspec.convert({"case": dataclasses.asdict(case), "backend": backend, "when": now(), **fields}, Verdict)
    state = "died" if outcome.died else "failed"
    return msgspec.convert(
        {"case": dataclasses.asdict(case), "backend": backend, "state": state, "reason": outcome.failure[:500],
         "when": now()}, Verdict,
    )  # fmt: skip


def prove_wanted(
    device: str,
    cases: Iterable[Case] = (),
    *,
    on_message: OnMessage = lambda text: None,
    limit_s: float = TRAINING_LIMIT_S,
    imports: Sequence[str] = (),
) -> list[Verdict]:
    """Prove what earlier runs wanted, and ``cases``, before training; nothing if no backend here needs proof."""
    if not needs_proof(device):
        return []
    wanted = [*verdicts_of(device).wanted(), *cases]
    return prove(device, wanted, on_message=on_message, limit_s=limit_s, imports=imports)


def prove_again(
    device: str,
    cases: Iterable[Case] = (),
    *,
    on_message: OnMessage = lambda text: None,
    run_limit_s: float = RUN_LIMIT_S,
    imports: Sequence[str] = (),
) -> list[Verdict]:
    """Discard every verdict on the device, and prove those cases, the wanted ones and ``cases`` anew."""
    reload_verdicts()
    verdicts = verdicts_of(device)
    known = [row.case for row in verdicts.all() if row.case.dtype != "any"]
    verdicts.clear()
    every = [*verdicts.wanted(), *known, *cases]
    return prove(device, every, on_message=on_message, run_limit_s=run_limit_s, imports=imports)


def standard_cases(hidden: int = 2048, width: int = 1024, experts: int = 64, dtype: str = "bfloat16") -> Iterator[Case]:
    """Yield what a round of a model asks for, most important first: by default of OLMoE-1B-7B."""

    def layer(storage: str, rows: int, trains: str, rank: int = 0, form: str = "swiglu") -> Case:
        return Case("masked_experts", dtype, storage, hidden, width, rows, rank, trains, form)

    some, many = ROWS[1:]
    yield layer("dense+nf4", many, "weights")
    yield layer("dense", many, "weights")
    yield layer("nf4", many, "nothing")
    yield layer("nf4", some, "nothing")
    yield layer("dense", many, "nothing")
    yield layer("nf4", ROWS[0], "nothing")
    yield layer("nf4", many, "weights", rank=8)
    yield layer("nf4", many, "nothing", form="swiglu+energies")
    yield Case("router_statistics", dtype, "softmax", width=experts)
    yield Case("router_statistics", dtype, "softmax", width=experts, form="attention")
    yield Case("quantize_experts", dtype, "nf4")


@dataclasses.dataclass(frozen=True)
class BackendInUse:
    """Which backend "auto" runs in a case, or for an operation without a known case.

    ``when`` and ``speedup`` (over the reference) are of its proof, "" and 0.0 without one; ``others`` says what was
    found of the backends that do not run.
    """

    case: str
    backend: str
    when: str = ""
    speedup: float = 0.0
    others: tuple[str, ...] = ()


def backends_in_use(device: str) -> list[BackendInUse]:
    """Return the backend of every case that this device has a verdict on or waits for, and of other operations."""
    known = verdicts_of(device) if has_verdicts(device) or needs_proof(device) else None
    rows = known.all() if known else []
    cases = list(dict.fromkeys((*(row.case for row in rows), *(known.wanted() if known else ()))))
    found = []
    for case in (case for case in cases if case.dtype != "any"):
        backend = choose(case.operation, device, case=case)
        own = next((row for row in rows if (row.case, row.backend) == (case, backend)), None)
        others = [f"{row.backend} {row.describe()}" for row in rows if row.case == case and row is not own]
        others += [
            f"{name} not proved"
            for name in provable_backends(case.operation, device)
            if name != backend and known is not None and known.get(case, name) is None
        ]
        found.append(
            BackendInUse(str(case), backend, own.when if own else "", own.speedup if own else 0.0, tuple(others))
        )
    for operation in OPERATIONS:
        if not any(case.operation == operation for case in cases):
            backend = choose(operation, device)
            names = provable_backends(operation, device) if needs_proof(device) else []
            unproved = [f"{name} not proved" for name in names if name != backend]
            found.append(BackendInUse(operation, backend, others=tuple(unproved)))
    return found
