"""How the clients of a run train in a round: the settings."""

from __future__ import annotations

import math

import msgspec

SCHEDULES = ("constant", "cosine", "linear")
"""How a learning rate may change over a run."""


class TrainingConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Local training of one round. ``experts``, ``router`` and ``attention``: "full", "lora" or "none"."""

    local_steps: int = 20
    round_seconds: float = 0.0
    """Seconds that the steps of a round may take on a device, which then takes fewer than ``local_steps``; 0: any."""
    batch_size: int = 8
    sequence_length: int = 128
    learning_rate: float = 5e-4
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """Longest gradient of a step, as the L2 norm over all that is trained; 0: any length."""
    schedule: str = "constant"
    """How the learning rate changes over the run: "constant", "cosine" or "linear", the two latter down to 0."""
    warmup_rounds: int = 0
    """Rounds over which the learning rate first rises from 0 to its value."""
    experts: str = "full"
    router: str = "full"
    attention: str = "none"
    lora_rank: int = 8
    min_lora_rank: int = 0
    """Smallest rank that a device may have (`protocol.ranks`); 0: all have ``lora_rank``."""
    lora_alpha: float = 16.0
    lora_scaling: str = "standard"
    """Factor of an adapter: "standard", alpha / rank, or "rank_stabilized", alpha / sqrt(rank)."""
    lora_factors: str = "both"
    """Factors of LoRA adapters that a round trains: "both", or "alternate" (`protocol.alternation`)."""
    balancing: float | None = None
    """Coefficient of the load-balancing loss of resident experts; None: what the model's configuration asks for."""
    missing: str = "renormalize"
    """Tokens routed to an absent expert: "renormalize" takes the next best resident one, "skip" takes none."""
    profile_tokens: int = 16384
    """Maximum number of tokens of the training text in a profile; 0 means all."""
    profile_agreement: float = 0.95
    """A profile ends when the plan made from it agrees so far with that of all tokens; 1: it takes all tokens."""
    evaluation_tokens: int = 4096
    """Maximum number of tokens of the held-out text in an evaluation, before and after training; 0 means all."""
    evaluation_share: float = 0.05
    """Maximum tokens of an evaluation, as a share of those a round trains on, at least one batch; 1: no limit."""
    keep_optimizer: bool = False
    """Devices keep the moments of their optimizer from round to round; otherwise each round begins with fresh ones."""
    evaluate_every: int = 1
    """Clients evaluate in rounds 1, 1 + k, 1 + 2k, ... and in the last one."""

    def evaluates(self, server_round: int, rounds: int) -> bool:
        """Whether clients evaluate the model in this round of a run of ``rounds`` rounds."""
        return server_round >= rounds or (server_round - 1) % self.evaluate_every == 0

    def evaluated_before(self, server_round: int) -> int:
        """The last round before this one in which clients evaluated; below 1 if there is none."""
        before = server_round - 1
        return before - (before - 1) % self.evaluate_every

    def problems(self, rounds: int) -> list[str]:
        """Invalid settings for a run of ``rounds`` rounds, one sentence each; empty if all are valid."""
        found = []
        if self.schedule not in SCHEDULES:
            found.append(f"`schedule` is {self.schedule!r}, expected one of {', '.join(SCHEDULES)}")
        if not 0 <= self.warmup_rounds < rounds:
            found.append(
                f"`warmup_rounds` is {self.warmup_rounds}, expected fewer than the {rounds} rounds of the run, from 0"
            )
        if not 0 <= self.max_grad_norm < math.inf:
            found.append(f"`max_grad_norm` is {self.max_grad_norm}, expected a number from 0")
        if self.lora_scaling not in ("standard", "rank_stabilized"):
            found.append(f"`lora_scaling` is {self.lora_scaling!r}, expected standard or rank_stabilized")
        if not 0 <= self.min_lora_rank <= self.lora_rank:
            found.append(f"`min_lora_rank` is {self.min_lora_rank}, expected at most `lora_rank`, {self.lora_rank}")
        if self.lora_factors not in ("both", "alternate"):
            found.append(f"`lora_factors` is {self.lora_factors!r}, expected both or alternate")
        if not 0 <= self.round_seconds < math.inf:
            found.append(f"`round_seconds` is {self.round_seconds}, expected seconds from 0; 0 sets no limit")
        if not self.evaluate_every >= 1:
            found.append(f"`evaluate_every` is {self.evaluate_every}, expected at least 1")
        elif self.evaluate_every > max(1, rounds):
            found.append(f"`evaluate_every` is {self.evaluate_every}, expected at most the {rounds} rounds of the run")
        return found
