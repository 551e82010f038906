"""Codecs of changes beside zstd on the same bytes: rates of encoding and decoding, ratios, and what is lost.

    python benchmarks/bench_compression.py [--json results/compression.json]

The bytes are changes of float32 weights, 16 MiB: normal numbers whose scale differs from column to column, as between
neurons. Rates are of these bytes, in MB per second of processor time of one thread, the best of five passes that are
taken in turns; a line of 1 Gbit/s carries 125 MB/s. zstd needs the package zstandard, and keeps all bits.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from provenance import provenance

from edgefed.kernels.compression import CODECS, decode, decode_reference, encode, encode_reference, native_library

ROWS, COLUMNS = 2048, 2048
PASSES = 5


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


def measure() -> list[dict]:
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
    rows = measure()
    for row in rows:
        print(
            f"{row['codec']:8} {row['backend']:10} {row['ratio']:6.1f}x  encode {row['encode_mb_per_s']:8.1f} MB/s  "
            f"decode {row['decode_mb_per_s']:8.1f} MB/s  lost {row['lost']:.4f} of the squared norm"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows, "provenance": provenance()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
