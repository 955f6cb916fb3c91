"""The report on made-up runs: sections, pictures, escaping, and what is said where something is missing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from moe_lvlm.analysis.report import write_report

RunMaker = Callable[..., Path]

FIGURES = {"loss", "load-training", "accuracy", "load-modality", "rpv", "tail-examples", "tail-foreground"}
SECTIONS = ["scores", "training", "routing", "tail", "predictions", "settings"]


class Page(HTMLParser):
    """Tags, picture files, section ids and the text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.images: list[str] = []
        self.sections: list[str] = []
        self.text = ""
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        if tag == "img":
            self.images.append(values["src"] or "")
        if tag == "section":
            self.sections.append(values["id"] or "")

    def handle_data(self, data: str) -> None:
        self.text += f"{data} "

    @property
    def flat(self) -> str:
        return re.sub(r"\s+", " ", self.text)


@pytest.fixture(scope="module")
def whole(run_maker: RunMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything, nasty text in its predictions, and its report."""
    run = run_maker(tmp_path_factory.mktemp("runs") / "whole")
    path = run / "eval" / "scenes" / "predictions.jsonl"
    nasty = {
        "key": "<b>k</b>", "task": "<i>odd</i>", "image": None, "question": "</p><img src=x>",
        "prediction": "<script>alert(1)</script>", "answer": '"&', "correct": False,
    }  # fmt: skip
    gone = nasty | {"key": "gone", "task": "lost", "image": "nowhere/x.png"}
    with path.open("a") as file:
        file.write(json.dumps(nasty) + "\n" + json.dumps(gone) + "\n")
    (run / "bad_samples.jsonl").write_text('{"key": "a"}\n{"key": "b"}\n')
    (run / "report").mkdir()
    (run / "report" / "old.png").write_bytes(b"")
    assert write_report(str(run)) == run / "report" / "index.html"
    return run / "report"


def test_page_has_all_sections_and_figures(whole: Path) -> None:
    page = Page(whole / "index.html")
    assert page.sections == SECTIONS
    assert {f"{name}.png" for name in FIGURES} <= set(page.images)
    assert "Made by" not in page.text


def test_pictures_are_there_and_show_something(whole: Path) -> None:
    page = Page(whole / "index.html")
    assert set(page.images) == {path.name for path in whole.glob("*.png")}
    for name in page.images:
        with Image.open(whole / name) as image:
            assert np.asarray(image.convert("L")).std() > 1, name
            assert name.startswith("prediction") or image.width >= 700, name


def test_text_of_the_model_is_escaped(whole: Path) -> None:
    page = Page(whole / "index.html")
    assert "script" not in page.tags
    assert "i" not in page.tags
    for text in ("<script>alert(1)</script>", "</p><img src=x>", "<i>odd</i>", "<b>k</b>", 'expected: "&'):
        assert text in page.text


def test_page_needs_nothing_from_outside(whole: Path) -> None:
    page = Page(whole / "index.html")
    assert not re.search(r"(https?:)?//\w", page.html)
    assert "link" not in page.tags


def test_numbers_on_the_page(whole: Path) -> None:
    text = Page(whole / "index.html").flat
    assert "what 92.5 % 8.0 % 80" in text
    assert "2 bad samples left out" in text
    assert "1.23 M parameters" in text
    assert "270 steps" in text
    assert "54.0 s training time" in text  # 270 steps of .2 s
    assert "1.08 M tokens" in text  # 270 steps of 4000
    assert "20,000 tokens a second" in text
    assert "4, top 2, layers: sparse" in text
    assert "ltdr, tail_k all, tail_scope batch" in text
    assert "torch 2.13.0" in text
    assert "The image nowhere/x.png is not there any more." in text


def test_run_without_evaluation_says_what_makes_one(run_maker: RunMaker, tmp_path: Path) -> None:
    run = run_maker(tmp_path / "run", evaluated=False)
    (run / "DONE").unlink()
    (run / "environment.txt").unlink()
    page = Page(write_report(run))
    assert page.sections == SECTIONS
    assert page.images == ["loss.png", "load-training.png"]
    for text in ("There are no scores", "There are no routing statistics", "There are no tail", "no predictions"):
        assert text in page.flat
    assert page.flat.count(f"moe-lvlm eval {run}") == 4
    assert "there is no environment.txt" in page.flat
    assert "Run not finished" in page.flat


def test_dense_run_has_no_routing(run_maker: RunMaker, tmp_path: Path) -> None:
    page = Page(write_report(run_maker(tmp_path / "run", moe=False)))
    assert {"loss.png", "accuracy.png"} == {name for name in page.images if not name.startswith("prediction")}
    assert "There are no routing statistics: the model has no MoE layer" in page.flat
    assert "the model is dense" in page.flat


def test_run_that_has_just_begun(run_maker: RunMaker, tmp_path: Path) -> None:
    run = run_maker(tmp_path / "run", evaluated=False)
    (run / "log.jsonl").write_text("")
    page = Page(write_report(run))
    assert page.images == []
    assert "log.jsonl holds no training step yet" in page.flat


@pytest.mark.parametrize(("name", "message"), [("recipe.yaml", "recipe.yaml missing"), ("log.jsonl", "log.jsonl")])
def test_folder_that_is_no_run_is_refused(run_maker: RunMaker, tmp_path: Path, name: str, message: str) -> None:
    run = run_maker(tmp_path / "run", evaluated=False)
    (run / name).unlink()
    with pytest.raises(ValueError, match=message):
        write_report(run)
    assert not (run / "report").exists()


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        write_report(tmp_path / "none")


def test_what_was_dropped_is_told_by_modality(run_maker: RunMaker, tmp_path: Path) -> None:
    run = run_maker(tmp_path / "run", layers=(2,))
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["moe"]["capacity_factor"] = 1.5
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (path,) = run.glob("eval/*/routing.npz")
    with np.load(path) as old:
        arrays = dict(old)
    arrays["0.load"] = np.array([[60, 39, 0, 0], [100, 50, 25, 25]])
    arrays["0.dropped"] = np.array([[1, 0, 0, 0], [0, 50, 0, 0]])
    np.savez(path, **arrays)
    page = write_report(run).read_text()
    # one of 100 language assignments, fifty of 250 vision ones
    assert "Dropped for want of capacity" in page
    assert '<td>2</td><td class="number">1.00 %</td><td class="number">20.00 %</td>' in page


def test_experts_that_came_and_went_are_counted(run_maker: RunMaker, tmp_path: Path) -> None:
    run = run_maker(tmp_path / "run")

    def event(step: int, active: int, added: list[int], removed: list[int]) -> str:
        layers = {"2": {"active": active, "added": added, "removed": removed, "taken": [], "unrouted": 0}}
        return json.dumps({"event": "experts", "stage": "moe", "step": step, "layers": layers}) + "\n"

    with (run / "log.jsonl").open("a") as log:
        log.write(event(10, 3, [], [1]))
        log.write(event(20, 2, [], [0]))
        log.write(event(20, 4, [1], []))  # the same step again, after a resume
    page = write_report(run).read_text()
    assert "Experts that came and went" in page
    row = re.search(r"<tr><td>2</td>((?:\s*<td class=\"number\">\d+</td>)+)</tr>", page)
    assert row is not None
    # active at last 4; added once, dropped once; looked twice
    assert re.findall(r"\d+", row[1]) == ["4", "1", "1", "2"]


@pytest.fixture(scope="module")
def qmoe(run_maker: RunMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with experts in the connector only, and its report."""
    run = run_maker(tmp_path_factory.mktemp("runs") / "qmoe", moe=False, qmoe=True)
    for path in run.glob("eval/scenes/*.npz"):
        path.unlink()
    write_report(run)
    return run / "report"


def test_experts_of_the_connector_have_a_section(qmoe: Path) -> None:
    page = Page(qmoe / "index.html")
    assert page.sections == [*SECTIONS[:3], "paths", *SECTIONS[3:]]
    shown = {name for name in page.images if not name.startswith("prediction")}
    assert shown == {"loss.png", "load-training-connector.png", "accuracy.png", "paths.png", "load-connector.png"}
    for name in shown:
        with Image.open(qmoe / name) as image:
            assert np.asarray(image.convert("L")).std() > 1
            assert 700 <= image.width <= 2000, name
    assert "In each of the connector's layers 6, 7, 8, 9, 10, 11 an image takes one of 3 experts" in page.flat
    assert "1,600 images took 9 of 729 possible paths" in page.flat
    # four tasks of like size: log 4
    assert "of 1.386 if every path belonged to one task" in page.flat
    assert "0 of 1,000 shuffles reach the measured value: paths depend on the task (" in page.flat
    assert "Q-MoE: 3 experts and a general one in the top 6 layers, router cross, chosen by path, 3 kept" in page.flat


def test_sections_on_tokens_say_that_experts_are_in_the_connector(qmoe: Path) -> None:
    text = Page(qmoe / "index.html").flat
    assert "No MoE layer of the language model was measured: the connector's experts are under Expert paths" in text
    assert "the visual tokens of this connector are no patches of the image" in text
    assert "in the connector only: no stage says upcycle" in text
    assert "Made by" not in text


def test_cider_is_no_percentage(qmoe: Path) -> None:
    text = Page(qmoe / "index.html").flat
    assert "caption 139.2 CIDEr 21.0 CIDEr 400" in text
    assert "what 92.5 % 8.0 % 80" in text
    assert "Captions are scored by CIDEr, which is no share" in text


def test_experts_in_both_places(run_maker: RunMaker, tmp_path: Path) -> None:
    page = Page(write_report(run_maker(tmp_path / "run", qmoe=True)))
    expected = FIGURES | {"load-training-connector", "paths", "load-connector"}
    assert {name for name in page.images if not name.startswith("prediction")} == {f"{name}.png" for name in expected}


def test_connector_that_was_not_evaluated_says_what_does_it(run_maker: RunMaker, tmp_path: Path) -> None:
    page = Page(write_report(run_maker(tmp_path / "run", evaluated=False, moe=False, qmoe=True)))
    assert "There are no expert paths: the connector was not evaluated on images yet" in page.flat


def test_paths_that_do_not_depend_on_the_task_are_called_so(run_maker: RunMaker, tmp_path: Path) -> None:
    run = run_maker(tmp_path / "run", evaluated=False, moe=False, qmoe=True)
    (run / "eval" / "scenes").mkdir(parents=True)
    content = {"format": 1, "layers": [6], "num_experts": 2, "counts": {task: {"0": 20, "1": 20} for task in "ab"}}
    (run / "eval" / "scenes" / "paths.json").write_text(json.dumps(content))
    text = Page(write_report(run)).flat
    assert "share 0.000 nats of information, of 0.693" in text
    assert "1,000 of 1,000 shuffles reach the measured value: paths do not depend on the task more than" in text
    del content["counts"]["b"]
    (run / "eval" / "scenes" / "paths.json").write_text(json.dumps(content))
    assert "There is one task only" in Page(write_report(run)).flat
