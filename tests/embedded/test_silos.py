"""The silos: text of the running Python, split by file. Runs on whatever version runs the tests."""

from __future__ import annotations

import subprocess
import sys

import pytest

from edgefed.embedded import silos
from edgefed.embedded.silos import SILOS, Document, load_silo, pretraining_documents
from edgefed.errors import DataError


def size(documents):
    return sum(len(document.text.encode("utf-8")) for document in documents)


@pytest.mark.parametrize("name", SILOS)
def test_no_document_is_on_both_sides_and_the_share_is_about_a_fifth(name):
    silo = load_silo(name)
    train, held_out = ({document.name for document in side} for side in (silo.train, silo.held_out))
    assert train
    assert held_out
    assert not train & held_out
    assert not {d.text for d in silo.train} & {d.text for d in silo.held_out}
    share = size(silo.held_out) / size((*silo.train, *silo.held_out))
    assert 0.1 <= share <= silos.HELD_OUT_CEILING
    assert size(silo.train) > 100_000  # enough for a demonstration to learn something


@pytest.mark.parametrize("name", ["email", "topics"])
def test_loading_twice_gives_the_same_silo(name):
    assert load_silo(name) == load_silo(name)


def test_silos_are_different_text():
    digests = {load_silo(name).sha256 for name in SILOS}
    assert len(digests) == len(SILOS)


def test_every_document_of_a_package_silo_is_its_own_and_no_test():
    for name in SILOS:
        silo = load_silo(name)
        for document in (*silo.train, *silo.held_out):
            assert document.name.startswith(f"{name}/")
            assert not {"test", "tests"} & set(document.name.split("/"))
            assert document.text.strip()


def test_topics_are_prose():
    silo = load_silo("topics")
    assert 'The "assert" statement' in next(d.text for d in silo.train if d.name == "topics/assert")


def test_pretraining_text_holds_nothing_of_a_silo():
    documents = pretraining_documents()
    assert size(documents) > 3_000_000
    roots = {document.name.split("/")[0].removesuffix(".py") for document in documents}
    assert not roots & {*SILOS, "pydoc_data", "encodings", "distutils", "lib2to3", "tkinter", "idlelib", "test"}
    assert {"argparse", "json", "typing"} <= roots  # modules and packages both
    silo_text = {d.text for name in SILOS for d in (*load_silo(name).train, *load_silo(name).held_out)}
    assert not silo_text & {document.text for document in documents}


def test_pretraining_text_is_only_the_standard_library():
    roots = {document.name.split("/")[0].removesuffix(".py") for document in pretraining_documents()}
    assert roots <= sys.stdlib_module_names  # no site-packages, no sitecustomize


def test_unknown_silo_names_what_there_is():
    with pytest.raises(DataError, match="'sockets'.*asyncio, email") as caught:
        load_silo("sockets")
    assert "silo:asyncio" in caught.value.remedy


def test_python_without_source_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="'xml' needs at least two readable documents; found 0"):
        load_silo("xml", tmp_path)
    with pytest.raises(DataError, match="no standard library source"):
        pretraining_documents(tmp_path)


def test_python_without_topics_is_a_data_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match="pydoc_data.topics"):
        load_silo("topics")


def test_unreadable_file_is_a_data_error(tmp_path):
    package = tmp_path / "xml"
    package.mkdir()
    (package / "a.py").write_text("a = 1\n")
    (package / "b.py").write_bytes(b"# coding: no-such-codec\n")
    with pytest.raises(DataError, match="cannot read .*b.py"):
        load_silo("xml", tmp_path)


def test_tests_are_left_out_and_the_coding_cookie_is_honoured(tmp_path):
    package = tmp_path / "xml"
    for folder in ("test", "dom", "dom/tests"):
        (package / folder).mkdir(parents=True)
        (package / folder / "inside.py").write_text(f"# {folder}\n")
    (package / "test_things.py").write_text("# a test\n")
    (package / "latin.py").write_bytes(b"# coding: latin-1\r\n# caf\xe9\r\n")
    silo = load_silo("xml", tmp_path)
    texts = {d.name: d.text for d in (*silo.train, *silo.held_out)}
    assert texts == {"xml/dom/inside.py": "# dom\n", "xml/latin.py": "# coding: latin-1\n# caf\xe9\n"}


@pytest.mark.parametrize(
    ("sizes", "held_out"),
    [
        ([10, 10], 1),  # a half is over the ceiling: still one
        ([1000, 1], 1),
        ([10] * 10, 2),
        ([10] * 100, 20),
    ],
)
def test_held_out_count(sizes, held_out):
    documents = [Document(f"xml/{index}.py", "x" * size) for index, size in enumerate(sizes)]
    chosen = silos.select_held_out(documents)
    assert len(chosen) == held_out
    if 1000 in sizes:
        assert chosen == {"xml/1.py"}  # the smallest is the least lost


def test_silos_need_no_torch():
    code = "import sys, edgefed.embedded.silos as s; s.load_silo('http'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
