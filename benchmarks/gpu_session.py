"""Everything that a GPU is needed for, in one command: build, proofs, speed, a profile, a round, large steps.

    python benchmarks/gpu_session.py --out session                  on a machine with a GPU: about eight minutes
    python benchmarks/gpu_session.py --out session                  again: goes on with what is not done
    python benchmarks/gpu_session.py --out session --table          only print the table
    python benchmarks/gpu_session.py --out rehearsal --rehearse     small, on the CPU: emulated CUDA, interpreted Triton

Needs torch and nothing else that is installed: ``--wheels DIR`` adds packages (transformers, msgspec, ...) from wheel
files, without a network. Every stage runs in a process of its own with a time limit, and writes each row to
OUT/rows.jsonl as it is measured; a stage that fails or hangs leaves its rows and its reason, and the next one runs. A
stage is done when its last row says so; the others run again, and skip the rows that they have. The stages are in
`gpu_stages.py`. This file imports nothing but the standard library.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
STAGES = {
    # name: seconds that it may take
    "machine": 60,
    "build": 180,
    "doctor": 60,
    "proof": 120,
    "correctness": 90,
    "sanitizer": 40,
    "speed": 110,
    "profile": 40,
    "round": 60,
    "large-step": 60,
    "pretraining": 30,
}
"""In order. On a GPU all take less together than their limits: these only end what hangs."""


def read_rows(path: Path) -> list[dict]:
    """Return the complete rows; a line that a crash has cut off is left out."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return rows


def append(path: Path, row: dict) -> None:
    """Write one row, durably; on a line of its own, even after one that a crash has cut off."""
    data = path.read_bytes() if path.exists() else b""
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if data and not data.endswith(b"\n") else "") + json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def is_done(rows: list[dict], stage: str) -> bool:
    """Whether a stage has come to its end."""
    return any(row["stage"] == stage and row.get("done") for row in rows)


def environment(options: argparse.Namespace) -> dict[str, str]:
    """Return the environment of the stages: this checkout, the wheels, and a cache of their own."""
    paths = [
        str(HERE.parent),
        *([str(options.out / "site")] if options.wheels else []),
        os.environ.get("PYTHONPATH", ""),
    ]
    found = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "EDGEFED_CACHE": str(options.out.resolve() / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    found.pop("EDGEFED_KERNELS", None)
    if options.rehearse:
        found |= {"CUDA_VISIBLE_DEVICES": "", "EDGEFED_REHEARSAL": str(options.out.resolve())}
        found |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return found


def install_wheels(wheels: Path, target: Path) -> None:
    """Unpack wheel files into a folder, without a network and without their requirements."""
    files = sorted(map(str, wheels.glob("*.whl")))
    if not files:
        raise SystemExit(f"no wheel files in {wheels}")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--upgrade", "--target"]
    subprocess.run([*command, str(target), *files], check=True)


def run_stage(stage: str, limit_s: float, options: argparse.Namespace) -> str:
    """Run a stage in a process of its own; return why it did not end well, "" if it did."""
    command = [sys.executable, str(HERE / "gpu_stages.py"), stage, "--out", str(options.out)]
    command += ["--rehearse"] if options.rehearse else []
    log = options.out / f"{stage}.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment(options), start_new_session=True
        )
        try:
            status = process.wait(timeout=limit_s)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, KeyboardInterrupt):
                raise
            return f"did not end within {limit_s:g} s"
    if status == 0:
        return ""
    lines = log.read_text(errors="replace").strip().splitlines()
    said = f": {lines[-1][:300]}" if lines else ""
    return f"ended with status {status}{said}"


def table(rows: list[dict]) -> str:
    """Return every row as a line, newest of each name last written, by stage."""
    newest: dict[tuple[str, str], dict] = {}
    for row in rows:
        if "name" in row:
            newest[row["stage"], row["name"]] = row
    lines = []
    for stage in STAGES:
        ends = [row for row in rows if row["stage"] == stage and "name" not in row]
        state = "not run" if not ends else "done" if is_done(rows, stage) else f"NOT DONE: {ends[-1].get('failed', '')}"
        seconds = f", {ends[-1]['seconds']:.0f} s" if ends and "seconds" in ends[-1] else ""
        lines.append(f"{stage} ({state}{seconds})")
        for (of, name), row in newest.items():
            if of == stage:
                lines.append(f"  {name:<44} {describe(row)}")
    return "\n".join(lines)


def describe(row: dict) -> str:
    """Return the values of a row in one line: times by implementation, then the rest."""
    parts = []
    for key, value in row.items():
        if key in ("stage", "name", "machine", "details"):
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{name} {_short(number)}" for name, number in value.items())
        parts.append(f"{key}: {_short(value)}")
    return "; ".join(parts)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the rows")
    parser.add_argument(
        "--stage", action="append", choices=STAGES, help="run only this one; may be given more than once"
    )
    parser.add_argument("--limit", type=float, default=480.0, help="seconds for the whole session")
    parser.add_argument("--wheels", type=Path, help="folder of wheel files that this machine lacks")
    parser.add_argument("--rehearse", action="store_true", help="small, on the CPU")
    parser.add_argument("--table", action="store_true", help="only print the table of the rows")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "rows.jsonl"
    if options.table:
        print(table(read_rows(path)))
        return 0
    if options.wheels:
        install_wheels(options.wheels, options.out / "site")
    started = time.monotonic()
    for stage in options.stage or STAGES:
        if is_done(read_rows(path), stage):
            continue
        left = options.limit - (time.monotonic() - started)
        if left <= 0:
            append(path, {"stage": stage, "failed": "out of time: start the session again"})
            continue
        limit = min(left, STAGES[stage] if not options.rehearse else left)
        print(f"{stage} ...", flush=True)
        begin = time.monotonic()
        problem = run_stage(stage, limit, options)
        end = {"stage": stage, "seconds": round(time.monotonic() - begin, 1)}
        append(path, {**end, "failed": problem} if problem else {**end, "done": True})
        print(f"{stage}: {problem or 'done'} after {end['seconds']} s", flush=True)
    rows = read_rows(path)
    print(table(rows))
    return 0 if all(is_done(rows, stage) for stage in options.stage or STAGES) else 1


if __name__ == "__main__":
    sys.exit(main())
