"""Codecs of changes beside zstd on the same bytes: rates of encoding and decoding, ratios, and what is lost.

    python benchmarks/bench_compression.py [--json results/compression.json]

The bytes are changes of float32 weights, 16 MiB: normal numbers whose scale differs from column to column, as between
neurons. Rates are of these bytes, in MB per second of processor time of one thread, the best of five passes that are
taken in turns; a line of 1 Gbit/s carries 125 MB/s. zstd needs the package zstandard, and keeps all bits.

The rows "down" are of changes of blobs: weights that moved by the steps of ``--download-compression``, as the server
finds them in two versions and the device applies them, with numpy. What is lost is what the steps leave for later.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from provenance import provenance

from edgefed.kernels.compression import CODECS, decode, decode_reference, encode, encode_reference, native_library
from edgefed.protocol.changes import apply_blob_change, encode_blob_change, to_steps
from edgefed.protocol.frames import write_frame

ROWS, COLUMNS = 2048, 2048
PASSES = 5
DOWNLOADS = {"int8": 127, "int4": 7, "int3": 3}
"""Levels of the steps (`edgefed.protocol.changes`)."""


def changes() -> np.ndarray:
    """(ROWS * COLUMNS,) float32."""
    rng = np.random.default_rng(0)
    scales = np.exp(rng.standard_normal(COLUMNS)) * 1e-4
    return (rng.standard_normal((ROWS, COLUMNS)) * scales).astype(np.float32).reshape(-1)


def best_seconds(works: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Least processor time of each work, taken in turns."""
    found: dict[str, float] = {}
    for _ in range(PASSES):
        for name, work in works.items():
            begin = time.thread_time()
            work()
            found[name] = min(found.get(name, 1e9), time.thread_time() - begin)
    return found


def measure(folder: Path) -> list[dict]:
    """``folder`` takes two versions of a blob for each setting of downloads."""
    values, rows = changes(), []
    size, out, norm = values.nbytes, np.empty_like(values), float(values @ values)
    backends = {"numpy": (encode_reference, decode_reference)}
    if native_library() is not None:
        backends["native"] = (encode, decode)
    works: dict[str, Callable[[], object]] = {}
    for name, codec in CODECS.items():
        raw = encode(codec, values)
        for backend, (forth, back) in backends.items():
            works[f"{name} {backend} encode"] = lambda forth=forth, codec=codec: forth(codec, values)
            works[f"{name} {backend} decode"] = lambda back=back, codec=codec, raw=raw: back(codec, raw, out)
        decode(codec, raw, out)
        left = values - out
        row = {"codec": name, "ratio": size / raw.nbytes, "lost": float(left @ left) / norm}
        rows += [{**row, "backend": backend} for backend in backends]
    weights = np.random.default_rng(1).standard_normal(len(values)).astype(np.float32) * 0.02
    for name, levels in DOWNLOADS.items():
        steps = to_steps(values.astype(np.float64), levels)
        base, blob = folder / f"{name}.base", folder / f"{name}.blob"
        for path, array in ((base, weights), (blob, (weights + steps).astype(np.float32))):
            write_frame(path, {"w": ("F32", array)})
        change = encode_blob_change(base, blob)
        assert change is not None, "steps are a change of few bits"
        works[f"{name} down encode"] = lambda base=base, blob=blob: encode_blob_change(base, blob)
        works[f"{name} down decode"] = lambda base=base, change=change: apply_blob_change(base, change)
        left = values - steps
        rows.append({"codec": name, "ratio": size / len(change), "lost": float(left @ left) / norm, "backend": "down"})
    try:
        import zstandard
    except ModuleNotFoundError:
        print("zstandard is not installed: no row of zstd")
    else:
        for level in (1, 3):
            press, bytes_in = zstandard.ZstdCompressor(level=level), values.tobytes()
            packed = press.compress(bytes_in)
            works[f"zstd-{level} zstandard encode"] = lambda press=press, data=bytes_in: press.compress(data)
            expand = zstandard.ZstdDecompressor()
            works[f"zstd-{level} zstandard decode"] = lambda expand=expand, packed=packed: expand.decompress(packed)
            rows.append({"codec": f"zstd-{level}", "ratio": size / len(packed), "lost": 0.0, "backend": "zstandard"})
    seconds = best_seconds(works)
    for row in rows:
        for what in ("encode", "decode"):
            row[f"{what}_mb_per_s"] = round(size / 1e6 / seconds[f"{row['codec']} {row['backend']} {what}"], 1)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder))
    for row in rows:
        print(
            f"{row['codec']:8} {row['backend']:10} {row['ratio']:6.1f}x  encode {row['encode_mb_per_s']:8.1f} MB/s  "
            f"decode {row['decode_mb_per_s']:8.1f} MB/s  lost {row['lost']:.4f} of the squared norm"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows, "provenance": provenance()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
