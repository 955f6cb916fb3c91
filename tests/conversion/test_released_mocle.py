"""A checkpoint in the layout of MoCLE's authors: what their layer computes is written down here from equations and from
reading their code, and the converted model must compute it.

E experts   I inputs, O outputs of a linear   G width of an embedding
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from sklearn.cluster import KMeans, MiniBatchKMeans
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import InstructBlipForConditionalGeneration, PreTrainedModel

import moe_lvlm
from moe_lvlm.adapters import LoRAExpertLinear
from moe_lvlm.conversion.adapter_export import export_adapters
from moe_lvlm.conversion.adapter_plan import plan_adapters
from moe_lvlm.conversion.folder import write_converted
from moe_lvlm.conversion.kmeans_file import read_centres
from moe_lvlm.conversion.released_mocle import from_released, write_clusters
from moe_lvlm.data.clusters import ClusterTable
from moe_lvlm.data.errors import DataFileError
from tests.tiny_run import write_instructblip

EXPERTS, RANK, CLUSTERS, WIDTH, TAU = 3, 2, 5, 6, 0.3


class TheirLinear(nn.Module):
    """Their wrapped linear, for samples whose cluster is known. A table and a gate with a bias of its own; the softmax's
    largest entry G; the experts' sum is multiplied by the gates where samples are put together again, and by their
    maximum once more: W x + b + s (G (G E(x)) + (1 - G) U(x))."""

    def __init__(self, linear: nn.Linear, tensors: Mapping[str, Tensor], softmax_dtype: torch.dtype) -> None:
        super().__init__()
        self.linear, self.tensors, self.softmax_dtype = linear, tensors, softmax_dtype
        self.cluster = 0

    def forward(self, x: Tensor) -> Tensor:
        t, dtype = self.tensors, self.softmax_dtype
        embedding = t["task_emb.weight"].to(dtype)[self.cluster]
        scores_E = torch.nn.functional.linear(embedding, t["w_gate.weight"].to(dtype), t["w_gate.bias"].to(dtype))
        gates_E = torch.softmax(scores_E / TAU, dim=0, dtype=dtype)
        gate, best = gates_E.max(dim=0)
        scale = 32 / RANK

        def lora(name: str) -> Tensor:
            return (x @ t[f"lora_A.{name}.weight"].T) @ t[f"lora_B.{name}.weight"].T * scale

        combined = lora(str(int(best))) * gate
        if "lora_A.g.weight" not in t:  # g_enable: False
            return self.linear(x) + combined
        return self.linear(x) + combined * gate + lora("g") * (1 - gate)


def their_tensors(linear: nn.Linear, generator: torch.Generator) -> dict[str, Tensor]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    experts = [*map(str, range(EXPERTS)), "g"]
    tensors = {f"lora_A.{name}.weight": draw(RANK, linear.in_features) * 0.2 for name in experts}
    tensors |= {f"lora_B.{name}.weight": draw(linear.out_features, RANK) * 0.2 for name in experts}
    return tensors | {
        "task_emb.weight": draw(CLUSTERS, WIDTH),
        "w_gate.weight": draw(EXPERTS, WIDTH) * 0.3,
        "w_gate.bias": draw(EXPERTS) * 0.3,
    }


def their_model(base: Path, *, softmax_dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """InstructBLIP with their linears, and its trained weights under their names."""
    model = InstructBlipForConditionalGeneration.from_pretrained(base, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}
    with torch.no_grad():
        trained = [model.query_tokens, *model.qformer.parameters(), *model.language_projection.parameters()]
        for parameter in (*trained, *model.vision_model.post_layernorm.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    for name, parameter in model.named_parameters():
        theirs = name
        for ours, lavis in (
            ("qformer.embeddings.layernorm.", "Qformer.bert.embeddings.LayerNorm."),
            ("qformer.", "Qformer.bert."),
            ("language_projection.", "llm_proj."),
            ("vision_model.post_layernorm.", "ln_vision."),
        ):
            if name.startswith(ours):
                theirs = (lavis + name.removeprefix(ours)).replace("attention.attention.", "attention.self.")
                break
        if theirs != name or name == "query_tokens":
            state[theirs] = parameter.detach().clone()
    for layer, module in enumerate(model.language_model.model.layers):
        for leaf in ("q_proj", "v_proj"):
            linear = getattr(module.self_attn, leaf)
            tensors = their_tensors(linear, generator)
            setattr(module.self_attn, leaf, TheirLinear(linear, tensors, softmax_dtype))
            prefix = f"llm_model.base_model.model.model.layers.{layer}.self_attn.{leaf}"
            state |= {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}
    state["Qformer.bert.embeddings.position_ids"] = torch.arange(16)[None]
    return model, state


def write_theirs(path: Path, state: dict[str, Any], **config: Any) -> Path:
    section = {"arch": "mocle", "gates_tmp": TAU, "total_tasks": CLUSTERS} | config
    torch.save({"model": state, "config": {"model": section}, "optimizer": {"state": {}}, "epoch": 3}, path)
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    write_instructblip(tmp_path / "base")
    return tmp_path / "base"


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.tensor([[4, 4, 4, 1, 8, 9, 10], [4, 4, 4, 1, 12, 7, 11]])
    words = torch.randint(2, 12, (2, 4), generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(2, 3, 8, 8, generator=generator),
        "qformer_input_ids": words,
        "qformer_attention_mask": torch.ones_like(words),
    }


@torch.no_grad()
def their_logits(model: PreTrainedModel, cluster: int) -> Tensor:
    for module in model.modules():
        if isinstance(module, TheirLinear):
            module.cluster = cluster
    found: Tensor = model(**batch()).logits
    return found


@torch.no_grad()
def our_logits(model: PreTrainedModel, cluster: int) -> Tensor:
    found: Tensor = model(**batch(), cluster_ids=torch.full((2,), cluster)).logits
    return found


def converted_model(tmp_path: Path, base: Path, state: dict[str, Tensor]) -> PreTrainedModel:
    write_converted(from_released(write_theirs(tmp_path / "c.pth", state), base), tmp_path / "out")
    return moe_lvlm.load(tmp_path / "out")[0]


def test_the_converted_model_computes_theirs(tmp_path: Path, base: Path) -> None:
    """With their softmax in float32."""
    theirs, state = their_model(base)
    model = converted_model(tmp_path, base, state)
    settings = model.config.adapter_settings
    assert (settings.compat, settings.rank, settings.alpha, settings.dropout) == ("released", RANK, 32, 0.1)
    assert (settings.temperature, settings.num_clusters, settings.noise_std) == (TAU, CLUSTERS, 0.1)
    assert (settings.num_experts, settings.has_universal, settings.target_modules) == (
        EXPERTS,
        True,
        ("q_proj", "v_proj"),
    )
    logits = [their_logits(theirs, cluster) for cluster in range(CLUSTERS)]
    for cluster, expected in enumerate(logits):
        assert_close(our_logits(model, cluster), expected, atol=1e-5, rtol=1e-5)
    assert min((logits[0] - other).abs().max() for other in logits[1:]) > 0.01


def test_without_a_universal_expert_the_gate_is_applied_once(tmp_path: Path, base: Path) -> None:
    theirs, state = their_model(base)
    for module in theirs.modules():
        if isinstance(module, TheirLinear):
            module.tensors = without(dict(module.tensors), ".g.weight")
    model = converted_model(tmp_path, base, without(state, ".g.weight"))
    assert not model.config.adapter_settings.has_universal
    for cluster in range(CLUSTERS):
        assert_close(our_logits(model, cluster), their_logits(theirs, cluster), atol=1e-5, rtol=1e-5)


def test_gates_in_half_precision_are_theirs(tmp_path: Path, base: Path) -> None:
    """Their softmax is in float16; so is ours where gates and tables are."""
    theirs, state = their_model(base, softmax_dtype=torch.float16)
    model = converted_model(tmp_path, base, state)
    in_float32 = our_logits(model, 1)
    for module in model.modules():
        if isinstance(module, LoRAExpertLinear):
            for part in (module.gate, module.table):
                assert part is not None
                part.half()
    assert_close(our_logits(model, 1), their_logits(theirs, 1), atol=1e-5, rtol=1e-5)
    assert 1e-5 < (in_float32 - their_logits(theirs, 1)).abs().max() < 0.05


def test_it_exports_to_peft_adapters(tmp_path: Path, base: Path) -> None:
    """A converted model is a model folder like any: its adapters serve on the published InstructBLIP."""
    theirs, state = their_model(base)
    converted_model(tmp_path, base, state)
    with pytest.raises(ValueError, match="no run, so it is not known which weights are another base's"):
        plan_adapters(tmp_path / "out", base="some/instructblip")
    plan = plan_adapters(tmp_path / "out", base=str(base))
    done = export_adapters(plan, tmp_path / "adapters", is_checked=True)
    assert done.check is not None and done.check.rows == CLUSTERS
    assert "no table of clusters came along" in plan.notes[0]
    model = InstructBlipForConditionalGeneration.from_pretrained(base, dtype=torch.float32).eval()
    model.load_state_dict(load_file(tmp_path / "adapters" / "connector.safetensors"), strict=False)
    # the norm behind the tower is there too: LAVIS trains it with the rest
    assert "vision_model.post_layernorm.weight" in (plan.connector.tensors if plan.connector else {})
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapters" / "adapters" / "cluster-003").eval()
    with torch.no_grad():
        assert_close(adapted(**batch()).logits, their_logits(theirs, 3), atol=1e-5, rtol=1e-5)


def test_frozen_weights_of_the_file_are_left_out(tmp_path: Path, base: Path) -> None:
    _, state = their_model(base)
    prefix = "llm_model.base_model.model.model"
    frozen = {
        f"{prefix}.embed_tokens.weight": torch.zeros(3),
        f"{prefix}.layers.0.self_attn.q_proj.weight": torch.zeros(2),
    }
    frozen |= {
        "visual_encoder.cls_token": torch.zeros(1),
        f"{prefix}.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
    }
    converted = from_released(write_theirs(tmp_path / "c.pth", state | frozen), base)
    assert converted.notes[-1].startswith("5 frozen tensors")
    assert converted.weights.shape("language_model.model.embed_tokens.weight")[1] == 32


def without(state: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if part not in name}


def test_what_is_refused(tmp_path: Path, base: Path) -> None:
    _, state = their_model(base)
    linear = "llm_model.base_model.model.model.layers.1.self_attn.v_proj"

    def refuses(changed: dict[str, Any], said: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=said):
            from_released(write_theirs(tmp_path / "c.pth", changed, **options), base)

    refuses(state | {"other.weight": torch.zeros(1)}, "other.weight: not a weight of MoCLE on InstructBLIP")
    refuses(without(state, "llm_model."), r"has no llm_model.\*.lora_A")
    refuses(without(state, "llm_proj."), r"has no llm_proj.\*, which MoCLE trains")
    refuses(without(state, f"{linear}.w_gate.bias"), "v_proj holds .'w_gate.bias'. and .* does not")
    refuses(without(state, "w_gate.bias"), "has no w_gate.bias; allowed: gates by cluster")
    refuses(without(state, ".2.weight"), "w_gate is for 3 experts, which does not fit lora_A.2.weight, lora_B.2.weight")
    refuses(without(state, linear), "2 missing: |1 missing: |missing: language_model.model.layers.1.self_attn.v_proj")
    refuses(state, "does not say the temperature", gates_tmp=None)
    refuses(
        state | {"query_tokens": torch.zeros(1, 2, 16)}, r"query_tokens is \[1, 2, 16\], the model needs \[1, 3, 16\]"
    )
    refuses(state | {"Qformer.bert.x": torch.zeros(1)}, "has no qformer.x, which .*c.pth holds")
    torch.save({"model": {"a": 1}}, tmp_path / "numbers.pth")
    with pytest.raises(ValueError, match="holds no weights; allowed: a checkpoint of LAVIS"):
        from_released(tmp_path / "numbers.pth", base)
    torch.save({"model": state, "config": Path("x")}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match="refused, since it holds more than tensors and could run code"):
        from_released(tmp_path / "code.pth", base)
    file = write_theirs(tmp_path / "c.pth", state)
    write_converted(from_released(file, base), tmp_path / "out")
    with pytest.raises(ValueError, match="it holds adapters or a Q-MoE already"):
        from_released(file, tmp_path / "out")
    write_instructblip(tmp_path / "t5", "t5")
    with pytest.raises(ValueError, match="allowed: an InstructBLIP around a decoder-only language model"):
        from_released(file, tmp_path / "t5")


def fitted(kind: type[KMeans] | type[MiniBatchKMeans], clusters: int = CLUSTERS) -> Any:
    points = np.random.default_rng(0).normal(size=(60, WIDTH)).astype(np.float32)
    return kind(clusters, n_init=1, random_state=0).fit(points)


@pytest.mark.parametrize("kind", [KMeans, MiniBatchKMeans])
def test_their_k_means_becomes_a_table(tmp_path: Path, base: Path, kind: Any) -> None:
    """Assignments are scikit-learn's."""
    kmeans = fitted(kind)
    joblib.dump(kmeans, tmp_path / "kmeans.pkl")
    assert_close(read_centres(tmp_path / "kmeans.pkl"), kmeans.cluster_centers_)
    _, state = their_model(base)
    converted = from_released(write_theirs(tmp_path / "c.pth", state), base)
    probe = np.ones((1, WIDTH), np.float32)
    write_clusters(tmp_path / "kmeans.pkl", tmp_path / "table.safetensors", converted, encode=lambda texts: probe)
    new = np.random.default_rng(1).normal(size=(40, WIDTH)).astype(np.float32)
    table = ClusterTable.load(tmp_path / "table.safetensors")
    assert table.nearest(new).tolist() == kmeans.predict(new).tolist()
    joblib.dump(fitted(kind, 4), tmp_path / "kmeans.pkl")
    with pytest.raises(ValueError, match=r"centres of shape \(4, 6\); the gates are for \(5, 6\)"):
        write_clusters(tmp_path / "kmeans.pkl", tmp_path / "table.safetensors", converted, encode=lambda texts: probe)


class Hostile:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("touched"),)


def test_files_that_are_no_k_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "k.pkl"
    with pytest.raises(DataFileError, match="no such file"):
        read_centres(file)
    joblib.dump({"centres": np.ones(3)}, file)
    with pytest.raises(DataFileError, match="holds no cluster_centers_"):
        read_centres(file)
    file.write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(DataFileError, match=r"cannot be read as a k-means .*it names pathlib"):
        read_centres(file)
    assert not (tmp_path / "touched").exists()
    joblib.dump(fitted(KMeans), file)
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(DataFileError, match="cannot be read as a k-means"):
        read_centres(file)
    joblib.dump(fitted(KMeans), file, compress=3)
    with pytest.raises(DataFileError, match="without compression"):
        read_centres(file)
