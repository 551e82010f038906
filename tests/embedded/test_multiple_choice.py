"""The scores of experiments/multiple_choice.py: likelihoods against an oracle, questions, intervals."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "experiments"))

import multiple_choice as choice  # noqa: E402

from edgefed.embedded import tiny_model_directory  # noqa: E402

LISTED = (
    "Please choose the correct answer to the question: What is {0}?\n\nAnswer1: a cat Answer2: one dog, or two"
    "\n\nAnswer format: answer1/answer2"
)
ROWS = {
    "ARC-Easy": (LISTED.format("it"), "answer2", "Question: What is it?\nAnswer:", [" a cat", " one dog, or two"], 1),
    "boolq": (
        "Please answer the following question with true or false, question: is it?\n\nAnswer format: true/false",
        "true", "Question: is it?\nAnswer:", [" no", " yes"], 1,
    ),
    "AQuA": ("2 + 2? Answer Choices: (A) 3 (B) 4", "B", "Question: 2 + 2?\nAnswer:", [" 3", " 4"], 1),
    "mathqa": ("2 + 2 ? The options: ['A ) 3', 'B ) 4 , 0']", "A", "Question: 2 + 2 ?\nAnswer:", [" 3", " 4 , 0"], 0),
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_model_directory()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    torch.set_num_threads(threads)


def write_set(data: Path, task: str, rows: list[dict]) -> None:
    path = data / "mcq_math_tasks" / task / "test.json.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(json.dumps(rows).encode()))


@pytest.mark.parametrize("task", ROWS)
def test_rows_become_questions(task, tmp_path):
    instruction, answer, context, continuations, right = ROWS[task]
    write_set(tmp_path, task, [{"instruction": instruction, "answer": answer}])
    (question,) = choice.read_questions(tmp_path, task)
    assert question == choice.Question(tuple((context, each) for each in continuations), right)


def test_winogrande_scores_the_rest_of_the_sentence(tmp_path):
    text = "complete the given sentence: Ann saw Eve, so _ ran.\n\nOption1: Ann Option2: Eve Answer format"
    write_set(tmp_path, "winogrande", [{"instruction": text, "answer": "option1"}])
    (question,) = choice.read_questions(tmp_path, "winogrande")
    assert question.pairs == (("Ann saw Eve, so Ann", " ran."), ("Ann saw Eve, so Eve", " ran."))
    assert question.right == 0


def test_a_row_without_its_answers_is_refused(tmp_path):
    write_set(tmp_path, "AQuA", [{"instruction": "2 + 2?", "answer": "B"}])
    with pytest.raises(SystemExit, match="answers are missing"):
        choice.read_questions(tmp_path, "AQuA")
    with pytest.raises(SystemExit, match="is absent; experiments/README.md"):
        choice.read_questions(tmp_path, "boolq")


def test_likelihoods_are_those_of_one_text_after_another(tiny):
    model, tokenizer = tiny
    pairs = [
        ("import os\nprint(", "os.path)"),
        ("def f(x):", " return x\n" * 9),
        ("a", " b"),
        ("class A:\n", "    pass"),
    ]
    found = choice.log_likelihoods(model, tokenizer, pairs, batch_size=3)
    for (context, continuation), (value, tokens) in zip(pairs, found, strict=True):
        ids = tokenizer(context + continuation, return_tensors="pt")["input_ids"]
        start = len(tokenizer(context)["input_ids"])
        with torch.no_grad():
            scores = model(input_ids=ids).logits[0].log_softmax(dim=-1)
        expected = sum(scores[place - 1, ids[0, place]].item() for place in range(start, ids.shape[1]))
        assert tokens == ids.shape[1] - start
        assert value == pytest.approx(expected, rel=1e-4)


def test_a_text_longer_than_the_positions_keeps_its_end(tiny):
    model, tokenizer = tiny
    longest = model.config.max_position_embeddings
    (long, tokens), (cut, _) = (
        choice.log_likelihoods(model, tokenizer, [("a b" * count, " return")])[0] for count in (longest, longest // 2)
    )
    assert tokens >= 1
    assert abs(long - cut) < 3


def test_normalized_scores_do_not_prefer_short_answers(tiny):
    model, tokenizer = tiny
    context = "    def __init__(self, name):\n        self.name ="
    questions = [choice.Question(((context, " name\n        self._value = None\n"), (context, " q")), 0)] * 2
    score = choice.score(model, tokenizer, "toy", questions)
    assert (score.questions, score.chance) == (2, 0.5)
    assert score.accuracy == 0.0  # many tokens cost more than one that is unlikely
    assert score.normalized == 1.0
    assert score.loss > 0


def test_wilson_interval():
    # Newcombe (1998), table I, method 3 without continuity correction: 81/263, 15/148, 0/20, 1/29
    for successes, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)):
        assert choice.wilson(successes, count) == pytest.approx((low, high), abs=1e-4)


def test_the_table_and_the_rows(tmp_path, capsys):
    rows = [{"instruction": LISTED.format(index), "answer": "answer2"} for index in range(5)]
    write_set(tmp_path, "ARC-Easy", rows)
    path = tmp_path / "rows.jsonl"
    arguments = ["tiny", "--data", str(tmp_path), "--tasks", "ARC-Easy", "--limit", "3", "--json", str(path)]
    assert choice.main(arguments) == 0
    (row,) = [json.loads(line) for line in path.read_text().splitlines()]
    assert (row["model"], row["task"], row["questions"], row["chance"]) == ("tiny", "ARC-Easy", 3, 0.5)
    assert row["low"] <= row["normalized"] <= row["high"]
    output = capsys.readouterr().out
    assert "normalized (95 % interval)" in output
    assert "| tiny | ARC-Easy | 3 | 50.0 % |" in output
    with pytest.raises(SystemExit, match="is not a model"):
        choice.main([str(tmp_path), "--data", str(tmp_path), "--tasks", "ARC-Easy"])
