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
AGNEWS_CLIENTS, AGNEWS_DIRICHLET = 10, 0.5
SHAKESPEARE_CLIENTS = 10
GSM8K_CLIENTS = 10


def write_clients(name: str, data: Path, folder: Path, seed: int, parts: int = 1) -> dict[str, Path]:
    """Write the clients of a set to ``folder``, {client: file}; with ``parts``, so many clients share what is one's.

    Raises SystemExit when the set is not in ``data``.
    """
    records = SETS[name](data, seed)
    if parts > 1:
        records = {f"{client}.{part}": rows[part::parts] for part in range(parts) for client, rows in records.items()}
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for client, rows in records.items():
        paths[client] = folder / f"{client}.jsonl"
        paths[client].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return paths


def _open(path: Path) -> str:
    if not path.exists():
        raise SystemExit(f"{path} is absent; benchmarks/README.md says where to get it")
    return gzip.decompress(path.read_bytes()).decode("utf-8")


def _dolly(data: Path, seed: int) -> dict[str, list[dict]]:
    """Ten clients, each two or three of Dolly's eight categories."""
    clients = {}
    for index in range(10):
        rows = json.loads(_open(data / "dolly15k" / f"client_{index}.json.gz"))
        clients[f"dolly-{index}"] = [
            {"instruction": row["instruction"], "context": row["context"], "response": row["response"]}
            for row in rows
            if row["instruction"].strip() and row["response"].strip()
        ]
    return clients


def _agnews(data: Path, seed: int) -> dict[str, list[dict]]:
    """Ten clients whose shares of the four topics are drawn from a Dirichlet distribution (alpha 0.5)."""
    by_topic = defaultdict(list)
    for topic, title, description in csv.reader(io.StringIO(_open(data / "agnews" / "test.csv.gz"))):
        by_topic[int(topic) - 1].append(
            {"prompt": f"{title}. {description}\nTopic:", "completion": f" {AGNEWS_TOPICS[int(topic) - 1]}"}
        )
    rng = np.random.default_rng(seed)
    clients = defaultdict(list)
    for topic in sorted(by_topic):
        rows = [by_topic[topic][i] for i in rng.permutation(len(by_topic[topic]))]
        shares = rng.dirichlet([AGNEWS_DIRICHLET] * AGNEWS_CLIENTS)
        bounds = np.round(np.cumsum(shares) * len(rows)).astype(int)
        for client, (start, end) in enumerate(zip([0, *bounds], bounds, strict=False)):
            clients[f"agnews-{client}"] += rows[start:end]
    return {client: [rows[i] for i in rng.permutation(len(rows))] for client, rows in sorted(clients.items()) if rows}


def _shakespeare(data: Path, seed: int) -> dict[str, list[dict]]:
    """The ten roles with the most text, one client each."""
    by_role = defaultdict(list)
    for line in _open(data / "shakespeare_by_role" / "speeches.jsonl.gz").splitlines():
        row = json.loads(line)
        by_role[f"{row['play']} {row['role']}"].append({"text": row["text"]})
    largest = sorted(by_role, key=lambda role: -sum(len(row["text"]) for row in by_role[role]))[:SHAKESPEARE_CLIENTS]
    return {f"role-{index}": by_role[role] for index, role in enumerate(largest)}


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
        for index, part in enumerate(np.array_split(order, GSM8K_CLIENTS))
    }


SETS = {"dolly": _dolly, "agnews": _agnews, "shakespeare": _shakespeare, "gsm8k": _gsm8k}
