"""Which samples a model is looked at with: records that were named, its run's evaluation sets, or what it trained on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import LlavaProcessor

from moe_lvlm.config.recipe import DataSettings, Recipe, StageSettings
from moe_lvlm.config.records import RecordsSettings
from moe_lvlm.data.errors import BadRecordError
from moe_lvlm.data.mixture import Source, build_samples, needed_data, open_records
from moe_lvlm.data.sample import Prompt, Sample, SampleBuilder
from moe_lvlm.models.processor import num_image_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class LookedAt:
    """A record twice: as a training sample with its answers, and as the prompt for its last answer.

    answer: that answer. is_scored: whether it is compared with what is generated, as an evaluation set's is.
    """

    sample: Sample
    prompt: Prompt
    answer: str
    is_scored: bool
    max_new_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """found: the samples. source: where they are from, in words. skipped: records that could not be used."""

    found: tuple[LookedAt, ...]
    source: str
    skipped: int
    builder: SampleBuilder


class NoSamplesError(ValueError):
    """There is no data at hand; the message says where it was looked for."""


@dataclass(frozen=True, slots=True)
class _Set:
    source: Source
    is_scored: bool
    max_new_tokens: int


def find_samples(
    recipe: Recipe | None,
    stage: StageSettings | None,
    processor: LlavaProcessor,
    *,
    count: int,
    records: Path | None,
    image_root: Path | None,
    max_new_tokens: int,
) -> Samples:
    """`count` samples, evenly over each file: of `records` if it is given, else of the first of evaluation sets and
    training mixture that is at hand.

    records: a file in the LLaVA layout. image_root: where its images lie; None is its own folder. max_new_tokens: of
    generated answers where no evaluation set says.

    Raises:
        NoSamplesError: a run whose data is gone, or a model without a run, and no records.
        ValueError: records that cannot be read, or a chat template that cannot be found.
    """
    data = DataSettings() if recipe is None else recipe.data
    template = data.template if stage is None or stage.template is None else stage.template
    # nothing else than a model of router ltdr is looked at
    builder = build_samples(needed_data(data, None), template, processor, num_image_tokens)
    if records is not None:
        root = str((image_root or records.parent).absolute())
        named = _Set(open_records(RecordsSettings(path=str(records.absolute())), root), False, max_new_tokens)
        return _read([named], count, builder, f"records of {records.name}")
    if recipe is None:
        raise NoSamplesError("the model lies in no run, and no records were named (--records)")
    problems = []
    for what in ("evaluation sets", "training mixture"):
        try:
            sets = list(_open(recipe, stage, what, max_new_tokens))
            if sets:
                names = ", ".join(one.source.name for one in sets)
                return _read(sets, count, builder, f"the run's {what} ({names})")
            problems.append(f"{what}: none in the recipe")
        except (ValueError, OSError) as error:  # another source may be there
            problems.append(f"{what}: {error}")
    raise NoSamplesError("; ".join(problems))


def _open(recipe: Recipe, stage: StageSettings | None, what: str, max_new_tokens: int) -> Iterator[_Set]:
    base = recipe.data.image_root
    if what == "evaluation sets":
        for task in recipe.evaluation.tasks:
            yield _Set(open_records(task, base, for_evaluation=True), True, task.max_new_tokens)
        return
    for one in (stage and stage.mixture) or recipe.data.mixture:
        yield _Set(open_records(one, base), False, max_new_tokens)


def _read(sets: list[_Set], count: int, builder: SampleBuilder, source: str) -> Samples:
    """Records evenly spaced in each set, the sets by turns of equal size.

    Raises:
        NoSamplesError: not one record can be used.
    """
    found: list[LookedAt] = []
    skipped: list[BadRecordError] = []
    for number, one in enumerate(sets):
        share = count // len(sets) + (number < count % len(sets))
        for index in _spaced(len(one.source), share):
            try:
                found.append(_look_at(one, index, builder))
            except BadRecordError as error:
                skipped.append(error)
    if not found:
        raise NoSamplesError(f"{source}: no record can be used" + (f" ({skipped[0]})" if skipped else ""))
    return Samples(found=tuple(found), source=source, skipped=len(skipped), builder=builder)


def _look_at(one: _Set, index: int, builder: SampleBuilder) -> LookedAt:
    return LookedAt(
        sample=one.source.sample(index, builder),
        prompt=one.source.prompt(index, builder),
        answer=one.source.record(index).turns[-1].text,
        is_scored=one.is_scored,
        max_new_tokens=one.max_new_tokens,
    )


def _spaced(length: int, count: int) -> Iterable[int]:
    """`count` indices below `length`, evenly spaced; all of them if there are no more."""
    if count >= length:
        return range(length)
    return [index * length // count for index in range(count)]
