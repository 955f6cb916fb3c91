"""Datasets in the layouts in which they are published: a row of `DATASETS` each (docs/data.md says where they are from)."""

from __future__ import annotations

from pathlib import Path

from moe_lvlm.config.records import RecordsSettings
from moe_lvlm.data.errors import DataFileError
from moe_lvlm.data.json_files import RecordFile, matching, to_line
from moe_lvlm.data.published.captions import COCO_CAPTIONS, NOCAPS, TEXTCAPS
from moe_lvlm.data.published.choice import AOKVQA, ICONQA, SCIENCEQA
from moe_lvlm.data.published.dataset import Dataset, Files
from moe_lvlm.data.published.layout import PublishedLayout
from moe_lvlm.data.published.medical import PATHVQA, SLAKE, VQA_RAD
from moe_lvlm.data.published.statements import HATEFUL_MEMES, VSR
from moe_lvlm.data.published.text import OCRVQA, TEXTVQA
from moe_lvlm.data.published.vqa import GQA, VIZWIZ, VQA

DATASETS: dict[str, Dataset] = {
    "gqa": GQA,
    "vqa": VQA,
    "aokvqa": AOKVQA,
    "coco_captions": COCO_CAPTIONS,
    "textcaps": TEXTCAPS,
    "vizwiz": VIZWIZ,
    "vsr": VSR,
    "hateful_memes": HATEFUL_MEMES,
    "nocaps": NOCAPS,
    "ocrvqa": OCRVQA,
    "textvqa": TEXTVQA,
    "iconqa": ICONQA,
    "scienceqa": SCIENCEQA,
    "vqa_rad": VQA_RAD,
    "slake": SLAKE,
    "pathvqa": PATHVQA,
}
"""By the name that a recipe gives them (`source`)."""


def open_published(
    settings: RecordsSettings,
    path: Path,
    annotations: Path | None,
    *,
    by_image: bool,
    ocr_tokens: Path | None = None,
) -> tuple[RecordFile, PublishedLayout]:
    """The records of a dataset, and how they are read.

    path, annotations, ocr_tokens: the files that `settings` names. by_image: captions come a record an image, with all that were
    written for it. Raises DataFileError; what records hold is seen when one is used.
    """
    if settings.source not in DATASETS:
        raise DataFileError(f"{path}: source {settings.source!r}; allowed: {', '.join(DATASETS)}")
    dataset = DATASETS[settings.source]
    rows = matching(dataset.read(Files(path, annotations, by_image, ocr_tokens)), settings.where, path)
    records = RecordFile(path, map(to_line, rows))
    pattern = dataset.image_pattern if settings.image_pattern is None else settings.image_pattern
    return records, PublishedLayout(dataset, image_pattern=pattern, instructions=settings.templates)
