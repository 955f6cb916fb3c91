"""A Q-MoE in training: on ranks that share a batch, and in a plain loop that has it whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from moe_lvlm.config.connector import ExpertSettings
from moe_lvlm.models.instructblip import MoEInstructBlipForConditionalGeneration
from moe_lvlm.parallel.process_group import join_world
from moe_lvlm.routing.types import RoutingContext
from moe_lvlm.training.trainable import select_trainable
from tests.parallel.jobs import run_steps, start_training
from tests.parallel.plain_loop import groups
from tests.parallel.problems import CLIP, EPS, LEARNING_RATE, Outcome
from tests.tiny_models import IMAGE_ID, NUM_QUERIES, blip_batch, blip_rows, tiny_moe_blip

NUM_STEPS = 3
COEFFICIENT = 0.3


@dataclass(frozen=True)
class Case:
    """text: the language model. router, selection: of the connector. has_text_only: in each step the last micro-batch
    has no image."""

    text: str = "llama"
    router: str = "cross"
    selection: str = "path"
    has_text_only: bool = False
    world: int = 2
    zero: int = 2
    precision: str = "fp32"
    has_checkpointing: bool = False


def build(case: Case) -> MoEInstructBlipForConditionalGeneration:
    """A connector in training, tower and language model frozen."""
    settings = ExpertSettings.model_validate(
        {
            "num_layers": 2,
            "router": case.router,
            "selection": case.selection,
            "importance_coefficient": COEFFICIENT,
        }
    )
    model = tiny_moe_blip(settings, case.text)
    select_trainable(model, ("connector",))
    return model.train()


def micro_batches(case: Case, step: int) -> list[dict[str, Any]]:
    """Two micro-batches of two samples, cut from one batch of four, which one process has whole."""
    whole = blip_batch(case.text, seed=step)
    if case.world == 1:
        return [whole]
    first, second = blip_rows(whole, 0, 2), blip_rows(whole, 2, 4)
    return [first, _without_images(case, second) if case.has_text_only else second]


def train(case: Case) -> dict[str, Any]:
    """`Outcome`'s fields."""
    world = join_world()
    engine = start_training(
        build(case),
        world,
        num_micro_batches=case.world,
        zero=case.zero,
        expert_parallel_size=1,
        precision=case.precision,
        has_checkpointing=case.has_checkpointing,
    )
    return run_steps(engine, world, [micro_batches(case, step) for step in range(NUM_STEPS)])


@cache
def solve(case: Case) -> Outcome:
    """The same on one process: token losses over the supervised tokens of the step, and the importance loss of all its
    samples together, from its formula (Q-MoE eq. 9, 10)."""
    model = build(case)
    optimizer = torch.optim.AdamW(groups(model), lr=LEARNING_RATE, eps=EPS)
    losses, norms = [], []
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        loss = _step_loss(model, micro_batches(case, step))
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
        losses.append(loss.item())
    return Outcome(losses, norms, {name: p.detach().clone() for name, p in model.named_parameters()})


def _step_loss(model: MoEInstructBlipForConditionalGeneration, batches: Sequence[dict[str, Any]]) -> Tensor:
    supervised = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    tokens = torch.zeros(())
    importance: dict[int, Tensor] = {}
    logits: list[Tensor] = []
    head = model.language_model.get_output_embeddings()
    heard = head.register_forward_hook(lambda _, inputs, output: logits.append(output))
    for batch in batches:
        output = model(**batch, output_routing=True)
        following, computed = batch["labels"][:, 1:], logits.pop()
        if output.logits is None:  # the head of a decoder-only model: the columns in which any row has a loss
            following = following[:, (following != -100).any(dim=0)]
        else:
            computed = computed[:, :-1]
        tokens = tokens + cross_entropy(computed.flatten(0, 1), following.flatten(), ignore_index=-100, reduction="sum")
        if "pixel_values" in batch:
            for site, decision in output.routing.items():
                importance[site.layer] = importance.get(site.layer, 0) + decision.probs_RE.sum(dim=0)
    heard.remove()
    variations = [((one - one.mean()) ** 2).mean() / one.mean() ** 2 for one in importance.values()]
    return tokens / supervised + COEFFICIENT * torch.stack(variations).mean()


def _without_images(case: Case, batch: dict[str, Any]) -> dict[str, Any]:
    """The words alone. No query of a sample's image is left, so its positions are cut off."""
    context: RoutingContext = batch["routing"]
    assert (batch["input_ids"][:, :NUM_QUERIES] == IMAGE_ID).all()
    words = slice(NUM_QUERIES, None)
    return {
        "input_ids": batch["input_ids"][:, words],
        "attention_mask": batch["attention_mask"][:, words],
        "labels": batch["labels"] if case.text == "t5" else batch["labels"][:, words],
        "routing": replace(
            context,
            modality_BS=context.modality_BS[:, words],
            image_BS=context.image_BS[:, words],
            sample_BS=context.sample_BS[:, words],
        ),
    }
