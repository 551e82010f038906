"""FedMoE of text with real processes over loopback: one client classifies, one predicts tokens, by unlike models."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from wiretap import Wiretap

from edgefed.personal.local_training import evaluate
from edgefed.personal.state import newest_state
from edgefed.personal.tasks import load_mixture, make_task
from edgefed.runs import RunReader

sys.path.insert(0, str(Path(__file__).parents[1] / "personal"))
from text_rig import labelled_lines, tiny_llama, word_tokenizer  # noqa: E402


def test_a_language_model_of_ones_own_beside_a_shared_extractor_of_text(serve, processes, tmp_path):
    server, url = serve(
        "--method", "fedmoe", "--extractor", "text-small", "--tokenizer", "tiny", "--sequence-length", 24,
        "--rounds", 2, "--min-clients", 2, "--option", "batch_size=8", "--exit-when-finished",
    )  # fmt: skip
    texts, labels = labelled_lines(8, classes=("asyncio", "topics"))
    rows = [{"text": text, "label": ("code", "prose")[label]} for text, label in zip(texts, labels, strict=True)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "notes.txt").write_text("\n\n".join(labelled_lines(6, lines=30, classes=("topics",))[0]))
    tiny_llama(tmp_path / "my-llm", word_tokenizer(texts, 100, specials=False, end="<end>"))
    tap = Wiretap(int(url.rpartition(":")[2]))

    def join(name: str, *flags: object):
        return processes(
            "-m", "edgefed", "join", f"http://127.0.0.1:{tap.port}", *flags, "--name", name, "--held-out", "25%",
            "--state", tmp_path / name, "--json", log=tmp_path / f"{name}.log", cwd=tmp_path,
        )  # fmt: skip

    agents = {
        "labels": join("labels", "--task", "text", "--data", "mine.jsonl", "--model", "./my-llm"),
        "tokens": join("tokens", "--task", "next-token", "--data", "notes.txt", "--model", "text-gru"),
    }
    for name, agent in agents.items():
        assert agent.wait(timeout=200) == 0, (tmp_path / f"{name}.log").read_text()
    assert server.wait(timeout=60) == 0, (tmp_path / "server.log").read_text()
    tap.close()
    with RunReader(tmp_path / "run") as reader:
        assert reader.last_round == 3
        manifest = reader.manifest()
        (unit,), paths = manifest.units, reader.paths(manifest)
    files = {file.name: paths[file.sha256] for file in manifest.files}
    mine = make_task("text", str(tmp_path / "mine.jsonl"), str(tmp_path / "my-llm"), "labels", 0.25)
    kept = load_mixture(newest_state(tmp_path / "labels"), mine, files)
    found = evaluate(kept, mine.open("text-small", files, 0, 24).held_out)
    told = json.loads((tmp_path / "labels" / "ledger.jsonl").read_text().splitlines()[-1])["metrics"]
    assert found.loss == pytest.approx(told["held_out_loss_after"], rel=1e-4)
    for name in agents:
        entries = [json.loads(line) for line in (tmp_path / name / "ledger.jsonl").read_text().splitlines()]
        assert [entry["outcome"] for entry in entries] == ["accepted"] * 2
        assert all(unit.size_bytes <= entry["bytes_up"] < unit.size_bytes + 64 * 1024 for entry in entries)
    up = bytes(tap.heard["up"])
    assert len(up) > 4 * unit.size_bytes, "the listener does hear"
    for text in texts:
        assert text[:24].encode() not in up
        assert json.dumps(text)[1:25].encode() not in up
