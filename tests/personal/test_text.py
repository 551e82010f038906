"""Text for FedMoE: the shared extractor, two tokenizers side by side, and models of the users' own."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from text_rig import (
    CLASSES,
    labelled_lines,
    tiny_bert,
    tiny_gemma2,
    tiny_granite,
    tiny_llama,
    tiny_roberta,
    tiny_t5,
    tiny_xlnet,
    word_tokenizer,
)
from torch import nn

from edgefed.embedded import resolve_model
from edgefed.errors import CheckpointError, ConfigError, DataError, ModelNotFound, UnsupportedArchitecture
from edgefed.methods.fedmoe import FedMoE
from edgefed.personal.extractors import EncoderShape, TextExtractor, make_extractor
from edgefed.personal.local_training import Rates, evaluate, make_optimizer, train_epochs
from edgefed.personal.mixture import FixedGate, Gate, LocalMixture
from edgefed.personal.networks import PersonalModel
from edgefed.personal.samples import (
    Batch,
    check_same_vocabulary,
    hold_out,
    same_vocabulary,
    text_samples,
    token_samples,
    tokenize,
)
from edgefed.personal.text_models import check_causal, load_text_model
from edgefed.simulation.personal_baselines import make_strategy
from edgefed.simulation.personal_federation import Client, Settings, run
from edgefed.training.data import Example, Segment
from edgefed.training.tokenizer import load_tokenizer, vocabulary_size

SMALL = EncoderShape(width=32, layers=1, heads=2, hidden=64)
TEXTS = ("def close(self): return None", "a", "The value of an expression is an object .", "import os , sys")
LABELS = np.array([0, 1, 1, 0], np.int64)


@pytest.fixture(scope="module")
def packaged():
    return load_tokenizer(resolve_model("tiny"))


@pytest.fixture(scope="module")
def lines():
    return labelled_lines(20)


@pytest.fixture(scope="module")
def bert(tmp_path_factory, lines):
    return tiny_bert(tmp_path_factory.mktemp("bert"), word_tokenizer(lines[0], 300, specials=True))


@pytest.fixture(scope="module")
def llama(tmp_path_factory, lines):
    return tiny_llama(tmp_path_factory.mktemp("llama"), word_tokenizer(lines[0], 200, specials=False, end="<end>"))


def padded(batch: dict[str, torch.Tensor], extra: int, with_id: int) -> dict[str, torch.Tensor]:
    """The same texts with more padding, filled with an id of a word."""
    rows = len(batch["input_ids"])
    filled = torch.where(batch["attention_mask"].bool(), batch["input_ids"], with_id)
    ids = torch.cat([filled, torch.full((rows, extra), with_id)], 1)
    return {
        "input_ids": ids,
        "attention_mask": torch.cat([batch["attention_mask"], torch.zeros(rows, extra, dtype=torch.int64)], 1),
    }


# --- the shared extractor ----------------------------------------------------------------------------------------


def test_text_small_has_the_size_and_the_first_weights_that_it_says(packaged):
    assert vocabulary_size(packaged) == 2048
    extractor = make_extractor("text-small", 3, vocab_size=2048)
    assert sum(parameter.numel() for parameter in extractor.parameters()) == 1_577_984 + 256 * 2048 == 2_102_272
    assert all(tensor.dtype == torch.float32 for tensor in extractor.state_dict().values())
    again = make_extractor("text-small", 3, vocab_size=2048, per_token=True)
    other = make_extractor("text-small", 4, vocab_size=2048)
    assert again.state_dict().keys() == extractor.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), extractor.parameters(), strict=True))
    assert not torch.equal(other.encoder.embedding.weight, extractor.encoder.embedding.weight)
    inputs = tokenize(TEXTS, packaged, 16).batch(np.arange(4))
    assert extractor(inputs).shape == (4, 256) == extractor.gate_features(inputs).shape
    with pytest.raises(ValueError, match="vocab_size"):
        make_extractor("text-small", 0)
    with pytest.raises(ConfigError, match="text-huge"):
        make_extractor("text-huge", 0, vocab_size=5)


@pytest.mark.parametrize("per_token", [False, True])
def test_padding_and_neighbours_change_nothing(packaged, per_token):
    torch.manual_seed(0)
    extractor = TextExtractor(2048, per_token, SMALL)
    inputs = tokenize(TEXTS, packaged, 32).batch(np.arange(4))
    real = inputs["attention_mask"].bool()
    more = padded(inputs, 5, with_id=7)
    for function in (extractor, extractor.gate_features):
        found, wanted = function(more), function(inputs)
        if per_token:
            found, wanted = found[:, : real.shape[1]][real], wanted[real]
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        alone = [function(tokenize([text], packaged, 32).batch(np.arange(1)))[0] for text in TEXTS]
        together = torch.cat(alone) if per_token else torch.stack(alone)
        torch.testing.assert_close(together, wanted, rtol=1e-5, atol=1e-6)


def test_word_order_counts_and_length_is_not_limited():
    torch.manual_seed(0)
    extractor = TextExtractor(50, False, SMALL)
    ids = torch.randint(50, (1, 700))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    turned = {**inputs, "input_ids": ids.flip(1)}
    assert extractor(inputs).isfinite().all()
    assert (extractor(inputs) - extractor(turned)).abs().max() > 1e-4
    torch.testing.assert_close(extractor.gate_features(inputs), extractor.gate_features(turned))


def test_the_gate_looks_at_embeddings_but_teaches_them_nothing(packaged):
    torch.manual_seed(0)
    extractor = TextExtractor(2048, False, SMALL)
    inputs = tokenize(TEXTS, packaged, 32).batch(np.arange(4))
    seen = extractor.gate_features(inputs)
    assert not seen.requires_grad
    first = inputs["input_ids"][0][inputs["attention_mask"][0].bool()]
    torch.testing.assert_close(seen[0], extractor.encoder.embedding.weight[first].mean(0).detach())


# --- samples -----------------------------------------------------------------------------------------------------


def test_each_model_gets_the_ids_of_its_own_tokenizer(packaged, bert):
    own = load_tokenizer(bert)
    samples = text_samples(TEXTS, LABELS, ("code", "prose"), shared_tokenizer=packaged, own_tokenizer=own, length=6)
    batch = samples.batch(np.array([2, 1]))
    for inputs, tokenizer in ((batch.shared, packaged), (batch.own, own)):
        longest = inputs["input_ids"].shape[1]
        assert longest <= 6
        for row, text in enumerate((TEXTS[2], TEXTS[1])):
            wanted = tokenizer([text], truncation=True, max_length=6)["input_ids"][0]
            assert inputs["input_ids"][row].tolist() == wanted + [tokenizer.pad_token_id] * (longest - len(wanted))
            assert inputs["attention_mask"][row].tolist() == [1] * len(wanted) + [0] * (longest - len(wanted))
    assert batch.own["input_ids"][0, -1] == own.convert_tokens_to_ids("[SEP]"), "a cut text ends as others do"
    assert batch.labels.tolist() == [1, 1]
    assert batch.labels.dtype == torch.int64
    assert (samples.shared.max_length, samples.own.max_length) == (6, 6)
    assert samples.own.num_truncated == 2
    train, held_out = hold_out(samples, 0.5, seed=0)
    assert len(train) == len(held_out) == 2
    assert sorted(train.labels) == sorted(held_out.labels) == [0, 1]
    whole = {tuple(row) for part in (train, held_out) for row in part.batch(np.arange(2)).shared["input_ids"].tolist()}
    assert len(whole) == 4


def test_texts_of_one_vocabulary_are_stored_once(packaged):
    twin = load_tokenizer(resolve_model("tiny"))
    samples = text_samples(TEXTS, LABELS, ("a", "b"), shared_tokenizer=packaged, own_tokenizer=twin, length=9)
    batch = samples.subset(np.arange(3)).batch(np.arange(2))
    assert samples.own is samples.shared
    assert batch.own is batch.shared


@pytest.mark.parametrize("text", ["", "   \n\t "])
def test_an_empty_text_is_reported_by_its_number(packaged, bert, text):
    for tokenizer in (packaged, load_tokenizer(bert)):  # the second makes [CLS] [SEP] of it
        with pytest.raises(DataError, match="text 2 of 3 is empty"):
            tokenize(["one", text, "three"], tokenizer, 8)


def test_a_text_is_cut_where_the_model_ends(packaged, bert, tmp_path, lines):
    long = " ".join(["value"] * 600)
    assert len(tokenize([long], packaged, 10**6).ids) == packaged.model_max_length == 512
    model, tokenizer = load_text_model(bert, num_classes=2, task="text")  # its tokenizer says no limit, its table does
    rows = tokenize([long], tokenizer, 128)
    assert (rows.max_length, rows.num_truncated) == (40, 1)
    assert model(rows.batch(np.arange(1))).shape == (1, 2)
    folder = tiny_roberta(tmp_path, word_tokenizer(lines[0], 50, specials=True))
    model, tokenizer = load_text_model(folder, num_classes=2, task="text")
    rows = tokenize([long], tokenizer, 128)
    assert rows.max_length == 19, "its positions begin behind the padding"
    assert model(rows.batch(np.arange(1))).shape == (1, 2)
    folder = tiny_xlnet(tmp_path / "xlnet", word_tokenizer(lines[0], 50, specials=True))
    model, tokenizer = load_text_model(folder, num_classes=2, task="text")
    rows = tokenize([long], tokenizer, 128)
    assert rows.max_length == 128, "nothing limits it"
    assert model(rows.batch(np.arange(1))).shape == (1, 2)


def test_labels_of_next_tokens_are_shifted_and_prompts_are_not_learned(packaged):
    prompt, answer = Segment("What is a list ?", False), Segment("A list is a mutable sequence .", True)
    length = len(packaged(prompt.text)["input_ids"]) + len(packaged(answer.text)["input_ids"]) + 1
    samples = token_samples([Example((prompt, answer)), Example((answer,))], packaged, length)
    assert len(samples) >= 1
    assert samples.labels.tolist() == [0] * len(samples)
    batch = samples.batch(np.arange(len(samples)))
    ids, labels = batch.shared["input_ids"], batch.labels
    assert batch.own is batch.shared
    assert ids.shape == labels.shape
    assert (labels[:, -1] == -100).all()
    learned = labels != -100
    assert torch.equal(labels[:, :-1][learned[:, :-1]], ids[:, 1:][learned[:, :-1]])
    asked = len(packaged(prompt.text)["input_ids"])
    assert learned[0].tolist() == [place >= asked - 1 for place in range(length - 1)] + [False]
    assert len(token_samples([], packaged, 8)) == 0
    with pytest.raises(DataError):
        token_samples([Example((Segment("", True),))], packaged, 8)


def test_vocabularies_are_compared_and_not_their_names(packaged, llama):
    twin, other = load_tokenizer(resolve_model("tiny")), load_tokenizer(llama)
    twin.name_or_path = "another"
    other.name_or_path = packaged.name_or_path
    assert same_vocabulary(packaged, twin)
    assert not same_vocabulary(packaged, other)
    check_same_vocabulary(packaged, twin, "mine")
    with pytest.raises(ConfigError, match=r"mine has 200 tokens, the run 2048, and [01] of them") as caught:
        check_same_vocabulary(packaged, other, "mine")
    assert "`task=text`" in caught.value.remedy


# --- models of users ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["text-gru", "text-cnn", "tiny", "bert", "llama"])
def test_own_models_pool_what_is_real(name, bert, llama):
    spec = {"bert": bert, "llama": llama}.get(name, name)
    model, tokenizer = load_text_model(spec, num_classes=3, task="text", seed=5)
    inputs = tokenize(TEXTS, tokenizer, 24).batch(np.arange(4))
    model.eval()
    with torch.no_grad():
        features = model.extractor(inputs)
        assert features.shape == (4, model.width)
        assert model(inputs).shape == (4, 3)
        torch.testing.assert_close(model.extractor(padded(inputs, 3, 0)), features, rtol=1e-4, atol=1e-5)
    again, _ = load_text_model(spec, num_classes=3, task="text", seed=5)
    assert torch.equal(again.header.weight, model.header.weight)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
    model.train()
    model(inputs).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_the_encoder_of_an_encoder_with_decoder_classifies(tmp_path, lines):
    folder = tiny_t5(tmp_path, word_tokenizer(lines[0], 60, specials=False, end="</s>"))
    model, tokenizer = load_text_model(folder, num_classes=2, task="text")
    assert model(tokenize(TEXTS, tokenizer, 8).batch(np.arange(4))).shape == (4, 2)
    with pytest.raises(ConfigError, match="encoder with a decoder"):
        load_text_model(folder, num_classes=None, task="next-token")


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma2, tiny_granite])
def test_extractor_and_header_of_a_language_model_are_the_whole_model(tmp_path, lines, make):
    from transformers import AutoModelForCausalLM

    folder = make(tmp_path, word_tokenizer(lines[0], 80, specials=False, end="<end>"))
    model, tokenizer = load_text_model(folder, num_classes=None, task="next-token")
    inputs = token_samples([Example((Segment(lines[0][0], True),))], tokenizer, 12).batch(np.arange(1)).own
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(inputs), whole(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_models_that_cannot_predict_tokens_are_refused_by_name(bert, tmp_path):
    masked = tiny_bert(tmp_path, load_tokenizer(bert), with_head=True)
    for spec, why in (
        (masked, "attends to later tokens"),
        (bert, "missing tensors in .*: 6"),
        ("text-cnn", "one vector per text"),
    ):
        with pytest.raises((ConfigError, CheckpointError), match=why) as caught:
            load_text_model(spec, num_classes=None, task="next-token")
        assert "`task=text`" in caught.value.remedy
    with pytest.raises(ConfigError, match="not one vector per token"):
        check_causal(TextExtractor(30, False, SMALL), 30, "mine")
    check_causal(TextExtractor(30, True, SMALL), 30, "mine")


def test_unusable_checkpoints_are_distinguished(tmp_path, bert, llama, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelNotFound) as caught:
        load_text_model(str(tmp_path / "nothing"), num_classes=2, task="text")
    assert "text-gru" in caught.value.remedy
    with pytest.raises((ModelNotFound, CheckpointError, UnsupportedArchitecture)):
        load_text_model(str(tmp_path), num_classes=2, task="text")
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for source, names in (
        (bert, ("tokenizer.json", "tokenizer_config.json")),
        (llama, ("config.json", "model.safetensors")),
    ):
        for name in names:
            with open(f"{source}/{name}", "rb") as file:
                (mixed / name).write_bytes(file.read())
    with pytest.raises(CheckpointError, match="has 300 tokens, its embedding only 200"):
        load_text_model(str(mixed), num_classes=2, task="text")
    (mixed / "model.safetensors").write_bytes(b"no tensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        with open(f"{llama}/{name}", "rb") as file:
            (mixed / name).write_bytes(file.read())
    with pytest.raises(CheckpointError, match="cannot read"):
        load_text_model(str(mixed), num_classes=2, task="text")


# --- in a mixture ------------------------------------------------------------------------------------------------


def make_mixture(own: PersonalModel, vocab_size: int, per_token: bool = False, gate: nn.Module | None = None):
    torch.manual_seed(0)
    shared = TextExtractor(vocab_size, per_token, SMALL)
    return LocalMixture(shared, own, gate or Gate(shared.gate_in, 8))


@pytest.mark.parametrize("task", ["text", "next-token"])
def test_every_group_gets_a_gradient(task, packaged, llama, lines):
    if task == "text":
        own, tokenizer = load_text_model(llama, num_classes=4, task=task)
        samples = text_samples(
            lines[0], lines[1], CLASSES, shared_tokenizer=packaged, own_tokenizer=tokenizer, length=16
        )
    else:
        own, tokenizer = load_text_model("tiny", num_classes=None, task=task)
        samples = token_samples([Example((Segment(text, True),)) for text in lines[0][:8]], packaged, 16)
    mixture = make_mixture(own, 2048, per_token=task == "next-token")
    nn.init.ones_(mixture.gate.out_norm.weight)  # at its first 0, what is below learns from the second step on
    before = {name: [p.detach().clone() for p in group] for name, group in mixture.groups().items()}
    optimizer = make_optimizer(mixture.groups(), Rates(0.05, 0.05, 0.05))
    rng = np.random.default_rng(0)
    loss = train_epochs(mixture, samples, optimizer, epochs=1, batch_size=len(samples), rng=rng)
    assert np.isfinite(loss)
    for name, group in mixture.groups().items():
        changed = [not torch.equal(old, new) for old, new in zip(before[name], group, strict=True)]
        assert sum(changed) > 0.8 * len(changed), name  # biases before a BatchNorm have none
    found = evaluate(mixture, samples)
    assert found.gate_weights.shape == (len(samples), 2)
    np.testing.assert_allclose(found.gate_weights.sum(1), 1, rtol=1e-5)


def test_the_mixture_predicts_a_token_from_what_comes_before_it_alone(packaged, lines):
    own, _ = load_text_model("text-gru", num_classes=None, task="next-token")
    mixture = make_mixture(own, 2048, per_token=True).eval()
    nn.init.ones_(mixture.gate.out_norm.weight)  # a new gate says the same of every token
    batch = token_samples([Example((Segment(lines[0][0], True),))], packaged, 12).batch(np.array([0]))
    changed = {**batch.shared, "input_ids": batch.shared["input_ids"].clone()}
    changed["input_ids"][:, 8:] = 77
    with torch.no_grad():
        logits, weights = mixture(batch)
        other, other_weights = mixture(Batch(changed, changed, batch.labels))
    assert logits.shape == (1, 12, 2048)
    assert weights.shape == (1, 12, 2)
    torch.testing.assert_close(other[:, :8], logits[:, :8], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other_weights[:, :8], weights[:, :8], rtol=1e-5, atol=1e-5)
    assert (other[:, 8:] - logits[:, 8:]).abs().max() > 1e-3
    assert (other_weights[:, 8:] - weights[:, 8:]).abs().max() > 1e-5


def test_tied_embeddings_stay_tied(packaged, tmp_path, lines):
    folder = tiny_llama(tmp_path, packaged, tied=True)
    own, _ = load_text_model(folder, num_classes=None, task="next-token")
    samples = token_samples([Example((Segment(text, True),)) for text in lines[0][:4]], packaged, 16)
    mixture = make_mixture(own, 2048, per_token=True)
    optimizer = make_optimizer(mixture.groups(), Rates(0.05, 0.05, 0.05))
    train_epochs(mixture, samples, optimizer, epochs=1, batch_size=4, rng=np.random.default_rng(0))
    assert own.header.layer.weight is own.extractor.model.embed_tokens.weight
    assert sum(p is own.header.layer.weight for p in mixture.groups()["model"]) == 1


def learnable(own_tokenizer, packaged, part: slice = slice(None)):
    """(training, held-out) runs of six lines of four packages; ``part`` of the former."""
    texts, labels = labelled_lines(120, lines=6)
    samples = text_samples(
        texts, labels, CLASSES, shared_tokenizer=packaged, own_tokenizer=own_tokenizer, length=48
    )  # fmt: skip
    train, held_out = hold_out(samples, 0.4, seed=0)
    return train.subset(np.arange(len(train))[part]), held_out


BETTER_THAN_CHANCE = 0.40
"""Of 192 held-out texts in four classes: whoever guesses gets there less than once in 100,000 times."""


def test_the_shared_extractor_alone_learns(packaged):
    own = PersonalModel(NoFeatures(SMALL.width), nn.Linear(SMALL.width, 4), SMALL.width)
    mixture = make_mixture(own, 2048, gate=FixedGate(1.0))
    train, held_out = learnable(packaged, packaged)
    assert len(held_out) == 192
    assert evaluate(mixture, held_out).accuracy < BETTER_THAN_CHANCE
    optimizer = make_optimizer(mixture.groups(), Rates(0.1, 0.1, 0.1, momentum=0.9))
    train_epochs(mixture, train, optimizer, epochs=10, batch_size=16, rng=np.random.default_rng(0))
    assert evaluate(mixture, held_out).accuracy > BETTER_THAN_CHANCE


class NoFeatures(nn.Module):
    """An extractor that has nothing to say."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, inputs):
        return torch.zeros(len(inputs["input_ids"]), self.width)


def test_clients_with_unlike_models_and_tokenizers_share_what_they_learn(packaged, bert):
    """Three rounds of two clients in this process: theta is averaged, and each is better than chance on unseen text."""
    clients = []
    for index, spec in enumerate((bert, "text-cnn")):
        own, tokenizer = load_text_model(spec, num_classes=4, task="text", seed=index)
        assert not same_vocabulary(tokenizer, packaged)
        train, held_out = learnable(tokenizer, packaged, slice(index, None, 2))  # every other text
        mixture = make_mixture(own, 2048)
        clients.append((mixture, make_optimizer(mixture.groups(), Rates(0.05, 0.05, 0.01, 0.9)), train, held_out))
    theta = copy.deepcopy(clients[0][0].shared.state_dict())
    for server_round in range(3):
        learned = []
        for mixture, optimizer, train, _ in clients:
            mixture.shared.load_state_dict(theta)
            rng = np.random.default_rng(server_round)
            train_epochs(mixture, train, optimizer, epochs=2, batch_size=16, rng=rng)
            learned.append(mixture.shared.state_dict())
        theta = {name: (learned[0][name] + learned[1][name]) / 2 for name in theta}
    for mixture, _, _, held_out in clients:
        mixture.shared.load_state_dict(theta)
        found = evaluate(mixture, held_out)
        assert found.accuracy > BETTER_THAN_CHANCE


SENT_BYTES = {"fedmoe": 2_102_272, "static": 2_102_272, "fml": 2_102_272 + 257 * 4, "standalone": 0}


@pytest.mark.parametrize("name", ["fedmoe", "static", "standalone", "fedavg", "fedproto", "lg-fedavg", "fml"])
def test_every_method_of_the_comparison_reads_text(name, packaged):
    clients = []
    for index in range(2):
        own, tokenizer = load_text_model("text-gru", num_classes=4, task="text", seed=index)
        train, held_out = learnable(tokenizer, packaged, slice(16 * index, 16 * index + 16))
        clients.append(Client(f"{index}", train, held_out.subset(np.arange(0, 192, 8)), own))
    options = {"vocab_size": 2048, "extractor": "text-small"} if name in ("fedmoe", "static", "fml") else {}
    history = run(make_strategy(name, clients, FedMoE(batch_size=8), seed=0, **options), Settings(1))
    sent = history.rounds[0].parameters_up
    assert all(np.isfinite(loss) for loss in history.rounds[0].losses.values())
    assert sent[0] == SENT_BYTES.get(name, sent[0])
    assert (max(sent.values()) > 0) == (name != "standalone")


@pytest.mark.parametrize("name", ["fedmoe", "fml"])
def test_the_comparison_continues_text_too(name, packaged, lines):
    samples = token_samples([Example((Segment(text, True),)) for text in lines[0]], packaged, 16)
    assert len(samples) >= 8
    own = load_text_model("text-gru", num_classes=None, task="next-token", seed=0)[0]
    client = Client("0", samples.subset(np.arange(6)), samples.subset(np.arange(6, 8)), own)
    strategy = make_strategy(
        name, [client], FedMoE(batch_size=2), seed=0, extractor="text-small", vocab_size=2048, per_token=True
    )
    history = run(strategy, Settings(1))
    assert np.isfinite(history.rounds[0].losses[0])
    assert 0 <= history.final()[0] <= 1
    with pytest.raises(ConfigError, match="next-token prediction does not have"):
        make_strategy("fedproto", [client], FedMoE(), seed=0)
