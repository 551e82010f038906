"""What a run trains: experts, router and attention, each in full, by LoRA adapters, or not at all."""

from __future__ import annotations

import dataclasses

from edgefed.errors import ConfigError

TRAINING_MODES = ("full", "lora", "none")


@dataclasses.dataclass(frozen=True)
class TrainScope:
    """What is trained. Raises ConfigError on a value that does not exist.

    ``attention`` means the two-dimensional weights below any module whose attribute or class name holds "attn" or
    "attention". A LoRA update adds ``lora_alpha / lora_rank * B A`` to a weight (out, in).
    """

    experts: str = "full"
    router: str = "full"
    attention: str = "none"
    lora_rank: int = 8
    lora_alpha: float = 16.0

    def __post_init__(self) -> None:
        for part in ("experts", "router", "attention"):
            mode = getattr(self, part)
            if mode not in TRAINING_MODES:
                raise ConfigError(f"{part} can be trained as {', '.join(TRAINING_MODES)}; asked for {mode!r}")
        if self.lora_rank < 1 or self.lora_alpha <= 0:
            raise ConfigError(
                f"LoRA needs a rank of at least 1 and an alpha above 0, found rank {self.lora_rank} and "
                f"alpha {self.lora_alpha}"
            )

    @property
    def lora_scale(self) -> float:
        return self.lora_alpha / self.lora_rank

    @property
    def uses_lora(self) -> bool:
        return "lora" in (self.experts, self.router, self.attention)
