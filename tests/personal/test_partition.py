"""Partitions: what every one of them promises, for any labels; and their files as a cache."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from edgefed.errors import ConfigError, DataError, StateCorrupt
from edgefed.personal import partition
from edgefed.personal.labelled_text import load_labelled_texts
from edgefed.personal.partition import (
    PartitionSettings,
    class_counts,
    partition_by_class,
    partition_dirichlet,
    source_digest,
    write_partition,
)
from edgefed.personal.sample_files import load_images
from edgefed.personal.samples import ImageSamples


@st.composite
def any_labels(draw):
    """Numbers of classes with gaps, 20 to 59 examples each, in random order."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    classes = draw(st.integers(1, 8))
    return rng.permutation(np.repeat(np.arange(classes) * 2, rng.integers(20, 60, classes)))


@settings(max_examples=60, deadline=None)
@given(any_labels(), st.integers(1, 12), st.integers(1, 4), st.integers(0, 2**32))
def test_by_class_every_client_has_so_many_classes(labels, clients, each, seed):
    classes = np.unique(labels)
    assume(each <= len(classes))
    parts = partition_by_class(labels, clients, each, seed)
    assert len(parts) == clients
    assert all((np.diff(part) > 0).all() for part in parts)
    counts = class_counts(labels, parts, int(labels.max()) + 1)
    assert ((counts > 0).sum(axis=1) == each).all()
    used = np.concatenate(parts)
    assert len(np.unique(used)) == len(used)
    holders = (counts > 0).sum(axis=0)[classes]
    assert holders.max() - holders.min() <= 1
    for label in classes[holders > 0]:
        shards = counts[counts[:, label] > 0, label]
        assert shards.sum() == (labels == label).sum()
        assert shards.max() - shards.min() <= 1
    if clients * each >= len(classes):
        assert len(used) == len(labels)
    else:
        assert (holders > 0).sum() == clients * each


@settings(max_examples=60, deadline=None)
@given(any_labels(), st.integers(1, 6), st.floats(0.2, 100), st.integers(0, 2**32), st.integers(1, 3))
def test_dirichlet_uses_every_example_once(labels, clients, alpha, seed, least):
    try:
        parts = partition_dirichlet(labels, clients, alpha, seed, least)
    except DataError:
        assume(False)
    assert len(parts) == clients
    assert min(map(len, parts)) >= least
    assert all((np.diff(part) > 0).all() for part in parts)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))


BY_CLASS, DIRICHLET = PartitionSettings(6, classes_per_client=2), PartitionSettings(6, by="dirichlet")


@pytest.mark.parametrize("how", [BY_CLASS, DIRICHLET], ids=lambda how: how.by)
def test_a_seed_decides_and_examples_are_drawn_at_random(how):
    labels = np.repeat(np.arange(6), 100)
    first, again, other = (dataclasses.replace(how, seed=seed).divide(labels) for seed in (3, 3, 4))
    assert all(map(np.array_equal, first, again))
    assert not all(map(np.array_equal, first, other))
    of_class = np.concatenate([part[labels[part] == 0] for part in first])
    assert not (np.diff(of_class) > 0).all()  # not the first rows to the first client


def test_alpha_decides_how_unlike_clients_are():
    labels = np.repeat(np.arange(10), 500)

    def largest_share(alpha):
        counts = class_counts(labels, partition_dirichlet(labels, 8, alpha, 0), 10)
        return (counts.max(axis=1) / counts.sum(axis=1)).mean()

    assert largest_share(0.1) > 0.4 > largest_share(1.0) > largest_share(1000.0)
    assert largest_share(1000.0) < 0.13


def test_impossible_partitions_are_refused():
    labels = np.repeat([0, 1], [50, 3])
    with pytest.raises(ConfigError, match="`classes_per_client` is 3, but the data has 2"):
        partition_by_class(labels, 4, 3, 0)
    with pytest.raises(ConfigError, match="`clients` must be at least 1, found 0"):
        partition_by_class(labels, 0, 1, 0)
    with pytest.raises(DataError, match="class 1 has 3 examples, too few for 5 clients"):
        partition_by_class(labels, 5, 2, 0)
    with pytest.raises(DataError, match="53 examples are too few for 6 clients"):
        partition_dirichlet(labels, 6, 0.5, 0, 10)
    with pytest.raises(DataError, match="none of 1000 draws with alpha 0.01"):
        partition_dirichlet(labels, 5, 0.01, 0, 10)
    for alpha in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="alpha"):
            partition_dirichlet(labels, 2, alpha, 0)
    with pytest.raises(ConfigError, match="at least 1"):
        partition_dirichlet(labels, 2, 0.5, 0, 0)


def samples(classes=("ant", "bee", "cow"), each=20):
    labels = np.repeat(np.arange(len(classes)), each)
    images = np.random.default_rng(0).integers(0, 256, (len(labels), 32, 32, 3), dtype=np.uint8)
    return ImageSamples(images, labels, classes)


SETTINGS = PartitionSettings(clients=3, classes_per_client=2)


def test_files_hold_what_was_divided_and_can_be_joined_with(tmp_path):
    whole = samples()
    partition = write_partition(tmp_path / "out", whole, SETTINGS, "digest")
    assert partition.files == ("client-00.npz", "client-01.npz", "client-02.npz")
    assert not partition.cached
    for client, (name, part) in enumerate(zip(partition.files, SETTINGS.divide(whole.labels), strict=True)):
        read = load_images(tmp_path / "out" / name)
        np.testing.assert_array_equal(read.images, whole.images[part])
        np.testing.assert_array_equal(read.labels, whole.labels[part])
        assert read.classes == whole.classes
        np.testing.assert_array_equal(np.bincount(read.labels, minlength=3), partition.counts[client])
    record = json.loads((tmp_path / "out" / "partition.json").read_text())
    assert record["settings"] == {"clients": 3, "by": "class", "classes_per_client": 2, "seed": 0, "resized": False}
    assert record["source_sha256"] == "digest"
    assert record["counts"] == partition.counts.tolist()
    assert (tmp_path / "out" / "partition.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("names", [("x", "y"), ("0", "1")])
def test_texts_come_back_as_they_were(tmp_path, names):
    source = tmp_path / "d.jsonl"
    source.write_text("".join(json.dumps({"text": f"ö {i}\n", "label": names[i % 2]}) + "\n" for i in range(20)))
    whole = load_labelled_texts(source)
    partition = write_partition(tmp_path / "out", whole, PartitionSettings(clients=2), source_digest(source))
    read = [load_labelled_texts(tmp_path / "out" / name) for name in partition.files]
    assert sorted(text for each in read for text in each.texts) == sorted(whole.texts)
    label_of = dict(zip(whole.texts, whole.labels, strict=True))
    for each in read:
        assert each.classes == whole.classes
        assert all(label_of[text] == label for text, label in zip(each.texts, each.labels, strict=True))


def test_the_same_is_not_written_again_and_others_are_refused(tmp_path, monkeypatch):
    out = tmp_path / "out"
    first = write_partition(out, samples(), SETTINGS, "digest")
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    again = write_partition(out, samples(), PartitionSettings(clients=3, classes_per_client=2, alpha=9.0), "digest")
    assert again.cached
    assert again.files == first.files
    np.testing.assert_array_equal(again.counts, first.counts)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == times
    with pytest.raises(ConfigError, match="seed 0 instead of 1"):
        write_partition(out, samples(), PartitionSettings(clients=3, classes_per_client=2, seed=1), "digest")
    with pytest.raises(ConfigError, match="by 'class' instead of 'dirichlet'"):
        write_partition(out, samples(), PartitionSettings(clients=3, by="dirichlet"), "digest")
    with pytest.raises(ConfigError, match="source has different content"):
        write_partition(out, samples(), SETTINGS, "another")
    (out / "client-01.npz").write_bytes(b"changed")
    with pytest.raises(StateCorrupt, match=r"client-01\.npz is missing or was changed"):
        write_partition(out, samples(), SETTINGS, "digest")
    (out / "partition.json").write_text("[]")
    with pytest.raises(StateCorrupt, match="not a JSON object"):
        write_partition(out, samples(), SETTINGS, "digest")


def test_an_interrupted_partition_goes_on(tmp_path, monkeypatch):
    out, real, written = tmp_path / "out", partition.write_durably, []

    def stops_after_two(path, data):
        written.append(path.name)
        if len(written) == 3:
            raise KeyboardInterrupt
        real(path, data)

    monkeypatch.setattr(partition, "write_durably", stops_after_two)
    with pytest.raises(KeyboardInterrupt):
        write_partition(out, samples(), SETTINGS, "digest")
    assert written == ["partition.json", "client-00.npz", "client-01.npz"]
    monkeypatch.setattr(partition, "write_durably", real)
    assert not write_partition(out, samples(), SETTINGS, "digest").cached
    assert write_partition(out, samples(), SETTINGS, "digest").cached


def test_files_of_somebody_else_are_not_overwritten(tmp_path):
    (tmp_path / "client-01.npz").write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"client-01\.npz exists"):
        write_partition(tmp_path, samples(), SETTINGS, "digest")
    assert [path.name for path in tmp_path.iterdir()] == ["client-01.npz"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        write_partition(tmp_path / "file", samples(), SETTINGS, "digest")


def test_a_named_class_without_examples_is_an_error_a_number_is_not(tmp_path):
    whole = samples()
    empty = ImageSamples(whole.images, whole.labels, ("ant", "bee", "cow", "dog"))
    with pytest.raises(DataError, match="class 'dog' has no example"):
        write_partition(tmp_path / "a", empty, SETTINGS, "digest")
    from_one = ImageSamples(whole.images, whole.labels + 1, ("0", "1", "2", "3"))
    assert write_partition(tmp_path / "b", from_one, SETTINGS, "digest").counts[:, 0].sum() == 0


def test_the_digest_of_a_folder_knows_names_and_content(tmp_path):
    for name in ("a/1.png", "b/1.png", ".cache/x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    digests = [source_digest(tmp_path)]
    (tmp_path / ".cache" / "x").write_bytes(b"hidden")
    assert source_digest(tmp_path) == digests[0]
    (tmp_path / "a" / "1.png").write_bytes(b"other")
    digests.append(source_digest(tmp_path))
    (tmp_path / "a" / "1.png").rename(tmp_path / "b" / "2.png")
    digests.append(source_digest(tmp_path))
    assert len(set(digests)) == 3
