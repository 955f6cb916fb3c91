"""Evaluation sets: records of any layout that training reads, each a question whose last turn is the right answer.

An evaluation set has to be clean: one bad record is an error, since a score over what is left would be another score.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from moe_lvlm.config.recipe import DataSettings, EvaluationSettings, TaskSettings
from moe_lvlm.data.errors import BadRecordError, RecordFault
from moe_lvlm.data.images import FORMATS, load_image, resolve_image
from moe_lvlm.data.mixture import Source, open_records
from moe_lvlm.data.records import IMAGE_MARK, Record, Turn
from moe_lvlm.evaluation.metrics import METRICS, Truth
from moe_lvlm.evaluation.truth import read_truth

_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_MASK_MODES = ("1", "L", "P", "I", "I;16", "RGB")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One record of an evaluation set.

    task: the score it counts for: the record's own task, or the set's name. metric: by which it is scored.
    """

    task: str
    metric: str
    record: Record
    source: Source
    index: int

    @property
    def key(self) -> str:
        """`<set>/<index>`."""
        return self.source.key(self.index)

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The conversation without its last answer."""
        return self.record.turns[:-1]

    @property
    def text(self) -> str:
        """The last human turn, without image marks."""
        return self.turns[-1].text.replace(IMAGE_MARK, "").strip()

    @property
    def connector_words(self) -> str | None:
        """What the connector reads, for `SampleBuilder.prompt`: the bare question; None for the first turn's words."""
        return self.record.question

    @property
    def answer(self) -> str:
        return self.record.turns[-1].text

    @property
    def truth(self) -> Truth:
        """What the set's metric compares an answer with. Raises BadRecordError."""
        with self.faults():
            return read_truth(self.source.facts(self.index), self.record, self.metric)

    def image_path(self) -> Path | None:
        """The first image's file, or None for text. Raises BadRecordError."""
        if not self.record.images:
            return None
        with self.faults():
            return resolve_image(self.source.image_root, self.record.images[0])

    def load_images(self) -> list[Image.Image]:
        """All images, RGB.

        Raises:
            BadRecordError: one is missing, broken or outside the image root.
        """
        with self.faults():
            return [load_image(self.source.image_root, path) for path in self.record.images]

    def load_mask(self, images: Sequence[Image.Image]) -> NDArray[np.bool_] | None:
        """The foreground of the record's image, bool [H, W] in its pixels, or None if the record names no mask.

        images: what `load_images` gave.

        Raises:
            BadRecordError: the mask is missing, broken, of a mode without one meaning, or not of the image's size; or
                the record has no image or several, so that the mask's image is not known.
        """
        if self.record.mask is None:
            return None
        with self.faults():
            return _read_mask(self.source.image_root, self.record.mask, images)

    @contextmanager
    def faults(self) -> Iterator[None]:
        """What goes wrong inside the block because of the record becomes an error that names it."""
        try:
            yield
        except RecordFault as fault:
            file = str(self.source.records.path)
            raise BadRecordError(file, self.index, self.record.id, self.key, fault.reason) from fault


def read_questions(task: TaskSettings, data: DataSettings, *, limit: int | None = None) -> list[Question]:
    """The questions of one evaluation set, in the file's order.

    limit: the first so many of the file, in place of the task's own limit.

    Raises:
        ValueError: the file cannot be read (DataFileError), a record is bad or cannot be scored by the set's metric
            (BadRecordError), the records do not fit together for it, or limit is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: {limit}; at least 1 is needed")
    source = open_records(task, data.image_root, for_evaluation=True)
    chosen = range(len(source))[: limit if limit is not None else task.limit]
    records = [source.record(index) for index in chosen]
    questions = [
        Question(task=record.task or task.name, metric=task.metric, record=record, source=source, index=index)
        for index, record in zip(chosen, records, strict=True)
    ]
    _check_truths(task, questions)
    return questions


def select_sets(settings: EvaluationSettings, names: Sequence[str] | None) -> list[TaskSettings]:
    """The evaluation sets of these names, in the recipe's order; None means all.

    Raises:
        ValueError: the recipe has no evaluation set or two of one name, or none has a name that was asked for.
    """
    known = [task.name for task in settings.tasks]
    for name in known:
        if not _FOLDER_NAME.fullmatch(name):
            raise ValueError(
                f"evaluation.tasks: name {name!r}; it names a folder; allowed: letters, digits, '.', '_' and "
                "'-', a letter or digit first"
            )
    if not known:
        raise ValueError("evaluation.tasks: the recipe names no evaluation set; add at least one, with name and path")
    if len(set(known)) != len(known):
        raise ValueError(f"evaluation.tasks: each needs a name of its own, got {known}")
    if unknown := [name for name in names or () if name not in known]:
        raise ValueError(
            f"tasks: {', '.join(unknown)}; allowed: {', '.join(known)}, as in the recipe's evaluation.tasks"
        )
    return [task for task in settings.tasks if names is None or task.name in names]


def check_scores_apart(sets: Iterable[Sequence[Question]]) -> None:
    """Scores are kept by task, so questions of one task may stand in one evaluation set only.

    Raises:
        ValueError: two sets have questions of the same task.
    """
    owner: dict[str, Question] = {}
    for questions in sets:
        for task, question in {question.task: question for question in questions}.items():
            if task in owner:
                raise ValueError(
                    f"task {task!r}: the sets {owner[task].source.name} and {question.source.name} both have records "
                    "of it, and one score would replace the other; give them different tasks, or evaluate one set at a "
                    "time"
                )
            owner[task] = question


def _check_truths(task: TaskSettings, questions: Sequence[Question]) -> None:
    """Scores are by task, so the records of each have to fit together."""
    by_task: dict[str, list[Truth]] = {}
    for question in questions:
        by_task.setdefault(question.task, []).append(question.truth)
    for name, truths in by_task.items():
        try:
            METRICS[task.metric].check_set(truths)
        except ValueError as error:
            raise ValueError(
                f"{questions[0].source.records.path}: task {name!r}: metric {task.metric}: {error}"
            ) from error


def _read_mask(root: Path, path: str, images: Sequence[Image.Image]) -> NDArray[np.bool_]:
    if len(images) != 1:
        raise RecordFault(f"mask {path!r} stands beside {len(images)} images; allowed is exactly one")
    file = resolve_image(root, path)
    try:
        with Image.open(file, formats=FORMATS) as image:
            mode, pixels = image.mode, np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise RecordFault(f"mask {path!r} cannot be read ({type(error).__name__}: {error})") from error
    if mode not in _MASK_MODES:
        raise RecordFault(f"mask {path!r} has the image mode {mode}; allowed are {', '.join(_MASK_MODES)}")
    is_foreground = (pixels != 0).any(axis=-1) if pixels.ndim == 3 else pixels != 0
    (width, height), found = images[0].size, is_foreground.shape
    if found != (height, width):
        raise RecordFault(f"mask {path!r} is {found[1]} x {found[0]}; its image is {width} x {height}, both must agree")
    return is_foreground
