"""Simulation files: what is read, and what is refused with every fault named."""

import json
from pathlib import Path

import pytest

from edgefed.errors import ConfigError, DataError
from edgefed.simulation.config import SimulationConfig, SplitData, split_records
from edgefed.simulation.config_file import load_simulation

GOOD = """
model = "tiny"
cost-shape = "OLMoE-1B-7B"
methods = ["hfedmoe", { method = "random", label = "redrawn", options = { redraw = true } }]
rounds = 3
target-loss = 2.5
preinstalled = true
[training]
local-steps = 4
learning-rate = 1e-3
[data]
sources = ["silo:asyncio", "notes.jsonl", "silo:xml"]
[[fleet]]
profile = "rtx-4090"
network = "cable"
up-mbit = 33
[[fleet]]
profile = "jetson-orin-nano-8gb"
power-mode = "15W"
count = 2
memory = "3GiB"
experts = 0.5
"""


def read(tmp_path, text: str) -> SimulationConfig:
    path = tmp_path / "fleet.toml"
    path.write_text(text)
    return load_simulation(path)


def test_a_file_is_read_whole(tmp_path):
    config = read(tmp_path, GOOD)
    assert (config.rounds, config.target_loss, config.preinstalled) == (3, 2.5, True)
    assert config.training.local_steps == 4
    assert config.training.learning_rate == 1e-3
    assert [choice.label for choice in config.methods] == ["hfedmoe", "redrawn"]
    assert config.methods[1].options == {"redraw": True}
    big, *small = config.fleet
    assert (big.link.down_mbit, big.link.up_mbit, big.link.latency_ms) == (200, 33, 20)
    assert [device.name for device in small] == ["jetson-orin-nano-8gb-1", "jetson-orin-nano-8gb-2"]
    assert [device.data for device in config.fleet] == ["silo:asyncio", str(tmp_path / "notes.jsonl"), "silo:xml"]
    assert small[0].memory_bytes == 3 * 2**30
    assert small[0].expert_share == 0.5
    assert small[0].profile.value("bandwidth") == 68  # of the power mode, not of the fastest


def test_every_fault_of_a_file_is_told_at_once(tmp_path):
    text = GOOD.replace("rounds = 3", 'rounds = "three"\ncolour = "red"').replace("local-steps", "local-stepz")
    text = text.replace('profile = "rtx-4090"', 'profile = "rtx-4090"\nspeed = 3').replace('"3GiB"', '"much"')
    text = text.replace('"hfedmoe"', '"hfedmo"')
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    for error in ("rounds is 'three'", "colour", "local-stepz", "fleet.speed", "'much'", "hfedmo", "fleet.toml"):
        assert error in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("rounds = 3", "rounds = 0", "rounds is 0"),
        ("OLMoE-1B-7B", "GPT-9", "cost-shape is 'GPT-9'"),
        ('network = "cable"', 'network = "pigeon"', "pigeon"),
        ("up-mbit = 33", "up-mbit = -1", "up-mbit is -1"),
        ("rtx-4090", "rtx-9999", "rtx-9999"),
        ("count = 2", "count = 0", "count is 0"),
        ("count = 2", "count = 3", "no data for device 4"),
        ("experts = 0.5", "experts = 1.5", "fleet.experts is 1.5"),
        ("local-steps = 4", "local-steps = 0", "local-steps is 0"),
        ("local-steps = 4", "warmup-rounds = 3", "warmup-rounds is 3, expected fewer than the 3 rounds"),
        ("[data]", '[server-optimizer]\nkind = "sgd"\n[data]', "server_optimizer is 'sgd'"),
        ("[data]", '[server-optimizer]\nkind = "adam"\nspeed = 1\n[data]', "unknown key server-optimizer.speed"),
        (
            "rounds = 3",
            'rounds = 3\nadapter-average = "b"',
            "adapter-average is 'b', expected product, factors",
        ),
        ("local-steps = 4", 'schedule = "up"', "schedule is 'up'"),
        ("local-steps = 4", 'experts = "some"', "experts is 'some'"),
        ('label = "redrawn"', 'label = "../up"', "../up"),
        ('label = "redrawn"', 'label = "hfedmoe"', "duplicate names of methods: hfedmoe"),
        ("redraw = true", "redo = true", "redo"),
        ('methods = ["hfedmoe", ', 'methods = ["fedmoe", ', "fedmoe cannot be simulated"),
        ("preinstalled = true", "preinstalled = 1", "preinstalled is 1"),
        ("target-loss = 2.5", "held-out = 1.0", "held-out is 1.0"),
        ('sources = ["silo:asyncio", "notes.jsonl", "silo:xml"]', 'label = "x"', "needs data.file"),
        ("[data]", "[data", "not TOML"),
        ("[[fleet]]", "[fleet]", ""),
    ],
)
def test_impossible_values_are_named(tmp_path, old, new, error):
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, GOOD.replace(old, new))
    assert error in str(caught.value)


def test_an_absent_file_and_an_empty_fleet_are_told(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        load_simulation(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="fleet is empty, .*; methods is empty"):
        read(tmp_path, 'model = "tiny"\n')


def records(path, labels: int = 4, each: int = 30):
    rows = [{"text": f"{label} {index}", "label": f"l{label}"} for label in range(labels) for index in range(each)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


@pytest.mark.parametrize("alpha", [0.5, 100.0, None])
def test_dealing_out_gives_every_record_to_one_device(tmp_path, alpha):
    rows = records(tmp_path / "all.jsonl")
    names = ["a", "b", "c"]
    split = SplitData(str(tmp_path / "all.jsonl"), "label", alpha)
    seed = 3
    paths = split_records(split, names, tmp_path / "hands", seed)
    hands = {name: [json.loads(line) for line in Path(paths[name]).read_text().splitlines()] for name in names}
    texts = sorted(row["text"] for hand in hands.values() for row in hand)
    assert texts == sorted(row["text"] for row in rows)
    if alpha is None:
        owners = {label: {name for name in names if any(row["label"] == label for row in hands[name])}
                  for label in ("l0", "l1", "l2", "l3")}  # fmt: skip
        assert all(len(own) == 1 for own in owners.values())
    again = split_records(split, names, tmp_path / "again", seed)
    assert all(Path(paths[name]).read_text() == Path(again[name]).read_text() for name in names)
    if alpha is not None:
        other = split_records(split, names, tmp_path / "other", seed + 1)
        assert any(Path(paths[name]).read_text() != Path(other[name]).read_text() for name in names)


def test_invalid_files_are_not_split(tmp_path):
    path = tmp_path / "all.jsonl"
    records(path, labels=1, each=3)
    with pytest.raises(DataError, match="would get"):
        split_records(SplitData(str(path), "label"), ["a", "b"], tmp_path, 0)
    with pytest.raises(DataError, match="line 1: field 'topic' must be"):
        split_records(SplitData(str(path), "topic"), ["a"], tmp_path, 0)
    path.write_text('{"label": "x"}\nnot json\n')
    with pytest.raises(DataError, match="line 2: invalid JSON"):
        split_records(SplitData(str(path), "label"), ["a"], tmp_path, 0)
    with pytest.raises(DataError, match="cannot read"):
        split_records(SplitData(str(tmp_path / "no.jsonl"), "label"), ["a"], tmp_path, 0)
    with pytest.raises(DataError, match="jsonl"):
        split_records(SplitData("notes.txt", "label"), ["a"], tmp_path, 0)
