"""Table 4's times, measured: all rows in one process, turn about, so that what else the machine does falls on all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moe_lvlm.config.recipe import Recipe
from moe_lvlm.data.loader import MicroBatch, StepLoader
from moe_lvlm.evaluation.generation import generate_answers
from moe_lvlm.evaluation.loaded import LoadedRun, load_run
from moe_lvlm.evaluation.questions import read_questions
from moe_lvlm.training.data import open_stage_data
from moe_lvlm.training.step import to_device
from moe_lvlm.training.trainable import select_trainable
from reproducing.grid import NOTHING, Grid
from reproducing.paper import Table
from reproducing.plan import Run

ROUNDS = 7
NUM_QUESTIONS = 64
NUM_BATCHES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """Seconds of each round. train: forward and backward of some micro-batches. inference: answers by generation."""

    recipe: str
    train: tuple[float, ...]
    inference: tuple[float, ...]


class _Contender:
    """A trained run, ready to be timed."""

    def __init__(self, recipe: str, run: Run) -> None:
        self.recipe = recipe
        self.loaded = load_run(run.folder, run.recipe, device=None, dtype=None)
        self.task = run.recipe.evaluation.tasks[0]
        questions = read_questions(self.task, run.recipe.data, limit=NUM_QUESTIONS)
        prompt = self.loaded.builder.prompt
        self.prompts = [
            prompt(one.turns, one.load_images(), connector_words=one.connector_words, dataset=one.source.name)
            for one in questions
        ]
        self.batch_size = run.recipe.evaluation.batch_size
        self.batches = _batches(run.recipe, self.loaded)
        select_trainable(self.loaded.model, run.recipe.stages[-1].train)

    def train(self) -> float:
        """Forward and backward of the micro-batches, without the optimizer, which is the same for all."""
        model = self.loaded.model.train()
        parameter = next(model.parameters())
        began = _now(parameter.device)
        for one in self.batches:
            output = model(**to_device(one.batch, parameter.device, parameter.dtype), use_cache=False)
            output.loss.backward()
        seconds = _now(parameter.device) - began
        model.zero_grad(set_to_none=True)
        model.eval()
        return seconds

    def infer(self) -> float:
        device = next(self.loaded.model.parameters()).device
        began = _now(device)
        generate_answers(
            self.loaded.model,
            self.loaded.processor,
            self.prompts,
            batch_size=self.batch_size,
            max_new_tokens=self.task.max_new_tokens,
            end_ids=self.loaded.end_ids,
            on_batch=lambda count: None,
        )
        return _now(device) - began


def _batches(recipe: Recipe, loaded: LoadedRun) -> list[MicroBatch]:
    """The last stage's first micro-batches."""
    data = open_stage_data(recipe, len(recipe.stages) - 1, loaded.processor)
    loader = StepLoader(data.dataset, data.order, data.collator, rank=0, world_size=1, num_workers=0)
    found: list[MicroBatch] = []
    for micro_batches in loader.steps(0, NUM_BATCHES):
        found += micro_batches
        if len(found) >= NUM_BATCHES:
            break
    return found[:NUM_BATCHES]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(runs: Sequence[tuple[str, Run]], *, rounds: int = ROUNDS) -> list[Timed]:
    """Time rows, each once a round, the order turned by one from round to round; a first round does not count."""
    contenders = [_Contender(recipe, run) for recipe, run in runs]
    train: dict[str, list[float]] = {one.recipe: [] for one in contenders}
    inference: dict[str, list[float]] = {one.recipe: [] for one in contenders}
    for number in range(rounds + 1):
        turn = number % len(contenders)
        for one in contenders[turn:] + contenders[:turn]:
            seconds = one.train(), one.infer()
            if number:
                train[one.recipe].append(seconds[0])
                inference[one.recipe].append(seconds[1])
    return [
        Timed(recipe=one.recipe, train=tuple(train[one.recipe]), inference=tuple(inference[one.recipe]))
        for one in contenders
    ]


def timing_grid(table: Table, timed: Sequence[Timed]) -> Grid:
    """Medians, and the median over rounds of the ratio to the baseline, beside the paper's times and ratios if it prints
    some: of training in the first column, of inference in the last."""
    by_recipe = {one.recipe: one for one in timed}
    paper = {row.recipe: row.paper for row in table.rows}
    has_paper = any(paper.values())
    rows = []
    for row in table.rows:
        if row.recipe not in by_recipe or row.baseline not in by_recipe:
            continue
        ours, base = by_recipe[row.recipe], by_recipe[row.baseline]
        cells = [row.label]
        for mine, theirs, place in ((ours.train, base.train, 0), (ours.inference, base.inference, -1)):
            cells += [f"{statistics.median(mine):.2f}", _ratio(mine, theirs)]
            if has_paper:
                cells += _printed(row.paper[place], paper[row.baseline][place])
        rows.append(tuple(cells))
    heads = ["training, s", "ratio", "inference, s", "ratio"]
    if has_paper:
        heads = [*heads[:2], "paper, s", "ratio", *heads[2:], "paper, s", "ratio"]
    threads = torch.get_num_threads()
    notes = (
        f"ours: seed 0, {ROUNDS} rounds in one process turn about after one that does not count, {threads} thread(s); "
        "medians, and medians of the ratio to the baseline of the same round (smallest and largest)",
        f"training: forward and backward of {NUM_BATCHES} micro-batches of the last stage, without the optimizer; "
        f"inference: up to {NUM_QUESTIONS} answers"
        + ("; the paper's: a whole training, the mean of seven benchmarks" if has_paper else ""),
    )
    title = f"{table.heading if has_paper else 'Running time'}, measured turn about"
    return Grid(title, ("", *heads), tuple(rows), notes)


def _printed(seconds: float | None, baseline: float | None) -> list[str]:
    if seconds is None or not baseline:
        return [NOTHING, NOTHING]
    return [f"{seconds:.0f}", f"{seconds / baseline:.2f}"]


def _ratio(mine: Sequence[float], theirs: Sequence[float]) -> str:
    ratios = [one / other for one, other in zip(mine, theirs, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def to_json(timed: Sequence[Timed]) -> list[dict[str, Any]]:
    return [{"recipe": one.recipe, "train": one.train, "inference": one.inference} for one in timed]
