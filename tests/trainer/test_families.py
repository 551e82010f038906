"""From a checkpoint folder to a federated round and back to a checkpoint, for every family that we know."""

from __future__ import annotations

import json
import string
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from edgefed.aggregator.blobs import BlobStore
from edgefed.aggregator.rounds import RoundPolicy
from edgefed.exporting import export_model
from edgefed.progress import NullProgress
from edgefed.protocol import frames
from edgefed.protocol.messages import Assignment, RunConfig, TrainingConfig
from edgefed.runs import RunReader, import_model
from edgefed.trainer.local_trainer import LocalTrainer
from edgefed.trainer.planner import DeviceLimits
from edgefed.trainer.ports import ProcessMemory

sys.path.insert(0, str(Path(__file__).parents[1] / "moe"))
from toy_models import FAMILIES, MORE_FAMILIES  # noqa: E402

KNOWN = {**FAMILIES, **MORE_FAMILIES}


@pytest.fixture(scope="module")
def tokenizer():
    """One token a character; ids below the toy vocabulary of 96."""
    characters = (string.ascii_letters + string.digits + string.punctuation + " \n")[:90]
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{c: i + 4 for i, c in enumerate(characters)}}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


@pytest.mark.parametrize("family", KNOWN)
def test_a_round_of_every_family(family, tokenizer, tmp_path):
    torch.manual_seed(0)
    try:
        config = AutoConfig.for_model(family, **KNOWN[family])
        model = AutoModelForCausalLM.from_config(config).eval()
    except (ValueError, KeyError) as error:
        pytest.skip(f"this transformers has no {family}: {error}")
    checkpoint = tmp_path / "checkpoint"
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    run = RunConfig(
        run_id="run", model=family, method="hfedmoe", method_options={"exploration": 0.0}, rounds=1, seed=0,
        training=TrainingConfig(local_steps=2, batch_size=2, sequence_length=16, learning_rate=1e-2),
    )  # fmt: skip
    import_model(str(checkpoint), tmp_path / "run", run, RoundPolicy(rounds=1, min_clients=1))
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"the {i} foxes jump over {i * i} dogs"}) + "\n" for i in range(30)))
    trainer = LocalTrainer(str(data), tmp_path / "me", DeviceLimits(expert_share=0.4), "me", ProcessMemory(64 << 30))
    blobs = BlobStore(tmp_path / "run")

    def fetch(items):
        return {item.sha256: blobs.path(item.sha256) for item in items}

    with RunReader(tmp_path / "run") as reader:
        manifest = reader.manifest()
    update = trainer.train_round(
        run, manifest, Assignment(server_round=1, deadline_s=None, seed=0), fetch, NullProgress(), tmp_path / "update"
    )
    held = {(report.layer, report.expert) for report in update.experts}
    # Less than the budget where the text is routed to fewer experts than that.
    assert len(manifest.experts_per_layer) <= len(held) <= int(0.4 * sum(manifest.experts_per_layer))
    assert len({layer for layer, _ in held}) == len(manifest.experts_per_layer)
    assert any(report.steps for report in update.experts)
    units = {unit.key: unit for unit in manifest.units}
    sent = {name.rpartition("|")[0] for name in frames.read_header(tmp_path / "update")}
    assert {(units[key].layer, units[key].expert) for key in sent if units[key].kind == "expert"} == held
    assert update.metrics["held_out_loss_after"] != update.metrics["held_out_loss_before"]

    exported = AutoModelForCausalLM.from_pretrained(export_model(tmp_path / "run", tmp_path / "model")).eval()
    inputs = torch.randint(4, 90, (2, 12))
    with torch.no_grad():
        torch.testing.assert_close(exported(inputs).logits, model(inputs).logits, atol=1e-5, rtol=1e-4)
