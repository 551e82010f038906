"""Held-out loss and accuracy of the global model, for all clients at once, on the model that they share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch.nn import functional as F

from edgefed.expert_records import ExpertPlan, Role
from edgefed.moe.expert_reading import FrameSource
from edgefed.moe.units import LORA_SUFFIX
from edgefed.protocol.messages import Manifest, TrainingConfig
from edgefed.simulation.simulated_device import SharedModel
from edgefed.training.data import Example
from edgefed.training.encoding import IGNORED_LABEL, TokenBlocks, encode_examples
from edgefed.training.profiling import spread_blocks
from edgefed.training.steps import train_scope


class GlobalEvaluator:
    """Evaluates manifests of one run. ``held_out``: {client: examples}; at most ``max_tokens`` tokens of each."""

    def __init__(
        self, shared: SharedModel, held_out: Mapping[str, Sequence[Example]], training: TrainingConfig, max_tokens: int
    ):
        self._shared, self._training, self._max_tokens = shared, training, max_tokens
        self._held_out = held_out
        self._blocks: dict[str, TokenBlocks] = {}

    def place(self, manifest: Manifest, blob) -> None:
        """Load the whole global model: every expert, nothing trains. `release` frees it."""
        model = self._shared.ensure(manifest.files, {file.sha256: blob(file.sha256) for file in manifest.files})
        source = FrameSource(manifest.units, {unit.sha256: blob(unit.sha256) for unit in manifest.units})
        for unit in manifest.units:
            if unit.kind == "expert" or unit.key.endswith(LORA_SUFFIX):
                continue
            if self._shared.loaded.get(unit.key) != unit.sha256:
                model.load_unit(unit.key, source.read(unit.key))
                if not unit.trainable:
                    self._shared.loaded[unit.key] = unit.sha256
        plan = ExpertPlan.full(manifest.experts_per_layer, Role.FROZEN)
        model.apply_plan(plan, source, train_scope(self._training), missing=self._training.missing)

    def release(self) -> None:
        self._shared.model.drop_experts()

    def losses(self) -> tuple[dict[str, float], float]:
        """({client: mean cross-entropy per predicted token in nats}, share of predicted tokens whose best guess is
        right, over all clients). A client without held-out text is left out. Call between `place` and `release`.
        """
        if not self._blocks:
            for name, examples in self._held_out.items():
                encoded = encode_examples(examples, self._shared.tokenizer, self._training.sequence_length)
                self._blocks[name] = spread_blocks(encoded, self._max_tokens)
        found, right, tokens = {}, 0, 0
        module = self._shared.model.module
        module.eval()
        for name, blocks in self._blocks.items():
            total, predicted, hits = _measure(module, blocks, self._training.batch_size)
            if predicted:
                found[name] = total / predicted
            right, tokens = right + hits, tokens + predicted
        return found, right / tokens if tokens else math.nan


@torch.no_grad()
def _measure(module: torch.nn.Module, blocks: TokenBlocks, batch_size: int) -> tuple[float, int, int]:
    """(sum of cross-entropies, predicted tokens, right guesses)."""
    total, predicted, hits = 0.0, 0, 0
    for input_ids, labels in blocks.batches(batch_size):
        targets = labels[:, 1:]
        learned = targets != IGNORED_LABEL
        if not learned.any():
            continue
        logits = module(input_ids=input_ids, use_cache=False).logits[:, :-1][learned].float()  # (n, V)
        wanted = targets[learned]
        total += float(F.cross_entropy(logits, wanted, reduction="sum"))
        hits += int((logits.argmax(-1) == wanted).sum())
        predicted += len(wanted)
    return total, predicted, hits
