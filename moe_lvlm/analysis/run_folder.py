"""Reads a run's folder: recipe, log, scores, predictions and routing statistics."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import yaml

from moe_lvlm.analysis.adapters import AdapterStatistics
from moe_lvlm.analysis.examples import ExampleStore, RoutingExample
from moe_lvlm.analysis.instructions import InstructionSample
from moe_lvlm.analysis.paths import PathStatistics
from moe_lvlm.analysis.statistics import RoutingStatistics

TRAINING_DATA = "_training_data"
"""Folder in eval/ of what the evaluation found of the training data; no evaluation set's name begins so."""
_Statistics = TypeVar("_Statistics", RoutingStatistics, PathStatistics, AdapterStatistics)
_PREDICTION_KEYS = ("key", "task", "image", "question", "prediction", "answer", "correct")
_SCORE_KEYS = ("accuracy", "majority", "n")


@dataclass(frozen=True, slots=True)
class Score:
    """Accuracy of one task beside that of always giving the most frequent answer. details: further numbers of the
    task's metric, by name; `category/name` belongs to one category. metric: its name, or None if it is not known."""

    task: str
    accuracy: float
    majority: float
    n: int
    details: Mapping[str, float] = field(default_factory=dict)
    metric: str | None = None

    @property
    def is_share(self) -> bool:
        """Whether accuracy and majority are shares of 1: not CIDEr, to which alone a score above 1 can belong."""
        return self.metric != "cider" and max(self.accuracy, self.majority) <= 1

    @property
    def unit(self) -> str:
        """What stands behind a hundred times the score."""
        return "%" if self.is_share else "CIDEr"

    @property
    def further(self) -> list[tuple[str, str]]:
        """`details` as `further_numbers` puts it."""
        return further_numbers(self.details)


@dataclass(frozen=True, slots=True)
class Prediction:
    """One generated answer. image: the path as evaluation wrote it, or None for text. correct: None where no answer is right
    or wrong (captions). evaluation_set: its name."""

    key: str
    task: str
    image: str | None
    question: str
    prediction: str
    answer: str
    correct: bool | None
    evaluation_set: str


class RunFolder:
    """The files of one run. What was not made yet is empty or None; what is broken raises ValueError."""

    def __init__(self, path: str | Path) -> None:
        """
        Raises:
            ValueError: the folder does not exist, or holds no recipe.yaml or no log.jsonl.
        """
        self.path = Path(path)
        if not self.path.is_dir():
            raise ValueError(f"{self.path}: no such folder; a run's folder is expected, such as runs/quickstart")
        missing = [name for name in ("recipe.yaml", "log.jsonl") if not (self.path / name).is_file()]
        if missing:
            raise ValueError(
                f"{self.path}: not a run's folder, {' and '.join(missing)} missing; `moe-lvlm train` writes them"
            )

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe, as written: a report on an older run does not ask for today's keys."""
        recipe = yaml.safe_load((self.path / "recipe.yaml").read_text(encoding="utf-8"))
        if not isinstance(recipe, dict):
            raise ValueError(f"{self.path / 'recipe.yaml'}: {type(recipe).__name__}; allowed: a mapping of keys")
        return recipe

    @cached_property
    def log(self) -> list[dict[str, Any]]:
        """All events of log.jsonl."""
        return list(read_json_lines(self.path / "log.jsonl"))

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        """Training steps in order, each once: after a resume the later record of a step is the one that counts."""
        by_step = {event["global_step"]: event for event in self.events("step")}
        return [by_step[step] for step in sorted(by_step)]

    @cached_property
    def stages(self) -> list[dict[str, Any]]:
        """Stage events in order, each stage once (a resume writes it again)."""
        return list({event["stage"]: event for event in self.events("stage")}.values())

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Events of one kind, as written."""
        return [event for event in self.log if event.get("event") == kind]

    @cached_property
    def scores(self) -> list[Score]:
        """Scores by task, of metrics.json."""
        path = self.path / "metrics.json"
        if not path.is_file():
            return []
        metrics = _parse(path.read_text(encoding="utf-8"), where=str(path))
        try:
            return [
                Score(
                    task,
                    float(row["accuracy"]),
                    float(row["majority"]),
                    int(row["n"]),
                    {name: float(value) for name, value in row.items() if name not in _SCORE_KEYS},
                    self._metrics.get(task),
                )
                for task, row in metrics.get("eval", {}).items()
            ]
        except KeyError as error:
            raise ValueError(f"{path}: a score without {error}; each needs accuracy, majority and n") from error
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: a score that is not all numbers ({error})") from error

    @cached_property
    def predictions(self) -> list[Prediction]:
        """All records of eval/*/predictions.jsonl."""
        predictions = []
        for path in self._evaluated("predictions.jsonl"):
            for number, record in enumerate(read_json_lines(path), start=1):
                missing = [key for key in _PREDICTION_KEYS if key not in record]
                if missing:
                    raise ValueError(f"{path}: record {number}: {', '.join(missing)} missing")
                values = {key: record[key] for key in _PREDICTION_KEYS}
                predictions.append(Prediction(**values, evaluation_set=path.parent.name))
        return predictions

    @cached_property
    def _metrics(self) -> dict[str, str | None]:
        """The metric of each task that has predictions, as the recipe has it."""
        sets = (self.recipe.get("evaluation") or {}).get("tasks") or []
        by_set = {one["name"]: one.get("metric") for one in sets}
        return {record.task: by_set.get(record.evaluation_set) for record in self.predictions}

    @cached_property
    def routing(self) -> RoutingStatistics | None:
        """Routing statistics of all evaluation sets together, or None if no MoE layer was measured."""
        return _merged(RoutingStatistics.from_npz(path) for path in self._evaluated("routing.npz"))

    @cached_property
    def paths(self) -> PathStatistics | None:
        """Expert paths of all evaluation sets together, or None if no image passed a connector with experts."""
        return _merged(PathStatistics.load(path) for path in self._evaluated("paths.json"))

    @cached_property
    def adapters(self) -> AdapterStatistics | None:
        """Decisions of LoRA experts in all evaluation sets together, or None if there are none."""
        paths = (path for path in self._evaluated("adapters.json") if path.parent.name != TRAINING_DATA)
        return _merged(AdapterStatistics.load(path) for path in paths)

    @cached_property
    def training_adapters(self) -> AdapterStatistics | None:
        """The same of a sample of the training data."""
        path = self.path / "eval" / TRAINING_DATA / "adapters.json"
        return _merged([AdapterStatistics.load(path)] if path.is_file() else [])

    @cached_property
    def instructions(self) -> InstructionSample | None:
        """A sample of the training data's instructions, or None if none was drawn."""
        path = self.path / "eval" / TRAINING_DATA / "instructions.json"
        return InstructionSample.load(path) if path.is_file() else None

    @cached_property
    def examples(self) -> list[RoutingExample]:
        """Example images of all evaluation sets, each image once."""
        by_key: dict[str, RoutingExample] = {}
        for path in self._evaluated("examples.npz"):
            for example in ExampleStore.from_npz(path):
                by_key.setdefault(example.key, example)
        return list(by_key.values())

    @cached_property
    def environment(self) -> str | None:
        """The text of environment.txt, or None."""
        path = self.path / "environment.txt"
        return path.read_text(encoding="utf-8").strip() if path.is_file() else None

    @cached_property
    def num_bad_samples(self) -> int:
        """Records that were skipped, of bad_samples.jsonl."""
        path = self.path / "bad_samples.jsonl"
        return sum(1 for _ in read_json_lines(path)) if path.is_file() else 0

    @property
    def is_done(self) -> bool:
        """Whether training went to its end."""
        return (self.path / "DONE").exists()

    def find_image(self, image: str) -> Path | None:
        """The file of a prediction's image: an absolute path, or one relative to the run or the working folder."""
        candidates = (Path(image), self.path / image)
        return next((path for path in candidates if path.is_file()), None)

    def _evaluated(self, name: str) -> list[Path]:
        return sorted(self.path.glob(f"eval/*/{name}"))


def further_numbers(details: Mapping[str, float]) -> list[tuple[str, str]]:
    """Numbers in words, for a table: ("", those of the whole task), then (category, its own) in turn. Shares have three
    decimals, larger numbers one."""
    texts: dict[str, list[str]] = {"": []}
    for key, value in details.items():
        category, _, name = key.rpartition("/")
        shown = f"{value:.3f}" if abs(value) <= 1 else f"{value:.1f}"
        texts.setdefault(category, []).append(f"{name.replace('_', ' ')} {shown}")
    return [(category, ", ".join(numbers)) for category, numbers in texts.items()]


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a JSON-lines file.

    A last line without an end is left out: the run may be writing it, or was killed while it did.

    Raises:
        ValueError: another line is not a JSON object.
    """
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        if line.strip():
            yield _parse(line, where=f"{path}: line {number}")


def _merged(parts: Iterable[_Statistics]) -> _Statistics | None:
    """All parts of an evaluation together, added to the first; None where nothing was measured."""
    total: _Statistics | None = None
    for part in parts:
        if total is None:
            total = part
        else:
            total.merge(part)
    return total if total is not None and len(total) else None


def _parse(text: str, *, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {type(value).__name__}; allowed: a JSON object")
    return value
