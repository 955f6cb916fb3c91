"""Parameters by part, and the bytes that ZeRO and expert parallelism leave on a process, by hand."""

from __future__ import annotations

from functools import partial

import pytest
from transformers import LlavaForConditionalGeneration

from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.models.build import build_empty
from moe_lvlm.models.config import MoELlavaConfig
from moe_lvlm.training.memory import ParameterGroup, StateMemory, parameter_table, state_memory
from moe_lvlm.training.trainable import select_trainable
from tests.tiny_models import tiny_llava, tiny_llava_config

EXPERTS = ParameterGroup("experts", 1000, 1000, True)
DENSE = ParameterGroup("language model", 500, 101, False)


def test_table_by_hand() -> None:
    moe = MoEConfig(layers=(0, 2), num_experts=4, shared_experts=1)
    model = build_empty(
        MoELlavaConfig.from_dict(tiny_llava_config().to_dict() | {"model_type": "moe_llava"}).with_moe(moe)
    )
    assert all(parameter.is_meta for parameter in model.parameters())
    select_trainable(model, ["moe", "connector"])
    found = {group.name: group for group in parameter_table(model)}
    ffn = 3 * 32 * 48
    assert found["experts"] == ParameterGroup("experts", 2 * 4 * ffn, 2 * 4 * ffn, True)
    assert found["shared experts"] == ParameterGroup("shared experts", 2 * ffn, 2 * ffn, False)
    assert found["routers"] == ParameterGroup("routers", 2 * 4 * 32, 2 * 4 * 32, False)
    assert found["connector"].count == found["connector"].trainable == 16 * 32 + 32 + 32 * 32 + 32
    # queries, outputs 32 x 32, keys and values 32 x 16, two norms; one dense FFN; the last norm and the embedding
    attention = 2 * 32 * 32 + 2 * 32 * 16
    assert found["language model"] == ParameterGroup(
        "language model", 3 * (attention + 64) + ffn + 32 + 64 * 32, 0, False
    )
    assert found["language-model head"] == ParameterGroup("language-model head", 64 * 32, 0, False)
    dense: LlavaForConditionalGeneration = tiny_llava()
    assert found["vision tower"].count == dense.model.vision_tower.num_parameters()
    assert sum(group.count for group in found.values()) == sum(parameter.numel() for parameter in model.parameters())


def test_tied_tensors_count_once() -> None:
    fields = tiny_llava_config(tie_word_embeddings=True).to_dict()
    config = MoELlavaConfig.from_dict(fields | {"model_type": "moe_llava", "tie_word_embeddings": True})
    model = build_empty(config)
    model.tie_weights()
    names = {group.name for group in parameter_table(model)}
    assert "language-model head" not in names


@pytest.mark.parametrize(
    ("stage", "world", "experts", "expected"),
    [
        # bf16: 2 bytes a weight and a gradient, 12 for master and moments
        (0, 1, 1, (2 * 1500, 2 * 1101, 12 * 1101)),
        (1, 4, 1, (2 * 1500, 2 * 1101, 12 * (250 + 26))),
        (2, 4, 1, (2 * 1500, 2 * (250 + 26), 12 * (250 + 26))),
        (3, 4, 1, (2 * (250 + 125), 2 * (250 + 26), 12 * (250 + 26))),
        # EP 2: 500 experts' parameters a process, in 2 replicas
        (1, 4, 2, (2 * 1000, 2 * 601, 12 * (250 + 26))),
        (2, 4, 2, (2 * 1000, 2 * (250 + 26), 12 * (250 + 26))),
        (3, 4, 4, (2 * (250 + 125), 2 * (250 + 26), 12 * (250 + 26))),
        (2, 4, 4, (2 * 750, 2 * (250 + 26), 12 * (250 + 26))),
    ],
)
def test_bytes_by_hand(stage: int, world: int, experts: int, expected: tuple[int, int, int]) -> None:
    memory = state_memory(
        [EXPERTS, DENSE], bytes_per_weight=2, zero_stage=stage, world_size=world, expert_parallel_size=experts
    )
    assert memory == StateMemory(*expected, host=0)


def test_offload_moves_to_the_host() -> None:
    memory = partial(
        state_memory, [EXPERTS, DENSE], bytes_per_weight=4, zero_stage=3, world_size=2, expert_parallel_size=1
    )
    plain = memory()
    optimizer = memory(offloads_optimizer=True)
    assert optimizer == StateMemory(plain.weights, plain.gradients, 0, plain.optimizer)
    both = memory(offloads_optimizer=True, offloads_weights=True)
    assert both == StateMemory(0, plain.gradients, 0, plain.optimizer + plain.weights)
