"""Whole runs whose checkpoints leave out what no stage has trained: what they hold, resumes, loading, later stages."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import CLIPVisionModel, InstructBlipConfig, LlamaForCausalLM

import moe_lvlm
from moe_lvlm.checkpoint.base import read_base
from moe_lvlm.checkpoint.layout import CheckpointError
from moe_lvlm.checkpoint.reader import Checkpoint
from moe_lvlm.checkpoint.source import SafetensorsSource, open_source
from moe_lvlm.config.load import load_recipe
from moe_lvlm.config.recipe import ModelSettings
from moe_lvlm.conversion.check import check
from moe_lvlm.evaluation.runner import evaluate
from moe_lvlm.models.build import build_dense, build_empty, config_of, load_plain_llava, open_weights
from moe_lvlm.models.qformer import with_connector
from moe_lvlm.models.weights import load_weights
from moe_lvlm.training.base import find_base, saves_frozen
from tests.models.test_blip import tiny_blip2
from tests.pretrained_parts import parts_recipe, write_parts, write_parts_inputs
from tests.tiny_models import tiny_llava
from tests.tiny_run import write_instructblip, write_qmoe_inputs, write_run_inputs
from tests.training.launching import ROOT, Server, events, kill_after
from tests.training.states import assert_same_checkpoint

LAST = "adapt-000004"
TWO_WAYS = ("train.checkpoint.save_frozen=true", "train.checkpoint.save_frozen=false")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that trains adapters and projector around parts that are read."""
    return write_parts_inputs(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def adapted(server: Server, parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of it on two processes that nothing happened to. Not to be changed."""
    return run(server, parts, tmp_path_factory.mktemp("adapted") / "run")


def run(server: Server, recipe: Path, folder: Path, *settings: str, world: int = 2) -> Path:
    server.run(["train", str(recipe), f"output_dir={folder}", *settings], world=world)
    return folder


def index_names(checkpoint: Path) -> set[str]:
    return set(json.loads((checkpoint / "index.json").read_text())["tensors"])


def parts_names(folder: Path) -> set[str]:
    """Parameters of the parts as transformers reads them, by the names that they have in our model."""
    tower = CLIPVisionModel.from_pretrained(folder / "clip")
    llama = LlamaForCausalLM.from_pretrained(folder / "llama")
    names = {f"model.vision_tower.{name}" for name, _ in tower.named_parameters()}
    names |= {f"model.language_model.{name}" for name, _ in llama.model.named_parameters()}
    return names | {"lm_head.weight"}


def copied(run: Path, folder: Path) -> Path:
    shutil.copytree(run, folder)
    return folder


def assert_same_weights(found: Path, expected: Path) -> None:
    """Two checkpoints give the same model, bit for bit."""
    left, right = open_source(found), open_source(expected)
    assert sorted(left.names()) == sorted(right.names())
    for name in left.names():
        assert torch.equal(left.read(name).float(), right.read(name).float()), name


@pytest.mark.distributed
def test_a_checkpoint_holds_what_was_trained(parts: Path, adapted: Path) -> None:
    model, _ = moe_lvlm.load(adapted)
    all_names = {name for name, _ in model.named_parameters()}
    untouched = parts_names(parts.parent)
    assert untouched < all_names
    for checkpoint in (adapted / "checkpoints").glob("adapt-*"):
        assert index_names(checkpoint) == all_names - untouched
        base = read_base(checkpoint)
        assert base is not None and base.tensors.keys() == untouched
        # three float32 numbers a trained one, and no more than headers beside them
        trained = sum(p.numel() for name, p in model.named_parameters() if name not in untouched)
        held = sum(file.stat().st_size for file in checkpoint.glob("rank-*"))
        assert 12 * trained < held < 12 * trained + 20_000
    assert all(
        "lora" in name or "gate" in name or "table" in name or "projector" in name for name in all_names - untouched
    )


@pytest.mark.distributed
@pytest.mark.parametrize("settings", [("train.precision=fp32",), ("train.precision=bf16", "parallel.deepspeed=zero3")])
def test_it_loads_as_a_checkpoint_that_holds_all(
    server: Server, parts: Path, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    """All of the live model's weights were written by a run of the same seed that leaves out none."""
    whole, small = (
        run(server, parts, tmp_path / way, "stages.0.steps=2", way, *settings) / "checkpoints" / "adapt-000002"
        for way in TWO_WAYS
    )
    assert read_base(whole) is None and read_base(small) is not None
    assert events(tmp_path / TWO_WAYS[0]).losses() == events(tmp_path / TWO_WAYS[1]).losses()
    assert_same_weights(small, whole)
    left, right = (moe_lvlm.load(checkpoint)[0].state_dict() for checkpoint in (small, whole))
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.mark.distributed
@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_a_killed_run_goes_on_exactly(server: Server, parts: Path, adapted: Path, tmp_path: Path, zero: str) -> None:
    setting = f"parallel.deepspeed={zero}"
    unbroken = adapted if zero == "zero2" else run(server, parts, tmp_path / "unbroken", setting)
    broken = tmp_path / "broken"
    command = ["train", str(parts), f"output_dir={broken}", setting]
    kill_after(server, command, broken, "adapt", 2)
    server.run(command)
    assert events(broken).named("resume")
    assert events(broken).steps() == events(unbroken).steps()
    assert_same_checkpoint(broken / "checkpoints" / LAST, unbroken / "checkpoints" / LAST)
    assert read_base(broken / "checkpoints" / LAST) == read_base(unbroken / "checkpoints" / LAST)


def stopped_at(run: Path, folder: Path, step: int) -> Path:
    """A copy of a run as it was after that step."""
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("DONE", "log.jsonl", "tensorboard"))
    for later in range(step + 1, 5):
        shutil.rmtree(folder / "checkpoints" / f"adapt-{later:06d}")
    (folder / "checkpoints" / "latest").write_text(f"adapt-{step:06d}\n")
    return folder


@pytest.mark.distributed
def test_a_run_may_change_its_mind(server: Server, parts: Path, adapted: Path, tmp_path: Path) -> None:
    """From leaving out to holding all, and back; it trains on as it did."""
    folder = stopped_at(adapted, tmp_path / "run", 2)
    run(server, parts, folder, "train.checkpoint.save_frozen=true", "stages.0.steps=4")
    assert read_base(folder / "checkpoints" / "adapt-000003") is None
    assert_same_weights(folder / "checkpoints" / LAST, adapted / "checkpoints" / LAST)
    again = stopped_at(folder, tmp_path / "again", 3)
    run(server, parts, again, "train.checkpoint.save_frozen=false")
    assert_same_checkpoint(again / "checkpoints" / LAST, adapted / "checkpoints" / LAST)


@pytest.mark.distributed
def test_it_is_judged_evaluated_and_started_from(server: Server, parts: Path, adapted: Path, tmp_path: Path) -> None:
    for checkpoint in (adapted / "checkpoints" / "adapt-000001", adapted / "checkpoints" / LAST):
        assert check(checkpoint).problems == ()
    tasks = "evaluation.tasks=[{name: one, path: train.json, max_new_tokens: 3}]"
    folder = run(server, parts, tmp_path / "run", tasks, "stages.0.steps=1")
    assert evaluate(folder)["one"]["n"] == 40

    # another run goes on from the whole model: what it does not train stays in the first one, or in that one's base
    recipe = yaml.safe_load(parts.read_text())
    recipe["model"] = {"from_pretrained": str(folder), "attention": "eager"}
    recipe["train"]["checkpoint"]["save_frozen"] = False
    recipe["stages"][0] |= {"name": "more", "adapt": False, "train": ["connector"], "steps": 1}
    path = tmp_path / "more.yaml"
    path.write_text(yaml.safe_dump(recipe))
    more = run(server, path, tmp_path / "more") / "checkpoints" / "more-000001"
    base = read_base(more)
    assert base is not None
    assert [one.folder for one in base.folders] == [str(folder / "checkpoints" / "adapt-000001")]
    assert all("multi_modal_projector" in name for name in index_names(more))
    assert len(index_names(more)) == 4
    before, after = open_source(folder / "checkpoints" / "adapt-000001"), open_source(more)
    assert sorted(before.names()) == sorted(after.names())
    moved = {name for name in after.names() if not torch.equal(before.read(name), after.read(name))}
    assert moved == index_names(more)


@pytest.mark.distributed
def test_a_base_that_is_gone(server: Server, tmp_path: Path) -> None:
    """Loading and resuming say so, and no run begins anew; a link to where it lies now is enough."""
    parts = write_parts_inputs(tmp_path / "parts")
    folder = run(server, parts, tmp_path / "run", "stages.0.steps=2", world=1)
    (tmp_path / "parts" / "llama").rename(tmp_path / "moved")
    for path in (folder, folder / "checkpoints" / "adapt-000001"):
        with pytest.raises(CheckpointError, match=r"are in .*/llama .* no such folder; put back what was there"):
            moe_lvlm.load(path)
    (tmp_path / "parts" / "llama").symlink_to(tmp_path / "moved")
    moe_lvlm.load(folder)

    file = tmp_path / "moved" / "model-00002-of-00006.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    shutil.rmtree(folder / "checkpoints" / "adapt-000002")
    (folder / "checkpoints" / "latest").write_text("adapt-000001\n")
    (folder / "DONE").unlink()
    job = server.start(["train", str(parts), f"output_dir={folder}", "stages.0.steps=2"], world=2)
    assert set(job.wait()) == {2}
    assert "model-00002-of-00006.safetensors: xxh3-128 is" in job.output
    assert [one.name for one in (folder / "checkpoints").glob("adapt-*")] == ["adapt-000001"]


def staged(folder: Path, **changes: Any) -> Path:
    """Projector, then queries of the language model, then experts cut from it, then a few of these weights again."""
    recipe = parts_recipe(folder, **changes)
    del recipe["model"]["adapter"]
    common = {"steps": 1, "micro_batch": 2, "global_batch": 4, "learning_rate": 1.0e-2}
    recipe["stages"] = [
        {"name": "first", "train": ["connector"], **common},
        {"name": "second", "train": ["re:language_model.*self_attn.q_proj"], **common},
        {"name": "third", "upcycle": True, "train": ["moe"], **common},
        {"name": "fourth", "train": ["connector", "re:experts.w2"], **common},
    ]
    path = folder / "staged.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.mark.distributed
def test_later_stages_train_what_earlier_ones_left(server: Server, parts: Path, tmp_path: Path) -> None:
    """Two processes, two of the four experts each, ZeRO 2. What was trained once stays in."""
    path = staged(parts.parent)
    sharded = "parallel.expert_parallel_size=2"
    whole, small = (run(server, path, tmp_path / way, sharded, way) / "checkpoints" for way in TWO_WAYS)
    untouched = parts_names(parts.parent)
    queries = {name for name in untouched if "language_model" in name and "self_attn.q_proj" in name}
    projector = {name for name in index_names(whole / "first-000001") if "multi_modal_projector" in name}
    moe = {name for name in index_names(whole / "third-000001") if ".mlp.experts." in name or ".mlp.router." in name}
    assert len(queries) == 3 and len(projector) == 4 and moe
    assert index_names(small / "first-000001") == projector
    assert index_names(small / "second-000001") == projector | queries
    assert index_names(small / "third-000001") >= projector | queries | moe
    left = read_base(small / "third-000001")
    assert left is not None and left.tensors.keys() < untouched
    assert not [name for name in left.tensors if name in moe | queries]
    assert index_names(small / "fourth-000001") == index_names(small / "third-000001")
    for stage in ("first", "second", "third", "fourth"):
        assert_same_weights(small / f"{stage}-000001", whole / f"{stage}-000001")

    # from there another run, each process with its two experts, of which it trains one matrix: the others stay there
    recipe = yaml.safe_load(path.read_text())
    recipe["model"] = {"from_pretrained": str(small / "third-000001")}
    recipe["stages"] = [recipe["stages"][3] | {"train": ["re:experts.w2"]}]
    path = tmp_path / "more.yaml"
    path.write_text(yaml.safe_dump(recipe))
    whole, small = (run(server, path, tmp_path / f"more-{way}", sharded, way) / "checkpoints" for way in TWO_WAYS)
    assert index_names(small / "fourth-000001") == {name for name in moe if name.endswith("experts.w2")}
    assert_same_weights(small / "fourth-000001", whole / "fourth-000001")


@pytest.mark.distributed
def test_a_qmoe_run(server: Server, tmp_path: Path) -> None:
    """InstructBLIP's tower and language model stay where they are; a killed run goes on exactly."""
    recipe = write_qmoe_inputs(tmp_path / "qmoe")
    settings = ("train.checkpoint.save_frozen=false", "stages.0.steps=4")
    unbroken = run(server, recipe, tmp_path / "unbroken", *settings)
    broken = tmp_path / "broken"
    command = ["train", str(recipe), f"output_dir={broken}", *settings]
    kill_after(server, command, broken, "tune", 2)
    server.run(command)
    assert events(broken).steps() == events(unbroken).steps()
    name = "tune-000004"
    assert_same_checkpoint(broken / "checkpoints" / name, unbroken / "checkpoints" / name)

    folder = Path(load_recipe(str(recipe)).model.from_pretrained or "")
    frozen = {
        name for name in SafetensorsSource(folder).names() if name.startswith(("vision_model.", "language_model."))
    }
    model, _ = moe_lvlm.load(broken)
    parameters = {name for name, _ in model.named_parameters()}
    assert index_names(broken / "checkpoints" / name) == parameters - frozen
    assert any(".experts." in name for name in parameters - frozen)
    assert Checkpoint(broken / "checkpoints" / name).state == Checkpoint(unbroken / "checkpoints" / name).state


def dense(folder: Path, **model: Any) -> tuple[ModelSettings, Mapping[str, torch.Tensor]]:
    recipe = parts_recipe(folder)
    settings = ModelSettings.model_validate({**recipe["model"], "adapter": None} | model)
    return settings, dict(build_dense(settings, seed=0)[0].named_parameters())


def test_words_that_were_added_are_saved(tmp_path: Path) -> None:
    """A vocabulary of 20 grows, since the tokenizer has 24 words: embeddings and head are no longer the folder's."""
    write_run_inputs(tmp_path)
    write_parts(tmp_path, vocab_size=10)
    settings, weights = dense(tmp_path)
    lines: list[str] = []
    base = find_base(settings, weights, log=lines.append)
    assert base is not None
    grown = {"model.language_model.embed_tokens.weight", "lm_head.weight"}
    drawn = {name for name in weights if "multi_modal_projector" in name}
    assert base.tensors.keys() == weights.keys() - grown - drawn
    (line,) = lines
    assert line.startswith(f"checkpoints leave out {len(base.tensors)} weights ({base.num_bytes:,} bytes)")
    # and each is where it is said to be: CLIP has two towers with ends of the same names
    for name, tensor in base.tensors.items():
        folder = SafetensorsSource(base.folders[tensor.folder].path())
        assert torch.equal(folder.read(tensor.name), weights[name])
        assert ("vision" in name) == (tensor.folder == 0) == tensor.name.startswith("vision_model.")


def blip_weights(folder: Path, **connector: Any) -> tuple[ModelSettings, Mapping[str, torch.Tensor]]:
    """The weights of a model that is read from one folder, as a first stage begins with them."""
    settings = ModelSettings.model_validate({"from_pretrained": str(folder), "connector": connector})
    text_from = connector.get("text_from")
    model = build_empty(with_connector(config_of(folder, text_from=text_from), settings))
    load_weights(model, open_weights(folder, text_from=text_from))
    return settings, dict(model.named_parameters())


def test_a_llava_folder_of_transformers(tmp_path: Path) -> None:
    """Whose names begin otherwise than ours; the projector lies there too."""
    tiny_llava().save_pretrained(tmp_path)
    weights = dict(load_plain_llava(tmp_path, dtype=torch.float32).named_parameters())
    settings = ModelSettings(from_pretrained=str(tmp_path))
    base = find_base(settings, weights, log=print)
    assert base is not None and base.tensors.keys() == weights.keys()
    assert any(name != tensor.name for name, tensor in base.tensors.items())


@pytest.mark.parametrize("kind", ["qformer", "qmoe"])
def test_an_instructblip_folder(tmp_path: Path, kind: str) -> None:
    """All but the query FFNs that have become experts, one of them the general one."""
    write_instructblip(tmp_path)
    experts = {"experts": {"num_layers": 2}} if kind == "qmoe" else {}
    settings, weights = blip_weights(tmp_path, kind=kind, **experts)
    base = find_base(settings, weights, log=print)
    assert base is not None
    new = {name for name in weights if any(part in name for part in (".experts.", ".router.", ".general."))}
    assert base.tensors.keys() == weights.keys() - new
    assert bool(new) == (kind == "qmoe")


def test_a_blip2_with_the_words_of_an_instructblip(tmp_path: Path) -> None:
    """Two folders: the words of the Q-Former lie in the second."""
    write_instructblip(tmp_path / "words")
    blip2 = tiny_blip2()
    blip2.config.image_token_index = InstructBlipConfig.from_pretrained(tmp_path / "words").image_token_index
    blip2.save_pretrained(tmp_path)
    settings, weights = blip_weights(tmp_path, kind="qformer", text_from=str(tmp_path / "words"))
    base = find_base(settings, weights, log=print)
    assert base is not None and base.tensors.keys() == weights.keys()
    words = {name for name, tensor in base.tensors.items() if tensor.folder == 1}
    assert {name.partition(".")[0] for name in words} == {"qformer"}
    assert "qformer.embeddings.word_embeddings.weight" in words
    assert base.tensors["qformer.embeddings.layernorm.weight"].name == "qformer.layernorm.weight"


def test_half_precision_folders(tmp_path: Path) -> None:
    write_run_inputs(tmp_path)
    write_parts(tmp_path, dtype=torch.float16)
    settings, weights = dense(tmp_path)
    base = find_base(settings, {name: one.bfloat16() for name, one in weights.items()}, log=print)
    assert base is not None
    assert len(base.tensors) == len(weights) - 4
    assert {one.dtype for one in base.tensors.values()} == {torch.bfloat16}


def test_what_differs_in_one_bit_is_saved(tmp_path: Path) -> None:
    write_run_inputs(tmp_path)
    write_parts(tmp_path)
    settings, weights = dense(tmp_path)
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    with torch.no_grad():
        weights[name].view(-1)[-1] += 1e-7
    base = find_base(settings, weights, log=print)
    assert base is not None
    assert name not in base.tensors and name.replace(".1.", ".0.") in base.tensors


def test_folders_without_safetensors(tmp_path: Path) -> None:
    """Their weights are saved, and the log says why."""
    write_run_inputs(tmp_path)
    write_parts(tmp_path)
    settings, weights = dense(tmp_path)
    for name in ("clip", "llama"):
        for file in (tmp_path / name).glob("*.safetensors*"):
            file.unlink()
    lines: list[str] = []
    assert find_base(settings, weights, log=lines.append) is None
    assert [line for line in lines if "has no safetensors files" in line] == lines[:2]
    assert "checkpoints hold all weights" in lines[2]


HUB = """
import sys, torch
from pathlib import Path
from moe_lvlm.config.recipe import ModelSettings
from moe_lvlm.models.build import build_dense
from moe_lvlm.training.base import find_base
parts = {"vision_tower": {"from_pretrained": "some/clip"}, "language_model": {"from_pretrained": "some/llama"}}
settings = ModelSettings.model_validate(parts | {"tokenizer": sys.argv[1]})
base = find_base(settings, dict(build_dense(settings, seed=0)[0].named_parameters()), log=lambda line: None)
print(*(f"{folder.name} {folder.folder}" for folder in base.folders), len(base.tensors), sep="\\n")
"""


def test_names_on_the_hub(tmp_path: Path) -> None:
    """Their snapshots in the cache, whose files are links."""
    write_run_inputs(tmp_path)
    write_parts(tmp_path)
    snapshots = []
    for name in ("clip", "llama"):
        entry = tmp_path / "hub" / f"models--some--{name}"
        snapshots.append(entry / "snapshots" / ("0" * 40))
        snapshots[-1].mkdir(parents=True)
        (entry / "refs").mkdir()
        (entry / "refs" / "main").write_text("0" * 40)
        (tmp_path / name).rename(entry / "blobs")
        for file in (entry / "blobs").iterdir():
            (snapshots[-1] / file.name).symlink_to(file)
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", HUB, str(tmp_path / "tokenizer")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=ROOT)
    clip, llama, count = result.stdout.splitlines()
    assert (clip, llama) == (f"some/clip {snapshots[0]}", f"some/llama {snapshots[1]}")
    assert int(count) == 69  # 2 x 16 + 7 of the tower, 3 x 9 + 3 of the language model


@pytest.mark.parametrize(
    ("adapter", "wanted", "expected"),
    [(True, "null", False), (True, "true", True), (False, "null", True), (False, "false", False)],
)
def test_what_a_recipe_wants(parts: Path, adapter: bool, wanted: str, expected: bool) -> None:
    settings = [f"train.checkpoint.save_frozen={wanted}"]
    if not adapter:
        settings += ["model.adapter=null", "stages.0.adapt=false", "stages.0.train=[connector]"]
    assert saves_frozen(load_recipe(str(parts), settings)) is expected


def test_a_value_that_is_no_choice(parts: Path) -> None:
    with pytest.raises(ValueError, match="save_frozen"):
        load_recipe(str(parts), ["train.checkpoint.save_frozen=sometimes"])
