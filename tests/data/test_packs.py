"""Packs: unpacking is checked, safe and atomic; the scenes pack holds what its manifest and a recipe need."""

from __future__ import annotations

import hashlib
import json
import stat
import subprocess
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    CLIPVisionModel,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from moe_lvlm.data.clusters import ClusterTable
from moe_lvlm.data.packs import known_packs, resolve, unpack
from moe_lvlm.data.packs.archive import extract, unpack_pack, write_manifest

PROJECT = Path(__file__).parents[2]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "<user>", "<assistant>"]


def make_pack(shipped: Path, name: str = "fruit") -> Path:
    pack = shipped / name
    (pack / "tower").mkdir(parents=True)
    (pack / "tower" / "config.json").write_text("{}")
    with zipfile.ZipFile(pack / "images.zip", "w") as archive:
        for number in range(200):
            archive.writestr(f"images/{number}.txt", str(number))
    write_manifest(pack, {"name": name})
    return pack


@pytest.fixture
def shipped(tmp_path: Path) -> Path:
    make_pack(tmp_path / "shipped")
    return tmp_path / "shipped"


# --- unpacking -------------------------------------------------------------------------------------------------------


def test_unpacking_extracts_archives_and_copies_files(shipped: Path, tmp_path: Path) -> None:
    folder = unpack("fruit", shipped=shipped, cache=tmp_path / "cache")
    assert (folder / "images" / "137.txt").read_text() == "137"
    assert (folder / "tower" / "config.json").read_text() == "{}"
    expected_hash = hashlib.sha256((shipped / "fruit" / "pack.json").read_bytes()).hexdigest()[:12]
    assert folder == tmp_path / "cache" / f"fruit-{expected_hash}"
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [folder.name]


def test_a_pack_is_unpacked_once(shipped: Path, tmp_path: Path) -> None:
    folder = unpack("fruit", shipped=shipped, cache=tmp_path / "cache")
    (folder / "mark").touch()
    assert unpack("fruit", shipped=shipped, cache=tmp_path / "cache") == folder
    assert (folder / "mark").exists()


def test_a_changed_pack_gets_a_folder_of_its_own(shipped: Path, tmp_path: Path) -> None:
    before = unpack("fruit", shipped=shipped, cache=tmp_path / "cache")
    (shipped / "fruit" / "tower" / "config.json").write_text('{"new": 1}')
    write_manifest(shipped / "fruit", {"name": "fruit"})
    after = unpack("fruit", shipped=shipped, cache=tmp_path / "cache")
    assert after != before
    assert (after / "tower" / "config.json").read_text() == '{"new": 1}'


UNPACK_ON_A_SIGNAL = """
import sys, time
from pathlib import Path
from moe_lvlm.data.packs import unpack

shipped, cache, signals, number = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
(signals / number).touch()
while not (signals / "go").exists():
    time.sleep(0.001)
folder = unpack("fruit", shipped=shipped, cache=cache)
print(folder.name, len(list(folder.glob("images/*.txt"))))
"""


def test_processes_may_unpack_at_once(shipped: Path, tmp_path: Path) -> None:
    signals = tmp_path / "signals"
    signals.mkdir()
    places = [str(shipped), str(tmp_path / "cache"), str(signals)]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", UNPACK_ON_A_SIGNAL, *places, str(number)],
            cwd=PROJECT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    deadline = time.monotonic() + 60
    while len(list(signals.iterdir())) < len(workers) and time.monotonic() < deadline:
        time.sleep(0.01)
    (signals / "go").touch()
    said = [worker.communicate(timeout=60) for worker in workers]
    (folder,) = (tmp_path / "cache").iterdir()
    assert said == [(f"{folder.name} 200\n", "")] * len(workers)


def test_a_process_that_comes_second_leaves_the_first_ones_folder(shipped: Path, tmp_path: Path) -> None:
    target = tmp_path / "cache" / "fruit"
    unpack_pack(shipped / "fruit", target)
    (target / "mark").touch()
    unpack_pack(shipped / "fruit", target)
    assert (target / "mark").exists()
    assert list(target.parent.iterdir()) == [target]


def test_a_damaged_file_is_named_and_nothing_is_left(shipped: Path, tmp_path: Path) -> None:
    path = shipped / "fruit" / "images.zip"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"images\.zip: damaged"):
        unpack("fruit", shipped=shipped, cache=tmp_path / "cache")
    path.unlink()
    with pytest.raises(ValueError, match=r"images\.zip: missing"):
        unpack("fruit", shipped=shipped, cache=tmp_path / "cache")
    (shipped / "fruit" / "pack.json").write_text('{"files": []}')
    with pytest.raises(ValueError, match=r"pack\.json: damaged manifest"):
        unpack("fruit", shipped=shipped, cache=tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*"))


def test_a_pack_of_another_format_is_refused(shipped: Path, tmp_path: Path) -> None:
    (shipped / "fruit" / "pack.json").write_text('{"files": {}, "format_version": 2}')
    with pytest.raises(ValueError, match="format_version 2"):
        unpack("fruit", shipped=shipped, cache=tmp_path / "cache")


@pytest.mark.parametrize("name", ["../evil.txt", "a/../../evil.txt", "/tmp/evil.txt", "C:evil.txt", "..\\evil.txt"])
def test_archive_members_outside_of_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr("good.txt", "good")
        archive.writestr(name, "evil")
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="unsafe member"):
        extract(tmp_path / "bad.zip", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    assert not list(tmp_path.rglob("evil.txt"))


def test_archive_members_that_are_links_are_refused(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(ValueError, match="unsafe member 'link'"):
        extract(tmp_path / "bad.zip", tmp_path)


def test_a_file_that_is_no_archive_is_called_damaged(tmp_path: Path) -> None:
    (tmp_path / "bad.zip").write_text("text")
    with pytest.raises(ValueError, match="damaged archive"):
        extract(tmp_path / "bad.zip", tmp_path)


# --- paths -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def in_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_LVLM_CACHE", str(cache))


@pytest.fixture(scope="module")
def scenes(cache: Path) -> Path:
    return unpack("scenes", cache=cache / "packs")


def test_plain_paths_come_back_unchanged() -> None:
    assert resolve("data/train.json") == Path("data/train.json")
    assert resolve(Path("/data")) == Path("/data")


@pytest.mark.usefixtures("in_cache")
def test_package_paths_lead_into_the_pack(scenes: Path) -> None:
    assert resolve("package:scenes") == scenes
    assert resolve(Path("package:scenes/tower/config.json")) == scenes / "tower" / "config.json"


@pytest.mark.usefixtures("in_cache")
@pytest.mark.parametrize("path", ["package:scenes/../x", "package:scenes//etc", "package:scenes/tower/../../x"])
def test_paths_that_leave_the_pack_are_refused(path: str) -> None:
    with pytest.raises(ValueError, match="leaves the pack"):
        resolve(path)


@pytest.mark.usefixtures("in_cache")
def test_unknown_names_are_answered_with_the_known_ones(scenes: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"package:scene: unknown pack; known are \['mocle', 'scene_tasks', 'scenes'\]. Did you mean 'scenes'",
    ):
        resolve("package:scene/train.json")
    with pytest.raises(ValueError, match="unknown pack"):
        resolve("package:")
    with pytest.raises(ValueError, match=r"holds no 'trian\.json'; at its top are .*'train\.json'"):
        resolve("package:scenes/trian.json")
    assert known_packs() == ["mocle", "scene_tasks", "scenes"]


# --- the scenes pack -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def records(scenes: Path) -> dict[str, list[dict[str, Any]]]:
    return {name: json.loads((scenes / name).read_text()) for name in ("train.json", "captions.json", "test.json")}


@pytest.fixture(scope="module")
def tokenizer(scenes: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(scenes / "language_model")


def test_the_scenes_pack_is_small() -> None:
    pack = PROJECT / "moe_lvlm" / "data" / "packs" / "scenes"
    assert sum(path.stat().st_size for path in pack.rglob("*") if path.is_file()) < 7 * 2**20


def test_the_scenes_pack_names_its_sources_and_licences(scenes: Path) -> None:
    said = (scenes / "LICENSES.md").read_text()
    for name in ("Twemoji", "CC-BY 4.0", "Noto Emoji", "Apache-2.0", "Fluent Emoji", "MIT License", "MiniLM-L6-v2"):
        assert name in said, name


def test_the_table_of_clusters_holds_every_first_question(
    scenes: Path, records: dict[str, list[dict[str, Any]]]
) -> None:
    table = ClusterTable.load(scenes / "clusters.safetensors")
    assert (table.num_clusters, table.width, table.encoder) == (8, 384, "sentence-transformers/all-MiniLM-L6-v2")
    clusters: dict[str, int | None] = {}
    for row in (row for rows in records.values() for row in rows):
        question = row["conversations"][0]["value"].removeprefix("<image>\n")
        clusters[question] = table.find(question)
    assert None not in clusters.values()
    assert len(clusters) == len(table.ids_I)
    # the encoder's embeddings have length 1, and so has the centre of a cluster of one question
    alone = [cluster for cluster, count in Counter(clusters.values()).items() if count == 1]
    assert np.allclose(np.linalg.norm(table.centres_KW[alone], axis=1), 1, atol=1e-5)  # type: ignore[index]
    assert len(alone) == 3
    # no cluster has questions of two kinds
    kinds = {(cluster, question.split(" the ")[0]) for question, cluster in clusters.items()}
    assert len(kinds) == len({cluster for cluster, _ in kinds}) == 8


def test_counts_are_those_of_the_manifest(scenes: Path, records: dict[str, list[dict[str, Any]]]) -> None:
    counts = json.loads((scenes / "pack.json").read_text())["counts"]
    assert counts["records"] == {name: len(rows) for name, rows in records.items()}
    assert counts["test_tasks"] == Counter(row["task"] for row in records["test.json"])
    assert counts["train_images"] == len(list(scenes.glob("train/*.webp"))) == 6000
    assert (
        counts["test_images"] == len(list(scenes.glob("test/*.webp"))) == len(list(scenes.glob("masks/*.png"))) == 450
    )
    assert len({row["image"] for row in records["train.json"]}) == len(records["captions.json"]) == 6000
    assert set(counts["test_tasks"]) == {"background", "count", "what", "where"}


def test_records_have_the_llava_layout_and_their_images(scenes: Path, records: dict[str, list[dict[str, Any]]]) -> None:
    sizes = set()
    for name, rows in records.items():
        assert len({row["id"] for row in rows}) == len(rows)
        for row in rows:
            turns = row["conversations"]
            assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
            assert turns[0]["value"].startswith("<image>\n")
            assert sum(turn["value"].count("<image>") for turn in turns) == 1
            assert len({turn["value"] for turn in turns[::2]}) == len(turns) // 2
            assert row["image"].startswith("test/" if name == "test.json" else "train/")
    for image in {row["image"] for rows in records.values() for row in rows}:
        with Image.open(scenes / image) as opened:
            sizes.add((opened.size, opened.mode))
    assert sizes == {((48, 48), "RGB")}


def test_masks_are_one_bit_and_agree_with_the_answers(scenes: Path, records: dict[str, list[dict[str, Any]]]) -> None:
    words = {1: "one", 2: "two", 3: "three"}
    halves = {"top": slice(0, 24), "bottom": slice(24, 48), "left": slice(0, 24), "right": slice(24, 48)}
    for row in records["test.json"]:
        with Image.open(scenes / row["mask"]) as opened:
            assert opened.mode == "1"
            mask = np.asarray(opened)
        quadrants = mask.reshape(2, 24, 2, 24).any(axis=(1, 3))
        question, answer = (turn["value"] for turn in row["conversations"])
        if row["task"] == "count":
            assert answer == words[int(quadrants.sum())]
        if row["task"] in ("what", "where"):
            place = answer if row["task"] == "where" else question.removeprefix("<image>\nWhat is at the ").rstrip("?")
            vertical, horizontal = place.split()
            assert mask[halves[vertical], halves[horizontal]].any()


def test_no_held_out_image_is_a_training_image(scenes: Path) -> None:
    held_out, trained = (
        {np.asarray(Image.open(path)).tobytes() for path in scenes.glob(f"{folder}/*.webp")}
        for folder in ("test", "train")
    )
    assert not held_out & trained


def test_the_tokenizer_knows_every_word(
    tokenizer: PreTrainedTokenizerBase, records: dict[str, list[dict[str, Any]]]
) -> None:
    assert tokenizer.convert_tokens_to_ids(SPECIAL) == list(range(7))
    texts = {turn["value"] for rows in records.values() for row in rows for turn in row["conversations"]}
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.unk_token_id not in ids
        said = text.removeprefix("<image>\n").lower()
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == said
    assert tokenizer("zebra").input_ids == [tokenizer.unk_token_id]


def test_the_chat_template_by_hand(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [
        {"role": "user", "content": "<image>\nWhere is the cat?"},
        {"role": "assistant", "content": "top left"},
        {"role": "user", "content": [{"type": "text", "text": "How many objects are there?"}]},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = (
        "<s> <user> <image> where is the cat ? <assistant> top left </s> "
        "<user> how many objects are there ? <assistant>"
    )
    assert tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids) == expected.split()
    in_parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where is the cat?"}]}]
    one_string = tokenizer.apply_chat_template(messages[:1], tokenize=False)
    assert tokenizer.apply_chat_template(in_parts, tokenize=False) == one_string
    with pytest.raises(Exception, match="roles are user and assistant"):
        tokenizer.apply_chat_template([{"role": "system", "content": "x"}], tokenize=False)


def test_tower_and_language_model_load_whole(scenes: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    for kind, folder in ((CLIPVisionModel, "tower"), (LlamaForCausalLM, "language_model")):
        model, info = kind.from_pretrained(scenes / folder, output_loading_info=True)
        assert not any(info.values()), info
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.vocab_size >= len(tokenizer)
    assert (model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id) == (0, 1, 2)


def test_the_image_processor_maps_pixels_to_minus_one_and_one(scenes: Path) -> None:
    processor = AutoImageProcessor.from_pretrained(scenes / "tower")
    picture = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    pixels = processor(Image.fromarray(picture), return_tensors="np").pixel_values[0]
    np.testing.assert_allclose(pixels, picture.transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)


def test_the_language_model_answers_about_a_scene_told_in_words(
    scenes: Path, tokenizer: PreTrainedTokenizerBase, records: dict[str, list[dict[str, Any]]]
) -> None:
    """What it was taught, on a held-out caption written by hand."""
    model = LlamaForCausalLM.from_pretrained(scenes / "language_model").eval()
    told = "A cat at the top left and a bus at the bottom right on a blue background."
    expected = {
        "What color is the background?": "blue",
        "How many objects are there?": "two",
        "What is at the bottom right?": "bus",
        "Where is the cat?": "top left",
    }
    for question, answer in expected.items():
        messages = [
            {"role": "user", "content": "Describe the image."},
            {"role": "assistant", "content": told},
            {"role": "user", "content": question},
        ]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([tokenizer(prompt).input_ids])
        said = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        assert tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True) == answer
