"""``edgefed partition``: one labelled data set becomes the files of many unlike clients."""

from __future__ import annotations

from pathlib import Path

import click

SHOWN_CLIENTS = 30
SHOWN_CLASSES = 12
"""The table says how much it leaves out; partition.json and partition.png have all."""


@click.command("partition")
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--clients", type=click.IntRange(min=1), required=True, help="How many files to make.")
@click.option("--by", type=click.Choice(["class", "dirichlet"]), default="class", show_default=True,
              help="So many classes for each client, or shares of each class drawn from Dir(alpha).")  # fmt: skip
@click.option("--classes-per-client", type=click.IntRange(min=1), default=2, show_default=True, help="With --by class.")
@click.option("--alpha", type=click.FloatRange(min=0, min_open=True), default=0.5, show_default=True,
              help="With --by dirichlet: the smaller, the more unlike.")  # fmt: skip
@click.option("--min-examples", type=click.IntRange(min=1), default=10, show_default=True,
              help="With --by dirichlet: drawn again until each client has so many.")  # fmt: skip
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--resize", is_flag=True, help="Scale images of another size than 32x32 and crop them at the centre.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the files; reused as a cache.")
@click.option("--json", "as_json", is_flag=True, help="Print settings, files and counts as JSON.")
@click.pass_context
def partition_command(
    ctx: click.Context, data: Path, clients: int, by: str, classes_per_client: int, alpha: float, min_examples: int,
    seed: int, resize: bool, out: Path, as_json: bool,
) -> None:  # fmt: skip
    """Divide DATA among clients that are unlike each other, for `edgefed join --data OUT/client-00.npz` and so on.

    DATA: a .npz file or a folder of images, or a .jsonl or .csv file of labelled texts.
    """
    from edgefed.cli.output import print_json, print_note, stdout_console
    from edgefed.errors import ConfigError, DataError
    from edgefed.personal.labelled_text import TEXT_SUFFIXES, load_labelled_texts
    from edgefed.personal.partition_files import PartitionSettings, source_digest, write_partition
    from edgefed.personal.sample_files import load_images

    unused = {"class": ("alpha", "min_examples"), "dirichlet": ("classes_per_client",)}[by]
    for name in unused:
        if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            raise ConfigError(f"--{name.replace('_', '-')} has no meaning with --by {by}")
    data = data.expanduser()
    if not data.is_dir() and not data.name.lower().endswith((*TEXT_SUFFIXES, ".npz")):
        raise DataError(
            f"{data} has an unknown suffix; known are .npz, {', '.join(TEXT_SUFFIXES)}, and a folder of images",
            remedy="The README shows what these files hold.",
        )
    if not data.is_dir() and data.name.lower().endswith(TEXT_SUFFIXES):
        samples = load_labelled_texts(data)
        for problem in samples.problems[:10]:
            print_note(f"{data}: line {problem.line}: {problem.reason}")
        if len(samples.problems) > 10:
            print_note(f"{data}: {len(samples.problems)} lines cannot be used in all")
    else:
        samples = load_images(data, resize=resize, tell=lambda note: print_note(f"{data}: {note}"))
    settings = PartitionSettings(clients, by, classes_per_client, alpha, min_examples, seed, resize)
    partition = write_partition(out.expanduser(), samples, settings, source_digest(data))
    if as_json:
        print_json(partition.to_dict())
        return
    console = stdout_console()
    console.print(_table(partition))
    left = len(samples) - int(partition.counts.sum())
    if left:
        console.print(f"{left:,} examples are of classes that no client has", markup=False)
    what = "already there" if partition.cached else "written"
    console.print(f"{what}: {len(partition.files)} files and partition.png in {partition.folder}", markup=False)


def _table(partition):
    """Counts per client and class, and totals."""
    from rich.markup import escape

    from edgefed.cli.output import make_table

    shown = [place for place in range(len(partition.classes)) if partition.counts[:, place].any()]
    more = len(shown) > SHOWN_CLASSES
    shown = shown[:SHOWN_CLASSES]
    names = [partition.classes[place] for place in shown]
    table = make_table("client", *(escape(name if len(name) <= 12 else name[:11] + "~") for name in names),
                       *(["more"] if more else []), "examples", "classes")  # fmt: skip

    def row(title: str, counts) -> None:
        listed = [str(counts[place]) if counts[place] else "-" for place in shown]
        rest = [str(int(counts.sum() - counts[shown].sum()))] if more else []
        table.add_row(title, *listed, *rest, f"{counts.sum():,}", str(int((counts > 0).sum())))

    for name, counts in list(zip(partition.files, partition.counts, strict=True))[:SHOWN_CLIENTS]:
        row(name, counts)
    if len(partition.files) > SHOWN_CLIENTS:
        row(f"{len(partition.files) - SHOWN_CLIENTS} more", partition.counts[SHOWN_CLIENTS:].sum(0))
    row("all", partition.counts.sum(0))
    return table
