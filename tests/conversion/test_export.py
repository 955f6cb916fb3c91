"""Exported folders in a process that has transformers alone: same logits, same answers, same prompts."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig

import moe_lvlm
from moe_lvlm.checkpoint.files import hash_file
from moe_lvlm.config.load import load_recipe
from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.conversion.export import ExportResult, export_model, plan_export
from moe_lvlm.conversion.export_check import ExportCheckError, check_export, synthetic_batches
from moe_lvlm.data.mixture import build_samples
from moe_lvlm.data.records import Turn
from moe_lvlm.models.llava import MoELlavaForConditionalGeneration
from moe_lvlm.models.processor import num_image_tokens
from moe_lvlm.routing.eea import without_eea
from tests.conversion.test_dense import write_sparse
from tests.trained_run import write_trained_run

# Runs elsewhere, where `import moe_lvlm` fails: the card's own snippet, then logits and answers of given batches.
ALONE = """
import re, sys
sys.modules["moe_lvlm"] = None
import torch
results, *folders = sys.argv[1:]
batches = torch.load(f"{results}/batches.pt")
for number, folder in enumerate(folders):
    snippet = re.search(r"```python\\n(.*?)```", open(f"{folder}/README.md").read(), re.DOTALL)[1]
    exec(snippet.replace('folder = "."', f"folder = {folder!r}"))
    torch.save({
        "logits": [model(**batch).logits.detach()[batch["attention_mask"].bool()] for batch in batches],
        "answers": model.generate(**batches[-1], max_new_tokens=5, min_new_tokens=5),
        "prompt_ids": inputs["input_ids"],
        "pixel_values": inputs["pixel_values"],
        "module": type(model).__module__,
        "modules": [name for name in sys.modules if name in ("moe_lvlm", "deepspeed") and sys.modules[name]],
    }, f"{results}/{number}.pt")
"""


@dataclass(frozen=True)
class Exported:
    run: Path
    folder: Path
    result: ExportResult


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # not the tokenizer's own template: the export must bring the one that was trained with
    folder = tmp_path_factory.mktemp("trained")
    data = {"image_root": str(folder), "mixture": [{"path": "train.json"}], "chat_template": "vicuna_v1"}
    return write_trained_run(folder, data=data)


@pytest.fixture(scope="module")
def native(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("native") / "model"
    return Exported(run, folder, export_model(plan_export(run), folder, max_shard_bytes=60_000))


@pytest.fixture(scope="module")
def stock(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("stock") / "model"
    return Exported(run, folder, export_model(plan_export(run, format="stock", is_eea_off=True), folder))


def trained(run: Path, *, is_eea_off: bool) -> MoELlavaForConditionalGeneration:
    """The model of the run, by another way than the export's."""
    model, _ = moe_lvlm.load(run)
    if not is_eea_off:
        return model
    other = MoELlavaForConditionalGeneration(model.config.with_moe(without_eea(model.config.moe_config)))
    other.load_state_dict(model.state_dict())
    other.generation_config = model.generation_config
    return other.eval()


@pytest.fixture(scope="module")
def alone(native: Exported, stock: Exported, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What ALONE found in each folder."""
    results = tmp_path_factory.mktemp("alone")
    torch.save(synthetic_batches(native.result.plan.config), results / "batches.pt")
    shutil.copy(native.run.parent / "images" / "1.png", results / "image.png")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(results / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", "-c", ALONE, str(results), str(native.folder), str(stock.folder)]
    done = subprocess.run(command, cwd=results, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {kind: torch.load(results / f"{number}.pt") for number, kind in enumerate(("native", "stock"))}


@pytest.mark.parametrize("kind", ["native", "stock"])
def test_alone_it_computes_what_the_trained_model_does(kind: str, alone: dict[str, dict[str, Any]], run: Path) -> None:
    found = alone[kind]
    model = trained(run, is_eea_off=kind == "stock")
    assert found["modules"] == []
    assert found["module"].startswith("transformers_modules." if kind == "native" else "transformers.models.llava")
    batches = synthetic_batches(model.config)
    for batch, theirs in zip(batches, found["logits"], strict=True):
        with torch.no_grad():
            ours = model(**batch).logits[batch["attention_mask"].bool()]
        assert float((ours - theirs).abs().max()) <= (0.0 if kind == "native" else 1e-5)
        assert float(ours.abs().max()) > 1
    greedy = GenerationConfig(
        do_sample=False, max_new_tokens=5, min_new_tokens=5, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        suppress_tokens=[model.config.image_token_id],
    )  # fmt: skip
    assert torch.equal(model.generate(**batches[-1], generation_config=greedy), found["answers"])
    check_prompt(run, found["prompt_ids"], found["pixel_values"])


def check_prompt(run: Path, prompt_ids: Tensor, pixel_values: Tensor) -> None:
    """The card's snippet makes the prompt that a training sample begins with."""
    recipe = load_recipe(run / "recipe.yaml")
    _, processor = moe_lvlm.load(run)
    builder = build_samples(recipe.data, "chat", processor, num_image_tokens)
    image = Image.open(run.parent / "images" / "1.png").convert("RGB")
    expected = builder.prompt([Turn("human", "<image>\nWhat is in this image?")], [image])
    assert prompt_ids[0].tolist() == expected.input_ids.tolist()
    assert expected.pixel_values is not None and torch.equal(pixel_values, expected.pixel_values)


def test_a_native_folder(native: Exported) -> None:
    """Shards of the chosen size, checksums of everything, and our own loader reads it."""
    plan, found = native.result.plan, native.result.check
    assert (plan.form, plan.architecture) == ("native", "MoELlavaForConditionalGeneration")
    assert "--without-eea" in (plan.reason or "")
    assert found is not None and found.max_difference == 0 and found.tokens_generated > 0
    shards = sorted(path.name for path in native.folder.glob("*.safetensors"))
    assert len(shards) > 3 and shards[0].startswith("model-00001-of-")
    assert all((native.folder / name).stat().st_size < 64_000 for name in shards)
    files = json.loads((native.folder / "checksums.json").read_text())["files"]
    assert files.keys() == {path.name for path in native.folder.iterdir()} - {"checksums.json"}
    assert files["README.md"]["xxh3_128"] == hash_file(native.folder / "README.md").xxh3_128
    config = json.loads((native.folder / "config.json").read_text())
    assert config["auto_map"]["AutoConfig"] == "models_config.MoELlavaConfig"
    assert (config["dtype"], config["model_type"]) == ("float32", "moe_llava")
    assert str(native.run.parent) not in "".join(
        (native.folder / name).read_text() for name in ("config.json", "README.md", "processor_config.json")
    )

    ours, _ = moe_lvlm.load(native.run)
    again, processor = moe_lvlm.load(native.folder)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in ours.state_dict().items())
    assert processor.tokenizer.chat_template.startswith("{{ bos_token or '' }}A chat")


def test_a_stock_folder(stock: Exported) -> None:
    assert (stock.result.plan.form, stock.result.plan.language_model) == ("stock", "Qwen2MoeModel")
    assert stock.result.check is not None and stock.result.not_checked is None
    assert not list(stock.folder.glob("*.py"))
    config = json.loads((stock.folder / "config.json").read_text())
    assert "auto_map" not in config and "moe" not in config
    generation = json.loads((stock.folder / "generation_config.json").read_text())
    image_token_id = config["image_token_index"]
    assert (generation["eos_token_id"], generation["suppress_tokens"]) == ([2], [image_token_id])
    with pytest.raises(ValueError, match=r"experts of transformers' own.*load it with transformers"):
        moe_lvlm.load(stock.folder)
    with pytest.raises(ValueError, match="transformers' own LLaVA already"):
        plan_export(stock.folder)


def test_a_native_folder_is_exported_again(native: Exported, tmp_path: Path) -> None:
    """A model folder of ours is as good a source as a run."""
    plan = plan_export(native.folder, format="stock", is_eea_off=True)
    assert plan.provenance.checkpoint is None
    found = export_model(plan, tmp_path / "out").check
    assert found is not None and found.max_difference < 1e-5


def test_types(run: Path, tmp_path: Path) -> None:
    plan = plan_export(run, dtype=torch.bfloat16, is_eea_off=True)
    result = export_model(plan, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert result.check is not None and result.check.max_difference < 1e-5
    assert plan.num_bytes == sum(tensor.numel() * 2 for tensor in tensors.values())


def test_parameters_by_hand(run: Path) -> None:
    """2 of 3 layers have 4 experts of 3 x 32 x 48; a token takes 2 of them, a tail token 4."""
    counts = plan_export(run).parameters
    model, _ = moe_lvlm.load(run)
    assert counts.total == sum(parameter.numel() for parameter in model.parameters())
    expert = 3 * 32 * 48
    assert (counts.activated, counts.activated_tail) == (counts.total - 2 * 2 * expert, counts.total)
    assert plan_export(run, is_eea_off=True).parameters.activated_tail is None


def test_a_dense_checkpoint(tmp_path: Path) -> None:
    run = write_trained_run(tmp_path, is_sparse=False)
    plan = plan_export(run)
    assert (plan.form, plan.language_model, plan.has_eea) == ("stock", "LlamaModel", False)
    result = export_model(plan, tmp_path / "out")
    assert result.check is not None and result.check.max_difference < 1e-5
    again, _ = moe_lvlm.load(tmp_path / "out")  # a dense LLaVA is a model that can be trained on
    ours, _ = moe_lvlm.load(run)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize(
    ("router", "words"),
    [
        ({"kind": "instruct"}, ["instruction_mask"]),
        ({"kind": "cluster", "num_clusters": 2, "embedding_width": 8}, ["cluster_ids"]),
        (
            {"kind": "ltdr", "eea_select": "instruction_aware"},
            ["instruction_mask", 'trust_remote_code=True, attn_implementation="eager"'],
        ),
        ({"kind": "dynamic"}, ["any number of them"]),
    ],
)
def test_routers_that_want_to_know_more(router: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    """The check runs the model with what its routers ask for, and the card tells a user to give it."""
    write_sparse(tmp_path / "sparse", MoEConfig.model_validate({"router": router}))
    result = export_model(plan_export(tmp_path / "sparse"), tmp_path / "out", is_checked=True)
    assert result.plan.form == "native"
    assert result.check is not None and result.check.max_difference == 0
    card = (tmp_path / "out" / "README.md").read_text()
    for text in words:
        assert text in card
    model, _ = moe_lvlm.load(tmp_path / "out")
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert snippet is not None
    given = {name for name in ("instruction_mask", "cluster_ids") if f'inputs["{name}"]' in snippet[1]}
    assert model.config.moe_config is not None and given == model.config.moe_config.prompt_facts


@pytest.mark.parametrize("kind", ["native", "stock"])
def test_a_changed_weight_is_found(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    exported: Exported = request.getfixturevalue(kind)
    copied = shutil.copytree(exported.folder, tmp_path / "model")
    for file in sorted(copied.glob("*.safetensors")):
        tensors = load_file(file)
        for name in [name for name in tensors if name.endswith((".gate.weight", "layers.1.mlp.down_proj.weight"))]:
            tensors[name] = tensors[name] * 1.01
        save_file(tensors, file, metadata={"format": "pt"})
    plan = exported.result.plan
    with pytest.raises(ExportCheckError, match=r"logits differ .* by \d.*Do not use this folder"):
        check_export(plan.source, plan.config, copied, dtype=plan.dtype, remote_code=plan.code)


def test_a_model_too_large_is_not_checked(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_lvlm.conversion.export.memory_available", lambda: 1000)
    plan = plan_export(run)
    result = export_model(plan, tmp_path / "out")
    assert result.check is None and "of memory, more than 50%" in (result.not_checked or "")
    assert export_model(plan, tmp_path / "asked", is_checked=True).check is not None
    assert export_model(plan, tmp_path / "not", is_checked=False).not_checked == "as asked for"


def test_users_mistakes(run: Path, native: Exported, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="router ltdr with EEA"):
        plan_export(run, format="stock")
    with pytest.raises(ValueError, match="format: 'gguf'; allowed: auto, stock, native"):
        plan_export(run, format="gguf")
    with pytest.raises(ValueError, match="no such folder"):
        plan_export(tmp_path / "nowhere")
    plan = native.result.plan
    with pytest.raises(ValueError, match="license: 'mine!'"):
        export_model(plan, tmp_path / "out", license="mine!")
    with pytest.raises(ValueError, match="exists already"):
        export_model(plan, native.folder)
    with pytest.raises(ValueError, match="holds what is exported"):
        export_model(plan, run, is_overwriting=True)
    assert not (tmp_path / "out").exists()
