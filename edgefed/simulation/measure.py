"""What a finished federation achieved: held-out loss of every kept global model, on the full model."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from edgefed.expert_records import ActivationProfile, ExpertPlan
from edgefed.moe.model import MoeModel
from edgefed.moe.units import LORA_SUFFIX
from edgefed.runs import RunReader
from edgefed.trainer.planner import PLAN_FILE
from edgefed.training.data import Example
from edgefed.training.encoding import encode_examples
from edgefed.training.evaluate import evaluate_loss
from edgefed.training.profiling import spread_blocks
from edgefed.training.steps import train_scope
from edgefed.training.tokenizer import load_tokenizer


def held_out_losses(
    run_folder: Path,
    held_out: Mapping[str, Sequence[Example]],
    *,
    sequence_length: int,
    batch_size: int = 8,
    max_tokens: int = 8192,
    rounds: Sequence[int] | None = None,
) -> dict[str, list[float]]:
    """Loss of the global model at the start of each kept round and after the last one, {client: [loss, ...]}.

    ``rounds`` names the manifests to look at instead: 1 is the model before the first round.

    The whole model is evaluated, every expert streamed from the run's blobs, so the numbers of all methods and budgets
    compare. ``held_out``: {client: examples}.
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
    return losses


def read_plan(client_folder: Path) -> tuple[ActivationProfile | None, ExpertPlan]:
    """The profile and plan that an agent keeps in its state folder."""
    saved = json.loads((client_folder / PLAN_FILE).read_text())
    profile = ActivationProfile.from_dict(saved["profile"]) if saved["profile"] else None
    return profile, ExpertPlan.from_dict(saved["plan"])
