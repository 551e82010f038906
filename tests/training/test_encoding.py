"""Token blocks: the loss mask down to the token, special tokens, and how text is cut into blocks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from edgefed.embedded import tiny_model_directory
from edgefed.errors import DataError
from edgefed.training.data import Example, Segment
from edgefed.training.encoding import TokenBlocks, encode_examples
from edgefed.training.records import parse_record

sys.path.insert(0, str(Path(__file__).parent))
from toy_tokenizers import EOS, ByteTokenizer, byte_level, learned, llama_like  # noqa: E402


def text(*pieces):
    """Return an example of pieces, of which those in ⟦ ⟧ are in the loss."""
    return Example(tuple(Segment(piece.strip("⟦⟧"), piece.startswith("⟦")) for piece in pieces))


def encode_one(example, tokenizer=None, length=4096):
    tokenizer = tokenizer or ByteTokenizer()
    return learned(encode_examples([example], tokenizer, length), tokenizer)


def numbered(count):
    return [text(f"⟦record {index}⟧") for index in range(count)]


# --- the loss mask


def test_text_and_its_end_are_in_the_loss():
    assert encode_one(text("⟦abc⟧")) == ("abc$", "abc$")


def test_only_the_completion_is_in_the_loss():
    assert encode_one(text("2+2=", "⟦4⟧")) == ("2+2=4$", "____4$")


def test_end_is_not_in_the_loss_after_a_prompt():
    assert encode_one(text("⟦ab⟧", "cd")) == ("abcd$", "ab___")


@pytest.mark.parametrize("merge", ["=4", "2+", "4!"])
def test_no_token_spans_the_border_of_the_loss(merge):
    tokenizer = ByteTokenizer(merges=[merge])
    example = text("2+2=", "⟦4!⟧")
    assert encode_one(example, tokenizer) == ("2+2=4!$", "____4!$")
    (ids,) = encode_examples([example], tokenizer, 99).input_ids.tolist()
    assert (257 in ids) is (merge != "=4")  # merged where the prompt alone would be, too


def test_chat_without_template():
    example = Example(
        (
            Segment("Be kind", False, "system"),
            Segment("Hi", False, "user"),
            Segment("Hello", True, "assistant"),
            Segment("Bye", False, "user"),
            Segment("So long", True, "assistant"),
        )
    )
    whole, mask = encode_one(example)
    assert whole == (
        "### System:\nBe kind\n\n### Instruction:\nHi\n\n### Response:\nHello\n\n"
        "### Instruction:\nBye\n\n### Response:\nSo long$"
    )
    assert mask.replace("_", "") == "HelloSo long$"
    assert mask.index("Hello") == whole.index("Hello")
    assert mask.index("So long") == whole.index("So long")


class ReadsEnd(ByteTokenizer):
    """Reads the character `end` of a text as the end-of-text token."""

    def __init__(self, end):
        super().__init__()
        self.end = end

    def encode(self, text):
        return [EOS if byte == ord(self.end) else byte for byte in text.encode()]


def test_text_with_an_end_token_gets_no_second_one():
    assert encode_one(text("⟦ab$⟧"), ReadsEnd("$")) == ("ab$", "ab$")


# --- how real tokenizers treat the border between prompt and completion

SENTENCES = ["def area(x):\n    return x", "Q: which colour is it? A: blue", "the colour of the stone"]
RECORDS = [
    ("def area(x):\n    ", "return x"),
    ("Q: which colour is it? A: ", "blue"),
    ("Q: which colour is it? A:", " blue"),
    ("the col", "our"),
    ("the colour\n", "\n\nof it"),
    ("one\n\n", "  two "),
    ("x", "é 東京 🙂"),
    ("é 東京", "京 🙂"),
]


@pytest.fixture(scope="module")
def packaged():
    return AutoTokenizer.from_pretrained(tiny_model_directory(), local_files_only=True)


@pytest.fixture(scope="module")
def llama():
    return llama_like(SENTENCES)


@pytest.mark.parametrize(("prompt", "completion"), RECORDS)
@pytest.mark.parametrize("kind", ["packaged", "llama", "llama-end", "bytes"])
def test_no_character_is_added_or_lost(request, kind, prompt, completion):
    if kind == "llama-end":
        tokenizer = llama_like(SENTENCES, add_eos=True)
    else:
        tokenizer = byte_level(["</s>"]) if kind == "bytes" else request.getfixturevalue(kind)
    if "llama" in kind and not completion.isascii():
        pytest.skip("this small vocabulary has no such characters")
    example = parse_record({"prompt": prompt, "completion": completion})
    blocks = encode_examples([example], tokenizer, 4096)
    assert tokenizer.decode(blocks.input_ids[0], skip_special_tokens=True) == prompt + completion
    ids, labels = blocks.input_ids[0].tolist(), blocks.labels[0].tolist()
    asked = sum(label == -100 for label in labels)
    assert labels == [-100] * asked + ids[asked:]
    # The prompt has the tokens that the model sees when it is given the prompt alone.
    assert tokenizer.decode(ids[:asked], skip_special_tokens=True) == prompt
    assert ids[-1] == tokenizer.eos_token_id
    assert ids[-2] != tokenizer.eos_token_id


def test_special_tokens_are_where_the_tokenizer_puts_them(llama):
    examples = [text("⟦the stone⟧"), text("the ", "⟦stone⟧"), text("⟦colour⟧")]
    ids = encode_examples(examples, llama, 4096).input_ids[0].tolist()
    starts = [place for place, token in enumerate(ids) if token == llama.bos_token_id]
    ends = [place for place, token in enumerate(ids) if token == llama.eos_token_id]
    assert len(starts) == len(ends) == 3
    assert starts == [0, ends[0] + 1, ends[1] + 1]
    assert ids[: ends[0]] == llama("the stone")["input_ids"]


def test_tokens_across_the_border_of_aligned_text_are_the_tokenizers_own(packaged):
    """Where no token spans the border, the two sides together are tokenized as one text is."""
    prompt, completion = "def double(x):", " return 2 * x\n"
    ids = encode_examples([text(prompt, f"⟦{completion}⟧")], packaged, 512).input_ids[0].tolist()
    assert ids[:-1] == packaged(prompt + completion, add_special_tokens=False)["input_ids"]


# --- blocks


def test_blocks_are_joined_and_cut():
    tokenizer = ByteTokenizer()
    blocks = encode_examples([text("⟦abcd⟧"), text("⟦efgh⟧")], tokenizer, 5)
    assert [tokenizer.text(row) for row in blocks.input_ids.tolist()] == ["abcd$", "efgh$"]
    assert torch.equal(blocks.labels, blocks.input_ids)
    assert blocks.input_ids.dtype == blocks.labels.dtype == torch.int64
    assert (len(blocks), blocks.num_tokens) == (2, 10)


def test_last_block_ends_with_the_text_and_counts_no_token_twice():
    tokenizer, messages = ByteTokenizer(), []
    blocks = encode_examples([text("⟦abcd⟧"), text("⟦ef⟧")], tokenizer, 5, messages.append)
    assert [tokenizer.text(row) for row in blocks.input_ids.tolist()] == ["abcd$", "d$ef$"]
    assert blocks.labels[1].tolist() == [-100, -100, *blocks.input_ids[1, 2:].tolist()]
    assert messages == []


@pytest.mark.parametrize(("records", "length"), [(3, 30), (1, 9), (40, 100), (200, 7)])
def test_few_tokens_are_unused_and_their_number_is_reported(records, length):
    messages = []
    blocks = encode_examples(numbered(records), ByteTokenizer(), length, messages.append)
    total = sum(len(f"record {index}$") for index in range(records))
    used = int((blocks.labels != -100).sum())
    assert total - used <= total / 32
    expected = f"{total - used} of {total} tokens do not fill the last block of {length} and are not used"
    assert messages == ([expected] if used < total else [])


def test_shortened_blocks_use_every_row_to_its_end():
    blocks = encode_examples(numbered(40), ByteTokenizer(), 24)
    halves = blocks.shortened(12)
    assert torch.equal(halves.input_ids, blocks.input_ids.view(-1, 12))
    thirds = blocks.shortened(9)
    assert int((thirds.labels != -100).sum()) == int((blocks.labels != -100).sum())
    assert blocks.shortened(24) is blocks
    with pytest.raises(ValueError, match="at least 2"):
        blocks.shortened(1)


def test_shortened_blocks_without_labels_are_dropped():
    ids = torch.arange(8).view(1, 8)
    labels = torch.where(ids >= 6, ids, -100)
    assert TokenBlocks(ids, labels).shortened(4).input_ids.tolist() == [[4, 5, 6, 7]]
    nothing = TokenBlocks(ids, torch.full_like(ids, -100))
    assert nothing.shortened(4) is nothing


def test_short_text_is_one_short_block():
    blocks = encode_examples([text("⟦ab⟧")], ByteTokenizer(), 100)
    assert blocks.input_ids.tolist() == [[97, 98, EOS]]


def test_blocks_without_a_label_that_the_loss_sees_are_dropped():
    tokenizer = ByteTokenizer()
    examples = [text("p" * 8, "⟦ab⟧"), text("q" * 8, "⟦z⟧")]
    blocks = encode_examples(examples, tokenizer, 4)
    assert [tokenizer.text(row) for row in blocks.input_ids.tolist()] == ["ab$q", "qqqz", "qqz$"]
    assert blocks.labels[2].tolist() == [-100, -100, -100, EOS]
    # The only label stands first in its block, where nothing predicts it.
    with pytest.raises(DataError, match="none of 4 tokens"):
        encode_examples([text("p", "p", "⟦z⟧", "r")], ReadsEnd("r"), 2)


@pytest.mark.parametrize("examples", [[], [text("⟦⟧")], [text("prompt")]])
def test_data_without_labels_is_an_error(examples):
    with pytest.raises(DataError):
        encode_examples(examples, ByteTokenizer(), 4)


def test_bad_arguments():
    with pytest.raises(ValueError, match="sequence_length must be at least 2, not 1"):
        encode_examples(numbered(3), ByteTokenizer(), 1)
    tokenizer = ByteTokenizer()
    tokenizer.eos_token_id = None
    with pytest.raises(DataError, match="no end-of-text token"):
        encode_examples(numbered(3), tokenizer, 4)
    with pytest.raises(ValueError, match="batch_size"):
        next(encode_examples(numbered(3), ByteTokenizer(), 4).batches(0))


def test_more_examples_than_one_tokenizer_call_keep_their_order():
    tokenizer = ByteTokenizer()
    found, _ = learned(encode_examples(numbered(600), tokenizer, 2), tokenizer)
    whole = "".join(f"record {index}$" for index in range(600))
    assert found == whole[: len(whole) // 2 * 2]


def test_batches_are_one_epoch_shuffled_by_the_generator_only():
    blocks = encode_examples(numbered(40), ByteTokenizer(), 8)
    plain = list(blocks.batches(7))
    assert [len(ids) for ids, _ in plain[:-1]] == [7] * (len(plain) - 1)
    assert torch.equal(torch.cat([ids for ids, _ in plain]), blocks.input_ids)
    assert torch.equal(torch.cat([labels for _, labels in plain]), blocks.labels)

    def epoch(seed):
        return torch.cat([ids for ids, _ in blocks.batches(7, torch.Generator().manual_seed(seed))])

    assert torch.equal(epoch(1), epoch(1))
    assert not torch.equal(epoch(1), epoch(2))
    assert sorted(epoch(1).tolist()) == sorted(blocks.input_ids.tolist())
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.cat([ids for ids, _ in blocks.batches(7, generator)]) for _ in range(2))
    assert not torch.equal(first, second)  # the generator moves on: epochs differ
