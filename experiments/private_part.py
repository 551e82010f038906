"""What a private part brings: `slices` with and without private adapters, and each client alone, on the demo's clients.

    python experiments/private_part.py run --work DIR --seeds 0 1 2
    python experiments/private_part.py table

Four clients hold 100, 50, 25 and 12 % of the neurons, each with another silo of the packaged text; all take 48 steps.
"Alone" trains the same slices without an exchange. A seed changes the order of the records and the first adapters.
Every finished run is one line of results/private_part.jsonl; runs that are there are not repeated. Losses are in nats
per token on held-out records: `device` of what a device holds after its last step, with its private part; `global` of
the global model, and `own` of the global model with the client's private part.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch
from recording import add_arguments, interval, play, read_rows, record

from edgefed.hardware.profiles import effective, find_profile
from edgefed.methods.registry import register
from edgefed.methods.slices import Slices
from edgefed.moe.adapters import low_rank_product
from edgefed.progress import counted
from edgefed.protocol.messages import TrainingConfig
from edgefed.simulation.config import LINKS, MethodChoice, SimulatedDevice, SimulationConfig
from edgefed.simulation.demo import CLIENT_SILOS, SHARES
from edgefed.trainer.private_part import load_private
from edgefed.training.encoding import encode_examples
from edgefed.training.loss import evaluate_loss
from edgefed.training.profiling import spread_blocks
from edgefed.training.steps import train_scope

RESULTS = Path(__file__).parent / "results" / "private_part.jsonl"
ROUNDS, LOCAL_STEPS, BATCH_SIZE, SEQUENCE_LENGTH = 4, 12, 4, 128
LEARNING_RATE, EVALUATION_TOKENS = 1e-3, 2048
VARIANTS = ("alone", "slices", "adapter")


@register
@dataclasses.dataclass(frozen=True)
class SlicesAlone(Slices):
    """`Slices` without an exchange."""

    name = "slices_alone"
    exchanges = False


@dataclasses.dataclass(frozen=True)
class Run:
    """One variant with one seed."""

    variant: str
    seed: int


def measure(run: Run, work: Path) -> dict:
    """Simulate one run; returns its losses by client."""
    device, count = effective(find_profile("rtx-4090"), {}, None), len(SHARES)  # any with room for the whole model
    fleet = tuple(
        SimulatedDevice(
            silo, device, LINKS["lan"], f"silo:{silo}", expert_share=share,
            private="adapter" if run.variant == "adapter" else "none",
        )
        for silo, share in zip(CLIENT_SILOS, SHARES, strict=False)
    )  # fmt: skip
    training = TrainingConfig(
        local_steps=LOCAL_STEPS, batch_size=BATCH_SIZE, sequence_length=SEQUENCE_LENGTH, learning_rate=LEARNING_RATE,
        evaluation_tokens=EVALUATION_TOKENS, evaluation_share=1.0, evaluate_every=ROUNDS, profile_tokens=2048,
    )  # fmt: skip
    config = SimulationConfig(
        fleet=fleet, methods=(MethodChoice("slices_alone" if run.variant == "alone" else "slices"),), rounds=ROUNDS,
        seed=run.seed, training=training, evaluation_tokens=EVALUATION_TOKENS, evaluate_devices=True,
    )  # fmt: skip
    states = {silo: work / "out" / config.methods[0].label / "clients" / f"client-{index:04d}" / "state"
              for index, silo in enumerate(CLIENT_SILOS[:count])}  # fmt: skip

    def score(module: torch.nn.Module, tokenizer: object, held_out: Mapping[str, Collection]) -> dict[str, float]:
        found = {}
        for silo, examples in held_out.items():
            adapters = load_private(states[silo], f"simulated-{run.seed}")
            if adapters:
                blocks = spread_blocks(encode_examples(examples, tokenizer, SEQUENCE_LENGTH), EVALUATION_TOKENS)
                with added(module, adapters, train_scope(training).lora_scale):
                    found[silo] = evaluate_loss(module, blocks, BATCH_SIZE)
        return found

    found = play(config, work / "out", score)
    last = found.rounds[-1]
    return {
        "device": statistics.mean(last.clients[silo].device_losses[1] for silo in states),
        "global": last.loss,
        "device_by_client": [last.clients[silo].device_losses[1] for silo in states],
        "global_before_by_client": [found.first.losses[silo] for silo in states],
        "global_by_client": [last.losses[silo] for silo in states],
        "own_by_client": [last.metrics[silo] for silo in states] if last.metrics else None,
    }


class added:
    """Adds adapters, as `load_private` returns them, to the weights of a module within its context."""

    def __init__(self, module: torch.nn.Module, adapters: Mapping[str, Mapping[str, torch.Tensor]], scale: float):
        self._changes = []
        for key, tensors in adapters.items():
            (first,), (second,) = (
                [value for name, value in tensors.items() if name.endswith(end)] for end in ("lora_a", "lora_b")
            )
            change = low_rank_product(first, second, scale)
            self._changes.append((module.get_parameter(key.removesuffix(":lora")), change))
        self._saved = [parameter.detach().clone() for parameter, _ in self._changes]

    @torch.no_grad()
    def __enter__(self) -> None:
        for parameter, change in self._changes:
            parameter += change.to(parameter.dtype)

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        for (parameter, _), saved in zip(self._changes, self._saved, strict=True):
            parameter.copy_(saved)


def table(rows: Iterable[Mapping]) -> str:
    """Losses by client, means over the seeds that all variants have, and paired differences to "alone", as Markdown."""
    found = {(row["variant"], row["seed"]): row for row in rows}
    variants = [name for name in VARIANTS if any(own == name for own, _ in found)]
    seeds = sorted(set.intersection(*({seed for own, seed in found if own == name} for name in variants)))
    shares = " | ".join(f"{share:.0%}" for share in SHARES)
    lines = [
        f"| losses, {counted(len(seeds), 'seed')} | {shares} | mean | above alone |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    base = [found["alone", seed]["device_by_client"] for seed in seeds]
    kinds = (("on the device", "device_by_client"), ("global model", "global_by_client"),
             ("global model with the private part", "own_by_client"))  # fmt: skip
    for name in variants:
        for label, kind in kinds:
            losses = [found[name, seed][kind] for seed in seeds]
            if None in losses or (name, kind) == ("alone", "global_by_client"):
                continue
            columns = [statistics.mean(values) for values in zip(*losses, strict=True)]
            means = [statistics.mean(values) for values in losses]
            mean, half = interval([own - statistics.mean(alone) for own, alone in zip(means, base, strict=True)])
            half_text = f" ± {half:.3f}" if math.isfinite(half) else ""
            above = "" if name == "alone" else f"{mean:+.3f}{half_text}"
            numbers = " | ".join(f"{value:.3f}" for value in (*columns, statistics.mean(means)))
            lines.append(f"| {name}, {label} | {numbers} | {above} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "table"))
    add_arguments(parser, RESULTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    arguments = parser.parse_args()
    if arguments.action == "table":
        print(table(read_rows(arguments.json)))
        return
    if not arguments.work:
        parser.error("--work is needed")
    plans = [Run(variant, seed) for seed in arguments.seeds for variant in arguments.variants]
    record(plans, measure, arguments.json, arguments.work)


if __name__ == "__main__":
    main()
