"""One MoE layer during a forward pass: the experts function that transformers calls.

`LayerRuntime` has the state of a layer: its expert bank or stream, what happens to tokens of absent experts, which
experts are trained in this batch, and the statistics recorders. A hook stores the router's logits until the experts of
the same layer have run.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import nn
from transformers.activations import ACT2CLS
from transformers.integrations.moe import ExpertsInterface

from edgefed.expert_records import ActivationProfile, LayerProfile
from edgefed.kernels import ops as _operators  # noqa: F401  registers torch.ops.edgefed
from edgefed.kernels.dispatch import log_choice
from edgefed.kernels.masked_experts import Slots, backend_for, masked_experts
from edgefed.kernels.router_statistics import new_statistics, router_statistics, to_layer_profile
from edgefed.moe.architecture import ExpertLayer, ExpertsModule, expert_activation, expert_finish
from edgefed.moe.attention_received import AttentionCapture
from edgefed.moe.bank import ExpertBank
from edgefed.moe.gate_probe import gate_probabilities, route_to_resident, router_logits_of, split_expert_arguments
from edgefed.moe.slots import StackSlots

IMPLEMENTATION = "edgefed"
MISSING_MODES = ("renormalize", "skip")

Schedule = Callable[[int, LayerProfile], Iterable[int]]
"""(layer ordinal, profile of this batch) -> expert ids that get weight gradients in this batch."""


class StatisticsRecorder:
    """Collects router statistics since the last `take`.

    With ``attention``, also the attention that tokens receive; with ``neurons``, also the energies of neurons, while
    all experts are streamed. With ``part_tokens``, statistics are kept apart for every so many tokens of a pass, for
    `take_parts`; with ``num_groups`` for groups of batches instead, to which these are dealt in turn, for `groups`:
    energies are too large to be kept for each part.
    """

    def __init__(
        self,
        layers: tuple[ExpertLayer, ...],
        attention: AttentionCapture | None = None,
        *,
        neurons: bool = False,
        part_tokens: int = 0,
        num_groups: int = 0,
    ):
        self.attention = attention
        self.neurons = neurons
        self._layers = layers
        self._part_tokens = part_tokens
        self._num_groups = num_groups
        self._parts: dict[int, list[_Part]] = {}
        self._energies: dict[int, list[torch.Tensor]] = {}
        self._added: collections.Counter[int] = collections.Counter()
        self._measured: collections.Counter[int] = collections.Counter()

    def add(self, layer: int, logits: torch.Tensor, kind: str, indices: torch.Tensor, weights: torch.Tensor) -> None:
        """Add one batch of a layer: router logits (T, E) of a gate ``kind``, its full choice and its weights (T, K)."""
        num_tokens, num_experts = logits.shape
        received = None
        if self.attention is not None:
            received = self.attention.of(self._layers[layer].experts_path, num_tokens, logits.device)  # (T,)
        parts = self._parts.setdefault(layer, [])
        size = self._part_tokens or max(1, num_tokens)
        group = self._added[layer] % max(1, self._num_groups)
        self._added[layer] += 1
        for start in range(0, num_tokens, size):
            if self._part_tokens or group == len(parts):
                parts.append(_Part(new_statistics(num_experts, logits.device, attention=received is not None)))
            part, rows = parts[-1 if self._part_tokens else group], slice(start, start + size)
            router_statistics(
                part.sums, logits[rows], indices[rows], weights[rows], kind=kind,
                received=None if received is None else received[rows],
            )  # fmt: skip
            part.num_tokens += len(logits[rows])

    def energies(self, layer: int, device: torch.device) -> torch.Tensor:
        """Return the accumulator (E, I) float32 of the neuron energies of a layer's next batch."""
        found = self._energies.setdefault(layer, [])
        group = self._measured[layer] % max(1, self._num_groups)
        self._measured[layer] += 1
        if group == len(found):
            shape = self._layers[layer].num_experts, self._layers[layer].num_neurons
            found.append(torch.zeros(shape, dtype=torch.float32, device=device))
        return found[group]

    def take(self) -> ActivationProfile:
        """Return the profile so far and start again from zero. This is the only host synchronization."""
        taken, self._parts = self._parts, {}
        energies, self._energies = self._energies, {}
        profiles = []
        for layer in self._layers:
            parts = (part.profile() for part in taken.get(layer.ordinal, []))
            profile = functools.reduce(operator.add, parts, self._empty(layer))
            if self.neurons:
                found = energies.get(layer.ordinal) or [torch.zeros(layer.num_experts, layer.num_neurons)]
                profile = _with_energy(profile, found[0])
            profiles.append(profile)
        return ActivationProfile(tuple(profiles))

    def take_parts(self) -> list[ActivationProfile]:
        """Return the profile of each part so far, in their order and without energies, and start again."""
        taken, self._parts = self._parts, {}
        rows = [[part.profile() for part in taken.get(layer.ordinal, [])] for layer in self._layers]
        return [ActivationProfile(layers) for layers in zip(*rows, strict=True)]

    def groups(self) -> list[ActivationProfile]:
        """Return the profile of each group so far, and go on. Energies are in float32, and valid until then."""
        rows = []
        for layer in self._layers:
            pairs = zip(self._parts.get(layer.ordinal, []), self._energies.get(layer.ordinal, []), strict=True)
            rows.append([_with_energy(part.profile(), energy, torch.float32) for part, energy in pairs])
        return [ActivationProfile(layers) for layers in zip(*rows, strict=True)]

    def _empty(self, layer: ExpertLayer) -> LayerProfile:
        return _Part(new_statistics(layer.num_experts, attention=self.attention is not None)).profile()


def _with_energy(profile: LayerProfile, energy: torch.Tensor, dtype: torch.dtype = torch.float64) -> LayerProfile:
    return dataclasses.replace(profile, neuron_energy=energy.to(device="cpu", dtype=dtype).numpy())


@dataclasses.dataclass
class _Part:
    """Router statistics of a layer over ``num_tokens`` tokens."""

    sums: torch.Tensor
    num_tokens: int = 0

    def profile(self) -> LayerProfile:
        return to_layer_profile(self.sums, self.num_tokens)


class LayerRuntime:
    """The state of one MoE layer between and during forward passes.

    ``kernels(dtype, device)`` returns which kernels train the experts, like `training_kernels`.
    """

    def __init__(
        self,
        layer: ExpertLayer,
        selection_bias: Callable[[], torch.Tensor | None],
        kernels: Callable[[torch.dtype, str], str],
    ):
        self.layer = layer
        self._kernels = kernels
        self.bank: ExpertBank | None = None
        self.stream: Callable[[], Slots] | None = None
        self.missing = "renormalize"
        self.schedule: Schedule | None = None
        self.recorders: list[StatisticsRecorder] = []
        self.balancing: list[torch.Tensor] | None = None
        self._selection_bias = selection_bias
        self._logits: torch.Tensor | None = None
        self._scheduled: frozenset[int] | None = None
        layer.router.register_forward_hook(self._store_logits)
        layer.experts.register_forward_pre_hook(self._record, with_kwargs=True)
        layer.experts.register_forward_hook(self._drop_logits)

    def _store_logits(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        logits = router_logits_of(output)
        self._logits = logits.reshape(-1, logits.shape[-1])  # (T, E)

    def _drop_logits(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        self._logits = None

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        schedule = self._active_schedule(module)
        if self._is_recomputation() or not (self.recorders or schedule):
            return
        _, indices, weights = split_expert_arguments(args, kwargs)
        with torch.no_grad():
            logits, kind = self.router_logits(), self.layer.gate_kind  # (T, E)
            for recorder in self.recorders:
                recorder.add(self.layer.ordinal, logits, kind, indices, weights)
            if schedule is not None:
                batch = new_statistics(logits.shape[1], logits.device)
                router_statistics(batch, logits, indices, weights, kind=kind)
                profile = to_layer_profile(batch, logits.shape[0])
                self._scheduled = frozenset(int(e) for e in schedule(self.layer.ordinal, profile))

    def _active_schedule(self, module: nn.Module) -> Schedule | None:
        """Return the schedule if the current pass trains a bank, else None."""
        return self.schedule if self.bank is not None and module.training and torch.is_grad_enabled() else None

    @staticmethod
    def _is_recomputation() -> bool:
        """Whether activation checkpointing runs the layer again in the backward pass, for a batch already counted."""
        return torch._C._current_graph_task_id() != -1

    def router_logits(self) -> torch.Tensor:
        """Return the logits (T, E) of the current pass."""
        if self._logits is None:
            raise RuntimeError(f"the experts {self.layer.experts_path!r} ran without their router")
        return self._logits

    def forward(self, hidden_states: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return the experts' output (T, H) for the router's choice (T, K)."""
        slots: Slots
        energies: torch.Tensor | None = None
        if self.stream is not None:
            slots, slot_indices = self.stream(), indices
            for recorder in self.recorders:
                if recorder.neurons:
                    energies = recorder.energies(self.layer.ordinal, hidden_states.device)
        elif self.bank is not None:
            bank = self.bank
            slot_indices = bank.slot_of[indices]  # (T, K)
            if self.missing == "renormalize" and not bank.is_complete:
                slot_indices, weights = route_to_resident(
                    self.router_logits(),
                    slot_indices,
                    weights,
                    bank.resident,
                    self.layer.gate_kind,
                    self._selection_bias(),
                    bank.slot_of if bank.num_resident < len(bank) else None,
                )
            scheduled = self._scheduled if self._active_schedule(self.layer.experts) else None
            if not self._is_recomputation():
                self._count_tokens(bank, slot_indices, scheduled)
            if self.balancing is not None and torch.is_grad_enabled():
                term = balancing_loss(self.router_logits(), slot_indices, bank.slot_of, self.layer.gate_kind)
                if not self._is_recomputation():  # which must run the same operations
                    self.balancing.append(term)
            slots = bank.slots(scheduled)
        else:
            raise RuntimeError(
                f"{self.layer.experts_path!r} has no resident experts: apply a plan, or stream the experts"
            )
        stream = None if self.bank is None or self.stream is not None else self.bank.stream
        if stream is not None:
            stream.enter(self.layer.ordinal, backward=self._is_recomputation())
        experts, backend, keep = self.layer.experts, "auto", None
        if torch.is_grad_enabled():
            # Whether activations are kept must not depend on token counts: the memory model predicts it.
            if self._kernels(hidden_states.dtype, str(hidden_states.device)) == "reference":
                backend = "reference"
            else:
                keep = True
        output = masked_experts(
            hidden_states,
            slot_indices,
            weights,
            slots,
            activation=expert_activation(experts),
            is_transposed=self.layer.is_transposed,
            finish=expert_finish(experts),
            backend=backend,
            keep_activations=keep,
            # A perturbed expert is compared with itself, and rounded activations would hide the difference.
            int8_activations=None if self.bank is None or self.bank.perturbation is None else False,
            neuron_energy=None if energies is None else energies.unbind(0),
        )
        if self.bank is not None:
            self.bank.release()
            if self.bank.offload is not None and hidden_states.requires_grad:
                # The gradient of the input is complete when the backward pass has read the weights.
                release = self.bank.release
                hidden_states.register_hook(lambda gradient: release())  # type: ignore[no-untyped-call]
        if stream is not None and output.requires_grad:
            # Tensor hooks run before the backward pass of what made the tensor.
            enter = functools.partial(stream.enter, self.layer.ordinal, backward=True)
            output.register_hook(lambda gradient: enter())  # type: ignore[no-untyped-call]
        return output

    def _count_tokens(self, bank: ExpertBank, slot_indices: torch.Tensor, scheduled: frozenset[int] | None) -> None:
        flat = slot_indices.reshape(-1)
        is_served = (flat >= 0).to(torch.int64)
        served = torch.zeros_like(bank.served_tokens)
        if len(bank):
            served.index_add_(0, flat.clamp_min(0), is_served)
        bank.served_tokens += served
        if self.layer.experts.training and torch.is_grad_enabled():
            trained = torch.arange(len(served), device=served.device) < bank.num_trainable
            if scheduled is not None:
                is_scheduled = [expert in scheduled for expert in bank.experts]
                trained &= torch.tensor(is_scheduled, dtype=torch.bool, device=served.device)
            bank.trained_tokens += served * trained


def balancing_loss(
    router_logits: torch.Tensor, slot_indices: torch.Tensor, slot_of: torch.Tensor, kind: str
) -> torch.Tensor:
    """Return the load-balancing loss of a layer over its resident experts, a scalar; K if the load is even.

        S sum_s f_s P_s,    f_s: (token, choice) pairs of slot s per token,    P_s: mean router probability

    Switch Transformers (arXiv 2101.03961), equations 4 to 6, with K choices counted as in transformers. Departures:
    S counts resident experts (merged ones once), and probabilities are relative to those.

    Args:
        router_logits: (T, E).
        slot_indices: (T, K), where each token goes; -1 is nowhere.
        slot_of: (E,), the slot of each expert; -1 if absent.
        kind: of the gate, see `edgefed.moe.gate_probe`.
    """
    is_resident = slot_of >= 0
    num_slots = int(slot_of.max()) + 1 if len(slot_of) else 0
    probabilities = gate_probabilities(router_logits, kind) * is_resident  # (T, E)
    probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True).clamp_min(1e-9)
    mean = probabilities.mean(dim=0)  # (E,)
    share = mean.new_zeros(num_slots).index_add_(0, slot_of[is_resident], mean[is_resident])  # (S,)
    chosen = slot_indices[slot_indices >= 0]
    load = torch.bincount(chosen, minlength=num_slots).to(share.dtype) / max(1, len(slot_indices))
    return num_slots * (load * share).sum()


def training_kernels(layers: Iterable[ExpertLayer], dtype: torch.dtype, device: str) -> str:
    """Return which kernels train the experts of a model of ``dtype``, for all its layers: a `StepSetup.kernels`.

    "native" if the dispatcher has a kernel for such layers: by default on the CPU, and on a GPU if it is proved there
    or EDGEFED_KERNELS names it. Otherwise, and if a layer post-processes each expert's output, "reference". The memory
    model has different formulas for the two.
    """
    finishes = (layer.experts.post_expert_norm for layer in layers if layer.has_post_expert_norm)
    name, reason = backend_for(device, dtype, next(finishes, None))
    if name != "reference":
        return "native"
    log_choice("training of masked_experts", device, name, reason)
    return name


def edgefed_experts(experts: ExpertsModule, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
    """Run the experts for transformers: (T, H), (T, K), (T, K) -> (T, H).

    A module of a `MoeModel` with a plan or a stream uses that; any other module uses all its own experts. In the latter
    case an index of E, with which transformers marks pairs of another device, is dropped.
    """
    hidden_states, indices, weights = split_expert_arguments(args, kwargs)
    runtime: LayerRuntime | None = getattr(experts, "edgefed_runtime", None)
    if runtime is not None and not (runtime.bank is None and runtime.stream is None and holds_own_experts(experts)):
        return runtime.forward(hidden_states, indices, weights)
    slot_indices = torch.where(indices < experts.num_experts, indices, -1)
    if torch.compiler.is_compiling() and _is_operator(experts):
        up, down = experts.gate_up_proj, experts.down_proj
        form = ("dense", down.shape[2], 0, down.dtype, "swiglu")
        arguments = (hidden_states, slot_indices, weights, up, None, down, None, *form)
        return cast(torch.Tensor, torch.ops.edgefed.masked_experts(*arguments))
    return masked_experts(
        hidden_states,
        slot_indices,
        weights,
        StackSlots(experts),
        activation=expert_activation(experts),
        is_transposed=experts.is_transposed,
        finish=expert_finish(experts),
    )


def _is_operator(experts: ExpertsModule) -> bool:
    """Whether `edgefed.kernels.ops` has an operator for these experts, so that compilation needs no graph break.

    It covers SwiGLU without bias and norm, with stacks that are not trainable.
    """
    return (
        experts.has_gate
        and not (experts.is_transposed or experts.has_bias or getattr(experts, "has_post_expert_norm", False))
        and type(experts)._apply_gate.__name__ == "_default_apply_gate"
        and isinstance(experts.act_fn, (nn.SiLU, cast(type, ACT2CLS["silu"])))
        and not (torch.is_grad_enabled() and (experts.gate_up_proj.requires_grad or experts.down_proj.requires_grad))
    )


def holds_own_experts(experts: nn.Module) -> bool:
    """Whether the module still has its own stacks with values."""
    stack = experts._parameters.get("down_proj")
    return stack is not None and stack.device.type != "meta" and stack.shape[0] == experts.num_experts


def register_implementation() -> None:
    """Register the experts function with transformers. Idempotent."""
    ExpertsInterface.register(IMPLEMENTATION, edgefed_experts)
