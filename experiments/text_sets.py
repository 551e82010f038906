"""Public text sets as one .jsonl file per client, in the record forms that `edgefed join --data` reads."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections import defaultdict
from pathlib import Path

import numpy as np

AGNEWS_TOPICS = ("World", "Sports", "Business", "Technology")
CLIENTS = 10
DIRICHLET = 0.5
LARGEST_ROLES = 30
"""Roles of Shakespeare among which the clients are drawn: the first has 61,007 characters, the thirtieth 22,326."""


def write_clients(
    name: str, data: Path, folder: Path, seed: int, parts: int = 1, most: int | None = None
) -> dict[str, Path]:
    """Write the clients of a set to ``folder``, {client: file}; with ``parts``, so many clients share what is one's.

    ``most``: maximum number of records of a client. ``seed`` decides who has which records, and their order, so also
    which of them are held out. Raises SystemExit when the set is not in ``data``.
    """
    records = SETS[name](data, seed)
    if parts > 1:
        records = {f"{client}.{part}": rows[part::parts] for part in range(parts) for client, rows in records.items()}
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for client, rows in records.items():
        paths[client] = folder / f"{client}.jsonl"
        paths[client].write_text("".join(json.dumps(row) + "\n" for row in rows[:most]), encoding="utf-8")
    return paths


def _open(path: Path) -> str:
    if not path.exists():
        raise SystemExit(f"{path} is absent; experiments/README.md says where to get it")
    return gzip.decompress(path.read_bytes()).decode("utf-8")


def _dirichlet(kind: str, by_label: dict[str, list[dict]], seed: int) -> dict[str, list[dict]]:
    """Clients whose shares of each label are drawn from a Dirichlet distribution, their records in random order."""
    rng = np.random.default_rng(seed)
    clients = defaultdict(list)
    for label in sorted(by_label):
        rows = [by_label[label][i] for i in rng.permutation(len(by_label[label]))]
        bounds = np.round(np.cumsum(rng.dirichlet([DIRICHLET] * CLIENTS)) * len(rows)).astype(int)
        for client, (start, end) in enumerate(zip([0, *bounds], bounds, strict=False)):
            clients[f"{kind}-{client}"] += rows[start:end]
    return {client: [rows[i] for i in rng.permutation(len(rows))] for client, rows in sorted(clients.items()) if rows}


def _dolly(data: Path, seed: int) -> dict[str, list[dict]]:
    """Dolly's eight categories by Dirichlet(0.5)."""
    by_category = defaultdict(list)
    for index in range(10):
        for row in json.loads(_open(data / "dolly15k" / f"client_{index}.json.gz")):
            if row["instruction"].strip() and row["response"].strip():
                by_category[row["category"]].append({key: row[key] for key in ("instruction", "context", "response")})
    return _dirichlet("dolly", by_category, seed)


def _agnews(data: Path, seed: int) -> dict[str, list[dict]]:
    """The four topics by Dirichlet(0.5)."""
    by_topic = defaultdict(list)
    for topic, title, description in csv.reader(io.StringIO(_open(data / "agnews" / "test.csv.gz"))):
        by_topic[topic].append(
            {"prompt": f"{title}. {description}\nTopic:", "completion": f" {AGNEWS_TOPICS[int(topic) - 1]}"}
        )
    return _dirichlet("agnews", by_topic, seed)


def _shakespeare(data: Path, seed: int) -> dict[str, list[dict]]:
    """Ten of the roles with the most text, one client each, their speeches in random order."""
    by_role = defaultdict(list)
    for line in _open(data / "shakespeare_by_role" / "speeches.jsonl.gz").splitlines():
        row = json.loads(line)
        by_role[f"{row['play']} {row['role']}"].append({"text": row["text"]})
    largest = sorted(by_role, key=lambda role: -sum(len(row["text"]) for row in by_role[role]))[:LARGEST_ROLES]
    rng = np.random.default_rng(seed)
    drawn = [by_role[largest[i]] for i in sorted(rng.permutation(LARGEST_ROLES)[:CLIENTS])]
    return {f"role-{index}": [rows[i] for i in rng.permutation(len(rows))] for index, rows in enumerate(drawn)}


def _gsm8k(data: Path, seed: int) -> dict[str, list[dict]]:
    """Ten clients of as many problems each, by the number of calculations in the answer: from short ones to long."""
    rows = [json.loads(line) for line in _open(data / "gsm8k" / "train.jsonl.gz").splitlines()]
    rng = np.random.default_rng(seed)
    order = sorted(rng.permutation(len(rows)), key=lambda i: rows[i]["answer"].count("<<"))
    return {
        f"gsm8k-{index}": [
            {"prompt": f"{rows[i]['question']}\nAnswer:", "completion": f" {rows[i]['answer']}"}
            for i in rng.permutation(part)
        ]
        for index, part in enumerate(np.array_split(order, CLIENTS))
    }


TASKS = ("ARC-Challenge", "ARC-Easy", "SVAMP", "boolq", "openbookqa", "social_i_qa", "winogrande")


def _tasks(data: Path, seed: int) -> dict[str, list[dict]]:
    """Questions of seven tasks by Dirichlet(0.5). No table has this set: settings are chosen on it."""
    by_task = {
        task: [
            {"prompt": f"{row['instruction']}\n", "completion": row["output"]}
            for row in json.loads(_open(data / "mcq_math_tasks" / task / "test.json.gz"))
        ]
        for task in TASKS
    }
    return _dirichlet("tasks", by_task, seed)


SETS = {"dolly": _dolly, "agnews": _agnews, "shakespeare": _shakespeare, "gsm8k": _gsm8k, "tasks": _tasks}
