"""Questions with choices: A-OKVQA, which has ten people's free answers beside, IconQA and ScienceQA."""

from __future__ import annotations

from collections.abc import Iterator

from moe_lvlm.data.published.dataset import (
    Dataset,
    Fields,
    Files,
    Item,
    int_of,
    read_by_id,
    read_list,
    text_of,
    texts_of,
)
from moe_lvlm.data.records import check_text

_AOKVQA_UNUSED = frozenset(("rationales", "difficult_direct_answer"))
_SCIENCEQA_UNUSED = frozenset(("lecture", "solution", "topic", "category", "skill"))


def _read_aokvqa(files: Files) -> list[object]:
    records, _ = read_list(files.path, drop=_AOKVQA_UNUSED)
    return records


def _parse_aokvqa(fields: Fields) -> Item:
    options = texts_of(fields, "choices")
    right = options[int_of(fields, "correct_choice_idx", range(len(options)))]
    facts: dict[str, list[str]] = {"options": list(options)}
    if "direct_answers" in fields:
        facts["answers"] = list(texts_of(fields, "direct_answers"))
    return Item(question=text_of(fields, "question"), answers=(right,), answer=right, options=options, facts=facts)


def _read_iconqa(files: Files) -> Iterator[object]:
    return (problem for _, problem in read_by_id(files.path, "problems", "pid"))


def _read_scienceqa(files: Files) -> Iterator[object]:
    return (problem for _, problem in read_by_id(files.path, "problems", "pid", drop=_SCIENCEQA_UNUSED))


def _parse_problem(fields: Fields) -> Item:
    options = texts_of(fields, "choices")
    given = fields.get("answer")
    # some of IconQA's are written as text
    if isinstance(given, str) and given.isdecimal() and len(given) < 4:
        fields = {**fields, "answer": int(given)}
    right = options[int_of(fields, "answer", range(len(options)))]
    context = check_text(fields["hint"], "hint").strip() if "hint" in fields else ""
    return Item(
        question=text_of(fields, "question"),
        answers=(right,),
        answer=right,
        options=options,
        facts={"options": list(options)},
        context=context,
    )


AOKVQA = Dataset(
    read=_read_aokvqa,
    parse=_parse_aokvqa,
    id_key="question_id",
    image_pattern="{split}2017/{image_id:012d}.jpg",
)
ICONQA = Dataset(
    read=_read_iconqa, parse=_parse_problem, id_key="pid", image_pattern="{split}/{ques_type}/{pid}/image.png"
)
SCIENCEQA = Dataset(read=_read_scienceqa, parse=_parse_problem, id_key="pid", image_pattern="{split}/{pid}/image.png")
