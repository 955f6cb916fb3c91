"""Questions about medical images with one answer each: VQA-RAD, SLAKE, PathVQA."""

from __future__ import annotations

import io
import pickle
from typing import Any, NoReturn

from moe_lvlm.data.errors import DataFileError
from moe_lvlm.data.json_files import check_suffix, to_line
from moe_lvlm.data.published.dataset import Dataset, Fields, Files, Item, held, read_list, text_of

_UNUSED = frozenset(("image_case_url", "evaluation", "triple"))


class _PlainUnpickler(pickle.Unpickler):
    """Lists, dictionaries, strings and numbers. A pickle that names anything could run code, and is refused."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it names {module}.{name}, which could run code")


def _read(files: Files) -> list[Any]:
    records, _ = read_list(files.path, drop=_UNUSED)
    return records


def _read_pathvqa(files: Files) -> list[Any]:
    """PathVQA's own files are pickles; the same list as JSON is read too. Its questions get the `answer_type` that the
    other two have: CLOSED where the answer is yes or no."""
    check_suffix(files.path, (".pkl", ".json"))
    rows = _read(files) if files.path.suffix == ".json" else _unpickled(files)
    return [{"answer_type": _answer_type(row.get("answer")), **row} if isinstance(row, dict) else row for row in rows]


def _answer_type(answer: object) -> str:
    return "CLOSED" if str(answer).strip().lower() in ("yes", "no") else "OPEN"


def _unpickled(files: Files) -> list[Any]:
    if not files.path.is_file():
        raise DataFileError(f"{files.path}: does not exist; give PathVQA's <split>_qa.pkl")
    try:
        content = _PlainUnpickler(io.BytesIO(files.path.read_bytes())).load()
        to_line(content)  # what JSON cannot say is no question
    except Exception as error:  # a torn or hostile pickle can fail in any way; all are told alike
        raise DataFileError(f"{files.path}: cannot be read as a pickle of a list of questions ({error})") from error
    if not isinstance(content, list):
        raise DataFileError(f"{files.path}: holds {held(content)}; allowed is a list")
    return content


def _parse(fields: Fields) -> Item:
    """A few of VQA-RAD's answers are numbers."""
    given = fields.get("answer")
    is_number = isinstance(given, int | float) and not isinstance(given, bool)
    answer = str(given) if is_number else text_of(fields, "answer")
    return Item(question=text_of(fields, "question"), answers=(answer,), answer=answer, facts={"answers": [answer]})


VQA_RAD = Dataset(read=_read, parse=_parse, id_key="qid", image_pattern="{image_name}")
SLAKE = Dataset(read=_read, parse=_parse, id_key="qid", image_pattern="{img_name}")
PATHVQA = Dataset(read=_read_pathvqa, parse=_parse, id_key="image", image_pattern="{image}.jpg")
