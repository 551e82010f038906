"""Searches for a training step that fits the memory of a device: what is given up, and in which order. Pure functions.

    1 chunked loss -> 2 checkpointing -> 3 8-bit optimizer -> 3b offloaded or streamed experts
      -> experts in NF4 -> shorter sequences -> fewer trainable experts -> fewer resident experts

Fallback 3b: methods that ask for it offload all experts (`Requirements.offloading`). For others the frozen ones are
streamed, if a step does not become too slow or nothing else fits: those of as few layers as the memory needs, since the
others cost no time.

`fit` returns the best step plan that the memory model accepts; it is called before anything is loaded. It takes 1 to 3
in order, since they change neither loss nor gradients (8-bit moments: barely). If that is not enough, it chooses among
all combinations of the others the one of least expected loss (`edgefed.costs.price`): frozen experts in INT8 or NF4, a
shorter context, fewer trainable, and fewer resident experts or narrower slices.

Where the run allows smaller ranks of adapters, `fit` does all this for each of them, and takes one only if the plan is
then expected to lose less; in the middle of a round the rank stays.

`next_fallback` takes one more step down that frees memory, in the order above; the memory guard calls it in the middle
of a round.

``layout(resident, trainable)`` decides which experts stay: the method's own ranking, least important first to go. Every
layer keeps at least one expert, and it trains.

"Fewer trainable" freezes trainable experts: they stay in the forward pass, their gradients and moments go. In the
middle of a round it is used where training an expert costs more than keeping it, and stops at a quarter of the resident
experts. With adapters it frees next to nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator

from edgefed.costs.price import cheapest_counts, lossy_setups, possible_storages
from edgefed.costs.search import FallbackSearch, nothing_fits
from edgefed.costs.step_setup import CHUNK_TOKENS, StepPlan, StepSetup
from edgefed.errors import BudgetTooSmall
from edgefed.hardware.memory import format_bytes

STEP_SHARE = 4
"""In the middle of a round a fallback removes a quarter of the experts: fourteen such steps from 64 to 4."""

LEAST_FREED = 50
"""Where it is known how much is missing, a fallback frees at least a fiftieth of the peak: no restart for a trifle."""

TRAINABLE_SHARE = 4
"""Freezing stops when a quarter of the resident experts is trainable."""

MAX_SLOWDOWN = 2.0
"""Streaming may at most double the time of a step, as it did for others with a model of 30 billion parameters on a GPU
of 12 GB; where it takes longer, another saving is chosen."""

WORTH = 1.01
"""A saving is used only if without it the expected loss is more than 1 % higher."""


@dataclasses.dataclass(frozen=True)
class Fallback:
    """One step down.

    Attributes:
        name: Short name of the fallback.
        step_plan: The step plan with the fallback applied.
        saved_bytes: Bytes that the fallback frees at the step's peak, by the memory model.
        sentence: Description for the device's owner.
        keeps_plan: Loaded experts stay as they are, so that it can apply from the next step on.
    """

    name: str
    step_plan: StepPlan
    saved_bytes: int
    sentence: str
    keeps_plan: bool


def fit(search: FallbackSearch, wanted: StepPlan, usable_bytes: int) -> tuple[StepPlan, list[Fallback]]:
    """As `fit_rank`, for the adapters' rank that ``wanted`` has, or a smaller one if that makes a better plan."""
    best: StepPlan | None = None
    for rank in (wanted.setup.lora_rank, *search.smaller_ranks):
        try:
            own = dataclasses.replace(wanted, setup=dataclasses.replace(wanted.setup, lora_rank=rank))
            found, _ = fit_rank(search, own, usable_bytes)
        except BudgetTooSmall:
            if best is None and rank == min((rank, *search.smaller_ranks)):
                raise
            continue
        if best is None or WORTH * search.cost(found) < search.cost(best):
            best = found
        if search.cost(own) >= search.cost(best):  # smaller ranks cost more than all that they could save
            break
    assert best is not None, "the smallest rank fits, or raises"
    return best, _path(search, wanted, best)


def fit_rank(search: FallbackSearch, wanted: StepPlan, usable_bytes: int) -> tuple[StepPlan, list[Fallback]]:
    """The best step plan that fits into ``usable_bytes``, at most ``wanted``, and the fallbacks that lead to it.

    A fallback that has no effect beside later ones is undone: a shorter sequence does not help where the optimizer is
    the peak. Experts are streamed if nothing else fits, or if this leaves more experts or longer sequences and a step
    does not become too slow; in INT8 or NF4 if it is too slow otherwise, since fewer bytes are read then. If every way
    is too slow and nothing else fits, the quickest is taken.

    Raises:
        BudgetTooSmall: Nothing fits; the message says what the smallest plan would need.
    """
    if not search.may_stream:
        found = _fit(search, wanted, usable_bytes)
    elif wanted.setup.streamed_layers:
        found = _streamed(search, wanted, usable_bytes)
    else:
        try:
            found = _fit(dataclasses.replace(search, may_stream=False), wanted, usable_bytes)
        except BudgetTooSmall:
            found = _streamed(search, wanted, usable_bytes)
        else:
            if WORTH * search.cost(wanted) < search.cost(found):
                streamed = _streamed(search, wanted, usable_bytes)
                if WORTH * search.cost(streamed) < search.cost(found) and search.slowdown(streamed) <= MAX_SLOWDOWN:
                    found = streamed
    return found, _path(search, wanted, found)


def _streamed(search: FallbackSearch, wanted: StepPlan, usable_bytes: int) -> StepPlan:
    """The best plan that streams and is not too slow, with any storage of frozen experts; else the quickest.

    Raises BudgetTooSmall.
    """

    def best(storage: str | None) -> StepPlan:
        setup = dataclasses.replace(wanted.setup, expert_storage=storage)
        found = _fit(search, dataclasses.replace(wanted, setup=setup), usable_bytes)
        return _least_streamed(search, found, usable_bytes, wanted.setup.streamed_layers)

    def order(plan: StepPlan) -> tuple[float, float]:
        return max(MAX_SLOWDOWN, search.slowdown(plan)), search.cost(plan)

    storage, *others = possible_storages(wanted.setup, search.problems)
    plans = [best(storage)]  # it may have chosen another storage itself
    for smaller in others if search.slowdown(plans[0]) > MAX_SLOWDOWN else ():
        with contextlib.suppress(BudgetTooSmall):
            plans.append(best(smaller))
    return min(plans, key=order)


def _least_streamed(search: FallbackSearch, step_plan: StepPlan, usable_bytes: int, least: int = 0) -> StepPlan:
    """``step_plan``, which fits into ``usable_bytes``, with as few streamed layers as fit, at least ``least``."""
    for count in range(least, step_plan.setup.streamed_layers):
        fewer = dataclasses.replace(step_plan, setup=dataclasses.replace(step_plan.setup, streamed_layers=count))
        if search.needs_bytes(fewer) <= usable_bytes:
            return fewer
    return step_plan


def _fit(search: FallbackSearch, wanted: StepPlan, usable_bytes: int) -> StepPlan:
    """`fit`, whatever the time of a step."""
    setups = [wanted.setup, *(setup for _, setup, _ in _setup_fallbacks(search, wanted.setup))]
    kept = (wanted.setup.expert_storage, wanted.setup.sequence_length)
    exact = [setup for setup in setups if (setup.expert_storage, setup.sequence_length) == kept]
    options = [dataclasses.replace(wanted, setup=setup) for setup in exact]
    fitting = (option for option in options if search.needs_bytes(option) <= usable_bytes)
    found = next(fitting, None) or _cheapest(search, wanted, exact, usable_bytes)
    if found is None:
        least = wanted if search.all_experts else StepPlan(wanted.setup, search.num_layers, search.num_layers)
        raise nothing_fits(search, dataclasses.replace(least, setup=setups[-1]), usable_bytes)
    for field in reversed(_FIELD_OF.values()):  # the most costly first
        for setup in setups:  # from no saving to all
            undone = dataclasses.replace(found, setup=_with_field_of(found.setup, setup, field))
            if search.needs_bytes(undone) <= search.needs_bytes(found) and search.cost(undone) <= search.cost(found):
                found = undone
                break
    return found


def next_fallback(search: FallbackSearch, step_plan: StepPlan, missing_bytes: int = 0) -> Fallback | None:
    """The first step down from ``step_plan`` that frees ``missing_bytes``, whatever the budget; None: nothing is left.

    The first single fallback of 1 to 5 that frees enough; else several together, and as few experts as needed. If
    nothing frees enough, the smallest plan. With 0 it is unknown how much is missing: the first fallback that frees
    anything, or a quarter fewer experts.
    """
    need = search.needs_bytes(step_plan)
    goal = need - (max(missing_bytes, need // LEAST_FREED) if missing_bytes > 0 else 1)
    for name, setup, sentence in _setup_fallbacks(search, step_plan.setup):
        other = dataclasses.replace(step_plan, setup=_with_field_of(step_plan.setup, setup, _FIELD_OF[name]))
        after = search.needs_bytes(other)
        if name == _STREAMING and after <= goal:
            other = _least_streamed(search, other, goal)
            after, sentence = search.needs_bytes(other), _streaming_sentence(search, other.setup)
            if search.slowdown(other) > MAX_SLOWDOWN:
                continue
        if after <= goal:
            return _fallback(name, other, need - after, sentence, keeps_plan=name not in _RELOADS_EXPERTS)
    if missing_bytes > 0:
        return _together(search, step_plan, goal)
    if search.all_experts:
        return None
    for name in (_FEWER_TRAINABLE, _FEWER_RESIDENT):
        for other in _fewer(search, step_plan, name):
            after = search.needs_bytes(other)
            if after < need:
                sentence = _expert_sentence(name, step_plan, other)
                return _fallback(name, other, need - after, sentence, keeps_plan=False)
    return None


def _together(search: FallbackSearch, step_plan: StepPlan, goal: int) -> Fallback | None:
    """The fallbacks that bring ``step_plan`` to ``goal`` bytes, or to the smallest plan, as one; None if none helps."""
    try:
        found, path = fit_rank(search, step_plan, goal)
    except BudgetTooSmall:
        setups = [setup for _, setup, _ in _setup_fallbacks(search, step_plan.setup)]
        setup = setups[-1] if setups else step_plan.setup
        least = StepPlan(setup, search.num_layers, search.num_layers)
        found = dataclasses.replace(step_plan, setup=setup) if search.all_experts else least
        path = _path(search, step_plan, found)
    saved = search.needs_bytes(step_plan) - search.needs_bytes(found)
    if saved <= 0 or not path:
        return None
    sentence = ", ".join(fallback.sentence for fallback in path)
    return Fallback(path[-1].name, found, saved, sentence, all(fallback.keeps_plan for fallback in path))


# --- the choice by expected loss --------------------------------------------------------------------------------------


def _cheapest(search: FallbackSearch, wanted: StepPlan, exact: list[StepSetup], usable_bytes: int) -> StepPlan | None:
    """The plan of least expected loss that fits; None if none does. ``exact``: the setups that change no loss."""
    most = (wanted.resident, wanted.trainable)

    def cheapest(setup: StepSetup, limit: float) -> tuple[float, StepPlan] | None:
        def price(resident: int, trainable: int) -> float:
            return search.cost(StepPlan(setup, resident, trainable))

        def fits(resident: int, trainable: int) -> bool:
            return search.needs_bytes(StepPlan(setup, resident, trainable)) <= usable_bytes

        if search.all_experts:
            return (price(*most), StepPlan(setup, *most)) if fits(*most) else None
        found = cheapest_counts(fits, price, search.num_layers, *most, limit)
        return found and (found[0], StepPlan(setup, *found[1:]))

    best: tuple[float, StepPlan] | None = None
    for setup in lossy_setups(exact[-1], search.shortest_sequence, search.problems):
        found = cheapest(setup, best[0] if best else math.inf)
        if found and (best is None or found[0] < best[0]):
            best = found
    if best is None:
        return None
    price, plan = best
    for setup in exact[:-1]:  # without a saving that is worth nothing here
        setup = dataclasses.replace(
            setup, expert_storage=plan.setup.expert_storage, sequence_length=plan.setup.sequence_length
        )
        if found := cheapest(setup, WORTH * price):
            return found[1]
    return plan


# --- fallbacks 1 to 5: how a step is done -----------------------------------------------------------------------------

_PACKING, _OFFLOADING, _STREAMING = "experts in NF4", "offloaded experts", "streamed experts"
_RELOADS_EXPERTS = (_PACKING, _OFFLOADING, _STREAMING)
_FIELD_OF = {
    "chunked loss": "chunked_loss",
    "checkpointing": "checkpointing",
    "8-bit optimizer": "optimizer",
    _PACKING: "expert_storage",
    _OFFLOADING: "offload",
    _STREAMING: "streamed_layers",
    "shorter sequence": "sequence_length",
}
"""Fallback -> the field of `StepSetup` that it changes."""


def _with_field_of(setup: StepSetup, other: StepSetup, field: str) -> StepSetup:
    return dataclasses.replace(setup, **{field: getattr(other, field)})


def _setup_fallbacks(search: FallbackSearch, setup: StepSetup) -> Iterator[tuple[str, StepSetup, str]]:
    """Yield (name, setup with this fallback and all before it, sentence) for each fallback below ``setup``."""
    if not setup.chunked_loss and "chunked_loss" not in search.problems:
        setup = dataclasses.replace(setup, chunked_loss=True)
        yield "chunked loss", setup, f"loss computed {CHUNK_TOKENS} tokens at a time"
    if not setup.checkpointing and "checkpointing" not in search.problems:
        setup = dataclasses.replace(setup, checkpointing=True)
        yield "checkpointing", setup, "activation checkpointing on"
    if setup.optimizer == "adamw" and "adamw_8bit" not in search.problems:
        setup = dataclasses.replace(setup, optimizer="adamw_8bit")
        yield "8-bit optimizer", setup, "8-bit optimizer"
    if search.may_offload and not setup.offload:
        setup = dataclasses.replace(setup, offload=True)
        yield _OFFLOADING, setup, "experts offloaded, loaded when a token needs them"
    if search.may_stream and setup.streamed_layers < search.num_layers:
        setup = dataclasses.replace(setup, streamed_layers=search.num_layers)
        yield _STREAMING, setup, _streaming_sentence(search, setup)
    if setup.expert_storage is None and "nf4_experts" not in search.problems:
        setup = dataclasses.replace(setup, expert_storage="nf4")
        yield _PACKING, setup, "frozen experts in NF4"
    while setup.sequence_length // 2 >= search.shortest_sequence:
        length = setup.sequence_length
        setup = dataclasses.replace(setup, sequence_length=length // 2)
        yield "shorter sequence", setup, f"sequences of {length // 2} tokens instead of {length}"


def _path(search: FallbackSearch, wanted: StepPlan, found: StepPlan) -> list[Fallback]:
    """The fallbacks from ``wanted`` to ``found``, each with what it saves after those before it."""
    taken: list[Fallback] = []
    at, need = wanted, search.needs_bytes(wanted)

    def step(name: str, other: StepPlan, sentence: str, keeps_plan: bool) -> None:
        nonlocal at, need
        after = search.needs_bytes(other)
        taken.append(_fallback(name, other, max(0, need - after), sentence, keeps_plan=keeps_plan))
        at, need = other, after

    if found.setup.lora_rank < wanted.setup.lora_rank:
        other = dataclasses.replace(at, setup=_with_field_of(at.setup, found.setup, "lora_rank"))
        step("smaller rank", other, search.rank_note(other), False)
    for name, setup, sentence in _setup_fallbacks(search, wanted.setup):
        field = _FIELD_OF[name]
        value, reached = getattr(setup, field), getattr(found.setup, field)
        if name == _PACKING and reached not in (None, value):
            setup, value = dataclasses.replace(setup, expert_storage=reached), reached
            sentence = f"frozen experts in {str(reached).upper()}"
        if name == _STREAMING and reached > getattr(wanted.setup, field):
            setup, value = dataclasses.replace(setup, streamed_layers=reached), reached
            sentence = _streaming_sentence(search, setup)
        if value == reached or (field == "sequence_length" and value > reached):
            other = dataclasses.replace(at, setup=_with_field_of(at.setup, setup, field))
            step(name, other, sentence, name not in _RELOADS_EXPERTS)
    if found.trainable < at.trainable and found.trainable < found.resident:
        other = dataclasses.replace(at, trainable=found.trainable)
        step(_FEWER_TRAINABLE, other, _expert_sentence(_FEWER_TRAINABLE, at, other), False)
    if found.resident < at.resident:
        step(_FEWER_RESIDENT, found, _expert_sentence(_FEWER_RESIDENT, at, found), False)
    return taken


# --- fallbacks 6 and 7: experts ---------------------------------------------------------------------------------------

_FEWER_TRAINABLE, _FEWER_RESIDENT = "fewer trainable", "fewer resident"


def _freezing_pays(search: FallbackSearch, step_plan: StepPlan) -> bool:
    """Whether freezing an expert saves at least half of what removing it saves."""
    if step_plan.setup.experts != "full" or step_plan.resident <= search.num_layers:
        return step_plan.setup.experts == "full"
    fewer = max(search.num_layers, step_plan.resident // 2)
    all_trainable = search.needs_bytes(dataclasses.replace(step_plan, trainable=step_plan.resident))
    frozen = search.needs_bytes(dataclasses.replace(step_plan, trainable=fewer))
    removed = search.needs_bytes(StepPlan(step_plan.setup, fewer, fewer))
    return 2 * (all_trainable - frozen) >= all_trainable - removed


def _fewest_trainable(search: FallbackSearch, resident: int) -> int:
    return min(resident, max(search.num_layers, -(-resident // TRAINABLE_SHARE)))


def _with_count(search: FallbackSearch, step_plan: StepPlan, name: str, count: int) -> StepPlan:
    if name == _FEWER_TRAINABLE:
        return dataclasses.replace(step_plan, trainable=count)
    trainable = _fewest_trainable(search, count) if step_plan.trainable < step_plan.resident else count
    return dataclasses.replace(step_plan, resident=count, trainable=min(step_plan.trainable, trainable))


def _range(search: FallbackSearch, step_plan: StepPlan, name: str) -> tuple[int, int]:
    """(least, current) count of experts for a fallback."""
    if name == _FEWER_TRAINABLE:
        pays = _freezing_pays(search, step_plan)
        least = min(step_plan.trainable, _fewest_trainable(search, step_plan.resident))
        return least if pays else step_plan.trainable, step_plan.trainable
    return search.num_layers, step_plan.resident


def _fewer(search: FallbackSearch, step_plan: StepPlan, name: str) -> Iterator[StepPlan]:
    """Yield ``step_plan`` with a quarter fewer experts each time, down to the least."""
    least, current = _range(search, step_plan, name)
    while current > least:
        current = max(least, current - max(1, current // STEP_SHARE))
        yield _with_count(search, step_plan, name, current)


# --- messages ---------------------------------------------------------------------------------------------------------


def _fallback(name: str, step_plan: StepPlan, saved_bytes: int, sentence: str, *, keeps_plan: bool) -> Fallback:
    saved = f" (saves {format_bytes(saved_bytes)})" if saved_bytes > 0 else ""
    return Fallback(name, step_plan, saved_bytes, sentence + saved, keeps_plan)


def _streaming_sentence(search: FallbackSearch, setup: StepSetup) -> str:
    return f"frozen experts of {setup.streamed_layers} of {search.num_layers} layers streamed, a layer at a time"


def _expert_sentence(name: str, before: StepPlan, after: StepPlan) -> str:
    if name == _FEWER_TRAINABLE:
        return f"{after.trainable} of {after.resident} resident experts trainable instead of {before.trainable}"
    return f"{after.resident} experts resident instead of {before.resident}, {after.trainable} trainable"
