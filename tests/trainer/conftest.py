"""Fixtures of the trainer tests."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # device_bench is a plain module

from device_bench import bench, data  # noqa: E402, F401 - fixtures
