"""A-OKVQA: questions with four choices, and ten people's free answers beside."""

from __future__ import annotations

from moe_lvlm.data.published.dataset import Dataset, Fields, Files, Item, int_of, read_list, text_of, texts_of

_UNUSED = frozenset(("rationales", "difficult_direct_answer"))


def _read(files: Files) -> list[object]:
    records, _ = read_list(files.path, drop=_UNUSED)
    return records


def _parse(fields: Fields) -> Item:
    options = texts_of(fields, "choices")
    right = options[int_of(fields, "correct_choice_idx", range(len(options)))]
    facts: dict[str, list[str]] = {"options": list(options)}
    if "direct_answers" in fields:
        facts["answers"] = list(texts_of(fields, "direct_answers"))
    return Item(question=text_of(fields, "question"), answers=(right,), answer=right, options=options, facts=facts)


AOKVQA = Dataset(read=_read, parse=_parse, id_key="question_id", image_pattern="{split}2017/{image_id:012d}.jpg")
