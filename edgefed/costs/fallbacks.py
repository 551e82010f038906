"""The search of savings: what is given up, in which order, when a training step does not fit its memory. Pure.

    1 chunked loss -> 2 checkpointing -> 3 8-bit optimizer -> 4 experts in NF4 -> 5 shorter sequence
      -> 6 fewer trained -> 7 fewer held

A method that offloads its experts (`edgefed.methods.interface.Requirements.offloading`) has one more between 4 and 5.

`fit` goes down until a memory model says that the step fits: that makes a plan before anything is loaded. `next_fallback`
goes down by one that frees memory: that is what the guard and an out-of-memory do in the middle of a round. Rungs 1 to
3 change neither loss nor gradients (8-bit moments: hardly), 4 rounds the weights that do not learn to 4 bits and loads
them anew (with adapters, those of all experts: QLoRA), 5 shortens the context, 6 and 7 change the plan.

Which experts go is not decided here: ``layout(held, trained)`` gives the plan of so many experts by the method's own
ranking, so the least important ones go first. No layer ever has less than one, and it trains.

Fallback 6 turns trained experts into frozen ones: the forward pass keeps them, their gradients and moments are gone. It is
taken where training costs more than holding, as in full training; with adapters it frees next to nothing, and fallback 7
takes an expert with its adapter instead. It stops at a quarter of what is held, and fallback 7 keeps that share: a device
that held everything and trained one expert a layer would fit as well, but have nothing to give to the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping

from edgefed.costs.memory import MemoryEstimate
from edgefed.costs.step_setup import CHUNK_TOKENS, StepSetup
from edgefed.errors import BudgetTooSmall
from edgefed.expert_records import ExpertPlan
from edgefed.hardware.memory import format_bytes

SHORTEST_SEQUENCE = 32
"""Tokens. Below it a block holds hardly a sentence, and its first token is never learned from."""

SEQUENCE_SHARE = 4
"""Blocks are never shorter than a quarter of what the run asks for: its devices should still learn alike."""

STEP_SHARE = 4
"""In the middle of a round a fallback of experts gives up a quarter of them: fourteen such steps from 64 to 4."""

TRAINED_SHARE = 4
"""Freezing stops when a quarter of the experts held is trained."""

WORTH = 1.05
"""A saving beside fewer experts must leave 5 % more of them, or it is not worth its time or its shorter context."""


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """What a device does in a step: how, and with how many experts over all layers."""

    setup: StepSetup
    held: int
    trained: int

    def rank(self) -> tuple:
        """Order on one search: a higher load stands higher. For loads of the same run only."""
        setup = self.setup
        savings = (setup.expert_storage is None, setup.optimizer == "adamw", not setup.checkpointing)
        savings += (not setup.chunked_loss, not setup.offload)
        return (self.held, self.trained, setup.sequence_length, *savings)


@dataclasses.dataclass(frozen=True)
class Fallback:
    """One step down. ``sentence`` is for the owner; ``saved_bytes`` at the step's peak, as the memory model has it.
    ``keeps_plan``: what is loaded stays as it is, and the steps that follow may be done so.
    """

    name: str
    load: StepPlan
    saved_bytes: int
    sentence: str
    keeps_plan: bool


@dataclasses.dataclass(frozen=True)
class FallbackSearch:
    """What a run, a model and a device make of the search.

    ``estimate(setup, kept, trainable)``: the step's peak, experts per layer. ``layout(held, trained)``: the plan of so many
    experts. ``problems``: savings that are not to be had, {"chunked_loss" | "checkpointing" | "adamw_8bit" |
    "nf4_experts": why}. ``all_experts``: the method trains all or nothing, so fallbacks 6 and 7 are not there.
    ``may_offload``: experts may lie away from the processor.
    """

    estimate: Callable[[StepSetup, list[int], list[int]], MemoryEstimate]
    layout: Callable[[int, int], ExpertPlan]
    num_layers: int
    run_sequence_length: int
    problems: Mapping[str, str] = dataclasses.field(default_factory=dict)
    all_experts: bool = False
    may_offload: bool = False

    def memory(self, load: StepPlan) -> MemoryEstimate:
        """The peak of a training step under ``load``."""
        plan = self.layout(load.held, load.trained)
        layers = range(plan.num_layers)
        return self.estimate(
            load.setup, [plan.num_slots(layer) for layer in layers], [len(plan.trainable(layer)) for layer in layers]
        )

    def needs_bytes(self, load: StepPlan) -> int:
        return self.memory(load).total_bytes

    @property
    def shortest_sequence(self) -> int:
        return min(self.run_sequence_length, max(SHORTEST_SEQUENCE, self.run_sequence_length // SEQUENCE_SHARE))


def fit(search: FallbackSearch, wanted: StepPlan, usable_bytes: int) -> tuple[StepPlan, list[Fallback]]:
    """The highest load, from ``wanted`` down, that fits; and the fallbacks that were taken to it.

    A fallback that turns out to be of no use beside those below it is not taken: a shorter sequence does not help where the
    optimizer is the peak. Raises BudgetTooSmall when nothing fits, naming what the least would need.
    """
    load = wanted
    setups = [wanted.setup, *(setup for _, setup, _ in _setup_fallbacks(search, wanted.setup))]
    for setup in setups:
        load = dataclasses.replace(wanted, setup=setup)
        if search.needs_bytes(load) <= usable_bytes:
            break
    else:
        least = load if search.all_experts else StepPlan(load.setup, search.num_layers, search.num_layers)
        if search.needs_bytes(least) > usable_bytes:
            raise _nothing_fits(search, least, usable_bytes)
        found = [_most_experts(search, dataclasses.replace(wanted, setup=setup), usable_bytes) for setup in setups]
        most = max(each.held + each.trained for each in found if each)
        load = next(each for each in found if each and WORTH * (each.held + each.trained) >= most)
    for field in reversed(_FIELD_OF.values()):  # the dearest first
        for setup in setups:  # from no saving to all
            undone = dataclasses.replace(load, setup=dataclasses.replace(load.setup, **{field: getattr(setup, field)}))
            if search.needs_bytes(undone) <= search.needs_bytes(load):
                load = undone
                break
    return load, _path(search, wanted, load)


def next_fallback(search: FallbackSearch, load: StepPlan) -> Fallback | None:
    """The next step down from ``load`` that frees memory, whatever is usable; None at the end of the search."""
    need = search.needs_bytes(load)
    for name, setup, sentence in _setup_fallbacks(search, load.setup):
        field = _FIELD_OF[name]
        other = dataclasses.replace(load, setup=dataclasses.replace(load.setup, **{field: getattr(setup, field)}))
        after = search.needs_bytes(other)
        if after < need:
            return _fallback(name, other, need - after, sentence, keeps_plan=name not in _PLACED_ANEW)
    if search.all_experts:
        return None
    for name in ("fewer trained", "fewer held"):
        for other in _fewer(search, load, name):
            after = search.needs_bytes(other)
            if after < need:
                return _fallback(name, other, need - after, _expert_sentence(name, load, other), keeps_plan=False)
    return None


def describe(load: StepPlan, total: int) -> str:
    """A load in a few words: ``12 of 64 experts held, 8 trained; checkpointing, sequences of 64``."""
    setup = load.setup
    savings = [
        word
        for on, word in (
            (setup.chunked_loss, "chunked loss"),
            (setup.checkpointing, "checkpointing"),
            (setup.optimizer != "adamw", "8-bit optimizer"),
            (setup.expert_storage is not None, f"experts in {(setup.expert_storage or '').upper()}"),
            (setup.offload, "experts offloaded"),
        )
        if on
    ]
    trained = "" if load.trained == load.held else f", {load.trained} trained"
    return f"{load.held} of {total} experts held{trained}" + (f"; {', '.join(savings)}" if savings else "")


# --- fallbacks 1 to 5: how a step is done -----------------------------------------------------------------------------

_PACKING, _OFFLOADING = "experts in NF4", "offloaded experts"
_PLACED_ANEW = (_PACKING, _OFFLOADING)
_FIELD_OF = {
    "chunked loss": "chunked_loss",
    "checkpointing": "checkpointing",
    "8-bit optimizer": "optimizer",
    _PACKING: "expert_storage",
    _OFFLOADING: "offload",
    "shorter sequence": "sequence_length",
}
"""Fallback -> what it changes in a setup."""


def _setup_fallbacks(search: FallbackSearch, setup: StepSetup) -> Iterator[tuple[str, StepSetup, str]]:
    """(name, setup with this fallback on top of all before it, sentence) of each fallback below ``setup`` that exists here."""
    if not setup.chunked_loss and "chunked_loss" not in search.problems:
        setup = dataclasses.replace(setup, chunked_loss=True)
        yield "chunked loss", setup, f"loss computed {CHUNK_TOKENS} tokens at a time"
    if not setup.checkpointing and "checkpointing" not in search.problems:
        setup = dataclasses.replace(setup, checkpointing=True)
        yield "checkpointing", setup, "activation checkpointing on"
    if setup.optimizer == "adamw" and "adamw_8bit" not in search.problems:
        setup = dataclasses.replace(setup, optimizer="adamw_8bit")
        yield "8-bit optimizer", setup, "8-bit optimizer"
    if setup.expert_storage is None and "nf4_experts" not in search.problems:
        setup = dataclasses.replace(setup, expert_storage="nf4")
        yield _PACKING, setup, "experts' weights that do not learn kept in 4 bits (NF4)"
    if search.may_offload and not setup.offload:
        setup = dataclasses.replace(setup, offload=True)
        yield _OFFLOADING, setup, "experts offloaded, each brought in when a token needs it"
    while setup.sequence_length // 2 >= search.shortest_sequence:
        length = setup.sequence_length
        setup = dataclasses.replace(setup, sequence_length=length // 2)
        yield "shorter sequence", setup, f"sequences of {length // 2} tokens instead of {length}"


def _path(search: FallbackSearch, wanted: StepPlan, load: StepPlan) -> list[Fallback]:
    """The fallbacks from ``wanted`` to ``load``, each with what it saves behind those before it."""
    taken, at, need = [], wanted, search.needs_bytes(wanted)

    def step(name: str, other: StepPlan, sentence: str, keeps_plan: bool) -> None:
        nonlocal at, need
        after = search.needs_bytes(other)
        taken.append(_fallback(name, other, max(0, need - after), sentence, keeps_plan=keeps_plan))
        at, need = other, after

    for name, setup, sentence in _setup_fallbacks(search, wanted.setup):
        field = _FIELD_OF[name]
        value = getattr(setup, field)
        reached = getattr(load.setup, field)
        if value == reached or (field == "sequence_length" and value > reached):
            setup = dataclasses.replace(at.setup, **{field: value})
            step(name, dataclasses.replace(at, setup=setup), sentence, name not in _PLACED_ANEW)
    if load.trained < at.trained and load.trained < load.held:
        other = dataclasses.replace(at, trained=load.trained)
        step("fewer trained", other, _expert_sentence("fewer trained", at, other), False)
    if load.held < at.held:
        step("fewer held", load, _expert_sentence("fewer held", at, load), False)
    return taken


# --- fallbacks 6 and 7: experts ---------------------------------------------------------------------------------------


def _freezing_pays(search: FallbackSearch, load: StepPlan) -> bool:
    """Whether an expert that is held but not trained saves at least half of what one that is gone saves."""
    if load.setup.experts != "full" or load.held <= search.num_layers:
        return load.setup.experts == "full"
    fewer = max(search.num_layers, load.held // 2)
    all_trained = search.needs_bytes(dataclasses.replace(load, trained=load.held))
    frozen = search.needs_bytes(dataclasses.replace(load, trained=fewer))
    gone = search.needs_bytes(StepPlan(load.setup, fewer, fewer))
    return 2 * (all_trained - frozen) >= all_trained - gone


def _fewest_trained(search: FallbackSearch, held: int) -> int:
    return min(held, max(search.num_layers, -(-held // TRAINED_SHARE)))


def _with_count(search: FallbackSearch, load: StepPlan, name: str, count: int) -> StepPlan:
    if name == "fewer trained":
        return dataclasses.replace(load, trained=count)
    trained = _fewest_trained(search, count) if load.trained < load.held else count
    return dataclasses.replace(load, held=count, trained=min(load.trained, trained))


def _range(search: FallbackSearch, load: StepPlan, name: str) -> tuple[int, int]:
    """(least, current) count that a fallback of experts may take."""
    if name == "fewer trained":
        pays = _freezing_pays(search, load)
        return min(load.trained, _fewest_trained(search, load.held)) if pays else load.trained, load.trained
    return search.num_layers, load.held


def _most_experts(search: FallbackSearch, load: StepPlan, usable_bytes: int) -> StepPlan | None:
    """``load`` with as many experts as fit, trained ones given up first; None where not even one per layer fits."""
    for name in ("fewer trained", "fewer held"):
        low, high = _range(search, load, name)
        while low < high:
            middle = (low + high + 1) // 2
            if search.needs_bytes(_with_count(search, load, name, middle)) <= usable_bytes:
                low = middle
            else:
                high = middle - 1
        load = _with_count(search, load, name, low)
        if search.needs_bytes(load) <= usable_bytes:
            return load
    return None


def _fewer(search: FallbackSearch, load: StepPlan, name: str) -> Iterator[StepPlan]:
    """``load`` with ever fewer experts, a quarter at a time; nothing when it has the fewest."""
    least, current = _range(search, load, name)
    while current > least:
        current = max(least, current - max(1, current // STEP_SHARE))
        yield _with_count(search, load, name, current)


# --- words --------------------------------------------------------------------------------------------------------


def _fallback(name: str, load: StepPlan, saved_bytes: int, sentence: str, *, keeps_plan: bool) -> Fallback:
    return Fallback(name, load, saved_bytes, f"{sentence}, saves about {format_bytes(saved_bytes)}", keeps_plan)


def _expert_sentence(name: str, before: StepPlan, after: StepPlan) -> str:
    if name == "fewer trained":
        return f"{after.trained} of {after.held} experts held are trained instead of {before.trained}"
    return f"{after.held} experts held instead of {before.held}, {after.trained} trained"


def _nothing_fits(search: FallbackSearch, least: StepPlan, usable_bytes: int) -> BudgetTooSmall:
    memory = search.memory(least)
    need = memory.total_bytes
    what = (
        f"all {least.held} experts"
        if search.all_experts
        else f"one expert in each of the {search.num_layers} MoE layers"
    )
    largest = sorted(memory.parts, key=lambda part: memory.parts[part], reverse=True)[:2]
    breakdown = ", ".join(f"{format_bytes(memory.parts[part])} {part}" for part in largest)
    without = "".join(f"; without {name.replace('_', ' ')}: {why}" for name, why in sorted(search.problems.items()))
    setup = least.setup
    return BudgetTooSmall(
        f"{what} needs {format_bytes(need)} with every saving ({breakdown}; {setup.batch_size} sequences of "
        f"{setup.sequence_length} tokens), the device offers the model {format_bytes(max(0, usable_bytes))}{without}",
        remedy=f"Give the device {format_bytes(need - usable_bytes)} more (`memory`, or close other programs), lower "
        f"`batch_size` ({setup.batch_size}) or `sequence_length` on the server, or use a smaller model"
        + (" or a method that needs only some experts (hfedmoe, random)." if search.all_experts else "."),
    )
