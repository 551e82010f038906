"""The trainer of a FedMoE client: its own model and the shared extractor in one mixture, of which only theta leaves.

theta of the round -> own model, gate and momentum of before -> local epochs -> kept on disk -> theta is the update
"""

from __future__ import annotations

import math
import zlib
from pathlib import Path

import numpy as np
import torch

from edgefed.disk import disk_errors
from edgefed.errors import ConfigError, EdgefedError, OutOfMemory, TrainingDiverged
from edgefed.hardware.memory import process_peak_rss_bytes
from edgefed.interrupt import StopRequested
from edgefed.methods.interface import PersonalMethod
from edgefed.methods.registry import make_method
from edgefed.moe.expert_reading import FrameSource, raw_array
from edgefed.personal.batches import num_batches
from edgefed.personal.extractors import EXTRACTOR_UNIT
from edgefed.personal.gate import Gate
from edgefed.personal.guided_loss import check_guided, guided_loss
from edgefed.personal.local_training import Evaluation, Rates, evaluate, make_optimizer, train_epochs
from edgefed.personal.mixture import LocalMixture
from edgefed.personal.models import fault_of_users_code
from edgefed.personal.state import PersonalState
from edgefed.personal.tasks import OpenTask, PersonalTask
from edgefed.progress import ProgressSink
from edgefed.protocol import frames
from edgefed.protocol.messages import Assignment, Manifest, RunConfig
from edgefed.protocol.trainer import Fetch, TrainedUpdate
from edgefed.training.out_of_memory import device_lost, is_device_lost, is_out_of_memory


class PersonalTrainer:
    """Implements `edgefed.protocol.trainer.Trainer`. One per process; not thread-safe. ``folder``: the agent's state."""

    def __init__(self, task: PersonalTask, folder: Path, *, device: str = "cpu"):
        self.num_examples = task.num_examples
        self._task = task
        self._folder = folder
        self._device = device
        self._run_id: str | None = None
        self._open: OpenTask
        self._mixture: LocalMixture
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
        """One round: theta in, local epochs, theta out. What is not theta stays in the agent's folder.

        Raises ConfigError when the run is not FedMoE's or does not fit the task, TrainingDiverged, OutOfMemory,
        DeviceLost, ModelError (code of the user's model fails), StateCorrupt.
        """
        method = make_method(run.method, run.method_options)
        if not method.personal:
            raise ConfigError(
                f"the run at this server is {run.method!r}: its clients train a shared language model",
                remedy="Leave `task` and `model` out, and pass text as `data`.",
            )
        blobs = fetch([*manifest.files, *manifest.units])
        if self._run_id != run.run_id:
            self._begin(run, method, {file.name: blobs[file.sha256] for file in manifest.files}, progress)
        source = FrameSource(manifest.units, blobs)
        self._mixture.shared.load_state_dict(source.read(EXTRACTOR_UNIT))
        rates = Rates(method.extractor_lr, method.model_lr, method.gate_lr, method.momentum, method.weight_decay)
        optimizer = make_optimizer(self._mixture.groups(), rates)
        begun = self._state.restore(self._mixture, optimizer, assignment.server_round) > 0
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
            if (fault := fault_of_users_code(self._task.model, error)) is not None:
                raise fault from error
            raise
        self._write_theta(manifest, update_path)
        self._state.save(self._mixture, optimizer, assignment.server_round)
        return TrainedUpdate(
            experts=(),
            metrics=_metrics(loss, before, after),
            num_examples=len(self._open.train),  # of text to be continued: blocks of equal length, not records
            num_tokens=len(self._open.train) * method.local_epochs,
            keep=frozenset(file.sha256 for file in manifest.files),
        )

    def between_rounds(self, fetch: Fetch, progress: ProgressSink) -> None:
        """Nothing can be done ahead: the next round begins with a theta that is not there yet."""

    def _begin(self, run: RunConfig, method: PersonalMethod, files: dict[str, Path], progress: ProgressSink) -> None:
        """Put the mixture of a run together, with first weights that depend on the device and its data alone."""
        progress.phase("load")
        self._open = self._task.open(run.model, files, run.seed, run.training.sequence_length)
        check_guided(method, self._open.train.classes)
        for note in self._open.notes:
            progress.message(note)
        identity = zlib.crc32(self._task.identity.encode())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(identity)
            gate = Gate(self._open.shared.gate_in, method.gate_width, method.gate_norm)
            self._mixture = LocalMixture(self._open.shared, self._open.own, gate).to(self._device)
        facts = {
            "extractor": run.model, "model": self._task.model, "classes": "\n".join(self._task.classes),
            "gate": f"{method.gate_width} {method.gate_norm}",
        }  # fmt: skip
        self._state = PersonalState(self._folder, run.run_id, facts)
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
        with torch.random.fork_rng(devices=[]):  # dropout of the client's own model, say
            torch.manual_seed(int(rng.integers(2**31)))
            progress.phase("evaluate")
            before = evaluate(self._mixture, held_out, self._device)
            loss_of = guided_loss(method, self._mixture, train, begun=begun, device=self._device)
            progress.phase("train", method.local_epochs * num_batches(len(train), method.batch_size), "step")
            loss = train_epochs(
                self._mixture, train, optimizer, epochs=method.local_epochs, batch_size=method.batch_size, rng=rng,
                device=self._device, on_step=lambda: progress.advance(1), loss_of=loss_of,
            )  # fmt: skip
            progress.phase("evaluate")
            return loss, before, evaluate(self._mixture, held_out, self._device)

    def _write_theta(self, manifest: Manifest, path: Path) -> None:
        """Only the tensors that the manifest names: what else the mixture holds has no name there."""
        values = self._mixture.shared.state_dict()
        tensors = {}
        for unit in manifest.units:
            for info in unit.tensors:
                value = values[info.name]
                if not torch.isfinite(value).all():
                    raise TrainingDiverged(f"{info.name} of the shared extractor holds a value that is not finite")
                tensors[frames.update_name(unit.key, info.name)] = (info.dtype, raw_array(value))
        with disk_errors(path):
            frames.write_frame(path, tensors)


def _metrics(loss: float, before: Evaluation, after: Evaluation) -> dict[str, float]:
    """Plain numbers for the ledger; no example, class or weight can be told from them."""
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
