"""Whole simulations, small: the same twice, the same after a kill, and what devices do to each other."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from PIL import Image

import edgefed
from edgefed.aggregator.store import Store
from edgefed.errors import ConfigError
from edgefed.formats.card import read_record
from edgefed.hardware.profiles import find_profile
from edgefed.methods.registry import register
from edgefed.methods.slices import Slices
from edgefed.progress import NullProgress
from edgefed.protocol.messages import TrainingConfig
from edgefed.simulation.config import LINKS, MethodChoice, SimulatedDevice, SimulationConfig
from edgefed.simulation.pictures import save_pictures
from edgefed.simulation.simulate import CONFIG_FILE, RESULT_FILE, simulate

WORDS = ("def read(path):", "return open(path).read()", "class Reader:", "for line in lines:", "import json", "x = 1")
TRAINING = TrainingConfig(local_steps=2, batch_size=2, sequence_length=32, profile_tokens=128, learning_rate=1e-3)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for number, name in enumerate(("fast", "slow")):
        rows = [" ".join(WORDS[(index * (number + 2) + word) % len(WORDS)] for word in range(8)) + f" # {index}"
                for index in range(24)]  # fmt: skip
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return folder


def device(texts: Path, name: str, profile: str, network: str = "fibre", **changes) -> SimulatedDevice:
    return SimulatedDevice(name, find_profile(profile), LINKS[network], str(texts / f"{name}.jsonl"), **changes)


def config(texts: Path, *methods: str, **changes) -> SimulationConfig:
    given = {
        "fleet": (device(texts, "fast", "rtx-4090"), device(texts, "slow", "jetson-orin-nano-8gb", "cable")),
        "methods": tuple(MethodChoice(name, {"probes": 1} if name == "flux" else {}) for name in methods),
        "cost_shape": "OLMoE-1B-7B",
        "rounds": 2,
        "training": TRAINING,
        "evaluation_tokens": 128,
    }
    return SimulationConfig(**{**given, **changes})


@pytest.fixture(scope="module")
def reference(texts, tmp_path_factory):
    """One uninterrupted simulation: (its result, its folder)."""
    out = tmp_path_factory.mktemp("reference")
    return simulate(config(texts, "flux"), out), out


def test_a_fleet_learns_and_every_second_is_accounted_for(reference):
    result, out = reference
    run = result.run("flux")
    assert len(run.rounds) == 2
    assert not run.refused
    assert not run.stopped
    assert all(math.isfinite(loss) for _, loss in run.curve)
    assert run.rounds[-1].loss < run.first.loss  # two steps on a model that was made for such text
    assert 0 < run.first.accuracy < 1
    begins = 0.0
    for each in run.rounds:
        for client in each.clients.values():
            total = sum(client.seconds.values()) + client.late + client.waits + client.hidden
            assert total == pytest.approx(each.ends - begins)
            assert client.seconds["train"] > 0
            assert client.seconds["upload"] > 0
            assert client.bytes_up > 0
        begins = each.ends
    assert json.loads((out / RESULT_FILE).read_text()) == json.loads(json.dumps(result.to_dict()))


def test_budgets_are_those_of_the_devices_with_the_cost_shape(reference):
    run = reference[0].run("flux")
    for each in run.rounds:
        for name, client in each.clients.items():
            assert 0 < client.memory_bytes <= reference[0].budgets[name]
        assert sum(each.clients["slow"].resident) < sum(each.clients["fast"].resident) == 64
        # What the small device cannot hold one by one is merged.
        assert sum(each.clients["slow"].merged) > 0 == sum(each.clients["fast"].merged)
    assert sum(len(row) for row in run.usage["slow"]) == 64


def test_the_slowest_device_decides_how_long_a_round_takes(reference):
    for each in reference[0].run("flux").rounds:
        (other,) = {"fast", "slow"} - {each.slowest}
        slowest = each.clients[each.slowest]
        assert slowest.waits + slowest.hidden == pytest.approx(each.aggregation)
        assert each.clients[other].waits > 0
    assert reference[0].run("flux").rounds[0].slowest == "slow", "both send one expert, one of them by cable"


def test_devices_train_what_their_links_can_send_in_the_fleets_pace(reference):
    """26 experts fit the memory of the 4090, 4 that of the Orin. Up at 100 and 15 Mbit/s, down at 500 (half of the
    aggregator's link) and 200: 0.312 and 0.287 units of time. The pace is their geometric mean, 0.299, in which 24 and
    4 experts are fetched and sent. The Orin trains fewer of its 4 where holding others unmerged lowers the loss more.
    """
    first, second = reference[0].run("flux").rounds
    assert [sum(first.clients[name].trainable) for name in ("fast", "slow")] == [1, 1], "no rate is known yet"
    assert sum(second.clients["fast"].trainable) == 24
    assert 1 <= sum(second.clients["slow"].trainable) <= 4
    store = Store(reference[1] / "flux" / "run", read_only=True)
    surveys = {client.name: client.survey for client in store.clients()}
    store.close()
    told = {n: (said.upload_bytes_per_s, said.download_bytes_per_s, said.train_slots) for n, said in surveys.items()}
    assert told == {"client-0000": (100e6 / 8, 500e6 / 8, 26), "client-0001": (15e6 / 8, 200e6 / 8, 4)}


def test_a_profile_of_the_next_round_hides_in_the_wait(reference):
    first, last = reference[0].run("flux").rounds
    assert first.clients["fast"].hidden > 0 == last.clients["fast"].hidden  # nothing comes after the last round
    assert first.clients["fast"].seconds["profile"] > 0 == last.clients["fast"].seconds["profile"]


TOML = """
methods = [{ method = "flux", options = { probes = 1 } }]
cost-shape = "OLMoE-1B-7B"
rounds = 2
evaluation-tokens = 128
[training]
local-steps = 2
batch-size = 2
sequence-length = 32
profile-tokens = 128
learning-rate = 1e-3
[data]
sources = ["fast.jsonl", "slow.jsonl"]
[[fleet]]
name = "fast"
profile = "rtx-4090"
[[fleet]]
name = "slow"
profile = "jetson-orin-nano-8gb"
network = "cable"
"""


@pytest.mark.parametrize("moment", ["clients/client-0000/done.json", "clients/client-0001/before-2"])
def test_a_killed_simulation_goes_on_and_gives_the_same_numbers(
    reference, texts, tmp_path, processes, wait_for, moment
):
    """In other processes: so the numbers depend neither on the process nor on where it was killed."""
    (texts / "fleet.toml").write_text(TOML)
    out = tmp_path / "out"
    command = ("-m", "edgefed", "simulate", texts / "fleet.toml", "--out", out, "--json", "--no-pictures")
    first = processes(*command, log=tmp_path / "first.log")
    wait_for(lambda: (out / "flux" / moment).exists() or first.poll() is not None, moment)
    assert first.poll() is None, (tmp_path / "first.log").read_text()
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not (out / RESULT_FILE).exists()
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == json.loads(json.dumps(reference[0].to_dict()))
    again = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=300)
    assert json.loads(again.stdout) == found  # nothing was done again


def test_two_simulations_are_equal_bit_for_bit(reference, texts, tmp_path):
    assert simulate(config(texts, "flux"), tmp_path / "again").to_dict() == reference[0].to_dict()


def test_devices_that_exchange_nothing_do_not_touch_each_other(texts, tmp_path):
    """They share one model object here; each must go on from its own weights."""
    both = simulate(config(texts, "local"), tmp_path / "both").run("local")
    alone = dataclasses.replace(config(texts, "local"), fleet=config(texts, "local").fleet[1:])
    single = simulate(alone, tmp_path / "alone").run("local")
    assert [each.clients["slow"].train_loss for each in both.rounds] == [
        each.clients["slow"].train_loss for each in single.rounds
    ]
    assert both.rounds[-1].loss == both.first.loss  # nobody changed the global model
    assert both.rounds[1].clients["slow"].train_loss != both.rounds[0].clients["slow"].train_loss


def test_a_device_that_is_too_small_is_told_and_the_others_go_on(texts, tmp_path):
    small = device(texts, "slow", "jetson-orin-nano-8gb", memory_bytes=500 << 20)
    fleet = (device(texts, "fast", "rtx-4090"), small)
    seen = []
    result = simulate(config(texts, "random", fleet=fleet), tmp_path / "out", seen.append)
    run = result.run("random")
    assert list(run.refused) == ["slow"]
    assert "one expert in each" in run.refused["slow"]
    assert [list(each.clients) for each in run.rounds] == [["fast"]] * 2
    assert any("takes no part" in event.message for event in seen)
    assert [event.ended.server_round for event in seen if event.ended] == [1, 2]
    nobody = simulate(config(texts, "random", fleet=(small,)), tmp_path / "nobody").run("random")
    assert not nobody.rounds
    assert "no device" in nobody.stopped


def test_what_is_there_already_is_not_downloaded(texts, tmp_path):
    plain, installed = (
        simulate(config(texts, "random", rounds=1, preinstalled=there), tmp_path / str(there)).run("random").rounds[0]
        for there in (False, True)
    )
    assert installed.loss == plain.loss
    for name in ("fast", "slow"):
        assert installed.clients[name].bytes_down == 0 < plain.clients[name].bytes_down


def test_extra_metrics_are_of_the_global_model_and_targets_find_the_round(texts, tmp_path):
    calls = []

    def score(module, tokenizer, held_out):
        calls.append(sorted(held_out))
        return {"rounds seen": float(len(calls) - 1)}

    own = config(texts, "random", cost_shape=None)  # every device is charged with the model as it is
    run = simulate(own, tmp_path / "out", score=score).run("random")
    assert run.rounds[0].clients["slow"].resident == (16, 16, 16, 16)
    assert calls == [["fast", "slow"]] * 3
    assert run.seconds_to(1.0, "rounds seen") == run.rounds[0].ends
    assert run.seconds_to(2.0, "rounds seen") == run.rounds[1].ends
    assert run.seconds_to(9.0, "rounds seen") is None
    assert run.seconds_to(run.rounds[1].loss) in (run.rounds[0].ends, run.rounds[1].ends)
    assert run.seconds_to(run.first.loss + 1) == 0


def test_a_folder_of_something_else_is_refused(texts, tmp_path, reference):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds no simulation"):
        simulate(config(texts, "random"), tmp_path)
    assert (reference[1] / CONFIG_FILE).exists()
    with pytest.raises(ConfigError, match="other settings"):
        simulate(config(texts, "flux", seed=1), reference[1])


def test_pictures_show_something(reference, tmp_path):
    result = dataclasses.replace(reference[0], target_loss=reference[0].run("flux").rounds[0].loss)
    paths = save_pictures(tmp_path, result)
    assert [path.name for path in paths] == ["quality.png", "time.png", "budget.png", "traffic.png", "experts.png"]
    for path in paths:
        with Image.open(path) as image:
            assert min(image.size) > 200
            assert len(image.convert("RGB").getcolors(1 << 24)) > 50


def test_the_ledger_of_compression_is_in_rounds_and_pictures(texts, tmp_path):
    fleet = tuple(device(texts, name, "rtx-4090") for name in ("fast", "slow"))
    changes = {"compression": "topk3", "download_compression": "int4", "fleet": fleet, "cost_shape": None}
    result = simulate(config(texts, "fedavg", **changes), tmp_path / "out")
    first, last = result.run("fedavg").rounds
    for each in (first, last):
        assert each.traffic["upload_ratio"] > 60
        assert 0 < each.left("updates") < 1
        for way in ("down", "up"):
            sizes = [size for name, size in each.traffic.items() if name.startswith(f"bytes_{way}_")]
            assert 0 < sum(sizes) == pytest.approx(each.bytes_of(way))
    assert 0 < first.left("step") < 0.5
    assert math.isnan(last.left("step")), "the last step enters whole"
    assert last.bytes_of("down") < first.bytes_of("down") / 8
    assert json.loads((tmp_path / "out" / RESULT_FILE).read_text())["runs"][0]["rounds"][0]["traffic"] == first.traffic
    wide = next(path for path in save_pictures(tmp_path, result) if path.name == "traffic.png")
    with Image.open(wide) as image:
        assert len(image.convert("RGB").getcolors(1 << 24)) > 50


def test_the_command_says_what_is_wrong(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "edgefed", "simulate", str(tmp_path / "none.toml")], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "cannot read" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_whole_model_baselines_run_on_devices_that_cannot_hold_it(texts, tmp_path):
    """Fmd pays for what it offloads, and its devices really train here without files; fmq trains adapters on NF4."""
    result = simulate(config(texts, "fmd", "fmq", rounds=1), tmp_path)
    assert not result.run("fmd").refused, result.run("fmd").refused
    fmd, fmq = (result.run(name).rounds[0].clients for name in ("fmd", "fmq"))
    assert fmd["slow"].seconds["offload"] > 0
    assert not fmq["fast"].seconds.get("offload")
    assert set(fmq) | set(result.run("fmq").refused) == {"fast", "slow"}
    assert math.isfinite(result.run("fmd").rounds[0].loss)
    assert math.isfinite(result.run("fmq").rounds[0].loss)
    assert not list(tmp_path.rglob("offloaded"))


def test_slices_run_on_devices_that_evaluate_what_they_hold(texts, tmp_path):
    fleet = tuple(
        device(texts, name, "rtx-4090", expert_share=share) for name, share in (("fast", 0.5), ("slow", 0.125))
    )
    given = config(texts, "slices", "random", fleet=fleet, cost_shape=None, rounds=1, evaluate_devices=True)
    result = simulate(given, tmp_path / "out")
    last = {label: result.run(label).rounds[-1].clients for label in ("slices", "random")}
    for name in ("fast", "slow"):
        before, after = last["slices"][name].device_losses
        assert after < before, "training helps what the device holds"
        assert last["slices"][name].seconds["evaluate"] > 0
        # The same bytes of experts, their gradients and moments, whichever the method.
        assert last["slices"][name].expert_bytes == pytest.approx(last["random"][name].expert_bytes, rel=0.1)
    small, large = (last["slices"][name].expert_bytes for name in ("slow", "fast"))
    assert small == pytest.approx(large / 4, rel=0.1)
    assert sum(last["slices"]["slow"].resident) > sum(last["random"]["slow"].resident), "of more experts, a part"


def test_devices_do_not_evaluate_unless_asked(reference):
    for each in reference[0].run("flux").rounds:
        assert all(client.device_losses is None and client.expert_bytes > 0 for client in each.clients.values())


def test_a_device_trains_as_many_steps_as_the_time_of_a_round_allows(texts, tmp_path):
    def train_seconds(name, **training):
        settings = msgspec.structs.replace(TRAINING, **training)
        found = simulate(config(texts, "random", rounds=1, training=settings), tmp_path / name)
        return {device: client.seconds["train"] for device, client in found.runs[0].rounds[0].clients.items()}

    unlimited = train_seconds("unlimited")
    limit = 0.75 * unlimited["slow"]
    limited = train_seconds("limited", round_seconds=limit)
    assert limited["fast"] == unlimited["fast"]
    assert 0 < limited["slow"] < limit


def test_a_simulated_run_ends_early_with_its_best_model(texts, tmp_path):
    training = msgspec.structs.replace(TRAINING, learning_rate=0.3)
    settings = config(texts, "random", rounds=5, training=training, stop_after=1)
    run = simulate(settings, tmp_path / "out").runs[0]
    assert [each.server_round for each in run.rounds] == [1, 2]
    assert run.rounds[0].loss > run.first.loss == run.rounds[1].loss
    assert "the final model is that of the start of round 1" in run.stopped
    assert simulate(settings, tmp_path / "out").runs[0] == run
    messages = []
    sink = type("Sink", (NullProgress,), {"message": lambda self, text: messages.append(text)})()
    edgefed.export(tmp_path / "out" / "random" / "run", tmp_path / "model", server_round="best", progress=sink)
    assert "the smallest of 2 evaluated models" in messages[0]
    assert read_record(tmp_path / "model").server_round == 1


def test_models_are_evaluated_as_often_as_the_run_says(texts, tmp_path):
    training = msgspec.structs.replace(TRAINING, evaluate_every=2)
    result = simulate(config(texts, "random", rounds=3, training=training), tmp_path / "out")
    run = result.runs[0]
    assert [math.isnan(each.loss) for each in run.rounds] == [True, False, False]
    assert len(run.curve) == 3
    assert [each["loss"] is None for each in result.to_dict()["runs"][0]["rounds"]] == [True, False, False]


@pytest.mark.parametrize("method", ["fmes", "slices"])
def test_a_paced_run_trains_what_links_can_send_and_keeps_old_versions_of_the_rest(texts, tmp_path, method):
    fleet = (device(texts, "fast", "rtx-4090", "lan"), device(texts, "slow", "rtx-4090", "cable", expert_share=0.5))
    given = config(texts, method, fleet=fleet, rounds=3, pace=0.5, preinstalled=True, cost_shape=None)
    first, *others = simulate(given, tmp_path / "out").run(method).rounds
    for each in others:
        slow, fast = each.clients["slow"], each.clients["fast"]
        assert sum(fast.trainable) == sum(fast.resident) > 50, "its link is fifty times as fast"
        assert sum(slow.resident) >= 32, "it holds what its memory allows"
        assert 4 <= sum(slow.trainable) < sum(slow.resident)
        assert 0 < slow.bytes_up < 0.5 * fast.bytes_up
        for name in ("fast", "slow"):
            assert first.clients[name].bytes_up < 0.2 * fast.bytes_up, "no rate is known yet"
    changed = fast.bytes_up / 4  # of round 2: more than half of what the slow device holds
    assert slow.bytes_down < changed, "three quarters of what it does not train may be older"


def test_methods_that_pace_themselves_or_send_nothing_refuse_a_pace(texts):
    for method, reason in (("flux", "it assigns experts itself"), ("local", "it exchanges no experts")):
        with pytest.raises(ConfigError, match=f"`pace` has no effect with {method}: {reason}"):
            config(texts, method, pace=0.8)
    with pytest.raises(ConfigError, match="`pace` is -1, expected 0 to 1000"):
        config(texts, "fmes", pace=-1.0)


def test_slices_that_are_never_sent_are_found_again_in_the_next_round(texts, tmp_path):
    """Each round reads them from the files of the one before: which neurons they are belongs to them."""

    @register
    @dataclasses.dataclass(frozen=True)
    class SlicesAlone(Slices):
        name = "slices_alone"
        exchanges = False

    fleet = (device(texts, "slow", "rtx-4090", expert_share=0.25),)
    given = config(texts, "slices_alone", fleet=fleet, cost_shape=None, rounds=3, evaluate_devices=True)
    losses = [each.clients["slow"].device_losses for each in simulate(given, tmp_path / "out").runs[0].rounds]
    assert losses[0][1] == pytest.approx(losses[1][0]) != losses[0][0]
    assert losses[1][1] == pytest.approx(losses[2][0])
    assert losses[2][1] < losses[0][1]


def test_a_private_part_of_a_simulated_device_helps_it_alone(texts, tmp_path):
    training = msgspec.structs.replace(TRAINING, experts="none", router="full", learning_rate=0.01)
    losses = {}
    for private in ("none", "adapter"):
        fleet = (device(texts, "slow", "rtx-4090", private=private),)
        given = config(texts, "fedavg", fleet=fleet, cost_shape=None, training=training, evaluate_devices=True)
        run = simulate(given, tmp_path / private).runs[0]
        losses[private] = run.rounds[-1].clients["slow"].device_losses[1], run.rounds[-1].loss
    assert losses["adapter"][0] < losses["none"][0], "what the device runs"
    assert losses["adapter"][0] < losses["adapter"][1], "the global model does not have it"


@pytest.mark.parametrize("average", ["product", "factors"])
def test_devices_of_unequal_ranks_learn_together(texts, tmp_path, average):
    """The slow device sends half of the bytes of the adapters, and both are in the model."""
    training = msgspec.structs.replace(
        TRAINING, experts="lora", router="none", lora_rank=4, min_lora_rank=2, learning_rate=0.01
    )  # fmt: skip
    fleet = tuple(device(texts, name, "rtx-4090", lora_rank=rank) for name, rank in (("fast", None), ("slow", 2)))
    given = config(texts, "fedavg", fleet=fleet, cost_shape=None, training=training, adapter_average=average)
    first, second = simulate(given, tmp_path / "out").runs[0].rounds
    assert second.clients["slow"].bytes_up == pytest.approx(second.clients["fast"].bytes_up / 2, rel=0.1)
    assert second.loss < first.loss


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"engine": "Ray"}, "`engine` is 'Ray', expected one of built-in, ray"),
        ({"workers": 2}, "`workers` has no effect"),
    ],
)
def test_an_engine_that_is_unknown_or_has_no_workers_is_refused(texts, tmp_path, given, error):
    with pytest.raises(ConfigError, match=error):
        simulate(config(texts, "fmes"), tmp_path / "out", **given)


@pytest.mark.full
@pytest.mark.timeout(300)
def test_more_workers_than_ray_has_processors_are_refused(texts, tmp_path):
    pytest.importorskip("ray", reason="needs ray: pip install 'edgefed[ray]'")
    with pytest.raises(ConfigError, match=r"999 workers of \d+ threads? need \d+ CPUs, Ray has \d+"):
        simulate(config(texts, "fmes"), tmp_path / "out", engine="ray", workers=999)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_ray_gives_the_same_result_bit_by_bit(texts, tmp_path):
    pytest.importorskip("ray", reason="needs ray: pip install 'edgefed[ray]'")
    poor = device(texts, "slow", "jetson-orin-nano-8gb", "cable")
    fleet = (device(texts, "fast", "rtx-4090"), poor, dataclasses.replace(poor, name="third"))
    settings = config(texts, "flux", "hfedmoe", fleet=fleet)
    alone = simulate(settings, tmp_path / "alone")
    beside = simulate(settings, tmp_path / "beside", engine="ray", workers=2)
    assert beside.to_dict() == alone.to_dict()
    for label in ("flux", "hfedmoe"):
        blobs = [
            sorted(path.name for path in (tmp_path / out / label / "run/blobs").glob("[0-9a-f][0-9a-f]/*"))
            for out in ("alone", "beside")
        ]
        assert blobs[0] == blobs[1]
        assert len(blobs[0]) > 60
