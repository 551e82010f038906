"""Compressed updates of a device: nothing is lost or counted twice, whenever it is killed."""

from __future__ import annotations

import os
import re
import signal
import zlib
from pathlib import Path

import numpy as np
import pytest
from agent_rig import Device, Memo, device, ledger
from test_with_aggregator import EXPERTS, SHAPE, import_run, serving, status_of
from toy_device import ToyTrainer, toy_value

from edgefed.agent.compression import choose_codec, compress_update
from edgefed.agent.journal import Journal
from edgefed.agent.transport import AggregatorClient
from edgefed.disk import hash_file
from edgefed.errors import MalformedMessage, TrainingDiverged
from edgefed.kernels.compression import CODECS, decode
from edgefed.protocol import frames
from edgefed.protocol.changes import apply_blob_change, encode_blob_change, to_steps
from edgefed.protocol.frames import narrow, widen, write_frame
from edgefed.protocol.messages import NEURON_INDEX, NEURON_TABLE, TensorInfo, UnitInfo

ROUNDS = 3


def arrays(path: Path) -> dict[str, np.ndarray]:
    return {name: np.array(frames.map_tensor(path, entry)) for name, entry in frames.read_header(path).items()}


def outcome(server, folder: Path, state: Path) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Experts of the latest global model, and the residuals of a device."""
    experts = {}
    with AggregatorClient(server.url) as client:
        for unit in (unit for unit in client.manifest("latest").units if unit.trainable):
            client.download(unit.sha256, unit.size_bytes, folder / "unit")
            experts[unit.key] = arrays(folder / "unit")["down_proj"].tobytes()
    (path,) = (state / "residuals").iterdir()
    return experts, {name: values.tobytes() for name, values in arrays(path).items()}


@pytest.mark.timeout(150)
@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_killed_device_loses_no_residual_and_counts_none_twice(tmp_path):
    ends = []
    for name in ("whole", "killed"):
        import_run(tmp_path / name, rounds=ROUNDS, clients=1, compression="topk")
        with serving(tmp_path / name) as server:
            state = tmp_path / f"{name}-device"
            if name == "killed":
                for death in ("before:finish_training", "after:finish_training", "before:acknowledge"):
                    with Device(server.url, state, death=death) as toy:
                        assert toy.finish(60)[0] == -signal.SIGKILL
                with Device(server.url, state) as toy:
                    code, out, err = toy.finish(60)
                assert code == 0, err
            else:
                with device(server.url, state, ToyTrainer(), memo=(memo := Memo())) as agent:
                    assert agent.run().rounds == ROUNDS
                assert [text for text in memo.messages if "sent as topk" in text] == [
                    "updates are sent as topk: 661 B instead of 70.6 KiB"
                ]
            ends.append(outcome(server, tmp_path, state))
    assert ends[0] == ends[1]
    experts, residuals = ends[0]
    for key, values in experts.items():
        found = np.frombuffer(values, np.float32) + np.frombuffer(residuals[f"{key}|down_proj"], np.float32)
        assert found.size == 6000
        assert (found >= toy_value(0.0, ROUNDS)).all(), "g + r is what was trained last, and what earlier rounds left"
    entries = ledger(tmp_path / "whole-device")
    assert [entry["metrics"]["compression_ratio"] > 50 for entry in entries] == [True] * ROUNDS
    assert all(entry["bytes_up"] < EXPERTS * 4 * SHAPE[0] * SHAPE[1] / 10 for entry in entries)
    assert all(entry["metrics"]["residual_norm"] > 0 for entry in entries)


def test_exact_bytes_without_compression_and_a_dropped_round_keeps_the_residuals(tmp_path):
    with Journal(tmp_path) as journal:
        journal.bind("http://a", "run")
        for server_round, ends in ((1, "acknowledge"), (2, "drop")):
            journal.begin_training(server_round)
            journal.update_path().write_bytes(b"update")
            journal.new_residuals_path().write_bytes(b"r%d" % server_round)
            meta = update_meta(journal)
            journal.finish_training(journal.update_path(), meta, bytes_down=0, seconds={})
            if ends == "acknowledge":
                journal.acknowledge(bytes_down=0, bytes_up=0)
            else:
                journal.drop_pending()
        assert journal.residuals_path.read_bytes() == b"r1"
        assert len(list((tmp_path / "residuals").iterdir())) == 1
        journal.begin_training(1)  # a server that was restored from a backup
        assert journal.new_residuals_path() != journal.residuals_path
        journal.bind("http://b", "run")
        assert journal.residuals_path is None
        assert not list((tmp_path / "residuals").iterdir())


def update_meta(journal: Journal):
    from test_journal import write_update

    return write_update(journal)


# --- the arithmetic -----------------------------------------------------------------------------------------------


def info(name: str, *shape: int, dtype: str = "F32") -> TensorInfo:
    return TensorInfo(name=name, dtype=dtype, shape=shape)


class Bench:
    """Rounds of one device on made-up units."""

    def __init__(self, folder: Path, units: dict[str, tuple[TensorInfo, ...]]):
        self.folder, self.residuals = folder, None
        self.units = {
            key: UnitInfo(key=key, kind="expert", layer=0, expert=at, trainable=True, tensors=infos)
            for at, (key, infos) in enumerate(units.items())
        }
        self.rounds, self.said = 0, []

    def round(self, codec: str, bases: dict, trained: dict, resident=()) -> dict[str, np.ndarray]:
        """{update name: what was sent}, decoded. ``bases`` {key: {tensor: values}}, ``trained`` {update name: ...}."""
        self.rounds += 1
        for key, tensors in bases.items():
            frames.write_frame(self.folder / key, {name: raw(values) for name, values in tensors.items()})
        path, new = self.folder / "update", self.folder / f"residuals-{self.rounds}"
        frames.write_frame(path, {name: raw(values) for name, values in trained.items()})
        found = lambda unit: self.folder / unit.key if unit.key in bases else None  # noqa: E731
        self.result = compress_update(path, self.units, found, CODECS[codec], self.residuals, new, resident,
            self.said.append)  # fmt: skip
        self.residuals, sent = new, {}
        for name, values in arrays(path).items():
            key, tensor, used = frames.split_update_name(name)
            whole = trained[f"{key}|{tensor}"]
            sent[f"{key}|{tensor}"] = values
            if used:
                sent[f"{key}|{tensor}"] = np.empty(whole.size, np.float32)
                decode(CODECS[used], values, sent[f"{key}|{tensor}"])
        return sent

    def left(self) -> dict[str, np.ndarray]:
        """The residuals."""
        return {name: values for name, values in arrays(self.residuals).items() if name != "checksums"}


def raw(values: np.ndarray) -> tuple[str, np.ndarray]:
    return {"f": "F32", "i": "I32", "u": "BF16"}[values.dtype.kind], values


@pytest.mark.parametrize("codec", ["int8", "topk"])
def test_what_was_left_out_is_sent_later(tmp_path, codec):
    bench = Bench(tmp_path, {"e": (info("w", 80, 70),)})
    rng, model, total, sent = np.random.default_rng(0), np.zeros((80, 70), np.float32), 0.0, 0.0
    for _ in range(6):
        change = rng.standard_normal((80, 70)).astype(np.float32)
        (update,) = bench.round(codec, {"e": {"w": model}}, {"e|w": model + change}).values()
        total, sent = total + change.astype(np.float64), sent + update.reshape(80, 70)
        model = model + update.reshape(80, 70)
        left = bench.left()["e|w"]
        np.testing.assert_allclose(sent + left, total, atol=1e-5)
        np.testing.assert_allclose(bench.result.residual_norm, np.linalg.norm(left), rtol=1e-5)


def test_bfloat16_weights_keep_what_is_smaller_than_their_last_bit(tmp_path):
    bench = Bench(tmp_path, {"e": (info("w", 600, dtype="BF16"),)})
    base = frames.narrow(np.full(600, 1.0, np.float32), "BF16")
    new = frames.narrow(np.full(600, 1.0078125, np.float32), "BF16")
    (sent,) = bench.round("int4", {"e": {"w": base}}, {"e|w": new}).values()
    np.testing.assert_allclose(sent, 0.0078125, rtol=1e-6)
    assert frames.read_header(bench.residuals)["e|w"].info.dtype == "BF16"


def test_residuals_of_experts_that_left_the_device_are_dropped(tmp_path):
    units = {key: (info("w", 64, 64), info("small", 1)) for key in "abc"}
    bench = Bench(tmp_path, units)
    rng = np.random.default_rng(1)

    def tensors(keys):
        return {key: {"w": rng.standard_normal((64, 64)).astype("f4"), "small": np.ones(1, "f4")} for key in keys}

    def flat(of):
        return {f"{key}|{name}": values for key, own in of.items() for name, values in own.items()}

    bench.round("topk3", tensors("abc"), flat(tensors("abc")))
    first = bench.left()
    assert set(first) == {"a|w", "b|w", "c|w"}, "what gains nothing is sent as it is, and leaves nothing"
    sent = bench.round("topk3", tensors("a"), flat(tensors("a")), resident={"a", "b"})
    assert sent["a|small"].dtype == np.float32
    second = bench.left()
    assert set(second) == {"a|w", "b|w"}
    np.testing.assert_array_equal(second["b|w"], first["b|w"])
    unknown = flat(tensors("a"))
    np.testing.assert_array_equal(bench.round("topk3", {}, unknown)["a|w"], unknown["a|w"])  # no base: sent whole


def test_damaged_residuals_are_named_and_dropped_and_the_round_goes_on(tmp_path):
    rng = np.random.default_rng(2)
    change = {f"{key}|w": rng.standard_normal((64, 64)).astype("f4") for key in "ab"}
    zero = {key: {"w": np.zeros((64, 64), "f4")} for key in "ab"}

    def cut(path):
        path.write_bytes(path.read_bytes()[:-7])

    def flip(path, name="a|w"):
        content = bytearray(path.read_bytes())
        content[frames.read_header(path)[name].start + 100] ^= 1
        path.write_bytes(content)

    def rename(path):
        path.write_bytes(path.read_bytes().replace(b'"a|w"', b'"c|w"', 1))

    def uncheck(path):
        frames.write_frame(path, {name: raw(values) for name, values in arrays(path).items() if name != "checksums"})

    def reshape(path):
        content = path.read_bytes().replace(b"[64,64]", b"[4096] ", 1)
        head = f"a|w F32 {[4096]}".encode()
        begin = frames.read_header(path)["a|w"].start
        sums = np.frombuffer(content[-16:], "<i8").copy()
        sums[0] = zlib.crc32(content[begin : begin + 4 * 4096], zlib.crc32(head))
        path.write_bytes(content[:-16] + sums.tobytes())

    for number, (damage, words) in enumerate(
        (
            (cut, "every tensor in {} are damaged and dropped, .*: frame describes"),
            (flip, r"1 tensors in {} are damaged and dropped, .*: a\|w does not have its checksum"),
            (rename, r"1 tensors in {} are damaged and dropped, .*: c\|w does not have its checksum"),
            (uncheck, "every tensor in {} are damaged and dropped, .*: the file has no checksums"),
            (reshape, r"1 tensors in {} are .*: a\|w is F32 of shape \[4096\], expected F32 of \[64, 64\]"),
        )
    ):
        (folder := tmp_path / str(number)).mkdir()
        bench = Bench(folder, {key: (info("w", 64, 64),) for key in "ab"})
        first = bench.round("topk", zero, change)
        damage(bench.residuals)
        file = re.escape(str(bench.residuals))
        second = bench.round("topk", zero, change)
        (line,) = bench.said
        assert re.search(words.format(file), line), line
        np.testing.assert_array_equal(second["a|w"], first["a|w"], "as without a residual")
        assert (second["b|w"] == first["b|w"]).all() == (damage in (cut, uncheck))


def test_a_factor_that_rests_keeps_its_residual(tmp_path):
    bench = Bench(tmp_path, {"e": (info("w.lora_a", 64, 64), info("w.lora_b", 64, 64))})
    rng, base, changes = np.random.default_rng(1), np.zeros((64, 64), "f4"), []
    for name in ("w.lora_b", "w.lora_a"):
        changes.append(rng.standard_normal((64, 64)).astype("f4"))
        bench.round("topk3", {"e": {"w.lora_a": base, "w.lora_b": base}}, {f"e|{name}": changes[-1]}, resident={"e"})
    left = bench.left()
    assert set(left) == {"e|w.lora_a", "e|w.lora_b"}
    bench.round("topk3", {"e": {"w.lora_a": base, "w.lora_b": base}}, {"e|w.lora_b": base}, resident={"e"})
    assert 0 < np.linalg.norm(bench.left()["e|w.lora_b"]) < np.linalg.norm(left["e|w.lora_b"])


def test_a_device_of_another_rank_keeps_the_residuals_of_what_it_still_has(tmp_path):
    bench = Bench(tmp_path, {"e": (info("w.lora_a", 64, 80), info("w.lora_b", 80, 64))})
    rng = np.random.default_rng(1)
    base = {"w.lora_a": rng.standard_normal((64, 80)).astype("f4")}
    base["w.lora_b"] = base["w.lora_a"].T.copy()
    left = {}
    for rank in (32, 16, 64):
        own = {"e|w.lora_a": base["w.lora_a"][:rank], "e|w.lora_b": base["w.lora_b"][:, :rank]}
        change = {name: rng.standard_normal(part.shape).astype("f4") for name, part in own.items()}
        sent = bench.round("topk3", {"e": base}, {name: part + change[name] for name, part in own.items()})
        for name, values in bench.left().items():
            expected = change[name] - sent[name].reshape(change[name].shape)
            if name in left:
                both = tuple(slice(min(sizes)) for sizes in zip(left[name].shape, expected.shape, strict=True))
                expected[both] += left[name][both]
            np.testing.assert_allclose(values, expected, atol=1e-5)
        left = bench.left()
    assert not bench.said


def test_rows_of_a_slice_have_residuals_of_their_own(tmp_path):
    bench = Bench(tmp_path, {"e": (info(NEURON_TABLE, 40, 32),)})
    table, name, index = np.zeros((40, 32), "f4"), f"e|{NEURON_TABLE}", f"e|{NEURON_INDEX}"
    for own in ([0, 5, 9, 30], [5, 8, 30, 31]):
        rows = np.array(own, dtype=np.int32)
        trained = {name: np.full((4, 32), 1.0, "f4") * np.arange(1, 33, dtype="f4"), index: rows}
        before = {} if bench.residuals is None else bench.left()
        base = {"e": {NEURON_TABLE: table}} if own[0] else {"e": {NEURON_TABLE: table[rows], NEURON_INDEX: rows}}
        sent = bench.round("topk", base, trained)[name].reshape(4, 32)
        left = bench.left()
        np.testing.assert_array_equal(left[index], rows)
        total = trained[name].copy()
        if before:  # rows 5 and 30 are in both
            total[0] += before[name][1]
            total[2] += before[name][3]
        np.testing.assert_allclose(sent + left[name], total, rtol=1e-6)
        assert np.count_nonzero(sent) == 2


def test_a_change_that_is_not_finite_is_named(tmp_path):
    bench = Bench(tmp_path, {"e": (info("w", 600),)})
    with pytest.raises(TrainingDiverged, match=r"e\|w changed too much to be sent"):
        bench.round("int8", {"e": {"w": np.zeros(600, "f4")}}, {"e|w": np.full(600, 3e30, "f4")})


def test_auto_takes_the_most_bits_that_the_uplink_allows():
    size, found = 400_000_000, []
    for mbit in (1000, 100, 40, 20, 8, 3, 1.8, 1, 0.1):
        codec = choose_codec("auto", size, mbit * 1e6 / 8)
        found.append(codec and codec.name)
    assert found == [None, "int8", "int8", "int4", "int2", "topk12", "topk6", "topk3", "topk"]
    assert choose_codec("auto", size, None).name == "int4", "a home uplink, until it is measured"
    assert choose_codec("auto", 1_000_000, None) is None
    assert choose_codec("none", size, 1.0) is None
    assert choose_codec("int2", 1, 1e12) is CODECS["int2"]


# --- what changed of a blob, on the way down ----------------------------------------------------------------------


@pytest.mark.parametrize("codecs", [("topk", "none"), ("int8", "topk"), ("none", "int4")], ids="-".join)
def test_only_what_changed_is_downloaded(tmp_path, codecs):
    rules = {"rounds": 3, "clients": 1, "shape": (400, 300)}
    import_run(tmp_path / "server", **rules, compression=codecs[0], download_compression=codecs[1])
    trainer = ToyTrainer()
    trainer.keeps = True
    with serving(tmp_path / "server") as server, device(server.url, tmp_path / "a", trainer) as agent:
        assert agent.run().rounds == 3
        units = agent.client.manifest("latest").units
        whole = sum(unit.size_bytes for unit in units)
        first, second, _ = (entry["bytes_down"] for entry in ledger(tmp_path / "a"))
        assert whole < first < whole + 10_000
        assert second < whole / 5, "the experts of round 1 are there, and few values have changed, or by few bits"
        seen = [done.metrics for done in status_of(server).history]
        assert "bytes_down_changes" not in seen[0]
        changes = seen[1]["bytes_down_changes"]
        assert changes < second < changes + 10_000, "the rest are messages"
        sizes = [unit.size_bytes for unit in units if unit.trainable]
        if codecs[1] == "int4":
            sizes.pop()  # two experts are alike, and one blob
        assert changes + seen[1]["bytes_down_saved"] == sum(sizes)
        old, new = (agent.client.manifest(number).units[1] for number in ("3", "4"))
        for content in (b"damaged", bytes(old.size_bytes)):
            (tmp_path / old.sha256).write_bytes(content)
            agent.client.download(new.sha256, new.size_bytes, tmp_path / new.sha256, base=tmp_path / old.sha256)
            assert hash_file(tmp_path / new.sha256) == (new.sha256, new.size_bytes)
            (tmp_path / new.sha256).unlink()


def packed(raw: bytes) -> bytes:
    """A part of a change."""
    deflated = zlib.compress(raw) if raw else b""
    return len(deflated).to_bytes(4, "little") + deflated


def test_a_change_of_a_blob_is_exact_and_bad_ones_are_refused(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.standard_normal(30_001).astype(np.float32)
    base, blob = tmp_path / "base", tmp_path / "blob"
    base.write_bytes(values.tobytes())
    for share, sparse in ((0.0, True), (0.02, True), (0.6, False)):
        changed = values + (rng.random(len(values)) < share).astype(np.float32)
        blob.write_bytes(changed.tobytes())
        change = encode_blob_change(base, blob)
        assert (change is not None) == sparse
        if change is not None:
            assert apply_blob_change(base, change) == changed.tobytes()
            assert len(change) < (0.005 + 2 * share) * values.nbytes + 100
    change = encode_blob_change(base, base)
    bomb = packed(bytes(10_000_000))
    for bad, words in (
        (packed(b"") + bomb, "has not the 7501 bytes"),
        (change[:8] + b"zz" + change[10:], "the bitmap of a blob's change cannot be read"),
        (change + b"xx", "2 bytes of values, its bitmap names 0"),
        (b"", "has not the"),
        (bomb + change[4:], "the 1 bytes of a change's steps are not those of 0 blocks"),
    ):
        with pytest.raises(MalformedMessage, match=words):
            apply_blob_change(base, bad)
    blob.write_bytes(b"x" * 10)
    assert encode_blob_change(base, blob) is None


@pytest.mark.parametrize(("dtype", "ratio"), [("F32", 10), ("BF16", 5), ("F16", 5)])
def test_steps_are_a_change_of_few_bits_also_over_two_rounds(tmp_path, dtype, ratio):
    rng, count = np.random.default_rng(0), 300_001
    values = narrow((rng.standard_normal(count) * 0.02).astype(np.float32), dtype)
    values[::1000] = narrow(np.full(1, -0.0, np.float32), dtype)
    paths = [tmp_path / str(number) for number in range(3)]
    for path in paths:
        fixed = ("I32", np.arange(7, dtype=np.int32))
        write_frame(path, {"w": (dtype, values), "index": fixed, "v": (dtype, values[:300])})
        step = rng.standard_normal(count) * np.repeat(np.exp(rng.standard_normal(301)), 1000)[:count] * 1e-3
        values = narrow((widen(values, dtype) + to_steps(step, 7)).astype(np.float32), dtype)
    size_bytes = paths[0].stat().st_size
    for first, last in ((0, 1), (1, 2), (0, 2)):
        change = encode_blob_change(paths[first], paths[last])
        assert apply_blob_change(paths[first], change) == paths[last].read_bytes()
        assert len(change) < size_bytes / ratio * (2 if last - first == 2 else 1) * 1.05
    blocks = -(-count // 256) + 2
    moving = bytes(blocks) + bytes(256 * blocks)
    for bad in (moving + b"x", moving[:-1], bytes(blocks - 1), b"\x80" * blocks + b"x", moving + bytes(9_000_000)):
        with pytest.raises(MalformedMessage, match="bytes of a change's steps are not those of"):
            apply_blob_change(paths[0], packed(bad))
    far = packed(b"\x7f" * (257 * blocks)) + packed(bytes(-(-size_bytes // 16)))
    assert len(apply_blob_change(paths[0], far)) == size_bytes, "steps to infinity do no harm"
    with pytest.raises(MalformedMessage, match="steps of a blob's change cannot be read"):
        apply_blob_change(paths[0], b"\4\0\0\0abcd")


def test_steps_are_the_nearest_multiples_of_a_power_of_two():
    values = np.random.default_rng(1).standard_normal(1000) * np.repeat([1e-6, 1e3], 500)
    for levels in (1, 3, 7, 127):
        steps = to_steps(values, levels)
        for begin in range(0, 1000, 256):
            part, own = values[begin : begin + 256], steps[begin : begin + 256]
            size = 2.0 ** np.ceil(np.log2(np.abs(part).max() / (levels + 0.5)))
            np.testing.assert_array_equal(own, np.rint(part / size) * size)
            assert np.abs(own).max() <= levels * size
    assert not to_steps(np.zeros(300), 7).any()
