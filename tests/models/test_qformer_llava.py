"""Our LLaVA with a Q-Former or a Q-MoE in the place of its projector."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import moe_lvlm
from moe_lvlm.checkpoint.source import open_source
from moe_lvlm.config.connector import ExpertSettings, QFormerConnectorSettings, QMoEConnectorSettings
from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.config.recipe import ModelSettings
from moe_lvlm.connectors.qmoe import QMoEModel
from moe_lvlm.evaluation.generation import generate_ids
from moe_lvlm.models.build import build_config, build_dense, build_empty
from moe_lvlm.models.config import with_fields
from moe_lvlm.models.context import derive_context
from moe_lvlm.models.llava import MoELlavaForConditionalGeneration
from moe_lvlm.models.upcycle import upcycle
from moe_lvlm.models.weights import load_weights
from moe_lvlm.routing.types import CONNECTOR, LANGUAGE_MODEL
from tests.evaluation.conftest import TinyPrompt
from tests.tiny_models import shake
from tests.tiny_run import write_instructblip, write_tokenizer, write_words

TOWER = {
    "model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, "hidden_size": 16,
    "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
LANGUAGE = {
    "model_type": "llama", "vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
QFORMER = {
    "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 20,
    "max_position_embeddings": 16, "initializer_range": 0.2,
}  # fmt: skip
EXPERTS = {"num_layers": 2, "normalize_output": True}
NUM_QUERIES = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer for the language model, one for the Q-Former, and an InstructBLIP."""
    path = tmp_path_factory.mktemp("parts")
    write_tokenizer(path / "tokenizer")
    write_words(path / "words")
    write_instructblip(path / "instructblip")
    return path


def settings(folder: Path, **connector: Any) -> ModelSettings:
    keys = {
        "kind": "qmoe",
        "qformer": {"from_config": QFORMER},
        "num_queries": NUM_QUERIES,
        "tokenizer": str(folder / "words"),
        "dropout": 0.0,
    } | connector
    if keys["kind"] == "qmoe":
        keys.setdefault("experts", EXPERTS)
    return ModelSettings.model_validate(
        {
            "vision_tower": {"from_config": TOWER, "feature_layer": -1},
            "language_model": {"from_config": LANGUAGE},
            "connector": keys,
            "tokenizer": str(folder / "tokenizer"),
        }
    )


def batch(model: MoELlavaForConditionalGeneration) -> dict[str, Any]:
    """Two images in the first sample, none in the second, one in the third."""
    image = model.config.image_token_id
    texts = [[1, *[image] * 2 * NUM_QUERIES, 8, 9], [1, 8, 9, 10], [1, *[image] * NUM_QUERIES, 11, 12, 13]]
    length = max(map(len, texts))
    ids = torch.tensor([text + [0] * (length - len(text)) for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (length - len(text)) for text in texts])
    generator = torch.Generator().manual_seed(2)
    context = derive_context(ids, attention_mask=mask, image_token_id=image, num_images=3)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill((mask == 0) | (ids == image), -100),
        "pixel_values": torch.randn(3, 3, 16, 16, generator=generator),
        "qformer_input_ids": torch.tensor([[1, 5, 6], [1, 5, 6], [1, 7, 0]]),
        "qformer_attention_mask": torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 0]]),
        "routing": replace(context, draw_N=torch.tensor([7, 8, 9])),
    }


def test_a_new_one_is_drawn_from_the_seed(folder: Path) -> None:
    first, processor = build_dense(settings(folder), seed=1)
    again, _ = build_dense(settings(folder), seed=1)
    other, _ = build_dense(settings(folder), seed=2)
    assert first.model.connector is not None and isinstance(first.model.connector.qformer, QMoEModel)
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    queries = first.model.connector.query_tokens
    assert not torch.equal(queries, other.model.connector.query_tokens)  # type: ignore[union-attr]
    # queries that are alike would stay so
    assert len({tuple(row.tolist()) for row in queries[0]}) == NUM_QUERIES
    assert processor.num_query_tokens == first.config.num_query_tokens == NUM_QUERIES
    assert "model.multi_modal_projector.linear_1.weight" not in first.state_dict()


def test_experts_begin_as_the_q_former(folder: Path) -> None:
    """The Q-MoE of a seed computes what the Q-Former of that seed does."""
    plain, _ = build_dense(settings(folder, kind="qformer"), seed=1)
    sparse, _ = build_dense(settings(folder), seed=1)
    given = batch(plain)
    assert_close(sparse.eval()(**given).logits, plain.eval()(**given).logits, rtol=1e-5, atol=1e-5)


def test_parts_of_an_instructblip(folder: Path) -> None:
    """Queries and Q-Former are its own; the projection into another language model is new."""
    source = open_source(folder / "instructblip")
    model, processor = build_dense(
        settings(folder, qformer={"from_pretrained": str(folder / "instructblip")}, num_queries=None, tokenizer=None),
        seed=1,
    )
    connector = model.model.connector
    assert connector is not None
    assert torch.equal(connector.query_tokens, source.read("query_tokens"))
    name = "encoder.layer.0.attention.attention.query.weight"
    assert torch.equal(connector.qformer.get_parameter(name), source.read(f"qformer.{name}"))
    expert = connector.qformer.get_parameter("encoder.layer.3.experts.1.output_query.dense.weight")
    assert torch.equal(expert, source.read("qformer.encoder.layer.3.output_query.dense.weight"))
    assert processor.qformer_tokenizer("what")["input_ids"][0] == 1
    assert not any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("is_sparse", [False, True], ids=["dense LLM", "MoE LLM"])
def test_both_kinds_of_experts_in_one_model(folder: Path, is_sparse: bool) -> None:
    """Losses and decisions of the connector, and of the language model where it has some."""
    model, _ = build_dense(settings(folder, experts={"num_layers": 2, "importance_coefficient": 0.5}), seed=1)
    if is_sparse:
        upcycled = upcycle(model, MoEConfig.model_validate({"layers": "dense", "balance": {"coefficient": 0.1}}))
        assert upcycled is model
    shake(model, scale=0.2, seed=3)
    output = model.train()(**batch(model), output_routing=True)
    parts = {site.part for site, _ in output.routing.items()}
    assert parts == ({CONNECTOR, LANGUAGE_MODEL} if is_sparse else {CONNECTOR})
    assert_close(output.loss, output.language_loss + output.balance_loss)
    importance = []
    for _, decision in output.routing.of(CONNECTOR):
        assert decision.probs_RE.shape == (3, 3)
        total = decision.probs_RE.sum(dim=0)
        importance.append(((total - total.mean()) ** 2).mean() / total.mean() ** 2)
        # each visual token goes where its image does
        by_token = decision.by_token(output.routing.context)
        assert int(by_token.keep_RK.sum()) == 3 * NUM_QUERIES
    expected = 0.5 * torch.stack(importance).mean()
    if is_sparse:
        assert output.balance_loss > expected
    else:
        assert_close(output.balance_loss, expected)
    output.loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if ".router." in name)


def test_a_batch_without_an_image_calls_the_same_modules(folder: Path) -> None:
    model, _ = build_dense(settings(folder), seed=1)
    model.train()
    given = batch(model)
    words = {name: given[name][1:2] for name in ("input_ids", "attention_mask", "labels")}
    called: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    output = model(**words, output_routing=True)
    without = sorted(called)
    called.clear()
    model(**given)
    assert without == sorted(called)
    assert float(output.balance_loss) == 0
    output.loss.backward()


def test_answers_do_not_depend_on_the_batch(folder: Path) -> None:
    """Generation with a cache: prompts together, one by one, and without a cache."""
    model, processor = build_dense(settings(folder), seed=1)
    shake(model, scale=0.2, seed=3)
    model.eval()
    given = batch(model)
    image = model.config.image_token_id
    images = given["pixel_values"]
    words = torch.tensor([1, 5, 6])
    prompts = [
        TinyPrompt(torch.tensor([1, *[image] * 2 * NUM_QUERIES, 8, 9]), images[:2], connector_ids=words),
        TinyPrompt(torch.tensor([1, 8, 9, 10]), None, connector_ids=words),
        TinyPrompt(torch.tensor([1, *[image] * NUM_QUERIES, 11]), images[2:], connector_ids=words[:2]),
    ]
    options: dict[str, Any] = {"max_new_tokens": 4, "on_batch": lambda _: None}
    together = generate_ids(model, processor.tokenizer, prompts, batch_size=3, **options)
    assert together == generate_ids(model, processor.tokenizer, prompts, batch_size=1, **options)
    assert together == generate_ids(model, processor.tokenizer, prompts, batch_size=3, use_cache=False, **options)


def test_saved_and_loaded(folder: Path, tmp_path: Path) -> None:
    model, processor = build_dense(settings(folder), seed=1)
    model.eval().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, again = moe_lvlm.load(tmp_path)
    given = batch(model)
    with torch.no_grad():
        assert torch.equal(loaded(**given).logits, model(**given).logits)
    assert again.image_token_id == processor.image_token_id
    assert again.qformer_tokenizer.model_max_length == 128
    # a plain Q-Former's weights fill a Q-MoE
    plain, _ = build_dense(settings(folder, kind="qformer"), seed=1)
    plain.save_pretrained(tmp_path / "plain")
    config = with_fields(plain.config, experts=ExpertSettings.model_validate(EXPERTS).model_dump(mode="json"))
    sparse = build_empty(config)
    load_weights(sparse, open_source(tmp_path / "plain"))
    with torch.no_grad():
        expected = plain.eval()(**given).logits
        assert_close(sparse.eval()(**given).logits, expected, rtol=1e-5, atol=1e-5)


def test_gradient_checkpointing_changes_nothing(folder: Path) -> None:
    def gradients(*, checkpointed: bool) -> dict[str, Tensor]:
        model, _ = build_dense(settings(folder), seed=1)
        model.train()
        for module in model.checkpointed_modules() if checkpointed else ():
            module.gradient_checkpointing_enable({"use_reentrant": False})
        model(**batch(model), use_cache=False).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, other = gradients(checkpointed=False), gradients(checkpointed=True)
    assert plain.keys() == other.keys()
    for name, gradient in plain.items():
        assert_close(other[name], gradient, msg=name)


@pytest.mark.parametrize(
    ("connector", "message"),
    [
        ({"qformer": None}, r"connector.qformer: needed where vision_tower and language_model are parts"),
        ({"tokenizer": None}, r"model.connector.tokenizer: needed"),
        (
            {"qformer": {"from_config": {"hidden": 3}}},
            r"from_config: hidden; allowed: keys of InstructBlipQFormerConfig",
        ),
        ({"qformer": {"from_config": QFORMER | {"vocab_size": 10}}}, r"16 tokens, but the Q-Former embeds 10"),
        ({"experts": {"num_layers": 5}}, r"connector.experts.num_layers: 5"),
        ({"qformer": {"from_pretrained": "{folder}/tokenizer"}}, r"layout of|Unrecognized model|config.json"),
        (
            {"qformer": {"from_pretrained": "{folder}/instructblip"}},
            r"num_queries: 5; .* has 3; allowed: that, or null",
        ),
    ],
)
def test_refused(folder: Path, connector: dict[str, Any], message: str) -> None:
    filled = {
        key: {k: v.replace("{folder}", str(folder)) if isinstance(v, str) else v for k, v in value.items()}
        if isinstance(value, dict)
        else value
        for key, value in connector.items()
    }
    with pytest.raises((ValueError, OSError), match=message):
        build_config(settings(folder, **filled))
        build_dense(settings(folder, **filled), seed=0)


def test_a_tower_of_another_width_is_refused(folder: Path) -> None:
    made = settings(folder, qformer={"from_pretrained": str(folder / "instructblip")}, num_queries=None)
    wide = made.model_copy(
        update={"vision_tower": made.vision_tower.model_copy(update={"from_config": TOWER | {"hidden_size": 32}})}  # type: ignore[union-attr]
    )
    with pytest.raises(ValueError, match=r"attends to features 16 wide, and model.vision_tower's are 32 wide"):
        build_config(wide)


def test_kinds_of_settings() -> None:
    """A Q-MoE is a Q-Former with experts."""
    assert issubclass(QMoEConnectorSettings, QFormerConnectorSettings)
    plain = QFormerConnectorSettings.model_validate({"qformer": {"from_config": {}}})
    assert plain.kind == "qformer"
    with pytest.raises(ValueError, match="experts"):
        QFormerConnectorSettings.model_validate({"experts": {}})
