"""Pretrain an English mixture-of-experts model of 20 to 50 million parameters, over as many sittings as it takes.

    python experiments/pretrain.py prepare --work WORK --packages *.deb --data DIR     # text, tokenizer, recipe
    python experiments/pretrain.py train --work WORK --minutes 60 [--resume]           # at a constant learning rate
    python experiments/pretrain.py export --work WORK --out MODEL --cooldown 300       # a model for `edgefed serve`

An `OlmoeForCausalLM` with a byte-level BPE tokenizer of its own; `pretrain_text.py` says what it is trained on. A
checkpoint is written atomically every few minutes, at the end, on Ctrl-C and on SIGTERM. A resumed training is
bitwise the one that was not interrupted, on the same machine and versions. `WORK/curve.jsonl` has the loss of each 20
steps, the validation loss, and, for each sitting, device, versions and commit.

The learning rate is constant after its warm-up, so that no total needs to be known in advance. `export` trains a copy
for some more steps while the rate falls to zero: 1 - sqrt(progress), Hägele et al. (arXiv 2405.18392), section 4.1.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import math
import os
import shutil
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, OlmoeConfig, OlmoeForCausalLM

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
sys.path.append(str(Path(__file__).resolve().parent))

import pretrain_tiny as tiny  # noqa: E402
from pretrain_text import documents_of  # noqa: E402
from provenance import provenance  # noqa: E402

from edgefed.disk import FolderLock, check_folder, make_folder, write_durably  # noqa: E402
from edgefed.embedded.silos import documents_sha256  # noqa: E402
from edgefed.errors import EdgefedError  # noqa: E402

ROW_STEPS, VALIDATION_STEPS, VALIDATION_BLOCKS = 20, 200, 48


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What the weights depend on, besides the text. By default 22.1 million parameters, of which a token uses 4.3.

    Attributes:
        precision: of matrix products, float32 or bfloat16 (autocast); weights and optimizer are float32.
        warmup_steps: steps in which the learning rate rises linearly.
        balance_coefficient: weight of the load-balancing loss of `pretrain_tiny.balance_loss`.

    """

    layers: int = 4
    hidden_size: int = 256
    experts: int = 32
    expert_width: int = 192
    experts_per_token: int = 2
    vocabulary: int = 8192
    seed: int = 0
    batch_size: int = 8
    sequence_length: int = 256
    learning_rate: float = 2e-3
    warmup_steps: int = 200
    weight_decay: float = 0.1
    balance_coefficient: float = 0.01
    validation_share: float = 0.01
    precision: str = "float32"

    def model(self) -> OlmoeForCausalLM:
        """The model with its initial weights."""
        torch.manual_seed(self.seed)
        config = OlmoeConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden_size,
            intermediate_size=self.expert_width,
            num_hidden_layers=self.layers,
            num_attention_heads=max(1, self.hidden_size // 64),
            max_position_embeddings=2 * self.sequence_length,
            num_experts=self.experts,
            num_experts_per_tok=self.experts_per_token,
            norm_topk_prob=True,
            tie_word_embeddings=True,
            initializer_range=0.04,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
            dtype="float32",
        )
        model = OlmoeForCausalLM(config)
        model.set_experts_implementation("grouped_mm")
        return model


class Training:
    """A model in training, and all that its next step depends on.

    ``state`` is what a checkpoint holds: step, processor seconds, the experts' recent shares (L, E), and the losses
    since the last row of the curve.
    """

    def __init__(self, work: Path) -> None:
        self.work, self.recipe = work, Recipe(**_prepared(work)["recipe"])
        streams = load_file(work / "tokens.safetensors")
        self.text, self.validation = streams["train"], streams["validation"]  # (N,) int32
        self.model = self.recipe.model()
        parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.ndim > 1], "weight_decay": self.recipe.weight_decay},
                {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
            ],
            lr=self.recipe.learning_rate,
            betas=(0.9, 0.95),
            fused=True,
        )
        self.state: dict[str, Any] = {"step": 0, "cpu_s": 0.0, "shares": None, "losses": [], "balance": 0.0}

    @property
    def step(self) -> int:
        """Number of steps done."""
        return self.state["step"]

    def load(self) -> None:
        """Continue from the checkpoint. Raises SystemExit when there is none that fits."""
        path = self.work / "checkpoint.pt"
        if not path.exists():
            raise SystemExit(f"{path} not found; start with train, without --resume")
        try:
            found = torch.load(path, weights_only=True)
            self.model.load_state_dict(found.pop("model"))
            self.optimizer.load_state_dict(found.pop("optimizer"))
        except Exception as error:  # torch raises whatever its readers do
            raise SystemExit(f"cannot read {path}: {error}\nDelete it to start again.") from error
        self.state = found

    def save(self) -> None:
        """Replace the checkpoint. Raises EdgefedError when the disk is full; the last one then stays."""
        buffer = io.BytesIO()
        torch.save({**self.state, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, buffer)
        write_durably(self.work / "checkpoint.pt", buffer.getvalue())

    def advance(self, factor: float = 1.0) -> None:
        """One optimizer step with ``factor`` of the learning rate. The batch depends on seed and step alone."""
        recipe, state, started = self.recipe, self.state, time.process_time()
        rate = recipe.learning_rate * factor * min(1.0, (state["step"] + 1) / recipe.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        generator = torch.Generator().manual_seed(recipe.seed * 2**32 + state["step"])
        window = torch.arange(recipe.sequence_length + 1)
        offsets = torch.randint(len(self.text) - len(window), (recipe.batch_size, 1), generator=generator)
        batch = self.text[offsets + window].long()  # (B, S + 1)
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bfloat16"):
            output = self.model(input_ids=batch[:, :-1], output_router_logits=True, use_cache=False)
        loss = F.cross_entropy(output.logits.float().flatten(0, 1), batch[:, 1:].flatten())
        shares = tiny.expert_shares(output.router_logits, recipe.experts_per_token)
        state["shares"] = shares if state["shares"] is None else 0.9 * state["shares"] + 0.1 * shares
        balance = tiny.balance_loss(output.router_logits, state["shares"])
        self.optimizer.zero_grad(set_to_none=True)
        (loss + recipe.balance_coefficient * balance).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        if not math.isfinite(loss.item()):
            raise SystemExit(f"the loss of step {state['step'] + 1} is {loss.item()}; prepare with a lower rate")
        state["losses"] = [*state["losses"], loss.item()]
        state["balance"] = balance.item()
        state["step"] += 1
        state["cpu_s"] += time.process_time() - started

    def validation_loss(self, blocks: int | None = None) -> float:
        """Mean loss in nats per token on the first ``blocks`` of the validation text, or all of it."""
        length = self.recipe.sequence_length
        stream = self.validation if blocks is None else self.validation[: blocks * (length + 1)]
        return round(tiny.mean_loss(self.model, stream.long(), length, batch_size=16), 4)


def prepare(options: argparse.Namespace) -> None:
    """Read the text, train the tokenizer, and write tokens.safetensors, tokenizer files and prepared.json."""
    check_folder(options.work, "--work")
    if (options.work / "prepared.json").exists():
        raise SystemExit(f"{options.work} is prepared already; train there, or choose another folder")
    recipe = Recipe(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Recipe)})
    if recipe.hidden_size % 2 or (recipe.hidden_size > 64 and recipe.hidden_size % 64):
        raise SystemExit(f"--hidden-size must be a multiple of 64, got {recipe.hidden_size}")
    if recipe.experts_per_token > recipe.experts:
        raise SystemExit(f"{recipe.experts_per_token} experts per token, but only {recipe.experts} experts")
    parameters = sum(p.numel() for p in recipe.model().parameters())
    sources = documents_of(options.packages, options.data)
    sides = [tiny.split_validation(documents, recipe.validation_share) for documents in sources.values()]
    train, validation = ([each for side in sides for each in side[part]] for part in (0, 1))
    tokenizer = tiny.train_tokenizer(train, recipe.vocabulary)
    # In the order of a hash, so that the first blocks of the validation text are of every source.
    streams = [tiny.token_stream(sorted(side, key=tiny.document_order), tokenizer) for side in (train, validation)]
    shortest = min(map(len, streams))
    if shortest < 2 * (recipe.sequence_length + 1):
        raise SystemExit(f"too little text: {shortest} tokens for training or validation; pass more --packages")
    make_folder(options.work)
    tiny.save_tokenizer(tokenizer, options.work)
    save_file({"train": streams[0].int(), "validation": streams[1].int()}, options.work / "tokens.safetensors")
    record = {
        "recipe": dataclasses.asdict(recipe),
        "parameters": parameters,
        "train_tokens": len(streams[0]),
        "validation_tokens": len(streams[1]),
        "sources": {
            name: {
                "documents": len(documents),
                "characters": sum(len(each.text) for each in documents),
                "sha256": documents_sha256(documents),
            }
            for name, documents in sources.items()
        },
        "provenance": provenance(),
    }
    write_durably(options.work / "prepared.json", json.dumps(record, indent=2).encode() + b"\n")
    print(json.dumps(record, indent=2))


def train(options: argparse.Namespace) -> None:
    """Train until --minutes or --steps are over, or a signal arrives."""
    if options.minutes is None and options.steps is None:
        raise SystemExit("--minutes or --steps is required: training has no end of its own")
    _prepared(options.work)
    if not options.resume and (options.work / "checkpoint.pt").exists():
        raise SystemExit(f"{options.work} has a checkpoint; pass --resume to continue, or delete it to start again")
    stop: list[int] = []
    with contextlib.ExitStack() as stack:
        stack.callback(FolderLock(options.work, "lock").release)
        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.signal(number, lambda number, _: stop.append(number)))
        _sitting(options, stop)


def _sitting(options: argparse.Namespace, stop: list[int]) -> None:
    """Train and save; ends soon after something is put into ``stop``."""
    training, curve = Training(options.work), options.work / "curve.jsonl"
    if options.resume:
        training.load()
    write_durably(curve, "".join(json.dumps(row) + "\n" for row in _rows(curve, training.step)).encode())
    with curve.open("a", encoding="utf-8") as file:

        def write(kind: str, **values: Any) -> None:
            row = {"kind": kind, "step": training.step, **values}
            file.write(json.dumps(row) + "\n")
            file.flush()
            if kind != "start":
                print(row, flush=True)

        write("start", threads=torch.get_num_threads(), provenance=provenance())
        started = saved = time.monotonic()
        while not (
            stop
            or (options.steps is not None and training.step >= options.steps)
            or (options.minutes is not None and time.monotonic() - started > 60 * options.minutes)
        ):
            training.advance()
            if training.step % ROW_STEPS == 0:
                losses, training.state["losses"] = training.state["losses"], []
                tokens = training.step * training.recipe.batch_size * training.recipe.sequence_length
                loss, balance = round(statistics.mean(losses), 4), round(training.state["balance"], 4)
                write("loss", tokens=tokens, loss=loss, balance=balance, cpu_s=round(training.state["cpu_s"], 1))
            if training.step % VALIDATION_STEPS == 0:
                write("validation", loss=training.validation_loss(VALIDATION_BLOCKS))
            if time.monotonic() - saved > 60 * options.save_minutes:
                training.save()
                saved = time.monotonic()
        training.save()
    print(f"saved step {training.step} to {options.work / 'checkpoint.pt'}", flush=True)


def export(options: argparse.Namespace) -> None:
    """Train a copy while the learning rate falls to zero, and write it as a checkpoint of transformers."""
    check_folder(options.out, "--out")
    if options.out.exists() and any(options.out.iterdir()):
        raise SystemExit(f"{options.out} is not empty; choose another --out")
    training = Training(options.work)
    training.load()
    before = training.step
    for index in range(options.cooldown):
        training.advance(1 - math.sqrt((index + 1) / options.cooldown))
        if training.step % ROW_STEPS == 0:
            print(f"step {training.step} loss {statistics.mean(training.state['losses'][-ROW_STEPS:]):.4f}", flush=True)
    record = {
        "steps": before,
        "cooldown_steps": options.cooldown,
        "tokens": training.step * training.recipe.batch_size * training.recipe.sequence_length,
        "validation_loss": training.validation_loss(),
        "cpu_s": round(training.state["cpu_s"], 1),
        "text": _prepared(options.work),
        "provenance": provenance(),
    }
    part = options.out.with_name(options.out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    training.model.eval().save_pretrained(part)
    tiny.save_tokenizer(AutoTokenizer.from_pretrained(options.work, local_files_only=True), part)
    (part / "pretraining.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(part, options.out)
    print(json.dumps({name: value for name, value in record.items() if name not in ("text", "provenance")}, indent=2))


def _prepared(work: Path) -> dict[str, Any]:
    path = work / "prepared.json"
    if not path.exists():
        raise SystemExit(f"{path} not found; prepare the text first: pretrain.py prepare --work {work}")
    return json.loads(path.read_text(encoding="utf-8"))


def _rows(curve: Path, step: int) -> list[dict[str, Any]]:
    """The rows of the curve up to ``step``; a row that a crash cut off is dropped, as its step is done again."""
    rows = []
    for line in curve.read_text(encoding="utf-8").splitlines() if step and curve.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            break
        if row["step"] > step:
            break
        rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    one = verbs.add_parser("prepare", help="read the text, train the tokenizer")
    one.set_defaults(run=prepare)
    one.add_argument("--packages", type=Path, nargs="+", required=True, help="Debian packages (.deb)")
    one.add_argument("--data", type=Path, help="folder with the public sets, see README.md here")
    for field in dataclasses.fields(Recipe):
        kind = {"int": _positive, "float": _share, "str": str}[str(field.type)]
        one.add_argument(
            f"--{field.name.replace('_', '-')}", type=int if field.name == "seed" else kind, default=field.default,
            choices=("float32", "bfloat16") if field.name == "precision" else None,
        )  # fmt: skip
    two = verbs.add_parser("train", help="train, or continue")
    two.set_defaults(run=train)
    two.add_argument("--resume", action="store_true", help="continue from the checkpoint")
    two.add_argument("--minutes", type=_share, help="wall-clock limit of this sitting")
    two.add_argument("--steps", type=_positive, help="total number of steps, over all sittings")
    two.add_argument("--save-minutes", type=_share, default=5.0, help="between checkpoints")
    three = verbs.add_parser("export", help="write a model that edgefed loads")
    three.set_defaults(run=export)
    three.add_argument("--out", type=Path, required=True, help="folder to write")
    three.add_argument("--cooldown", type=_positive, default=300, help="steps with a falling learning rate")
    for verb in (one, two, three):
        verb.add_argument("--work", type=Path, required=True, help="folder of text, checkpoint and curve")
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except EdgefedError as error:
        raise SystemExit(f"{error}. {error.remedy}") from error
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
