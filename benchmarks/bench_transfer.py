"""Import, download and export of a checkpoint, against copying the same bytes on the same disk.

    python benchmarks/bench_transfer.py DIR --scratch FOLDER --json benchmarks/results/transfer.json

Each part is measured between two copies of the bytes that it moves, each file synced to the disk; ``ratio`` is its time
divided by their mean, and ``cpu_ratio`` the same of CPU seconds, which other processes of the machine disturb less.
CPU seconds are of all processes of a part; ``start_seconds`` of them is an empty process that loads what the part loads
(torch and transformers), whatever the size of a checkpoint. ``disk_bytes`` were read from and written to the disk.
`sync` runs before each measurement, so that none writes the pages of another. A copy does not hash; import and download
do. The download is from a real server over loopback. Needs free space of twice the checkpoint: copies are made, and
deleted, `PORTION_BYTES` at a time.
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
PORTION_BYTES = 2 << 30
TARGET = 2.0

START = {
    "import": "import edgefed.moe.checkpoint",
    "download": "import edgefed.agent.cache, edgefed.agent.transport",
    "export": "import edgefed.formats.checkpoint, edgefed.exporting",
}
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


def timed_copy(files: Sequence[Path], target: Path) -> dict:
    """Measure `copy`, without deleting what it made."""
    portions: list[list[Path]] = [[]]
    for path in files:
        if portions[-1] and sum(each.stat().st_size for each in (*portions[-1], path)) > PORTION_BYTES:
            portions.append([])
        portions[-1].append(path)
    found = []
    for portion in portions:
        found.append(timed(lambda portion=portion: copy(portion, target)))
        shutil.rmtree(target)
    disk = {way: sum(each["disk_bytes"][way] for each in found) for way in ("read", "written")}
    return {key: sum(each[key] for each in found) for key in ("seconds", "cpu_seconds")} | {"disk_bytes": disk}


def timed(run: Callable[[], object], server: int | None = None) -> dict:
    """Measure ``run``, with the CPU seconds of the process ``server``."""
    os.sync()
    before, started = usage(server), time.perf_counter()
    run()
    seconds = time.perf_counter() - started
    cpu, read, written = (now - then for now, then in zip(usage(server), before, strict=True))
    return {"seconds": seconds, "cpu_seconds": cpu, "disk_bytes": {"read": 512 * read, "written": 512 * written}}


def usage(server: int | None) -> tuple[float, int, int]:
    """CPU seconds, and blocks read from and written to the disk, of this process, its children and ``server``."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(each.ru_utime + each.ru_stime for each in used) + (server_seconds(server) if server else 0.0)
    return cpu, sum(each.ru_inblock for each in used), sum(each.ru_oublock for each in used)


def measure(
    name: str,
    files: Sequence[Path],
    scratch: Path,
    run: Callable[[], object],
    undo: Callable[[], None],
    server: int | None = None,
) -> dict:
    start = timed(command("-c", START[name]))["cpu_seconds"]
    copies = []
    for which in ("before", "after"):
        if which == "after":
            part = timed(run, server)
            undo()
        copies.append(timed_copy(files, scratch / "copy"))
    size = sum(path.stat().st_size for path in files)
    row = {"part": name, "bytes": size, "files": len(files), **part, "start_seconds": start, "copies": copies}
    for ratio, figure in (("ratio", "seconds"), ("cpu_ratio", "cpu_seconds")):
        row[ratio] = 2 * part[figure] / sum(each[figure] for each in copies)
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
            target = scratch / "downloaded"
            download = command("-c", DOWNLOAD, url, target)
            rows.append(measure("download", blobs, scratch, download, lambda: shutil.rmtree(target), server.pid))
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
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package has compiled files
    load = os.getloadavg()[0]
    rows = run_parts(options.model, options.scratch, options.parts)
    if options.json:
        result = {**provenance(), "load_average": load, "rows": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
