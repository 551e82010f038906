"""The Triton kernels against their references, in a process of their own.

Triton fixes at import whether kernels are interpreted or compiled, so the tests of the values are in files that
pytest does not collect by itself (triton_values_*.py), and run here with TRITON_INTERPRET=1; with a GPU also compiled.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgefed.triton_kernels import availability

FILES = sorted(Path(__file__).parent.glob("triton_values_*.py"))

needs_triton = pytest.mark.skipif(
    availability.triton_version() is None, reason="triton is not installed: it is optional (pip install triton)"
)


def run(path: Path, interpret: str) -> None:
    command = [sys.executable, "-m", "pytest", "--import-mode=importlib", "-q", "-p", "no:cacheprovider", str(path)]
    # The interpreter's products are small and many: numpy's threads would mostly wait for each other.
    environment = os.environ | {"TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout


INTERPRETER = (3, 7)
"""Triton 3.6's interpreter cannot run a loop with bounds from memory under numpy 2.4; its compiler can."""


@needs_triton
@pytest.mark.skipif(
    availability.version_numbers() < INTERPRETER, reason="the interpreter of this triton is too old for these loops"
)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_in_the_interpreter(path):
    run(path, "1")


@pytest.mark.gpu
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_on_the_gpu(path):
    reason = availability.why_not()
    if reason is not None:
        required = os.environ.get("EDGEFED_REQUIRE_GPU") == "1"
        (pytest.fail if required else pytest.skip)(f"no kernel can run here: {reason}")
    run(path, "0")


def test_importing_the_package_imports_no_triton():
    code = "import edgefed.triton_kernels.availability as a, sys; a.why_not(); print('triton' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"


def test_why_not_says_why(monkeypatch):
    monkeypatch.setattr(availability, "triton_version", lambda: None)
    assert availability.why_not() == "triton is not installed"
    monkeypatch.setattr(availability, "triton_version", lambda: "3.2.0")
    assert availability.why_not() == "triton 3.2.0 is older than 3.3"
