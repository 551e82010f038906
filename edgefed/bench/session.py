"""One run of the benchmark: collects entries, turns a failure into an entry, and stops cleanly on Ctrl-C."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import msgspec

from edgefed.bench.statistics import NOISY, STABLE, UNUSABLE, Entry
from edgefed.errors import EdgefedError, first_line
from edgefed.hardware.reading import Reading
from edgefed.hardware.sampling import read_waited_s
from edgefed.progress import ProgressSink
from edgefed.training.out_of_memory import is_device_lost, is_out_of_memory

WAIT_NOISY, WAIT_UNUSABLE = 0.05, 0.20
"""Seconds in the run queue per second of a test, over all threads, from which its speed is not the device's."""


@dataclasses.dataclass
class Session:
    """``release`` gives memory back after a failure. Once ``lost`` is set, everything on the GPU is only named.

    `KeyboardInterrupt` is recorded in the entry that it hit and raised again: the caller ends the run with what it has.
    """

    progress: ProgressSink
    release: Callable[[], None]
    entries: list[Entry] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)
    lost: str = ""

    def measure(self, name: str, unit: str, work: Callable[[], Entry], *, on_device: bool = True, **more) -> Entry:
        """Run ``work`` and keep its entry, or one that says why there is none. ``more`` goes into that one."""
        if self.lost and on_device:
            return self.keep(Entry.skipped(name, unit, self.lost, **more))
        self.progress.phase(name)
        try:
            waited_s, started = read_waited_s(), time.monotonic()
            entry = work()
            return self.keep(judge_contention(entry, waited_s, read_waited_s(), time.monotonic() - started))
        except KeyboardInterrupt:
            self.keep(Entry.interrupted(name, unit, **more))
            raise
        except Exception as error:
            reason = self.explain(error)
        finally:
            self.progress.done()
        # Outside the handler: its traceback would keep the tensors of the failed measurement alive.
        self.release()
        return self.keep(Entry.failed(name, unit, reason, **more))

    def attempt(self, name: str, work: Callable[[], object], *, total: int | None = None, unit: str = "B") -> object:
        """Run ``work`` that gives no entry; a failure becomes a warning and None. ``total``, ``unit``: for the bar."""
        if self.lost:
            return None
        self.progress.phase(name, total, unit)
        try:
            return work()
        except Exception as error:
            reason = self.explain(error)
        finally:
            self.progress.done()
        self.release()
        self.warnings.append(f"{name}: {reason}")
        return None

    def keep(self, entry: Entry) -> Entry:
        self.entries.append(entry)
        return entry

    def skip(self, name: str, unit: str, reason: str, **more) -> None:
        self.keep(Entry.skipped(name, unit, reason, **more))

    def explain(self, error: Exception) -> str:
        """What went wrong, in one line. Remembers a lost GPU."""
        text = first_line(error)
        if is_out_of_memory(error):
            return f"out of memory: {text}"
        if is_device_lost(error):
            self.lost = f"the GPU stopped answering: {text}"
            self.warnings.append(self.lost)
            return self.lost
        if isinstance(error, (EdgefedError, OSError)):
            return text
        return f"{type(error).__name__}: {text}"


def judge_contention(entry: Entry, before: Reading[float], after: Reading[float], seconds: float) -> Entry:
    """The entry, its verdict lowered when the process had to wait for a processor meanwhile.

    A program that waits evenly is slow evenly: its samples agree, and only the kernel's account shows it.
    """
    if before.value is None or after.value is None or seconds <= 0 or entry.verdict not in (STABLE, NOISY):
        return entry
    share = max(0.0, after.value - before.value) / seconds
    if share < WAIT_NOISY:
        return entry
    verdict = UNUSABLE if share >= WAIT_UNUSABLE else NOISY
    return msgspec.structs.replace(entry, verdict=verdict, reason=f"waited {min(share, 9.99):.0%} for a CPU")
