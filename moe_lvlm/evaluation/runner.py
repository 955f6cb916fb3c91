"""Evaluates a run: free generation on its evaluation sets, scores beside their majority baselines, routing."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from moe_lvlm.analysis.run_folder import TRAINING_DATA
from moe_lvlm.config.recipe import Recipe, TaskSettings
from moe_lvlm.data.clustering import recipe_sources
from moe_lvlm.evaluation.generation import generate_answers, progress_bar
from moe_lvlm.evaluation.loaded import LoadedRun, load_run, run_recipe
from moe_lvlm.evaluation.metrics import METRICS, Outcome, TaskScore, score_set
from moe_lvlm.evaluation.questions import Question, check_scores_apart, read_questions, select_sets
from moe_lvlm.evaluation.results import (
    ADAPTERS,
    EXAMPLES,
    INSTRUCTIONS,
    PATHS,
    PREDICTIONS,
    ROUTING,
    evaluation_folder,
    print_scores,
    replaced_path,
    update_metrics,
)
from moe_lvlm.evaluation.routing import (
    Answered,
    ForegroundByImage,
    RoutingCollector,
    foreground_of,
    has_patch_tokens,
)
from moe_lvlm.evaluation.training_sample import route_training_data

# Prompts are made, images and all, for so many batches at a time: enough to sort by length, and a bound on memory.
BATCHES_AT_ONCE = 16


def evaluate(
    run: str | Path,
    *,
    limit: int | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    tasks: Sequence[str] | None = None,
) -> dict[str, dict[str, float | int]]:
    """Answer the questions of a run's evaluation sets and score the answers.

    Writes predictions.jsonl into eval/<set>/, routing.npz and examples.npz of routed tokens, paths.json of a connector's
    experts and adapters.json of LoRA experts beside it, and the scores into metrics.json (scores of tasks that were not
    evaluated stay), and prints a table. Of LoRA experts a sample of the training data is routed, too.

    Args:
        run: the run's folder.
        limit: the first so many records of each set, in place of the recipe's limit; at most so many of each dataset of
            the training data.
        batch_size: in place of the recipe's.
        device: None is a GPU if there is one.
        dtype: float32 (None) or bfloat16.
        tasks: names of evaluation sets of the recipe; None is all.

    Returns:
        {"accuracy", "majority", "n"} by task, and what else the task's metric gives, by name.

    Raises:
        ValueError: no run, no checkpoint, no such evaluation set, or a record that is not clean.
    """
    folder = Path(run)
    recipe = run_recipe(folder)
    chosen = select_sets(recipe.evaluation, tasks)
    # all sets are read before the model is: what is wrong with them shows at once
    sets = {task: read_questions(task, recipe.data, limit=limit) for task in chosen}
    check_scores_apart(sets.values())
    size = recipe.evaluation.batch_size if batch_size is None else batch_size
    if size < 1:
        raise ValueError(f"batch_size: {size}; at least 1 is needed")

    loaded = load_run(folder, recipe, device=device, dtype=dtype)
    scores: dict[str, TaskScore] = {}
    for task, questions in sets.items():
        found = _evaluate_set(loaded, task, questions, evaluation_folder(folder, task.name), batch_size=size)
        update_metrics(folder, found)
        scores |= found
    print_scores(scores)
    print(f"scores: {folder / 'metrics.json'}; answers: {folder / 'eval'}")
    # last: scores are there, whatever has become of the training data since
    _write_training_data(loaded, recipe, evaluation_folder(folder, TRAINING_DATA), batch_size=size, limit=limit)
    return {task: score.to_dict() for task, score in scores.items()}


def _evaluate_set(
    loaded: LoadedRun, task: TaskSettings, questions: Sequence[Question], folder: Path, *, batch_size: int
) -> dict[str, TaskScore]:
    """Answer and score one set, and write its predictions and its routing."""
    model = loaded.model
    collector = RoutingCollector(model, loaded.processor) if model.config.is_routed else None
    predictions: list[str] = []
    with progress_bar(task.name, len(questions)) as advance:
        for start in range(0, len(questions), BATCHES_AT_ONCE * batch_size):
            window = questions[start : start + BATCHES_AT_ONCE * batch_size]
            answered = _answer(loaded, task, window, batch_size=batch_size, advance=advance)
            predictions += [item.prediction for item in answered]
            if collector is not None:
                collector.update(answered, batch_size=batch_size)
    outcomes = [Outcome(one.task, text, one.truth) for one, text in zip(questions, predictions, strict=True)]
    found = score_set(outcomes, task.metric)
    with replaced_path(folder / PREDICTIONS) as path, path.open("w", encoding="utf-8") as file:
        for question, text, credit in zip(questions, predictions, found.credits, strict=True):
            file.write(json.dumps(_prediction(question, text, credit), ensure_ascii=False) + "\n")
    _write_routing(folder, collector)
    return found.by_task


def _answer(
    loaded: LoadedRun,
    task: TaskSettings,
    questions: Sequence[Question],
    *,
    batch_size: int,
    advance: Callable[[int], None],
) -> list[Answered]:
    unanswered = [_prepare(loaded, question) for question in questions]
    predictions = generate_answers(
        loaded.model,
        loaded.processor,
        [item.prompt for item in unanswered],
        batch_size=batch_size,
        max_new_tokens=task.max_new_tokens,
        end_ids=loaded.end_ids,
        on_batch=advance,
    )
    return [replace(item, prediction=text) for item, text in zip(unanswered, predictions, strict=True)]


def _prepare(loaded: LoadedRun, question: Question) -> Answered:
    """The question's prompt and foreground; its prediction is still empty."""
    images = question.load_images()
    mask = question.load_mask(images)
    with question.faults():
        prompt = loaded.builder.prompt(
            question.turns, images, connector_words=question.connector_words, dataset=question.source.name
        )
    processor = loaded.processor
    foreground: ForegroundByImage = [None] * len(images)
    if mask is not None and has_patch_tokens(loaded.model.config):
        foreground = [foreground_of(mask, processor.image_processor, patch_size=processor.patch_size)]
    return Answered(
        key=question.key,
        task=question.task,
        question=question.text,
        answer=question.answer,
        prediction="",
        prompt=prompt,
        foreground=foreground,
    )


def _prediction(question: Question, prediction: str, credit: float) -> dict[str, object]:
    """A line of predictions.jsonl."""
    image = question.image_path()
    return {
        "key": question.key,
        "task": question.task,
        "image": None if image is None else str(image),
        "question": question.text,
        "prediction": prediction,
        "answer": question.answer,
        **METRICS[question.metric].verdict(credit),
    }


def _write_training_data(
    loaded: LoadedRun, recipe: Recipe, folder: Path, *, batch_size: int, limit: int | None
) -> None:
    """What LoRA experts do with a sample of the training data; without them files of an earlier evaluation go."""
    if not loaded.model.config.has_gated_adapter:
        for name in (ADAPTERS, INSTRUCTIONS):
            (folder / name).unlink(missing_ok=True)
        return
    with progress_bar("training data", len(recipe_sources(recipe))) as advance:
        sample, adapters = route_training_data(loaded, recipe, batch_size=batch_size, limit=limit, advance=advance)
    with replaced_path(folder / INSTRUCTIONS) as path:
        sample.save(path)
    with replaced_path(folder / ADAPTERS) as path:
        adapters.save(path)
    for name, reason in sample.left_out.items():
        print(f"training data: {name} left out of the LoRA experts' statistics: {reason}")


def _write_routing(folder: Path, collector: RoutingCollector | None) -> None:
    """Of a dense model there is none; files of an earlier evaluation go then, since they tell of another model."""
    if collector is None:
        for name in (ROUTING, EXAMPLES, PATHS, ADAPTERS):
            (folder / name).unlink(missing_ok=True)
        return
    with replaced_path(folder / ROUTING) as path:
        collector.statistics.to_npz(path)
    with replaced_path(folder / EXAMPLES) as path:
        collector.examples.to_npz(path)
    if collector.adapters is None:
        (folder / ADAPTERS).unlink(missing_ok=True)
    else:
        with replaced_path(folder / ADAPTERS) as path:
            collector.adapters.save(path)
    if not len(collector.paths):
        (folder / PATHS).unlink(missing_ok=True)
        return
    with replaced_path(folder / PATHS) as path:
        collector.paths.save(path)
