"""Questions with free answers: GQA, VQAv2 and OK-VQA, VizWiz."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from moe_lvlm.data.errors import DataFileError, RecordFault
from moe_lvlm.data.published.dataset import Dataset, Fields, Files, Item, list_of, read_by_id, read_list, text_of
from moe_lvlm.data.records import check_text, describe

# Programs, scene graph references and groups are most of GQA's files.
_GQA_UNUSED = frozenset(
    ("semantic", "semanticStr", "annotations", "entailed", "equivalent", "types", "groups", "isBalanced", "fullAnswer")
)
_VQA_UNUSED = frozenset(
    ("answer_confidence", "answer_id", "raw_answer", "question_type", "answer_type", "confidence", "answerable")
)


def _read_gqa(files: Files) -> Iterator[object]:
    return (question for _, question in read_by_id(files.path, "questions", "question_id", drop=_GQA_UNUSED))


def _parse_gqa(fields: Fields) -> Item:
    answer = text_of(fields, "answer")
    facts = {"answers": [answer]}  # what `vqa` compares with
    return Item(question=text_of(fields, "question"), answers=(answer,), answer=answer, facts=facts)


def _read_vqa(files: Files) -> Iterator[object]:
    """Questions, each with the fields of its annotation, and `data_subtype` of the file."""
    assert files.annotations is not None  # settings that could be made have it
    questions, content = read_list(files.path, "questions")
    annotations, _ = read_list(files.annotations, "annotations", drop=_VQA_UNUSED)
    by_id: dict[object, Fields] = {}
    for place, annotation in enumerate(annotations):
        key = annotation.get("question_id") if isinstance(annotation, dict) else None
        if not isinstance(key, str | int):
            raise DataFileError(
                f"{files.annotations}: annotations[{place}] is {describe(annotation)}; it must be an object with a "
                "question_id"
            )
        if key in by_id:
            raise DataFileError(f"{files.annotations}: annotations[{place}]: a second one for question_id {key}")
        by_id[key] = annotation
    ids = [question.get("question_id") if isinstance(question, dict) else None for question in questions]
    if questions and not any(isinstance(key, str | int) and key in by_id for key in ids):
        raise DataFileError(
            f"{files.annotations}: has no answer to any question of {files.path}; are they one split's?"
        )
    shared = {"data_subtype": content["data_subtype"]} if "data_subtype" in content else {}
    for key, question in zip(ids, questions, strict=True):
        if not isinstance(question, dict):
            yield question
            continue
        annotation = by_id.get(key, {}) if isinstance(key, str | int) else {}
        yield {**shared, **annotation, **question}


def _read_vizwiz(files: Files) -> list[object]:
    """Questions with their answers, in one list."""
    questions, _ = read_list(files.path, drop=_VQA_UNUSED)
    return questions


def parse_vqa(fields: Fields) -> Item:
    """Ten people's answers. Blank ones, of which VizWiz has a few, stay for metrics and are never taught."""
    if "answers" not in fields:
        raise RecordFault("the question has no `answers`: its annotation is missing, or its split has none")
    given = [_answer(place, one) for place, one in enumerate(list_of(fields, "answers"))]
    usable = tuple(answer for answer in given if answer)
    if not usable:
        raise RecordFault(f"answers: all {len(given)} are empty; one with text is needed")
    if "multiple_choice_answer" in fields:
        answer = text_of(fields, "multiple_choice_answer")
    else:
        ((answer, _),) = Counter(usable).most_common(1)  # of equally frequent ones the first
    return Item(question=text_of(fields, "question"), answers=usable, answer=answer, facts={"answers": given})


def _answer(place: int, raw: object) -> str:
    where = f"answers[{place}]"
    if not isinstance(raw, dict):
        raise RecordFault(f"{where} is {describe(raw)}; it must be an object with `answer`")
    return check_text(raw.get("answer"), f"{where}.answer").strip()


GQA = Dataset(read=_read_gqa, parse=_parse_gqa, id_key="question_id", image_pattern="{imageId}.jpg")
VQA = Dataset(
    read=_read_vqa,
    parse=parse_vqa,
    id_key="question_id",
    image_pattern="COCO_{data_subtype}_{image_id:012d}.jpg",
)
VIZWIZ = Dataset(read=_read_vizwiz, parse=parse_vqa, id_key="image", image_pattern="{image}")
