"""Questions about text in images: OCR-VQA and TextVQA."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from moe_lvlm.data.published.dataset import Dataset, Fields, Files, Item, list_of, read_by_id, read_list, text_of
from moe_lvlm.data.published.ocr_tokens import ocr_tokens_of, with_ocr_tokens
from moe_lvlm.data.published.vqa import parse_vqa

_OCRVQA_UNUSED = frozenset(("imageURL", "title", "authorName", "genre"))
_TEXTVQA_UNUSED = frozenset(
    (
        *("image_classes", "flickr_original_url", "flickr_300k_url", "image_width", "image_height", "set_name"),
        *("question_tokens",),
    )
)


def _read_ocrvqa(files: Files) -> Iterator[object]:
    """A record a question, of files that have an object a book."""
    for key, book in read_by_id(files.path, "books", "image_id", drop=_OCRVQA_UNUSED):
        if not isinstance(book, dict):
            yield book
            continue
        questions, answers = book.get("questions"), book.get("answers")
        if not isinstance(questions, list) or not isinstance(answers, list) or len(questions) != len(answers):
            yield book  # a bad record: `answer` is missing
            continue
        others = {name: value for name, value in book.items() if name not in ("questions", "answers")}
        for place, (question, answer) in enumerate(zip(questions, answers, strict=True)):
            yield {"question_id": f"{key}/{place}", **others, "question": question, "answer": answer}


def _parse_ocrvqa(fields: Fields) -> Item:
    answer = text_of(fields, "answer")
    facts = {"answers": [answer]}
    return Item(question=text_of(fields, "question"), answers=(answer,), answer=answer, facts=facts)


def _read_textvqa(files: Files) -> Iterable[object]:
    questions, _ = read_list(files.path, "data", drop=_TEXTVQA_UNUSED)
    return with_ocr_tokens(questions, files)


def _parse_textvqa(fields: Fields) -> Item:
    """Ten people's answers, as texts."""
    answers = [{"answer": one} for one in list_of(fields, "answers")]
    return replace(parse_vqa({**fields, "answers": answers}), ocr_tokens=ocr_tokens_of(fields))


OCRVQA = Dataset(read=_read_ocrvqa, parse=_parse_ocrvqa, id_key="question_id", image_pattern="{image_id}.jpg")
TEXTVQA = Dataset(read=_read_textvqa, parse=_parse_textvqa, id_key="question_id", image_pattern="{image_id}.jpg")
