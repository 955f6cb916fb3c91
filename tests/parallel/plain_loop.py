"""The expected values: a plain PyTorch loop over the whole model, without DeepSpeed and without any group."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from moe_lvlm.data.collator import Batch
from moe_lvlm.models.llava import MoELlavaForConditionalGeneration
from tests.parallel.problems import CLIP, EPS, LEARNING_RATE, WEIGHT_DECAY, Outcome, Problem, batches, build


@cache
def solve(problem: Problem) -> Outcome:
    """Losses, norms and parameters on one process."""
    model = build(problem)
    optimizer = torch.optim.AdamW(groups(model), lr=LEARNING_RATE, eps=EPS)
    losses, norms = [], []
    for step in range(problem.num_steps):
        optimizer.zero_grad()
        loss = step_loss(model, batches(problem, step))
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        assert norms[-1] > 2 * CLIP, f"{problem}: clipping must be active, the norm is {norms[-1]}"
        optimizer.step()
        losses.append(loss)
    return Outcome(losses, norms, {name: p.detach().clone() for name, p in model.named_parameters()})


def step_loss(model: MoELlavaForConditionalGeneration, micro_batches: list[Batch]) -> float:
    """Forward and backward of a step as SPEC section 4 has it: token losses summed over the micro-batches and divided
    by the step's supervised tokens, plus the mean of the micro-batches' balance losses."""
    supervised = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in micro_batches)
    total = 0.0
    logits: list[Tensor] = []
    heard = model.lm_head.register_forward_hook(lambda _, inputs, output: logits.append(output))
    for batch in micro_batches:
        output = model(**batch)
        loss = _token_losses(logits.pop(), batch["labels"]) / supervised
        if output.balance_loss is not None:
            loss = loss + output.balance_loss / len(micro_batches)
        loss.backward()
        total += loss.item()
    heard.remove()
    return total


def _token_losses(logits_nV: Tensor, labels: Tensor) -> Tensor:
    """Sum over the supervised tokens. logits_nV: of the positions before them, in the order of the batch."""
    following = labels[:, 1:]
    return cross_entropy(logits_nV, following[following != -100], reduction="sum")


def groups(model: nn.Module) -> list[dict]:
    """Weight decay for matrices; none for norms and biases, stacked biases of experts among them."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = [p for name, p in trained if p.dim() == 1 or name.rpartition(".")[2] in ("b1", "b2", "b3")]
    matrices = [p for _, p in trained if not any(p is other for other in plain)]
    return [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
