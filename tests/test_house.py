"""House rules that a machine can check: who imports whom, Python 3.10, errors and routes that are complete."""

import ast
import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import edgefed
from edgefed import errors
from edgefed.cli.main import VERBS
from edgefed.protocol import routes

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "edgefed"
SOURCES = sorted(PACKAGE.rglob("*.py"))
TOP_LEVEL = {"triton_kernels": "edgefed.triton_kernels", "profiles": "edgefed.profiles"}

FLOORS = (
    ("errors", "expert_records"),
    ("config", "disk", "embedded", "hardware", "hub", "isolation", "native", "plots", "progress"),
    ("protocol",),
