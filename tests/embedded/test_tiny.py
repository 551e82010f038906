"""The packaged tiny model: loads like any checkpoint, has learned something, and uses its experts."""

from __future__ import annotations

import json
import math

import pretrain_tiny as pretrain
import pytest
import torch

from edgefed.embedded import tiny_model_directory
from edgefed.embedded.silos import SILOS, Document, load_silo, pretraining_documents
from edgefed.training.data import load_corpus
from edgefed.training.encoding import encode_examples

MAX_MODEL_BYTES = 12_000_000


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Steps of microseconds: on a busy machine, threads that wait for each other make them a hundred times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny():
    """The model and tokenizer, loaded as a user loads them; no access to the network."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_model_directory()
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.fixture(scope="module")
def validation_blocks(tiny):
    """Blocks (N, 256) of pretraining files that the model has not seen."""
    record = json.loads((tiny_model_directory() / "pretraining.json").read_text())
    _, validation = pretrain.split_validation(pretraining_documents(), record["recipe"]["validation_share"])
    stream = pretrain.token_stream(validation[:4], tiny[1])
    return stream[: 8 * 256].view(8, 256)


def test_files_and_sizes():
    folder = tiny_model_directory()
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "pretraining.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (folder / "model.safetensors").stat().st_size <= MAX_MODEL_BYTES
    assert pretrain.MAX_FILE_BYTES <= MAX_MODEL_BYTES


def test_record_fits_the_model(tiny):
    model, _ = tiny
    record = json.loads((tiny_model_directory() / "pretraining.json").read_text())
    assert record["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert record["tokens"] == record["steps"] * record["recipe"]["batch_size"] * record["recipe"]["sequence_length"]
    assert 1.0 < record["train_loss"] < record["validation_loss"] < math.log(pretrain.VOCABULARY) / 2
    assert {"data_sha256", "python", "torch", "transformers", "wall_s"} <= set(record)


def test_config_is_that_of_the_recipe(tiny):
    config = tiny[0].config
    assert config.model_type == "olmoe"
    assert config.output_router_logits is False  # it would add the balance loss to every fine-tuning loss
    recipe = pretrain.tiny_config()
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_experts", "num_experts_per_tok")
    for name in (*names, "norm_topk_prob", "tie_word_embeddings", "max_position_embeddings", "vocab_size"):
        assert getattr(config, name) == getattr(recipe, name), name
    assert all(parameter.dtype == torch.float32 for parameter in tiny[0].parameters())


def test_tokenizer_gives_back_every_text(tiny):
    _, tokenizer = tiny
    text = "def f(x):\n\treturn  x , 'Z\u00fcrich' .\r\n\n    # \U0001f600 \x00\x7f"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == tiny[0].config.vocab_size
    assert tokenizer.eos_token == tokenizer.pad_token == tokenizer.bos_token == "<|endoftext|>"
    assert tokenizer.eos_token_id == tiny[0].config.eos_token_id == tiny[0].generation_config.eos_token_id


def test_unseen_text_is_predicted_far_better_than_by_chance(tiny, validation_blocks):
    model, _ = tiny
    with torch.no_grad():
        loss = model(input_ids=validation_blocks, labels=validation_blocks).loss.item()
        shuffled = validation_blocks.flatten()[torch.randperm(validation_blocks.numel())].view_as(validation_blocks)
        no_order = model(input_ids=shuffled, labels=shuffled).loss.item()
    assert loss < 0.5 * math.log(model.config.vocab_size)
    assert no_order > loss + 2  # it has learned what follows what, not only which tokens are frequent


def test_it_writes_python(tiny):
    model, tokenizer = tiny
    prompt = tokenizer("    def __init__(self, name):\n        self.name =", return_tensors="pt")
    with torch.no_grad():
        written = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert written.shape[1] > prompt["input_ids"].shape[1]
    assert tokenizer.decode(written[0]).startswith("    def __init__(self, name):\n        self.name = name\n")


def test_every_layer_uses_its_experts_and_every_silo_uses_them_differently(tiny):
    model, tokenizer = tiny
    shares = {}
    for name in ("topics", "xml", "asyncio"):
        blocks = encode_examples(load_corpus(f"silo:{name}", 0.2, 0).held_out, tokenizer, 256)
        with torch.no_grad():
            logits = model(input_ids=blocks.input_ids[:8], output_router_logits=True).router_logits
        shares[name] = torch.stack(
            [torch.bincount(layer.topk(2).indices.flatten(), minlength=16) / (2 * layer.shape[0]) for layer in logits]
        )  # (4, 16)
    pooled = torch.stack(list(shares.values())).mean(dim=0)
    assert (pooled > 0.005).sum(dim=1).min() >= 14  # per layer; even use would be 0.0625
    assert pooled.max() < 0.3
    distance = (shares["topics"] - shares["xml"]).abs().sum(dim=1) / 2  # total variation per layer, 0 to 1
    assert distance.max() > 0.15


def test_silos_are_unseen_but_not_foreign(tiny):
    """Held-out silo text costs more than validation text of the pretraining, and far less than chance."""
    model, tokenizer = tiny
    for name in ("topics", "email"):
        blocks = encode_examples(load_corpus(f"silo:{name}", 0.2, 0).held_out, tokenizer, 256)
        with torch.no_grad():
            loss = model(input_ids=blocks.input_ids[:8], labels=blocks.labels[:8]).loss.item()
        assert 2.0 < loss < 0.7 * math.log(model.config.vocab_size)


# --- the script


def test_schedule_rises_and_decays():
    values = [pretrain.schedule(step / 1000) for step in range(1001)]
    peak = values.index(max(values))
    assert 0 < values[0] < 0.1
    assert 15 <= peak <= 25
    assert max(values) == pytest.approx(1.0, abs=1e-3)
    assert values[:peak] == sorted(values[:peak])
    assert values[peak:] == sorted(values[peak:], reverse=True)
    assert values[-1] == pytest.approx(0.05)


def test_balance_loss_is_one_when_even_and_counts_each_layer():
    first, second = 50 * torch.eye(4), 25 * torch.eye(4)

    def tokens(*experts):  # each token takes the pair (a, b), nearly all weight on a
        return torch.stack([first[a] + second[b] for a, b in experts])

    def loss(*layers):
        return pretrain.balance_loss(layers, pretrain.expert_shares(layers, 2)).item()

    even = tokens((0, 1), (1, 2), (2, 3), (3, 0))
    one, other = tokens(*[(0, 1)] * 4), tokens(*[(2, 3)] * 4)
    assert pretrain.expert_shares((even, one), 2).tolist() == [[0.25] * 4, [0.5, 0.5, 0, 0]]
    assert loss(even) == pytest.approx(1.0, abs=1e-5)
    assert loss(one) == pytest.approx(2.0, abs=1e-5)
    # Pooled over the layers these two would pass for even.
    assert loss(one, other) == pytest.approx(2.0, abs=1e-5)


def test_validation_files_are_apart_and_the_same_every_time():
    documents = tuple(Document(f"{index}.py", "x" * 100) for index in range(50))
    train, validation = pretrain.split_validation(documents, 0.1)
    assert len(validation) == 5
    assert len(train) == 45
    assert not set(train) & set(validation)
    assert pretrain.split_validation(documents[::-1], 0.1) == (train, validation)


def test_training_is_reproducible_and_learns(tiny):
    from transformers import OlmoeForCausalLM

    stream = pretrain.token_stream(list(load_silo(SILOS[0]).held_out)[:2], tiny[1])
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        model = OlmoeForCausalLM(pretrain.tiny_config())
        model.set_experts_implementation("grouped_mm")
        recipe = pretrain.Recipe(steps=6, batch_size=2, sequence_length=32)
        before = pretrain.mean_loss(model, stream[:700], 32)
        outcome = pretrain.pretrain(model, stream, recipe)
        losses.append(pretrain.mean_loss(model, stream[:700], 32))
        assert outcome["steps"] == 6
        assert outcome["tokens"] == 6 * 2 * 32
        assert losses[-1] < before - 0.3
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_time_limit_ends_the_run(tiny):
    from transformers import OlmoeForCausalLM

    stream = pretrain.token_stream([Document("a", "import os\n" * 200)], tiny[1])
    model = OlmoeForCausalLM(pretrain.tiny_config())
    model.set_experts_implementation("grouped_mm")
    recipe = pretrain.Recipe(steps=10**6, minutes=1 / 600, batch_size=1, sequence_length=16)
    outcome = pretrain.pretrain(model, stream, recipe)
    assert 1 <= outcome["steps"] < 100
    assert outcome["wall_s"] < 10
