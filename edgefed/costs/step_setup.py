"""How a training step is done, as far as its memory depends on it, and the correction from a measured step."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

import msgspec

from edgefed.errors import ConfigError

_MIB = 1024 * 1024

DTYPE_BYTES: Mapping[str, int] = MappingProxyType({"float32": 4, "bfloat16": 2, "float16": 2})
STORAGE_BYTES: Mapping[str, float] = MappingProxyType(
    {
        **DTYPE_BYTES,
        "int8": 1.0,  # and SCALE_BYTES for each row of the matrix
        "nf4": 0.5 + 4 / 64,  # blocks of 64 with a float32 scale
        "nf4_dq": 0.5 + 1 / 64 + 4 / (64 * 256),  # the scales are themselves 8-bit, in blocks of 256
    }
)
"""Bytes of a stored parameter; quantized formats as in `edgefed.kernels.quantization` and bitsandbytes."""
SCALE_BYTES, BLOCKSIZE = 4, 64
UNPACKING_BYTES: Mapping[str, float] = MappingProxyType({"int8": 4, "nf4": 6, "nf4_dq": 6 + 4 / 64})
"""Most temporary bytes per parameter while the reference decodes it, without the result."""
MEASURED_BYTES: Mapping[str, tuple[int, int]] = MappingProxyType(
    {"full": (160_000, 110_000), "lora": (480_000, 375_000)}
)
"""Bytes for each trainable and each frozen expert while a measured step is read: 1.9 KiB for each of up to 81 and 54
allocations and releases of its backward pass, with adapters 243 and 191 (`edgefed.training.allocation_log`)."""

OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_8bit")
MODES = ("full", "lora", "none")
DEVICES = ("cpu", "cuda", "unified")
KERNELS = ("reference", "native")

ADAPTER_BYTES = 4  # adapters are float32
EIGHT_BIT_STATE = 2 + 2 * 4 / 256  # two moments of one byte, a float32 scale for each 256 numbers
EIGHT_BIT_MIN_ELEMENTS = 4096  # bitsandbytes keeps smaller tensors' moments in 32 bit
EIGHT_BIT_CODES = 2048  # its two code books per tensor
CHUNK_TOKENS = 256
"""Tokens whose logits exist at a time when the loss is computed in chunks."""
CUBLAS_BYTES = 32 * _MIB
MARGIN = 1.05
"""Factor on the formula of activations: two OLMoE layers at 512 tokens keep 180.8 MiB, the formula says 172."""
CORRECTED_MARGIN = 1.03
"""Factor on formulas that a measured step has corrected: in the next step the router chooses other experts."""
TRAINABLE_TOKENS = 2.0
"""Trainable experts are chosen because they are used: assume twice an even share of the tokens, until a measured step
has shown how the tokens are distributed."""
ALLOWANCE = 0.005
"""Share of the peak for everything else: token ids, counters, and sizes that an allocator rounds up."""


@dataclasses.dataclass(frozen=True)
class StepSetup:
    """How a training step is done.

    Attributes:
        batch_size: Sequences per step.
        sequence_length: Tokens per sequence.
        dtype: Of weights and activations.
        expert_storage: Format of frozen experts; None is ``dtype``.
        dense_storage: Format of the other frozen weights.
        experts: How experts train: "full", "lora" or "none".
        router: How routers train.
        attention: How attention trains.
        lora_rank: Rank of all adapters.
        optimizer: One of `OPTIMIZERS`.
        checkpointing: Activation checkpointing.
        chunked_loss: The loss is computed `CHUNK_TOKENS` tokens at a time.
        offload: Experts are in host memory or files (`edgefed.moe.offloading`).
        streamed_layers: MoE layers whose frozen experts are in host memory or files (`edgefed.moe.expert_stream`).
        device: "cpu", "cuda", or "unified": a GPU that shares the host's memory, where paging out saves nothing.
        kernels: Of the experts: "reference" has many torch operations per layer, "native" one
            (`edgefed.moe.layer_runtime.training_kernels`).

    Raises:
        ConfigError: Unknown value.
    """

    batch_size: int
    sequence_length: int
    dtype: str = "bfloat16"
    expert_storage: str | None = None
    dense_storage: str | None = None
    experts: str = "full"
    router: str = "full"
    attention: str = "none"
    lora_rank: int = 8
    optimizer: str = "adamw"
    checkpointing: bool = False
    chunked_loss: bool = False
    offload: bool = False
    streamed_layers: int = 0
    device: str = "cpu"
    kernels: str = "reference"

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed and not (value is None and name.endswith("_storage")):
                raise ConfigError(f"invalid {name} {value!r}, expected one of {', '.join(allowed)}")
        for name in ("batch_size", "sequence_length", "lora_rank"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, found {getattr(self, name)}")

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.batch_size * self.sequence_length

    def streams(self, layer: int, num_layers: int) -> bool:
        """Whether the frozen experts of a MoE layer, by ordinal, are streamed: those of layers at even distances.

        While one of them is read, the layers in between compute.
        """
        count = min(self.streamed_layers, num_layers)
        return (layer + 1) * count // num_layers > layer * count // num_layers

    @property
    def width(self) -> int:
        """Bytes of one activation."""
        return DTYPE_BYTES[self.dtype]


_CHOICES = {
    "dtype": tuple(DTYPE_BYTES),
    "expert_storage": tuple(STORAGE_BYTES),
    "dense_storage": tuple(STORAGE_BYTES),
    "experts": MODES,
    "router": MODES,
    "attention": MODES,
    "optimizer": OPTIMIZERS,
    "device": DEVICES,
    "kernels": KERNELS,
}


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """How a device does a training step, and with how many experts, summed over all layers."""

    setup: StepSetup
    resident: int
    trainable: int

    def rank(self) -> tuple[int | bool, ...]:
        """Sort key within one run: a plan that needs more memory ranks higher."""
        setup = self.setup
        return (
            self.resident, self.trainable, setup.lora_rank, setup.sequence_length, setup.expert_storage is None,
            setup.optimizer == "adamw", not setup.checkpointing, not setup.chunked_loss, not setup.offload,
            -setup.streamed_layers,
        )  # fmt: skip


def describe(step_plan: StepPlan, total: int) -> str:
    """One line for the owner: ``12 of 64 experts resident, 8 trainable; chunked loss, checkpointing``."""
    setup = step_plan.setup
    words = (
        (setup.chunked_loss, "chunked loss"),
        (setup.checkpointing, "checkpointing"),
        (setup.optimizer != "adamw", "8-bit optimizer"),
        (setup.expert_storage is not None, f"experts in {(setup.expert_storage or '').upper()}"),
        (setup.offload, "experts offloaded"),
        (setup.streamed_layers, f"frozen experts of {setup.streamed_layers} layers streamed"),
    )
    savings = [word for on, word in words if on]
    trainable = "" if step_plan.trainable == step_plan.resident else f", {step_plan.trainable} trainable"
    return f"{step_plan.resident} of {total} experts resident{trainable}" + (
        f"; {', '.join(savings)}" if savings else ""
    )


class Correction(msgspec.Struct, frozen=True):
    """What one measured step says about the formulas of the memory model.

    Attributes:
        activation_scale: Factor on what layers keep outside their experts, without attention scores.
        overhead_bytes: Bytes that no formula explains.
        origin: Which step was measured.
        expert_scale: Factor on what layers keep inside their experts.
        loss_scale: Factor on logits.
        transient_scale: Factor on temporaries of a layer's backward pass.
        forward_scale: Factor on temporaries of a layer's forward pass.
        trainable_tokens: Tokens of trainable experts, as a multiple of an even share.
        process_bytes: What the process took beyond the allocator's bytes, 0 on a GPU; not part of an estimate.
        kernels: Of the measured step; the factors hold for no others.
    """

    activation_scale: float
    overhead_bytes: int
    origin: str
    expert_scale: float = 1.0
    loss_scale: float = 1.0
    transient_scale: float = 1.0
    forward_scale: float = 1.0
    trainable_tokens: float = msgspec.field(default=TRAINABLE_TOKENS, name="tuned_tokens")  # its name in plan.json
    process_bytes: int = 0
    kernels: str = "reference"
