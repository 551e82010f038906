"""A trainer that also knows what its training is worth: the models of a run on one device's held-out text.

    first round     the global model before training, every expert, while the device waits for the others
    every round     the resident experts after the local steps (the trainer's own metric)
    end of the run  the final global model, every expert, also with the device's private part; and, if asked for, the
                    device trained alone

The whole model is streamed through the device's memory, all experts, a layer or one expert at a time, as for an
activation profile. Training alone takes as many rounds as the device took part in, from the model of its first round;
until then that model stays on its disk.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
import zlib
from pathlib import Path

import msgspec

from edgefed.disk import disk_errors, make_folder, write_durably
from edgefed.errors import EdgefedError, StateCorrupt, first_line
from edgefed.kernels.out_of_memory import is_out_of_memory
from edgefed.methods.interface import ExpertMethod
from edgefed.methods.registry import make_method
from edgefed.progress import ProgressSink, counted, format_seconds
from edgefed.protocol.comparison import FREE_DOWNLOAD_BYTES, Comparison
from edgefed.protocol.messages import Assignment, Manifest, RunConfig
from edgefed.protocol.trainer import Fetch, TrainedUpdate
from edgefed.trainer.last_round import save_last_round
from edgefed.trainer.local_trainer import LocalTrainer
from edgefed.trainer.saved_plan import PLAN_FILE

COMPARISON_FILE = "comparison.json"
"""In the device's state folder: what is known of a run's comparison so far, as `ComparisonRecord`."""
ALONE_FOLDER = "alone"


class ComparisonRecord(msgspec.Struct, kw_only=True):
    """What a device remembers for the comparison. ``train_s``: seconds of its rounds so far, downloads included."""

    run_id: str
    comparison: Comparison
    rounds: int = 0
    train_s: float = 0.0
    first: Manifest | None = None
    finished: bool = False


def load_comparison(folder: Path) -> Comparison | None:
    """The finished comparison in a device's state folder; None if there is none. Raises StateCorrupt."""
    path = folder / COMPARISON_FILE
    if not path.exists():
        return None
    try:
        record = msgspec.json.decode(path.read_bytes(), type=ComparisonRecord)
    except msgspec.DecodeError as error:
        raise StateCorrupt(f"{path} is damaged: {error}") from error
    return record.comparison if record.finished else None


class ComparingTrainer:
    """A `Trainer` around a `LocalTrainer` that compares models at the end of a run.

    Args:
        trainer: Trains the rounds.
        folder: The device's state.
        evaluation: "auto", "always" or "never" evaluate the whole global model; "auto" evaluates the one before the
            first round only if every expert is on the device's disk anyway, or few bytes are to download.
        compare_alone: Also train alone at the end.
    """

    def __init__(self, trainer: LocalTrainer, folder: Path, evaluation: str = "auto", compare_alone: bool = False):
        self.trainer = trainer
        self.num_examples, self.evaluates_global = trainer.num_examples, True
        self._path = folder / COMPARISON_FILE
        self._alone_folder = folder / ALONE_FOLDER
        self._evaluation, self._compare_alone = evaluation, compare_alone
        self._due: tuple[RunConfig, Manifest] | None = None

    def train_round(
        self,
        run: RunConfig,
        manifest: Manifest,
        assignment: Assignment,
        fetch: Fetch,
        progress: ProgressSink,
        update_path: Path,
    ) -> TrainedUpdate:
        """See `LocalTrainer.train_round`; keeps the loss of the round for the comparison."""
        method = make_method(run.method, run.method_options)
        if method.personal:
            return self.trainer.train_round(run, manifest, assignment, fetch, progress, update_path)
        record = self._load(run.run_id, manifest.server_round)
        self._due = None
        is_first = record.rounds == 0
        evaluates = is_first and record.comparison.before is None and self._evaluates_before(method, manifest)
        if evaluates and not method.exchanges:  # its own weights stay in the model from then on
            self._evaluate_before(record, run, manifest, fetch, progress)
        if self._compare_alone and is_first:
            fetch(manifest.units)
            record.first = manifest
        started = time.monotonic()
        update = self.trainer.train_round(run, manifest, assignment, fetch, progress, update_path)
        if (after := update.metrics.get("held_out_loss_after")) is not None:
            record.comparison = msgspec.structs.replace(record.comparison, device=after)
        record.rounds += 1
        record.train_s += time.monotonic() - started
        self._save(record)
        if self._compare_alone and is_first and method.profiling and not method.merging and not method.assigning:
            make_folder(self._alone_folder)
            with disk_errors(self._alone_folder):  # the same experts: no second profile
                shutil.copyfile(self._path.with_name(PLAN_FILE), self._alone_folder / PLAN_FILE)
        keep = update.keep
        if evaluates and method.exchanges:
            self._due = run, manifest
            keep |= {unit.sha256 for unit in manifest.units}
        if record.first is not None:
            keep |= {unit.sha256 for unit in record.first.units} | {file.sha256 for file in record.first.files}
        return dataclasses.replace(update, keep=keep)

    def between_rounds(self, fetch: Fetch, progress: ProgressSink) -> None:
        """See `LocalTrainer.between_rounds`; after the first round also evaluates the model before it."""
        self.trainer.between_rounds(fetch, progress)
        if self._due is not None:
            (run, manifest), self._due = self._due, None
            self._evaluate_before(self._load(run.run_id, manifest.server_round), run, manifest, fetch, progress)

    def compare(
        self, run: RunConfig, manifest: Manifest, fetch: Fetch, progress: ProgressSink, skipped: str = ""
    ) -> Comparison | None:
        """The comparison at the end of a run; None without held-out text, or where this device never trained.

        ``manifest`` is the final model; it is not evaluated if there is a reason, ``skipped``. Once it is on this
        device, `edgefed.exporting` takes it from there. Training alone needs no download: its start was kept.
        """
        record = self._load(run.run_id, manifest.server_round)
        if record.rounds == 0 or not self.trainer.corpus.held_out:
            return None
        if record.finished:
            return record.comparison
        found = msgspec.structs.replace(record.comparison, server_round=manifest.server_round, skipped=skipped)
        if not skipped:
            loss, tokens = self._evaluate(run, manifest, fetch, progress, "the final model")
            found = msgspec.structs.replace(found, global_model=loss, num_tokens=tokens)
            if self.trainer.has_private_part:
                name = "the final model with the private part"
                own, _ = self._evaluate(run, manifest, fetch, progress, name, private=True)
                found = msgspec.structs.replace(found, own=own)
            save_last_round(self._path.parent, run, manifest)
        if record.first is not None:
            found = msgspec.structs.replace(found, alone=self._train_alone(record, run, record.first, fetch, progress))
        record.comparison, record.finished, record.first = found, True, None
        self._save(record)
        return found

    # --- parts ------------------------------------------------------------------------------------------------------

    def _evaluates_before(self, method: ExpertMethod, manifest: Manifest) -> bool:
        if self._evaluation == "never" or not self.trainer.corpus.held_out:
            return False
        everything = method.profiling is not None or method.requirements.all_experts
        few = sum(unit.size_bytes for unit in manifest.units) <= FREE_DOWNLOAD_BYTES
        return everything or few or self._compare_alone or self._evaluation == "always"

    def _evaluate_before(
        self, record: ComparisonRecord, run: RunConfig, manifest: Manifest, fetch: Fetch, progress: ProgressSink
    ) -> None:
        loss, tokens = self._evaluate(run, manifest, fetch, progress, "the model before the run")
        record.comparison = msgspec.structs.replace(
            record.comparison, before=loss, before_round=manifest.server_round, num_tokens=tokens
        )
        self._save(record)

    def _evaluate(
        self, run: RunConfig, manifest: Manifest, fetch: Fetch, progress: ProgressSink, name: str, private: bool = False
    ) -> tuple[float | None, int]:
        """(loss of the whole model of ``manifest``, tokens); (None, 0) where memory does not suffice."""
        try:
            loss, tokens = self.trainer.evaluate_whole(run, manifest, fetch, progress, private=private)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            progress.message(f"{name} is not evaluated: {first_line(error)[:160] or 'out of memory'}")
            return None, 0
        return (loss, tokens) if math.isfinite(loss) else (None, 0)

    def _train_alone(
        self, record: ComparisonRecord, run: RunConfig, first: Manifest, fetch: Fetch, progress: ProgressSink
    ) -> float | None:
        """Held-out loss after as many rounds without the federation, from the model of the device's first round."""
        steps = run.training.local_steps
        progress.message(
            f"training alone for the comparison: {counted(record.rounds, 'round')} of {steps} steps as in the run, "
            f"at most {format_seconds(record.train_s)}"
        )
        make_folder(self._alone_folder)
        alone = self.trainer.sibling(self._alone_folder)
        training = msgspec.structs.replace(run.training, evaluate_every=1)  # `first` may be of a round that is not
        config = msgspec.structs.replace(run, method="local", method_options={}, pace=0.0, training=training)
        loss = None
        try:
            for number in range(1, record.rounds + 1):
                seed = zlib.crc32(f"{run.seed}/{number}".encode())
                alone.evaluates = number == record.rounds
                update = alone.train_round(
                    config, first, Assignment(server_round=number, deadline_s=None, seed=seed), fetch, progress,
                    self._alone_folder / "update",
                )  # fmt: skip
                loss = update.metrics.get("held_out_loss_after")
        except EdgefedError as error:
            progress.message(f"training alone stopped: {error}")
            return None
        return loss

    def _load(self, run_id: str, server_round: int) -> ComparisonRecord:
        """The record of a run; a new one if there is none, or one of another run."""
        try:
            record = msgspec.json.decode(self._path.read_bytes(), type=ComparisonRecord)
            if record.run_id == run_id:
                return record
        except (FileNotFoundError, msgspec.DecodeError):
            pass
        return ComparisonRecord(run_id=run_id, comparison=Comparison(server_round=server_round))

    def _save(self, record: ComparisonRecord) -> None:
        with disk_errors(self._path):
            write_durably(self._path, msgspec.json.encode(record))
