"""`MoeModel`: a transformers Mixture-of-Experts model of which a device holds only the experts that it planned.

    model = MoeModel.skeleton(folder)                 # no weights yet
    for key in dense_and_router_keys: model.load_unit(key, tensors)
    with model.streaming(source), model.record_statistics() as recorder:
        model.module(input_ids)                       # the full model, one expert in memory at a time
    model.apply_plan(plan, source, scope)             # now only the planned experts are here
    optimizer = AdamW(model.trainable_parameters())
    ...
    for unit, tensors in model.trained_units(): upload(unit, tensors)

Not safe for use by several threads at once.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from edgefed.errors import CheckpointError, ConfigError
from edgefed.expert_records import ExpertPlan
from edgefed.moe import adapters, loading, units
from edgefed.moe import lockstep as full_layers
from edgefed.moe.accounting import expert_memory, expert_tensors, model_memory
from edgefed.moe.architecture import ExpertLayer, discover_layers
from edgefed.moe.attention_received import AttentionCapture
from edgefed.moe.bank import ExpertBank
from edgefed.moe.expert_reading import restore_layer
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
from edgefed.moe.packed import check_storage
from edgefed.moe.units import LORA_SUFFIX, ExpertSource, FixedTensors, TrainScope
from edgefed.protocol.messages import UnitInfo


class MoeModel:
    """A model, its MoE layers, and which of its experts are on this device. Make it by one of the classmethods.

    ``module`` is the transformers model itself: call it, train it. Full models hold their experts as transformers
    made them until the first `apply_plan`; skeletons hold none.
    """

    def __init__(self, module: PreTrainedModel, layers: tuple[ExpertLayer, ...], *, device: torch.device):
        self.module = module
        self.layers = layers
        self.scope = TrainScope(experts="none", router="none")
        self.plan: ExpertPlan | None = None
        self.storage: str | None = None
        """How the experts of the plan that do not learn are kept; None: the way they come."""
        self.offloads = False
        """The experts of the plan lie in an `OffloadSpace`."""
        self._device = device
        self._default_implementation = module.config._experts_implementation
        self._fixed = units.find_fixed_tensors(module, layers)
        self._unloaded: set[str] = set()
        self._adopts_dtype = False
        kernels = functools.partial(training_kernels, layers)
        self._runtimes = [
            LayerRuntime(layer, lambda layer=layer: self._selection_bias(layer), kernels) for layer in layers
        ]
        for layer, runtime in zip(layers, self._runtimes, strict=True):
            layer.experts.edgefed_runtime = runtime

    @classmethod
    def from_checkpoint(
        cls, source: str | Path, dtype: str | torch.dtype = "auto", device: str | torch.device = "cpu"
    ) -> MoeModel:
        """A complete model from a local folder or a name on the hub.

        Raises ModelNotFound, CheckpointError (weights missing or broken), UnsupportedArchitecture.
        """
        module = loading.load_full(source, dtype).to(device)
        return cls(module, discover_layers(module), device=torch.device(device))

    @classmethod
    def skeleton(
        cls, folder: str | Path, dtype: str | torch.dtype = "auto", device: str | torch.device = "cpu"
    ) -> MoeModel:
        """A model without weights from a folder with a config.json; `load_unit` brings what is not an expert.

        ``dtype="auto"``: a tensor takes the dtype of the unit that is loaded first; otherwise units must have it.
        Raises ModelNotFound, CheckpointError (broken config.json), UnsupportedArchitecture.
        """
        module = loading.build_skeleton(loading.load_config(folder), dtype)
        for owner in module.modules():
            for name, buffer in owner._buffers.items():
                owner._buffers[name] = None if buffer is None else buffer.to(device)
        model = cls(module, discover_layers(module), device=torch.device(device))
        model._unloaded = {place.full_name for unit in model._fixed.values() for place in unit.places.values()}
        model._adopts_dtype = dtype == "auto"
        model.drop_experts()
        return model

    @property
    def config(self) -> PretrainedConfig:
        return self.module.config

    @property
    def experts_per_layer(self) -> tuple[int, ...]:
        return tuple(layer.num_experts for layer in self.layers)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the experts' weights: as they are on the device, or as the configuration says before that."""
        bank = self._runtimes[0].bank
        if bank is not None and bank.dtype is not None:
            return bank.dtype
        held = expert_tensors(self.layers[:1])
        return held[0].dtype if held else self.layers[0].parameters[0].dtype

    # --- units ---------------------------------------------------------------------------------------------------

    def unit_infos(self, scope: TrainScope | None = None) -> list[UnitInfo]:
        """All units of the full model, adapters after their base; ``trainable`` as ``scope`` says (None: nothing)."""
        found = []
        for base, sizes in units.iter_base_units(self._fixed.values(), self.layers, scope):
            found.append(base)
            if sizes:
                found.append(units.adapter_unit(base, sizes, scope.lora_rank))
        return found

    def iter_units(
        self, scope: TrainScope | None = None, seed: int = 0
    ) -> Iterator[tuple[UnitInfo, dict[str, torch.Tensor]]]:
        """All units of a full model with their tensors (views, no copies), and first adapters from ``seed``.

        Raises CheckpointError on a model that does not hold all its experts as transformers made them.
        """
        for base, sizes in units.iter_base_units(self._fixed.values(), self.layers, scope):
            if base.kind == "expert":
                layer = self.layers[base.layer]
                if not all(name in layer.experts._parameters for name in (p.name for p in layer.parameters)):
                    raise CheckpointError(f"the experts of {layer.experts_path!r} are not all in this model")
                yield base, {p.name: getattr(layer.experts, p.name).detach()[base.expert] for p in layer.parameters}
            else:
                yield base, self._fixed[base.key].tensors()
            if sizes:
                adapter = units.adapter_unit(base, sizes, scope.lora_rank)
                yield adapter, adapters.initial_adapter(adapter.key, sizes, scope.lora_rank, seed)

    def load_unit(self, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy a unit's values into the model: dense, router, a resident expert, or an adapter that is installed.

        Raises CheckpointError when the unit is unknown or not on this device, or when its tensors do not fit.
        """
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
                    raise CheckpointError(f"expert {base!r} is not on this device: no plan is applied")
                runtime.bank.load(int(expert), tensors, adapter=is_adapter)
                return
        raise CheckpointError(f"the model has no unit {key!r}")

    def _load_fixed(self, unit: FixedTensors, tensors: Mapping[str, torch.Tensor]) -> None:
        names = {place.full_name for place in unit.places.values()}
        first = not names.isdisjoint(self._unloaded)
        unit.load(tensors, self._device, materialize=first, adopt_dtype=first and self._adopts_dtype)
        self._unloaded -= names

    def missing(self) -> list[str]:
        """Names of the dense and router tensors that no `load_unit` has brought yet. Empty for a full model."""
        return sorted(self._unloaded)

    # --- experts -------------------------------------------------------------------------------------------------

    def drop_experts(self) -> None:
        """Forget every expert on the device: its memory is free once the caller's own references are gone."""
        self.plan, self.storage, self.offloads = None, None, False
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
        offload: OffloadSpace | None = None,
    ) -> None:
        """Make exactly the planned experts resident, with fresh values from ``source``, and set what trains.

        Reads only planned experts and the adapters that ``scope`` names. Whatever was resident before is dropped
        first, so the peak is one plan. Token counts start at zero. ``missing``: what a token gets whose expert is
        absent: "renormalize" gives it the next best resident ones, "skip" leaves it out. ``storage``: how matrices that
        do not learn are kept, None or one of `edgefed.moe.packed.EXPERT_STORAGES`. ``align`` is `merge_experts`'s.
        ``merged``, ``offload``: see `ExpertBank`. Raises ConfigError, CheckpointError, StorageError.
        """
        if missing not in MISSING_MODES:
            raise ConfigError(f"missing can be {' or '.join(MISSING_MODES)}; asked for {missing!r}")
        check_storage(storage)
        if plan.experts_per_layer != self.experts_per_layer:
            raise ConfigError(
                f"the plan is for layers with {plan.experts_per_layer} experts, the model has {self.experts_per_layer}"
            )
        self.drop_experts()
        self._install_scope(scope, source)
        try:
            for runtime in self._runtimes:
                runtime.missing = missing
                runtime.bank = ExpertBank(
                    runtime.layer, plan, source, scope, self._device, storage, align, merged, offload
                )
                runtime.layer.experts.add_module("edgefed_bank", runtime.bank)
        except Exception:
            self.drop_experts()  # half a plan is none
            raise
        self.plan, self.storage, self.offloads = plan, storage, offload is not None

    def _install_scope(self, scope: TrainScope, source: ExpertSource) -> None:
        self.scope = scope
        for unit in self._fixed.values():
            mode = unit.mode(scope)
            adapters.remove_adapter(unit)
            for place in unit.places.values():
                place.get().requires_grad_(mode == "full" and place.learnable)
            if mode == "lora" and unit.matrices:
                adapters.install_adapter(unit, scope, self._device)
                adapters.load_adapter(unit, source.read(unit.key + LORA_SUFFIX))

    @contextlib.contextmanager
    def streaming(
        self,
        source: ExpertSource,
        scope: TrainScope | None = None,
        *,
        hold: str = "expert",
        storage: str | None = None,
    ) -> Iterator[None]:
        """Within it the model computes the full model's output, without gradients, with experts from ``source``.

        It needs the memory of the dense part and of what it holds at a time (`edgefed.moe.lockstep`): one expert,
        one layer or all, quantised if ``storage`` says so; and of a plan that is applied as well (see `drop_experts`).
        ``scope`` says which adapters exist; None: as applied last. Raises ConfigError when a plan with another scope
        is applied.
        """
        scope = scope or self.scope
        if scope != self.scope:
            if self.plan is not None:
                raise ConfigError(f"a plan with {self.scope} is applied: the model cannot stream as {scope} beside it")
            self._install_scope(scope, source)
        streams = full_layers.open_streams(self.layers, source, scope, self._device, hold, storage)
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
        """Make the full model again from ``source``: every expert resident as transformers wants it, adapters merged,
        default implementation. Then ``module.save_pretrained`` writes an ordinary checkpoint. Raises CheckpointError.
        """
        scope = scope or self.scope
        self._install_scope(scope, source)
        self.drop_experts()
        for unit in self._fixed.values():
            adapters.remove_adapter(unit, merge=True)
        self.scope = TrainScope(experts="none", router="none")
        for layer in self.layers:
            restore_layer(layer, source, scope, self._device)
        self.module.set_experts_implementation(self._default_implementation)

    # --- training ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def record_statistics(self, *, attention: bool = False) -> Iterator[StatisticsRecorder]:
        """Collect router statistics over all experts, absent ones too: the router's full choice and its weights.

        ``attention``: also the attention that tokens receive (`edgefed.moe.attention_received`); slower.
        """
        with AttentionCapture(self.module) if attention else contextlib.nullcontext() as capture:
            recorder = StatisticsRecorder(self.layers, capture)
            for runtime in self._runtimes:
                runtime.recorders.append(recorder)
            try:
                yield recorder
            finally:
                for runtime in self._runtimes:
                    runtime.recorders.remove(recorder)

    def set_schedule(self, schedule: Schedule | None) -> None:
        """Let ``schedule(layer, batch_record)`` choose which trainable experts get weight gradients in each training
        batch; the others are used as they are. It does not touch gradients through the experts to what lies below.
        """
        for runtime in self._runtimes:
            runtime.schedule = schedule

    def training_kernels(self) -> str:
        """What a planned model trains its experts with here and now, as `StepSetup.kernels` has it."""
        return training_kernels(self.layers, self.dtype, self._device.type)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Everything that an optimizer should get."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def experts_with_gradient(self) -> list[tuple[int, int]]:
        """(layer, expert) of each trainable expert that the next optimizer step will change."""
        return [key for key, _ in self.expert_gradients()]

    def expert_gradients(self) -> Iterator[tuple[tuple[int, int], list[torch.Tensor]]]:
        """((layer, expert), gradients) of each trainable expert that the next optimizer step will change."""
        for runtime in self._banked():
            for expert, gradients in runtime.bank.gradients():
                yield (runtime.layer.ordinal, expert), gradients

    def bank(self, layer: int) -> ExpertBank:
        """The experts of a MoE layer (its ordinal) under the plan. Raises CheckpointError without one."""
        bank = self._runtimes[layer].bank
        if bank is None:
            raise CheckpointError(f"layer {layer} holds no experts of a plan: apply one")
        return bank

    def served_tokens(self) -> dict[tuple[int, int], int]:
        """Tokens that each resident expert has computed since the plan was applied; a merged one is named by its first
        member. Synchronises with the device.
        """
        return self._token_counts("served_tokens")

    def trained_tokens(self) -> dict[tuple[int, int], int]:
        """Tokens that each resident expert has computed while it was being trained. Synchronises with the device."""
        return self._token_counts("trained_tokens")

    def _token_counts(self, name: str) -> dict[tuple[int, int], int]:
        return {
            (runtime.layer.ordinal, expert): count
            for runtime in self._banked()
            for expert, count in zip(runtime.bank.experts, getattr(runtime.bank, name).tolist(), strict=True)
        }

    def _banked(self) -> Iterable[LayerRuntime]:
        return (runtime for runtime in self._runtimes if runtime.bank is not None)

    def trained_units(self) -> Iterator[tuple[UnitInfo, dict[str, torch.Tensor]]]:
        """Current values (views) of everything on this device that trains: what a client uploads."""
        for unit in self._fixed.values():
            mode, base = unit.mode(self.scope), units.fixed_unit(unit, self.scope)
            if mode == "full":
                yield base, unit.tensors()
            elif mode == "lora" and unit.matrices:
                tensors = {name: t.detach() for name, t in adapters.adapter_tensors(unit).items()}
                yield units.unit_from_tensors(base, tensors, adapter=True), tensors
        for runtime in self._banked():
            for slot in range(runtime.bank.num_trainable):
                lora = self.scope.experts == "lora"
                tensors = {n: t.detach() for n, t in runtime.bank.tensors(slot, adapter=lora).items()}
                base = units.expert_unit(runtime.layer, runtime.bank.experts[slot], self.scope)
                yield units.unit_from_tensors(base, tensors, adapter=lora), tensors

    def expert_memory_bytes(self, optimizer: torch.optim.Optimizer | None = None) -> int:
        """Bytes that experts take on the device now; `edgefed.moe.accounting.expert_memory` says of what."""
        return expert_memory(self.layers, optimizer).total_bytes

    def memory_bytes(self) -> dict[str, int]:
        """Bytes of all tensors of the model now, counted: "dense", "experts" and "gradients"."""
        return model_memory(self.module, self.layers)

    def _selection_bias(self, layer: ExpertLayer) -> torch.Tensor | None:
        if layer.selection_bias is None:
            return None
        path, _, name = layer.selection_bias.rpartition(".")
        return getattr(self.module.get_submodule(path), name).detach()
