"""Import a checkpoint into a run folder, and read the models of a run.

This is the only module that uses both the model side and the aggregator's store; the aggregator itself never loads a
model. `import_model` runs in a separate process (``python -m edgefed.runs``), so the server does not load torch.
"""

from __future__ import annotations

import concurrent.futures
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from edgefed.aggregator.blobs import BlobStore
from edgefed.aggregator.creation import RawTensors, create_run
from edgefed.aggregator.repair import blob_problem
from edgefed.aggregator.rounds import RoundPolicy
from edgefed.aggregator.store import Store
from edgefed.errors import ConfigError, EdgefedError, StateCorrupt
from edgefed.hardware.memory import set_up_allocator
from edgefed.isolation.start import module_command
from edgefed.protocol.comparison import Comparison, comparisons_by_name
from edgefed.protocol.messages import (
    Manifest,
    RoundStatus,
    RunConfig,
    UnitInfo,
    decode_error,
    decode_message,
    encode_error,
)

if TYPE_CHECKING:
    from edgefed.moe.expert_reading import FrameSource

_log = logging.getLogger(__name__)

HASH_THREADS = 4


class ImportRequest(msgspec.Struct, frozen=True):
    """Input of the importing process, as JSON on its standard input."""

    source: str
    folder: str
    run: RunConfig
    policy: RoundPolicy
    personal: bool = False
    """The run shares an extractor instead of a model. The importing process cannot ask a user's own method."""
    neurons: bool = False
    """Experts are stored neuron by neuron."""


def import_in_subprocess(
    source: str, folder: Path, run: RunConfig, policy: RoundPolicy, *, personal: bool = False, neurons: bool = False
) -> None:
    """Run `import_model` or `import_extractor` in a separate process. Raises what they raise."""
    request = msgspec.json.encode(ImportRequest(source, str(folder), run, policy, personal, neurons))
    # The child reports errors on stdout. Its stderr, with warnings and progress of libraries, is inherited.
    child = subprocess.run(module_command("edgefed.runs"), input=request, stdout=subprocess.PIPE, check=False)
    if child.returncode:
        if child.stdout.startswith(b"{"):
            raise decode_error(child.stdout)
        raise EdgefedError(f"the import of {source} ended with exit status {child.returncode}")


def import_extractor(folder: Path, run: RunConfig, policy: RoundPolicy) -> None:
    """Create a run with a shared extractor: ``run.model`` is its name, ``run.seed`` draws its initial weights.

    A text extractor uses ``run.tokenizer``, whose files become part of the run. Raises ConfigError, ModelNotFound,
    StorageError.
    """
    import tempfile

    from edgefed.moe.expert_reading import raw_tensor
    from edgefed.personal.extractors import EXTRACTOR_UNIT, make_extractor

    tokenizer = vocab_size = None
    if run.tokenizer:
        from edgefed.embedded import resolve_model
        from edgefed.training.tokenizer import load_tokenizer, vocabulary_size

        tokenizer = load_tokenizer(resolve_model(run.tokenizer))
        vocab_size = vocabulary_size(tokenizer)
    extractor = make_extractor(run.model, run.seed, vocab_size=vocab_size)
    tensors = {name: raw_tensor(value) for name, value in extractor.state_dict().items()}
    unit = UnitInfo(key=EXTRACTOR_UNIT, kind="dense", trainable=True)
    with tempfile.TemporaryDirectory(prefix="edgefed-import-") as scratch:
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
        create_run(
            folder, run, policy, [(unit, tensors)], sorted(path for path in Path(scratch).iterdir() if path.is_file())
        )


def import_model(source: str, folder: Path, run: RunConfig, policy: RoundPolicy, *, neurons: bool = False) -> None:
    """Write each unit of a checkpoint, and its other files unchanged, as a new run in ``folder``.

    Reads one parameter at a time. LoRA adapters are drawn here from ``run.seed``, so that all clients start from the
    same ones. With ``neurons``, experts are stored neuron by neuron (`edgefed.moe.neurons`). Raises ModelError,
    ConfigError, StorageError.
    """
    import tempfile

    from edgefed.moe.checkpoint import Checkpoint
    from edgefed.moe.expert_reading import raw_tensor
    from edgefed.moe.loading import load_config
    from edgefed.moe.neurons import to_table
    from edgefed.training.steps import train_scope
    from edgefed.training.tokenizer import check_vocabulary, load_tokenizer

    scope = train_scope(run.training)
    load_config(source)  # report a missing checkpoint before a missing tokenizer
    tokenizer = load_tokenizer(source)
    checkpoint = Checkpoint(source, in_files=True)
    check_vocabulary(tokenizer, checkpoint.num_embeddings, source)
    if summary := checkpoint.unused_summary():
        _log.warning("%s", summary)

    def units() -> Iterator[tuple[UnitInfo, RawTensors]]:
        for unit, tensors in checkpoint.iter_units(scope, seed=run.seed):
            if neurons and unit.kind == "expert":
                tensors = to_table(checkpoint.layers[unit.layer], unit.key, tensors)
            yield unit, {name: raw_tensor(tensor) for name, tensor in tensors.items()}

    with tempfile.TemporaryDirectory(prefix="edgefed-import-") as scratch:
        config = Path(scratch) / "config.json"
        config.write_text(json.dumps(checkpoint.settings(), indent=2) + "\n", encoding="utf-8")
        files = [config, *checkpoint.other_files()]
        if not any(path.name == "tokenizer.json" for path in files) and getattr(tokenizer, "is_fast", False):
            # Clients then need no package that converts the tokenizer, such as sentencepiece.
            tokenizer.save_pretrained(Path(scratch) / "tokenizer")
            files.append(Path(scratch) / "tokenizer" / "tokenizer.json")
        create_run(folder, run, policy, units(), sorted(files, key=lambda path: path.name))


class BlobCheck:
    """Compares the blobs of a manifest with their hashes in background threads. A context.

    `start` a blob before it is read: the disk is then read once for both. Leaving the context checks the rest. It
    raises StateCorrupt, which names what is missing or damaged, also in place of an error that this explains.
    """

    def __init__(self, manifest: Manifest, blobs: BlobStore):
        items = {unit.sha256: (unit.key, unit.size_bytes) for unit in manifest.units}
        items |= {file.sha256: (file.name, file.size_bytes) for file in manifest.files}
        self.paths = {sha256: blobs.path(sha256) for sha256 in items}
        """{sha256: file} of all blobs."""
        self._items, self._round = items, manifest.server_round
        self._pool = concurrent.futures.ThreadPoolExecutor(HASH_THREADS, thread_name_prefix="check")
        self._problems: dict[str, concurrent.futures.Future[str]] = {}

    def start(self, sha256: str) -> None:
        """Check a blob in the background, once; other names are ignored."""
        if sha256 in self._items and sha256 not in self._problems:
            size_bytes = self._items[sha256][1]
            self._problems[sha256] = self._pool.submit(blob_problem, self.paths[sha256], sha256, size_bytes)

    def __enter__(self) -> BlobCheck:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            failed = kind is not None
            if failed and not (issubclass(kind or object, Exception) and self._found()):
                return
            for sha256 in self._items:
                self.start(sha256)
            bad = self._found()
        finally:
            self._pool.shutdown(cancel_futures=True)
        if bad:
            raise StateCorrupt(
                f"{len(bad)} of {len(self._items)} parts of round {self._round} are damaged on the disk: {bad[0]}",
                remedy="Serve the run: a client that has joined it sends a copy of what it still has. Or restore the "
                "state folder from a copy.",
            )

    def _found(self) -> list[str]:
        """What is wrong with the blobs that were started, in the order of the manifest."""
        done = ((self._items[sha][0], self._problems[sha].result()) for sha in self._items if sha in self._problems)
        return [f"{name!r} {problem}" for name, problem in done if problem]


class RunReader:
    """Reads the models of a run folder, also while a server uses it. A context."""

    def __init__(self, folder: Path):
        self._store = Store(folder, read_only=True)
        self._blobs = BlobStore(folder)
        self.run = self._store.run

    def __enter__(self) -> RunReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._store.close()

    @property
    def last_round(self) -> int:
        """Round whose manifest is the newest global model: the one after the last aggregation."""
        return self._store.current_round().server_round

    @property
    def oldest_round(self) -> int:
        """Oldest round whose manifest is stored."""
        return self._store.oldest_round()

    def history(self) -> tuple[RoundStatus, ...]:
        """The aggregated rounds, oldest first."""
        return self._store.history()

    def comparisons(self) -> dict[str, Comparison]:
        """What clients compared at the end of the run, by name."""
        return comparisons_by_name(self._store.clients())

    def manifest(self, server_round: int | None = None) -> Manifest:
        """Return the global model at the start of a round; None: the newest. Raises ConfigError if it is not stored."""
        wanted = self.last_round if server_round is None else server_round
        manifest = self._store.manifest(wanted)
        if manifest is None:
            raise ConfigError(
                f"round {wanted} is not stored; rounds {self.oldest_round} to {self.last_round} are",
                remedy="Serve with a larger `keep_rounds`, or 0 to keep all.",
            )
        return manifest

    def is_unchanged(self, server_round: int) -> bool:
        """Whether the model at the start of a round is the one that the run began with."""
        return not changed_before(self._store.history(), server_round, self.run)

    def paths(self, manifest: Manifest) -> dict[str, Path]:
        """Return the local file of each blob of a manifest, {sha256: path}, whose hash is checked.

        Raises StateCorrupt, which names what is missing or damaged.
        """
        with self.check(manifest) as check:
            return check.paths

    def check(self, manifest: Manifest) -> BlobCheck:
        """Return a check of the blobs of a manifest, which runs while they are read."""
        return BlobCheck(manifest, self._blobs)

    def unpack(self, manifest: Manifest, folder: Path) -> FrameSource:
        """Copy the files of a manifest (config, tokenizer) into ``folder`` and return a source of its units."""
        import shutil

        from edgefed.moe.expert_reading import FrameSource

        paths = self.paths(manifest)
        for file in manifest.files:
            shutil.copyfile(paths[file.sha256], folder / file.name)
        return FrameSource(manifest.units, paths)


def changed_before(history: Sequence[RoundStatus], server_round: int, run: RunConfig) -> bool:
    """Whether a client changed the model in a round before ``server_round``."""
    rounds = [each for each in history if each.server_round < server_round and each.updates]
    return any(each.experts_changed for each in rounds) or (bool(rounds) and run.training.experts == "none")


def main() -> int:
    """Run the import that standard input requests. Errors go to standard output as protocol error messages."""
    set_up_allocator()
    # An import allocates each tensor three times over. On huge pages, torch does that twice as fast.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    request = decode_message(sys.stdin.buffer.read(), ImportRequest)
    try:
        if request.personal:
            import_extractor(Path(request.folder), request.run, request.policy)
            return 0
        import_model(request.source, Path(request.folder), request.run, request.policy, neurons=request.neurons)
    except EdgefedError as error:
        sys.stdout.buffer.write(encode_error(error))
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
