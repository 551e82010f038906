"""The file format: what is written reads back, invalid files are refused, nobody is named."""

import csv
import io
import json

import msgspec
import pytest

from edgefed.bench.formats import check_writable, to_csv, write_text
from edgefed.bench.report import SCHEMA, MemoryTerm, Report, hashed, load_report, parse_report, to_json
from edgefed.bench.statistics import Entry
from edgefed.errors import ConfigError, StorageError

from .made_reports import made_report, made_sustain


def test_a_report_reads_back_as_it_was():
    report = made_report(sustain=made_sustain())
    assert parse_report(to_json(report), "x") == report


def test_the_schema_is_the_one_that_is_documented():
    """Fields that others read. Taking one away, or giving one another type, needs a new schema number."""
    data = json.loads(to_json(made_report(sustain=made_sustain())))
    assert data["schema"] == SCHEMA == "edgefed.bench/1"
    assert set(data) == {
        "schema", "created", "tool", "host", "device", "memory", "tests", "sustain", "fits", "network", "uplink",
        "planning", "model", "explain", "warnings", "unknown", "seconds", "interrupted", "verdict", "kernels",
    }  # fmt: skip
    assert set(data["tests"][0]) == {
        "name", "unit", "verdict", "samples", "median", "mad", "best", "better", "params", "derived", "note", "reason",
        "paper", "paper_source",
    }  # fmt: skip
    assert {"now_bytes", "ideal_bytes", "terms", "origin", "check"} <= set(data["memory"])
    assert {"t_s", "rate", "clock_mhz", "temperature_celsius", "power_watts", "reasons"} == set(
        data["sustain"]["points"][0]
    )
    properties = msgspec.json.schema(Report)["$defs"]["Report"]["properties"]
    assert set(properties) == set(data)


def test_numbers_that_json_cannot_write_become_null():
    entry = Entry(name="x", unit="s", verdict="unusable", samples=(1.0,), median=1.0, mad=float("inf"), best=1.0)
    data = json.loads(to_json(made_report(tests=(entry,))), parse_constant=pytest.fail)
    assert data["tests"][0]["mad"] is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "invalid JSON"),
        ("[1]", "expected schema 'edgefed.bench/1', found None"),
        ('{"schema": "edgefed.bench/99"}', "found 'edgefed.bench/99'"),
        ('{"schema": "edgefed.bench/1"}', "missing required field `created`"),
        (b"\xff\xfe", "invalid JSON"),
    ],
)
def test_an_invalid_report_is_refused_with_its_name(text, says):
    with pytest.raises(ConfigError, match="a.json") as error:
        parse_report(text, "a.json")
    assert says in str(error.value)
    assert error.value.remedy


def test_a_report_that_contradicts_itself_is_refused():
    data = json.loads(to_json(made_report()))
    data["tests"][0]["verdict"] = "splendid"
    with pytest.raises(ConfigError, match="'copy': verdict 'splendid'"):
        parse_report(json.dumps(data), "x")
    data = json.loads(to_json(made_report()))
    data["tests"][0]["samples"] = ["fast"]
    with pytest.raises(ConfigError, match=r"tests\[0\].samples\[0\]|samples"):
        parse_report(json.dumps(data), "x")


def test_a_newer_writer_may_say_more():
    data = json.loads(to_json(made_report()))
    data["novelty"] = data["host"]["novelty"] = 1
    assert parse_report(json.dumps(data), "x") == made_report()


def test_csv_has_one_line_a_test_with_all_samples():
    rows = list(csv.DictReader(io.StringIO(to_csv(made_report(network=(Entry.failed("connect", "ms", "away"),))))))
    assert [row["name"] for row in rows] == ["copy", "matmul float32", "train step", "energy", "disk write", "connect"]
    assert rows[1]["share"] == "0.8"
    assert len(rows[1]["samples"].split()) == 7
    assert rows[2]["derived"] == "1"
    assert rows[3]["median"] == ""
    assert rows[3]["reason"] == "energy is not readable"


def test_files_are_written_whole_or_not_at_all(tmp_path):
    write_text(tmp_path / "a.json", "text")
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
    for path in (tmp_path / "missing" / "a.json", tmp_path):
        with pytest.raises(StorageError, match="cannot write"):
            check_writable(path)
    with pytest.raises(ConfigError, match="cannot read"):
        load_report(tmp_path / "none.json")


def test_programs_of_others_stay_out_of_files():
    memory = made_report().memory
    term = MemoryTerm(name="used by others", size_bytes=-1, origin="NVML", who="secret-game 1.2")
    text = to_json(made_report(memory=msgspec.structs.replace(memory, terms=(term,))))
    assert "used by others" in text
    assert "secret" not in text


def test_identifiers_are_hashed():
    assert hashed("GPU-1") != hashed("GPU-2")
    assert "GPU" not in hashed("GPU-1")
    assert len(hashed("GPU-1")) == 16
