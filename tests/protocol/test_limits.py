"""What a client accepts from a hostile server."""

from __future__ import annotations

import msgspec
import pytest

from edgefed.errors import MalformedMessage
from edgefed.protocol.limits import (
    check_manifest,
    check_model_config,
    check_run,
    check_tokenizer,
    has_nested_repetition,
    printable,
    printable_message,
)
from edgefed.protocol.messages import (
    Assignment,
    FileInfo,
    Manifest,
    RunConfig,
    TensorInfo,
    TrainingConfig,
    UnitInfo,
    Wait,
)

RUN = RunConfig(
    run_id="run-1", model="tiny", method="fedavg", method_options={}, rounds=3, seed=0, training=TrainingConfig()
)
TENSOR = TensorInfo(name="w", dtype="F32", shape=(64, 128))
UNIT = UnitInfo(key="layer0", kind="dense", trainable=True, tensors=(TENSOR,), sha256="0" * 64, size_bytes=40_000)
FILE = FileInfo(name="config.json", sha256="1" * 64, size_bytes=100)
MODEL = Manifest(run_id="run-1", server_round=1, experts_per_layer=(8,), units=(UNIT,), files=(FILE,))


def test_ordinary_messages_pass():
    check_run(RUN)
    check_manifest(MODEL)
    check_model_config({"num_hidden_layers": 1, "hidden_size": 128, "max_position_embeddings": 131072}, MODEL)


@pytest.mark.parametrize("run_id", ["../../home/x", "/etc", "", "a" * 65, "a/b", "..", "a\x00", "ä"])
def test_a_run_id_stays_in_its_folder(run_id):
    with pytest.raises(MalformedMessage, match="invalid run_id"):
        check_run(msgspec.structs.replace(RUN, run_id=run_id))


@pytest.mark.parametrize(
    "changes",
    [
        {"local_steps": 10**15}, {"local_steps": -5}, {"batch_size": 0}, {"batch_size": 10**9}, {"learning_rate": -1.0},
        {"learning_rate": float("nan")}, {"sequence_length": 10**9}, {"lora_rank": 10**9}, {"profile_tokens": -1},
        {"max_grad_norm": -1.0}, {"schedule": "up"}, {"warmup_rounds": -1}, {"warmup_rounds": 3},
        {"local_steps": 100_000, "batch_size": 1000, "sequence_length": 1000},
    ],
    ids=str,
)  # fmt: skip
def test_training_has_bounds(changes):
    with pytest.raises(MalformedMessage, match="training: "):
        check_run(msgspec.structs.replace(RUN, training=msgspec.structs.replace(RUN.training, **changes)))


@pytest.mark.parametrize("name", ["../x", "..", ".bashrc", "a\x00b", "n" * 5000, "", "a/b", "C:x", "x\x1b[2J"])
def test_file_names_are_bare(name):
    with pytest.raises(MalformedMessage, match="invalid file name"):
        check_manifest(msgspec.structs.replace(MODEL, files=(msgspec.structs.replace(FILE, name=name),)))


@pytest.mark.parametrize(
    "settings",
    [
        {"_attn_implementation": "kernels-community/flash-attn"}, {"text_config": {"experts_implementation": "a/b"}},
        {"attn_implementation": {"text_config": "a/b@main:c"}}, {"attn_implementation": ["../x"]},
    ],
    ids=str,
)  # fmt: skip
def test_a_config_names_no_code_of_a_hub(settings):
    with pytest.raises(MalformedMessage, match="code elsewhere"):
        check_model_config(settings, MODEL)
    check_model_config({"max_window_layers": 62}, MODEL)  # dots.llm1; allocates nothing
    check_model_config({"_attn_implementation": "sdpa", "experts_implementation": "grouped_mm"}, MODEL)


def test_one_name_stands_for_one_file():
    with pytest.raises(MalformedMessage, match="invalid file name"):
        check_manifest(msgspec.structs.replace(MODEL, files=(FILE, FILE)))


@pytest.mark.parametrize(
    "changes",
    [{"kind": "evil"}, {"key": "x\x1b[31m"}, {"size_bytes": -1}, {"size_bytes": 100}, {"size_bytes": 2**60}],
    ids=str,
)
def test_units_have_bounds(changes):
    with pytest.raises(MalformedMessage):
        check_manifest(msgspec.structs.replace(MODEL, units=(msgspec.structs.replace(UNIT, **changes),)))


@pytest.mark.parametrize(
    "settings",
    [
        {"num_hidden_layers": 2_000_000}, {"vocab_size": 10**10}, {"hidden_size": 129}, {"num_experts": 10**5},
        {"max_position_embeddings": 10**10}, {"text_config": {"num_hidden_layers": 2}}, {"some_new_size": 2**21},
    ],
    ids=str,
)  # fmt: skip
def test_a_config_describes_no_larger_model_than_the_manifest(settings):
    with pytest.raises(MalformedMessage, match="config.json: "):
        check_model_config(settings, MODEL)


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?:[\s\S]?[\s\S]?)*?\x{10FFFF}|((\w|\s|[^x])+)+\x{10FFFE}", r"(a+)+", r"((a*))*b", r"(?:x{1,})+", r"(a+){2,}",
    ],
)  # fmt: skip
def test_patterns_that_take_exponential_time_are_found(pattern):
    assert has_nested_repetition(pattern)
    with pytest.raises(MalformedMessage, match="may take for ever"):
        check_tokenizer({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"pattern": {"Regex": pattern}}]}})


@pytest.mark.parametrize(
    "pattern",
    [
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\s+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*",
    ],
    ids=["gpt2", "llama3", "o200k", "deepseek"],
)
def test_patterns_of_real_tokenizers_pass(pattern):
    check_tokenizer({"pre_tokenizer": {"pattern": {"Regex": pattern}}})


def test_a_normalizer_that_blows_up_a_text_is_refused():
    with pytest.raises(MalformedMessage, match="a replacement has 200 characters"):
        check_tokenizer({"normalizer": {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 200}})


def test_texts_of_a_server_are_plain():
    assert printable("a\x1b[31mred\x07\r\nb\u202e") == "a [31mred   b "
    assert len(printable("x" * 5000)) < 1100
    reply = printable_message(Wait(retry_after_s=1.0, reason="\x1b]0;owned\x07wait"))
    assert reply == Wait(retry_after_s=1.0, reason=" ]0;owned wait")
    work = Assignment(server_round=1, deadline_s=None, seed=3)
    assert printable_message(work) == work
