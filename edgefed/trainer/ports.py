"""What a trainer needs to know of its device, as three protocols, and their implementations for a device of its own.

    Memory      how much memory the model may use: measured, given, or that of a simulated device
    StepCosts   how much memory a training step takes: the formulas of `edgefed.costs`, or those of another model
    ModelHost   which model serves: one of this process, or one that a simulation shares among its devices

`LocalTrainer` and `Planner` take them as arguments; tests and `edgefed.simulation` pass others.
"""

from __future__ import annotations

import functools
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from edgefed.costs.memory import MemoryEstimate, training_memory
from edgefed.costs.shapes import ModelShape
from edgefed.costs.step_setup import Correction, StepSetup
from edgefed.costs.streaming import StreamRates
from edgefed.disk import MEMORY_FILESYSTEMS, disk_errors, filesystem, make_folder
from edgefed.errors import ConfigError, MalformedMessage, first_line
from edgefed.expert_records import ExpertPlan
from edgefed.hardware.budget import MemoryBudget
from edgefed.hardware.memory import available_memory_bytes, process_rss_bytes
from edgefed.hardware.watch import PressureWatch
from edgefed.methods.interface import ExpertMethod
from edgefed.moe.expert_reading import FrameSource
from edgefed.moe.model import MoeModel
from edgefed.moe.units import LORA_SUFFIX
from edgefed.progress import ProgressSink
from edgefed.protocol.limits import check_model_config, check_tokenizer
from edgefed.protocol.messages import Manifest, RunConfig, UnitInfo
from edgefed.protocol.trainer import Fetch
from edgefed.trainer.stream_rates import measure_stream_rates
from edgefed.training.tokenizer import load_tokenizer


class Memory(Protocol):
    """The memory of a device."""

    @property
    def watch(self) -> PressureWatch | None:
        """Observes memory pressure while steps are made; None without observation."""

    def usable_bytes(self) -> int:
        """Bytes that the model may use now. Raises ConfigError when that is unknown."""

    def model_is_empty(self) -> None:
        """The model exists, without weights, and the data is encoded: what the process holds now is not the model's."""


class StepCosts(Protocol):
    """The memory model of a device."""

    measures_steps: bool
    """Measure the first training step of a run, to correct the estimates."""
    offloads: bool
    """Experts can really be offloaded here, where the method asks for it."""
    stream_rates: Callable[[StepSetup, int, int], StreamRates] | None
    """(setup, bytes of streamed experts, bytes of memory that the model has) -> rates of this device; raises
    StorageError. None: frozen experts cannot be streamed here (`edgefed.moe.expert_stream`)."""

    def estimate(
        self,
        shape: ModelShape,
        setup: StepSetup,
        resident: Sequence[int],
        trainable: Sequence[int],
        correction: Correction | None,
        *,
        offloading: bool,
        slice_shares: Sequence[float] = (),
    ) -> MemoryEstimate:
        """Peak memory of a training step with ``resident`` and ``trainable`` experts per MoE layer of ``shape``.

        ``correction`` is from a measured step of this run; ``offloading``: the method offloads what does not fit.
        ``slice_shares``: of their neurons that the resident experts of each layer have; () for whole experts.
        """

    def step_seconds(self, setup: StepSetup, plan: ExpertPlan) -> float | None:
        """Seconds of a training step under ``plan`` where they are computed; None: they are measured."""

    def profile_storage(
        self,
        requested: str,
        setup: StepSetup,
        num_blocks: int,
        usable_bytes: int,
        *,
        attention: bool,
    ) -> str:
        """How an activation profile stores experts, one of `activation_profile.PROFILE_STORAGES`.

        ``requested`` is the owner's choice; the profile takes ``num_blocks`` blocks of text at a time.
        """


class ModelHost(Protocol):
    """Provides the model that rounds train."""

    @property
    def model(self) -> MoeModel | None:
        """The model; None before the first `open`."""

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the model."""

    def open(
        self, run: RunConfig, method: ExpertMethod, manifest: Manifest, fetch: Fetch, progress: ProgressSink
    ) -> MoeModel:
        """The model for a round, as this device left it after its last one.

        Raises MalformedMessage on a manifest with impossible file names, ModelError, StorageError.
        """

    def load_shared(self, units: Iterable[UnitInfo], fetch: Fetch) -> FrameSource:
        """Load the dense tensors and routers among ``units`` that have changed, and return a source that reads them.

        Adapters only become readable: the model takes them when a plan is applied.
        """

    def close(self, method: ExpertMethod, units: Mapping[str, UnitInfo]) -> None:
        """The round of ``units`` is over, its update written."""


class FixedMemory:
    """``usable_bytes`` for the model, whatever else the process holds."""

    watch: PressureWatch | None = None

    def __init__(self, usable_bytes: int):
        self._usable_bytes = usable_bytes

    def usable_bytes(self) -> int:
        """The bytes given."""
        return self._usable_bytes

    def model_is_empty(self) -> None:
        """Nothing to note."""


class ProcessMemory:
    """The memory of this process on ``device``, as torch names it.

    ``budget`` is a number of bytes, or measures the budget anew before each round. On a CPU a budget covers the whole
    process; what Python, libraries and the data take is subtracted.
    """

    def __init__(
        self, budget: int | Callable[[], MemoryBudget], device: str = "cpu", watch: PressureWatch | None = None
    ):
        self._budget, self._device, self.watch = budget, device, watch
        self._own_bytes = 0

    def model_is_empty(self) -> None:
        """Note what the process holds beside the model."""
        self._own_bytes = process_rss_bytes()

    def usable_bytes(self) -> int:
        """Bytes that the model may use now. Raises ConfigError when they cannot be measured."""
        if isinstance(self._budget, int):
            budget_bytes = self._budget
        else:
            budget = self._budget()
            if budget.now_bytes is None:
                raise ConfigError(
                    f"how much memory training may use is unknown: {budget.origin}", remedy="Set `memory`, e.g. 4GiB."
                )
            budget_bytes = budget.now_bytes
        return budget_bytes - (self._own_bytes if torch.device(self._device).type == "cpu" else 0)


class FormulaCosts:
    """The formulas of `edgefed.costs`, corrected by a measured step unless ``measures_steps`` is False.

    ``stream_folder`` is where experts for torch's ``device`` would be streamed from; None: nothing is streamed.
    """

    offloads = True

    def __init__(self, *, measures_steps: bool = True, stream_folder: Path | None = None, device: str = "cpu"):
        self.measures_steps = measures_steps
        self.stream_rates: Callable[[StepSetup, int, int], StreamRates] | None = None
        if stream_folder is not None and _can_stream(stream_folder, device):
            self.stream_rates = functools.partial(_stream_rates, stream_folder, device)

    def estimate(
        self,
        shape: ModelShape,
        setup: StepSetup,
        resident: Sequence[int],
        trainable: Sequence[int],
        correction: Correction | None,
        *,
        offloading: bool,
        slice_shares: Sequence[float] = (),
    ) -> MemoryEstimate:
        """See `StepCosts`; whether a step offloads is in its ``setup``."""
        shape = shape.sliced(slice_shares) if slice_shares else shape
        measured = self.measures_steps and correction is None
        return training_memory(shape, setup, resident, trainable, correction, measured=measured)

    def step_seconds(self, setup: StepSetup, plan: ExpertPlan) -> float | None:
        """Steps are measured."""
        return None

    def profile_storage(
        self,
        requested: str,
        setup: StepSetup,
        num_blocks: int,
        usable_bytes: int,
        *,
        attention: bool,
    ) -> str:
        """The owner's choice."""
        return requested


def _can_stream(folder: Path, device: str) -> bool:
    """On a CPU it takes Linux, which releases mapped pages at once, and a folder that is on a disk."""
    if torch.device(device).type != "cpu":
        return True
    return sys.platform == "linux" and filesystem(folder) not in MEMORY_FILESYSTEMS


def _stream_rates(folder: Path, device: str, setup: StepSetup, stream_bytes: int, own_bytes: int) -> StreamRates:
    """Measured, once; what the system has room for is read from its page cache."""
    cached = stream_bytes + own_bytes <= available_memory_bytes()
    return measure_stream_rates(folder, device, setup.dtype, cached=cached)


class OwnModel:
    """The model of this process. It stays loaded between rounds; its files are kept in ``folder``."""

    def __init__(self, folder: Path, device: str = "cpu"):
        self._folder, self._device = folder, device
        self.model: MoeModel | None = None
        self.tokenizer: Any = None
        self._loaded: dict[str, str] = {}

    def open(
        self, run: RunConfig, method: ExpertMethod, manifest: Manifest, fetch: Fetch, progress: ProgressSink
    ) -> MoeModel:
        """The model, built from the run's files the first time."""
        if self.model is None:
            copy_model_files(manifest, fetch, self._folder)
            check_model_files(manifest, self._folder)
            progress.phase("prepare")
            self.model = MoeModel.skeleton(self._folder, device=self._device)
            self.tokenizer = load_tokenizer(self._folder)
        return self.model

    def load_shared(self, units: Iterable[UnitInfo], fetch: Fetch) -> FrameSource:
        """See `ModelHost`."""
        assert self.model is not None, "the model has been opened"
        return load_shared_units(self.model, self._loaded, units, fetch)

    def close(self, method: ExpertMethod, units: Mapping[str, UnitInfo]) -> None:
        """Nothing to do: the model stays as it is."""


def copy_model_files(manifest: Manifest, fetch: Fetch, folder: Path) -> None:
    """Download the files of a run (config.json, tokenizer.json, ...) and copy them to ``folder`` under their names.

    Raises MalformedMessage on a name with a folder in it, StorageError.
    """
    make_folder(folder)
    paths = fetch(manifest.files)
    for file in manifest.files:
        if Path(file.name).name != file.name:  # it could write anywhere
            raise MalformedMessage(f"the manifest names a file {file.name[:80]!r}, expected a bare file name")
        with disk_errors(folder):
            shutil.copyfile(paths[file.sha256], folder / file.name)


def check_model_files(manifest: Manifest, folder: Path) -> None:
    """Check what config.json and tokenizer.json make this device allocate and compute. Raises MalformedMessage."""
    found = {}
    for name in ("config.json", "tokenizer.json"):
        if (folder / name).is_file():
            try:
                found[name] = json.loads((folder / name).read_bytes())
            except (ValueError, RecursionError) as error:
                raise MalformedMessage(f"{name} of the server is not JSON: {first_line(error)}") from error
            if not isinstance(found[name], dict):
                raise MalformedMessage(f"{name} of the server is not a JSON object")
    check_model_config(found.get("config.json", {}), manifest)
    check_tokenizer(found.get("tokenizer.json", {}))


def load_shared_units(model: MoeModel, loaded: dict[str, str], units: Iterable[UnitInfo], fetch: Fetch) -> FrameSource:
    """Load the dense tensors and routers that differ from ``loaded``, {unit key: hash}, and update it."""
    changed = [unit for unit in units if unit.kind != "expert" and loaded.get(unit.key) != unit.sha256]
    source = FrameSource(changed, fetch(changed))
    for unit in changed:
        if unit.key.endswith(LORA_SUFFIX):
            continue
        model.load_unit(unit.key, source.read(unit.key))
        if not unit.trainable:  # a trainable unit differs from the global one after the first step
            loaded[unit.key] = unit.sha256
    return source
