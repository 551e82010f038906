"""What happens in one MoE layer during a forward pass: the function that transformers calls for its experts.

`LayerRuntime` holds the state of a layer: its bank or its stream of experts, what to do about absent experts, which
experts learn, and who listens. Its router's logits are caught by a hook, used by the experts of the same layer in the
same pass, and dropped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import torch
from torch import nn
from transformers.activations import ACT2CLS
from transformers.integrations.moe import ExpertsInterface

from edgefed.expert_records import ActivationProfile, LayerProfile
from edgefed.kernels import ops as _operators  # noqa: F401  registers torch.ops.edgefed
from edgefed.kernels.dispatch import log_choice
from edgefed.kernels.masked_experts import Slots, SlotWeights, backend_for, masked_experts
from edgefed.kernels.router_statistics import new_statistics, router_statistics, to_layer_profile
from edgefed.moe.architecture import ExpertLayer
from edgefed.moe.attention_received import AttentionCapture
from edgefed.moe.bank import ExpertBank
from edgefed.moe.gate_probe import route_to_resident, router_logits_of, split_expert_arguments

IMPLEMENTATION = "edgefed"
MISSING_MODES = ("renormalize", "skip")

Schedule = Callable[[int, LayerProfile], Iterable[int]]
"""(layer ordinal, record of this batch) -> expert ids that get weight gradients in this batch."""


class StatisticsRecorder:
    """Router statistics of everything that ran since the last `take`; with ``attention``, what tokens received too."""

    def __init__(self, layers: tuple[ExpertLayer, ...], attention: AttentionCapture | None = None):
        self.attention = attention
        self._layers = layers
        self._statistics: dict[int, torch.Tensor] = {}
        self._num_tokens: dict[int, int] = {}
        self._attention_sums: dict[int, torch.Tensor] = {}

    def add(self, layer: int, logits: torch.Tensor, kind: str, indices: torch.Tensor, weights: torch.Tensor) -> None:
        """Add one batch of one layer: router logits (T, E) of a gate ``kind``, its full choice and weights (T, K)."""
        if layer not in self._statistics:
            self._statistics[layer] = new_statistics(logits.shape[1], logits.device)
        sums = self._statistics[layer]
        router_statistics(sums, logits, indices, weights, kind=kind)
        self._num_tokens[layer] = self._num_tokens.get(layer, 0) + logits.shape[0]
        if self.attention is not None:
            received = self.attention.of(self._layers[layer].experts_path, logits.shape[0], logits.device)  # (T,)
            per_pair = received.to(sums.dtype).unsqueeze(1).expand_as(indices).reshape(-1)  # (T*K,)
            total = self._attention_sums.setdefault(layer, sums.new_zeros(logits.shape[1]))
            total.index_add_(0, indices.reshape(-1), per_pair)

    def take(self) -> ActivationProfile:
        """The record so far; starts again from zero. The one host synchronisation."""
        records = []
        for layer in self._layers:
            statistics = self._statistics.pop(layer.ordinal, None)
            if statistics is None:
                statistics = new_statistics(layer.num_experts)
            record = to_layer_profile(statistics, self._num_tokens.pop(layer.ordinal, 0))
            if self.attention is not None:
                received = self._attention_sums.pop(layer.ordinal, statistics.new_zeros(layer.num_experts))
                values = received.to(device="cpu", dtype=torch.float64).numpy()
                record = dataclasses.replace(record, attention_sum=values)
            records.append(record)
        return ActivationProfile(tuple(records))


class LayerRuntime:
    """The state of one MoE layer between and during forward passes.

    ``kernels(dtype, device type)``: what the model trains its experts with, as `training_kernels` says.
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
        self._selection_bias = selection_bias
        self._logits: torch.Tensor | None = None
        self._scheduled: frozenset[int] | None = None
        layer.router.register_forward_hook(self._catch_logits)
        layer.experts.register_forward_pre_hook(self._record, with_kwargs=True)
        layer.experts.register_forward_hook(self._drop_logits)

    def _catch_logits(self, module: nn.Module, args: tuple, output: object) -> None:
        logits = router_logits_of(output)
        self._logits = logits.reshape(-1, logits.shape[-1])  # (T, E)

    def _drop_logits(self, module: nn.Module, args: tuple, output: object) -> None:
        self._logits = None

    def _record(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        schedules = self._schedules(module)
        if self._is_recomputation() or not (self.recorders or schedules):
            return
        _, indices, weights = split_expert_arguments(args, kwargs)
        with torch.no_grad():
            logits, kind = self.router_logits(), self.layer.gate_kind  # (T, E)
            for recorder in self.recorders:
                recorder.add(self.layer.ordinal, logits, kind, indices, weights)
            if schedules:
                batch = new_statistics(logits.shape[1], logits.device)
                router_statistics(batch, logits, indices, weights, kind=kind)
                record = to_layer_profile(batch, logits.shape[0])
                self._scheduled = frozenset(int(e) for e in self.schedule(self.layer.ordinal, record))

    def _schedules(self, module: nn.Module) -> bool:
        return self.schedule is not None and self.bank is not None and module.training and torch.is_grad_enabled()

    @staticmethod
    def _is_recomputation() -> bool:
        """Activation checkpointing runs the layer again inside the backward pass: the batch was counted already."""
        return torch._C._current_graph_task_id() != -1

    def router_logits(self) -> torch.Tensor:
        """The logits (T, E) of the pass that runs now."""
        if self._logits is None:
            raise RuntimeError(f"the experts {self.layer.experts_path!r} ran without their router")
        return self._logits

    def forward(self, hidden_states: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The experts' output (T, H) for the router's choice (T, K)."""
        slots: Slots
        if self.stream is not None:
            slots, slot_indices = self.stream(), indices
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
            scheduled = self._scheduled if self._schedules(self.layer.experts) else None
            if not self._is_recomputation():
                self._count_tokens(bank, slot_indices, scheduled)
            slots = bank.slots(scheduled)
        else:
            raise RuntimeError(
                f"no expert of {self.layer.experts_path!r} is on this device: apply a plan, or stream the experts"
            )
        experts, backend, keep = self.layer.experts, "auto", None
        if torch.is_grad_enabled():
            # Whether the up projection is kept is fixed here, or nobody could say beforehand what a step takes.
            if self._kernels(hidden_states.dtype, hidden_states.device.type) == "reference":
                backend = "reference"
            else:
                keep = True
        output = masked_experts(
            hidden_states,
            slot_indices,
            weights,
            slots,
            activation=experts._apply_gate if self.layer.has_gate else experts.act_fn,
            is_transposed=self.layer.is_transposed,
            finish=experts.post_expert_norm if self.layer.has_post_expert_norm else None,
            backend=backend,
            keep_activations=keep,
            # A moved expert is compared with itself: rounded activations would hide the difference.
            int8_activations=None if self.bank is None or self.bank.perturbation is None else False,
        )
        if self.bank is not None:
            self.bank.release()
        return output

    def _count_tokens(self, bank: ExpertBank, slot_indices: torch.Tensor, scheduled: frozenset[int] | None) -> None:
        flat = slot_indices.reshape(-1)
        here = (flat >= 0).to(torch.int64)
        served = torch.zeros_like(bank.served_tokens)
        if len(bank):
            served.index_add_(0, flat.clamp_min(0), here)
        bank.served_tokens += served
        if self.layer.experts.training and torch.is_grad_enabled():
            learns = torch.arange(len(served), device=served.device) < bank.num_trainable
            if scheduled is not None:  # made of values on the host; copying a list waits for the device
                scheduled_here = [expert in scheduled for expert in bank.experts]
                learns &= torch.tensor(scheduled_here, dtype=torch.bool, device=served.device)
            bank.trained_tokens += served * learns


def training_kernels(layers: Iterable[ExpertLayer], dtype: torch.dtype, device_type: str) -> str:
    """What a planned model of ``dtype`` trains its experts with: a `StepSetup.kernels`, the same for all its layers.

    "native" where the dispatcher has a kernel for such layers: on the CPU by itself, on a GPU if EDGEFED_KERNELS names
    one. Else, and where a layer does something to each expert's output, "reference", for which the memory model has
    other formulas.
    """
    finishes = (layer.experts.post_expert_norm for layer in layers if layer.has_post_expert_norm)
    name, reason = backend_for(device_type, dtype, next(finishes, None))
    if name != "reference":
        return "native"
    log_choice("training of masked_experts", device_type, name, reason)
    return name


class StackSlots:
    """The experts of a transformers module by slot: rows of its own stacks, gradients included.

    Stacks are unbound once: an index into them would make a gradient as large as the stack for each expert.
    """

    def __init__(self, experts: nn.Module):
        self._rows = {name: stack.unbind(0) for name, stack in experts.named_parameters(recurse=False)}
        self._up = "gate_up_proj" if experts.has_gate else "up_proj"
        self._count = experts.num_experts

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, slot: int) -> SlotWeights:
        rows, up = self._rows, self._up
        return SlotWeights(
            up=rows[up][slot],
            down=rows["down_proj"][slot],
            up_bias=rows[f"{up}_bias"][slot] if f"{up}_bias" in rows else None,
            down_bias=rows["down_proj_bias"][slot] if "down_proj_bias" in rows else None,
        )


def edgefed_experts(experts: nn.Module, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
    """The experts function that transformers calls: (T, H), (T, K), (T, K) -> (T, H).

    A module of a `MoeModel` that holds a plan or streams runs by that; any other with all its own experts. There, an
    index that is no expert (transformers marks pairs of another device with the number of experts) is dropped.
    """
    hidden_states, indices, weights = split_expert_arguments(args, kwargs)
    runtime = getattr(experts, "edgefed_runtime", None)
    if runtime is not None and not (runtime.bank is None and runtime.stream is None and holds_own_experts(experts)):
        return runtime.forward(hidden_states, indices, weights)
    slot_indices = torch.where(indices < experts.num_experts, indices, -1)
    if torch.compiler.is_compiling() and _is_operator(experts):
        up, down = experts.gate_up_proj, experts.down_proj
        form = ("dense", down.shape[2], 0, down.dtype, "swiglu")
        return torch.ops.edgefed.masked_experts(hidden_states, slot_indices, weights, up, None, down, None, *form)
    return masked_experts(
        hidden_states,
        slot_indices,
        weights,
        StackSlots(experts),
        activation=experts._apply_gate if experts.has_gate else experts.act_fn,
        is_transposed=experts.is_transposed,
        finish=experts.post_expert_norm if getattr(experts, "has_post_expert_norm", False) else None,
    )


def _is_operator(experts: nn.Module) -> bool:
    """Whether `edgefed.kernels.ops` has an operator for these experts, so that a compiled graph need not break: SwiGLU,
    no bias, no norm, and stacks that do not learn.
    """
    return (
        experts.has_gate
        and not (experts.is_transposed or experts.has_bias or getattr(experts, "has_post_expert_norm", False))
        and type(experts)._apply_gate.__name__ == "_default_apply_gate"
        and isinstance(experts.act_fn, (nn.SiLU, ACT2CLS["silu"]))
        and not (torch.is_grad_enabled() and (experts.gate_up_proj.requires_grad or experts.down_proj.requires_grad))
    )


def holds_own_experts(experts: nn.Module) -> bool:
    """Whether the module still has the stacks that transformers gave it, with values."""
    stack = experts._parameters.get("down_proj")
    return stack is not None and stack.device.type != "meta" and stack.shape[0] == experts.num_experts


def register_implementation() -> None:
    """Make the name known to transformers. Idempotent."""
    ExpertsInterface.register(IMPLEMENTATION, edgefed_experts)
