"""Four tasks that contradict one another under one LoRA: same inputs, other answers, told apart by the wording alone.

A prompt is two words and one of eight symbols. Task t answers with the symbol t places further on. Each task has three
wordings, each of a word that only this task uses and one that all tasks use: nothing but the instruction says which answer
is wanted, and it always does. So no task is out of a single LoRA's reach, and with five times the steps of these tests it
learns nearly all of them at once. The frozen decoder was taught to say the symbol, whatever the wording.

B prompts   T tasks
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from moe_lvlm.adapters import attach, look_up, start_adapters
from moe_lvlm.config.adapter import LoRASettings, MoCLESettings
from moe_lvlm.routing import RoutingContext

SEEDS = range(5)
NUM_TASKS, NUM_WORDINGS, NUM_SYMBOLS = 4, 3, 8
STEPS, TEACHING_STEPS, LEARNING_RATE = 60, 30, 4e-2
BOS_ID, ASK_ID, FIRST_SYMBOL = 1, 2, 3
FIRST_WORD = FIRST_SYMBOL + NUM_SYMBOLS
FIRST_SHARED = FIRST_WORD + NUM_TASKS * NUM_WORDINGS
VOCABULARY = FIRST_SHARED + NUM_WORDINGS
WIDTH = 8  # of an embedding of a cluster
RANK, NUM_EXPERTS = 2, 4
LORA: dict[str, Any] = {"target_modules": ("up_proj", "down_proj")}
EXPERTS: dict[str, Any] = LORA | {"rank": RANK, "alpha": 4.0 * RANK, "num_experts": NUM_EXPERTS, "temperature": 0.1}
EXPERTS |= {"num_clusters": NUM_TASKS, "embedding_width": WIDTH}


def single(rank: int) -> LoRASettings:
    """One LoRA of the experts' scale."""
    return LoRASettings(**LORA, rank=rank, alpha=4.0 * rank)


MOCLE = MoCLESettings(**EXPERTS)
DATASET = MoCLESettings(**EXPERTS, gating="dataset")
TOKEN = MoCLESettings(**EXPERTS, gating="token")
SAME_WEIGHTS = single((NUM_EXPERTS + 1) * RANK + 1)  # one more than the experts' ranks, for gates and table
SAME_WORK = single(2 * RANK)  # a sample's expert and the universal one


def prompts() -> tuple[Tensor, Tensor, Tensor]:
    """Token ids [B, 5], answers [B], tasks [B]."""
    ids, answers, tasks = [], [], []
    for task in range(NUM_TASKS):
        for wording in range(NUM_WORDINGS):
            for symbol in range(NUM_SYMBOLS):
                words = (FIRST_WORD + task * NUM_WORDINGS + wording, FIRST_SHARED + wording)
                ids.append((BOS_ID, *words, FIRST_SYMBOL + symbol, ASK_ID))
                answers.append(FIRST_SYMBOL + (symbol + task) % NUM_SYMBOLS)
                tasks.append(task)
    return torch.tensor(ids), torch.tensor(answers), torch.tensor(tasks)


IDS_BS, ANSWER_B, TASK_B = prompts()


def loss_of(model: LlamaForCausalLM, ids_BS: Tensor, answer_B: Tensor, **kwargs: Any) -> Tensor:
    return nn.functional.cross_entropy(model(input_ids=ids_BS, **kwargs).logits[:, -1], answer_B)


@cache
def taught(seed: int) -> dict[str, Tensor]:
    """Weights of a decoder that says the symbol."""
    model = blank(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(TEACHING_STEPS):
        optimizer.zero_grad()
        loss_of(model, IDS_BS, IDS_BS[:, 3]).backward()
        optimizer.step()
    return model.state_dict()


def blank(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 16}
    ids = {"pad_token_id": 0, "bos_token_id": BOS_ID, "eos_token_id": ASK_ID, "use_cache": False}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, initializer_range=0.1, **sizes, **ids))


def context_of(task_B: Tensor, step: int) -> RoutingContext:
    batch = len(task_B)
    context = RoutingContext.all_language((batch, IDS_BS.shape[1]), task_B.device)
    return replace(context, cluster_N=task_B, dataset_N=task_B, draw_N=step * batch + torch.arange(batch))


def adapted(settings: LoRASettings, seed: int) -> tuple[LlamaForCausalLM, list[nn.Parameter]]:
    """The taught decoder with adapters, and what of it is trained. Centres of clusters are far apart, as a sentence
    encoder's are for wordings of different tasks."""
    model = blank(seed)
    model.load_state_dict(taught(seed))
    before = {id(parameter) for parameter in model.parameters()}
    attach(model.model, settings)
    centres = torch.eye(NUM_TASKS, WIDTH) if settings == MOCLE else None
    start_adapters(model.model, settings, centres_KG=centres)
    trained = [parameter for parameter in model.parameters() if id(parameter) not in before]
    return model.requires_grad_(False), [parameter.requires_grad_() for parameter in trained]


@cache
def accuracy(settings: LoRASettings, seed: int, tasks: tuple[int, ...] = tuple(range(NUM_TASKS))) -> float:
    """Share of right answers after STEPS steps on all prompts of these tasks."""
    is_asked_B = torch.isin(TASK_B, torch.tensor(tasks))
    ids_BS, answer_B, task_B = IDS_BS[is_asked_B], ANSWER_B[is_asked_B], TASK_B[is_asked_B]
    model, trained = adapted(settings, seed)
    model.train()
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / 10) * (1 - step / STEPS)
        routing = look_up(model.model, context_of(task_B, step))
        optimizer.zero_grad()
        loss_of(model, ids_BS, answer_B, routing=routing).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        logits_BV = model(input_ids=ids_BS, routing=look_up(model.model, context_of(task_B, 0))).logits[:, -1]
    return float((logits_BV.argmax(dim=-1) == answer_B).float().mean())


def by_seed(settings: LoRASettings) -> list[float]:
    return [accuracy(settings, seed) for seed in SEEDS]


def test_each_task_alone_is_learnt_by_a_single_lora() -> None:
    """So what keeps it from all four is the others."""
    for task in range(NUM_TASKS):
        assert accuracy(SAME_WORK, SEEDS[task], (task,)) > 0.95


def test_mocle_beats_a_single_lora_of_the_same_budget() -> None:
    """Of the same weights and of the same rank in use, in the same steps on the same prompts."""
    counts = [sum(weight.numel() for weight in adapted(one, 0)[1]) for one in (MOCLE, SAME_WEIGHTS)]
    # by hand: up_proj 32 to 64 and down_proj 64 to 32, five LoRAs and a gate each; one table
    assert counts[0] == 2 * (5 * RANK * (32 + 64) + NUM_EXPERTS * WIDTH) + NUM_TASKS * WIDTH
    assert counts[0] <= counts[1] < 1.1 * counts[0]
    ours = by_seed(MOCLE)
    for rival in (SAME_WEIGHTS, SAME_WORK):
        gains = [one - other for one, other in zip(ours, by_seed(rival), strict=True)]
        assert min(gains) > 0.1
        assert fmean(gains) > 0.25


def test_gates_by_cluster_and_by_dataset_beat_gates_by_token() -> None:
    by_token = by_seed(TOKEN)
    for settings in (MOCLE, DATASET):
        gains = [one - other for one, other in zip(by_seed(settings), by_token, strict=True)]
        assert min(gains) > 0
        assert fmean(gains) > 0.2
