"""`MoeModel`: a transformers Mixture-of-Experts model with only the planned experts in memory.

    model = MoeModel.skeleton(folder)                 # no weights yet
    for key in dense_and_router_keys: model.load_unit(key, tensors)
    with model.streaming(source), model.record_statistics() as recorder:
        model.module(input_ids)                       # the full model, one expert in memory at a time
    model.apply_plan(plan, source, scope)             # now only the planned experts are resident
    optimizer = AdamW(model.trainable_parameters())
    for unit, tensors in model.trained_units(): upload(unit, tensors)

Not thread-safe.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from edgefed.errors import CheckpointError, ConfigError
from edgefed.expert_records import ExpertPlan
from edgefed.moe import adapters, loading, lockstep, units
from edgefed.moe.accounting import expert_memory, expert_tensors, model_memory
from edgefed.moe.architecture import ExpertLayer, discover_layers
from edgefed.moe.attention_received import AttentionCapture
from edgefed.moe.bank import ExpertBank
from edgefed.moe.checkpoint import Checkpoint
from edgefed.moe.expert_reading import restore_layer
from edgefed.moe.expert_stream import ExpertStream
from edgefed.moe.layer_runtime import (
    IMPLEMENTATION,
    MISSING_MODES,
    LayerRuntime,
    Schedule,
    StatisticsRecorder,
    register_implementation,
    training_kernels,
)
from edgefed.moe.merged_cache import Align, MergedCache
from edgefed.moe.offloading import OffloadSpace
from edgefed.moe.slots import check_storage
from edgefed.moe.units import LORA_SUFFIX, ExpertSource, FixedTensors, TrainScope
from edgefed.protocol.messages import UnitInfo

Dtype = str | torch.dtype
Device = str | torch.device


class MoeModel:
    """A model, its MoE layers, and its resident experts. Create it with one of the class methods.

    ``module`` is the transformers model itself, to call and to train. A full model has its experts as transformers
    created them until the first `apply_plan`; a skeleton has none.
    """

    def __init__(self, module: PreTrainedModel, layers: tuple[ExpertLayer, ...], *, device: torch.device):
        self.module = module
        self.layers = layers
        self.scope = TrainScope(experts="none", router="none")
        self.plan: ExpertPlan | None = None
        self.storage: str | None = None
        """Storage format of the plan's experts that are not trainable; None: the dtype of the model."""
        self.offloads, self.streamed_layers = False, 0
        """Whether the plan's experts are in an `OffloadSpace`; layers whose frozen ones are in an `ExpertStream`."""
        self.device = device
        self._default_implementation = module.config._experts_implementation
        self._fixed = units.find_fixed_tensors(module, layers)
        self._unloaded: set[str] = set()
        self._adopts_dtype = False
        kernels = functools.partial(training_kernels, layers)
        self._runtimes = [
            LayerRuntime(layer, functools.partial(self._selection_bias, layer), kernels) for layer in layers
        ]
        for layer, runtime in zip(layers, self._runtimes, strict=True):
            vars(layer.experts)["edgefed_runtime"] = runtime

    @classmethod
    def from_checkpoint(cls, source: str | Path, dtype: Dtype = "auto", device: Device = "cpu") -> MoeModel:
        """Load a complete model from a local folder or from the hub. Raises as `Checkpoint` does."""
        module = Checkpoint(source, dtype).load()
        nn.Module.to(module, device)
        return cls(module, discover_layers(module), device=torch.device(device))

    @classmethod
    def skeleton(cls, folder: str | Path, dtype: Dtype = "auto", device: Device = "cpu") -> MoeModel:
        """Create a model without weights from a folder with a config.json. `load_unit` adds all units except experts.

        With ``dtype="auto"`` a tensor takes the dtype of the first values loaded into it. Raises ModelNotFound,
        CheckpointError (broken config.json), UnsupportedArchitecture.
        """
        return cls._without_weights(loading.load_config(folder), dtype, device)

    @classmethod
    def streamed(cls, source: str | Path) -> tuple[MoeModel, Checkpoint]:
        """Load a checkpoint except its experts, which the returned checkpoint reads as an `ExpertSource`."""
        checkpoint = Checkpoint(source)
        model = cls._without_weights(checkpoint.config, "auto", "cpu")
        for key in model._fixed:
            model.load_unit(key, checkpoint.read(key))
        checkpoint.release()
        return model, checkpoint

    @classmethod
    def _without_weights(cls, config: PretrainedConfig, dtype: Dtype, device: Device) -> MoeModel:
        module = loading.build_skeleton(config, dtype, device=device)
        model = cls(module, discover_layers(module), device=torch.device(device))
        model._unloaded = {place.full_name for unit in model._fixed.values() for place in unit.places.values()}
        model._adopts_dtype = dtype == "auto"
        model.drop_experts()
        return model

    @property
    def config(self) -> PretrainedConfig:
        """Configuration of the transformers model."""
        return self.module.config

    @property
    def experts_per_layer(self) -> tuple[int, ...]:
        """Number of experts of each MoE layer."""
        return tuple(layer.num_experts for layer in self.layers)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the experts' weights: of the resident ones, or as configured if there are none."""
        bank = self._runtimes[0].bank
        if bank is not None and bank.dtype is not None:
            return bank.dtype
        resident = expert_tensors(self.layers[:1])
        return resident[0].dtype if resident else self.layers[0].parameters[0].dtype

    def unit_infos(self, scope: TrainScope | None = None) -> list[UnitInfo]:
        """Return all units of the full model, adapters after their base. ``scope`` None: nothing is trainable."""
        return [unit for unit, _ in units.iter_units(self._fixed.values(), self.layers, scope)]

    def iter_units(
        self, scope: TrainScope | None = None, seed: int = 0
    ) -> Iterator[tuple[UnitInfo, dict[str, torch.Tensor]]]:
        """Yield all units of a full model with their tensors (views), and initial adapters drawn from ``seed``."""
        for unit, sizes in units.iter_units(self._fixed.values(), self.layers, scope):
            if sizes and scope is not None:
                yield unit, adapters.initial_adapter(unit.key, sizes, scope.lora_rank, seed)
            elif unit.kind == "expert":
                layer = self.layers[unit.layer]
                if not all(name in layer.experts._parameters for name in (p.name for p in layer.parameters)):
                    raise CheckpointError(f"the experts of {layer.experts_path!r} are not all in memory")
                yield unit, {p.name: getattr(layer.experts, p.name).detach()[unit.expert] for p in layer.parameters}
            else:
                yield unit, self._fixed[unit.key].tensors()

    def load_unit(self, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy a unit's values into the model. Raises CheckpointError if it is not resident or does not fit."""
        base, is_adapter = key.removesuffix(LORA_SUFFIX), key.endswith(LORA_SUFFIX)
        if base in self._fixed:
            if is_adapter:
                adapters.load_adapter(self._fixed[base], tensors)
            else:
                self._load_fixed(self._fixed[base], tensors)
            return
        path, _, expert = base.rpartition(".")
        for runtime in self._runtimes:
            if runtime.layer.experts_path == path and expert.isdecimal():
                if runtime.bank is None:
                    raise CheckpointError(f"expert {base!r} is not resident: no plan is applied")
                runtime.bank.load(int(expert), tensors, adapter=is_adapter)
                return
        raise CheckpointError(f"the model has no part {key!r}")

    def _load_fixed(self, unit: FixedTensors, tensors: Mapping[str, torch.Tensor]) -> None:
        names = {place.full_name for place in unit.places.values()}
        first = not names.isdisjoint(self._unloaded)
        unit.load(tensors, self.device, materialize=first, adopt_dtype=first and self._adopts_dtype)
        self._unloaded -= names

    def missing(self) -> list[str]:
        """Return the names of the dense and router tensors that are not loaded yet. Empty for a full model."""
        return sorted(self._unloaded)

    def drop_experts(self) -> None:
        """Remove every resident expert. Memory is freed when the caller's own references are gone."""
        self.plan, self.storage, self.offloads, self.streamed_layers = None, None, False, 0
        for runtime in self._runtimes:
            runtime.bank = None
            experts = runtime.layer.experts
            experts._modules.pop("edgefed_bank", None)
            for parameter in runtime.layer.parameters:
                experts._parameters.pop(parameter.name, None)
        register_implementation()
        self.module.set_experts_implementation(IMPLEMENTATION)

    def apply_plan(
        self,
        plan: ExpertPlan,
        source: ExpertSource,
        scope: TrainScope,
        missing: str = "renormalize",
        storage: str | None = None,
        align: Align | None = None,
        merged: MergedCache | None = None,
        offload: OffloadSpace | ExpertStream | None = None,
    ) -> None:
        """Make exactly the planned experts resident, with values from ``source``, and set what is trainable.

        Reads only the planned experts and the adapters in ``scope``. Experts of an earlier plan are dropped first, so
        the memory peak is one plan. Token counts start at zero.

        ``missing`` says what happens to tokens of absent experts: "renormalize" routes them to the next best resident
        experts, "skip" leaves out the contribution. ``storage`` is the format of matrices that are not trainable: None
        or one of `edgefed.moe.slots.EXPERT_STORAGES`. ``align``, ``merged`` and ``offload`` are those of `ExpertBank`.
        Raises ConfigError, CheckpointError, StorageError.
        """
        if missing not in MISSING_MODES:
            raise ConfigError(f"missing must be {' or '.join(MISSING_MODES)}; found {missing!r}")
        check_storage(storage)
        if plan.experts_per_layer != self.experts_per_layer:
            raise ConfigError(
                f"the plan does not fit the model: experts per layer are {plan.experts_per_layer} in the plan and "
                f"{self.experts_per_layer} in the model"
            )
        self.drop_experts()
        self._install_scope(scope, source)
        try:
            how = (plan, source, scope, self.device, storage, align, merged, offload)
            for runtime in self._runtimes:
                runtime.missing, runtime.bank = missing, ExpertBank(runtime.layer, *how)
                runtime.layer.experts.add_module("edgefed_bank", runtime.bank)
        except Exception:
            self.drop_experts()
            raise
        self.plan, self.storage, self.offloads = plan, storage, isinstance(offload, OffloadSpace)
        self.streamed_layers = sum(bank.stream is not None for bank in self._banks())

    def _install_scope(self, scope: TrainScope, source: ExpertSource) -> None:
        self.scope = scope
        for unit in self._fixed.values():
            mode = unit.mode(scope)
            adapters.remove_adapter(unit)
            for place in unit.places.values():
                place.get().requires_grad_(mode == "full" and place.learnable)
            if mode == "lora" and unit.matrices:
                adapters.install_adapter(unit, scope, self.device)
                adapters.load_adapter(unit, source.read(unit.key + LORA_SUFFIX), scope.lora_rank)

    @contextlib.contextmanager
    def streaming(
        self,
        source: ExpertSource,
        scope: TrainScope | None = None,
        *,
        residency: str = "expert",
        storage: str | None = None,
    ) -> Iterator[None]:
        """Within this context, compute the full model's output without gradients, with experts from ``source``.

        ``residency`` and ``storage`` say which experts are in memory at a time, in addition to those of an applied plan
        (`edgefed.moe.lockstep`). ``scope`` says which adapters exist; None: as applied last. Raises ConfigError if a
        plan with another scope is applied.
        """
        scope = scope or self.scope
        if scope != self.scope:
            if self.plan is not None:
                raise ConfigError(f"cannot stream with {scope}: a plan with {self.scope} is applied")
            self._install_scope(scope, source)
        streams = lockstep.open_streams(self.layers, source, scope, self.device, residency, storage)
        before = self.module.config._experts_implementation
        register_implementation()
        self.module.set_experts_implementation(IMPLEMENTATION)
        for runtime, stream in zip(self._runtimes, streams, strict=True):
            runtime.stream = stream
        try:
            with torch.no_grad():
                yield
        finally:
            for runtime in self._runtimes:
                runtime.stream = None
            self.module.set_experts_implementation(before)

    def restore(self, source: ExpertSource, scope: TrainScope | None = None) -> None:
        """Restore the full model from ``source``, with stacked experts and merged adapters. Raises CheckpointError."""
        scope = scope or self.scope
        self._install_scope(scope, source)
        self.drop_experts()
        for unit in self._fixed.values():
            adapters.remove_adapter(unit, merge=True)
        self.scope = TrainScope(experts="none", router="none")
        for layer in self.layers:
            restore_layer(layer, source, scope, self.device)
        self.module.set_experts_implementation(self._default_implementation)

    @contextlib.contextmanager
    def record_statistics(
        self, *, attention: bool = False, neurons: bool = False, part_tokens: int = 0, num_groups: int = 0
    ) -> Iterator[StatisticsRecorder]:
        """Collect the router's full choice and weights, absent experts included; see `StatisticsRecorder`."""
        with AttentionCapture(self.module) if attention else contextlib.nullcontext() as capture:
            recorder = StatisticsRecorder(
                self.layers, capture, neurons=neurons, part_tokens=part_tokens, num_groups=num_groups
            )
            for runtime in self._runtimes:
                runtime.recorders.append(recorder)
            try:
                yield recorder
            finally:
                for runtime in self._runtimes:
                    runtime.recorders.remove(recorder)

    @contextlib.contextmanager
    def balancing(self) -> Iterator[list[torch.Tensor]]:
        """Within this context, collect the load-balancing loss of each layer with resident experts, as scalars."""
        terms: list[torch.Tensor] = []
        for runtime in self._runtimes:
            runtime.balancing = terms
        try:
            yield terms
        finally:
            for runtime in self._runtimes:
                runtime.balancing = None

    def set_schedule(self, schedule: Schedule | None) -> None:
        """Let ``schedule(layer, batch_profile)`` choose the trainable experts that get weight gradients in a batch."""
        for runtime in self._runtimes:
            runtime.schedule = schedule

    def training_kernels(self) -> str:
        """Return which kernels train the experts of a plan, as in `StepSetup.kernels`."""
        return training_kernels(self.layers, self.dtype, str(self.device))

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return all trainable parameters, for an optimizer."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def experts_with_gradient(self) -> list[tuple[int, int]]:
        """Return (layer, expert) of each expert that the next optimizer step will change."""
        return [key for key, _ in self.expert_gradients()]

    def expert_gradients(self) -> Iterator[tuple[tuple[int, int], list[torch.Tensor]]]:
        """Yield ((layer, expert), gradients) of each expert that the next optimizer step will change."""
        for bank in self._banks():
            for expert, gradients in bank.gradients():
                yield (bank.layer.ordinal, expert), gradients

    def bank(self, layer: int) -> ExpertBank:
        """Return the resident experts of a MoE layer (its ordinal). Raises CheckpointError if no plan is applied."""
        bank = self._runtimes[layer].bank
        if bank is None:
            raise CheckpointError(f"layer {layer} has no resident experts: apply a plan")
        return bank

    def served_tokens(self) -> dict[tuple[int, int], int]:
        """Return the tokens that each resident expert has computed; a merged one counts under its first member."""
        return self._token_counts("served_tokens")

    def trained_tokens(self) -> dict[tuple[int, int], int]:
        """Return the tokens that each resident expert has computed while being trained. Synchronizes the device."""
        return self._token_counts("trained_tokens")

    def _token_counts(self, name: str) -> dict[tuple[int, int], int]:
        return {
            (bank.layer.ordinal, expert): count
            for bank in self._banks()
            for expert, count in zip(bank.experts, getattr(bank, name).tolist(), strict=True)
        }

    def _banks(self) -> Iterator[ExpertBank]:
        return (runtime.bank for runtime in self._runtimes if runtime.bank is not None)

    def trained_units(self) -> Iterator[tuple[UnitInfo, dict[str, torch.Tensor]]]:
        """Yield the current values (views) of all trained units of this device: what a client uploads."""
        for unit in self._fixed.values():
            mode, base = unit.mode(self.scope), units.fixed_unit(unit, self.scope)
            if mode == "full":
                yield base, unit.tensors()
            elif mode == "lora" and unit.matrices:
                tensors = {name: t.detach() for name, t in adapters.adapter_tensors(unit).items()}
                yield units.unit_from_tensors(base, tensors, adapter=True), tensors
        for bank in self._banks():
            for slot in range(bank.num_trainable):
                lora = self.scope.experts == "lora"
                tensors = bank.unit_tensors(slot, adapter=lora)
                base = units.expert_unit(bank.layer, bank.experts[slot], self.scope)
                yield units.unit_from_tensors(base, tensors, adapter=lora), tensors

    def expert_memory_bytes(self, optimizer: torch.optim.Optimizer | None = None) -> int:
        """Return the bytes of resident experts; see `edgefed.moe.accounting.expert_memory`."""
        return expert_memory(self.layers, optimizer).total_bytes

    def memory_bytes(self) -> dict[str, int]:
        """Count the bytes of all tensors of the model: "dense", "experts" and "gradients"."""
        return model_memory(self.module, self.layers)

    def _selection_bias(self, layer: ExpertLayer) -> torch.Tensor | None:
        if layer.selection_bias is None:
            return None
        path, _, name = layer.selection_bias.rpartition(".")
        bias: torch.Tensor = getattr(self.module.get_submodule(path), name)
        return bias.detach()
