"""The verdict of a benchmark in one sentence: what this device could do in a run, model by model. Pure."""

from __future__ import annotations

from edgefed.bench.report import Fit, Report
from edgefed.progress import format_seconds
from edgefed.protocol.messages import TrainingConfig

STORAGE_WORDS = {"bfloat16": "in bfloat16", "nf4": "in NF4"}


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
        details = [f"{of} experts a layer {STORAGE_WORDS[fit.storage]} with adapters" if not number else of]
        if number and fit.storage != chosen[0].storage:
            details[0] += f" {STORAGE_WORDS[fit.storage]}"
        if (seconds := measured.get(fit.model)) is not None:
            details.append(f"about {format_seconds(seconds)} of training a round")
        if fit.upload_s is not None:
            details.append(f"{format_seconds(fit.upload_s)} upload")
        parts.append(", ".join(details))
    idle = "" if any(fit.budget == "now" for fit in chosen) else "on an idle machine, "
    return f"{idle}{'; '.join(parts)}"


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
    """The fit to recommend: all experts unquantized if possible, else most experts."""
    return max(fits, key=lambda fit: (fit.experts, fit.storage == "bfloat16"), default=None)


def _measured(report: Report) -> dict[str, float]:
    """Seconds of the local steps of a round with default settings, of the model whose training was measured."""
    training = TrainingConfig()
    tokens = training.local_steps * training.batch_size * training.sequence_length
    return {
        str(entry.params["model"]): tokens / entry.median
        for entry in report.tests
        if entry.name == "train step" and entry.median and "model" in entry.params
    }
