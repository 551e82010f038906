"""Findings about the kernels: which backends can run, and what this device has proved of them."""

from __future__ import annotations

import msgspec

from edgefed.doctor.finding import Finding, Group, State
from edgefed.isolation.worker import Outcome

REBUILD = "EDGEFED_NATIVE=1 pip install --force-reinstall --no-deps ."
PROVE = "edgefed doctor --prove"


class Proofs(msgspec.Struct):
    """The answer of `edgefed.doctor.queries.kernel_verdicts`. Rows: case, backend, state, words, time."""

    path: str
    rows: list[tuple[str, str, str, str, str]]
    waiting: list[str]
    needed: bool


def backend_findings(outcome: Outcome) -> list[Finding]:
    """One finding per operation: which implementation can run for which kind of device, and why the others cannot."""
    if not outcome.ok:
        return [
            Finding(
                Group.NATIVE, "kernel backends", State.PROBLEM, outcome.failure,
                "The implementation that computes the experts is unknown.", "Install edgefed again.", REBUILD,
            )
        ]  # fmt: skip
    operations: dict[str, list[str]] = {}
    for operation, name, device_type, available, reason in msgspec.convert(
        outcome.value, list[tuple[str, str, str, bool, str]]
    ):
        where = "" if device_type == "*" else f" on {device_type}"
        line = f"{name}{where}: {'yes, ' if available else 'no, '}{reason}"
        operations.setdefault(operation, []).append(line)
    return [
        Finding(Group.NATIVE, operation, State.OK, "; ".join(lines)) for operation, lines in sorted(operations.items())
    ]


def proof_findings(outcome: Outcome, device: str) -> list[Finding]:
    """One finding per case: which backends are proved in it on the device, how much faster, and what is wrong."""
    if not outcome.ok:
        return [
            Finding(
                Group.NATIVE, "kernel proofs", State.WARNING, outcome.failure, "Kernels run as plain PyTorch.",
                "Delete the file with the proofs, or install edgefed again.", REBUILD,
            )
        ]  # fmt: skip
    found = msgspec.convert(outcome.value, Proofs)
    findings = []
    for case in dict.fromkeys(row[0] for row in found.rows):
        rows = [row for row in found.rows if row[0] == case]
        bad = any(state in ("wrong", "failed", "died", "trying") for _, _, state, _, _ in rows)
        words = "; ".join(f"{backend} {text}, {when[:10]}" for _, backend, _, text, when in rows)
        findings.append(
            Finding(
                Group.NATIVE, "kernel proof", State.NOTE if bad else State.OK, f"{case} on {device}: {words}",
                "Another backend runs in this case." if bad else "", "Prove the kernels again." if bad else "",
                PROVE if bad else "",
            )
        )  # fmt: skip
    if not found.rows and found.needed or found.waiting:
        cases = f": {'; '.join(found.waiting)}" if found.waiting else ""
        findings.append(
            Finding(
                Group.NATIVE, "kernel proofs", State.NOTE,
                f"on {device}: {len(found.waiting) or 'all'} cases are not proved yet{cases}",
                "The reference runs until they are.", "Training proves them before its next round, or now:", PROVE,
            )
        )  # fmt: skip
    return findings
