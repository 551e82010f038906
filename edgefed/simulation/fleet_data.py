"""Deals one file of labelled records out to the devices of a fleet, unevenly, as federated data are."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edgefed.disk import disk_errors
from edgefed.errors import DataError
from edgefed.simulation.config import SplitData

FEWEST_RECORDS = 4
"""A device with less can hold nothing out and trains on next to nothing."""


def deal_out(split: SplitData, names: Sequence[str], folder: Path, seed: int) -> dict[str, str]:
    """Write ``folder/NAME.jsonl`` for each device; returns {name: path}. The same for the same file, names and seed.

    Dirichlet: the records of each label are dealt out by shares drawn from Dirichlet(alpha); otherwise each label goes
    to one device, the largest labels first, always to the device with the fewest records. Every record goes to exactly
    one device. Raises DataError when the file cannot be used or a device would get fewer than `FEWEST_RECORDS`.
    """
    by_label = _records(split)
    rng = np.random.default_rng([seed, 0x5EED])
    hands: list[list[str]] = [[] for _ in names]
    if split.alpha is None:
        for label in sorted(by_label, key=lambda label: (-len(by_label[label]), label)):
            min(hands, key=len).extend(by_label[label])
    else:
        for label in sorted(by_label):
            lines = [by_label[label][index] for index in rng.permutation(len(by_label[label]))]
            bounds = np.round(np.cumsum(rng.dirichlet([split.alpha] * len(names))) * len(lines)).astype(int)
            for hand, start, end in zip(hands, [0, *bounds[:-1]], bounds, strict=True):
                hand.extend(lines[start:end])
    for name, hand in zip(names, hands, strict=True):
        if len(hand) < FEWEST_RECORDS:
            raise DataError(
                f"{split.file}: device {name} would get {len(hand)} records of {sum(map(len, hands))}, at least "
                f"{FEWEST_RECORDS} are needed",
                remedy="Use fewer devices, a larger alpha, or a file with more records or labels.",
            )
    paths = {}
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, hand in zip(names, hands, strict=True):
            path = folder / f"{name}.jsonl"
            path.write_text("".join(hand[index] + "\n" for index in rng.permutation(len(hand))), encoding="utf-8")
            paths[name] = str(path)
    return paths


def _records(split: SplitData) -> dict[str, list[str]]:
    """Lines by label."""
    path = Path(split.file)
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise DataError(f"{path} cannot be dealt out: expected a .jsonl or .jsonl.gz file with a field {split.label!r}")
    by_label: dict[str, list[str]] = defaultdict(list)
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                record = json.loads(line)
                if not isinstance(record, dict) or not isinstance(record.get(split.label), (str, int)):
                    raise DataError(f"{path} line {number} has no field {split.label!r} with a text or a number")
                by_label[str(record[split.label])].append(line.strip().decode("utf-8"))
    except (OSError, EOFError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    except ValueError as error:  # JSON and UTF-8
        raise DataError(f"{path} line {number} is not JSON in UTF-8: {error}") from error
    if not by_label:
        raise DataError(f"{path} holds no record")
    return by_label
