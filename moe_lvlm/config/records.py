"""Where records of a dataset lie, in which layout, and how they are asked about."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import field_validator, model_validator

from moe_lvlm.config.base import Settings
from moe_lvlm.config.instructions import (
    ANSWER,
    CANDIDATES,
    CONTEXT,
    INSTRUCTION_SETS,
    OCR_TOKENS,
    OPTIONS,
    QUESTION,
    check_instructions,
    template_fields,
)

RecordFormat = Literal[
    "llava_json",
    "gqa",
    "vqa",
    "aokvqa",
    "coco_captions",
    "textcaps",
    "vizwiz",
    "vsr",
    "hateful_memes",
    "nocaps",
    "ocrvqa",
    "textvqa",
    "iconqa",
    "scienceqa",
    "vqa_rad",
    "slake",
    "pathvqa",
]
CAPTION_SOURCES = ("coco_captions", "textcaps", "nocaps")
CHOICE_SOURCES = ("aokvqa", "iconqa", "scienceqa")
OCR_SOURCES = ("textcaps", "textvqa")
CONTEXT_SOURCES = ("scienceqa",)


class RecordsSettings(Settings):
    """Where records lie, and in which layout.

    source: the reader. `llava_json` is a JSON list, or JSON lines, of LLaVA records; the others read a dataset's files as
        they are published (docs/data.md): gqa, vqa (VQAv2 and OK-VQA), aokvqa, coco_captions, textcaps, vizwiz, vsr,
        hateful_memes, nocaps, ocrvqa, textvqa, iconqa, scienceqa, vqa_rad, slake, pathvqa.
    path: relative to `data.image_root`, absolute, or `package:...`. annotations: of `vqa`, the file with the answers to
        the questions in `path`. ocr_tokens: of `textcaps` and `textvqa`, the file with the words read in the images
        (TextVQA_Rosetta_OCR_v0.2_*.json), for templates with {OCR_TOKENS}.
    where: only records whose fields have these values, such as `{split: 1}` or `{answer_type: [OPEN]}`.
    turns: `first` takes the first question and answer of a longer conversation (llava_json), as LAVIS does.
    image_root: where this dataset's images lie; None takes `data.image_root`. image_pattern: the file of an image below
        it, by the fields of a record, such as `COCO_train2014_{image_id:012d}.jpg`; None is the dataset's own.
    instructions: templates of what the model is asked, with {QUESTION}, {CANDIDATES}, {OPTIONS}, {OCR_TOKENS} and
        {CONTEXT} where records have them, or with {ANSWER} to ask for the question: a list, or the name of a set
        (docs/data.md): Q-MoE's `vqa`, `choice`, `caption`, MoCLE's `mocle_*`. Training draws one a sample, evaluation
        takes the first. None asks the question as it stands.
    """

    source: RecordFormat = "llava_json"
    path: str
    annotations: str | None = None
    ocr_tokens: str | None = None
    name: str | None = None
    where: Mapping[str, tuple[str | int, ...]] = {}
    turns: Literal["all", "first"] = "all"
    image_root: str | None = None
    image_pattern: str | None = None
    instructions: str | tuple[str, ...] | None = None

    def __hash__(self) -> int:
        return hash(self.model_dump_json())  # `where` has no hash of its own

    @property
    def templates(self) -> tuple[str, ...]:
        """The templates of what is asked."""
        if self.instructions is None:
            return ("{QUESTION}",)
        return INSTRUCTION_SETS[self.instructions] if isinstance(self.instructions, str) else self.instructions

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that its records can fill in templates."""
        fields: tuple[str, ...] = () if self.source in CAPTION_SOURCES else (QUESTION, ANSWER)
        if self.source in CHOICE_SOURCES:
            fields += (CANDIDATES, OPTIONS)
        if self.ocr_tokens is not None:
            fields += (OCR_TOKENS,)
        return (*fields, CONTEXT) if self.source in CONTEXT_SOURCES else fields

    @field_validator("where", mode="before")
    @classmethod
    def _wrap_values(cls, where: Any) -> Any:
        if not isinstance(where, Mapping):
            return where
        return {key: tuple(value) if isinstance(value, list | tuple) else (value,) for key, value in where.items()}

    @field_validator("where")
    @classmethod
    def _check_where(cls, where: Mapping[str, tuple[str | int, ...]]) -> Mapping[str, tuple[str | int, ...]]:
        if empty := [key for key, values in where.items() if not values]:
            raise ValueError(f"{empty[0]}: no value; at least one is needed")
        return where

    @field_validator("instructions")
    @classmethod
    def _check_set(cls, instructions: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if isinstance(instructions, str) and instructions not in INSTRUCTION_SETS:
            raise ValueError(f"{instructions!r}; allowed: {', '.join(INSTRUCTION_SETS)}, or a list of templates")
        return instructions

    @model_validator(mode="after")
    def _check_source(self) -> RecordsSettings:
        if (self.annotations is None) == (self.source == "vqa"):
            what = "needed, the file with the answers" if self.source == "vqa" else "only source vqa takes it"
            raise ValueError(f"annotations: {what} (source {self.source})")
        if self.ocr_tokens is not None and self.source not in OCR_SOURCES:
            raise ValueError(f"ocr_tokens: only {' and '.join(OCR_SOURCES)} take it (source {self.source})")
        if self.turns != "all" and self.source != "llava_json":
            raise ValueError(f"turns: a record of source {self.source} is one question; allowed: all")
        if self.source == "llava_json":
            for key in ("image_pattern", "instructions"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key}: llava_json's records hold their images and questions; leave it out")
            return self
        if self.image_pattern is not None:
            try:
                template_fields(self.image_pattern)
            except ValueError as error:
                raise ValueError(f"image_pattern: {error}") from error
        if self.source in CAPTION_SOURCES and self.instructions is None:
            raise ValueError(
                f"instructions: needed, since captions answer no question (source {self.source}); allowed: caption, "
                "mocle_cap, or a list"
            )
        try:
            check_instructions(self.templates, fields=self.fields)
        except ValueError as error:
            hint = "" if self.source not in OCR_SOURCES or self.ocr_tokens else f"; {{{OCR_TOKENS}}} needs ocr_tokens"
            raise ValueError(f"instructions: {error} (source {self.source}{hint})") from error
        return self
