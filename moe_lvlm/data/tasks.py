"""Task labels of records, by rules: LTDR's TASK calls captions 0, VQA 1, OCR 2 and questions on regions 3."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from moe_lvlm.config.recipe import TaskTypeSettings
from moe_lvlm.data.instructions import human_texts
from moe_lvlm.data.records import Record


@dataclass(frozen=True, slots=True)
class _Rule:
    label: int
    instruction: re.Pattern[str] | None
    image: re.Pattern[str] | None
    task: str | None
    dataset: str | None

    def fits(self, record: Record, dataset: str) -> bool:
        """Whether all that the rule gives holds."""
        return (
            (self.dataset is None or self.dataset == dataset)
            and (self.task is None or self.task == record.task)
            and (self.image is None or any(self.image.search(path) for path in record.images))
            and (self.instruction is None or any(self.instruction.search(text) for text in human_texts(record.turns)))
        )


class TaskRules:
    """The rules of a recipe's `data.task_types`, compiled. Of those that fit a record the first gives its label.

    `instruction` is searched for in each human turn by itself, without image marks and outer space; `image` in each
    path as the record has it; one hit is enough. A record without images fits no rule that gives `image`.
    """

    def __init__(self, settings: Sequence[TaskTypeSettings]) -> None:
        self._rules = tuple(_compile(rule) for rule in settings)

    def __len__(self) -> int:
        return len(self._rules)

    def label(self, record: Record, dataset: str) -> int | None:
        """The label of a record of the source named `dataset`; None where no rule fits."""
        return next((rule.label for rule in self._rules if rule.fits(record, dataset)), None)


def _compile(rule: TaskTypeSettings) -> _Rule:
    # Settings that could be made hold expressions that can be compiled.
    return _Rule(
        label=rule.label,
        instruction=None if rule.instruction is None else re.compile(rule.instruction),
        image=None if rule.image is None else re.compile(rule.image),
        task=rule.task,
        dataset=rule.dataset,
    )
