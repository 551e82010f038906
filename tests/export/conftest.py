"""The toy checkpoints of tests/moe, here too."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_path = Path(__file__).parents[1] / "moe" / "conftest.py"
_spec = importlib.util.spec_from_file_location("edgefed_moe_conftest", _path)
_module = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _module  # dataclasses look their module up by name
_spec.loader.exec_module(_module)

quiet_and_single_threaded = _module.quiet_and_single_threaded
toys = _module.toys
toy = _module.toy
olmoe = _module.olmoe
save_toy = _module.save_toy
