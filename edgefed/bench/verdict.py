"""The verdict of a benchmark in one sentence: what this device could do in a run, model by model. Pure."""

from __future__ import annotations

from edgefed.bench.report import Fit, Report
from edgefed.progress import format_seconds
from edgefed.protocol.messages import TrainingConfig

STORAGE_WORDS = {"bfloat16": "in bfloat16", "nf4": "in NF4", "nf4 streamed": "in NF4, streamed,"}


def verdict(report: Report) -> str:
    """What this device could hold, train and upload; "" if the memory budget is unknown.

    Counts are experts of each layer with an adapter each, frozen in bfloat16 if all fit so, otherwise in the storage
    that holds more. The time of a round is that of the default local steps at the measured speed of the model that was
    measured, without waiting for others.
    """
    chosen = [fit for fit in map(_best, _by_model(report)) if fit is not None]
    if not chosen:
        return ""
    measured = _measured(report)
    chosen.sort(key=lambda fit: fit.model not in measured)  # the measured model first
    parts = []
    for number, fit in enumerate(chosen):
        if not fit.experts:
            parts.append(f"{fit.model}: does not fit")
            continue
        of = f"{fit.model}: {fit.experts} of {fit.of}"
        what = f"{of} experts a layer {STORAGE_WORDS[fit.storage]} with adapters" if not number else of
        if number and fit.storage != chosen[0].storage:
            what += f" {STORAGE_WORDS[fit.storage].rstrip(',')}"
        in_memory = "streamed" not in fit.storage  # the measured speed is not that of streamed experts
        parts.append(with_times(what, measured.get(fit.model) if in_memory else None, fit.upload_s))
    idle = "" if any(fit.budget == "now" for fit in chosen) else "on an idle machine, "
    return f"{idle}{'; '.join(parts)}"


def with_times(what: str, training_s: float | None, upload_s: float | None) -> str:
    """``what`` a device holds and trains, with the seconds of a round that are known."""
    parts = [what]
    if training_s is not None:
        parts.append(f"about {format_seconds(training_s)} of training a round")
    if upload_s is not None:
        parts.append(f"{format_seconds(upload_s)} upload")
    return ", ".join(parts)


def _by_model(report: Report) -> list[list[Fit]]:
    """The fits with adapters of each model, under the budget of now, or of an idle machine if that is unknown."""
    adapters = [fit for fit in report.fits if fit.mode == "lora"]
    budget = "now" if any(fit.budget == "now" for fit in adapters) else "ideal"
    models: dict[str, list[Fit]] = {}
    for fit in adapters:
        if fit.budget == budget:
            models.setdefault(fit.model, []).append(fit)
    return list(models.values())


def _best(fits: list[Fit]) -> Fit | None:
    """The fit to recommend: all experts unquantized if possible, else most experts, streamed only if that adds some."""
    order = {"bfloat16": 1, "nf4": 0}
    return max(fits, key=lambda fit: (fit.experts, order.get(fit.storage, -1)), default=None)


def _measured(report: Report) -> dict[str, float]:
    """Seconds of the local steps of a round with default settings, of the model whose training was measured."""
    training = TrainingConfig()
    tokens = training.local_steps * training.batch_size * training.sequence_length
    return {
        str(entry.params["model"]): tokens / entry.median
        for entry in report.tests
        if entry.name == "train step" and entry.median and "model" in entry.params
    }
