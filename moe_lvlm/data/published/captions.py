"""Captions of images: COCO, NoCaps, TextCaps. A record a caption, or one an image with all that were written for it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from moe_lvlm.data.errors import DataFileError
from moe_lvlm.data.json_files import check_suffix, read_json
from moe_lvlm.data.published.dataset import Dataset, Fields, Files, Item, held, read_list, texts_of
from moe_lvlm.data.published.ocr_tokens import ocr_tokens_of, with_ocr_tokens
from moe_lvlm.data.records import describe

_COCO_UNUSED = frozenset(
    ("license", "licenses", "info", "coco_url", "flickr_url", "url", "date_captured", "open_images_id", "domain")
)
_COCO_LAYOUTS = (
    "an object with the lists images and annotations (COCO's own), or a list of objects with image and caption "
    "(coco_karpathy_*.json as BLIP and LAVIS have it)"
)
_TEXTCAPS_UNUSED = frozenset(
    (
        *("image_classes", "flickr_original_url", "flickr_300k_url", "image_width", "image_height", "set_name"),
        *("caption_tokens", "reference_tokens", "reference_strs"),
    )
)


def _read_coco(files: Files) -> Iterable[object]:
    check_suffix(files.path, (".json",))
    content = read_json(files.path, drop=_COCO_UNUSED, allowed=_COCO_LAYOUTS)
    rows: Iterable[object]
    if isinstance(content, list):
        rows = map(_karpathy_row, content)
        return _by_image(rows, "file_name") if files.by_image else rows
    listed, captioned = (content.get("images"), content.get("annotations")) if isinstance(content, dict) else (0, 0)
    if not isinstance(listed, list) or not isinstance(captioned, list):
        raise DataFileError(f"{files.path}: holds {held(content)}; allowed is {_COCO_LAYOUTS}")
    images = _images_by_id(files, listed)
    rows = (_official_row(images, annotation) for annotation in captioned)
    if not files.by_image:
        return rows
    # an image without a caption is a record, and a bad one
    uncaptioned = ({**image, "image_id": key, "captions": []} for key, image in images.items())
    return _by_image((*uncaptioned, *rows), "image_id")


def _images_by_id(files: Files, images: list[Any]) -> dict[object, Fields]:
    found: dict[object, Fields] = {}
    for place, image in enumerate(images):
        key = image.get("id") if isinstance(image, dict) else None
        if not isinstance(key, str | int) or key in found:
            raise DataFileError(f"{files.path}: images[{place}] is {describe(image)}; each needs an id of its own")
        found[key] = {name: value for name, value in image.items() if name != "id"}
    return found


def _official_row(images: dict[object, Fields], annotation: object) -> object:
    if not isinstance(annotation, dict):
        return annotation
    key = annotation.get("image_id")
    image = images.get(key, {}) if isinstance(key, str | int) else {}
    return {**image, "image_id": key, "captions": [annotation.get("caption")]}


def _karpathy_row(raw: object) -> object:
    """BLIP's and LAVIS' files: one caption in the training split's, all of an image in the others'."""
    if not isinstance(raw, dict):
        return raw
    given = raw.get("caption")
    captions = given if isinstance(given, list) else [given]
    return {"image_id": raw.get("image_id"), "file_name": raw.get("image"), "captions": captions}


def _read_textcaps(files: Files) -> Iterable[object]:
    listed, _ = read_list(files.path, "data", drop=_TEXTCAPS_UNUSED)
    rows = with_ocr_tokens(map(_textcaps_row, listed), files)
    return _by_image(rows, "image_id") if files.by_image else rows


def _textcaps_row(raw: object) -> object:
    if not isinstance(raw, dict):
        return raw
    others = {key: value for key, value in raw.items() if key != "caption_str"}
    return {**others, "captions": [raw.get("caption_str")]}


def _by_image(rows: Iterable[Any], key: str) -> Iterator[object]:
    """Rows of one image as one row, in the order in which images are first met."""
    merged: dict[str, Any] = {}
    for place, row in enumerate(rows):
        # what is no object stays by itself, a bad record; a key may be anything that JSON holds
        group = json.dumps(row.get(key)) if isinstance(row, dict) else f"row {place}"
        if group in merged:
            merged[group]["captions"] += row["captions"]
        else:
            merged[group] = row
    return iter(merged.values())


def _parse(fields: Fields) -> Item:
    captions = texts_of(fields, "captions")
    return Item(
        question=None,
        answers=captions,
        answer=captions[0],
        facts={"references": list(captions)},
        ocr_tokens=ocr_tokens_of(fields),
    )


COCO_CAPTIONS = Dataset(read=_read_coco, parse=_parse, id_key="image_id", image_pattern="{file_name}")
NOCAPS = COCO_CAPTIONS
TEXTCAPS = Dataset(read=_read_textcaps, parse=_parse, id_key="image_id", image_pattern="{image_id}.jpg")
