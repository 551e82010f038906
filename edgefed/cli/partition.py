"""``edgefed partition``: one labelled data set becomes the files of many unlike clients."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from edgefed.cli.options import command, given_as_flag
from edgefed.config import Setting

if TYPE_CHECKING:
    import numpy as np

    from edgefed.cli.tables import FittedTable
    from edgefed.personal.labelled_text import LabelledTexts
    from edgefed.personal.partition import Partition
    from edgefed.personal.samples import ImageSamples

SHOWN_CLIENTS = 30
SHOWN_CLASSES = 12
"""The table says how much it leaves out; partition.json and partition.png have everything."""


@dataclasses.dataclass(kw_only=True)
class PartitionCommandSettings:
    """What `edgefed partition` takes."""

    data: Annotated[Path, Setting("Labelled images or texts.", positional=True)]
    clients: Annotated[int, Setting("Number of files to make.", minimum=1)]
    by: Annotated[
        Literal["class", "dirichlet"],
        Setting("A fixed number of classes for each client, or shares of each class drawn from Dir(alpha)."),
    ] = "class"
    classes_per_client: Annotated[int, Setting("With `by=class`.", minimum=1)] = 2
    alpha: Annotated[float, Setting("With `by=dirichlet`: smaller values make clients differ more.", above=0)] = 0.5
    min_examples: Annotated[
        int, Setting("With `by=dirichlet`: drawn again until each client has at least this many.", minimum=1)
    ] = 10
    seed: Annotated[int, Setting("Seed of the draw.", minimum=0)] = 0
    resize: Annotated[bool, Setting("Scale images that are not 32x32 and crop them at the centre.")] = False
    out: Annotated[Path, Setting("Folder of the files; existing files are not overwritten.")]
    json: Annotated[bool, Setting("Print settings, files and counts as JSON.")] = False


@command("partition", PartitionCommandSettings)
def partition_command(given: PartitionCommandSettings) -> None:
    """Split a labelled data set among clients.

    Clients differ from each other; each joins with its own file: `edgefed join --data OUT/client-00.npz`.

    DATA: a .npz file or a folder of images, or a .jsonl or .csv file of labelled texts.
    """
    from edgefed.cli.output import print_json, print_note, stdout_console
    from edgefed.errors import ConfigError, DataError
    from edgefed.personal.labelled_text import TEXT_SUFFIXES, load_labelled_texts
    from edgefed.personal.partition import PartitionSettings, source_digest, write_partition
    from edgefed.personal.sample_files import load_images

    unused = {"class": ("alpha", "min_examples"), "dirichlet": ("classes_per_client",)}[given.by]
    for name in unused:
        if given_as_flag(name):
            raise ConfigError(f"`{name}` has no effect with `by={given.by}`")
    data = given.data.expanduser()
    if not data.is_dir() and not data.name.lower().endswith((*TEXT_SUFFIXES, ".npz")):
        raise DataError(
            f"unknown suffix: {data}; known are .npz, {', '.join(TEXT_SUFFIXES)}, and a folder of images",
            remedy="The documentation shows what these files hold.",
        )
    samples: ImageSamples | LabelledTexts
    if not data.is_dir() and data.name.lower().endswith(TEXT_SUFFIXES):
        texts = samples = load_labelled_texts(data)
        for problem in texts.problems[:10]:
            print_note(f"{data}: line {problem.line}: {problem.reason}")
        if len(texts.problems) > 10:
            print_note(f"{data}: {len(texts.problems)} lines cannot be used in total")
    else:
        samples = load_images(data, resize=given.resize, report=lambda note: print_note(f"{data}: {note}"))
    settings = PartitionSettings(
        given.clients, given.by, given.classes_per_client, given.alpha, given.min_examples, given.seed, given.resize
    )
    partition = write_partition(given.out.expanduser(), samples, settings, source_digest(data))
    if given.json:
        print_json(partition.to_dict())
        return
    console = stdout_console()
    console.print(counts_table(partition))
    left = len(samples) - int(partition.counts.sum())
    if left:
        console.print(f"{left:,} examples are of classes that no client has", markup=False)
    what = "already there" if partition.cached else "written"
    console.print(f"{what}: {len(partition.files)} files and partition.png in {partition.folder}", markup=False)


def counts_table(partition: Partition) -> FittedTable:
    """A table of counts per client and class, and totals."""
    from edgefed.cli.tables import Column, FittedTable, cut_middle

    shown = [place for place in range(len(partition.classes)) if partition.counts[:, place].any()]
    more = len(shown) > SHOWN_CLASSES
    shown = shown[:SHOWN_CLASSES]
    names = [cut_middle(partition.classes[place], 12) for place in shown]
    table = FittedTable(
        Column("client", name=True), *(Column(name, drop=place + 1) for place, name in enumerate(names)),
        *([Column("more", drop=len(names) + 1)] if more else []), Column("examples"), Column("classes"),
    )  # fmt: skip

    def row(title: str, counts: np.ndarray) -> None:
        listed = [str(counts[place]) if counts[place] else "-" for place in shown]
        rest = [str(int(counts.sum() - counts[shown].sum()))] if more else []
        table.add_row(title, *listed, *rest, f"{counts.sum():,}", str(int((counts > 0).sum())))

    for name, counts in list(zip(partition.files, partition.counts, strict=True))[:SHOWN_CLIENTS]:
        row(name, counts)
    if len(partition.files) > SHOWN_CLIENTS:
        row(f"{len(partition.files) - SHOWN_CLIENTS} more", partition.counts[SHOWN_CLIENTS:].sum(0))
    row("all", partition.counts.sum(0))
    return table
