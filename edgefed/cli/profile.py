"""``edgefed profile``: which experts does this text use?"""

from __future__ import annotations

from pathlib import Path

import click


@click.command("profile")
@click.option(
    "--model", default="tiny", show_default=True, help="`tiny`, a Hugging Face checkpoint folder, or a hub id."
)
@click.option("--data", required=True, help="A .txt or .jsonl file, or silo:NAME.")
@click.option("--tokens", default=16384, show_default=True, help="Most tokens to look at; 0 means all.")
@click.option("--sequence-length", default=128, show_default=True)
@click.option("--batch-size", default=8, show_default=True)
@click.option("--storage", type=click.Choice(["full", "int8", "nf4"]), default="full", show_default=True,
              help="Hold experts as they come, or quantised: less memory, a profile that is only close.")  # fmt: skip
@click.option("--attention", is_flag=True, help="Also record the attention that each expert's tokens receive; slower.")
@click.option("--plot", type=click.Path(path_type=Path), help="Also write the heat map as a PNG file.")
@click.option("--json", "as_json", is_flag=True, help="Print the router statistics as JSON.")
def profile_command(
    model: str, data: str, tokens: int, sequence_length: int, batch_size: int, storage: str, attention: bool,
    plot: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Run text through a model and show which experts its router chooses."""
    from edgefed.cli.heat_map import render_heat_map
    from edgefed.cli.output import TerminalProgress, make_table, print_json, stdout_console
    from edgefed.training.data import load_corpus, problem_notes

    corpus = load_corpus(data, 0.0, 0)  # before torch models are loaded: a bad file is told at once
    from edgefed.embedded import resolve_model
    from edgefed.moe.model import MoeModel
    from edgefed.moe.units import MemorySource
    from edgefed.plots import save_heat_map
    from edgefed.training.encoding import encode_examples
    from edgefed.training.profiling import ProfilePass, profile_blocks, spread_blocks
    from edgefed.training.tokenizer import check_vocabulary, load_tokenizer

    progress = TerminalProgress()
    for note in problem_notes(data, corpus.problems):
        progress.message(note)
    source = resolve_model(model)
    progress.phase("load")
    moe = MoeModel.from_checkpoint(source)
    tokenizer = load_tokenizer(source)
    check_vocabulary(tokenizer, moe.module.get_input_embeddings().num_embeddings, model)
    encoded = encode_examples(
        corpus.train, tokenizer, sequence_length, on_message=lambda note: progress.message(f"{data} {note}")
    )
    blocks = spread_blocks(encoded, tokens)
    progress.phase("profile", total=blocks.num_tokens, unit="token")
    units, way = None, ProfilePass(batch_size=batch_size)
    if storage != "full":
        units = MemorySource({spec.key: tensors for spec, tensors in moe.iter_units() if spec.kind == "expert"})
        way = ProfilePass("layer", storage, batch_size, together=1)
        moe.drop_experts()
    notes: list[str] = []
    record = profile_blocks(moe, blocks, units, way, attention=attention, on_batch=progress.advance, tell=notes.append)
    progress.done()
    for note in notes:
        progress.message(note)
    if plot:
        save_heat_map(plot, record, f"{model} on {data}: {record.num_tokens:,} tokens")
    if as_json:
        print_json({"model": model, "data": data, "num_tokens": record.num_tokens, **record.to_dict()})
        return
    console = stdout_console()
    console.print(
        f"{model} on {data}: {record.num_tokens:,} tokens, {sum(record.experts_per_layer)} experts",
        markup=False,
        emoji=False,
    )
    for line in render_heat_map(record, colour=console.is_terminal and not console.no_color):
        console.print(line)
    titles = ("layer", "expert", "tokens", "share %", "mean gate", *(("attention %",) if attention else ()))
    table = make_table("busiest experts", *titles)
    ranked = sorted(
        ((layer.frequency[e], index, e) for index, layer in enumerate(record.layers) for e in range(layer.num_experts)),
        reverse=True,
    )
    for share, index, expert in ranked[:8]:
        layer = record.layers[index]
        table.add_row(
            "", str(index), str(expert), f"{layer.tokens_per_expert[expert]:.0f}", f"{100 * share:.1f}",
            f"{layer.mean_gate[expert]:.3f}", *((f"{100 * layer.mean_attention[expert]:.2f}",) if attention else ()),
        )  # fmt: skip
    console.print(table)
    if plot:
        console.print(f"heat map: {plot}", markup=False, emoji=False)
