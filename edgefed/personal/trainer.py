"""The trainer of a FedMoE client: it trains its own model and the shared extractor in one mixture and uploads theta.

theta of the round -> own model, gate and momentum from disk -> local epochs -> saved to disk -> theta is the update
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from edgefed.disk import disk_errors
from edgefed.errors import ConfigError, EdgefedError, OutOfMemory, TrainingDiverged, first_line
from edgefed.hardware.memory import process_peak_rss_bytes
from edgefed.kernels.out_of_memory import device_lost, is_device_lost, is_out_of_memory
from edgefed.methods.interface import PersonalMethod
from edgefed.methods.registry import make_method
from edgefed.moe.expert_reading import FrameSource, raw_array
from edgefed.personal.extractors import EXTRACTOR_UNIT
from edgefed.personal.local_training import (
    Evaluation,
    Rates,
    check_guided,
    evaluate,
    guided_loss,
    make_optimizer,
    train_epochs,
)
from edgefed.personal.mixture import Alone, Gate, LocalMixture
from edgefed.personal.models import user_model_error
from edgefed.personal.samples import num_batches
from edgefed.personal.state import PersonalState
from edgefed.personal.tasks import OpenTask, PersonalTask
from edgefed.progress import ProgressSink, StopRequested, counted
from edgefed.protocol import frames
from edgefed.protocol.comparison import Comparison
from edgefed.protocol.messages import Assignment, Manifest, RunConfig
from edgefed.protocol.trainer import Fetch, TrainedUpdate


class PersonalTrainer:
    """A `edgefed.protocol.trainer.Trainer`; one per process, not thread-safe. ``folder`` is the agent's state.

    Attributes:
        num_examples: training examples of the task.
        mixture: the client's model, the shared extractor and the gate; exists from the first round on.

    """

    def __init__(
        self,
        task: PersonalTask,
        folder: Path,
        *,
        device: str = "cpu",
        untrained: Callable[[], PersonalTask] | None = None,
        compare_alone: bool = False,
    ):
        """``untrained`` makes the task again, with the own model as it was before training; for the comparison.

        ``compare_alone``: also train it alone at the end.
        """
        self.num_examples, self.evaluates_global = task.num_examples, False
        self._untrained, self._compare_alone = untrained, compare_alone
        self._task = task
        self._folder = folder
        self._device = device
        self._run_id: str | None = None
        self._open: OpenTask
        self.mixture: LocalMixture
        self._state: PersonalState

    def train_round(
        self,
        run: RunConfig,
        manifest: Manifest,
        assignment: Assignment,
        fetch: Fetch,
        progress: ProgressSink,
        update_path: Path,
    ) -> TrainedUpdate:
        """Train one round and write theta to ``update_path``; everything else stays in the agent's folder.

        Raises:
            ConfigError: the run trains a shared language model, or does not fit the task.
            ModelError: the user's model fails.
            OutOfMemory, DeviceLost, TrainingDiverged, StateCorrupt: as named.
        """
        method = make_method(run.method, run.method_options)
        if not method.personal:
            raise ConfigError(
                f"the method of this run is {run.method!r}: its clients train a shared language model",
                remedy="Leave `task` and `model` out, and pass text as `data`.",
            )
        blobs = fetch([*manifest.files, *manifest.units])
        if self._run_id != run.run_id:
            self._begin(run, method, {file.name: blobs[file.sha256] for file in manifest.files}, progress)
        source = FrameSource(manifest.units, blobs)
        self.mixture.shared.load_state_dict(source.read(EXTRACTOR_UNIT))
        optimizer = make_optimizer(self.mixture.groups(), rates_of(method))
        begun = self._state.restore(self.mixture, optimizer, assignment.server_round) > 0
        try:
            loss, before, after = self._train(method, assignment, optimizer, progress, begun)
        except (EdgefedError, StopRequested):
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise OutOfMemory(
                    f"a batch of {method.batch_size} examples does not fit this device's memory",
                    remedy="Use a smaller model, or serve with a smaller batch_size among the method's options.",
                ) from error
            if is_device_lost(error):
                raise device_lost(error, self._device) from error
            if (failure := user_model_error(self._task.model, error)) is not None:
                raise failure from error
            raise
        self._write_theta(manifest, update_path)
        self._state.save(self.mixture, optimizer, assignment.server_round)
        return TrainedUpdate(
            experts=(),
            metrics=_metrics(loss, before, after),
            num_examples=len(self._open.train),  # for next-token prediction, blocks of equal length
            num_tokens=len(self._open.train) * method.local_epochs,
            keep=frozenset(file.sha256 for file in manifest.files),
        )

    def compare(
        self, run: RunConfig, manifest: Manifest, fetch: Fetch, progress: ProgressSink, skipped: str = ""
    ) -> Comparison | None:
        """Compare the mixture with this device's own model before training and, if asked for, trained alone.

        The final theta is not evaluated: it is only a part of a mixture. None before the first round, and without
        held-out examples.
        """
        method = make_method(run.method, run.method_options)
        if not method.personal or self._untrained is None:
            return None
        blobs = fetch(manifest.files)
        files = {file.name: blobs[file.sha256] for file in manifest.files}
        if self._run_id != run.run_id:
            self._begin(run, method, files, progress)
        rounds, held_out = self._state.load_newest(self.mixture), self._open.held_out
        if not rounds or not len(held_out):
            return None
        found = {"device": evaluate(self.mixture, held_out, self._device)}
        own = self._untrained().open(run.model, files, run.seed, run.training.sequence_length).own
        alone = Alone(own).to(self._device)
        found["before"] = evaluate(alone, held_out, self._device)
        if self._compare_alone:
            try:
                self._train_alone(alone, method, run.seed, rounds, progress)
                found["alone"] = evaluate(alone, held_out, self._device)
            except Exception as error:
                known = isinstance(error, EdgefedError) or is_out_of_memory(error)
                if not known and user_model_error(self._task.model, error) is None:
                    raise
                progress.message(f"training alone stopped: {first_line(error)}")
        losses = {name: each.loss for name, each in found.items() if math.isfinite(each.loss)}
        return Comparison(
            server_round=manifest.server_round, num_tokens=len(held_out), before=losses.get("before"),
            device=losses.get("device"), alone=losses.get("alone"),
            accuracies={name: each.accuracy for name, each in found.items()},
        )  # fmt: skip

    def between_rounds(self, fetch: Fetch, progress: ProgressSink) -> None:
        """Do nothing: the next round starts from a theta that does not exist yet."""

    def _begin(self, run: RunConfig, method: PersonalMethod, files: dict[str, Path], progress: ProgressSink) -> None:
        """Build the mixture of a run, with initial weights that depend only on the device and its data."""
        progress.phase("load")
        self._open = self._task.open(run.model, files, run.seed, run.training.sequence_length)
        check_guided(method, self._open.train.classes)
        for note in self._open.notes:
            progress.message(note)
        identity = zlib.crc32(self._task.identity.encode())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(identity)
            gate = Gate(self._open.shared.gate_in, method.gate_width, method.gate_norm)
            self.mixture = LocalMixture(self._open.shared, self._open.own, gate).to(self._device)
        facts = {
            "extractor": run.model, "model": self._task.model, "classes": "\n".join(self._task.classes),
            "gate": f"{method.gate_width} {method.gate_norm}", "task": self._task.kind,
            "length": str(run.training.sequence_length),
        }  # fmt: skip
        self._state = PersonalState(self._folder, run.run_id, facts)
        self._state.keep_files(files)
        self._run_id = run.run_id

    def _train(
        self,
        method: PersonalMethod,
        assignment: Assignment,
        optimizer: torch.optim.Optimizer,
        progress: ProgressSink,
        begun: bool,
    ) -> tuple[float, Evaluation, Evaluation]:
        train, held_out = self._open.train, self._open.held_out
        rng = np.random.default_rng([assignment.seed, zlib.crc32(self._task.identity.encode())])
        with torch.random.fork_rng(devices=[]):  # for dropout in the client's own model
            torch.manual_seed(int(rng.integers(2**31)))
            progress.phase("evaluate")
            before = evaluate(self.mixture, held_out, self._device)
            loss_of = guided_loss(method, self.mixture, train, begun=begun, device=self._device)
            progress.phase("train", method.local_epochs * num_batches(len(train), method.batch_size), "step")
            loss = train_epochs(
                self.mixture, train, optimizer, epochs=method.local_epochs, batch_size=method.batch_size, rng=rng,
                device=self._device, on_step=lambda: progress.advance(1), loss_of=loss_of,
            )  # fmt: skip
            progress.phase("evaluate")
            return loss, before, evaluate(self.mixture, held_out, self._device)

    def _train_alone(
        self, alone: Alone, method: PersonalMethod, seed: int, rounds: int, progress: ProgressSink
    ) -> None:
        """Train the own model for as many epochs as the mixture, with the same rates, on the same examples."""
        train, epochs = self._open.train, rounds * method.local_epochs
        progress.message(f"training alone for the comparison: {counted(epochs, 'epoch')}, as in the run")
        trainable = [parameter for parameter in alone.parameters() if parameter.requires_grad]
        optimizer = make_optimizer({"model": trainable}, rates_of(method))
        rng = np.random.default_rng([seed, zlib.crc32(self._task.identity.encode())])
        with torch.random.fork_rng(devices=[]):  # for dropout
            torch.manual_seed(int(rng.integers(2**31)))
            progress.phase("train", epochs * num_batches(len(train), method.batch_size), "step")
            train_epochs(
                alone, train, optimizer, epochs=epochs, batch_size=method.batch_size, rng=rng, device=self._device,
                on_step=lambda: progress.advance(1),
            )  # fmt: skip

    def _write_theta(self, manifest: Manifest, path: Path) -> None:
        """Write the tensors that the manifest lists; the rest of the mixture is not in it."""
        values = self.mixture.shared.state_dict()
        tensors = {}
        for unit in manifest.units:
            for info in unit.tensors:
                value = values[info.name]
                if not torch.isfinite(value).all():
                    raise TrainingDiverged(f"tensor {info.name} of the shared extractor has a value that is not finite")
                tensors[frames.update_name(unit.key, info.name)] = (info.dtype, raw_array(value))
        with disk_errors(path):
            frames.write_frame(path, tensors)


def rates_of(method: PersonalMethod) -> Rates:
    """The settings of a method's SGD."""
    return Rates(method.extractor_lr, method.model_lr, method.gate_lr, method.momentum, method.weight_decay)


def _metrics(loss: float, before: Evaluation, after: Evaluation) -> dict[str, float]:
    """Numbers for the ledger; they reveal no example, class or weight."""
    shared = after.gate_weights[:, 0]
    metrics = {
        "train_loss": loss,
        "held_out_loss_before": before.loss,
        "held_out_loss_after": after.loss,
        "held_out_accuracy_before": before.accuracy,
        "held_out_accuracy_after": after.accuracy,
        "shared_extractor_share": float(shared.mean()) if len(shared) else math.nan,
        "peak_rss_bytes": float(process_peak_rss_bytes()),
    }
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
