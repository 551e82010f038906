"""Labelled texts: both file forms, names and numbers as labels, bad lines by number."""

import gzip
import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgefed.errors import DataError, EdgefedError
from edgefed.personal.labelled_text import load_labelled_texts
from edgefed.personal.sample_files import MAX_CLASSES


def jsonl(path, *records):
    path.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in records))
    return path


def labels_of(loaded):
    return [loaded.classes[label] for label in loaded.labels]


def test_names_become_classes_in_their_order(tmp_path):
    path = jsonl(
        tmp_path / "d.jsonl",
        {"text": "a goal", "label": "sports"},
        {"sentence": "a vote", "label": " politics ", "id": 7},
        {"text": "a match", "label": "sports"},
    )
    loaded = load_labelled_texts(path)
    assert loaded.texts == ("a goal", "a vote", "a match")
    assert loaded.classes == ("politics", "sports")
    np.testing.assert_array_equal(loaded.labels, [1, 0, 1])
    assert loaded.labels.dtype == np.int64
    assert loaded.problems == ()
    assert len(loaded) == 3
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("labels", [(2, 0, 2), ("2", "0", "2"), (2, "0", 2)])
def test_numbers_are_the_numbers_of_classes(tmp_path, labels):
    loaded = load_labelled_texts(jsonl(tmp_path / "d.jsonl", *({"text": "t", "label": label} for label in labels)))
    np.testing.assert_array_equal(loaded.labels, [2, 0, 2])
    assert loaded.classes == ("0", "1", "2")


def test_one_name_among_numbers_makes_names_of_all(tmp_path):
    path = jsonl(
        tmp_path / "d.jsonl", {"text": "t", "label": 10}, {"text": "t", "label": "x"}, {"text": "t", "label": 2}
    )
    loaded = load_labelled_texts(path)
    assert labels_of(loaded) == ["10", "x", "2"]
    assert loaded.classes == ("10", "2", "x")


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
def test_csv_with_quotes_newlines_and_other_columns(tmp_path, suffix):
    content = (
        '\ufeffid,Label,text\r\n1,b,"two\nlines, and a ""quote"""\r\n2,a,plain\r\n\r\n3,a\r\n4,,none\r\n5,b,last\r\n'
    )
    path = tmp_path / f"d{suffix}"
    path.write_bytes(gzip.compress(content.encode()) if suffix.endswith("gz") else content.encode())
    loaded = load_labelled_texts(path)
    assert loaded.texts == ('two\nlines, and a "quote"', "plain", "last")
    assert labels_of(loaded) == ["b", "a", "b"]
    assert [(problem.line, problem.reason) for problem in loaded.problems] == [
        (5, "empty line"),
        (6, "2 columns, but the first line names 3"),
        (7, "label is empty"),
    ]


def test_bad_lines_are_reported_by_number_and_the_others_are_used(tmp_path):
    path = jsonl(
        tmp_path / "d.jsonl",
        {"text": "good", "label": 1},
        "no json",
        {"text": "t"},
        {"label": 1},
        {"text": 5, "label": 1},
        {"text": " ", "label": 1},
        {"text": "t", "label": True},
        {"text": "t", "label": 1.5},
        {"text": "t", "label": -1},
        {"text": "t", "label": MAX_CLASSES},
        "",
        '{"text": "\\ud800", "label": 1}',
        {"text": "good too", "label": 0},
    )
    loaded = load_labelled_texts(path)
    assert loaded.texts == ("good", "good too")
    assert [problem.line for problem in loaded.problems] == [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    reasons = {problem.line: problem.reason for problem in loaded.problems}
    assert reasons[3] == "label is missing"
    assert reasons[4] == "text is missing"
    assert reasons[7] == reasons[8] == "label must be a name or an integer"
    assert "label -1 is out of range" in reasons[9]
    assert "out of range" in reasons[10]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", b"", "is empty"),
        ("d.csv", b"text,label\n", "is empty"),
        ("d.csv", b"", "names 0 columns"),
        ("d.csv", b"secret words,3\n", "names 2 columns, but not both text and label"),
        ("d.csv", b'text,label\nfine,1\n"open,2\n', "invalid CSV in .* that starts at line 3"),
        ("d.csv", b"text,label\n\xff,1\n", "is not UTF-8: line 2"),
        ("d.csv.gz", b"text,label\n", "cannot read"),
        ("d.jsonl", b'{"text": "secret words"}\n' * 3, "no usable record in 3 lines: line 1: label is missing"),
        ("d.jsonl", b'{"text": "secret words", "label": -4}\n', "label -4 is out of range"),
        ("d.jsonl", b"[1]\n" * 5000, "no usable record in 1,000 lines"),
        ("d.txt", b"secret words", "unsupported suffix"),
    ],
)
def test_invalid_values_are_named_and_never_quoted(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        load_labelled_texts(tmp_path / name)
    assert "secret" not in str(error.value)
    assert error.value.remedy


def test_missing_things_are_named(tmp_path):
    with pytest.raises(DataError, match="file not found"):
        load_labelled_texts(str(tmp_path / "d.csv"))
    (tmp_path / "d.csv").mkdir()
    with pytest.raises(DataError, match="is a directory"):
        load_labelled_texts(tmp_path / "d.csv")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("any")


LINES = st.one_of(st.binary(max_size=30), st.sampled_from([b'{"text": "a", "label": 1}', b"a,1", b'"a']))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["d.csv", "d.jsonl"]), st.lists(LINES, max_size=6))
def test_any_bytes_are_examples_or_named_errors(folder, name, lines):
    (folder / name).write_bytes(b"\n".join([b"text,label", *lines]))
    try:
        loaded = load_labelled_texts(folder / name)
    except EdgefedError:
        return
    assert len(loaded.texts) == len(loaded.labels) > 0
    assert all(0 <= label < len(loaded.classes) for label in loaded.labels)
