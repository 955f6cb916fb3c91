"""Estimated bytes against those of tensors that are really there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_lvlm.config.connector import ExpertSettings
from moe_lvlm.estimation.flops import checkpointed_layers
from moe_lvlm.estimation.memory import estimate_memory, saved_bytes, state_bytes
from moe_lvlm.estimation.probe import probe
from moe_lvlm.estimation.shape import BatchShape
from moe_lvlm.models.packed_attention import attend_within_samples
from moe_lvlm.training.checkpointing import enable_checkpointing
from moe_lvlm.training.memory import parameter_table
from moe_lvlm.training.trainable import select_trainable
from tests.estimation import measured
from tests.estimation.measured import TOP_2, build, collate, held_by_engine, samples, shape_of
from tests.parallel.rank_server import RankServer
from tests.tiny_models import TEXT_CONFIGS, blip_batch, tiny_moe_blip

WITHIN = 0.05
LTDR = TOP_2 | {"router": {"kind": "ltdr"}, "layers": "sparse"}
EVERY_LAYER = TOP_2 | {"layers": "dense"}


@dataclass(frozen=True)
class Case:
    """A model and a batch."""

    moe: dict[str, Any] | None = field(default_factory=lambda: TOP_2)
    family: str = "llama"
    train: tuple[str, ...] = ("moe",)
    fields: dict[str, Any] = field(default_factory=dict)
    is_packed: bool = False
    precision: torch.dtype = torch.float32
    attention: str = "sdpa"


CASES: dict[str, Case] = {
    **{f"{family}, stage III": Case(family=family) for family in TEXT_CONFIGS},
    **{f"{family}, dense, all": Case(moe=None, family=family, train=("connector", "language_model")) for family in TEXT_CONFIGS},
    "tower too": Case(moe=None, train=("vision_tower", "connector", "language_model")),
    "connector alone": Case(moe=None, train=("connector",)),
    "every layer sparse, all trained": Case(moe=EVERY_LAYER, train=("connector", "language_model")),
    "routers alone": Case(train=("router",)),
    "released": Case(train=("released",)),
    "shared and fine-grained": Case(moe=TOP_2 | {"shared_experts": 1, "fine_grained": 2}),
    "top-1 of 8": Case(moe=TOP_2 | {"num_experts": 8, "top_k": 1}),
    "packed": Case(is_packed=True),
    "packed, dense, all": Case(moe=None, train=("connector", "language_model"), is_packed=True),
    "packed, stablelm": Case(family="stablelm", is_packed=True),
    "eager": Case(attention="eager"),
    "bf16": Case(precision=torch.bfloat16),
    "bf16, stablelm, all": Case(
        family="stablelm", train=("connector", "language_model"), precision=torch.bfloat16
    ),
    **{
        kind: Case(moe=TOP_2 | {"router": {"kind": kind}})
        for kind in ("task", "cluster", "instruct", "modality_groups", "stgc")
    },
}  # fmt: skip


def prepare(case: Case) -> tuple[Any, dict[str, Any]]:
    """The model and its batch."""
    moe = case.moe
    if moe is not None and moe["router"]["kind"] == "cluster":
        moe = moe | {"router": {"kind": "cluster", "num_clusters": 3, "embedding_width": 8}}
    model = build(moe, case.family, case.train, **case.fields).to(case.precision)
    if case.attention != "sdpa":
        model.model.language_model.set_attn_implementation(case.attention)
    if case.is_packed:
        attend_within_samples(model.model.language_model)
    batch = collate(samples(), is_packed=case.is_packed)
    batch["pixel_values"] = batch["pixel_values"].to(case.precision)
    return model, batch


@pytest.mark.parametrize("name", CASES)
def test_activations(name: str) -> None:
    case = CASES[name]
    model, batch = prepare(case)
    real = measured.saved_bytes(model, batch)
    probed = probe(model, shape_of(samples(), is_packed=case.is_packed), dtype=case.precision)
    assert sum(saved_bytes(probed).values()) == pytest.approx(real, rel=WITHIN)


@pytest.mark.parametrize("train", [("connector",), ("connector", "language_model")])
@pytest.mark.parametrize("text", ["llama", "t5"])
@pytest.mark.parametrize("experts", [None, ExpertSettings(num_layers=2)])
def test_activations_of_instructblip(text: str, experts: ExpertSettings | None, train: Sequence[str]) -> None:
    model = tiny_moe_blip(experts, text).train()
    select_trainable(model, train)
    batch = blip_batch(text, num_samples=8)
    # as many words as its Q-Former has places, fewer than are guessed
    words = torch.ones(8, model.qformer.config.max_position_embeddings, dtype=torch.int64)
    words[0, -1] = 0  # with padding somewhere, as real batches have it
    batch |= {"qformer_input_ids": words, "qformer_attention_mask": words}
    if text == "llama":  # answers that stand in every column of the batch
        batch["labels"] = batch["input_ids"].where(batch["attention_mask"].bool(), -100)
    shape = BatchShape(
        sample_lengths=tuple(batch["attention_mask"].sum(dim=1).tolist()),
        num_images=8,
        supervised=int((batch["labels"][:, 1:] != -100).sum()),
        padded_to=batch["input_ids"].shape[1],
    )
    estimated = sum(saved_bytes(probe(model, shape, dtype=torch.float32)).values())
    assert estimated == pytest.approx(measured.saved_bytes(model, batch), rel=WITHIN)


@pytest.mark.parametrize(("select", "attention"), [("vision_tail", "sdpa"), ("instruction_aware", "eager")])
def test_activations_with_a_tail(select: str, attention: str) -> None:
    moe = LTDR | {"router": {"kind": "ltdr", "eea_select": select}}
    model, batch = prepare(Case(moe=moe, attention=attention))
    batch["output_routing"] = True
    trace = model(**batch).routing
    kept = [int(decision.keep_RK.sum()) for _, decision in trace.items()]
    shape = shape_of(samples())
    tail_share = (sum(kept) / len(kept) - 2 * shape.tokens) / (2 * shape.tokens)
    assert tail_share > 0
    real = measured.saved_bytes(model, batch)
    probed = probe(model, shape_of(samples(), tail_share=tail_share), dtype=torch.float32)
    assert sum(saved_bytes(probed).values()) == pytest.approx(real, rel=WITHIN)


@pytest.mark.parametrize("checkpointed", [1, 2, 3, True])
@pytest.mark.parametrize("train", [("moe",), ("connector", "language_model")])
def test_checkpointed_activations(checkpointed: bool | int, train: Sequence[str]) -> None:
    model, batch = prepare(Case(train=tuple(train), family="stablelm"))
    probed = probe(model, shape_of(samples()), dtype=torch.float32)
    estimated = saved_bytes(probed, checkpointed_layers(model, checkpointed))
    enable_checkpointing(model, checkpointed)
    assert sum(estimated.values()) == pytest.approx(measured.saved_bytes(model, batch), rel=WITHIN)


STATES = [
    # processes, ZeRO, EP, precision, what is trained
    (1, 1, 1, "fp32", ("moe",)),
    (1, 2, 1, "bf16", ("connector", "language_model")),
    (2, 1, 1, "fp32", ("moe",)),
    (2, 1, 2, "bf16", ("moe",)),
    (2, 2, 1, "bf16", ("moe",)),
    (2, 2, 2, "fp32", ("moe",)),
    (2, 3, 1, "fp32", ("moe",)),
    (2, 3, 2, "bf16", ("connector", "language_model")),
]


@pytest.mark.distributed
@pytest.mark.parametrize(("world", "stage", "size", "precision", "train"), STATES)
def test_states(
    world: int, stage: int, size: int, precision: str, train: tuple[str, ...], ranks: RankServer, tmp_path: Path
) -> None:
    zero = {"stage": stage, "reduce_bucket_size": 60_000, "stage3_param_persistence_threshold": 0}
    results = ranks.run(held_by_engine, EVERY_LAYER, zero, size, precision, train, world=world, folder=tmp_path)
    states, _ = state_bytes(parameter_table(build(EVERY_LAYER, "llama", train)), precision, zero, world, size)
    gradients = sum(value for kind, value in states.items() if kind.startswith("gradients"))
    total = sum(states.values())
    bucket = 60_000 * {"bf16": 2, "fp32": 4}[precision]
    for between_steps, between_micro_batches in results:
        # Under ZeRO-3 the bucket and the gradients' memory stay, under ZeRO-1 the bucket stays beside gradients
        expected = total + bucket if stage == 3 else total - gradients
        assert between_steps == pytest.approx(expected, rel=WITHIN)
        assert between_micro_batches == pytest.approx(total + (bucket if stage != 2 else 0), rel=WITHIN)


def test_all_kinds_add_up() -> None:
    model, _ = prepare(Case())
    shape = shape_of(samples())
    probed = probe(model, shape, dtype=torch.bfloat16, expert_parallel_size=2)
    memory = estimate_memory(
        model,
        probed,
        precision="bf16",
        zero={"stage": 2, "reduce_bucket_size": 1000, "offload_optimizer": {"device": "cpu"}},
        world_size=4,
        expert_parallel_size=2,
        repeated=frozenset(),
        reserved=12345,
        tokens=shape.tokens,
        tail_share=0.0,
    )
    assert memory.device == sum(memory.rows.values())
    experts, routers = 2 * 4 * 3 * 64 * 176, 2 * 4 * 64
    assert memory.rows["weights, experts"] == 2 * experts // 2
    assert memory.rows["gradients, experts"] == 2 * experts // 4
    assert memory.rows["gradients, dense"] == 2 * routers // 4
    assert memory.rows["optimizer, experts"] == 0
    assert memory.host == 12 * (experts + routers) // 4
    assert memory.rows["ZeRO's buckets"] == 2000
    # a row there and one back: 2 experts a token, 64 wide
    assert memory.rows["all-to-all buffers"] == 2 * 2 * shape.tokens * 64 * 2
