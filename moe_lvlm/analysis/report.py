"""Writes a run's report: one HTML page with its figures beside it, readable offline."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from moe_lvlm.analysis import plots
from moe_lvlm.analysis.adapter_section import POINTS, adapter_section, is_expected
from moe_lvlm.analysis.adapters import is_adapter, linear_name
from moe_lvlm.analysis.measures import MODALITIES, site_name, site_of
from moe_lvlm.analysis.paths import PathStatistics, path_label
from moe_lvlm.analysis.pictures import Picture, saved_picture
from moe_lvlm.analysis.plots.style import spread
from moe_lvlm.analysis.run_folder import Prediction, RunFolder
from moe_lvlm.analysis.settings import settings_rows, text_of
from moe_lvlm.routing.types import CONNECTOR, Site

_TEMPLATE_FOLDER = Path(__file__).parent / "templates"
_PREDICTIONS_PER_TASK = 8
_ADAPTED_LINEARS = 2
_THUMBNAIL_PIXELS = 192


@dataclass(frozen=True, slots=True)
class StageRow:
    """One stage's settings and speed, as shown."""

    name: str
    trains: str
    steps: str
    global_batch: str
    learning_rate: str
    trainable: str
    tokens: str
    tokens_per_second: str
    seconds: str
    language_loss: str


@dataclass(frozen=True, slots=True)
class Card:
    """One prediction as shown. file: its picture beside the page, or None."""

    prediction: Prediction
    file: str | None


def write_report(run: str | Path) -> Path:
    """Write report/index.html and its PNGs into a run's folder; the page's path.

    What the run does not have yet (no evaluation, no MoE layer) is named in its section, with the command that makes
    it. Pictures and points of an earlier report are replaced.

    Raises:
        ValueError: the folder is not a run's, or one of its files is broken.
    """
    folder = RunFolder(run)
    report = folder.path / "report"
    report.mkdir(exist_ok=True)
    for old in [*report.glob("*.png"), *report.glob(POINTS)]:
        old.unlink()
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATE_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        name=folder.recipe.get("name", folder.path.name),
        run=str(run),
        is_done=folder.is_done,
        settings=settings_rows(folder.recipe),
        facts=_facts(folder),
        stages=_stage_rows(folder),
        scores=folder.scores,
        training=_training_pictures(folder, report),
        accuracy=_accuracy_picture(folder, report),
        routing=_routing_pictures(folder, report),
        has_connector_experts=_has_connector_experts(folder),
        path_text=None if folder.paths is None else _path_text(folder.paths),
        paths=_path_pictures(folder, report),
        has_adapter_experts=is_expected(folder.recipe),
        adapters=adapter_section(folder, report),
        dropped=_dropped_rows(folder),
        adaptations=_adaptation_rows(folder),
        agreement=_agreement_pictures(folder, report),
        cards=_cards(folder, report),
        has_predictions=bool(folder.predictions),
        recipe_text=yaml.safe_dump(folder.recipe, sort_keys=False, allow_unicode=True),
        environment_text=folder.environment,
    )
    path = report / "index.html"
    path.write_text(page, encoding="utf-8")
    return path


def _training_pictures(folder: RunFolder, report: Path) -> list[Picture]:
    if not folder.steps:
        return []
    return (
        saved_picture(
            plots.loss_by_stage(folder.steps),
            report,
            "loss",
            "Loss by stage",
            "Faint: every logged step; strong: moving average within a stage; dashed lines separate the stages.",
        )
        + saved_picture(
            plots.load_over_training(folder.steps),
            report,
            "load-training",
            "Expert load over training",
            "Each line is the share of a modality's assignments that one expert gets; on the dashed line all experts get "
            "the same.",
        )
        + saved_picture(
            plots.load_over_training(folder.steps, part=CONNECTOR),
            report,
            "load-training-connector",
            "Load of the connector's experts over training",
            "Each line is the share of images that one expert gets; on the dashed line all experts get the same.",
        )
        + _adapter_load_pictures(folder, report)
    )


def _adapter_load_pictures(folder: RunFolder, report: Path) -> list[Picture]:
    """One figure for each of the first two linears that have LoRA experts."""
    sites = {site_of(name) for step in folder.steps for name in step.get("expert_load") or ()}
    pictures: list[Picture] = []
    for part in sorted({site.part for site in sites if is_adapter(site)})[:_ADAPTED_LINEARS]:
        name = linear_name(Site(part, 0))
        pictures += saved_picture(
            plots.load_over_training(folder.steps, part=part),
            report,
            f"load-training-{name.replace('.', '-')}",
            f"Load of the LoRA experts of {name} over training",
            "Each line is the share of tokens whose sample one expert gets, with the noise of training; on the dashed line "
            "all experts get the same. No loss asks for that.",
        )
    return pictures


def _accuracy_picture(folder: RunFolder, report: Path) -> list[Picture]:
    if not folder.scores:
        return []
    text = (
        "A bar is the share of held-out answers that are right by free generation; the red mark is what always giving "
        "the task's most frequent answer would score."
    )
    if not all(score.is_share for score in folder.scores):
        text += (
            " Captions are scored by CIDEr, which is no share: it is shown a hundredfold, as is usual, can pass 100, and "
            "cannot be compared with the other bars. Its red mark is the best of some captions given to every image."
        )
    return saved_picture(plots.accuracy_by_task(folder.scores), report, "accuracy", "Accuracy by task", text)


def _routing_pictures(folder: RunFolder, report: Path) -> list[Picture]:
    if folder.routing is None:
        return []
    return saved_picture(
        plots.load_by_modality(folder.routing),
        report,
        "load-modality",
        "Token load of every expert by modality",
        "Bars of one colour in one panel add up to 100 %: how a modality's assignments in evaluation are shared out "
        "among the experts of a layer.",
    ) + saved_picture(
        plots.rpv_histogram(folder.routing),
        report,
        "rpv",
        "Routing probability variance",
        "RPV is the variance of a token's routing probabilities over the experts: 0 is undecided, the right end is "
        "sure of few experts; the vertical axis is logarithmic.",
    )


def _has_connector_experts(folder: RunFolder) -> bool:
    """Whether paths are to be expected, evaluated or not."""
    connector = (folder.recipe.get("model") or {}).get("connector") or {}
    return connector.get("kind") == "qmoe" or folder.paths is not None


def _path_text(paths: PathStatistics) -> list[str]:
    """What the paths say, in sentences: how many there are, and whether they depend on the task."""
    overall = paths.overall()
    (frequent, count), *_ = overall.most_common(1)
    possible = paths.num_experts ** len(paths.layers)
    lines = [
        f"In each of the connector's layers {text_of(paths.layers)} an image takes one of {paths.num_experts} experts. "
        f"{len(paths):,} images took {len(overall):,} of {possible:,} possible paths; the most frequent, "
        f"{path_label(frequent)}, was taken by {count / len(paths):.1%} of them."
    ]
    if len(paths.tasks) < 2:
        return [*lines, "There is one task only, so whether paths depend on the task cannot be seen."]
    found = paths.task_information()
    is_above = found.p_value < 0.05
    lines.append(
        f"Path and task share {found.measured:.3f} nats of information, of {found.highest:.3f} if every path belonged to "
        f"one task. With tasks shuffled among images it is {found.by_chance:.3f} on average, and "
        f"{found.num_reached:,} of {found.num_shuffles:,} shuffles reach the measured value: paths "
        f"{'depend on the task' if is_above else 'do not depend on the task more than chance would have it'} "
        "(images taken as independent of each other)."
    )
    return lines


def _path_pictures(folder: RunFolder, report: Path) -> list[Picture]:
    if folder.paths is None:
        return []
    return saved_picture(
        plots.paths_by_task(folder.paths),
        report,
        "paths",
        "Expert paths by task",
        "Rows are the most frequent paths, by their mean share over tasks, and all others together; each column adds up "
        "to 100 % of a task's images. A path lists the expert of each layer, the lowest layer first.",
    ) + saved_picture(
        plots.expert_load_by_task(folder.paths),
        report,
        "load-connector",
        "Load of the connector's experts by task",
        "A bar is a task's images in one layer, cut by the expert that they take.",
    )


def _dropped_rows(folder: RunFolder) -> list[tuple[str, list[str]]]:
    """(layer, share of assignments dropped in evaluation, by modality as in MODALITIES), where a capacity is set."""
    if folder.routing is None or (folder.recipe.get("moe") or {}).get("capacity_factor") is None:
        return []
    return [
        (
            site_name(site),
            [
                "" if (share := values.dropped_share(modality)) is None else f"{100 * share:.2f} %"
                for modality in MODALITIES
            ],
        )
        for site, values in folder.routing.items()
    ]


def _adaptation_rows(folder: RunFolder) -> list[tuple[str, int, int, int, int]]:
    """(layer, experts active at last, added, dropped, times looked) of the router that adapts its experts. After a resume
    the later record of a step is the one that counts."""
    events = {(event["stage"], event["step"]): event["layers"] for event in folder.events("experts")}
    rows: dict[str, tuple[str, int, int, int, int]] = {}
    for layers in events.values():
        for layer, now in layers.items():
            _, _, added, dropped, looked = rows.get(layer, ("", 0, 0, 0, 0))
            changes = added + len(now["added"]), dropped + len(now["removed"])
            rows[layer] = (layer, now["active"], *changes, looked + 1)
    return list(rows.values())


def _agreement_pictures(folder: RunFolder, report: Path) -> list[Picture]:
    agreement = None if folder.routing is None else plots.foreground_agreement(folder.routing)
    return saved_picture(
        plots.tail_overlay(folder.examples),
        report,
        "tail-examples",
        "Tail tokens over example images",
        "Red outlines hold the tail tokens of a layer (RPV above the mean of the image), all else is dimmed; blue "
        "dashes are the foreground mask on the same grid.",
    ) + saved_picture(
        agreement,
        report,
        "tail-foreground",
        "Tail tokens on the foreground beside chance",
        "A dot is the measured value, the grey tick what tokens drawn at random would give: the share of foreground "
        "(precision), the share of tail tokens (recall), one half (AUC).",
    )


def _cards(folder: RunFolder, report: Path) -> dict[str, list[Card]]:
    """For each task some records, evenly spaced over the file, so that nobody chose them."""
    cards: dict[str, list[Card]] = {}
    for task in dict.fromkeys(prediction.task for prediction in folder.predictions):
        records = [prediction for prediction in folder.predictions if prediction.task == task]
        number = len(cards)
        cards[task] = [
            Card(record, _thumbnail(folder, record, report / f"prediction-{number}-{index}.png"))
            for index, record in enumerate(spread(records, _PREDICTIONS_PER_TASK))
        ]
    return cards


def _thumbnail(folder: RunFolder, record: Prediction, target: Path) -> str | None:
    """A small copy of the record's image beside the page; its name. None if there is no image, or it has gone."""
    path = folder.find_image(record.image) if record.image else None
    if path is None:
        return None
    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
    small.save(target)
    return target.name


def _facts(folder: RunFolder) -> list[tuple[str, str]]:
    """Numbers of the whole run."""
    steps, facts = folder.steps, []
    if folder.stages:
        facts.append(("parameters", _count(folder.stages[-1]["total"])))
    if steps:
        tokens, seconds = _total(steps, "tokens"), _total(steps, "seconds")
        facts += [
            ("steps", f"{steps[-1]['global_step']:,}"),
            ("training time", _duration(seconds)),
            ("tokens", _count(tokens)),
            ("tokens a second", f"{tokens / seconds:,.0f}" if seconds else "–"),
        ]
    done = folder.events("done")
    if done:
        facts.append(("whole run", _duration(done[-1]["seconds"])))
    skipped = Counter(event.get("reason", "no reason given") for event in folder.events("skipped"))
    facts += [(f"skipped steps ({reason})", f"{number:,}") for reason, number in skipped.items()]
    if folder.num_bad_samples:
        facts.append(("bad samples left out", f"{folder.num_bad_samples:,}"))
    return facts


def _stage_rows(folder: RunFolder) -> list[StageRow]:
    recipe_stages = {stage["name"]: stage for stage in folder.recipe.get("stages") or []}
    rows = []
    for event in folder.stages:
        name = event["stage"]
        steps = [step for step in folder.steps if step["stage"] == name]
        speeds = [step["tokens_per_second"] for step in steps if step.get("tokens_per_second") is not None]
        last = [step["language_loss"] for step in steps[-max(1, len(steps) // 20) :]]
        rows.append(
            StageRow(
                name=name,
                trains=text_of(recipe_stages.get(name, {}).get("train", "–")),
                steps=f"{event['steps']:,}",
                global_batch=f"{event['global_batch']:,}",
                learning_rate=f"{event['learning_rate']:g}",
                trainable=_count(event["trainable"]),
                tokens=_count(_total(steps, "tokens")),
                tokens_per_second=f"{statistics.median(speeds):,.0f}" if speeds else "–",
                seconds=_duration(_total(steps, "seconds")),
                language_loss=f"{statistics.fmean(last):.3f}" if last else "–",
            )
        )
    return rows


def _total(steps: list[dict[str, Any]], key: str) -> float:
    return sum(step.get(key) or 0 for step in steps)


def _count(number: float) -> str:
    """1234567 -> 1.23 M."""
    scales: tuple[tuple[float, str], ...] = ((1e9, " G"), (1e6, " M"), (1e3, " k"))
    for scale, unit in scales:
        if number >= scale:
            return f"{number / scale:.3g}{unit}"
    return f"{number:g}"


def _duration(seconds: float) -> str:
    """4000 -> 1 h 06 min 40 s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min {rest:02d} s"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
