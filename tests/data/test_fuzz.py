"""Records as bad as they come: each gives a sample or a BadRecordError, never anything else."""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from moe_lvlm.config.records import RecordsSettings
from moe_lvlm.data.collator import Collator
from moe_lvlm.data.errors import BadRecordError, DataFileError, RecordFault
from moe_lvlm.data.instructions import first_instruction
from moe_lvlm.data.llava_json import read_records
from moe_lvlm.data.mixture import Source, open_records
from moe_lvlm.data.records import IMAGE_MARK
from moe_lvlm.data.sample import Sample

from .conftest import MakeBuilder

SCALE = int(os.environ.get("MOE_LVLM_FUZZ_SCALE", "1"))  # 30 gives the 10,000 records of RELIABILITY's goal R6

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
WORD = st.sampled_from(["<image>", "<image>\n", "</s>", "<|im_end|>\n", "<|im_start|>", "\ud800", "\0", "{{ x }}", " "])
# any code point, lone surrogates too
TEXT = st.lists(st.text(st.characters(codec=None), max_size=8) | WORD, max_size=6).map("".join)
TURN = st.fixed_dictionaries(
    {}, optional={"from": st.sampled_from(["human", "gpt", "system", 1]), "value": TEXT | JSON}
)
PATH = st.sampled_from(
    ["good.png", "cut.png", "noise.png", "../good.png", "/etc/passwd", ".", "", "x" * 300, "nul\0", "none.png"]
)
ALMOST = st.lists(TEXT, min_size=2, max_size=4).map(
    lambda texts: [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
)
RECORD = JSON | st.fixed_dictionaries(
    {"conversations": ALMOST | st.lists(TURN | JSON, max_size=4) | JSON},
    optional={"id": JSON, "image": PATH | st.lists(PATH, max_size=3) | JSON, "task": JSON, "mask": JSON},
)


def encoded(format: str) -> bytes:
    stream = io.BytesIO()
    Image.radial_gradient("L").resize((12, 9)).convert("RGB").save(stream, format)
    return stream.getvalue()


@pytest.fixture(scope="module")
def check(make_builder: MakeBuilder) -> Callable[[list[Any], dict[str, bytes]], list[Sample]]:
    builders = [make_builder("chat", "chatml", 60), make_builder("chat", "vicuna_v1", 300), make_builder("plain")]
    collator = Collator.for_processor(builders[0].processor)

    def run(records: list[Any], files: dict[str, bytes]) -> list[Sample]:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            for name, content in files.items():
                (root / name).write_bytes(content)
            path = root / "records.json"
            path.write_text(json.dumps(records))
            source = Source("fuzz", read_records(path), root)
            good = []
            for builder in builders:
                for index in range(len(source)):
                    try:
                        good.append(source.sample(index, builder))
                    except BadRecordError as error:
                        assert (error.index, error.file) == (index, str(path))
                        assert error.reason
            batch = collator(good)
            assert len(batch["input_ids"]) == max(len(good), 1)
            return good

    return run


@settings(max_examples=100 * SCALE, deadline=None)
@given(records=st.lists(RECORD, min_size=1, max_size=5), noise=st.binary(max_size=200), cut=st.integers(1, 60))
def test_any_record_is_a_sample_or_a_bad_record(
    check: Callable[..., list[Sample]], records: list[Any], noise: bytes, cut: int
) -> None:
    whole = encoded("PNG")
    for sample in check(records, {"good.png": whole, "cut.png": whole[:-cut], "noise.png": noise}):
        assert (sample.labels != -100).any()
        assert len(sample.input_ids) == len(sample.labels) == len(sample.instruction)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow tells of the damage
@settings(max_examples=60 * SCALE, deadline=None)
@given(data=st.data(), format=st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM"]))
def test_any_damage_to_an_image_is_a_sample_or_a_bad_record(
    check: Callable[..., list[Sample]], data: st.DataObject, format: str
) -> None:
    content = bytearray(encoded(format))
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=6)):
        content[place] = data.draw(st.integers(0, 255))
    records = [{"image": "i", "conversations": [{"from": "human", "value": IMAGE_MARK}, {"from": "gpt", "value": "a"}]}]
    samples = check(records, {"i": bytes(content)})
    assert len(samples) in (0, 3)


FIXTURES = Path(__file__).parent / "fixtures"
PUBLISHED = {
    "gqa": "gqa/train_balanced_questions.json",
    "vqa": "vqa/v2_OpenEnded_mscoco_train2014_questions.json",
    "aokvqa": "aokvqa/aokvqa_v1p0_train.json",
    "coco_captions": "coco_captions/captions_val2014.json",
    "textcaps": "textcaps/TextCaps_0.1_train.json",
    "vizwiz": "vizwiz/val.json",
    "vsr": "vsr/test.jsonl",
    "hateful_memes": "hateful_memes/dev_seen.jsonl",
    "nocaps": "nocaps/nocaps_val_4500_captions.json",
    "ocrvqa": "ocrvqa/dataset.json",
    "textvqa": "textvqa/TextVQA_0.5.1_val.json",
    "iconqa": "iconqa/problems.json",
    "scienceqa": "scienceqa/problems.json",
    "vqa_rad": "vqa_rad/VQA_RAD Dataset Public.json",
    "slake": "slake/test.json",
    "pathvqa": "slake/test.json",
}
# Templates that name all that records of a source have.
ASKED = {
    "coco_captions": "caption",
    "textcaps": "mocle_ocrcaps",
    "nocaps": "caption",
    "aokvqa": "mocle_vqamc",
    "vqa": "mocle_vqg",
    "textvqa": "mocle_eval_ocr",
    "iconqa": "choice",
    "scienceqa": "mocle_eval_science",
}


def spoiled(value: Any, data: st.DataObject) -> Any:
    """The value with something in it replaced by anything."""
    inner = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    if not inner or data.draw(st.integers(0, 4)) == 0:
        return data.draw(JSON | TEXT)
    key = data.draw(st.sampled_from(inner))
    if isinstance(value, dict):
        return {name: spoiled(one, data) if name == key else one for name, one in value.items()}
    return [spoiled(one, data) if place == key else one for place, one in enumerate(value)]


@settings(max_examples=200 * SCALE, deadline=None)
@given(data=st.data(), source=st.sampled_from(list(PUBLISHED)), for_evaluation=st.booleans())
def test_any_published_file_is_read_or_refused(data: st.DataObject, source: str, for_evaluation: bool) -> None:
    annotations = str(FIXTURES / "vqa/v2_mscoco_train2014_annotations.json") if source == "vqa" else None
    ocr_tokens = None
    if source in ("textvqa", "textcaps"):
        ocr_tokens = str(FIXTURES / "textvqa/TextVQA_Rosetta_OCR_v0.2_val.json")
    original = FIXTURES / PUBLISHED[source]
    lines = original.read_text().splitlines()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / original.name
        if path.suffix == ".jsonl":
            path.write_text("\n".join(json.dumps(spoiled(json.loads(line), data)) for line in lines))
        else:
            path.write_text(json.dumps(spoiled(json.loads(original.read_text()), data)))
        wanted = RecordsSettings(
            source=source,  # type: ignore[arg-type]
            path=str(path),
            annotations=annotations,
            ocr_tokens=ocr_tokens,
            instructions=ASKED.get(source),
            image_pattern="{img_name}" if source == "pathvqa" else None,
        )
        try:
            opened = open_records(wanted, folder, for_evaluation=for_evaluation)
        except DataFileError as error:
            assert any(str(file) in str(error) for file in (path, annotations, ocr_tokens))
            return
        for index in range(len(opened)):
            for draw in (None, 5):
                try:
                    record = opened.record(index, draw)
                except BadRecordError as error:
                    assert (error.index, error.file) == (index, str(path))
                else:
                    assert record.turns[1].text
                    assert len(record.images) == 1
                    assert isinstance(opened.facts(index), dict)
                    assert first_instruction(record.turns) in opened.instructions(index)
            try:
                opened.facts(index)
            except RecordFault as fault:
                assert fault.reason
