"""Data sets passed as objects: what is written, where reading stops, and what is said of those that fail."""

from __future__ import annotations

import itertools
import json
import stat
import subprocess
import sys
import tracemalloc

import pytest

import edgefed
from edgefed.errors import ConfigError, DataError, StateLocked
from edgefed.progress import NullProgress
from edgefed.training.data import RecordFields, load_corpus, load_examples
from edgefed.training.spool import SPOOL_FILE, spool_records


class Shown(NullProgress):
    """The messages of a progress display, and its bytes."""

    def __init__(self):
        self.messages, self.advanced, self.phases = [], 0, []

    def message(self, text):
        self.messages.append(text)

    def phase(self, name, total=None, unit="B"):
        self.phases.append((name, total, unit))

    def advance(self, n):
        self.advanced += n


def spooled(*args, **limits):
    shown = Shown()
    spool_records(*args, **limits, progress=shown)
    (note,) = shown.messages
    return note


CHAT = {"messages": [{"role": "user", "content": "Grüße?"}, {"role": "assistant", "content": "Ja \ud83d"}]}
ROWS = [
    {"instruction": f"Name colour {number % 4}", "response": f"Blue {number % 4}", "image": b"x"} for number in range(8)
]


def stream(count, *, fails=False):
    for number in range(count):
        yield {"text": f"passage {number}"}
    if fails:
        raise ConnectionResetError("the hub is gone")


def test_records_are_read_as_those_of_a_file_are(tmp_path):
    """Other columns are left out, bad records keep their number, and the identity is that of the same file."""
    path, file = tmp_path / SPOOL_FILE, tmp_path / "file.jsonl"
    note = spooled([*ROWS, {"instruction": "x", "response": b"y"}, "text", CHAT], path)
    assert note.startswith(f"data (list): 11 records written to {path}, ")
    assert b"image" not in path.read_bytes()
    lines = [json.dumps({name: row[name] for name in ("instruction", "response")}) for row in ROWS]
    file.write_text("\n".join(lines) + "\n")
    loaded = load_examples(str(path))
    assert loaded.examples == load_examples(str(file)).examples
    assert [str(problem) for problem in loaded.problems] == [
        "line 9: response must be a string, found an object",
        "line 10: a record must be a JSON object, found a string",
        "line 11: message 2: content contains half a surrogate pair, which is not a character",
    ]
    spool_records(iter(ROWS), path)
    assert load_examples(str(path)).sha256 == load_examples(str(file)).sha256
    corpus = load_corpus(str(path), 0.3, 0, RecordFields(deduplicate=True))
    assert (len(corpus.train), len(corpus.held_out), corpus.repeated) == (3, 1, 4)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_reading_stops_at_a_limit_without_asking_for_more(tmp_path):
    path = tmp_path / SPOOL_FILE
    assert "the first 3 records (`max_records=3`)" in spooled(stream(3, fails=True), path, max_records=3)
    endless = ({"text": "word " * 20} for _ in itertools.count())
    assert "(`max_bytes=1.0 KiB`)" in spooled(endless, path, max_bytes="1KiB")
    assert path.stat().st_size <= 1024
    assert len(load_examples(str(path)).examples) == 9
    with pytest.raises(DataError, match="record 1 has 2.0 MiB, more than `max_bytes=1.0 MiB`"):
        spool_records([{"text": "x" * (2 << 20)}], path, max_bytes="1MiB")


def test_a_data_set_that_may_be_endless_needs_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("edgefed.training.spool.UNLIMITED_BYTES", 1 << 20)
    endless = ({"text": "word " * 2000} for _ in itertools.count())
    with pytest.raises(DataError, match=r"more than 1.0 MiB in its first 105 records; it may be endless") as caught:
        spool_records(endless, tmp_path / SPOOL_FILE)
    assert "`max_records`" in caught.value.remedy
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (stream(7, fails=True), r"\(generator\) failed at record 8: ConnectionResetError: the hub is gone"),
        (stream(0), r"data \(generator\) is empty"),
        (["text"], r"data \(list\): record 1 must be a dict, found str"),
        ([{"a": 1}] * 3, "no usable record in 3 records: record 1: no known field"),
        (itertools.repeat({"title": "t", "summary": "s"}), "no usable record in 1,000 records: record 1"),
        ([{"text": "x"}, {"text": {(1, 2): 3}}], "record 2 cannot be written as JSON: keys must be"),
    ],
)
def test_an_error_keeps_the_file_of_before(tmp_path, records, message):
    path = tmp_path / SPOOL_FILE
    path.write_text("before")
    with pytest.raises(DataError, match=message):
        spool_records(records, path)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_record_at_a_time_is_in_memory(tmp_path):
    rows, shown = ({"text": f"{number} " + "word " * 2000} for number in range(1000)), Shown()
    tracemalloc.start()
    try:
        spool_records(rows, tmp_path / SPOOL_FILE, max_bytes="1GiB", progress=shown)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    size = (tmp_path / SPOOL_FILE).stat().st_size
    assert peak < size / 4
    assert shown.phases == [("read", 1 << 30, "B")]
    assert 0 <= size - shown.advanced < 1 << 20


@pytest.mark.skipif(sys.platform == "win32", reason="resource limits are POSIX's")
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path):
    code = f"""
import resource, pathlib
from edgefed.errors import StorageError
from edgefed.training.spool import spool_records
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    spool_records([{{"text": "word " * 100}}] * 1000, pathlib.Path({str(tmp_path)!r}, "data.jsonl"))
except StorageError as error:
    print(error)
"""
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "data.jsonl: File too large" in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": {"train": [], "test": []}}, "`data` is a dict with the keys train, test"),
        ({"data": stream}, "must be a path or an iterable of records, found function"),
        ({"data": 3}, "found int"),
        ({"data": "a.jsonl", "max_records": 3}, "have no effect with a path"),
        ({"data": [], "max_records": 0}, "invalid `max_records`: 0"),
        ({"data": [], "max_bytes": "much"}, "`max_bytes`: invalid memory size 'much'"),
        ({"data": [], "task": "text"}, "`task=text` needs the path of labelled examples"),
    ],
)
def test_a_client_refuses_what_is_not_records(settings, message):
    with pytest.raises(ConfigError, match=message):
        edgefed.Client("http://127.0.0.1:1", **settings)


def test_a_client_reads_its_records_once(tmp_path):
    state, shown = tmp_path / "me", Shown()
    client = edgefed.Client("http://127.0.0.1:1", data=stream(5), state=state, max_records=4)
    client.check_data(shown)
    assert client.data == str(state / SPOOL_FILE)
    assert "the first 4 records (`max_records=4`)" in shown.messages[0]
    client.check_data(shown)
    assert len(shown.messages) == 1
    from edgefed.agent.journal import Journal

    with Journal(state), pytest.raises(StateLocked):
        edgefed.Client("http://127.0.0.1:1", data=stream(5), state=state).check_data()
    assert len(load_examples(client.data).examples) == 4


@pytest.mark.full
@pytest.mark.filterwarnings("default")
def test_data_sets_of_hugging_face(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list([*ROWS, {**ROWS[0], "image": None}])
    paths = [tmp_path / f"{number}.jsonl" for number in range(4)]
    assert "data (Dataset): 9 records" in spooled(table, paths[0])
    assert "data (IterableDataset): 9 records" in spooled(table.to_iterable_dataset(), paths[1])
    generated = datasets.IterableDataset.from_generator(lambda: iter([*ROWS, ROWS[0]]))
    assert "the first 9 records" in spooled(generated, paths[2], max_records=9)
    spool_records(table.with_format("numpy"), paths[3])
    assert len({load_examples(str(path)).sha256 for path in paths}) == 1
    with pytest.raises(ConfigError, match="`data` is a DatasetDict with the keys train"):
        edgefed.Client("http://127.0.0.1:1", data=datasets.DatasetDict(train=table))
