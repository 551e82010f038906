"""``python -m edgefed`` is the same as ``edgefed``."""

from edgefed.cli.main import main

if __name__ == "__main__":
    main()
