"""Makes the tiny model that edgefed ships: `python -m benchmarks.pretrain_tiny --out DIR --steps N [--minutes M]`.

A byte-level BPE tokenizer of 2,048 tokens and an `OlmoeForCausalLM` (4 layers, 16 experts, top-2, hidden 128,
2.9 million parameters, float32) are trained on the standard library outside the silos, so that every silo is unseen
text for the model; only the tokenizer has also seen the silos' training documents. The result loads with
`AutoTokenizer` and `AutoModelForCausalLM`, and `pretraining.json` records what it was made from. Same seed, Python and
library versions: the same data in the same order; the weights differ only by floating-point noise, unless the
wall-clock limit set the schedule (then also by the number of steps).

Needs torch, transformers and tokenizers; nothing else in the package imports this file.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from edgefed.embedded.silos import (
    SILOS,
    Document,
    document_order,
    documents_sha256,
    load_silo,
    pretraining_documents,
)

if TYPE_CHECKING:
    from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 2048
MAX_FILE_BYTES = 12_000_000  # what the package may weigh; main() refuses to save more


@dataclass(frozen=True)
class Recipe:
    """The hyper-parameters of the run, chosen by one-minute trials on two CPU cores.

    Attributes:
        steps: most optimizer steps.
        minutes: wall-clock limit of the training loop, or None.
        seed: initial weights and order of the data.
        batch_size: sequences per step.
        sequence_length: tokens per sequence.
        learning_rate: peak of the schedule; 2 % warm-up, then cosine to a twentieth.
        weight_decay: of matrices only; three times the usual, because the text is read several times.
        balance_coefficient: weight of the load-balancing loss, one term per layer.
        validation_share: share of the pretraining files that is only measured on.

    """

    steps: int
    minutes: float | None = None
    seed: int = 0
    batch_size: int = 8
    sequence_length: int = 256
    learning_rate: float = 5e-3
    weight_decay: float = 0.3
    balance_coefficient: float = 0.01
    validation_share: float = 0.04


def train_tokenizer(documents: Iterable[Document], vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with `vocabulary` tokens; `<|endoftext|>` (id 0) is its bos, eos and pad."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # every byte has a token: no text is unknown
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,  # the default joins " ." and would corrupt code
        model_max_length=512,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: pathlib.Path) -> None:
    """Write tokenizer.json and tokenizer_config.json to `folder`, under the class name that every release can load."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # transformers 5 writes its new name for it
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def tiny_config() -> OlmoeConfig:
    """Return the architecture: 2,893,952 parameters, of which a token uses about 0.8 million.

    `norm_topk_prob` is True: with top-2 of 16 and weights that do not sum to one the experts start at an eighth of
    their scale, and a pruned or merged expert bank would change the scale of the whole block.
    """
    from transformers import OlmoeConfig

    return OlmoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        num_experts=16,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        router_aux_loss_coef=0.01,
        tie_word_embeddings=True,
        initializer_range=0.06,  # the usual 0.02 is for wide models: here it costs 0.5 nats after 250 steps
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        dtype="float32",
    )


def token_stream(documents: list[Document], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Return the token ids (N,) int64 of all documents, each followed by the end-of-text token."""
    end = [tokenizer.eos_token_id]
    return torch.cat([torch.tensor(tokenizer(each.text, verbose=False)["input_ids"] + end) for each in documents])


def split_validation(documents: Sequence[Document], share: float) -> tuple[list[Document], list[Document]]:
    """Return (train, validation): the files that come first in hash order are validation, about `share` of the text."""
    ordered = sorted(documents, key=document_order)
    goal, held, count = share * sum(len(document.text) for document in documents), 0, 0
    while held < goal:
        held += len(ordered[count].text)
        count += 1
    return ordered[count:], ordered[:count]


def expert_shares(router_logits: tuple[torch.Tensor, ...], top_k: int) -> torch.Tensor:
    """Return each expert's share of the assignments, (L, E) with rows summing to 1, from one (T, E) tensor a layer."""
    counts = [
        torch.bincount(logits.topk(top_k, dim=-1).indices.flatten(), minlength=logits.shape[-1])
        for logits in router_logits
    ]
    return torch.stack(counts) / (top_k * router_logits[0].shape[0])


def balance_loss(router_logits: tuple[torch.Tensor, ...], shares: torch.Tensor) -> torch.Tensor:
    """Return the load-balancing loss, averaged over layers; 1 where every expert gets the same share.

    Switch Transformers (Fedus et al. 2021, eq. 4-6): per layer `E * sum_e f_e * p_e`, with f_e = `shares` (L, E) and
    p_e the mean probability of expert e over the tokens of `router_logits`, one (T, E) tensor per layer.
    Departures from transformers: there the layers are pooled first, so one layer may starve an expert that another
    layer overuses; and here `shares` may come from more batches than this one.
    """
    experts = shares.shape[1]
    means = torch.stack([logits.float().softmax(dim=-1).mean(dim=0) for logits in router_logits])  # (L, E)
    return experts * (shares * means).sum(dim=1).mean()


@torch.no_grad()
def mean_loss(model: OlmoeForCausalLM, stream: torch.Tensor, sequence_length: int, batch_size: int = 32) -> float:
    """Return the mean next-token loss in nats over `stream` (N,), cut into blocks of `sequence_length + 1` tokens."""
    model.eval()
    blocks = stream[: len(stream) // (sequence_length + 1) * (sequence_length + 1)].view(-1, sequence_length + 1)
    total = 0.0
    for batch in blocks.split(batch_size):
        logits = model(input_ids=batch[:, :-1]).logits
        total += F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    model.train()
    return total / (len(blocks) * sequence_length)


def pretrain(model: OlmoeForCausalLM, stream: torch.Tensor, recipe: Recipe) -> dict[str, float | int]:
    """Train `model` in place on `stream` (N,); return steps, tokens, train_loss (mean nats of the last 100) and wall_s.

    The learning rate follows progress, the larger of the share of steps and the share of time used, so that it has
    decayed at whichever limit ends the run. Batches are random windows: with a few passes over the text, other cuts
    in every pass are worth more than seeing each token equally often.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    window = torch.arange(recipe.sequence_length + 1)
    losses: list[float] = []
    average_shares: torch.Tensor | None = None  # (L, E)
    start = time.monotonic()
    progress = 0.0
    model.train()
    while progress < 1.0:
        rate = recipe.learning_rate * schedule(progress)
        for group in optimizer.param_groups:
            group["lr"] = rate
        offsets = torch.randint(len(stream) - len(window), (recipe.batch_size, 1), generator=generator)
        batch = stream[offsets + window]  # (B, S + 1)
        output = model(input_ids=batch[:, :-1], output_router_logits=True, use_cache=False)
        loss = F.cross_entropy(output.logits.flatten(0, 1), batch[:, 1:].flatten())
        shares = expert_shares(output.router_logits, model.config.num_experts_per_tok)
        # Balanced over recent batches, not within each: eight windows of a few files may well prefer some experts.
        average_shares = shares if average_shares is None else 0.9 * average_shares + 0.1 * shares
        balance = balance_loss(output.router_logits, average_shares)
        optimizer.zero_grad(set_to_none=True)
        (loss + recipe.balance_coefficient * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        elapsed = time.monotonic() - start
        progress = len(losses) / recipe.steps
        if recipe.minutes is not None:
            progress = max(progress, elapsed / (60 * recipe.minutes))
        if len(losses) % 100 == 0:
            tokens_per_s = len(losses) * recipe.batch_size * recipe.sequence_length / elapsed
            print(
                f"step {len(losses)} loss {sum(losses[-100:]) / 100:.4f} balance {balance.item():.3f} "
                f"rate {rate:.2e} {tokens_per_s:.0f} tokens/s {elapsed:.0f} s",
                flush=True,
            )
    tail = losses[-100:]
    return {
        "steps": len(losses),
        "tokens": len(losses) * recipe.batch_size * recipe.sequence_length,
        "train_loss": round(sum(tail) / len(tail), 4),
        "wall_s": round(time.monotonic() - start, 1),
    }


def schedule(progress: float) -> float:
    """Return the factor on the learning rate at `progress` in [0, 1]: 2 % warm-up, then cosine from 1 to 0.05."""
    if progress < 0.02:
        return (progress + 1e-3) / (0.02 + 1e-3)
    return 0.05 + 0.95 * 0.5 * (1.0 + math.cos(math.pi * (progress - 0.02) / 0.98))


def main(arguments: list[str] | None = None) -> int:
    """Run the whole recipe and write the model folder; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pretrain_tiny", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, required=True, help="most optimizer steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=None, help="wall-clock limit of the training loop")
    options = parser.parse_args(arguments)
    if options.steps < 1 or (options.minutes is not None and options.minutes <= 0):
        parser.error("--steps and --minutes must be positive")
    recipe = Recipe(steps=options.steps, minutes=options.minutes, seed=options.seed)

    import tokenizers
    import transformers

    documents = pretraining_documents()
    train, validation = split_validation(documents, recipe.validation_share)
    silo_train = [document for name in SILOS for document in load_silo(name).train]
    tokenizer = train_tokenizer(train + silo_train)
    train_stream, validation_stream = token_stream(train, tokenizer), token_stream(validation, tokenizer)
    print(f"{len(train_stream)} training tokens, {len(validation_stream)} validation tokens", flush=True)

    torch.manual_seed(recipe.seed)
    model = transformers.OlmoeForCausalLM(tiny_config())
    model.set_experts_implementation("grouped_mm")  # eager indexes expert by expert: 20 times slower in backward
    parameters = sum(parameter.numel() for parameter in model.parameters())
    outcome = pretrain(model, train_stream, recipe)
    record = {
        **outcome,
        "validation_loss": round(mean_loss(model, validation_stream, recipe.sequence_length), 4),
        "parameters": parameters,
        "train_tokens_available": len(train_stream),
        "recipe": asdict(recipe),
        "data_sha256": documents_sha256(documents),
        "tokenizer_data_sha256": documents_sha256(train + silo_train),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "threads": torch.get_num_threads(),
    }
    model.eval()
    model.save_pretrained(options.out)
    save_tokenizer(tokenizer, options.out)
    weights = options.out / "model.safetensors"
    weights.chmod(0o644)  # written through a private temporary file; a package is read by other users
    weights_bytes = weights.stat().st_size
    record["model_bytes"] = weights_bytes
    (options.out / "pretraining.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))
    if weights_bytes > MAX_FILE_BYTES:
        print(f"model.safetensors has {weights_bytes} bytes, the limit is {MAX_FILE_BYTES}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
