"""Registers, spills and shared memory of every Triton kernel by target device. Needs triton, but no GPU.

    python benchmarks/report_triton_resources.py --save          # all of it, into results/triton_resources.json
    python benchmarks/report_triton_resources.py --only "87:grouped_matmul nf4"   # what starts like this, to stdout

Says whether a kernel can be launched without spilling, not how fast it is.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "kernels"))
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


def compile_row(job: tuple[int, str, tuple[int, ...] | None]) -> dict:
    """One row of the table: a variant by its label, for one capability."""
    import triton_resources

    capability, label, tile = job
    variant = next(v for v in triton_resources.all_variants(capability) if v.label == label)
    if tile is not None:
        constants = variant.constants | dict(zip(("BM", "BN", "BK"), tile[:3], strict=True))
        variant = dataclasses.replace(variant, constants=constants, warps=tile[3], stages=tile[4])
    resources = variant.compile(capability)
    limit = triton_resources.SHARED_LIMIT[capability]
    fits = resources.stack == 0 and resources.local == 0 and resources.shared <= limit
    return {
        "capability": capability,
        "label": label,
        "warps": variant.warps,
        "stages": variant.stages,
        **dataclasses.asdict(resources),
        "shared_limit": limit,
        "has_products": variant.has_products,
        "fits": fits and (resources.tensor_core_instructions > 0 or not variant.has_products),
    }


def jobs(only: list[str] | None, tile: tuple[int, ...] | None) -> list[tuple]:
    """(capability, label, tile) of everything, or of the first variant that starts like each of ``only``."""
    import triton_resources

    variants = {c: [v.label for v in triton_resources.all_variants(c)] for c in triton_resources.SHARED_LIMIT}
    if only is None:
        return [(capability, label, tile) for capability, labels in variants.items() for label in labels]
    found = []
    for requested in only:
        capability, _, start = requested.partition(":")
        matches = [label for label in variants.get(int(capability), []) if label.startswith(start)]
        if not matches:
            raise SystemExit(f"no kernel for sm_{capability} is called {start!r}")
        found.append((int(capability), matches[0], tile))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="CC:LABEL", help="the first kernel that starts like this, each")
    parser.add_argument("--tile", help="compile with this tile instead: rows,columns,depth,warps,stages")
    parser.add_argument("--save", action="store_true", help="write results/triton_resources.json")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET=1 replaces the compiler: unset it")
    import triton
    from provenance import provenance

    tile = tuple(int(part) for part in arguments.tile.split(",")) if arguments.tile else None
    wanted = jobs(arguments.only, tile)
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    with concurrent.futures.ProcessPoolExecutor(min(workers, len(wanted))) as pool:
        rows = list(pool.map(compile_row, wanted))
    table = {"provenance": provenance() | {"triton": triton.__version__}, "rows": rows}
    if arguments.save:
        path = Path(__file__).parent / "results" / "triton_resources.json"
        head = json.dumps(table["provenance"], indent=1)
        lines = ",\n".join("  " + json.dumps(row) for row in rows)
        path.write_text('{"provenance": ' + head + ',\n "rows": [\n' + lines + "\n]}\n")
        misfits = [f"sm_{row['capability']} {row['label']}" for row in rows if not row["fits"]]
        print(f"{len(rows)} rows in {path}; {len(misfits)} do not fit: {', '.join(misfits) or '-'}")
    else:
        json.dump(table, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
