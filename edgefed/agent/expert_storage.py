"""How the experts of a device are to be stored: what the owner allows, what the method asks for, what can be had."""

from __future__ import annotations

from edgefed.errors import ConfigError
from edgefed.methods.interface import Method
from edgefed.moe.model import MoeModel
from edgefed.moe.packed import EXPERT_STORAGES
from edgefed.protocol.messages import TrainingConfig
from edgefed.training.quantising import packing_problem

STORAGE_WISHES = ("auto", "full", *EXPERT_STORAGES)
"""What an owner may ask for. "auto": as the ladder of savings decides; "full": the way experts come, always."""


def required_storage(wish: str, method: Method, training: TrainingConfig, model: MoeModel) -> str | None:
    """What experts that do not learn must be stored as from the start; None where nobody asks for anything.

    ``wish`` is one of STORAGE_WISHES. Raises ConfigError where it contradicts the method, makes no sense, or cannot be
    had on this device.
    """
    if wish not in STORAGE_WISHES:
        raise ConfigError(f"experts can be stored as {', '.join(STORAGE_WISHES)}; asked for {wish!r}")
    asked = f"--expert-storage {wish}"
    if method.expert_storage is not None:
        if wish not in ("auto", method.expert_storage):
            raise ConfigError(
                f"the method {method.name} keeps experts in {method.expert_storage}, this device was told {asked}",
                remedy="Join without --expert-storage, or run another method.",
            )
        wish, asked = method.expert_storage, f"the method {method.name}"
    if wish in ("auto", "full"):
        return None
    if method.offloads_experts:
        raise ConfigError(
            f"{asked} wants {wish}, but {method.name} offloads experts the way they come",
            remedy="Join without --expert-storage, or run another method.",
        )
    if method.holds_all_experts and training.experts == "full":
        raise ConfigError(
            f"{asked} wants {wish}, but {method.name} trains every expert in full: none is left to be quantised",
            remedy="Join without --expert-storage, or serve with --train-experts lora.",
        )
    if problem := packing_problem(wish, str(model.module.device), model.dtype):
        raise ConfigError(
            f"{asked} cannot be had here: {problem}", remedy="Join with --expert-storage full, or on another device."
        )
    return wish
