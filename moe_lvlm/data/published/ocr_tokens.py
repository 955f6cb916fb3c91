"""Words that were read in the images of TextVQA and TextCaps: TextVQA_Rosetta_OCR_v0.2_{train,val,test}.json."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from moe_lvlm.data.errors import DataFileError, RecordFault
from moe_lvlm.data.published.dataset import Fields, Files, read_list
from moe_lvlm.data.records import check_text, describe

_UNUSED = frozenset(("ocr_info", "image_width", "image_height", "flickr_original_url", "flickr_300k_url"))


def with_ocr_tokens(rows: Iterable[Any], files: Files) -> Iterable[object]:
    """Rows with the words read in their images, by `image_id`; as they are without a file of such words.

    Raises DataFileError for the file, or if it holds the words of none of the images.
    """
    if files.ocr_tokens is None:
        return rows
    listed, _ = read_list(files.ocr_tokens, "data", drop=_UNUSED)
    by_image: dict[object, object] = {}
    for place, entry in enumerate(listed):
        key = entry.get("image_id") if isinstance(entry, dict) else None
        if not isinstance(key, str):
            raise DataFileError(
                f"{files.ocr_tokens}: data[{place}] is {describe(entry)}; it must be an object with an image_id"
            )
        by_image[key] = entry.get("ocr_tokens")
    known = [{**row, "ocr_tokens": by_image.get(_image_id(row))} if isinstance(row, dict) else row for row in rows]
    if known and not any(_image_id(row) in by_image for row in known):
        raise DataFileError(f"{files.ocr_tokens}: has the words of no image of {files.path}; are they one split's?")
    return known


def ocr_tokens_of(fields: Fields) -> tuple[str, ...]:
    """The words read in an object's image, which may be none. Raises RecordFault if they should be known and are not."""
    if "ocr_tokens" not in fields:
        return ()
    tokens = fields["ocr_tokens"]
    if not isinstance(tokens, list):
        raise RecordFault(f"ocr_tokens is {describe(tokens)}; the file of ocr_tokens must have a list for the image")
    return tuple(check_text(token, f"ocr_tokens[{place}]") for place, token in enumerate(tokens))


def _image_id(row: object) -> str | None:
    key = row.get("image_id") if isinstance(row, dict) else None
    return key if isinstance(key, str) else None
