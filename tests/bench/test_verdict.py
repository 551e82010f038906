"""The verdict in one sentence, from the fits and the speed of a report."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from edgefed.bench.report import Fit
from edgefed.bench.verdict import verdict

sys.path.insert(0, str(Path(__file__).parent))
from made_reports import made_entry, made_report  # noqa: E402


def fit(model, experts, of, storage="nf4", budget="now", mode="lora", **more):
    return Fit(model=model, budget=budget, mode=mode, storage=storage, experts=experts, of=of, **more)


STEP = made_entry("train step", "tokens/s", 85.0, params={"model": "OLMoE-1B-7B"})


@pytest.mark.parametrize(
    ("fits", "tests", "sentence"),
    [
        ((), (), ""),
        (
            (
                fit("Qwen3-30B-A3B", 12, 128),
                fit("OLMoE-1B-7B", 20, 64, "bfloat16", upload_s=21.0),
                fit("OLMoE-1B-7B", 56, 64, upload_s=59.0),
                fit("Mixtral-8x7B", 0, 8),
            ),
            (STEP,),
            "OLMoE-1B-7B: 56 of 64 experts a layer in NF4 with adapters, about 4.0 min of training a round, 59 s "
            "upload; Qwen3-30B-A3B: 12 of 128; Mixtral-8x7B: does not fit",
        ),
        (
            (fit("a", 64, 64, "bfloat16"), fit("a", 64, 64), fit("b", 3, 8), fit("b", 2, 8, "bfloat16")),
            (),
            "a: 64 of 64 experts a layer in bfloat16 with adapters; b: 3 of 8 in NF4",
        ),
        (
            (fit("a", 4, 8, budget="ideal"), fit("a", 8, 8, budget="ideal", mode="profile")),
            (),
            "on an idle machine, a: 4 of 8 experts a layer in NF4 with adapters",
        ),
    ],
)
def test_one_sentence(fits, tests, sentence):
    assert verdict(made_report(fits=fits, tests=tests)) == sentence
