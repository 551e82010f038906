"""Data as people have it: every format gives the same examples; every refusal says how to convert, and that works."""

from __future__ import annotations

import csv
import gzip
import io
import json
import subprocess
import sys
import tracemalloc

import pytest

from edgefed.errors import DataError
from edgefed.training import arrow_data
from edgefed.training.data import Example, RecordFields, Segment, check_data, load_corpus, load_examples
from edgefed.training.records import FORM_FIELDS

ROWS = [
    {
        "instruction": f"Name a colour, number {number}",
        "context": "",
        "response": f"Blue {number}",
        "category": "open_qa",
    }
    for number in range(30)
]
EXAMPLES = [
    Example((Segment(row["instruction"], False, "user"), Segment(row["response"], True, "assistant"))) for row in ROWS
]
LINES = "\n".join(map(json.dumps, ROWS)) + "\n"


def as_csv(separator=","):
    table = io.StringIO()
    writer = csv.DictWriter(table, list(ROWS[0]), delimiter=separator)
    writer.writeheader()
    writer.writerows(ROWS)
    return table.getvalue()


FILES = {
    "a.jsonl": LINES,
    "a.ndjson": LINES,
    "a.json": LINES,  # as Dolly is often saved
    "array.json": json.dumps(ROWS),
    "pretty.json": "\n" + json.dumps(ROWS, indent=2) + "\n",
    "a.csv": as_csv(),
    "a.tsv": as_csv("\t"),
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_every_file_format_gives_the_same_examples(tmp_path, name, zipped):
    path = tmp_path / (name + ".gz" if zipped else name)
    path.write_bytes(gzip.compress(FILES[name].encode()) if zipped else FILES[name].encode())
    loaded = load_examples(str(path))
    assert loaded.examples == EXAMPLES
    assert loaded.problems == []


def test_a_folder_is_the_files_in_it_in_order(tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "more/b.csv").write_text(as_csv())
    (tmp_path / "a.jsonl").write_text(LINES + "{}\n")
    (tmp_path / "c.md").write_text("Plain text.\n")
    (tmp_path / ".hidden.jsonl").write_text("nonsense")
    (tmp_path / "LICENSE").write_text("not read")
    loaded = load_examples(str(tmp_path))
    assert loaded.examples == [*EXAMPLES, Example((Segment("Plain text.", True),)), *EXAMPLES]
    assert [str(problem) for problem in loaded.problems] == [
        "a.jsonl line 31: no known field: text, prompt + completion, instruction + response or messages; found none"
    ]
    (tmp_path / "a.jsonl").rename(tmp_path / "d.jsonl")
    assert load_examples(str(tmp_path)).sha256 != loaded.sha256


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([*ROWS, {"instruction": "x"}]), tmp_path / "a.parquet")
    loaded = load_examples(str(tmp_path / "a.parquet"))
    assert loaded.examples == EXAMPLES
    assert [str(problem) for problem in loaded.problems] == ["row 31: response must be a string, found null"]
    chat = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "n": 1}] * 3
    parquet.write_table(pyarrow.Table.from_pylist(chat), tmp_path / "chat.parquet")
    (example, *_) = load_examples(str(tmp_path / "chat.parquet")).examples
    assert [segment.message() for segment in example.segments] == chat[0]["messages"]
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(DataError, match="bad.parquet is not a readable Parquet file"):
        load_examples(str(tmp_path / "bad.parquet"))


@pytest.mark.full
@pytest.mark.filterwarnings("default")
def test_saved_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(str(tmp_path / "split"))
    for name in ("one", "split", "split/train"):
        loaded = load_corpus(str(tmp_path / name), 0.0, 0)
        assert list(loaded.train) == EXAMPLES
    datasets.DatasetDict(test=table).save_to_disk(str(tmp_path / "test"))
    with pytest.raises(DataError, match="no split train") as caught:
        load_examples(str(tmp_path / "test"))
    assert str(tmp_path / "test/test") in caught.value.remedy


@pytest.mark.parametrize(
    ("source", "package"), [("a.parquet", "pyarrow"), ("saved", "datasets"), ("me/data", "datasets")]
)
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, source, package):
    (tmp_path / "a.parquet").write_bytes(b"")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved/state.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match=f"needs the package {package}, which is not installed") as caught:
        check_data(source)
    assert "pip install 'edgefed[data]'" in caught.value.remedy


def test_a_data_set_of_the_hub(monkeypatch):
    class Rows:
        column_names = ["instruction", "response", "category"]

        def select_columns(self, names):
            assert names == ["instruction", "response"]
            return self

        def iter(self, batch_size):
            yield {"instruction": ["Add"], "response": ["5"]}

    asked = []

    class Package:
        @staticmethod
        def load_dataset(name, split):
            asked.append((name, split))
            if name == "nobody/nothing":
                raise ConnectionError("Couldn't reach 'nobody/nothing' on the Hub")
            return Rows()

    arrow_data.load_hub.cache_clear()
    monkeypatch.setattr(arrow_data, "unreachable", lambda url: "")
    monkeypatch.setitem(sys.modules, "datasets", Package)
    expected = Example((Segment("Add", False, "user"), Segment("5", True, "assistant")))
    assert list(load_corpus("owner/name", 0.0, 0).train) == [expected]
    assert load_examples("owner/name:test").examples == [expected]
    assert asked == [("owner/name", "train"), ("owner/name", "test")]
    with pytest.raises(
        DataError, match="not a file here, and not a data set that can be loaded.*Couldn't reach"
    ) as caught:
        check_data("nobody/nothing")
    assert "load_dataset" in caught.value.remedy
    arrow_data.load_hub.cache_clear()


# --- fields with other names


@pytest.mark.parametrize(
    ("record", "fields", "segments"),
    [
        ({"q": "Add", "a": "5"}, {"prompt": "q", "response": "a"}, ("Add", "5")),
        (
            {"q": "Add", "context": "2, 3", "a": "5"},
            {"prompt": "q", "response": "a"},
            ("Add\n\n### Context:\n2, 3", "5"),
        ),
        ({"input": "Add", "target": "5"}, {"prompt": "input", "response": "target"}, ("Add", "5")),
        ({"instruction": "Add", "answer": "5"}, {"response": "answer"}, ("Add", "5")),
        ({"prompt": "Add", "response": "5"}, {"prompt": "prompt"}, ("Add", "5")),
        ({"body": "all", "text": "no"}, {"text": "body"}, ("all",)),
    ],
)
def test_named_fields(tmp_path, record, fields, segments):
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    (example,) = load_examples(str(tmp_path / "a.jsonl"), RecordFields(**fields)).examples
    assert tuple(segment.text for segment in example.segments) == segments
    assert [segment.in_loss for segment in example.segments][-1]


@pytest.mark.parametrize(
    ("record", "segments", "read"),
    [
        ({"prompt": "Q", "response": "A", "id": "7"}, ("Q", "A"), "prompt, response"),
        ({"question": "Q", "answer": "A", "text": "other"}, ("Q", "A"), "question, answer"),
        ({"Question": "Q", "Answer": "A"}, ("Q", "A"), "Question, Answer"),
        ({"instruction": "Q", "output": "A", "input": ""}, ("Q", "A"), "instruction, output"),
        ({"input": "Q", "output": "A"}, ("Q", "A"), "input, output"),
        ({"question": "Q", "context": "C", "answer": "A"}, ("Q\n\n### Context:\nC", "A"), "question, context, answer"),
        ({"query": "Q", "response": "A"}, ("Q", "A"), "query, response"),
        ({"problem": "Q", "solution": "A", "answer": "A"}, ("Q", "A"), "problem, solution"),
        ({"prompt": "Q", "completion": "A", "response": "B"}, ("Q", "A"), "prompt, completion"),
        ({"messages": [{"role": "assistant", "content": "A"}]}, ("A",), "messages"),
        ({"text": "A", "title": "B"}, ("A",), "text"),
    ],
)
def test_fields_of_common_names_are_read_without_settings(tmp_path, record, segments, read):
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(record)}\n{json.dumps(record | {'id': '8'})}\n")
    corpus = load_corpus(str(path), 0.0, 0)
    examples = list(corpus.train)
    assert [tuple(segment.text for segment in example.segments) for example in examples] == [segments] * 2
    assert examples[0].segments[-1].in_loss
    assert corpus.notes()[0] == f"{path}: 2 records with {read}"
    if not isinstance(record.get("messages"), list):
        assert RecordFields().columns(["id", *record]) == [name for name in record if name.lower() in FORM_FIELDS]


def test_a_mixture_of_forms_and_plain_text_say_what_they_are(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\n{"input": "c", "output": "d"}\nnonsense\n')
    first, second = load_corpus(str(path), 0.0, 0).notes()
    assert first == f"{path}: 2 records with text; 1 record with input, output"
    assert second.startswith(f"{path} line 4: invalid JSON")
    (tmp_path / "a.txt").write_text("plain\n")
    assert load_corpus(str(tmp_path / "a.txt"), 0.0, 0).notes() == []


def test_fields_that_exclude_each_other(tmp_path):
    (tmp_path / "a.jsonl").write_text(LINES)
    with pytest.raises(DataError, match="`text_field` excludes"):
        check_data(str(tmp_path / "a.jsonl"), RecordFields(text="a", prompt="b"))


@pytest.mark.parametrize(
    ("record", "remedy"),
    [
        ({"title": "?", "summary": "!"}, "`prompt_field=title` `response_field=summary`"),
        ({"article": "..."}, "`text_field=article`"),
        ({"x": "..."}, "`prompt_field` and `response_field`"),
    ],
)
def test_unknown_fields_are_answered_with_the_settings_that_read_them(tmp_path, record, remedy):
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    with pytest.raises(DataError) as caught:
        check_data(str(tmp_path / "a.jsonl"))
    assert remedy in caught.value.remedy


# --- what is refused, and the commands that convert it


@pytest.mark.parametrize(
    ("name", "content", "converted", "count"),
    [
        ("keyed.json", json.dumps({"version": 1, "data": ROWS}, indent=1), "keyed.jsonl", 30),
        ("one.json", json.dumps(ROWS[0], indent=1), "one.jsonl", 1),
        ("it's text.log", "words\n", "it's text.txt", 1),
    ],
)
def test_the_command_in_a_refusal_converts(tmp_path, name, content, converted, count):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as caught:
        check_data(str(tmp_path / name))
    _, _, command = caught.value.remedy.partition(": ")
    subprocess.run(command.replace("python ", f"{sys.executable} ", 1), shell=True, check=True)
    assert len(load_examples(str(tmp_path / converted)).examples) == count


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("a.xlsx", "pandas.read_excel"),
        ("a.pdf", "pdftotext a.pdf a.txt"),
        ("a.docx", "pandoc -t plain -o a.txt a.docx"),
        ("a.zip", "unzip a.zip -d a"),
        ("a.npz", "task=images"),
    ],
)
def test_every_refused_format_has_its_command(tmp_path, monkeypatch, name, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match="unknown suffix") as caught:
        check_data(name)
    assert command in caught.value.remedy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"text": "a"}, {"text": ', "not a valid JSON array: .* in record 2"),
        ('[{"text": "a"}', "closing bracket is missing in record 2"),
        ('[{"text": "a"} nonsense]', "in record 2"),
        ("[]", "is empty"),
        ("[1, null]", "no usable record in 2 records: record 1: a record must be a JSON object, found a number"),
    ],
)
def test_damaged_arrays(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=message):
        load_examples(str(tmp_path / "a.json"))


def test_csv_rows_that_cannot_be_used_and_long_fields(tmp_path):
    long = "word " * 40_000  # more than Python's own limit of a field
    (tmp_path / "a.csv").write_text(f'text\n"two\nlines"\n\na,b\n{long}\n')
    loaded = load_examples(str(tmp_path / "a.csv"))
    assert [example.segments[0].text for example in loaded.examples] == ["two\nlines", long]
    assert [str(problem) for problem in loaded.problems] == [
        "line 4: empty line",
        "line 5: 2 columns, but the first line names 1",
    ]
    (tmp_path / "b.csv").write_text('text\n"never closed\n')
    with pytest.raises(DataError, match="invalid CSV in .*b.csv"):
        load_examples(str(tmp_path / "b.csv"))


# --- streaming


@pytest.mark.parametrize("name", ["a.jsonl", "array.json", "a.csv"])
def test_the_text_is_never_in_memory_as_a_whole(tmp_path, name):
    rows = [{"text": f"{number} " + "word " * 400} for number in range(4000)]
    with (tmp_path / name).open("w") as file:
        if name == "array.json":
            json.dump(rows, file)
        elif name == "a.csv":
            file.write("text\n" + "\n".join(row["text"] for row in rows))
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    size = (tmp_path / name).stat().st_size
    del rows
    tracemalloc.start()
    try:
        corpus = load_corpus(str(tmp_path / name), 0.1, 0)
        count = sum(1 for _ in corpus.train)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (count, len(corpus.train), len(corpus.held_out)) == (3600, 3600, 400)
    assert peak < size / 4


def test_a_large_record_of_an_array_is_read_in_linear_time(tmp_path):
    text = "word " * 1_000_000
    (tmp_path / "a.json").write_text(json.dumps([{"text": "a"}, {"text": text}, {"text": "b"}]))
    assert [len(example.segments[0].text) for example in load_examples(str(tmp_path / "a.json")).examples] == [
        1,
        len(text),
        1,
    ]


def test_a_file_that_changes_between_two_readings_is_an_error(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(LINES)
    corpus = load_corpus(str(path), 0.1, 0)
    assert len(list(corpus.train)) == len(corpus.train) == 27
    path.write_text(LINES.replace("Blue", "Red"))
    with pytest.raises(DataError, match="was changed while it was in use"):
        list(corpus.train)


def test_a_check_reads_no_further_than_the_first_usable_record(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{}\n{"text": "a"}\n' + (b" " * 1023 + b"\n") * 1024 + b"\xff")
    check_data(str(tmp_path / "a.jsonl"))
    with pytest.raises(DataError, match="not UTF-8"):
        load_corpus(str(tmp_path / "a.jsonl"), 0.1, 0)


def test_data_is_read_without_torch():
    code = "import sys, edgefed.training.data as d; d.check_data('silo:http'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- ShareGPT, Arrow files, repeated records


def test_share_gpt_is_a_conversation(tmp_path):
    turns = [("human", "Hi"), ("gpt", "Hello"), ("observation", "42"), ("assistant", "It is 42")]
    conversation = [{"from": speaker, "value": text} for speaker, text in turns]
    records = [
        {"id": "x", "system": "Be brief.", "conversations": conversation},
        {"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "system": ""},
        {"conversations": [{"from": "narrator", "value": "a"}]},
        {"conversations": [{"from": "gpt", "value": None}]},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    loaded = load_examples(str(tmp_path / "a.jsonl"))
    assert [(s.role, s.text, s.in_loss) for s in loaded.examples[0].segments] == [
        ("system", "Be brief.", False),
        ("user", "Hi", False),
        ("assistant", "Hello", True),
        ("tool", "42", False),
        ("assistant", "It is 42", True),
    ]
    assert [s.role for s in loaded.examples[1].segments] == ["user", "assistant"]
    assert [str(problem) for problem in loaded.problems] == [
        "line 3: message 1 has the role 'narrator'; known are system, developer, user, assistant, tool",
        "line 4: message 1: content must be a string, found null",
    ]


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_arrow_files(tmp_path, kind):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"prompt": [f"q{n}" for n in range(600)], "response": ["a"] * 600, "unused": [0] * 600})
    make = pyarrow.ipc.new_file if kind == "file" else pyarrow.ipc.new_stream
    with make(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    loaded = load_examples(str(tmp_path / "a.arrow"))
    assert [example.segments[0].text for example in loaded.examples] == [f"q{n}" for n in range(600)]
    assert loaded.examples[-1].place == "row 600"
    assert loaded.examples[0].read == ("prompt", "response")
    (tmp_path / "a.arrow").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="is not a readable Arrow file"):
        check_data(str(tmp_path / "a.arrow"))


def test_repeated_records_are_counted_and_left_out_on_request(tmp_path):
    texts = ["a", "b", "a", "c", "a", "d", "e", "f", "g", "h"]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    kept, once = (load_corpus(str(path), 0.2, 0, RecordFields(deduplicate=choice)) for choice in (False, True))
    assert (kept.repeated, once.repeated) == (2, 2)
    assert len(kept.train) + len(kept.held_out) == 10
    assert sorted(e.segments[0].text for side in (once.train, once.held_out) for e in side) == sorted(set(texts))
    assert kept.notes()[1].endswith("repeated records: 2; `deduplicate` leaves them out")
    assert once.notes()[1].endswith("repeated records: 2, left out")
