"""Every metric from a run's recipe to its metrics.json, on the tiny model's own answers."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from rich.console import Console
from transformers import PreTrainedModel

from moe_lvlm.analysis.report import write_report
from moe_lvlm.analysis.run_folder import RunFolder
from moe_lvlm.evaluation.metrics import TaskScore
from moe_lvlm.evaluation.metrics.mme import PERCEPTION
from moe_lvlm.evaluation.results import print_scores
from moe_lvlm.evaluation.runner import evaluate

from .conftest import IMAGE_SIZE, write_run

QUESTIONS = ("what is it ?", "where is it ?", "how many cat ?", "is it left ?")
WORDLESS = "zebra"


def record(question: str, answer: str, *, image: str = "0.png", **keys: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, "image": image} | keys


@pytest.fixture
def run(tmp_path: Path, dense_model: PreTrainedModel, processor: Any) -> Path:
    (tmp_path / "data").mkdir()
    for number in range(2):
        color = (40, 200 - 90 * number, 90 * number)
        Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), color).save(tmp_path / "data" / f"{number}.png")
    made = write_run(tmp_path, dense_model, processor, sets={"tiny": 2})
    (made / "log.jsonl").write_text("")
    return made


def score(run: Path, metric: str, records: Sequence[object]) -> dict[str, float | int]:
    """What evaluation says of the records; the same is in metrics.json."""
    (run.parent / "data" / "tiny.json").write_text(json.dumps(records))
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["evaluation"]["tasks"][0]["metric"] = metric
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    found = evaluate(run, device="cpu")["tiny"]
    assert json.loads((run / "metrics.json").read_text())["eval"]["tiny"] == found
    return found


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "eval" / "tiny" / "predictions.jsonl").read_text().splitlines()]


@pytest.fixture
def said(run: Path) -> list[str]:
    """What the model answers to the questions about the first image."""
    score(run, "exact_match", [record(question, WORDLESS) for question in QUESTIONS])
    answers = [line["prediction"] for line in lines(run)]
    assert all(answers) and len(set(answers)) > 1
    return answers


def test_choice(run: Path, said: list[str]) -> None:
    assert [text for text in said if text in "ABCDEF"] == ["A"]  # of the others' words, one happens to be a letter
    # its own words are the second option of the first question, and none of the others'
    options = [[WORDLESS, said[0]], *[["lion", WORDLESS]] * 3]
    groups = ["x", "y", "y", "x"]
    records = [
        record(question, "B", options=option, group=group)
        for question, option, group in zip(QUESTIONS, options, groups, strict=True)
    ]
    found = score(run, "choice", records)
    assert found == {"accuracy": 0.25, "majority": 1.0, "n": 4, "no_letter": 0.5, "circular": 0.0}
    assert [line["correct"] for line in lines(run)] == [True, False, False, False]


def test_choice_by_text(run: Path, said: list[str]) -> None:
    # its own words are an option of the first two questions, and right for the first
    options = [[WORDLESS, said[0]], [said[1], WORDLESS], *[["lion", WORDLESS]] * 2]
    answers = [said[0], *[WORDLESS] * 3]
    records = [
        record(question, answer, options=option)
        for question, answer, option in zip(QUESTIONS, answers, options, strict=True)
    ]
    found = score(run, "choice", records)
    assert found == {"accuracy": 0.25, "majority": 0.75, "n": 4, "no_letter": 0.5}
    assert [line["correct"] for line in lines(run)] == [True, False, False, False]


def test_cider(run: Path, said: list[str]) -> None:
    words = [text.split() for text in said]
    assert min(map(len, words)) >= 1 and said[0] != said[1]
    # the first question's caption is its only reference, the others share no word with theirs
    references = [[said[0]], [WORDLESS], ["lion"], ["bear wolf fox"]]
    records = [
        record(question, known[0], references=known) for question, known in zip(QUESTIONS, references, strict=True)
    ]
    found = score(run, "cider", records)
    # equal to its reference: cosine 1 for each length of n-gram that the caption has, of four
    first = 10 * min(len(words[0]), 4) / 4
    assert found["accuracy"] == pytest.approx(first / 4)
    # of the constants, the longest gets most, beside its own image alone: three lengths of four
    assert found["majority"] == pytest.approx(max(first, 7.5) / 4)
    assert (found["n"], found["words"]) == (4, sum(map(len, words)) / 4)
    assert [line["credit"] for line in lines(run)] == pytest.approx([first, 0, 0, 0])
    assert {line["correct"] for line in lines(run)} == {None}
    console = Console(file=io.StringIO(), width=120)
    print_scores({"tiny": TaskScore(1.3921, 0.5, 4)}, console=console)
    assert "1.392" in console.file.getvalue()


def test_vqa_beside_one_answer(run: Path, said: list[str]) -> None:
    answers = [f"The {said[0].upper()}.", *[WORDLESS] * 3]
    records = [record(question, answer, answers=[answer]) for question, answer in zip(QUESTIONS, answers, strict=True)]
    assert score(run, "vqa", records) == {"accuracy": 0.25, "majority": 0.75, "n": 4}


def test_vqa(run: Path, said: list[str]) -> None:
    # people who said what the model says, of ten: .9, .3, 0 and 1
    people = (3, 1, 0, 4)
    records = [
        record(question, WORDLESS, answers=[text] * count + [WORDLESS] * (10 - count))
        for question, text, count in zip(QUESTIONS, said, people, strict=True)
    ]
    found = score(run, "vqa", records)
    assert found == {"accuracy": pytest.approx(2.2 / 4), "majority": pytest.approx(1.0), "n": 4}
    assert [line["credit"] for line in lines(run)] == pytest.approx([0.9, 0.3, 0.0, 1.0])
    assert [line["correct"] for line in lines(run)] == [True, False, False, True]


def test_yes_no(run: Path, said: list[str]) -> None:
    assert not any("no" in text.split() for text in said)  # so each of them counts as yes
    labels = ["yes", "no", "yes", "yes"]
    splits = ["random", "random", "popular", "popular"]
    records = [
        record(question, label, category=split)
        for question, label, split in zip(QUESTIONS, labels, splits, strict=True)
    ]
    found = score(run, "yes_no", records)
    # precision 3/4, recall 1; random 1/2 and 1, popular 1 and 1
    whole = {"precision": 0.75, "recall": 1.0, "f1": 6 / 7, "yes_ratio": 1.0, "mean_f1": (2 / 3 + 1) / 2}
    popular = {f"popular/{name}": 1.0 for name in ("accuracy", "precision", "recall", "f1", "yes_ratio")}
    random = dict(zip(popular, (0.5, 0.5, 1.0, 2 / 3, 1.0), strict=True))
    random = {name.replace("popular", "random"): value for name, value in random.items()}
    assert found == pytest.approx({"accuracy": 0.75, "majority": 0.75, "n": 4} | whole | popular | random)
    shown = dict(RunFolder(run).scores[0].further)
    assert shown[""] == "precision 0.750, recall 1.000, f1 0.857, yes ratio 1.000, mean f1 0.833"
    assert shown["random"] == "accuracy 0.500, precision 0.500, recall 1.000, f1 0.667, yes ratio 1.000"


def test_mme(run: Path, said: list[str]) -> None:
    assert not any("no" in text[:4] or "yes" in text[:4] for text in said)  # so nothing is right
    records = [
        record(question, label, image=f"{number}.png", category=category)
        for category in PERCEPTION
        for number in range(2)
        for question, label in zip(QUESTIONS[:2], ("Yes", "No"), strict=True)
    ]
    found = score(run, "mme", records)
    assert (found["accuracy"], found["accuracy_plus"], found["perception"]) == (0, 0, 0)
    assert (found["n"], found["other"], found["majority"]) == (40, 1, 0.5)
    assert "cognition" not in found


def test_the_report_shows_all_numbers(run: Path) -> None:
    page = write_report(run).read_text()
    assert "There are no scores" in page
    scores = {"plain": {"accuracy": 0.5, "majority": 0.25, "n": 4}}
    (run / "metrics.json").write_text(json.dumps({"eval": scores}))
    assert "<th>more</th>" not in write_report(run).read_text()
    scores["mme"] = scores["plain"] | {"perception": 1335.52, "OCR/score": 140.0}
    (run / "metrics.json").write_text(json.dumps({"eval": scores}))
    page = write_report(run).read_text()
    assert "<th>more</th>" in page and "perception 1335.5<br>" in page and "OCR: score 140.0<br>" in page


def test_the_printed_table_leaves_single_categories_out() -> None:
    console = Console(file=io.StringIO(), width=120)
    details = {"mean_f1": 0.8571, "random/f1": 0.9}
    print_scores({"pope": TaskScore(0.5, 0.5, 2, details), "plain": TaskScore(0.5, 0.5, 2)}, console=console)
    text = console.file.getvalue()
    assert "mean f1 0.857" in text and "random" not in text and "0.900" not in text
    console = Console(file=io.StringIO(), width=120)
    print_scores({"plain": TaskScore(0.5, 0.5, 2)}, console=console)
    assert "more" not in console.file.getvalue() and "┃  ┃" not in console.file.getvalue()


@pytest.mark.parametrize(
    ("metric", "keys", "message"),
    [
        ("vqa", {"answers": ["a"] * 9}, r"record 0: answers: 9 given; .* \(metric vqa\)"),
        ("vqa", {"answers": "cat"}, "record 0: answers is 'cat'; allowed: a list of strings"),
        ("vqa", {"answers": [{"answer": "a"}] * 10}, "record 0: answers is .*; allowed: a list of strings"),
        ("vqa", {}, "record 0: answers: 0 given"),
        ("cider", {}, r"record 0: references: \[\]; allowed: at least one caption .* \(metric cider\)"),
        ("cider", {"references": "a cat"}, "record 0: references is 'a cat'; allowed: a list of strings"),
        ("choice", {}, "record 0: the answer 'zebra' chooses nothing"),
        ("choice", {"options": {"A": "cat"}}, "record 0: options is .*; allowed: a list of strings"),
        ("choice", {"options": ["cat", "zebra"], "group": 3}, "record 0: group is 3; allowed: a string"),
        ("yes_no", {"category": ""}, "record 0: category is ''; allowed: a string"),
        ("yes_no", {}, "record 0: the answer is 'zebra'; allowed: yes and no"),
        ("mme", {"category": "OCR"}, "record 0: the answer is 'zebra'; allowed: yes and no"),
    ],
)
def test_records_that_a_metric_cannot_score_are_named(
    run: Path, metric: str, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        score(run, metric, [record(QUESTIONS[0], WORDLESS, **keys)])
    assert not (run / "metrics.json").exists()


def test_sets_that_do_not_fit_together_are_named(run: Path) -> None:
    records = [record(QUESTIONS[0], "yes", category="OCR")]
    with pytest.raises(ValueError, match=r"tiny\.json: task 'tiny': metric mme: image '0\.png' .* has 1 question"):
        score(run, "mme", records)


def test_keys_of_other_metrics_are_left_alone(run: Path) -> None:
    keys: dict[str, Any] = {"answers": 3, "options": "x", "group": [], "category": {}}
    assert score(run, "exact_match", [record(QUESTIONS[0], WORDLESS, **keys)])["n"] == 1


def test_an_unknown_metric_is_refused(run: Path) -> None:
    with pytest.raises(ValueError, match=r"evaluation\.tasks\.0\.metric: .*'bleu'"):
        score(run, "bleu", [record(QUESTIONS[0], WORDLESS)])
