"""How a device makes its profile: what fits, what the owner asked for, and what it is told."""

from __future__ import annotations

import dataclasses
import json

import msgspec
import pytest

from edgefed.aggregator.blobs import BlobStore
from edgefed.aggregator.rounds import RoundPolicy
from edgefed.costs.memory import StepSetup, profiling_memory
from edgefed.costs.shapes import KNOWN_SHAPES
from edgefed.embedded import tiny_model_directory
from edgefed.errors import ConfigError
from edgefed.expert_records import ActivationProfile
from edgefed.methods.averaging import plan_trainable, select_by_score
from edgefed.methods.fedavg import FedAvg
from edgefed.methods.interface import FIRST_ROUND, Profiling
from edgefed.methods.registry import make_method
from edgefed.progress import NullProgress
from edgefed.protocol.messages import Assignment, RunConfig, TrainingConfig
from edgefed.runs import RunReader, import_model
from edgefed.trainer import activation_profile, local_trainer
from edgefed.trainer.activation_profile import MAX_CONCURRENT_BATCHES, PROFILE_STORAGES, choose_profile_pass
from edgefed.trainer.local_trainer import LocalTrainer
from edgefed.trainer.planner import DeviceLimits
from edgefed.trainer.ports import ProcessMemory
from edgefed.trainer.saved_plan import PLAN_FILE
from edgefed.training.profiling import ProfilePass, activation_error
from edgefed.training.stopping import MAX_FREQUENCY_ERROR

GIB = 1 << 30
OLMOE = KNOWN_SHAPES["OLMoE-1B-7B"]
SETUP = StepSetup(8, 128)


def test_the_more_memory_the_fewer_reads():
    """OLMoE, 6.9 G parameters in bfloat16: 13 GB of experts, 0.8 GB a layer."""
    ways = {
        budget: choose_profile_pass(OLMOE, SETUP, 128, int(budget * GIB))[0] for budget in (64, 8, 3, 2.2, 1.2, 0.1)
    }
    assert ways[64] == ProfilePass("all", None, 8, 1)
    assert ways[8] == ProfilePass("layer", None, 8, 16)
    assert ways[3].residency == "layer"
    assert ways[3].storage is None
    assert ways[3].batch_size * ways[3].concurrent_batches >= 128
    assert ways[2.2].residency == "layer"
    assert ways[2.2].storage in ("int8", "nf4")
    assert ways[0.1] == ProfilePass("expert", None, 1, 1)
    for budget, way in ways.items():
        assert way.concurrent_batches <= MAX_CONCURRENT_BATCHES
        if budget != 0.1:
            each = StepSetup(way.batch_size, 128, expert_storage=way.storage)
            need = profiling_memory(OLMOE, each, 64, residency=way.residency, concurrent_batches=way.concurrent_batches)
            assert need.total_bytes <= budget * GIB


def test_what_the_owner_asks_for_holds():
    for budget in (64, 16, 8, 3, 2, 1.5):
        assert choose_profile_pass(OLMOE, SETUP, 128, int(budget * GIB), "full")[0].storage is None
        for storage in ("int8", "nf4"):
            way, reason = choose_profile_pass(OLMOE, SETUP, 128, int(budget * GIB), storage)
            assert way.storage == storage or "does not fit" in reason
    assert choose_profile_pass(OLMOE, SETUP, 128, 8 * GIB, "nf4")[0].residency == "all"
    with pytest.raises(ConfigError, match="invalid storage of a profile 'int4', expected one of auto, full, int8, nf4"):
        choose_profile_pass(OLMOE, SETUP, 128, GIB, "int4")


def test_experts_that_cannot_be_quantized_are_not():
    for budget in (8, 3, 2, 1):
        assert choose_profile_pass(OLMOE, SETUP, 128, int(budget * GIB), packable=False)[0].storage is None


def test_attention_and_threads_take_memory():
    def need(**options):
        return profiling_memory(OLMOE, SETUP, 64, residency="layer", concurrent_batches=16, **options).parts

    assert need(attention=True)["activations"] > need()["activations"]
    assert need(threads=8)["waiting batches"] > need()["waiting batches"]
    assert (
        need()["resident experts"] == 64 * 3 * 2048 * 1024 * 2 + 3 * 2048 * 1024 * 2
    )  # a layer, and the one being read


def test_no_more_batches_side_by_side_than_threads_are_good_for():
    way, reason = choose_profile_pass(OLMOE, SETUP, 8 * MAX_CONCURRENT_BATCHES * 3, 12 * GIB)
    assert way == ProfilePass("layer", None, 8, MAX_CONCURRENT_BATCHES)
    assert "read 3 times" in reason


def test_the_owner_hears_which_way_and_why():
    assert choose_profile_pass(OLMOE, SETUP, 128, 64 * GIB)[1].startswith(
        "all experts in the model's dtype in memory: "
    )
    assert choose_profile_pass(OLMOE, SETUP, 128, 8 * GIB)[1].startswith(
        "layer by layer, experts in the model's dtype, read once: "
    )
    lacking = choose_profile_pass(OLMOE, SETUP, 128, 0, "nf4")[1]
    assert lacking.startswith("one expert at a time (a layer in nf4 does not fit), read for each of 128 batches: ")
    assert lacking.endswith("but only 0 B are free")


class Heard(NullProgress):
    def __init__(self):
        self.messages = []

    def message(self, text):
        self.messages.append(text)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    run = RunConfig(
        run_id="run", model="tiny", method="hfedmoe", method_options={}, rounds=2, seed=3,
        training=TrainingConfig(
            local_steps=1, batch_size=4, sequence_length=64, profile_tokens=1024, evaluation_tokens=128
        ),
    )  # fmt: skip
    import_model(str(tiny_model_directory()), folder / "run", run, RoundPolicy(rounds=2, min_clients=1))
    lines = [{"text": f"def function_{i}(argument):\n    return argument + {i}\n" * 8} for i in range(40)]
    (folder / "notes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder, run


def one_round(run_folder, folder, storage, run=None, data="notes.jsonl"):
    return round_of(run_folder, folder, storage, run, data)[:2]


def round_of(run_folder, folder, storage="auto", run=None, data="notes.jsonl"):
    """(profile, messages about it, metrics of the round)."""
    root, run = run_folder[0], run or run_folder[1]
    heard, blobs = Heard(), BlobStore(root / "run")
    limits = DeviceLimits(expert_share=0.5, profile_storage=storage)
    source = str(root / data) if data.endswith(".jsonl") else data
    trainer = LocalTrainer(source, folder, limits, "me", ProcessMemory(4 << 30))
    with RunReader(root / "run") as reader:
        manifest = reader.manifest()
    update = trainer.train_round(
        run, manifest, Assignment(server_round=1, deadline_s=None, seed=0),
        lambda items: {item.sha256: blobs.path(item.sha256) for item in items}, heard, folder / "update",
    )  # fmt: skip
    saved = json.loads((folder / PLAN_FILE).read_text())
    messages = [text for text in heard.messages if text.startswith("profile:")]
    return ActivationProfile.from_dict(saved["profile"]), messages, update.metrics


def test_a_device_profiles_as_its_owner_requested(run_folder, tmp_path, monkeypatch):
    found, ways = {}, []
    made = activation_profile.profile_blocks

    def watched(*args, **kwargs):
        ways.append(args[3])
        return made(*args, **kwargs)

    monkeypatch.setattr(activation_profile, "profile_blocks", watched)
    for storage in PROFILE_STORAGES:
        found[storage], heard = one_round(run_folder, tmp_path / storage, storage)
        assert len(heard) == 1
    assert [way.storage for way in ways] == [None, None, "int8", "nf4"]
    assert found["auto"].to_dict() == found["full"].to_dict()
    for storage in ("int8", "nf4"):
        assert found[storage].num_tokens == found["full"].num_tokens
        assert found[storage].to_dict() != found["full"].to_dict()
    with pytest.raises(ConfigError, match="invalid storage of a profile 'int4'"):
        one_round(run_folder, tmp_path / "int4", "int4")


@dataclasses.dataclass(frozen=True)
class MostUsed(FedAvg):
    """A method of somebody's own: the most used experts."""

    name = "most_used"
    profiling = Profiling()

    def plan_experts(self, profile, experts_per_layer, budget, rng, context=FIRST_ROUND):
        scores = [layer.frequency for layer in profile.layers]
        used = [score > 0 for score in scores]
        return plan_trainable(experts_per_layer, select_by_score(scores, used, budget.resident_experts))


@pytest.mark.parametrize(
    "method", ["hfedmoe", *(pytest.param(each, marks=pytest.mark.full) for each in ("flux", "most_used"))]
)
def test_a_profile_ends_when_the_choice_of_any_method_is_stable(run_folder, tmp_path, method, monkeypatch):
    def method_named(name, options):
        return MostUsed() if name == "most_used" else make_method(name, options)

    monkeypatch.setattr(local_trainer, "make_method", method_named)
    training = TrainingConfig(
        local_steps=1,
        batch_size=4,
        sequence_length=32,
        profile_tokens=8192,
        profile_agreement=0.8,
        evaluation_tokens=32,
    )
    run = msgspec.structs.replace(run_folder[1], method=method, training=training)
    found, heard, metrics = round_of(run_folder, tmp_path / "some", run=run, data="silo:unittest")
    assert found.num_tokens == metrics["profile_tokens"] < 8192
    assert 0.8 <= metrics["profile_agreement"] <= 1
    assert 0 < metrics["profile_frequency_error"] <= MAX_FREQUENCY_ERROR
    assert heard[-1].startswith(f"profile: {found.num_tokens:,} of 8,192 tokens (estimated from these: ")
    again, *_ = round_of(run_folder, tmp_path / "again", run=run, data="silo:unittest")
    assert again.to_dict() == found.to_dict()
    run = msgspec.structs.replace(run, training=msgspec.structs.replace(training, profile_agreement=1.0))
    whole, heard, metrics = round_of(run_folder, tmp_path / "all", run=run, data="silo:unittest")
    assert whole.num_tokens == metrics["profile_tokens"] == 8192
    assert metrics["profile_agreement"] == 1
    assert len(heard) == 1
    assert activation_error(found, whole) < 0.1
