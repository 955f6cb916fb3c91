"""Evaluation of a run's folder from end to end, against answers and counts worked out without our data code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import PreTrainedModel

from moe_lvlm.analysis.examples import ExampleStore
from moe_lvlm.analysis.statistics import RoutingStatistics
from moe_lvlm.evaluation.runner import evaluate
from moe_lvlm.routing.types import Site

from .conftest import IMAGE_SIZE, IMAGE_TOKENS, NAMES, TinyPrompt, greedy_by_hand, write_run

QUESTIONS = ("what is it ?", "how many cat is it ?", "where is it ?")
NEW_TOKENS = 4
NUM_IMAGES = 3


def ids_by_hand(question: str, *, image: bool) -> torch.Tensor:
    """The tiny tokenizer's words and the tiny chat template, written out."""
    marks = ["<image>"] * IMAGE_TOKENS if image else []
    words = ["<s>", "Q", ":", *marks, *question.split(), "A", ":"]
    return torch.tensor([NAMES.index(word) for word in words])


def pixels_by_hand(image: np.ndarray) -> torch.Tensor:
    """[1, 3, H, W]: the tiny image processor maps 0 .. 255 to -1 .. 1."""
    return torch.tensor(image, dtype=torch.float32).permute(2, 0, 1)[None] / 127.5 - 1


def answer_by_hand(model: PreTrainedModel, prompt: TinyPrompt) -> str:
    ids = greedy_by_hand(model, prompt, steps=NEW_TOKENS, end_id=NAMES.index("</s>"))
    return " ".join(NAMES[token] for token in ids if token >= NAMES.index("what"))


@pytest.fixture
def pictures(tmp_path: Path) -> list[np.ndarray]:
    """Images and masks on the disk, below tmp_path/data; the mask of image i covers its i + 1 first patches."""
    folder = tmp_path / "data"
    folder.mkdir()
    generator = np.random.default_rng(3)
    images = []
    for index in range(NUM_IMAGES):
        pixels = generator.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        patches = (np.arange(IMAGE_TOKENS) <= index).reshape(2, 2)
        mask = patches.repeat(IMAGE_SIZE // 2, axis=0).repeat(IMAGE_SIZE // 2, axis=1)
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / f"{index}-mask.png")
        images.append(pixels)
    return images


def record(question: str, answer: str, **keys: Any) -> dict[str, Any]:
    value = f"<image>\n{question}" if "image" in keys else question
    return {"conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]} | keys


def write_set(folder: Path, name: str, records: Sequence[object]) -> None:
    (folder / f"{name}.json").write_text(json.dumps(records))


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("batch_size", [None, 1, 4])
def test_scores_predictions_and_routing_of_a_run(
    tmp_path: Path,
    moe_model: PreTrainedModel,
    processor: Any,
    pictures: list[np.ndarray],
    batch_size: int | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    truth, records = [], []
    for index, pixels in enumerate(pictures):
        for question in QUESTIONS:
            prompt = TinyPrompt(ids_by_hand(question, image=True), pixels_by_hand(pixels))
            truth.append(answer_by_hand(moe_model, prompt))
            # every third answer is the model's own, so the accuracy of each task is 1 / 3
            answer = truth[-1] if QUESTIONS[index] == question else "no such words"
            task = question.split()[0]
            keys = {"image": f"{index}.png", "mask": f"{index}-mask.png", "task": task, "id": f"{index}-{task}"}
            records.append(record(question, answer, **keys))
    truth.append(answer_by_hand(moe_model, TinyPrompt(ids_by_hand("dog ?", image=False), None)))
    records.append(record("dog ?", truth[-1]))
    assert all(truth) and len(set(truth)) >= 4
    run = write_run(tmp_path, moe_model, processor, sets={"tiny": NEW_TOKENS})
    write_set(tmp_path / "data", "tiny", records)
    (run / "metrics.json").write_text(json.dumps({"seconds": 5, "eval": {"older": {"n": 1}, "tiny": {"n": 1}}}))

    scores = evaluate(run, batch_size=batch_size, device="cpu")

    third = {"accuracy": pytest.approx(1 / 3), "majority": pytest.approx(2 / 3), "n": 3}
    expected = {"how": third, "tiny": {"accuracy": 1.0, "majority": 1.0, "n": 1}, "what": third, "where": third}
    assert scores == expected
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics == {"seconds": 5, "eval": {"older": {"n": 1}} | expected}

    lines = read_lines(run / "eval" / "tiny" / "predictions.jsonl")
    assert [line["prediction"] for line in lines] == truth
    assert [line["correct"] for line in lines] == [True, False, False, False, True, False, False, False, True, True]
    assert lines[4] == {
        "key": "tiny/4",
        "task": "how",
        "image": str((tmp_path / "data" / "1.png").resolve()),
        "question": QUESTIONS[1],
        "prediction": truth[4],
        "answer": truth[4],
        "correct": True,
    }
    assert lines[9]["image"] is None and lines[9]["task"] == "tiny"

    statistics = RoutingStatistics.from_npz(run / "eval" / "tiny" / "routing.npz")
    num_vision = 9 * IMAGE_TOKENS
    # <s> Q : A : and the words of each question
    num_language = 3 * sum(5 + len(question.split()) for question in QUESTIONS) + 7
    assert [site for site, _ in statistics.items()] == [Site("language_model", layer) for layer in range(3)]
    for _, site in statistics.items():
        assert site.tokens[:2].tolist() == [num_language, num_vision]
        # top-1 for language; a vision token takes 1 expert, or 3 in the tail
        assert site.load.sum(axis=1).tolist() == [num_language, num_vision + 2 * site.tokens[2]]
        agreement = site.foreground_agreement()
        assert agreement is not None
        assert (agreement.num_images, agreement.num_tokens) == (9, num_vision)
        assert agreement.foreground_share == pytest.approx((1 + 2 + 3) / (3 * IMAGE_TOKENS))
    examples = list(ExampleStore.from_npz(run / "eval" / "tiny" / "examples.npz"))
    assert [example.key for example in examples] == ["tiny/0", "tiny/3", "tiny/6"]
    assert all(np.array_equal(example.image, image) for example, image in zip(examples, pictures, strict=True))
    assert examples[1].foreground is not None and examples[1].foreground.tolist() == [1, 1, 0, 0]
    assert "majority" in capsys.readouterr().out


def test_a_dense_run_has_no_routing_and_limits_hold(
    tmp_path: Path, dense_model: PreTrainedModel, processor: Any, pictures: list[np.ndarray]
) -> None:
    run = write_run(tmp_path, dense_model, processor, sets={"a": 1, "b": 2})
    for name in "ab":
        write_set(tmp_path / "data", name, [record(q, "cat", image="0.png", task=f"{name}{q}") for q in QUESTIONS])
    stale = run / "eval" / "b" / "routing.npz"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of an older model")

    scores = evaluate(run, limit=2, tasks=["b"], device="cpu", dtype="bfloat16")
    assert {task: score["n"] for task, score in scores.items()} == {f"b{QUESTIONS[0]}": 1, f"b{QUESTIONS[1]}": 1}
    assert sorted(path.name for path in (run / "eval").rglob("*")) == ["b", "predictions.jsonl"]


def test_a_later_turn_is_answered_with_its_history(
    tmp_path: Path, dense_model: PreTrainedModel, processor: Any, pictures: list[np.ndarray]
) -> None:
    run = write_run(tmp_path, dense_model, processor, sets={"tiny": NEW_TOKENS})
    long = record("what is it ?", "cat dog", image="2.png")
    long["conversations"] += record("how many ?", "one")["conversations"]
    write_set(tmp_path / "data", "tiny", [long])
    evaluate(run, device="cpu")
    words = [
        "<s>",
        "Q",
        ":",
        "<image>",
        "<image>",
        "<image>",
        "<image>",
        "what",
        "is",
        "it",
        "?",
        "A",
        ":",
        "cat",
        "dog",
        "</s>",
        "Q",
        ":",
        "how",
        "many",
        "?",
        "A",
        ":",
    ]
    prompt = TinyPrompt(torch.tensor([NAMES.index(word) for word in words]), pixels_by_hand(pictures[2]))
    [line] = read_lines(run / "eval" / "tiny" / "predictions.jsonl")
    assert line["prediction"] == answer_by_hand(dense_model, prompt)
    assert (line["question"], line["answer"]) == ("how many ?", "one")


BAD_RECORDS = [
    ({"id": "x7", "conversations": []}, "conversations is empty"),
    (record("what ?", "cat", image="7.png", id="x7"), "'7.png'"),
    (record("what ?", "cat", image="../secret.png", id="x7"), "leaves the image root"),
    (record("what ?", "cat", image="0.png", mask="7-mask.png", id="x7"), "'7-mask.png'"),
    (record("what ?", "cat", image="0.png", mask="wide.png", id="x7"), "16 x 8"),
    (record("what ?", "cat", image="0.png", mask="alpha.png", id="x7"), "RGBA"),
    (record("what ?", "cat", mask="0-mask.png", id="x7"), "0 images"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD_RECORDS)
def test_a_bad_record_is_an_error_that_names_it(
    tmp_path: Path,
    dense_model: PreTrainedModel,
    processor: Any,
    pictures: list[np.ndarray],
    bad: dict[str, Any],
    reason: str,
) -> None:
    run = write_run(tmp_path, dense_model, processor, sets={"tiny": 1})
    Image.new("L", (16, 8)).save(tmp_path / "data" / "wide.png")
    Image.new("RGBA", (8, 8)).save(tmp_path / "data" / "alpha.png")
    write_set(tmp_path / "data", "tiny", [record("what ?", "cat", image="0.png"), bad])
    with pytest.raises(ValueError, match=r"tiny\.json: record 1 \(id 'x7'\)") as caught:
        evaluate(run, device="cpu")
    assert reason in str(caught.value)
    assert not (run / "metrics.json").exists()
    assert not list((run / "eval" / "tiny").glob("*")) and not list((run / "eval" / "tiny").glob(".*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"limit": 0}, "limit: 0"),
        ({"batch_size": 0}, "batch_size: 0"),
        ({"tasks": ["tin"]}, "tasks: tin; allowed: tiny"),
        ({"device": "abacus"}, "device: 'abacus'"),
        ({"dtype": "float8"}, "dtype: 'float8'; allowed: float32, bfloat16"),
    ],
)
def test_wrong_arguments_are_named(
    tmp_path: Path, dense_model: PreTrainedModel, processor: Any, arguments: dict[str, Any], message: str
) -> None:
    (tmp_path / "data").mkdir()
    run = write_run(tmp_path, dense_model, processor, sets={"tiny": 1})
    write_set(tmp_path / "data", "tiny", [record("what ?", "cat")])
    with pytest.raises(ValueError, match=message):
        evaluate(run, **arguments)


def test_folders_that_are_no_finished_run_are_refused(
    tmp_path: Path, dense_model: PreTrainedModel, processor: Any
) -> None:
    with pytest.raises(ValueError, match="absent: no such folder"):
        evaluate(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"recipe\.yaml is missing"):
        evaluate(tmp_path)

    (tmp_path / "data").mkdir()
    run = write_run(tmp_path, dense_model, processor, sets={"tiny": 1})
    write_set(tmp_path / "data", "tiny", [record("what ?", "cat")])
    (run / "config.json").unlink()
    with pytest.raises(ValueError, match=r"neither a run \(checkpoints/\) nor a model"):
        evaluate(run, device="cpu")
    (run / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="without a valid checkpoint"):
        evaluate(run, device="cpu")


def test_recipes_without_usable_sets_are_refused(tmp_path: Path, dense_model: PreTrainedModel, processor: Any) -> None:
    (tmp_path / "data").mkdir()
    run = write_run(tmp_path, dense_model, processor, sets={})
    with pytest.raises(ValueError, match=r"evaluation\.tasks: the recipe names no evaluation set"):
        evaluate(run)

    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    for name in "ab":
        write_set(tmp_path / "data", name, [record("what ?", "cat", task="what")])
    recipe["evaluation"] = {"tasks": [{"name": name, "path": f"{name}.json"} for name in "ab"]}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(ValueError, match="task 'what': the sets a and b both"):
        evaluate(run)

    for names, message in ((["../b"], "it names a folder"), (["a", "a"], "a name of its own")):
        recipe["evaluation"] = {"tasks": [{"name": name, "path": "a.json"} for name in names]}
        (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        with pytest.raises(ValueError, match=message):
            evaluate(run)


def test_broken_metrics_are_not_overwritten(tmp_path: Path, dense_model: PreTrainedModel, processor: Any) -> None:
    (tmp_path / "data").mkdir()
    run = write_run(tmp_path, dense_model, processor, sets={"tiny": 1})
    write_set(tmp_path / "data", "tiny", [record("what ?", "cat")])
    for text in ("{", "[]", '{"eval": 3}'):
        (run / "metrics.json").write_text(text)
        with pytest.raises(ValueError, match=r"metrics\.json"):
            evaluate(run, device="cpu")
        assert (run / "metrics.json").read_text() == text
