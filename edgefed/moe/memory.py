"""How much memory a plan needs, before anything is loaded. Arithmetic only: no torch, no model.

Symbols: d hidden_size, I expert_width, L num_layers, T tokens of a batch, V vocab_size, K experts per token. Bytes
per trained number are weight + gradient + two AdamW moments; torch keeps all four in the parameter's dtype, so 16
bytes for float32 and 8 for bfloat16.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from edgefed.errors import BudgetTooSmall

ADAPTER_STATE_BYTES = 16  # adapters are float32: 4 weight + 4 gradient + 8 AdamW
_MIB = 1024 * 1024


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that its activations depend on. ``shared_width``: of shared experts, 0 without."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    expert_width: int
    num_experts: int
    top_k: int
    shared_width: int = 0


def trained_bytes(num_parameters: int, dtype_bytes: int) -> int:
    """Weights, gradients and AdamW state of parameters that train."""
    return num_parameters * dtype_bytes * 4


def tuned_expert_bytes(num_parameters: int, dtype_bytes: int, num_adapter_parameters: int = 0) -> int:
    """One resident expert that trains: in full, or, with adapter parameters (LoRA), by its adapter alone."""
    if num_adapter_parameters:
        return num_parameters * dtype_bytes + num_adapter_parameters * ADAPTER_STATE_BYTES
    return trained_bytes(num_parameters, dtype_bytes)


def frozen_expert_bytes(num_parameters: int, dtype_bytes: int, num_adapter_parameters: int = 0) -> int:
    """One resident expert that does not train; an adapter that others trained comes with it, in float32."""
    return num_parameters * dtype_bytes + num_adapter_parameters * 4


def adapter_parameters(sizes: Sequence[tuple[int, int]], rank: int) -> int:
    """Numbers in the adapter of matrices with these (in, out)."""
    return sum(rank * (size_in + size_out) for size_in, size_out in sizes)


def dense_bytes(num_parameters: int, num_trained: int, dtype_bytes: int) -> int:
    """Everything that is no routed expert; ``num_trained`` of its parameters (router, attention) train in full."""
    return (num_parameters - num_trained) * dtype_bytes + trained_bytes(num_trained, dtype_bytes)


def activation_bytes(
    shape: ModelShape, batch_size: int, sequence_length: int, dtype_bytes: int, *, checkpointing: bool = False
) -> int:
    """Upper estimate of what one training step keeps for its backward pass, logits included.

    Per layer 1.05 * (12 T d + T (6 (n_h + n_kv) d_h + 4 n_h) + T K (4 d + 8 I) + 8 T E + T (8 I_shared + 2 d)) bytes
    in bfloat16 with fused attention; float32 activations take twice the space. Logits take 12 T V at their peak.
    Within 3 % of measured OLMoE and Qwen3-MoE layers whose experts train, a third too high for frozen ones.
    """
    tokens = batch_size * sequence_length
    d = shape.hidden_size
    norms = 12 * tokens * d
    attention = tokens * (6 * (shape.num_heads + shape.num_kv_heads) * shape.head_dim + 4 * shape.num_heads)
    experts = tokens * shape.top_k * (4 * d + 8 * shape.expert_width) + 8 * tokens * shape.num_experts
    shared = tokens * (8 * shape.shared_width + 2 * d) if shape.shared_width else 0
    scale = dtype_bytes / 2
    layer = 1.05 * (norms + attention + experts + shared) * scale
    logits = 12.0 * tokens * shape.vocab_size
    if checkpointing:
        return int((shape.num_layers * 2 + 4) * tokens * d * scale + max(layer, logits))
    return int(shape.num_layers * layer + logits)


def experts_that_fit(
    memory_bytes: int, fixed_bytes: int, bytes_per_expert: int, experts_per_layer: Sequence[int]
) -> int:
    """Experts, over all layers together, that fit beside ``fixed_bytes`` (dense part, activations) in the memory.

    Never more than the model has. Raises BudgetTooSmall when there is no room for one expert in each MoE layer.
    """
    fitting = (memory_bytes - fixed_bytes) // max(bytes_per_expert, 1)
    needed = len(experts_per_layer)
    if fitting < needed:
        needed_bytes = fixed_bytes + needed * bytes_per_expert
        raise BudgetTooSmall(
            f"one expert in each of the {needed} MoE layers needs {_mib(needed_bytes)} ({_mib(fixed_bytes)} for all "
            f"else and {_mib(bytes_per_expert)} an expert), the device offers {_mib(memory_bytes)}"
        )
    return min(fitting, sum(experts_per_layer))


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / _MIB:.1f} MiB"
