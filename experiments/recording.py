"""Where the rows of an experiment come from: the record that the benchmarks keep, too."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from provenance import provenance  # noqa: E402

__all__ = ["provenance"]
