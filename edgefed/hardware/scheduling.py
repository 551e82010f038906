"""How long this process has waited for a processor although it could have run: what another program took from it."""

from __future__ import annotations

from pathlib import Path

from edgefed.hardware.reading import Reading, Reason

SOURCE = "/proc/self/task/*/schedstat"


def read_waited_s(tasks: Path = Path("/proc/self/task")) -> Reading[float]:
    """Seconds that all threads of this process together have waited in the kernel's run queues. Linux only.

    A thread that ends takes its count along, so the sum can fall; two readings around one piece of work compare well.
    """
    total, seen = 0, False
    try:
        folders = list(tasks.iterdir())
    except OSError as error:
        return Reading.missing(Reason.ABSENT, SOURCE, error.strerror or str(error))
    for folder in folders:
        try:
            # running ns, waiting ns, time slices
            total += int((folder / "schedstat").read_text().split()[1])
            seen = True
        except (OSError, ValueError, IndexError):  # the thread ended, or the kernel keeps no such account
            continue
    if not seen:
        return Reading.missing(Reason.NOT_SUPPORTED, SOURCE, "this kernel keeps no scheduling statistics")
    return Reading.of(total / 1e9, SOURCE)
