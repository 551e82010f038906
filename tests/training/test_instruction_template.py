"""The template of models without one: training, `apply_chat_template` and prompts have the same tokens."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from edgefed.embedded import tiny_model_directory
from edgefed.training.encoding import encode_examples
from edgefed.training.records import Example, Segment, parse_record
from edgefed.training.tokenizer import CHAT_TEMPLATE_FILE, load_tokenizer, write_chat_template

sys.path.insert(0, str(Path(__file__).parent))
from toy_tokenizers import byte_level, llama_like  # noqa: E402

RECORD = {"instruction": "Name a colour.", "context": "It is the sky's.", "response": " Blue, é 🙂\n"}


def save(kind, folder):
    if kind == "packaged":
        AutoTokenizer.from_pretrained(tiny_model_directory()).save_pretrained(folder)
    elif kind == "bytes":
        byte_level(["</s>"]).save_pretrained(folder)
    else:
        texts = ["### Instruction:\nName the colour of the stone.\n\n### Response:\nBlue é 🙂"]
        llama_like(texts, add_eos=kind == "llama-end").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["packaged", "bytes", "llama", "llama-end"])
def test_transformers_gives_the_tokens_of_training(tmp_path, kind):
    folder = save(kind, tmp_path)
    trained = encode_examples([parse_record(RECORD)], load_tokenizer(folder), 4096)
    ids, labels = trained.input_ids[0].tolist(), trained.labels[0].tolist()
    write_chat_template(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)  # without edgefed
    assert tokenizer.chat_template == (folder / CHAT_TEMPLATE_FILE).read_text()
    user, assistant = (segment.message() for segment in parse_record(RECORD).segments)
    assert tokenizer.apply_chat_template([user, assistant])["input_ids"] == ids
    asked = tokenizer.apply_chat_template([user], add_generation_prompt=True)["input_ids"]
    assert ids[: len(asked)] == asked
    assert labels == [-100] * len(asked) + ids[len(asked) :]
    assert ids[-1] == tokenizer.eos_token_id
    if "llama" in kind:
        assert ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("kind", ["packaged", "llama"])
def test_a_conversation_of_several_turns_is_closed_after_each_answer(tmp_path, kind):
    tokenizer = load_tokenizer(save(kind, tmp_path))
    turns = [("system", "Be kind"), ("user", "Hi"), ("assistant", "the stone"), ("user", "Bye"), ("assistant", "of")]
    example = Example(tuple(Segment(text, role == "assistant", role) for role, text in turns))
    blocks = encode_examples([example], tokenizer, 4096)
    ids, labels = blocks.input_ids[0], blocks.labels[0]
    messages = [segment.message() for segment in example.segments]
    assert tokenizer.apply_chat_template(messages)["input_ids"] == ids.tolist()
    assert [int(token) for token in labels if token == tokenizer.eos_token_id] == [tokenizer.eos_token_id] * 2
    learned = tokenizer.decode(labels[labels != -100], skip_special_tokens=True)
    assert learned.replace(" ", "") == "thestoneof"


def test_a_template_of_the_models_own_is_left_alone(tmp_path):
    byte_level(["</s>"], "{% for m in messages %}{{ m.content }}{% endfor %}").save_pretrained(tmp_path)
    before = (tmp_path / CHAT_TEMPLATE_FILE).read_text()
    write_chat_template(tmp_path)
    assert (tmp_path / CHAT_TEMPLATE_FILE).read_text() == before
