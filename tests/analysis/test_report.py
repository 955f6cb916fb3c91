"""The report on made-up runs: sections, pictures, escaping, and what is said where something is missing."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from PIL import Image
from sklearn.metrics import normalized_mutual_info_score

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


ADAPTER_FIGURES = {"instructions", "clusters", "adapter-experts", "adapter-clusters", "universal-weight"}


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts lie by their last word, the cluster, and a little by their second."""

    def encode(texts: Sequence[str]) -> NDArray[np.float32]:
        numbers = [(int(text.split()[-1]), int(text.split()[1])) for text in texts]
        return np.array([[cluster, cluster**2, 0.1 * index, 1] for cluster, index in numbers], dtype=np.float32)

    monkeypatch.setattr("moe_lvlm.analysis.adapter_section.run_encoder", lambda recipe: encode)


def test_lora_experts_have_a_section(run_maker: RunMaker, tmp_path: Path, encoder: None) -> None:
    run = run_maker(tmp_path / "run", moe=False, gating="cluster")
    page = Page(write_report(run))
    assert page.sections == [*SECTIONS[:3], "adapters", *SECTIONS[3:]]
    shown = {name.removesuffix(".png") for name in page.images if not name.startswith("prediction")}
    assert shown == ADAPTER_FIGURES | {"loss", "accuracy"}
    for name in ADAPTER_FIGURES:
        with Image.open(run / "report" / f"{name}.png") as image:
            assert np.asarray(image.convert("L")).std() > 1
            assert 700 <= image.width <= 2000, name
    assert "LoRA experts are under LoRA experts" in page.flat
    assert (
        "MoCLE: 4 LoRA experts and a universal one, rank 8, alpha 32.0, on q_proj, v_proj; gates by cluster (5 rows)"
        in (page.flat)
    )
    assert "Dataset gone of the training data is left out: data/gone.json: no such file." in page.flat
    # texts of a cluster are of one dataset
    assert "Of the distinct instructions 100.0% have their nearest other instruction" in page.flat
    points = json.loads((run / "report" / "instructions.json").read_text())
    assert [point["dataset"] for point in points] == ["ask"] * 60 + ["tell"] * 60


def test_numbers_on_lora_experts_are_scikit_learn_s(run_maker: RunMaker, tmp_path: Path, encoder: None) -> None:
    run = run_maker(tmp_path / "run", moe=False, gating="cluster")
    text = Page(write_report(run)).flat
    sample = json.loads((run / "eval" / "_training_data" / "instructions.json").read_text())
    pairs = [(name, cluster) for name, found in sample["datasets"].items() for _, cluster in found]
    expected = normalized_mutual_info_score(*zip(*pairs, strict=True))
    assert f"instructions have a normalised mutual information of {expected:.3f}" in text
    counts = json.loads((run / "eval" / "_training_data" / "adapters.json").read_text())
    values = []
    for place in range(8):
        rows = [of["experts"][place] for of in counts["subsets"].values()]
        labels = [(row, expert) for row, of in enumerate(rows) for expert, n in enumerate(of) for _ in range(n)]
        values.append(normalized_mutual_info_score(*zip(*labels, strict=True)))
    assert (
        f"information of {np.mean(values):.3f} on average over 8 adapted linears, from 0.000 (self_attn.q_proj, layer 0)"
        in (text)
    )
    # the first linear's expert says nothing of the dataset
    above = sum(value > 0.1 for value in values)
    assert f"At {above} of 8 linears it is above what 95 % of 200 shuffles reach (samples taken" in text
    ask = counts["subsets"]["ask"]
    weight = 1 - sum(ask["gate_sum"]) / sum(ask["rows"])
    frequent = Counter(cluster for name, cluster in pairs if name == "ask").most_common(1)[0]
    assert f"ask training data 60 2 {frequent[0]} ({frequent[1] / 60:.0%})" in text
    assert f"{weight:.3f} ± " in text
    assert "the universal expert has its lowest weight on" in text


def test_without_an_encoder_the_page_says_so(
    run_maker: RunMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_maker(tmp_path / "run", moe=False, gating="cluster")
    monkeypatch.setenv("MOE_LVLM_ENCODER", str(tmp_path / "no-encoder"))
    (run / "report").mkdir()
    (run / "report" / "instructions.json").write_text("of an earlier report")
    page = Page(write_report(run))
    assert "The map of instructions (t-SNE) is not drawn: encoder" in page.flat
    assert "clusters.png" in page.images
    assert "instructions.png" not in page.images
    assert not (run / "report" / "instructions.json").exists()


def test_gates_that_read_no_cluster_have_no_figures_of_clusters(
    run_maker: RunMaker, tmp_path: Path, encoder: None
) -> None:
    page = Page(write_report(run_maker(tmp_path / "run", gating="token")))
    shown = {name.removesuffix(".png") for name in page.images if not name.startswith("prediction")}
    assert shown == FIGURES | {"instructions", "adapter-experts"}
    assert "Clusters by dataset are not shown: the gates of this run do not read clusters." in page.flat
    assert "Weights of the universal expert are not shown: these adapters have none." in page.flat
    assert "(tokens taken as independent of each other)" in page.flat


def test_evaluation_without_training_data_says_so(run_maker: RunMaker, tmp_path: Path) -> None:
    run = run_maker(tmp_path / "run", moe=False, gating="cluster")
    shutil.rmtree(run / "eval" / "_training_data")
    page = Page(write_report(run))
    assert "There is no sample of the training data, so figures show the evaluation alone" in page.flat
    assert {"clusters.png", "adapter-experts.png", "adapter-clusters.png", "universal-weight.png"} <= set(page.images)


def test_adapters_that_were_not_evaluated_say_what_does_it(run_maker: RunMaker, tmp_path: Path) -> None:
    run = run_maker(tmp_path / "run", evaluated=False, moe=False, gating="cluster")
    text = Page(write_report(run)).flat
    assert f"the run was not evaluated yet. Made by moe-lvlm eval {run}" in text
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["model"]["adapter"] = {"kind": "lora", "rank": 4, "alpha": 8, "target_modules": ["up_proj"]}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    page = Page(write_report(run))
    assert page.sections == SECTIONS
    assert "LoRA, rank 4, alpha 8, on up_proj" in page.flat
    recipe["stages"][-1]["adapt"] = False
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert "Adapter none: no stage says adapt" in Page(write_report(run)).flat


def test_load_of_lora_experts_over_training(run_maker: RunMaker, tmp_path: Path) -> None:
    run = run_maker(tmp_path / "run", evaluated=False, moe=False, gating="cluster")
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for line in lines:
        if line["event"] == "step" and line["stage"] == "moe":
            load = {"language": [4, 3, 2, 1], "vision": [8, 6, 4, 2]}
            line["expert_load"] = {
                f"adapter.mlp.{name}.{layer}": load for name in ("up_proj", "down_proj") for layer in (0, 1)
            }
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(write_report(run))
    assert page.images == ["loss.png", "load-training-mlp-down_proj.png", "load-training-mlp-up_proj.png"]
    assert "Load of the LoRA experts of mlp.up_proj over training" in page.flat
