"""Made-up devices for the doctor: a profile's stand-in, with the readings that a test is about replaced."""

from __future__ import annotations

import dataclasses

import pytest

from edgefed.hardware.facts import DeviceFacts, DriverFacts, Reading, Reason, TegraFacts, TorchFacts
from edgefed.hardware.profiles import facts_of, find_profile

ABSENT = Reading.missing(Reason.ABSENT, "test")


def known(value):
    return value if isinstance(value, Reading) or value is None else Reading.of(value, "test")


def replaced(record, changes, plain=()):
    """``record`` with fields replaced; a bare value becomes a reading, except in the fields named ``plain``."""
    return dataclasses.replace(record, **{k: v if k in plain else known(v) for k, v in changes.items()})


def working_driver(version="580.95.05", cuda="13.0") -> DriverFacts:
    return DriverFacts(True, known(version), known("13.580"), known(cuda))


def broken_driver(problem, remedy="Do this.") -> DriverFacts:
    return DriverFacts(False, ABSENT, ABSENT, ABSENT, problem, remedy)


def jetson_facts(**changes) -> TegraFacts:
    fields = {field.name: ABSENT for field in dataclasses.fields(TegraFacts)}
    fields |= {"l4t": known("36.4.4"), "jetpack": known("6.2.1"), "model": known("Jetson Orin Nano"),
               "soc": known("tegra234"), "power_mode": known("MAXN_SUPER")}  # fmt: skip
    return TegraFacts(**(fields | {name: known(value) for name, value in changes.items()}))


@pytest.fixture
def device():
    """device("rtx-4090", gpu={"throttle_reasons": 0x20}, host={"is_wsl": True}, driver=..., ...) -> DeviceFacts"""

    def make(profile="rtx-4090", *, gpu=None, host=None, tegra=None, driver=None, torch="2.13.0+cu130", **more):
        facts: DeviceFacts = facts_of(find_profile(profile))
        host_facts = replaced(
            facts.host,
            {
                "memory_total_bytes": 64 * 2**30,
                "memory_available_bytes": 60 * 2**30,
                "cpu_count": 8,
                "load_average": 0.5,
            }
            if not facts.host.memory_total_bytes.known
            else {"cpu_count": 8, "load_average": 0.5},
        )
        host_facts = replaced(host_facts, host or {}, plain=("is_wsl", "system", "machine"))
        one = None
        if facts.gpu is not None and gpu is not False:
            one = replaced(
                facts.gpu, {"mig_index": None} | (gpu or {}), plain=("cuda_index", "nvml_index", "is_mig", "mig_index")
            )
        return dataclasses.replace(
            facts, gpu=one, gpus=(one,) if one else (), host=host_facts, tegra=tegra, notes=(),
            driver=driver or working_driver(),
            torch=TorchFacts(known(torch), known("13.0"), known(True)),
            **more,
        )  # fmt: skip

    return make


@pytest.fixture
def parts():
    """The builders above, for tests that make a part of a device themselves."""
    return {"driver": working_driver, "broken_driver": broken_driver, "jetson": jetson_facts, "absent": ABSENT}
