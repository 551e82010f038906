"""``edgefed predict``: the classes that a FedMoE client's own model predicts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

from edgefed.cli.options import command
from edgefed.config import Setting
from edgefed.errors import ConfigError


@dataclasses.dataclass
class PredictSettings:
    """What `edgefed predict` takes."""

    inputs: Annotated[tuple[str, ...], Setting("Texts, or image files.", positional=True, metavar="[INPUT]...")] = ()
    state: Annotated[Path, Setting("State folder of the device.")] = Path("edgefed-client")
    data: Annotated[
        str | None, Setting("Labelled examples, as `edgefed join` takes them: print loss and accuracy.")
    ] = None
    resize: Annotated[bool, Setting("With `data`: scale images that are not 32x32 and crop them at the centre.")] = (
        False
    )
    json: Annotated[bool, Setting("Print the predictions as JSON.")] = False


@command("predict", PredictSettings)
def predict_command(settings: PredictSettings) -> None:
    """Predict with a client's own model.

    A device that joined a run of fedmoe with --task images or text has a model of its own in its state folder. This
    loads it and predicts the class of each INPUT.
    """
    from edgefed.cli.output import print_json, print_note, stdout_console
    from edgefed.cli.tables import Column, FittedTable

    if not settings.inputs and not settings.data:
        raise ConfigError("nothing to predict", remedy="Pass texts or image files, or labelled examples as `data`.")
    from edgefed.personal.prediction import Predictor

    predictor = Predictor(settings.state)
    print_note(f"{predictor.model} with the shared extractor, trained up to round {predictor.server_round}")
    found = predictor.predict(settings.inputs)
    scores = predictor.evaluate(settings.data, resize=settings.resize) if settings.data else None
    if settings.json:
        rows = [
            {"input": given, **dataclasses.asdict(prediction)}
            for given, prediction in zip(settings.inputs, found, strict=True)
        ]
        measured = {"loss": scores.loss, "accuracy": scores.accuracy} if scores else None
        print_json({"round": predictor.server_round, "predictions": rows, "data": measured})
        return
    console = stdout_console()
    if found:
        table = FittedTable(
            Column("input", wraps=True), Column("class", name=True), Column("probability"), Column("shared", drop=1)
        )
        for given, prediction in zip(settings.inputs, found, strict=True):
            table.add_row(
                given,
                prediction.label,
                f"{100 * prediction.probability:.1f} %",
                f"{100 * prediction.shared_weight:.0f} %",
            )
        console.print(table)
    if scores:
        console.print(
            f"{settings.data}: loss {scores.loss:.3f}, accuracy {100 * scores.accuracy:.1f} %",
            markup=False,
            emoji=False,
        )
