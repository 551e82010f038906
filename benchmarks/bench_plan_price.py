"""What a plan costs in loss: experts or neurons left out, frozen experts quantized, fewer trained, shorter sequences.

    python benchmarks/bench_plan_price.py --json benchmarks/results/plan_price.json

The packaged model on some silos; `edgefed.costs.price` has its constants from these rows. All losses are in nats per
token on held-out text, at the full sequence length.

    hold        loss above the full model before training, with a share of the experts (the most frequent) or of the
                neurons (`slices`); ``dropped``: mean over layers of the share of routed tokens whose expert is absent,
                or of the layer's energy whose neurons are
    storage     loss above the full model with every expert in INT8 or NF4
    training    gain of some steps with every expert resident, of which a share trains; ``trained``: mean over layers of
                the share of routed tokens whose expert trains
    sequence    gain of as many steps with shorter sequences
    rank        gain of as many steps with adapters of all experts, of the run's rank and smaller ones (`--only rank`)
    check       held-out loss after training of the planner's plan in a given memory, and of ten others that fit
                (`--only check`); ``expected``: by `edgefed.costs.price`
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch
from provenance import provenance

from edgefed.costs.fallbacks import fit
from edgefed.costs.memory import training_memory
from edgefed.costs.price import GAIN, LossPrice
from edgefed.costs.search import FallbackSearch
from edgefed.costs.step_setup import StepPlan
from edgefed.embedded import resolve_model
from edgefed.expert_records import ActivationProfile, ExpertPlan
from edgefed.methods.baselines import FrequentExperts
from edgefed.methods.interface import FIRST_ROUND, DeviceBudget
from edgefed.methods.slices import Slices
from edgefed.moe.model import MoeModel
from edgefed.moe.units import MemorySource
from edgefed.protocol.messages import TrainingConfig
from edgefed.trainer.expert_choice import method_layout
from edgefed.training.data import load_corpus
from edgefed.training.encoding import encode_examples
from edgefed.training.loss import evaluate_loss
from edgefed.training.profiling import profile_blocks, spread_blocks
from edgefed.training.steps import run_steps, step_setup, train_scope
from edgefed.training.tokenizer import load_tokenizer

SILOS = ("email", "topics", "http")
HELD = (0.75, 0.5, 0.25, 0.12)
TRAINED = (1.0, 0.5, 0.25, 0.125, 0.0625)
LENGTHS = (64, 32)
RANKS = (8, 4, 2, 1)
"""Of adapters; the first is the run's."""
STEPS, BATCH_SIZE, SEQUENCE_LENGTH, LEARNING_RATE, ADAPTER_RATE = 30, 8, 128, 1e-3, 5e-3
PROFILE_TOKENS, EVALUATION_TOKENS = 4096, 4096


class Silo:
    """A silo's text and the packaged model, with its weights as they were."""

    def __init__(self, silo: str):
        source = resolve_model("tiny")
        self.silo, self.model, tokenizer = silo, MoeModel.from_checkpoint(source), load_tokenizer(source)
        self.training = TrainingConfig(
            local_steps=STEPS, batch_size=BATCH_SIZE, sequence_length=SEQUENCE_LENGTH, learning_rate=LEARNING_RATE
        )
        units = {}
        for training in (self.training, msgspec.structs.replace(self.training, experts="lora")):
            for info, unit in self.model.iter_units(train_scope(training)):
                units[info.key] = {name: tensor.clone() for name, tensor in unit.items()}
        self.units = MemorySource(units)
        corpus = load_corpus(f"silo:{silo}", 0.1, 0)
        self.train = encode_examples(corpus.train, tokenizer, SEQUENCE_LENGTH)
        self.held_out = spread_blocks(encode_examples(corpus.held_out, tokenizer, SEQUENCE_LENGTH), EVALUATION_TOKENS)
        self.profile: ActivationProfile = profile_blocks(
            self.model, spread_blocks(self.train, PROFILE_TOKENS), self.units, neurons=True
        )
        self.sizes = self.profile.experts_per_layer
        self.full = self.loss(ExpertPlan.full(self.sizes))

    def place(
        self, plan: ExpertPlan, training: TrainingConfig, storage: str | None = None, rank: int = 0
    ) -> None:  # fmt: skip
        """The model with its first weights and this plan."""
        for unit in self.model.unit_infos(train_scope(self.training)):
            if unit.kind != "expert":
                self.model.load_unit(unit.key, self.units.read(unit.key))
        self.model.apply_plan(plan, self.units, train_scope(training, rank), storage=storage)

    def loss(self, plan: ExpertPlan, storage: str | None = None) -> float:
        """Held-out loss before training."""
        self.place(plan, self.training, storage)
        return evaluate_loss(self.model.module, self.held_out, BATCH_SIZE)

    def gain(self, plan: ExpertPlan, rank: int = 0, **changes: object) -> float:
        """How much the loss falls by training; ``changes`` of the training's settings. ``rank``: of `train_scope`."""
        training = msgspec.structs.replace(self.training, **changes)
        self.place(plan, training, rank=rank)
        setup = step_setup(self.model, training)
        run_steps(self.model, plan, FrequentExperts(), self.train, training, compute_share=1.0, seed=0, setup=setup)
        return self.full - evaluate_loss(self.model.module, self.held_out, BATCH_SIZE)

    def most_frequent(self, count: int) -> ExpertPlan:
        """The plan with the ``count`` most frequent experts, trainable."""
        rng = np.random.default_rng(0)
        return FrequentExperts().plan_experts(self.profile, self.sizes, DeviceBudget(count), rng)

    def mass(self, plan: ExpertPlan) -> float:
        """Mean over layers of the share of routed tokens whose expert is resident."""
        shares = [layer.frequency / layer.frequency.sum() for layer in self.profile.layers]
        return float(np.mean([share[plan.resident(number)].sum() for number, share in enumerate(shares)]))


def measure(silo: Silo) -> list[dict]:
    """All rows of one silo."""
    rows: list[dict] = []
    total, rng = sum(silo.sizes), np.random.default_rng(0)

    def add(kind: str, **facts: object) -> None:
        rows.append({"kind": kind, "silo": silo.silo, **facts})
        print(rows[-1], flush=True)

    for share in HELD:
        count = max(len(silo.sizes), int(share * total))
        plan = silo.most_frequent(count)
        add("hold", what="experts", share=share, dropped=1 - silo.mass(plan), loss=silo.loss(plan) - silo.full)
        plan = Slices().plan_experts(silo.profile, silo.sizes, DeviceBudget(count), rng)
        energy = [layer.neuron_energy for layer in silo.profile.layers]
        kept = np.mean([(e * m).sum() / e.sum() for e, m in zip(energy, plan.neurons, strict=True)])
        roots = np.mean([(np.sqrt(e) * m).sum() / np.sqrt(e).sum() for e, m in zip(energy, plan.neurons, strict=True)])
        add("hold", what="neurons", share=share, dropped=1 - float(kept), dropped_roots=1 - float(roots),
            loss=silo.loss(plan) - silo.full)  # fmt: skip
    everything = ExpertPlan.full(silo.sizes)
    for storage in ("int8", "nf4"):
        frozen = ExpertPlan.of(silo.sizes, [[]] * len(silo.sizes), [range(size) for size in silo.sizes])
        add("storage", storage=storage, loss=silo.loss(frozen, storage) - silo.full)
    for share in TRAINED:
        trained = silo.most_frequent(max(len(silo.sizes), int(share * total)))
        frozen = [np.setdiff1d(np.arange(size), trained.resident(layer)) for layer, size in enumerate(silo.sizes)]
        plan = ExpertPlan.of(silo.sizes, [trained.resident(layer) for layer in range(len(silo.sizes))], frozen)
        add("training", experts="full", share=share, trained=silo.mass(trained), gain=silo.gain(plan))
    add("training", experts="lora", share=1.0, trained=1.0,
        gain=silo.gain(everything, experts="lora", learning_rate=ADAPTER_RATE))  # fmt: skip
    for length in LENGTHS:
        add("sequence", length=length, gain=silo.gain(everything, sequence_length=length, batch_size=BATCH_SIZE))
    return rows


def measure_ranks(silo: Silo) -> list[dict]:
    """The rows of smaller ranks of adapters of one silo."""
    rows = []
    for rank in RANKS:
        gain = silo.gain(ExpertPlan.full(silo.sizes), rank, experts="lora", learning_rate=ADAPTER_RATE)
        rows.append({"kind": "rank", "silo": silo.silo, "rank": rank, "gain": gain})
        print(rows[-1], flush=True)
    return rows


def rank_halving(rows: Sequence[dict], gain: float) -> float:
    """The share of ``gain`` that each halving of the rank costs: least squares through the run's rank."""
    means = {rank: np.mean([row["gain"] for row in rows if row["rank"] == rank]) for rank in RANKS}
    halvings = np.log2([RANKS[0] / rank for rank in RANKS[1:]])
    lost = np.array([means[RANKS[0]] - means[rank] for rank in RANKS[1:]]) / gain
    return float(halvings @ lost / (halvings @ halvings))


MEMORY_SHARES = (0.4,)
"""Memory of a check, as a share of what the full plan needs."""
OTHER_PLANS = tuple((storage, share) for storage in (None, "nf4") for share in (1.0, 0.75, 0.5, 0.35, 0.2))
"""Storage of frozen experts and share of the experts that are resident; as many train as fit."""


def check(silo: Silo) -> list[dict]:
    """The planner's plan against others, measured."""
    from edgefed.moe.model_shape import shape_from_config

    shape, total = shape_from_config(silo.model.config, "tiny"), sum(silo.sizes)
    layout = method_layout(FrequentExperts(), silo.profile, silo.sizes, FIRST_ROUND)
    search = FallbackSearch(
        estimate=lambda setup, resident, trainable: training_memory(shape, setup, resident, trainable),
        layout=layout, price=LossPrice.of(silo.profile, silo.sizes, SEQUENCE_LENGTH), num_layers=len(silo.sizes),
        run_sequence_length=SEQUENCE_LENGTH, problems={"adamw_8bit": "not installed"},
    )  # fmt: skip
    wanted = StepPlan(step_setup(silo.model, silo.training), total, total)
    rows = []

    def measured(plan: StepPlan, **facts: object) -> None:
        setup = plan.setup
        silo.place(layout(plan.resident, plan.trainable), silo.training, setup.expert_storage)
        experts = layout(plan.resident, plan.trainable)
        run_steps(silo.model, experts, FrequentExperts(), silo.train, silo.training, compute_share=1.0, seed=0,
                  setup=setup)  # fmt: skip
        loss = evaluate_loss(silo.model.module, silo.held_out, BATCH_SIZE)
        rows.append({
            "kind": "check", "silo": silo.silo, **facts, "resident": plan.resident, "trainable": plan.trainable,
            "storage": setup.expert_storage, "length": setup.sequence_length, "expected": search.cost(plan),
            "loss": loss,
        })  # fmt: skip
        print(rows[-1], flush=True)

    for share in MEMORY_SHARES:
        usable = int(share * search.needs_bytes(wanted))
        chosen, _ = fit(search, wanted, usable)
        measured(chosen, memory=share, chosen=True)
        for storage, resident in OTHER_PLANS:
            setup = dataclasses.replace(chosen.setup, expert_storage=storage, sequence_length=SEQUENCE_LENGTH)
            count = max(len(silo.sizes), int(resident * total))
            plans = (StepPlan(setup, count, trains) for trains in range(count, len(silo.sizes) - 1, -1))
            if other := next((plan for plan in plans if search.needs_bytes(plan) <= usable), None):
                measured(other, memory=share, chosen=False)
    return rows


def fitted(rows: Sequence[dict]) -> dict[str, float]:
    """The constants of `edgefed.costs.price`: least squares of the losses, pooled over silos."""

    def power(pairs: list[tuple[float, float]]) -> tuple[float, float]:
        """(a, p) of y = a x^p."""
        from scipy.optimize import curve_fit

        x, y = np.array(pairs).T
        (a, p), _ = curve_fit(lambda x, a, p: a * x**p, x, y, p0=(1.0, 1.0))
        return float(a), float(p)

    found: dict[str, float] = {}
    for what, dropped in (("experts", "dropped"), ("neurons", "dropped_roots")):
        pairs = [(row[dropped], row["loss"]) for row in rows if row.get("what") == what]
        found[f"{what}_factor"], found[f"{what}_power"] = power(pairs)
    for storage in ("int8", "nf4"):
        found[storage] = float(np.mean([row["loss"] for row in rows if row.get("storage") == storage]))
    full = {row["silo"]: row["gain"] for row in rows if row.get("experts") == "full" and row["share"] == 1}
    found["gain"] = float(np.mean(list(full.values())))
    gains: dict[float, list[tuple[float, float]]] = {}  # means over silos: some gain little, and their ratios are noise
    for row in rows:
        if row.get("experts") == "full":
            gains.setdefault(row["share"], []).append((row["trained"], row["gain"]))
    means = [np.mean(pairs, axis=0) for pairs in gains.values()]
    found["training_power"] = power([(float(trained), float(gain) / found["gain"]) for trained, gain in means])[1]

    def mean_gain(**facts: object) -> float:
        return float(np.mean([row["gain"] for row in rows if facts.items() <= row.items()]))

    found["adapters"] = mean_gain(experts="lora") / found["gain"]
    halvings = [(1 - mean_gain(kind="sequence", length=length) / found["gain"]) / np.log2(SEQUENCE_LENGTH / length)
                for length in LENGTHS]  # fmt: skip
    found["halving"] = float(np.mean(halvings))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--silos", nargs="+", default=list(SILOS))
    parser.add_argument("--only", choices=("check", "rank"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    action = {"check": check, "rank": measure_ranks}.get(args.only, measure)
    rows = [row for silo in args.silos for row in action(Silo(silo))]
    if args.only == "rank":
        print(rank_halving(rows, GAIN))
    if not args.only:
        print(json.dumps(fitted(rows), indent=1))
    if args.json:
        args.json.write_text(json.dumps({**provenance(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
