"""User data: every format and every malformation, and the held-out share."""

from __future__ import annotations

import gzip
import json
import random
import re

import pytest

from edgefed.embedded.silos import load_silo
from edgefed.errors import DataError
from edgefed.training import data
from edgefed.training.data import Example, Segment, load_corpus, load_examples, split_held_out
from edgefed.training.records import PASSAGE_MAX_CHARS


def write_lines(path, *records):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n", encoding="utf-8")
    return str(path)


# --- formats


@pytest.mark.parametrize(
    ("record", "example"),
    [
        ({"text": "all of it"}, (Segment("all of it", True),)),
        ({"prompt": "2+2=", "completion": "4"}, (Segment("2+2=", False), Segment("4", True))),
        (
            {"instruction": "Add", "response": "5"},
            (Segment("Add", False, "user"), Segment("5", True, "assistant")),
        ),
        (
            {"instruction": "Add", "context": "2, 3", "response": "5", "category": "math"},
            (Segment("Add\n\n### Context:\n2, 3", False, "user"), Segment("5", True, "assistant")),
        ),
        (
            {"instruction": "Add", "input": "2, 3", "output": "5"},
            (Segment("Add\n\n### Context:\n2, 3", False, "user"), Segment("5", True, "assistant")),
        ),
        (
            {"instruction": "Add", "context": "", "response": "5"},
            (Segment("Add", False, "user"), Segment("5", True, "assistant")),
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
    assert loaded.examples == [Example(example)]
    assert loaded.problems == []


def test_chat_records_keep_all_fields_for_the_template(tmp_path):
    call = {"function": {"name": "add", "arguments": {}}}
    record = {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "text", "text": "Say "}, {"type": "text", "text": "hi"}],
                "name": "Ann",
            },
            {"role": "assistant", "content": None, "tool_calls": [call], "weight": 1},
            {"role": "tool", "content": "hi", "tool_call_id": "1"},
            {"role": "assistant", "content": "hi", "reasoning_content": "easy", "tool_calls": []},
        ],
        "tools": [{"function": {"name": "add"}}],
        "id": 7,
    }
    (example,) = load_examples(write_lines(tmp_path / "a.jsonl", "", record)).examples
    assert example.place == "line 2"
    assert example.tools == record["tools"]
    assert [segment.message() for segment in example.segments] == [
        {"role": "user", "content": "Say hi", "name": "Ann"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "hi", "tool_call_id": "1"},
        {"role": "assistant", "content": "hi", "reasoning_content": "easy"},
    ]
    assert [segment.in_loss for segment in example.segments] == [False, True, False, True]


def test_records_that_differ_only_in_fields_or_tools_are_different():
    plain = Segment("a", True, "assistant")
    examples = [
        Example((plain,), place="line 1"),
        Example((plain,), place="line 2"),
        Example((Segment("a", True, "assistant", {"reasoning": "r"}),)),
        Example((plain,), tools=[{"name": "add"}]),
    ]
    assert examples[0] == examples[1]
    for seed in range(8):
        train, held_out = split_held_out(examples, 0.3, seed)
        assert [examples[0] in side for side in (train, held_out)].count(True) == 1
        assert len(train) + len(held_out) == 4


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL.gz"])
def test_gzip_gives_the_same_examples_and_digest(tmp_path, name):
    content = b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}'  # a byte order mark, and no end of line at the end
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    loaded = load_examples(str(path))
    assert [example.segments[0].text for example in loaded.examples] == ["one", "two"]
    assert loaded.sha256 == data.hashlib.sha256(content).hexdigest()
    assert loaded.source == str(path)


def test_text_becomes_passages_and_loses_nothing(tmp_path):
    paragraph = "A line of words that is no longer than usual.\n" * 9
    text = "\n".join([paragraph] * 12)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.replace("\n", "\r\n").encode()))
    loaded = load_examples(str(tmp_path / "a.txt.gz"))
    passages = [example.segments[0].text for example in loaded.examples]
    assert len(passages) > 2
    assert all(1000 <= len(passage) <= PASSAGE_MAX_CHARS for passage in passages)
    assert all(example.segments[0].in_loss for example in loaded.examples)
    assert "\n\n".join(passages) == text.rstrip("\n")


def test_text_without_any_line_end_is_cut_at_spaces(tmp_path):
    text = "word " * 2000
    (tmp_path / "a.txt").write_text(text)
    passages = [example.segments[0].text for example in load_examples(str(tmp_path / "a.txt")).examples]
    assert max(map(len, passages)) <= PASSAGE_MAX_CHARS
    assert "".join(passages) == text
    (tmp_path / "b.txt").write_text("x" * 5000)
    assert [len(example.segments[0].text) for example in load_examples(str(tmp_path / "b.txt")).examples] == [
        2000,
        2000,
        1000,
    ]


def test_silo_is_its_train_documents_only():
    silo = load_silo("logging")
    loaded = load_examples("silo:logging")
    assert [example.segments[0].text for example in loaded.examples] == [document.text for document in silo.train]
    assert loaded.sha256 == silo.sha256


# --- malformations


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "cut of', "invalid JSON: Unterminated string starting at column 10"),
        ('{"text": "a"', "invalid JSON: Expecting ',' delimiter at column 13"),
        ("[" * 100_000, "invalid JSON"),
        ('{"text": ' + "1" * 5000 + "}", "JSON|must be a string"),  # Python refuses such a number since 3.10.7
        ("", "empty line"),
        ('["text"]', "must be a JSON object, found a list"),
        ("3", "must be a JSON object, found a number"),
        ("null", "must be a JSON object, found null"),
        ("{}", "no known field.*found none"),
        ('{"question": "?"}', "no known field.*found question"),
        ('{"text": 5}', "text must be a string, found a number"),
        ('{"text": null}', "text must be a string, found null"),
        ('{"text": true}', "text must be a string, found a boolean"),
        ('{"text": " \\n"}', "text is empty"),
        ('{"text": "\\ud800"}', "half a surrogate pair"),
        ('{"prompt": "p"}', "completion is missing"),
        ('{"completion": "c"}', "prompt is missing"),
        ('{"prompt": "p", "completion": ""}', "completion is empty"),
        ('{"instruction": "i"}', "response is missing"),
        ('{"instruction": "i", "response": "r", "context": ["c"]}', "context must be a string, found a list"),
        ('{"messages": {}}', "messages must be a list, found an object"),
        ('{"messages": []}', "no assistant message"),
        ('{"messages": ["hi"]}', "message 1 must be an object, found a string"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', "no assistant message"),
        ('{"messages": [{"role": "asistant", "content": "hi"}]}', "message 1 has the role 'asistant'"),
        ('{"messages": [{"role": ["user"], "content": "hi"}]}', "message 1 has the role"),
        ('{"messages": [{"role": "user", "content": null}]}', "message 1: content must be a string, found null"),
        ('{"messages": [{"role": "assistant", "content": ""}]}', "message 1: content is empty"),
        ('{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "part 1 has the type 'image_url'"),
        ('{"messages": [{"role": "user", "content": ["hi"]}]}', "content part 1 has the type None; only text"),
        (
            '{"messages": [{"role": "assistant", "content": "a", "name": "\\ud800"}]}',
            "a field contains half a surrogate",
        ),
        ('{"messages": [{"role": "assistant", "content": "a"}], "tools": "add"}', "tools must be a list of objects"),
        ('{"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}]}', "message 1: content is missing"),
    ],
)
def test_a_bad_line_is_reported_by_number_and_the_others_are_used(tmp_path, line, reason):
    path = write_lines(tmp_path / "a.jsonl", {"text": "one"}, {"text": "two"}, line, {"text": "three"}, line)
    loaded = load_examples(path)
    assert [example.segments[0].text for example in loaded.examples] == ["one", "two", "three"]
    assert [problem.line for problem in loaded.problems] == [3, 5]
    assert all(re.search(reason, problem.reason) for problem in loaded.problems), loaded.problems[0].reason


def test_no_usable_line_is_an_error_that_names_lines(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", "{}", "nonsense", {"text": ""})
    with pytest.raises(DataError, match=r"no usable record in 3 lines: line 1: .*line 2: .*line 3: text is empty"):
        load_examples(path)


def test_wrong_format_is_given_up_early(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", *["{"] * 5000)
    with pytest.raises(DataError, match="no usable record in 1,000 lines"):
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
        ("a.txt", "words".encode("utf-16-le"), "not UTF-8: line 1 contains NUL"),
        ("a.csv", b"a,b", "is empty"),
        ("a.toml", b"a", r"unknown suffix.*\.txt, \.md, \.jsonl"),
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


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        ("über\n".encode("utf-16"), "UTF-16"),
        ('{"text": "x"}\n'.encode("utf-16-be"), "UTF-16BE"),
        ('{"text": "x"}\n'.encode("utf-16-le"), "UTF-16LE"),
        ("words\n".encode("utf-32"), "UTF-32"),
        ("über\n".encode("latin1"), "LATIN1"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.txt.gz"])
def test_remedy_names_the_encoding_that_the_file_has(tmp_path, name, content, encoding):
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(DataError, match="not UTF-8") as caught:
        load_examples(str(tmp_path / name))
    assert f"iconv -f {encoding} -t UTF-8" in caught.value.remedy


def test_missing_file_folder_and_silo_are_data_errors(tmp_path):
    with pytest.raises(DataError, match="file not found: .*nowhere.txt"):
        load_examples(str(tmp_path / "nowhere.txt"))
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(DataError, match="has no file that can be read") as caught:
        load_examples(str(tmp_path / "folder.txt"))
    assert caught.value.remedy == "Put a file of text into it."
    with pytest.raises(DataError, match="unknown silo 'emails'"):
        load_examples("silo:emails")
    with pytest.raises(DataError, match="unknown silo 'emails'"):
        load_corpus("silo:emails", 0.1, 0)


# --- the held-out share


def numbered(count):
    return [Example((Segment(f"record {index}", True),)) for index in range(count)]


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
    assert [example.segments[0].text for example in held_out] == ["record 2", "record 6", "record 11", "record 13"]


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
    assert (list(corpus.train), list(corpus.held_out)) == split_held_out(loaded.examples, 0.3, 1)
    assert (len(corpus.train), len(corpus.held_out)) == (7, 3)
    assert corpus.problems == loaded.problems
    assert corpus.problems[0].line == 11
    assert (corpus.sha256, corpus.source) == (loaded.sha256, path)


def test_corpus_of_a_silo_holds_out_its_files_whatever_the_share():
    silo = load_silo("http")
    corpus = load_corpus("silo:http", held_out_share=0.0, seed=5)
    assert [example.segments[0].text for example in corpus.held_out] == [document.text for document in silo.held_out]
    assert [example.segments[0].text for example in corpus.train] == [document.text for document in silo.train]
    assert not set(corpus.train) & set(corpus.held_out)
