"""Requirement lines, versions and what follows from them."""

import sys

import pytest

from edgefed.doctor import packages
from edgefed.doctor.finding import State

REQUIREMENTS = ["torch>=2.4", "transformers<6,>=5.8", "click>=8.1", 'pytest>=8; extra == "test"']
GOOD = {"torch": "2.13.0+cpu", "transformers": "5.23.0", "click": "8.5.1", "triton": "3.9.0"}


def by_name(versions, requirements=REQUIREMENTS):
    return {finding.name: finding for finding in packages.package_findings(requirements, versions.get)}


@pytest.mark.parametrize(
    ("version", "bounds", "fits"),
    [
        ("2.13.0+cpu", [(">=", "2.4")], True),
        ("2.8.0a0+5228986c39.nv25.06", [(">=", "2.8")], True),  # a device maker's build counts as its release
        ("2.3.1", [(">=", "2.4")], False),
        ("6.0.0", [(">=", "5.8"), ("<", "6")], False),
        ("6.0.0rc1", [("<", "6")], False),
        ("5.8", [(">=", "5.8.0"), ("<", "6")], True),
        ("12.560", [(">=", "12.560")], True),
        ("12.535.161", [(">=", "12.560")], False),
        ("1.4.5", [("~=", "1.4.2")], True),
        ("1.5.0", [("~=", "1.4.2")], False),
        ("2.0", [("!=", "2.0.0")], False),
        ("1!3.0", [("==", "3")], True),
        ("", [(">=", "1")], False),
        ("garbage", [(">=", "1")], False),
        ("1.0", [], True),
    ],
)
def test_versions_against_ranges(version, bounds, fits):
    assert packages.within_bounds(version, bounds) is fits


@pytest.mark.parametrize(
    ("line", "parsed"),
    [
        ("torch>=2.4", ("torch", [(">=", "2.4")])),
        ("transformers<6,>=5.8", ("transformers", [("<", "6"), (">=", "5.8")])),
        ("nvidia-ml-py >= 12.560", ("nvidia-ml-py", [(">=", "12.560")])),
        ("uvicorn[standard]>=0.30", ("uvicorn", [(">=", "0.30")])),
        ("numpy", ("numpy", [])),
        ('pytest>=8; extra == "test"', None),
        ("old>=1; python_version < '3.0'", None),
        ("new>=1; python_version >= '3.10'", ("new", [(">=", "1")])),
        ("", None),
    ],
)
def test_requirement_lines(line, parsed):
    assert packages.parse_requirement(line) == parsed


def test_the_real_requirements_are_read_and_met_here():
    names = {parsed[0] for line in packages.own_requirements() if (parsed := packages.parse_requirement(line))}
    assert {"torch", "transformers", "safetensors", "click"} <= names
    assert "pytest" not in names
    findings = packages.package_findings(packages.own_requirements())
    assert not [finding for finding in findings if finding.state is State.PROBLEM]


def test_all_is_well():
    found = by_name(GOOD)
    assert found["required packages"].state is State.OK
    assert "torch 2.13.0+cpu" in found["required packages"].found
    assert found["triton"].state is State.OK
    assert found["bitsandbytes"].state is State.NOTE
    assert "Optional" in found["onnx"].why


def test_a_missing_package_is_a_problem_with_its_command():
    found = by_name({name: version for name, version in GOOD.items() if name != "transformers"})["transformers"]
    assert (found.state, found.found) == (State.PROBLEM, "not installed")
    assert found.command == "pip install 'transformers<6,>=5.8'"


def test_a_package_out_of_range_is_a_problem():
    found = by_name(GOOD | {"transformers": "4.57.0"})["transformers"]
    assert found.state is State.PROBLEM
    assert found.found == "4.57.0"
    assert "transformers<6,>=5.8" in found.why


def test_the_dead_pynvml_that_hides_the_living_one():
    found = by_name(GOOD | {"pynvml": "11.5.0"})["pynvml"]
    assert found.state is State.WARNING
    assert "hides" in found.found
    assert "uninstall" in found.command
    assert by_name(GOOD | {"pynvml": "13.0.1"})["pynvml"].state is State.NOTE
    assert "pynvml" not in by_name(GOOD)


def test_a_checkout_that_is_not_installed():
    found = by_name(GOOD, requirements=None)["edgefed"]
    assert found.state is State.WARNING
    assert found.command == "pip install -e ."


def test_python_itself():
    assert packages.python_finding((3, 9, 2), 2**63 - 1).state is State.PROBLEM
    assert packages.python_finding((3, 10, 0), 2**63 - 1).state is State.OK
    assert packages.python_finding((3, 12, 0), 2**31 - 1).state is State.PROBLEM


def test_the_name_of_another_project(monkeypatch):
    import importlib.util
    from pathlib import Path

    own = Path(importlib.util.find_spec("edgefed.triton_kernels").origin).parent
    # `python -m pytest` in the checkout makes the clash that this is about
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if Path(entry).resolve() != own.parent])
    assert packages.name_clash_findings() == []
    monkeypatch.syspath_prepend(own.parent)  # as when Python is started in the checkout
    (finding,) = packages.name_clash_findings()
    assert finding.state is State.WARNING
    assert str(own) in finding.found


def test_broken_metadata_is_no_crash(monkeypatch):
    def broken(name):
        raise KeyError("Version")

    monkeypatch.setattr(packages.importlib.metadata, "version", broken)
    assert packages.installed_version("torch") is None
