"""MoCLE exported as plain LoRAs: PEFT on the base, for every row of the gates, computes what the trained model does."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

import moe_lvlm
from moe_lvlm.checkpoint.files import hash_file
from moe_lvlm.config.adapter import read_adapter
from moe_lvlm.config.connector import ExpertSettings
from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.conversion.adapter_base import choose_base
from moe_lvlm.conversion.adapter_export import AdapterExport, export_adapters
from moe_lvlm.conversion.adapter_plan import plan_adapters
from moe_lvlm.conversion.check import check, find_folders
from moe_lvlm.conversion.export import export_model, plan_export
from moe_lvlm.conversion.export_check import ExportCheckError
from moe_lvlm.data.clusters import ClusterTable
from moe_lvlm.models.adapt import adapt
from moe_lvlm.models.build import build_empty, config_of, load_plain_llava, open_weights
from moe_lvlm.models.config import MoELlavaConfig
from moe_lvlm.models.weights import load_weights
from tests.adapted_run import (
    NUM_CLUSTERS,
    mocle_fields,
    write_adapted_blip,
    write_adapted_run,
    write_table,
)
from tests.tiny_models import tiny_llava, tiny_moe_blip, tiny_moe_llava

FFN = {"phi": ("fc1", "fc2"), "phi3": ("gate_up_proj", "down_proj"), "opt": ("fc1", "fc2")}
ATTENTION = {"phi3": ("qkv_proj",)}
TABLE = {"clusters": "clusters.safetensors"}
KINDS: dict[str, dict[str, Any]] = {
    "no universal": {"has_universal": False},
    "top-2": {"has_universal": False, "top_k": 2},
    "rslora": {"rslora": True},
    "rslora top-2": {"rslora": True, "has_universal": False, "top_k": 2},
    "released": {"compat": "released"},
}


def targets(family: str) -> list[str]:
    """Attention's and the FFN's."""
    return [*ATTENTION.get(family, ("q_proj", "v_proj")), *FFN.get(family, ("up_proj", "down_proj"))]


def batch_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Three samples of one image and some words, padded on the right."""
    config = model.config
    generator = torch.Generator().manual_seed(7)
    is_blip = hasattr(config, "qformer_config") and config.model_type == "moe_instructblip"
    image_length = config.num_query_tokens if is_blip else config.image_seq_length
    lengths = (4, 6, 3)
    input_ids = torch.zeros(3, image_length + 6, dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    for row, length in enumerate(lengths):
        input_ids[row, :image_length] = config.image_token_id
        input_ids[row, image_length : image_length + length] = torch.randint(7, 20, (length,), generator=generator)
        mask[row, : image_length + length] = 1
    size = config.vision_config.image_size
    batch = {
        "input_ids": input_ids,
        "attention_mask": mask,
        "pixel_values": torch.randn(3, 3, size, size, generator=generator),
    }
    if is_blip:
        words = torch.randint(2, 12, (3, 4), generator=generator)
        batch |= {"qformer_input_ids": words, "qformer_attention_mask": torch.ones_like(words)}
    return batch


@torch.no_grad()
def logits(model: Any, batch: Mapping[str, Tensor], **facts: Tensor) -> Tensor:
    """Where there is no padding."""
    found: Tensor = model(**batch, **facts).logits
    return found[batch["attention_mask"].bool()]


def ours(run: Path, fact: str | None = "cluster_ids", num_rows: int = NUM_CLUSTERS) -> tuple[Any, list[Tensor]]:
    """A batch, and the trained model's logits for it by row of its gates; by one without gates."""
    model, _ = moe_lvlm.load(run)
    batch = batch_of(model)
    if fact is None:
        return batch, [logits(model, batch)]
    return batch, [logits(model, batch, **{fact: torch.full((3,), row)}) for row in range(num_rows)]


def export(run: Path, target: Path, **options: Any) -> AdapterExport:
    """With its own check, which must agree."""
    done = export_adapters(plan_adapters(run, **options), target, is_checked=True)
    assert done.check is not None and done.check.max_difference < 1e-5
    return done


def theirs(base: PreTrainedModel, folder: Path) -> list[Any]:
    """PEFT's model around a base, once with each row's adapter set: functions of a batch."""
    index = json.loads((folder / "index.json").read_text())
    if (connector := index["base"]["connector"]) is not None and hasattr(base, "get_image_features"):
        left = base.load_state_dict(load_file(folder / connector), strict=False)
        assert not left.unexpected_keys
    names = list(index["adapters"])
    model = peft.PeftModel.from_pretrained(base, folder / "adapters" / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(folder / "adapters" / name, adapter_name=name)
    model.eval()

    def with_adapter(name: str) -> Any:
        def forward(**batch: Tensor) -> Any:
            model.set_adapter(name)
            return model(**batch)

        return forward

    rows = index.get("clusters") or index.get("datasets")
    return [with_adapter(name) for name in (rows.values() if rows else names)]


def assert_equal(found: list[Any], batch: Any, expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for forward, wanted in zip(found, expected, strict=True):
        assert_close(logits(forward, batch), wanted, atol=1e-5, rtol=1e-5)
    if len(expected) > 1:
        assert min(float((expected[0] - other).abs().max()) for other in expected[1:]) > 0.01


def stock_base(folder: Path) -> PreTrainedModel:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi3", "stablelm"])
def test_every_cluster_around_every_family(tmp_path: Path, family: str) -> None:
    """Attention and FFN adapted; the base is written, with the trained connector in it."""
    write_table(tmp_path / "clusters.safetensors")
    run = write_adapted_run(tmp_path, mocle_fields(target_modules=targets(family)), family=family, data=TABLE)
    export(run, tmp_path / "out", has_base=True)
    batch, expected = ours(run)
    assert_equal(theirs(stock_base(tmp_path / "out" / "base"), tmp_path / "out"), batch, expected)


@pytest.mark.parametrize("text", ["llama", "opt"])
@pytest.mark.parametrize("ffn", [False, True], ids=["attention", "ffn"])
def test_every_cluster_of_an_instructblip(tmp_path: Path, text: str, ffn: bool) -> None:
    """On the InstructBLIP that the run began with, with the trained Q-Former in a file of its own."""
    write_table(tmp_path / "clusters.safetensors")
    modules = targets(text)[2:] if ffn else targets(text)[:2]
    run = write_adapted_blip(tmp_path, mocle_fields(target_modules=modules), text, data=TABLE)
    done = export(run, tmp_path / "out")
    assert done.plan.base_name == f"instructblip-{text}"
    batch, expected = ours(run)
    base = stock_base(tmp_path / f"instructblip-{text}")
    found = theirs(base, tmp_path / "out")
    assert_equal(found, batch, expected)
    saved = load_file(tmp_path / "out" / "connector.safetensors")
    assert {name.partition(".")[0] for name in saved} == {"query_tokens", "qformer", "language_projection"}


@pytest.mark.parametrize("fields", list(KINDS.values()), ids=list(KINDS))
def test_every_kind_of_gate(tmp_path: Path, fields: dict[str, Any]) -> None:
    write_table(tmp_path / "clusters.safetensors")
    run = write_adapted_blip(tmp_path, mocle_fields(**fields), data=TABLE)
    done = export(run, tmp_path / "out", has_base=True)
    batch, expected = ours(run)
    assert_equal(theirs(stock_base(tmp_path / "out" / "base"), tmp_path / "out"), batch, expected)
    config = json.loads((tmp_path / "out" / "adapters" / "cluster-000" / "adapter_config.json").read_text())
    used = 1 if fields.get("has_universal") is False and "top_k" not in fields else 2
    assert config["r"] == 2 * used
    assert config["lora_alpha"] == pytest.approx(3.0 * (used**0.5 if fields.get("rslora") else used))
    assert not done.plan.notes


def stock_llava(folder: Path, family: str = "llama") -> Path:
    """A LLaVA of plain transformers with its processor, as a run of ours can begin with it."""
    other = write_adapted_run(folder / "other", {"kind": "lora", "rank": 1}, family=family)
    export(other, folder / "stock", merge="lora")
    return folder / "stock"


@pytest.mark.parametrize("kind", ["mocle", "lora"])
def test_the_untouched_base_where_only_adapters_were_trained(tmp_path: Path, kind: str) -> None:
    stock = stock_llava(tmp_path)
    before = hash_file(stock / "model.safetensors")
    write_table(tmp_path / "clusters.safetensors")
    adapter = mocle_fields() if kind == "mocle" else {"kind": "lora", "rank": 3, "alpha": 7.0}
    model = {"from_pretrained": str(stock)}
    run = write_adapted_run(
        tmp_path, adapter, model=model, trains=("adapter",), data=TABLE if kind == "mocle" else None
    )
    done = export(run, tmp_path / "out")
    assert done.plan.connector is None and not (tmp_path / "out" / "connector.safetensors").exists()
    batch, expected = ours(run, "cluster_ids" if kind == "mocle" else None)
    assert_equal(theirs(stock_base(stock), tmp_path / "out"), batch, expected)
    assert hash_file(stock / "model.safetensors") == before
    names = json.loads((tmp_path / "out" / "index.json").read_text())["adapters"]
    assert list(names) == (["lora"] if kind == "lora" else [f"cluster-00{row}" for row in range(NUM_CLUSTERS)])


def test_adapters_of_an_instructblip_alone(tmp_path: Path) -> None:
    write_table(tmp_path / "clusters.safetensors")
    run = write_adapted_blip(tmp_path, mocle_fields(), trains=("adapter",), data=TABLE)
    export(run, tmp_path / "out")
    assert not (tmp_path / "out" / "connector.safetensors").exists()
    batch, expected = ours(run)
    assert_equal(theirs(stock_base(tmp_path / "instructblip-llama"), tmp_path / "out"), batch, expected)


def test_gates_by_dataset(tmp_path: Path) -> None:
    names = ("a b", "c/d", "e")
    mixture = [{"path": "train.json", "name": name} for name in names]
    run = write_adapted_run(
        tmp_path, mocle_fields(gating="dataset"), data={"mixture": mixture}, trains=("connector", "adapter")
    )
    export(run, tmp_path / "out", has_base=True)
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["datasets"] == {name: f"dataset-00{row}" for row, name in enumerate(names)}
    batch, expected = ours(run, "dataset_ids", len(names))
    assert_equal(theirs(stock_base(tmp_path / "out" / "base"), tmp_path / "out"), batch, expected)
    export(run, tmp_path / "merged", merge="c/d")
    assert_close(logits(stock_base(tmp_path / "merged"), batch), expected[1], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="merge: 'x'; allowed: a b, c/d, e"):
        plan_adapters(run, merge="x")


def test_phi_has_its_language_model_as_base(tmp_path: Path) -> None:
    """Its head has a bias, which LLaVA's has not: PEFT around PhiForCausalLM, fed what tower and connector give."""
    write_table(tmp_path / "clusters.safetensors")
    run = write_adapted_run(tmp_path, mocle_fields(target_modules=targets("phi")), family="phi", data=TABLE)
    with pytest.raises(ValueError, match="its language-model head has a bias"):
        plan_adapters(run, form="vlm")
    done = export(run, tmp_path / "out", has_base=True)
    assert done.plan.base.architecture == "PhiForCausalLM" and "head has a bias" in done.plan.notes[0]
    batch, expected = ours(run)
    model, _ = moe_lvlm.load(run)
    features = torch.cat(list(model.get_image_features(batch["pixel_values"]).pooler_output))
    embeds = model.get_input_embeddings()(batch["input_ids"])
    is_image = (batch["input_ids"] == model.config.image_token_id)[..., None]
    given = {
        "inputs_embeds": embeds.masked_scatter(is_image, features).detach(),
        "attention_mask": batch["attention_mask"],
    }
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base", dtype=torch.float32).eval()
    assert_equal(theirs(base, tmp_path / "out"), given, expected)
    assert len(load_file(tmp_path / "out" / "connector.safetensors")) == 4
    config = json.loads((tmp_path / "out" / "adapters" / "cluster-000" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["fc1", "fc2", "q_proj", "v_proj"]


def test_a_language_model_alone_on_demand(tmp_path: Path) -> None:
    write_table(tmp_path / "clusters.safetensors")
    run = write_adapted_blip(tmp_path, mocle_fields(), "opt", data=TABLE)
    export(run, tmp_path / "out", has_base=True, form="language_model")
    model, _ = moe_lvlm.load(run)
    words = {"input_ids": torch.arange(7, 13)[None], "attention_mask": torch.ones(1, 6, dtype=torch.int64)}
    expected = [logits(model, words, cluster_ids=torch.tensor([row])) for row in range(NUM_CLUSTERS)]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base", dtype=torch.float32).eval()
    assert type(base).__name__ == "OPTForCausalLM"
    assert_equal(theirs(base, tmp_path / "out"), words, expected)


@pytest.mark.parametrize("host", ["llava", "tied llava", "instructblip"])
def test_one_cluster_merged(tmp_path: Path, host: str) -> None:
    """A folder that plain transformers loads, processor too."""
    write_table(tmp_path / "clusters.safetensors")
    if host == "instructblip":
        run = write_adapted_blip(tmp_path, mocle_fields(rslora=True), "opt", data=TABLE)
    else:
        run = write_adapted_run(tmp_path, mocle_fields(compat="released"), tie=host == "tied llava", data=TABLE)
    export(run, tmp_path / "out", merge="2")
    batch, expected = ours(run)
    assert_close(logits(stock_base(tmp_path / "out"), batch), expected[2], atol=1e-5, rtol=1e-5)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert type(processor).__name__ == ("InstructBlipProcessor" if host == "instructblip" else "LlavaProcessor")
    assert "that of cluster 2" in (tmp_path / "out" / "README.md").read_text()
    assert not (tmp_path / "out" / "adapters").exists()


def test_clusters_with_equal_gates_share_an_adapter(tmp_path: Path) -> None:
    """Rows 0 and 2 of every table are made equal; a fourth row that the data do not have is left out."""
    write_table(tmp_path / "clusters.safetensors", num_clusters=3)
    run = write_adapted_blip(tmp_path, mocle_fields(), data=TABLE)
    model, processor = moe_lvlm.load(run)
    tables = [parameter for name, parameter in model.named_parameters() if name.endswith("adapter_table.weight")]
    assert len(tables) == 1
    tables[0].data[2] = tables[0].data[0]
    model.save_pretrained(tmp_path / "equal")
    processor.save_pretrained(tmp_path / "equal")
    base = str(tmp_path / "instructblip-llama")
    export(tmp_path / "equal", tmp_path / "out", clusters=tmp_path / "clusters.safetensors", base=base)
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["clusters"] == {"0": "cluster-000", "1": "cluster-001", "2": "cluster-000"}
    assert index["adapters"]["cluster-000"]["clusters"] == [0, 2]
    assert sorted(path.name for path in (tmp_path / "out" / "adapters").iterdir()) == ["cluster-000", "cluster-001"]


def test_a_model_folder_is_compared_with_its_base(tmp_path: Path) -> None:
    """Around a LLaVA, whose weights have other names on the disk: only the connector differs."""
    stock = stock_llava(tmp_path)
    run = write_adapted_run(tmp_path, {"kind": "lora", "rank": 2}, model={"from_pretrained": str(stock)})
    model, processor = moe_lvlm.load(run)
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    export(tmp_path / "saved", tmp_path / "out", base=str(stock))
    saved = load_file(tmp_path / "out" / "connector.safetensors")
    assert {name.rpartition("linear_")[0] for name in saved} == {"model.multi_modal_projector."}
    batch, expected = ours(run, None)
    assert_equal(theirs(stock_base(stock), tmp_path / "out"), batch, expected)
    with pytest.raises(ValueError, match=r"base: .*has shape None, the model's has"):
        write_adapted_blip(tmp_path / "blip", {"kind": "lora"})
        plan_adapters(tmp_path / "saved", base=str(tmp_path / "blip" / "instructblip-llama"))


def test_what_lies_in_the_folder(tmp_path: Path) -> None:
    """Index, gates, table of clusters, checksums; the card's own lines give PEFT's model."""
    write_table(tmp_path / "clusters.safetensors")
    run = write_adapted_blip(tmp_path, mocle_fields(), data=TABLE)
    out = tmp_path / "out"
    export(run, out, has_base=True)
    for manifest in out.rglob("checksums.json"):
        for name, record in json.loads(manifest.read_text())["files"].items():
            found = hash_file(manifest.parent / name)
            assert (found.size, found.xxh3_128) == (record["size"], record["xxh3_128"])
    verdicts = {folder: check(folder) for folder in find_folders(out)}
    assert not [problem for verdict in verdicts.values() for problem in verdict.problems]
    assert verdicts[out].form == verdicts[out / "adapters" / "cluster-001"].form == "adapters"
    assert verdicts[out / "base"].form == "model folder"
    spoilt = out / "adapters" / "cluster-001" / "adapter_model.safetensors"
    content = spoilt.read_bytes()
    spoilt.write_bytes(content[:-4] + b"\0\0\xc0\x7f")
    assert any("adapter_model.safetensors" in problem for problem in check(spoilt.parent).problems)
    spoilt.write_bytes(content)
    folders = {path.parent.relative_to(out).as_posix() for path in out.rglob("checksums.json")}
    assert folders >= {".", "base", "base/qformer_tokenizer", "adapters/cluster-003"}
    assert ClusterTable.load(out / "clusters.safetensors").num_clusters == NUM_CLUSTERS
    index = json.loads((out / "index.json").read_text())
    assert index["assignment"]["encoder"] == "some/encoder" and index["base"]["folder"] == "base"
    model, _ = moe_lvlm.load(run)
    decoder = model.get_decoder()
    gate = decoder.layers[1].self_attn.v_proj.gate.weight
    probs = (decoder.adapter_table.weight.double() @ gate.double().T / 0.7).softmax(dim=-1).detach()
    (pair,) = index["adapters"]["cluster-001"]["gates"]["language_model.model.layers.1.self_attn.v_proj"].items()
    assert int(pair[0]) == int(probs[1].argmax()) and pair[1] == pytest.approx(float(probs[1].max()), rel=1e-5)

    (snippet, *_) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    assert str(tmp_path) not in (out / "README.md").read_text() + (out / "index.json").read_text()
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(out)
        exec(snippet, names)
    batch, expected = ours(run)
    assert names["model"].active_adapter == f"cluster-00{NUM_CLUSTERS - 1}"
    assert_close(logits(names["model"], batch), expected[-1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("host", ["llava", "instructblip"])
def test_an_exported_adapter_begins_every_expert_of_another_run(
    tmp_path: Path, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out and in again, by a relative path as a recipe may have it: what one cluster computed all compute now."""
    write_table(tmp_path / "clusters.safetensors")
    if host == "llava":
        stock = stock_llava(tmp_path)
        model = {"from_pretrained": str(stock)}
        run = write_adapted_run(tmp_path, mocle_fields(), model=model, trains=("adapter",), data=TABLE)
        begun = load_plain_llava(stock, dtype=torch.float32)
    else:
        run = write_adapted_blip(tmp_path, mocle_fields(), trains=("adapter",), data=TABLE)
        base = tmp_path / "instructblip-llama"
        begun = build_empty(config_of(base))
        load_weights(begun, open_weights(base))
    export(run, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    fields = mocle_fields(rank=4, alpha=5.0, start_from="out/adapters/cluster-002")
    adapt(begun, read_adapter(fields), seed=0)
    begun.eval()
    batch, expected = ours(run)
    for row in (0, 3):
        found = logits(begun, batch, cluster_ids=torch.full((3,), row))
        assert_close(found, expected[2], atol=1e-5, rtol=1e-5)


def test_another_type(tmp_path: Path) -> None:
    write_table(tmp_path / "clusters.safetensors")
    run = write_adapted_blip(tmp_path, mocle_fields(), data=TABLE)
    plan = plan_adapters(run, has_base=True, dtype=torch.bfloat16)
    done = export_adapters(plan, tmp_path / "out", is_checked=True)
    assert done.check is not None and 1e-5 < done.check.max_difference < 0.2
    for file in (tmp_path / "out").rglob("*.safetensors"):
        if file.name != "clusters.safetensors":
            assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "base" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_check_finds_a_wrong_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_lvlm.conversion import adapter_export

    write_table(tmp_path / "clusters.safetensors")
    run = write_adapted_blip(tmp_path, mocle_fields(), data=TABLE)
    plan = plan_adapters(run)
    check = adapter_export._check

    def spoil(plan: Any, folder: Path) -> Any:
        file = folder / "adapters" / "cluster-002" / "adapter_model.safetensors"
        tensors = load_file(file)
        name = next(name for name in tensors if "lora_B" in name)
        save_file(tensors | {name: tensors[name] + 0.05}, file)
        return check(plan, folder)

    monkeypatch.setattr(adapter_export, "_check", spoil)
    with pytest.raises(
        ExportCheckError, match=r"logits differ from the trained model's by 0\..*Do not use this folder"
    ):
        export_adapters(plan, tmp_path / "out")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"gating": "token"}, "gates read hidden states and differ from token to token"),
        ({"gating": "sentence"}, "gates read hidden states and differ from sample to sample"),
    ],
)
def test_gates_without_a_table(tmp_path: Path, fields: dict[str, Any], said: str) -> None:
    run = write_adapted_blip(tmp_path, mocle_fields(**fields))
    with pytest.raises(ValueError, match=said):
        plan_adapters(run)


def test_what_is_refused(tmp_path: Path) -> None:
    write_table(tmp_path / "clusters.safetensors")
    run = write_adapted_run(tmp_path, mocle_fields(), data=TABLE, trains=("connector", "adapter"))
    with pytest.raises(ValueError, match="merge: '4'; allowed: 0 to 3"):
        plan_adapters(run, merge="4")
    with pytest.raises(ValueError, match="format: 'x'; allowed: auto, vlm, language_model"):
        plan_adapters(run, form="x")
    with pytest.raises(ValueError, match=r"adapter mocle: no stock class has adapters inside"):
        plan_export(run, format="stock")
    write_table(tmp_path / "large.safetensors", num_clusters=5)
    with pytest.raises(ValueError, match="a table of 5 clusters, the model's gates have 4 rows"):
        plan_adapters(run, clusters=tmp_path / "large.safetensors")
    (tmp_path / "clusters.safetensors").unlink()
    with pytest.raises(ValueError, match=r"data.clusters of the run: .*no such file.*--clusters FILE"):
        plan_adapters(run)
    write_table(tmp_path / "elsewhere.safetensors")
    plan = plan_adapters(run, clusters=tmp_path / "elsewhere.safetensors")
    with pytest.raises(ValueError, match="license: 'my own'"):
        export_adapters(plan, tmp_path / "out", license="my own")
    with pytest.raises(ValueError, match="holds what is exported"):
        export_adapters(plan, run)
    assert not (tmp_path / "out").exists()


def test_a_base_that_was_trained_too(tmp_path: Path) -> None:
    """No published model has these weights: they must come along."""
    write_table(tmp_path / "clusters.safetensors")
    trains = ("connector", "re:layers.0.mlp", "adapter")
    run = write_adapted_blip(tmp_path, mocle_fields(), trains=trains, data=TABLE)
    with pytest.raises(ValueError, match=r"trained re:layers.0.mlp besides adapters and connector.*--with-base"):
        plan_adapters(run)
    export(run, tmp_path / "out", has_base=True)


def test_models_without_adapters_or_without_a_base(tmp_path: Path) -> None:
    tiny_llava().save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="plain: the model holds no adapters"):
        plan_adapters(tmp_path / "plain")
    moe = MoEConfig.model_validate({"num_experts": 2, "top_k": 1})
    config = tiny_moe_llava(moe).config
    with pytest.raises(ValueError, match="holds a mixture of experts beside its adapters"):
        choose_base(config)
    for kind, experts in (("Q-MoE", ExpertSettings(num_layers=2)), ("Q-Former", None)):
        if experts is None:
            llava = tiny_llava().config.to_dict() | {"model_type": "moe_llava", "qformer": {"hidden_size": 16}}
            config = MoELlavaConfig.from_dict(llava)
        else:
            config = tiny_moe_blip(experts).config
        with pytest.raises(ValueError, match=f"connector: a {kind} .*has no stock form"):
            choose_base(config)
    config = tiny_moe_blip(None, "t5").config
    with pytest.raises(ValueError, match="known for decoder-only language models"):
        choose_base(config, "vlm")


@pytest.mark.parametrize("gating", ["cluster", "dataset", "sentence"])
def test_our_code_with_the_weights(tmp_path: Path, gating: str) -> None:
    """`export.py model`: the folder brings the adapters' code along, and the card says what its gates ask."""
    run = write_adapted_run(tmp_path, mocle_fields(gating=gating))
    plan = plan_export(run)
    assert plan.form == "native" and plan.reason is not None and "export.py mocle" in plan.reason
    done = export_model(plan, tmp_path / "out", is_checked=True)
    assert done.check is not None and done.check.max_difference == 0
    card = (tmp_path / "out" / "README.md").read_text()
    asked = {"cluster": "cluster_ids", "dataset": "dataset_ids", "sentence": "instruction_mask"}[gating]
    assert f"Its routers or gates also want `{asked}`" in card and f'inputs["{asked}"]' in card
    assert "LoRA experts chosen by a gate (MoCLE) in the language model." in card and f"gating: {gating}" in card
