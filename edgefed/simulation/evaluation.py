"""Held-out loss and accuracy of global models: during a simulation, and of the rounds that a run folder has kept."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch.nn import functional as F

from edgefed.expert_records import ExpertPlan, Role
from edgefed.moe.loading import without_progress_bars
from edgefed.moe.model import MoeModel
from edgefed.moe.units import LORA_SUFFIX
from edgefed.protocol.messages import FileInfo, Manifest, TrainingConfig, UnitInfo
from edgefed.protocol.slices import UnitSlice
from edgefed.runs import RunReader
from edgefed.simulation.simulated_device import SharedModel
from edgefed.trainer.ports import load_shared_units
from edgefed.training.data import Example
from edgefed.training.encoding import IGNORED_LABEL, TokenBlocks, encode_examples
from edgefed.training.loss import evaluate_loss
from edgefed.training.profiling import spread_blocks
from edgefed.training.steps import train_scope
from edgefed.training.tokenizer import load_tokenizer

PROMPT = "import asyncio\n\nasync def "


class GlobalEvaluator:
    """Evaluates manifests of one run. ``held_out``: {client: examples}; at most ``max_tokens`` tokens of each."""

    def __init__(
        self,
        shared: SharedModel,
        held_out: Mapping[str, Collection[Example]],
        training: TrainingConfig,
        max_tokens: int,
    ):
        self._shared, self._training, self._max_tokens = shared, training, max_tokens
        self._held_out = held_out
        self._blocks: dict[str, TokenBlocks] = {}

    def place(self, manifest: Manifest, blob: Callable[[str], Path]) -> None:
        """Load the whole global model: every expert, nothing trains. `release` frees it."""

        def fetch(items: Iterable[UnitInfo | FileInfo | UnitSlice]) -> dict[str, Path]:
            return {item.sha256: blob(item.sha256) for item in items}

        model = self._shared.open(manifest, fetch)
        source = load_shared_units(model, self._shared.loaded, manifest.units, fetch)
        source.add(manifest.units, fetch(manifest.units))
        plan = ExpertPlan.full(manifest.experts_per_layer, Role.FROZEN)
        model.apply_plan(plan, source, train_scope(self._training), missing=self._training.missing)

    def release(self) -> None:
        """Free the experts."""
        if self._shared.model is not None:
            self._shared.model.drop_experts()

    def losses(self) -> tuple[dict[str, float], float]:
        """({client: mean cross-entropy per predicted token in nats}, accuracy of the best guess over all clients).

        A client without held-out text is left out. Call between `place` and `release`.
        """
        assert self._shared.model is not None, "`place` comes first"
        if not self._blocks:
            for name, examples in self._held_out.items():
                encoded = encode_examples(examples, self._shared.tokenizer, self._training.sequence_length)
                self._blocks[name] = spread_blocks(encoded, self._max_tokens)
        found, right, tokens = {}, 0, 0
        module = self._shared.model.module
        module.train(False)
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


def held_out_losses(
    run_folder: Path,
    held_out: Mapping[str, Collection[Example]],
    *,
    sequence_length: int,
    batch_size: int = 8,
    max_tokens: int = 8192,
    rounds: Sequence[int] | None = None,
    on_model: Callable[[int], None] = lambda evaluated: None,
) -> dict[str, list[float]]:
    """Loss of the global model at the start of each stored round and after the last one, {client: [loss, ...]}.

    Every expert of the model is streamed from the run's blobs, so numbers of different methods and budgets can be
    compared. ``held_out``: {client: examples}. ``rounds``: evaluate these manifests only, where 1 is the model before
    the first round. ``on_model``: gets the number of models evaluated so far, after each.
    """
    losses: dict[str, list[float]] = {name: [] for name in held_out}
    with RunReader(run_folder) as reader, tempfile.TemporaryDirectory(prefix="edgefed-") as scratch:
        scope = train_scope(reader.run.training)
        reader.unpack(reader.manifest(reader.oldest_round), Path(scratch))
        model = MoeModel.skeleton(Path(scratch))
        tokenizer = load_tokenizer(scratch)
        blocks = {
            name: spread_blocks(encode_examples(examples, tokenizer, sequence_length), max_tokens)
            for name, examples in held_out.items()
        }
        loaded: dict[str, str] = {}
        for server_round in rounds or range(reader.oldest_round, reader.last_round + 1):
            manifest = reader.manifest(server_round)
            source = reader.unpack(manifest, Path(scratch))
            changed = []
            for unit in manifest.units:
                # Adapters come into the model with the first streaming; from then on they are loaded like the rest.
                ready = unit.kind != "expert" and (loaded or not unit.key.endswith(LORA_SUFFIX))
                if ready and loaded.get(unit.key) != unit.sha256:
                    changed.append(unit)
            for unit in changed:
                model.load_unit(unit.key, source.read(unit.key))
                loaded[unit.key] = unit.sha256
            with model.streaming(source, scope):
                for name in held_out:
                    losses[name].append(evaluate_loss(model.module, blocks[name], batch_size))
            on_model(max(map(len, losses.values())))
    return losses


def generate_sample(model_folder: Path, prompt: str = PROMPT, new_tokens: int = 48) -> str:
    """Text that the exported checkpoint writes after ``prompt``, greedy, with transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    with without_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(model_folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    output = cast(Any, model).generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))
