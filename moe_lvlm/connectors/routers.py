"""Q-MoE's routers: the scores of a Task Experts Block's experts, before noise and softmax.

A router is a module of its own call, so that ZeRO-3 gathers its parameter. Scores are float32 whatever the type of the
weights, and float64 in a float64 model.

R rows (each path of each sample)   E experts   Q queries   D width
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ConnectorRouter(nn.Module):
    """weight: [outputs, D], drawn from N(0, 0.02); `outputs` is E, or 1 where one vector scores every expert."""

    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(self.count_outputs(num_experts), width))
        self.reset_parameters()

    def count_outputs(self, num_experts: int) -> int:
        """Rows of the weight."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Draw the weight anew from torch's generator."""
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x_RQD: Tensor, expert_out_REQD: Tensor, cls_RD: Tensor) -> Tensor:
        """Scores [R, E].

        x_RQD: the queries that the experts get. expert_out_REQD: what each makes of them, f_i(x). cls_RD: the text
        FFN's output at the first word, [CLS].
        """
        dtype = torch.promote_types(x_RQD.dtype, torch.float32)
        with torch.autocast(x_RQD.device.type, enabled=False):
            return self.score(x_RQD.to(dtype), expert_out_REQD.to(dtype), cls_RD.to(dtype), self.weight.to(dtype))

    def score(self, x_RQD: Tensor, expert_out_REQD: Tensor, cls_RD: Tensor, weight: Tensor) -> Tensor:
        """Scores [R, E]; everything has the type of the scores."""
        raise NotImplementedError


class CrossRouter(ConnectorRouter):
    """W_g c_i with c_i = softmax(h_CLS f_i(x)^T / sqrt(D)) f_i(x) (Q-MoE eq. 2, 3)."""

    def count_outputs(self, num_experts: int) -> int:
        return 1

    def score(self, x_RQD: Tensor, expert_out_REQD: Tensor, cls_RD: Tensor, weight: Tensor) -> Tensor:
        similarity_REQ = torch.einsum("rd,reqd->req", cls_RD, expert_out_REQD) * cls_RD.shape[-1] ** -0.5
        # W_g and the sum over queries change places: c_i itself is never needed.
        value_REQ = torch.einsum("reqd,d->req", expert_out_REQD, weight[0])
        return (similarity_REQ.softmax(dim=-1) * value_REQ).sum(dim=-1)


class PreRouter(ConnectorRouter):
    """W_v mean(x) (suppl. eq. 1). The mean over queries is ours: the paper scores one x and has Q of them."""

    def count_outputs(self, num_experts: int) -> int:
        return num_experts

    def score(self, x_RQD: Tensor, expert_out_REQD: Tensor, cls_RD: Tensor, weight: Tensor) -> Tensor:
        return nn.functional.linear(x_RQD.mean(dim=1), weight)


class PostRouter(ConnectorRouter):
    """W_p mean(f_i(x)) (suppl. eq. 2, 3)."""

    def count_outputs(self, num_experts: int) -> int:
        return 1

    def score(self, x_RQD: Tensor, expert_out_REQD: Tensor, cls_RD: Tensor, weight: Tensor) -> Tensor:
        return expert_out_REQD.mean(dim=2) @ weight[0]


class ClsRouter(ConnectorRouter):
    """W_c h_CLS (suppl. eq. 4). The paper has W_c in R^(D x 1), which would score all experts alike; ours is D x E."""

    def count_outputs(self, num_experts: int) -> int:
        return num_experts

    def score(self, x_RQD: Tensor, expert_out_REQD: Tensor, cls_RD: Tensor, weight: Tensor) -> Tensor:
        return nn.functional.linear(cls_RD, weight)


ROUTERS: dict[str, type[ConnectorRouter]] = {
    "cross": CrossRouter,
    "pre": PreRouter,
    "post": PostRouter,
    "cls": ClsRouter,
}
