"""FedMoE with real processes over loopback: unlike models, one that dies and returns, and a listener on the wire."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import numpy as np
from PIL import Image
from safetensors.numpy import load_file
from wiretap import Wiretap

from edgefed.personal.glyphs import load_glyphs
from edgefed.runs import RunReader

THETA_BYTES = 665_048 * 4
MODEL = """
from torch import nn

def build_model(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(16 * 7 * 7, 40), nn.ReLU(), nn.Linear(40, num_classes),
    )
"""


def test_unlike_clients_one_of_which_dies_and_nothing_but_theta_crosses_the_wire(serve, processes, wait_for, tmp_path):
    server, url = serve(
        "--method", "fedmoe", "--extractor", "cnn5", "--rounds", 3, "--min-clients", 2, "--client-timeout", 10,
        "--option", "batch_size=32", "--exit-when-finished",
    )  # fmt: skip
    (tmp_path / "my_package.py").write_text(MODEL)
    tap = Wiretap(int(url.rpartition(":")[2]))

    def join(name: str, data: str, model: str, through: str):
        return processes(
            "-m", "edgefed", "join", through, "--task", "images", "--data", data, "--model", model, "--name", name,
            "--state", tmp_path / name, "--json", log=tmp_path / f"{name}.log", cwd=tmp_path,
        )  # fmt: skip

    heard = f"http://127.0.0.1:{tap.port}"
    paper, own = join("paper", "glyphs:0", "cnn2", url), join("own", "glyphs:1", "my_package:build_model", heard)
    wait_for(lambda: list((tmp_path / "own").glob("personal/*/round-000001.*s")) or own.poll() is not None, "a round")
    own.send_signal(signal.SIGKILL)
    own.wait()
    own = join("own", "glyphs:1", "my_package:build_model", heard)
    for name, agent in (("paper", paper), ("own", own)):
        assert agent.wait(timeout=200) == 0, (tmp_path / f"{name}.log").read_text()
    assert server.wait(timeout=60) == 0
    tap.close()

    with RunReader(tmp_path / "run") as reader:
        assert reader.last_round == 4
        (unit,) = reader.manifest().units
    assert unit.size_bytes < THETA_BYTES + 4096
    ledger = [json.loads(line) for line in (tmp_path / "own" / "ledger.jsonl").read_text().splitlines()]
    assert all(entry["bytes_up"] < THETA_BYTES + 64 * 1024 for entry in ledger)

    up = bytes(tap.heard["up"])
    assert len(up) > 2 * THETA_BYTES, "the listener does hear"
    kept = load_file(next((tmp_path / "own").glob("personal/*/round-000003.safetensors")))
    assert kept["shared.features.fc1.weight"][:1].tobytes()[:64] in up, "theta is sent"
    for name, value in kept.items():
        if not name.startswith("shared.") and value.size >= 16:
            assert value.tobytes()[:64] not in up, name
    images = load_glyphs("glyphs:1").images
    for image in (images[0], images[150]):
        scaled = image.astype(np.float32).transpose(2, 0, 1) / 127.5 - 1
        assert image.tobytes()[:64] not in up
        assert scaled.tobytes()[:64] not in up
    assert b"my_package" not in up, "not even the name of the model"


def test_the_demo_compares_what_each_client_got(tmp_path):
    out = tmp_path / "demo"
    command = ["demo", "--method", "fedmoe", "--rounds", "2", "--clients", "2", "--out", str(out), "--json"]
    done = subprocess.run([sys.executable, "-m", "edgefed", *command], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [(each["name"], each["model"], len(each["accuracy"])) for each in found["results"]] == [
        ("glyphs-0", "cnn1", 2), ("glyphs-1", "cnn2", 2),
    ]  # fmt: skip
    assert all(0 <= each["others"]["standalone"] <= 1 and each["bytes_up"] > THETA_BYTES for each in found["results"])
    for name in ("demo.png", "gates.png"):
        with Image.open(out / name) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 50
    assert "round 2/2" in done.stderr
    refused = subprocess.run(
        [sys.executable, "-m", "edgefed", *command, "--learning-rate", "0.1"], capture_output=True, text=True
    )
    assert refused.returncode == 2
    assert "--learning-rate has no effect in the demo of fedmoe" in refused.stderr
