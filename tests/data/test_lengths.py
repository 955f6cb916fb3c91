"""Lengths of samples, told without decoding their images: those of the samples that come of the same records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from moe_lvlm.data.errors import RecordFault
from moe_lvlm.data.image_sizes import ImageSizes
from moe_lvlm.data.mixture import Draw, MixtureDataset
from moe_lvlm.data.sample import SampleBuilder, process_image
from moe_lvlm.data.templates import build_template

from .conftest import MakeBuilder, MakeSource, conversation, num_image_tokens

RECORDS: list[dict[str, Any]] = [
    {"id": "0", "image": "red.png", "conversations": conversation("<image>\nwhat is in the image?", "a red cat")},
    {"id": "1", "conversations": conversation("describe it briefly", "two dogs", "user", "sits on the mat")},
    {"id": "2", "image": ["wide.png", "red.png"], "conversations": conversation("<image><image> what?", "猫 é")},
    {"id": "3", "image": "wide.png", "conversations": conversation("<image> describe", "mat " * 300)},  # is cut
    {"id": "4", "conversations": conversation("nothing", "")},  # bad
    {"id": "5", "image": "red.png", "conversations": conversation("no mark", "cat")},  # bad
]


def processor_with(tokenizer: PreTrainedTokenizerFast, **image: Any) -> LlavaProcessor:
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(**image),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
    )


@pytest.mark.parametrize(
    "image",
    [
        {"size": {"height": 16, "width": 16}, "do_center_crop": False},
        {"size": {"shortest_edge": 16}, "do_center_crop": False},  # as large as the image's shape says
        {"do_resize": False, "do_center_crop": False},
    ],
)
@pytest.mark.parametrize("kind", ["chat", "plain"])
def test_the_length_is_that_of_the_sample(
    image: dict[str, Any], kind: Any, tokenizer: PreTrainedTokenizerFast, make_source: MakeSource
) -> None:
    processor = processor_with(tokenizer, **image)
    template = build_template(kind, "tokenizer", tokenizer, str(processor.image_token))
    builder = SampleBuilder(processor, template, num_image_tokens=num_image_tokens, max_length=200)
    # images of one record must have one size
    records = [record for record in RECORDS if record["id"] != "2" or "height" in image.get("size", {})]
    source = make_source(records)
    dataset = MixtureDataset([source], [len(records)], builder, seed=1)
    num_good = 0
    for position in range(len(records)):
        try:
            expected = len(dataset[Draw(0, position)].input_ids)
            num_good += 1
        except ValueError:
            expected = 0
        assert dataset.length(Draw(0, position)) == expected
    assert 1 <= num_good < len(records)


def test_an_image_that_is_not_looked_at(make_builder: MakeBuilder, make_source: MakeSource) -> None:
    """Where one size holds for all, a missing file shows when the sample is made; else at once."""
    source = make_source([{"id": "0", "image": "none.png", "conversations": conversation("<image> what?", "cat")}])
    dataset = MixtureDataset([source], [1], make_builder(), seed=1)
    assert dataset.length(Draw(0, 0)) > 4
    with pytest.raises(ValueError, match=r"none\.png"):
        dataset[Draw(0, 0)]


def test_sizes_by_header(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Against the processor on the decoded image, turned by its EXIF data too."""
    processor = processor_with(tokenizer, size={"shortest_edge": 16}, do_center_crop=False)
    sizes = ImageSizes(lambda image: process_image(processor, image))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGB", (40, 20)).save(tmp_path / "plain.png")
    assert sizes.processed(tmp_path, "plain.png") == (16, 32)
    assert sizes.processed(tmp_path, "turned.jpg") == (32, 16)
    (tmp_path / "broken.png").write_bytes(b"no image")
    Image.new("RGB", (900, 2)).save(tmp_path / "thin.png")
    for name, reason in (("broken.png", "cannot be read"), ("thin.png", "900 x 2"), ("none.png", "not a file")):
        with pytest.raises(RecordFault, match=reason):
            sizes.processed(tmp_path, name)
