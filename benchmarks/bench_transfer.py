"""Import, download and export of a checkpoint, against copying the same bytes on the same disk.

    python benchmarks/bench_transfer.py DIR --scratch FOLDER --json benchmarks/results/transfer.json

Each part is measured between two copies of the bytes that it moves, each file synced to the disk; ``ratio`` is its time
divided by their mean. `sync` runs before each measurement, so that none writes the pages of another. A copy does not
hash; import and download do. The download is from a real server over loopback. CPU seconds are of all processes of
the part. Needs free space of twice the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from provenance import provenance

PARTS = ("import", "download", "export")
CHUNK = 1 << 20
TARGET = 2.0

DOWNLOAD = """
import sys
from pathlib import Path
from edgefed.agent.cache import BlobCache
from edgefed.agent.transport import AggregatorClient
with AggregatorClient(sys.argv[1]) as client:
    manifest = client.manifest()
    BlobCache(Path(sys.argv[2]), client).ensure((*manifest.units, *manifest.files))
"""


def copy(files: Sequence[Path], target: Path) -> None:
    """Copy files under new names and sync each."""
    target.mkdir()
    for number, path in enumerate(files):
        with path.open("rb") as source, (target / str(number)).open("wb") as sink:
            shutil.copyfileobj(source, sink, CHUNK)
            sink.flush()
            os.fsync(sink.fileno())


def timed(run: Callable[[], object]) -> dict:
    os.sync()
    before, started = cpu_seconds(), time.perf_counter()
    run()
    return {"seconds": time.perf_counter() - started, "cpu_seconds": cpu_seconds() - before}


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def measure(
    name: str, files: Sequence[Path], scratch: Path, run: Callable[[], object], undo: Callable[[], None]
) -> dict:
    copies = []
    for which in ("before", "after"):
        if which == "after":
            part = timed(run)
            undo()
        copies.append(timed(lambda: copy(files, scratch / "copy")))
        shutil.rmtree(scratch / "copy")
    size = sum(path.stat().st_size for path in files)
    mean = sum(each["seconds"] for each in copies) / 2
    row = {"part": name, "bytes": size, "files": len(files), **part, "copies": copies, "ratio": part["seconds"] / mean}
    row["within_target"] = row["ratio"] <= TARGET
    print(json.dumps(row), flush=True)
    return row


def command(*arguments: object) -> Callable[[], object]:
    return lambda: subprocess.run([sys.executable, *map(str, arguments)], check=True)


def serve(run_folder: Path, scratch: Path) -> tuple[subprocess.Popen, str]:
    ready = scratch / "address"
    ready.unlink(missing_ok=True)
    flags = ["serve", "--state", run_folder, "--port", "0", "--ready-file", ready]
    with (scratch / "server.log").open("wb") as log:
        server = subprocess.Popen([sys.executable, "-m", "edgefed", *map(str, flags)], stdout=log, stderr=log)
    while not ready.exists():
        if server.poll() is not None:
            raise SystemExit((scratch / "server.log").read_text())
        time.sleep(0.1)
    return server, json.loads(ready.read_text())["url"]


def server_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def run_parts(model: Path, scratch: Path, parts: Sequence[str]) -> list[dict]:
    from edgefed.aggregator.rounds import RoundPolicy
    from edgefed.protocol.messages import RunConfig, TrainingConfig
    from edgefed.runs import import_in_subprocess

    run_folder, rows = scratch / "run", []
    run = RunConfig(
        run_id="transfer", model=str(model), method="hfedmoe", method_options={}, rounds=1, seed=0,
        training=TrainingConfig(),
    )  # fmt: skip

    def import_checkpoint() -> None:
        import_in_subprocess(str(model), run_folder, run, RoundPolicy(rounds=1, min_clients=1))

    weights = sorted(path for path in model.iterdir() if path.is_file())
    if "import" in parts:
        rows.append(measure("import", weights, scratch, import_checkpoint, lambda: None))
    elif not run_folder.exists():
        import_checkpoint()
    blobs = sorted(path for path in (run_folder / "blobs").glob("[0-9a-f][0-9a-f]/*"))
    if "download" in parts:
        server, url = serve(run_folder, scratch)
        try:
            used = server_seconds(server.pid)
            target = scratch / "downloaded"
            download = command("-c", DOWNLOAD, url, target)
            rows.append(measure("download", blobs, scratch, download, lambda: shutil.rmtree(target)))
            rows[-1]["server_cpu_seconds"] = server_seconds(server.pid) - used
        finally:
            server.terminate()
            server.wait(timeout=60)
    if "export" in parts:
        target = scratch / "exported"
        export = command("-m", "edgefed", "export", "--state", run_folder, "--to", "hf", target)
        rows.append(measure("export", weights, scratch, export, lambda: shutil.rmtree(target)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a checkpoint folder")
    parser.add_argument("--scratch", type=Path, required=True, help="an empty folder on the disk to measure")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.scratch.mkdir(parents=True, exist_ok=True)
    load = os.getloadavg()[0]
    rows = run_parts(options.model, options.scratch, options.parts)
    if options.json:
        result = {**provenance(), "load_average": load, "rows": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
