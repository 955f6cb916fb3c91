"""LTDR's TASK: the data's task types steer the routing of their samples.

T tokens   E experts
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lvlm.routing.top_k import TopKRouter
from moe_lvlm.routing.types import RoutingContext, RoutingDecision


class TaskRouter(TopKRouter):
    """Top-k whose scores learn, by `task_loss`, to send samples of task i to expert i (LTDR appendix A.3).

    The task is a fact of training data only: outside training tokens are routed by their scores alone.
    """


def task_loss(decision: RoutingDecision, context: RoutingContext) -> Tensor:
    """Cross entropy between the routing scores of tokens and the task of their sample: mean over tokens with a task.

    0 where no token has one, or outside training, where tasks are not known; with a gradient of 0 rather than none. The
    paper names the labels only; cross entropy on the scores of every token of the sample is our reading. Labels lie
    below the number of experts (recipes are checked for it).
    """
    sample_T = context.sample_T.long()
    task_N = sample_T.new_zeros(0) if context.task_N is None else context.task_N
    if context.task_N is None:
        sample_T = torch.full_like(sample_T, -1)
    labels_N1 = torch.nn.functional.pad(task_N, (0, 1), value=-1)  # the last stands for padding, at index -1
    label_T = labels_N1[sample_T]
    has_task_T = label_T >= 0
    log_probs_TE = decision.logits_RE.log_softmax(dim=-1)
    loss_T = -log_probs_TE.gather(1, label_T.clamp(min=0)[:, None]).squeeze(1)
    return torch.where(has_task_T, loss_T, 0.0).sum() / has_task_T.sum().clamp_min(1)
