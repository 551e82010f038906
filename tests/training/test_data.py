"""User data: every format and every malformation, the split, and the loss mask down to the token."""

from __future__ import annotations

import gzip
import json
import random
import re

import pytest
import torch

from edgefed.embedded import tiny_model_directory
from edgefed.embedded.silos import load_silo
from edgefed.errors import DataError
from edgefed.training import data
from edgefed.training.data import Segment, encode_examples, load_corpus, load_examples, split_held_out
from edgefed.training.records import PASSAGE_MAX_CHARS

EOS = 256


class ByteTokenizer:
    """One token a byte, so that a mask can be read off the text; pairs listed in `merges` become one token."""

    eos_token_id: int | None = EOS

    def __init__(self, merges=(), chat_template=None):
        self.merges = {pair: 257 + index for index, pair in enumerate(merges)}
        self.chat_template = chat_template

    def __call__(self, texts, add_special_tokens, verbose):
        assert isinstance(texts, list)
        assert add_special_tokens is False
        return {"input_ids": [self._encode(text) for text in texts]}

    def _encode(self, text):
        ids, position = [], 0
        while position < len(text):
            pair = text[position : position + 2]
            if pair in self.merges:
                ids.append(self.merges[pair])
                position += 2
            else:
                ids += text[position].encode()
                position += 1
        return ids

    def text(self, ids):
        pairs = {token: pair for pair, token in self.merges.items()} | {EOS: "$"}
        return "".join(pairs.get(token, chr(token)) for token in ids)


def write_lines(path, *records):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n", encoding="utf-8")
    return str(path)


def learned(blocks, tokenizer):
    """Return the text of all tokens and of the learned ones, with `_` where nothing is learned and `$` for the end."""
    ids, labels = blocks.input_ids.flatten().tolist(), blocks.labels.flatten().tolist()
    assert all(label in (token, -100) for token, label in zip(ids, labels, strict=True))
    mask = "".join(
        tokenizer.text([token]) if label != -100 else "_" * len(tokenizer.text([token]))
        for token, label in zip(ids, labels, strict=True)
    )
    return tokenizer.text(ids), mask


def encode_one(example, tokenizer=None, length=4096):
    tokenizer = tokenizer or ByteTokenizer()
    return learned(encode_examples([example], tokenizer, length), tokenizer)


# --- formats


@pytest.mark.parametrize(
    ("record", "example"),
    [
        ({"text": "all of it"}, (Segment("all of it", True),)),
        ({"prompt": "2+2=", "completion": "4"}, (Segment("2+2=", False), Segment("4", True))),
        (
            {"instruction": "Add", "response": "5"},
            (Segment("### Instruction:\nAdd\n\n### Response:\n", False), Segment("5", True)),
        ),
        (
            {"instruction": "Add", "context": "2, 3", "response": "5", "category": "math"},
            (Segment("### Instruction:\nAdd\n\n### Context:\n2, 3\n\n### Response:\n", False), Segment("5", True)),
        ),
        (
            {"instruction": "Add", "input": "2, 3", "output": "5"},
            (Segment("### Instruction:\nAdd\n\n### Context:\n2, 3\n\n### Response:\n", False), Segment("5", True)),
        ),
        (
            {"instruction": "Add", "context": "", "response": "5"},
            (Segment("### Instruction:\nAdd\n\n### Response:\n", False), Segment("5", True)),
        ),
        (
            {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
            (Segment("Hi", False, "user"), Segment("Hello", True, "assistant")),
        ),
        ({"text": "as text", "prompt": "p", "completion": "c"}, (Segment("p", False), Segment("c", True))),
        ({"text": "z\u00fcrich \u2028 \U0001f600"}, (Segment("z\u00fcrich \u2028 \U0001f600", True),)),
    ],
)
def test_record_forms(tmp_path, record, example):
    loaded = load_examples(write_lines(tmp_path / "a.jsonl", json.dumps(record, ensure_ascii=False)))
    assert loaded.examples == [example]
    assert loaded.problems == []


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL.gz"])
def test_gzip_gives_the_same_examples_and_digest(tmp_path, name):
    content = b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}'  # a byte order mark, and no end of line at the end
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    loaded = load_examples(str(path))
    assert [example[0].text for example in loaded.examples] == ["one", "two"]
    assert loaded.sha256 == data.hashlib.sha256(content).hexdigest()
    assert loaded.source == str(path)


def test_text_becomes_passages_and_loses_nothing(tmp_path):
    paragraph = "A line of words that is no longer than usual.\n" * 9
    text = "\n".join([paragraph] * 12)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.replace("\n", "\r\n").encode()))
    loaded = load_examples(str(tmp_path / "a.txt.gz"))
    passages = [segment.text for (segment,) in loaded.examples]
    assert len(passages) > 2
    assert all(1000 <= len(passage) <= PASSAGE_MAX_CHARS for passage in passages)
    assert all(segment.learn for (segment,) in loaded.examples)
    assert "\n\n".join(passages) == text.rstrip("\n")


def test_text_without_any_line_end_is_cut_at_spaces(tmp_path):
    text = "word " * 2000
    (tmp_path / "a.txt").write_text(text)
    passages = [segment.text for (segment,) in load_examples(str(tmp_path / "a.txt")).examples]
    assert max(map(len, passages)) <= PASSAGE_MAX_CHARS
    assert "".join(passages) == text
    (tmp_path / "b.txt").write_text("x" * 5000)
    assert [len(s.text) for (s,) in load_examples(str(tmp_path / "b.txt")).examples] == [2000, 2000, 1000]


def test_silo_is_its_train_documents_only():
    silo = load_silo("logging")
    loaded = load_examples("silo:logging")
    assert [segment.text for (segment,) in loaded.examples] == [document.text for document in silo.train]
    assert loaded.sha256 == silo.sha256


# --- malformations


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "cut of', "no valid JSON"),
        ("[" * 100_000, "no valid JSON"),
        ('{"text": ' + "1" * 5000 + "}", "JSON|must be a string"),  # Python refuses such a number since 3.10.7
        ("", "empty line"),
        ('["text"]', "must be a JSON object, this is a list"),
        ("3", "must be a JSON object, this is a number"),
        ("null", "must be a JSON object, this is null"),
        ("{}", "no known field.*found none"),
        ('{"question": "?"}', "no known field.*found question"),
        ('{"text": 5}', "text must be a string, this is a number"),
        ('{"text": null}', "text must be a string, this is null"),
        ('{"text": true}', "text must be a string, this is a boolean"),
        ('{"text": " \\n"}', "text is empty"),
        ('{"text": "\\ud800"}', "half a surrogate pair"),
        ('{"prompt": "p"}', "completion is missing"),
        ('{"completion": "c"}', "prompt is missing"),
        ('{"prompt": "p", "completion": ""}', "completion is empty"),
        ('{"instruction": "i"}', "response is missing"),
        ('{"instruction": "i", "response": "r", "context": ["c"]}', "context must be a string, this is a list"),
        ('{"messages": {}}', "messages must be a list, this is an object"),
        ('{"messages": []}', "no assistant message"),
        ('{"messages": ["hi"]}', "message 1 must be an object, this is a string"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', "no assistant message"),
        ('{"messages": [{"role": "asistant", "content": "hi"}]}', "message 1 has the role 'asistant'"),
        ('{"messages": [{"role": ["user"], "content": "hi"}]}', "message 1 has the role"),
        ('{"messages": [{"role": "user", "content": null}]}', "message 1: content must be a string, this is null"),
        ('{"messages": [{"role": "assistant", "content": ""}]}', "message 1: content is empty"),
        ('{"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}]}', "message 1: content is missing"),
    ],
)
def test_bad_line_is_reported_by_number_and_the_others_are_kept(tmp_path, line, reason):
    path = write_lines(tmp_path / "a.jsonl", {"text": "one"}, {"text": "two"}, line, {"text": "three"}, line)
    loaded = load_examples(path)
    assert [example[0].text for example in loaded.examples] == ["one", "two", "three"]
    assert [problem.line for problem in loaded.problems] == [3, 5]
    assert all(re.search(reason, problem.reason) for problem in loaded.problems), loaded.problems[0].reason


def test_no_usable_line_is_an_error_that_names_lines(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", "{}", "nonsense", {"text": ""})
    with pytest.raises(DataError, match=r"no usable record in 3 lines: line 1: .*line 2: .*line 3: text is empty"):
        load_examples(path)


def test_wrong_format_is_given_up_early(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", *["{"] * 5000)
    with pytest.raises(DataError, match="no usable record in 1000 lines"):
        load_examples(path)


def test_errors_do_not_quote_the_text(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", '{"text": "secret', {"text": "ok"}, {"text": ["secret"]})
    assert not any("secret" in problem.reason for problem in load_examples(path).problems)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\n", "is empty"),
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), "is empty"),
        ("a.txt", b"good\nbad \xff\n", "not UTF-8: line 2, byte 4 is 0xff"),
        ("a.jsonl", '{"text": "x"}'.encode("utf-16"), "not UTF-8: line 1"),
        ("a.csv", b"a,b", r"unknown suffix.*\.txt, \.jsonl"),
        ("jsonl", b"{}", "unknown suffix"),
        ("a.txt.gz", b"not gzip", "cannot read"),
        ("a.txt.gz", gzip.compress(random.Random(0).randbytes(9000), mtime=0)[:4000], "cannot read|not UTF-8"),
        ("b.txt.gz", gzip.compress(b"words\n" * 9000, mtime=0)[:-20], "cannot read"),
    ],
)
def test_unusable_file_is_a_data_error(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_examples(str(tmp_path / name))
    assert name in str(caught.value)
    assert caught.value.remedy


def test_missing_file_folder_and_silo_are_data_errors(tmp_path):
    with pytest.raises(DataError, match="there is no file .*nowhere.txt"):
        load_examples(str(tmp_path / "nowhere.txt"))
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(DataError, match="is a folder"):
        load_examples(str(tmp_path / "folder.txt"))
    with pytest.raises(DataError, match="no silo named 'emails'"):
        load_examples("silo:emails")
    with pytest.raises(DataError, match="no silo named 'emails'"):
        load_corpus("silo:emails", 0.1, 0)


# --- the held-out share


def numbered(count):
    return [(Segment(f"record {index}", True),) for index in range(count)]


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("count", [2, 3, 100])
def test_split_is_a_partition_in_order(count, share):
    examples = numbered(count)
    train, held_out = split_held_out(examples, share, seed=3)
    assert train
    assert held_out
    assert len(train) + len(held_out) == count
    assert set(train) | set(held_out) == set(examples)
    assert len(held_out) == min(max(1, round(share * count)), count - 1)
    assert train == [example for example in examples if example in train]
    assert held_out == [example for example in examples if example in held_out]


def test_split_depends_on_the_seed_and_on_nothing_else():
    examples = numbered(200)
    assert split_held_out(examples, 0.2, 7) == split_held_out(examples, 0.2, 7)
    assert split_held_out(examples, 0.2, 7)[1] != split_held_out(examples, 0.2, 8)[1]
    # Golden: another Python version or machine must hold out the same records.
    held_out = split_held_out(numbered(20), 0.2, 0)[1]
    assert [segment.text for (segment,) in held_out] == ["record 2", "record 6", "record 11", "record 13"]


def test_split_of_share_zero_of_one_and_of_none():
    examples = numbered(5)
    assert split_held_out(examples, 0, 0) == (examples, [])
    assert split_held_out(examples[:1], 0.5, 0) == (examples[:1], [])
    assert split_held_out([], 0.5, 0) == ([], [])
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(DataError, match="held-out share"):
            split_held_out(examples, share, 0)


@pytest.mark.parametrize("seed", range(5))
def test_repeated_records_are_never_on_both_sides(seed):
    examples = numbered(10) * 3 + numbered(2) * 20
    train, held_out = split_held_out(examples, 0.1, seed)
    assert train
    assert held_out
    assert not set(train) & set(held_out)
    assert split_held_out(numbered(1) * 4, 0.5, seed)[1] == []
    assert not set.intersection(*map(set, split_held_out(numbered(1) * 9 + numbered(2), 0.1, seed)))


def test_corpus_of_a_file(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", *({"text": f"record {index}"} for index in range(10)), "{}")
    corpus = load_corpus(path, held_out_share=0.3, seed=1)
    loaded = load_examples(path)
    assert (corpus.train, corpus.held_out) == split_held_out(loaded.examples, 0.3, 1)
    assert (len(corpus.train), len(corpus.held_out)) == (7, 3)
    assert corpus.problems == loaded.problems
    assert corpus.problems[0].line == 11
    assert (corpus.sha256, corpus.source) == (loaded.sha256, path)


def test_corpus_of_a_silo_holds_out_its_files_whatever_the_share():
    silo = load_silo("http")
    corpus = load_corpus("silo:http", held_out_share=0.0, seed=5)
    assert [segment.text for (segment,) in corpus.held_out] == [document.text for document in silo.held_out]
    assert [segment.text for (segment,) in corpus.train] == [document.text for document in silo.train]
    assert not set(corpus.train) & set(corpus.held_out)


# --- tokens and mask


def test_text_is_learned_with_its_end():
    assert encode_one((Segment("abc", True),)) == ("abc$", "abc$")


def test_only_the_completion_is_learned():
    assert encode_one((Segment("2+2=", False), Segment("4", True))) == ("2+2=4$", "____4$")


def test_end_is_not_learned_after_a_prompt():
    assert encode_one((Segment("ab", True), Segment("cd", False))) == ("abcd$", "ab___")


@pytest.mark.parametrize("merge", ["=4", "2+", "4!"])
def test_no_token_spans_the_border_of_what_is_learned(merge):
    tokenizer = ByteTokenizer(merges=[merge])
    example = (Segment("2+2=", False), Segment("4!", True))
    assert encode_one(example, tokenizer) == ("2+2=4!$", "____4!$")
    (ids,) = encode_examples([example], tokenizer, 99).input_ids.tolist()
    assert (257 in ids) is (merge != "=4")  # merged where the prompt alone would be, too


def test_chat_without_template():
    example = (
        Segment("Be kind", False, "system"),
        Segment("Hi", False, "user"),
        Segment("Hello", True, "assistant"),
        Segment("Bye", False, "user"),
        Segment("So long", True, "assistant"),
    )
    text, mask = encode_one(example)
    assert text == "system: Be kind\nuser: Hi\nassistant: Hello\nuser: Bye\nassistant: So long\n$"
    assert mask.replace("_", "") == "Hello\nSo long\n$"
    assert mask.index("Hello") == text.index("Hello")
    assert mask.index("So long") == text.index("So long")


CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Drops all but the last answer's reasoning, as templates of reasoning models do.
REWRITING = (
    "{% for m in messages %}[{% if not loop.last %}{{ m.content.split('|')[-1] }}{% else %}{{ m.content }}{% endif %}]"
    "{% endfor %}"
)
LAST_DIFFERS = (
    "{% for m in messages %}{{ m.content }}{{ '.' if loop.last and not add_generation_prompt else '-' }}{% endfor %}"
)
ALTERNATING = (
    "{% if messages[0].role != 'user' %}{{ raise_exception('no') }}{% endif %}"
    "{% for m in messages %}{{ m.content|trim }};{% endfor %}"
)


class TemplateTokenizer(ByteTokenizer):
    """Renders chat templates as transformers does, without a model."""

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        from transformers.utils.chat_template_utils import render_jinja_template

        assert tokenize is False
        assert messages  # transformers takes no empty conversation
        rendered, _ = render_jinja_template(
            [messages], chat_template=self.chat_template, add_generation_prompt=add_generation_prompt
        )
        return rendered[0]


def chat(*contents):
    roles = ("user", "assistant")
    return tuple(Segment(content, index % 2 == 1, roles[index % 2]) for index, content in enumerate(contents))


@pytest.mark.parametrize(
    ("template", "example", "text", "mask"),
    [
        (
            CHATML,
            chat("Hi", "Yo", "Why", "So"),
            "<user>Hi</><assistant>Yo</><user>Why</><assistant>So</>$",
            "_" * 22 + "Yo</>" + "_" * 23 + "So</>$",
        ),
        (CHATML, chat("Hi", "Yo", "Bye"), "<user>Hi</><assistant>Yo</><user>Bye</>$", "_" * 22 + "Yo</>" + "_" * 13),
        # Nothing asks for the first answer, so there is no border: the content alone is learned.
        (CHATML, chat("a", "b")[1:], "<assistant>b</>$", "_" * 11 + "b____"),
        (REWRITING, chat("q", "r|a", "q", "s|b"), "[q][a][q][s|b]$", "_" * 9 + "[s|b]$"),
        (ALTERNATING, chat("same", " same "), "same;same;$", "_____same;$"),
        # How a turn ends changes with what follows: the first answer is found behind its question, not in it.
        (LAST_DIFFERS, chat("a", "a", "b", "c"), "a-a-b-c.$", "__a___c.$"),
    ],
)
def test_chat_with_template(template, example, text, mask):
    assert encode_one(example, TemplateTokenizer(chat_template=template)) == (text, mask)


@pytest.mark.parametrize("template", [None, CHATML])
def test_real_tokenizer(template):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_directory(), local_files_only=True)
    tokenizer.chat_template = template
    examples = [
        (Segment("def double(x):\n    ret", False), Segment("urn 2 * x\n", True)),  # "return" is one token
        chat("What is it?", "It is a test."),
        chat("", "Answer first.")[1:],
    ]
    learned_texts = []
    for example in examples:
        blocks = encode_examples([example], tokenizer, 512)
        whole = tokenizer.decode(blocks.input_ids[0])
        assert all(segment.text in whole for segment in example)
        learned_texts.append(tokenizer.decode(blocks.labels[blocks.labels != -100]))
    turn, first = ("</>", "") if template else ("\n", "\n")
    end = "<|endoftext|>"
    assert learned_texts[0] == "urn 2 * x\n" + end
    assert learned_texts[1] == f"It is a test.{turn}{end}"
    assert learned_texts[2] == (f"Answer first.{first}" + ("" if template else end))


def test_template_that_refuses_is_a_data_error():
    example = (Segment("x", False, "system"), Segment("y", True, "assistant"))
    with pytest.raises(DataError, match="refuses a conversation of system, assistant"):
        encode_examples([example], TemplateTokenizer(chat_template=ALTERNATING), 8)


def test_template_that_writes_the_end_itself_gets_no_second():
    class Closing(ByteTokenizer):
        def _encode(self, text):
            return [EOS if byte == ord("$") else byte for byte in text.encode()]

    assert encode_one((Segment("ab$", True),), Closing()) == ("ab$", "ab$")


# --- blocks


def test_blocks_are_joined_cut_and_the_rest_dropped():
    tokenizer = ByteTokenizer()
    blocks = encode_examples([(Segment("abcd", True),), (Segment("efgh", True),), (Segment("i", True),)], tokenizer, 5)
    assert [tokenizer.text(row) for row in blocks.input_ids.tolist()] == ["abcd$", "efgh$"]
    assert torch.equal(blocks.labels, blocks.input_ids)
    assert blocks.input_ids.dtype == blocks.labels.dtype == torch.int64
    assert (len(blocks), blocks.num_tokens) == (2, 10)


def test_short_text_is_one_short_block():
    blocks = encode_examples([(Segment("ab", True),)], ByteTokenizer(), 100)
    assert blocks.input_ids.tolist() == [[97, 98, EOS]]


def test_blocks_without_a_label_that_the_loss_sees_are_dropped():
    tokenizer = ByteTokenizer()
    examples = [(Segment("p" * 8, False), Segment("ab", True)), (Segment("q" * 8, False), Segment("z", True))]
    # pppp | ppppp -> rows of 4: pppp, pppp, ab$q, qqqq, qqqz, and the end does not fill a row
    blocks = encode_examples(examples, tokenizer, 4)
    assert [tokenizer.text(row) for row in blocks.input_ids.tolist()] == ["ab$q", "qqqz"]
    # The only label stands first in its block, where nothing predicts it.
    with pytest.raises(DataError, match="none of 4 tokens"):
        encode_examples([(Segment("p", False), Segment("p", False), Segment("z", True), Segment("r", False))], *_two())


def _two():
    class NoEnd(ByteTokenizer):
        def _encode(self, text):
            return [EOS if byte == ord("r") else byte for byte in text.encode()]

    return NoEnd(), 2


@pytest.mark.parametrize("examples", [[], [(Segment("", True),)], [(Segment("prompt", False),)]])
def test_nothing_to_learn_is_a_data_error(examples):
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
    text, _ = learned(encode_examples(numbered(600), tokenizer, 2), tokenizer)
    whole = "".join(f"record {index}$" for index in range(600))
    assert text == whole[: len(whole) // 2 * 2]


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
