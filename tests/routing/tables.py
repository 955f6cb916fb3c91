"""Tokens whose routing was worked by hand.

Four experts, a gate that is the identity, and hidden states that are the logarithms of the probabilities wanted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.routing.build import build_router
from moe_lvlm.routing.router import Router
from moe_lvlm.routing.types import Modality, RoutingContext

PAD, LANG, VIS = Modality.PADDING, Modality.LANGUAGE, Modality.VISION

# name: probabilities            # RPV by hand: mean of (p - 1/4)^2
A = (0.40, 0.30, 0.20, 0.10)  # (.0225 + .0025 + .0025 + .0225) / 4 = .0125
B = (0.10, 0.10, 0.70, 0.10)  # (3 x .0225 + .2025) / 4             = .0675
C = (0.25, 0.25, 0.25, 0.25)  #                                       0
D = (0.05, 0.55, 0.05, 0.35)  # (.04 + .09 + .04 + .01) / 4         = .0450
E = (0.20, 0.20, 0.30, 0.30)  # 4 x .0025 / 4                       = .0025
F = (0.60, 0.20, 0.10, 0.10)  # (.1225 + .0025 + 2 x .0225) / 4     = .0425
G = (0.97, 0.01, 0.01, 0.01)  # (.5184 + 3 x .0576) / 4             = .1728
H = (0.10, 0.20, 0.30, 0.40)  # as A                                = .0125

RPV = {"A": 0.0125, "B": 0.0675, "C": 0.0, "D": 0.045, "E": 0.0025, "F": 0.0425, "G": 0.1728, "H": 0.0125}

# Two samples, one image each: image 0 is A, C, E; image 1 is B, D, F; G and H are language.
# The padding holds the most decided distribution, so that it would be tail, and would be counted, if it were seen.
TOKENS = (G, A, C, E, G, B, D, F, H, G)
NAMES = "GACE_BDFH_"
MODALITIES = (LANG, VIS, VIS, VIS, PAD, VIS, VIS, VIS, LANG, PAD)
IMAGES = (-1, 0, 0, 0, -1, 1, 1, 1, -1, -1)
SAMPLES = (0, 0, 0, 0, -1, 1, 1, 1, 1, -1)

# router settings -> slots a token, of six experts and top 2
ROWS: list[tuple[dict[str, Any], int]] = [
    ({"kind": "top_k"}, 2),
    ({"kind": "top_k", "gate": {"kind": "cosine", "projection": 8}}, 2),
    ({"kind": "top_k", "second_choice_noise": "gumbel"}, 2),
    ({"kind": "ltdr"}, 6),
    ({"kind": "ltdr", "tail_k": 3, "tail_scope": "image"}, 3),
    ({"kind": "ltdr", "eea_select": "none"}, 2),
    ({"kind": "ltdr", "eea_select": "vision_head"}, 6),
    ({"kind": "ltdr", "eea_select": "instruction_aware"}, 6),
    ({"kind": "task"}, 2),
    ({"kind": "cluster", "num_clusters": 5, "embedding_width": 12}, 2),
    ({"kind": "instruct"}, 2),
    ({"kind": "modality_groups", "vision_experts": 3}, 2),
    ({"kind": "dynamic"}, 6),
    ({"kind": "dynamic", "initial_experts": 4, "temperature": 0.1}, 6),
    ({"kind": "stgc"}, 2),
]


def hidden_of(*tokens: tuple[float, ...]) -> Tensor:
    """Hidden states [T, 4] that the identity gate turns into these probabilities."""
    return torch.tensor(tokens).log()


def context_of(
    modalities: tuple[int, ...], images: tuple[int, ...], samples: tuple[int, ...], rows: int
) -> RoutingContext:
    """A context of `rows` rows."""
    return RoutingContext(
        modality_BS=torch.tensor([int(modality) for modality in modalities], dtype=torch.int8).view(rows, -1),
        image_BS=torch.tensor(images, dtype=torch.int32).view(rows, -1),
        sample_BS=torch.tensor(samples, dtype=torch.int32).view(rows, -1),
    )


def table_context() -> RoutingContext:
    return context_of(MODALITIES, IMAGES, SAMPLES, rows=2)


def language_context(num_tokens: int) -> RoutingContext:
    return RoutingContext.all_language((1, num_tokens), torch.device("cpu"))


def identity_router(*, top_k: int = 2, **router: Any) -> Router:
    """A router of four experts over hidden states of width 4, whose gate is the identity."""
    config = MoEConfig.model_validate({"num_experts": 4, "top_k": top_k, "router": {"kind": "top_k"} | router})
    made = build_router(model_width=4, config=config)
    with torch.no_grad():
        made.gate.weight.copy_(torch.eye(4))
    return made


def names_where(mask_T: Tensor) -> str:
    """Names of the tokens of the table that are marked."""
    return "".join(name for name, is_marked in zip(NAMES, mask_T.tolist(), strict=True) if is_marked)
