"""Checkpoints and model folders against the model of their config.json."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_lvlm.checkpoint.files import hash_file
from moe_lvlm.checkpoint.fragments import live_model
from moe_lvlm.checkpoint.layout import read_json
from moe_lvlm.checkpoint.model_folder import write_model_folder
from moe_lvlm.checkpoint.ranks import SingleRank
from moe_lvlm.checkpoint.reshard import reshard
from moe_lvlm.checkpoint.rng import capture_rng
from moe_lvlm.checkpoint.save import save_checkpoint
from moe_lvlm.checkpoint.source import LazySource, LazyTensor
from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.conversion.check import bytes_to_read, check, find_folders, model_problems
from tests.tiny_models import collate, tiny_llava, tiny_moe_llava, tiny_samples

STATE: dict[str, Any] = {
    "stage": 1, "step": 1, "global_step": 4, "samples": 8, "bad": 0, "tokens": 100, "is_stage_done": False,
    "world_size": 1, "expert_parallel_size": 1, "zero_stage": 0,
}  # fmt: skip
W1 = "model.language_model.layers.0.mlp.experts.w1"
GATE = "model.language_model.layers.0.mlp.router.gate.weight"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder: a checkpoint of a sparse model whose MoE layers were trained for a step, and one without AdamW's
    state."""
    folder = tmp_path_factory.mktemp("run")
    model = tiny_moe_llava(MoEConfig(num_experts=4, top_k=2)).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".experts." in name or ".router." in name)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    model(**collate(tiny_samples())).loss.backward()
    optimizer.step()
    path = save_checkpoint(
        folder / "checkpoints",
        "sparse-000001",
        live_model(model, optimizer),
        config=json.loads(model.config.to_json_string()),
        state=STATE,
        rng=capture_rng(),
        ranks=SingleRank(),
        log=print,
    ).path
    reshard(path, folder / "checkpoints", "small", keeps_optimizer=False, num_files=2)
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_moe_llava(MoEConfig(num_experts=4, top_k=2))
    tensors = {name: tensor.detach() for name, tensor in model.named_parameters()}
    return write_folder(tmp_path_factory.mktemp("folder") / "m", tensors, model.config.to_json_string())


def write_folder(path: Path, tensors: dict[str, Tensor], config: str, max_shard_bytes: int = 100_000) -> Path:
    return write_model_folder(
        path,
        LazySource({name: LazyTensor.of(tensor) for name, tensor in tensors.items()}),
        documents={"config.json": config.encode(), "README.md": b"# Tiny\n"},
        max_shard_bytes=max_shard_bytes,
    ).path


def rewrite(path: Path, file: str, change: Callable[[Any], None], records: str) -> None:
    """Change a JSON or safetensors file and record its new checksum."""
    if file.endswith(".json"):
        data = read_json(path / file)
        change(data)
        (path / file).write_text(json.dumps(data))
    else:
        tensors = load_file(path / file)
        change(tensors)
        save_file(tensors, path / file, metadata={"format": "pt"})
    manifest = read_json(path / records)
    found = hash_file(path / file)
    manifest["files"][file] = {"size": found.size, "xxh3_128": found.xxh3_128}
    (path / records).write_text(json.dumps(manifest))


def copy(path: Path, target: Path) -> Path:
    return Path(shutil.copytree(path, target))


def problems(path: Path, **options: Any) -> list[str]:
    return list(check(path, **options).problems)


def test_a_whole_run(run: Path) -> None:
    folders = find_folders(run)
    assert [folder.name for folder in folders] == ["sparse-000001", "small", run.name]
    assert find_folders(run / "checkpoints")[:2] == folders[:2]
    for folder in folders:
        for is_quick in (False, True):
            verdict = check(folder, is_quick=is_quick)
            assert verdict.problems == ()
            assert verdict.is_quick is is_quick
    assert check(run).form == "run"
    verdict = check(folders[0])
    assert verdict.form == "checkpoint"
    assert verdict.bytes == sum(file.stat().st_size for file in folders[0].iterdir())
    assert verdict.files == len(list(folders[0].iterdir()))


def test_progress_comes_near_its_total(run: Path) -> None:
    path = run / "checkpoints" / "sparse-000001"
    advanced: list[int] = []
    check(path, advance=advanced.append)
    assert 0.8 * bytes_to_read(path, is_quick=False) < sum(advanced) <= bytes_to_read(path, is_quick=False)
    assert bytes_to_read(path, is_quick=True) == 0


def test_a_model_folder(model_folder: Path) -> None:
    assert find_folders(model_folder) == [model_folder]
    verdict = check(model_folder)
    assert (verdict.form, verdict.problems) == ("model folder", ())


def test_plain_llava_and_folders_without_checksums(tmp_path: Path) -> None:
    model = tiny_llava()
    model.save_pretrained(tmp_path / "plain")
    (problem,) = problems(tmp_path / "plain")
    assert "checksums.json: missing, so that no file's content can be compared" in problem
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    lost = tensors.pop("language_model.model.norm.weight")
    tensors["stranger"] = lost
    save_file(tensors, tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    found = " ".join(problems(tmp_path / "plain"))
    assert "language_model.norm.weight: missing" in found
    assert "stranger: the model of config.json has no place for it" in found


def test_a_stock_export_is_checked_by_transformers(tmp_path: Path) -> None:
    """LLaVA around Mixtral, as an export writes it: experts one by one on the disk, stacked in memory."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, MixtralConfig

    dense = tiny_llava().config
    text = MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, num_local_experts=4, max_position_embeddings=128,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=dense.vision_config, text_config=text, image_token_index=60, image_seq_length=4,
        vision_feature_layer=-1,
    )  # fmt: skip
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "m")
    assert len(problems(tmp_path / "m")) == 1  # no checksums
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    gates = [name for name in tensors if "gate.weight" in name]
    del tensors[gates[0]]
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    assert any("gate.weight: missing" in problem for problem in problems(tmp_path / "m"))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda tensors: tensors.pop(GATE), f"{GATE}: missing"),
        (lambda tensors: tensors.update(stranger=torch.ones(2)), "stranger: the model of config.json has no place"),
        (lambda tensors: tensors.update({W1: tensors[W1][:3].clone()}), f"{W1}: 3 experts, config.json says num_exp"),
        (
            lambda tensors: tensors.update({GATE: tensors[GATE][:, :31].clone()}),
            f"{GATE}: shape [4, 31], the model of config.json needs [4, 32]",
        ),
        (lambda tensors: tensors[W1].view(-1)[5].fill_(float("inf")), f"{W1} holds values that are not finite"),
    ],
)
def test_tensors_that_are_not_the_model_s(
    model_folder: Path, tmp_path: Path, change: Callable[[Any], None], expected: str
) -> None:
    tensors = load_all(model_folder)
    change(tensors)
    path = write_folder(tmp_path / "m", tensors, (model_folder / "config.json").read_text())
    (problem,) = problems(path)
    assert expected in problem
    assert bool(problems(path, is_quick=True)) is ("not finite" not in expected)


def load_all(path: Path) -> dict[str, Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_a_tensor_outside_of_the_index(model_folder: Path, tmp_path: Path) -> None:
    path = copy(model_folder, tmp_path / "m")
    file = sorted(path.glob("*.safetensors"))[0].name
    rewrite(path, file, lambda tensors: tensors.update(hidden=torch.ones(2)), "checksums.json")
    (problem,) = problems(path)
    assert f"{file}: hidden: not named by model.safetensors.index.json" in problem


def test_another_configuration(model_folder: Path, tmp_path: Path) -> None:
    path = copy(model_folder, tmp_path / "m")
    rewrite(path, "config.json", lambda config: config["moe"].update(num_experts=8), "checksums.json")
    found = problems(path)
    assert len(found) == 2 * (3 + 1)  # w1, w2, w3 and the gate of two sparse layers
    assert sum("4 experts, config.json says num_experts 8" in one for one in found) == 6
    rewrite(path, "config.json", lambda config: config.update(model_type="bert"), "checksums.json")
    assert "model_type 'bert' is not compared with the tensors" in problems(path)[0]
    rewrite(path, "config.json", lambda config: config.update(model_type="nonsense"), "checksums.json")
    assert "config.json: no model can be built: ValueError" in problems(path)[0]


def test_unlisted_files_are_named(run: Path, model_folder: Path, tmp_path: Path) -> None:
    for source, name in ((run / "checkpoints" / "sparse-000001", "manifest.json"), (model_folder, "checksums.json")):
        path = copy(source, tmp_path / name)
        (path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
        (problem,) = problems(path)
        assert problem == f"{path / 'pytorch_model.bin'}: not named by {name}"


def test_a_checkpoint_that_contradicts_itself(run: Path, tmp_path: Path) -> None:
    path = copy(run / "checkpoints" / "sparse-000001", tmp_path / "c")

    def break_index(index: Any) -> None:
        del index["tensors"][W1]["exp_avg"]

    rewrite(path, "index.json", break_index, "manifest.json")
    rewrite(path, "state.json", lambda state: state.update(samples=-3), "manifest.json")
    found = problems(path)
    assert len(found) == 2
    assert f"index.json: {W1}: has exp_avg_sq alone" in found[0]
    assert "state.json: samples is -3" in found[1]


def test_not_finite_values_in_a_checkpoint(run: Path, tmp_path: Path) -> None:
    path = copy(run / "checkpoints" / "sparse-000001", tmp_path / "c")

    def poison(tensors: dict[str, Tensor]) -> None:
        tensors[f"{W1}:exp_avg:0"][7] = float("nan")

    rewrite(path, "rank-00000.safetensors", poison, "manifest.json")
    (problem,) = problems(path)
    assert problem.endswith(f"rank-00000.safetensors: {W1} (exp_avg) holds values that are not finite")
    assert problems(path, is_quick=True) == []


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("sparse-000009\n", "names 'sparse-000009', which is not there; allowed: sparse-000001, small"),
        ("../x", "missing, or not the name of a checkpoint"),
        (None, "missing, or not the name of a checkpoint"),
    ],
)
def test_latest(run: Path, tmp_path: Path, content: str | None, expected: str) -> None:
    path = copy(run, tmp_path / "r")
    (path / "checkpoints" / "latest").unlink()
    if content is not None:
        (path / "checkpoints" / "latest").write_text(content)
    (problem,) = problems(path)
    assert expected in problem


def test_incomplete_and_absent_checkpoints(run: Path, tmp_path: Path) -> None:
    path = copy(run, tmp_path / "r")
    (path / "checkpoints" / "small" / "manifest.json").unlink()
    (problem,) = problems(path)
    assert "small: not a complete checkpoint, manifest.json is missing" in problem
    assert "manifest.json: no such file" in problems(path / "checkpoints" / "small")[0]
    shutil.rmtree(path / "checkpoints" / "sparse-000001")
    assert any("no complete checkpoint" in one for one in problems(path))
    with pytest.raises(ValueError, match="no such folder"):
        find_folders(tmp_path / "missing")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("")
    with pytest.raises(ValueError, match=r"has a\.txt; allowed"):
        find_folders(tmp_path / "notes")


def test_model_problems_know_tied_weights() -> None:
    model = tiny_moe_llava(MoEConfig(num_experts=4, top_k=2))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    assert model_problems(model.config, shapes) == []
    config = model.config.with_moe(model.config.moe_config)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    assert model_problems(config, shapes) == []  # it may be there
    del shapes["lm_head.weight"]
    assert model_problems(config, shapes) == []
    assert model_problems(model.config, shapes) == ["lm_head.weight: missing"]


def damages(path: Path, count: int, seed: int) -> list[str]:
    """Damage a model folder so many times and mend it again; what was not seen."""
    rng = random.Random(seed)
    files, unseen = sorted(path.iterdir()), []
    for number in range(count):
        file = files[number % len(files)]
        before = file.read_bytes()
        place = rng.randrange(len(before))
        damaged = bytearray(before)
        if rng.random() < 0.3:
            del damaged[place:]
        else:
            damaged[place] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        if not problems(path):
            unseen.append(f"{file.name}: byte {place}")
        file.write_bytes(before)
    return unseen


def test_random_damage_to_a_model_folder_is_seen(model_folder: Path, tmp_path: Path) -> None:
    assert damages(copy(model_folder, tmp_path / "m"), 150, 0) == []


@pytest.mark.slow
def test_a_thousand_random_damages_to_a_model_folder_are_seen(model_folder: Path, tmp_path: Path) -> None:
    assert damages(copy(model_folder, tmp_path / "m"), 1000, 1) == []
