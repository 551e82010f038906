"""The entry of ``edgefed`` and of ``python -m edgefed``."""

import signal
import sys


def main() -> None:
    """Run the command line. Ctrl-C ends the process without a traceback from here on, also while modules load."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # an exception within an import is printed, wherever it is caught
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from edgefed.cli.main import INTERRUPTED
    from edgefed.cli.main import main as run

    signal.signal(signal.SIGINT, before)
    try:
        run()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
