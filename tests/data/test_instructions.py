"""Sets of instructions, and which a dataset can be asked with."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from moe_lvlm.config.instructions import INSTRUCTION_SETS, QMOE_SETS, template_fields
from moe_lvlm.config.recipe import TaskSettings
from moe_lvlm.config.records import RecordsSettings

VQA: dict[str, Any] = {"source": "vqa", "path": "q.json", "annotations": "a.json"}
CAPTION: dict[str, Any] = {"source": "coco_captions", "path": "c.json"}


def test_the_sets_are_those_of_the_supplement() -> None:
    assert {name: len(templates) for name, templates in QMOE_SETS.items()} == {
        "vqa": 5,
        "choice": 5,
        "caption": 5,
    }
    # evaluation takes the first
    assert [templates[0] for templates in QMOE_SETS.values()] == [
        "{QUESTION}",
        "{QUESTION} Choose from {CANDIDATES}.",
        "A photo of",
    ]
    for template in (template for templates in QMOE_SETS.values() for template in templates):
        assert template == template.strip().removesuffix(",")


def test_templates_of_settings() -> None:
    assert RecordsSettings(**VQA).templates == ("{QUESTION}",)
    assert RecordsSettings(**VQA, instructions="vqa").templates == INSTRUCTION_SETS["vqa"]
    assert RecordsSettings(**CAPTION, instructions=("Say {{it}}.",)).templates == ("Say {{it}}.",)
    choice = TaskSettings(name="n", source="aokvqa", path="a.json", instructions="choice", metric="choice")
    assert choice.templates[1] == "Q: {QUESTION} Multi Choices: {CANDIDATES} A:"
    # a question with choices may be asked without them
    assert RecordsSettings(source="aokvqa", path="a.json", instructions="vqa").templates[0] == "{QUESTION}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (VQA | {"instructions": ["{IMAGE} {QUESTION}"]}, r"has the field {IMAGE}; allowed: .* \(source vqa"),
        (VQA | {"instructions": "choice"}, r"has the field {CANDIDATES}; allowed: {QUESTION}"),
        (VQA | {"instructions": "caption"}, r"'A photo of' leaves the question out; it needs {QUESTION}"),
        (VQA | {"instructions": []}, "no template; at least one"),
        (VQA | {"instructions": ["{QUESTION"]}, "expected '}'"),
        (VQA | {"instructions": ["{}"]}, "the field {} is not a plain name"),
        (VQA | {"instructions": ["{QUESTION.x}"]}, "the field {QUESTION.x} is not a plain name"),
        (VQA | {"instructions": ["{QUESTION!r}"]}, "is not a plain name"),
        (VQA | {"instructions": "vqa2"}, "instructions"),
        (CAPTION, "instructions: needed, since captions answer no question"),
        (CAPTION | {"instructions": "vqa"}, r"has the field {QUESTION}; allowed: none, since records have no question"),
        (CAPTION | {"instructions": [" "]}, "' ' asks nothing"),
        ({"source": "vqa", "path": "q.json"}, "annotations: needed, the file with the answers"),
        ({"source": "gqa", "path": "q.json", "annotations": "a.json"}, "only source vqa takes it"),
        ({"path": "q.json", "annotations": "a.json"}, r"only source vqa takes it \(source llava_json\)"),
        ({"path": "q.json", "instructions": "vqa"}, "instructions: llava_json's records hold their images"),
        ({"path": "q.json", "image_pattern": "{id}"}, "image_pattern: llava_json's records"),
        (VQA | {"image_pattern": "{image_id"}, "image_pattern: .*expected '}'"),
        (VQA | {"image_pattern": "{image_id[0]}"}, "image_pattern: .* is not a plain name"),
        (VQA | {"image_pattern": "{image_id:{width}}"}, "image_pattern: .* is not a plain name"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RecordsSettings.model_validate(settings)


def test_fields_of_a_pattern() -> None:
    assert template_fields("COCO_{data_subtype}_{image_id:012d}.jpg") == [("data_subtype", ""), ("image_id", "012d")]
    assert template_fields("no {{field}} at all") == []
