"""Score models on questions with given answers: which answer has the highest likelihood?

    python experiments/multiple_choice.py MODEL [MODEL ...] --data DIR [--limit 500] [--json PATH]

As lm-evaluation-harness does, without examples in the prompt: each answer is a continuation of the question, and
`accuracy` takes the one of the largest log-likelihood, sum_t log p(token_t | question, token_<t). `normalized` divides
it by the answer's length in characters (`acc_norm`): the sum alone prefers short answers. Winogrande's answers are put
into the sentence, and the rest of the sentence is scored. BoolQ is asked without its passages, which the set lacks, so
its numbers are not those of the harness. `loss` is that of the right answers, in nats per token. The interval is
Wilson's, at 95 %, of `normalized`.

MODEL is `tiny` or a folder, for example one that `edgefed export URL FOLDER` wrote.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import hashlib
import json
import math
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from provenance import provenance  # noqa: E402

from edgefed.disk import hash_file  # noqa: E402
from edgefed.embedded import resolve_model  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Question:
    """One (context, continuation) per answer, and the index of the right answer."""

    pairs: tuple[tuple[str, str], ...]
    right: int


@dataclasses.dataclass(frozen=True)
class Score:
    """What a model reaches on one task; see the top of this file."""

    task: str
    questions: int
    chance: float
    accuracy: float
    normalized: float
    low: float
    high: float
    loss: float


def _asked(question: str, answers: list[str], right: int) -> Question:
    return Question(tuple((f"Question: {question.strip()}\nAnswer:", f" {each.strip()}") for each in answers), right)


def _listed(row: dict[str, str]) -> Question:
    """ARC, OpenBookQA and Social IQa."""
    question, _, rest = row["instruction"].partition("\n\nAnswer1: ")
    answers = re.split(r" Answer\d: ", rest.partition("\n\nAnswer format")[0])
    return _asked(question.partition("question: ")[2], answers, int(row["answer"].removeprefix("answer")) - 1)


def _boolq(row: dict[str, str]) -> Question:
    question = row["instruction"].partition("question: ")[2].partition("\n\n")[0]
    return _asked(question, ["no", "yes"], ["false", "true"].index(row["answer"]))


def _winogrande(row: dict[str, str]) -> Question:
    sentence, _, rest = row["instruction"].partition("sentence: ")[2].partition("\n\nOption1: ")
    start, gap, end = sentence.partition("_")
    options = rest.partition(" Answer format")[0].split(" Option2: ")
    if not gap:
        raise ValueError("no gap in the sentence")
    return Question(tuple((start + each, end) for each in options), int(row["answer"].removeprefix("option")) - 1)


def _lettered(separator: str, letter: str) -> Callable[[dict[str, str]], Question]:
    """AQuA and MathQA: answers behind ``separator``, each behind a ``letter``."""

    def read(row: dict[str, str]) -> Question:
        question, _, rest = row["instruction"].partition(separator)
        answers = [each.strip(" ,'[]") for each in re.split(letter, rest)[1:]]
        return _asked(question, answers, "ABCDE".index(row["answer"]))

    return read


TASKS: dict[str, Callable[[dict[str, str]], Question]] = {
    "ARC-Easy": _listed,
    "ARC-Challenge": _listed,
    "openbookqa": _listed,
    "social_i_qa": _listed,
    "boolq": _boolq,
    "winogrande": _winogrande,
    "AQuA": _lettered("Answer Choices:", r"\([A-E]\)"),
    "mathqa": _lettered("The options:", r"(?:[A-E] \) ?)+"),
}
"""Task -> how a row becomes a question."""


def read_questions(data: Path, task: str, limit: int | None = None) -> list[Question]:
    """The questions of a task's test set, or ``limit`` of them, the same ones every time.

    Raises SystemExit when the set is absent, or a row is not a question with its answers.
    """
    path = data / "mcq_math_tasks" / task / "test.json.gz"
    if not path.exists():
        raise SystemExit(f"{path} is absent; experiments/README.md says where to get it")
    rows = json.loads(gzip.decompress(path.read_bytes()))
    rows.sort(key=lambda row: hashlib.sha256(row["instruction"].encode()).digest())
    found = []
    for row in rows[:limit]:
        try:
            question = TASKS[task](row)
        except (KeyError, ValueError) as error:
            raise SystemExit(f"{path}: cannot read the answers of {row}: {error!r}") from error
        if len(question.pairs) <= max(1, question.right) or not all(text.strip() for _, text in question.pairs):
            raise SystemExit(f"{path}: answers are missing in {row}")
        found.append(question)
    return found


@torch.no_grad()
def log_likelihoods(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[str, str]], batch_size: int = 32
) -> list[tuple[float, int]]:
    """Return (log-likelihood in nats, tokens) of the continuation of each (context, continuation).

    Context and continuation are tokenized together; a text longer than the model's positions loses its start.
    """
    longest, sequences = model.config.max_position_embeddings, []
    for context, continuation in pairs:
        whole = tokenizer(context + continuation, verbose=False)["input_ids"]
        tokens = max(1, len(whole) - len(tokenizer(context, verbose=False)["input_ids"]))
        sequences.append((whole[-longest - 1 :], tokens))
    found: list[tuple[float, int]] = [(0.0, 0)] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda index: len(sequences[index][0]))  # little padding
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        width = max(len(sequences[index][0]) for index in part)
        ids = torch.zeros((len(part), width), dtype=torch.int64)
        for row, index in enumerate(part):
            ids[row, : len(sequences[index][0])] = torch.tensor(sequences[index][0])
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits  # causal: padding behind changes nothing
        for row, index in enumerate(part):
            sequence, tokens = sequences[index]
            end = len(sequence)
            scores = logits[row, end - 1 - tokens : end - 1].float().log_softmax(dim=-1)
            found[index] = (scores.gather(1, ids[row, end - tokens : end, None]).sum().item(), tokens)
    return found


def score(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: str, questions: list[Question]) -> Score:
    """Score ``questions`` of ``task``."""
    values = iter(log_likelihoods(model, tokenizer, [pair for question in questions for pair in question.pairs]))
    right, normalized, loss, tokens = 0, 0, 0.0, 0
    for question in questions:
        sums = [next(values) for _ in question.pairs]
        plain = [value for value, _ in sums]
        by_length = [value / len(text.strip()) for value, (_, text) in zip(plain, question.pairs, strict=True)]
        right += plain.index(max(plain)) == question.right
        normalized += by_length.index(max(by_length)) == question.right
        loss -= plain[question.right]
        tokens += sums[question.right][1]
    count = len(questions)
    low, high = wilson(normalized, count)
    chance = statistics.mean(1 / len(question.pairs) for question in questions)
    return Score(task, count, chance, right / count, normalized / count, low, high, loss / tokens)


def wilson(successes: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    share, square = successes / count, z * z
    center = (share + square / (2 * count)) / (1 + square / count)
    half = z / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count * count))
    return center - half, center + half


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table; a score whose interval is above chance has a star."""
    lines = [
        "| model | task | questions | chance | accuracy | normalized (95% interval) | loss |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        star = " *" if row["low"] > row["chance"] else ""
        interval = f"{row['normalized']:.1%} ({row['low']:.1%} to {row['high']:.1%}){star}"
        lines.append(
            f"| {row['model']} | {row['task']} | {row['questions']} | {row['chance']:.1%} | {row['accuracy']:.1%} | "
            f"{interval} | {row['loss']:.3f} |"
        )
    return "\n".join(lines).replace("%", " %")


def main(arguments: list[str] | None = None) -> int:
    """Score each model on each task, print the table, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="`tiny`, or folders of checkpoints")
    parser.add_argument("--data", type=Path, required=True, help="folder with the public sets, see README.md here")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--limit", type=int, help="largest number of questions of a task")
    parser.add_argument("--json", type=Path, help="file to which rows are appended")
    options = parser.parse_args(arguments)
    if options.limit is not None and options.limit < 1:
        parser.error(f"--limit must be at least 1, got {options.limit}")
    questions = {task: read_questions(options.data, task, options.limit) for task in options.tasks}
    folders = {name: Path(resolve_model(name)) for name in options.models}
    for name, folder in folders.items():
        if not (folder / "config.json").exists():
            raise SystemExit(f"{name} is not a model: {folder / 'config.json'} not found")
    rows = []
    for folder in folders.values():
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        weights = {path.name: hash_file(path)[0] for path in sorted(folder.glob("*.safetensors"))}
        for task, asked in questions.items():
            found = dataclasses.asdict(score(model, tokenizer, task, asked))
            rows.append({"model": folder.name, **found, "weights_sha256": weights, "provenance": provenance()})
            print(f"{folder.name}, {task}: {found['normalized']:.3f}", file=sys.stderr, flush=True)
            if options.json:
                with options.json.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
