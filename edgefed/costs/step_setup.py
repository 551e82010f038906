"""How a training step is done, as far as its memory depends on it, and what a measured step says about the formulas."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

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
"""Bytes a stored parameter takes; the quantised ones as `edgefed.kernels.quantization` and bitsandbytes have it."""
SCALE_BYTES, BLOCKSIZE = 4, 64
UNPACKING_BYTES: Mapping[str, int] = MappingProxyType({"int8": 8, "nf4": 13, "nf4_dq": 13})
"""Bytes a parameter takes on the way while the reference decodes it, beside the result: 64-bit indices and float32."""

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
"""On top of the formula of activations: two OLMoE layers at 512 tokens keep 180.8 MiB, the formula says 172."""
CORRECTED_MARGIN = 1.03
"""On top of what one measured step says: routers send other tokens to other experts in the next."""
TUNED_TOKENS = 2.0
"""Trainable experts are picked because they are used: assume twice the tokens that their number would get, unless a
measured step has shown how evenly the tokens fall."""
ALLOWANCE = 0.005
"""Of the peak, for what is in no list: token ids, counters, and sizes that an allocator rounds up."""


@dataclasses.dataclass(frozen=True)
class StepSetup:
    """How a training step is done. ``expert_storage`` and ``dense_storage`` are those of frozen weights (None: dtype).

    ``offload``: experts lie away from the processor, see `edgefed.moe.offloading`.
    ``device``: cpu, cuda, or unified, a GPU without memory of its own, where paging out saves nothing. ``kernels``:
    what the experts train with: the reference, of many torch operations, or one for which a layer is one operation; see
    `edgefed.moe.layer_runtime.training_kernels`.

    Raises ConfigError on a value that does not exist.
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
    device: str = "cpu"
    kernels: str = "reference"

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed and not (value is None and name.endswith("_storage")):
                raise ConfigError(f"{name} can be {', '.join(allowed)}; asked for {value!r}")
        for name in ("batch_size", "sequence_length", "lora_rank"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, found {getattr(self, name)}")

    @property
    def tokens(self) -> int:
        return self.batch_size * self.sequence_length

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
class Correction:
    """What one measured step says about the formulas: factors on their parts, and bytes that none of them explains.

    ``activation_scale`` is for what layers keep outside their experts, attention scores apart, ``expert_scale`` inside,
    ``loss_scale`` for logits, ``transient_scale`` for what a layer's backward pass needs on the way, ``forward_scale``
    for its forward pass. ``trainable_tokens``: tokens of trainable experts, as a multiple of what their number would get.
    ``process_bytes``: what the process took beyond the allocator's bytes, 0 on a GPU; not part of an estimate.
    ``kernels``: those of the setup that was measured; the factors hold for the formulas of these only.
    """

    activation_scale: float
    overhead_bytes: int
    origin: str
    expert_scale: float = 1.0
    loss_scale: float = 1.0
    transient_scale: float = 1.0
    forward_scale: float = 1.0
    trainable_tokens: float = TUNED_TOKENS
    process_bytes: int = 0
    kernels: str = "reference"
