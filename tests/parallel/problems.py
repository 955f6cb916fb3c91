"""Training problems small enough to be solved twice: in DeepSpeed engines, and by a plain loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.data.collator import Batch, Collator
from moe_lvlm.data.sample import Sample
from moe_lvlm.models.llava import MoELlavaForConditionalGeneration
from moe_lvlm.models.packed_attention import attend_within_samples
from moe_lvlm.models.upcycle import as_moe_llava
from moe_lvlm.moe.upcycle import moe_layers
from moe_lvlm.training.trainable import select_trainable
from tests.tiny_models import IMAGE_ID, IMAGE_TOKENS, PAD_ID, tiny_llava, tiny_moe_llava, tiny_sample

NUM_EXPERTS = 4
FAVOURED = 2  # experts that a starved problem uses: 0 and 1
# The same expert sees many tokens or one; a small norm makes sure that clipping happens in every step.
CLIP = 0.2
LEARNING_RATE = 1e-2
WEIGHT_DECAY = 0.1
# Far above rounding: where a gradient is 0 but for rounding, Adam's first step would otherwise be the sign of an error.
EPS = 1e-3

Shape = tuple[int, int]  # images and words of one sample
MicroBatch = tuple[Shape, ...]
TEXT: MicroBatch = ((0, 9), (0, 6))
ONE_IMAGE: MicroBatch = ((1, 5), (1, 8))
TWO_IMAGES: MicroBatch = ((2, 4), (1, 7))
BOTH: MicroBatch = ((0, 7), (1, 5))
NOTHING: MicroBatch = ()

# layout -> the micro-batches of each step; rank r of w takes numbers r, r + w, ...
LAYOUTS: dict[str, tuple[tuple[MicroBatch, ...], ...]] = {
    "mixed": (
        (BOTH, ONE_IMAGE, TEXT, TWO_IMAGES),
        (ONE_IMAGE, BOTH, TWO_IMAGES, BOTH),
        (TEXT, TWO_IMAGES, BOTH, ONE_IMAGE),
    ),
    # two processes: the first has text only, then the second, then both have both kinds in turn
    "text against images": (
        (TEXT, ONE_IMAGE, TEXT, TWO_IMAGES),
        (TWO_IMAGES, TEXT, ONE_IMAGE, TEXT),
        (TEXT, ONE_IMAGE, ONE_IMAGE, TEXT),
    ),
    # every record of a micro-batch was bad
    "padding only": (
        (BOTH, NOTHING, TWO_IMAGES, ONE_IMAGE),
        (NOTHING, ONE_IMAGE, TEXT, NOTHING),
        (TEXT, BOTH, NOTHING, NOTHING),
    ),
}


# routing -> keys of the mixture's settings, beside or in place of those in `build`
ROUTINGS: dict[str, dict[str, Any]] = {
    "ltdr": {},
    "capacity": {"router": {"kind": "top_k"}, "capacity_factor": 0.7},
    "cosine": {"router": {"kind": "ltdr", "gate": {"kind": "cosine", "projection": 8}}},
    "vision_head": {"router": {"kind": "ltdr", "eea_select": "vision_head"}},
    "instruction_aware": {"router": {"kind": "ltdr", "eea_select": "instruction_aware", "instruction_share": 0.5}},
    "task": {"router": {"kind": "task", "coefficient": 0.1}},
    "cluster": {"router": {"kind": "cluster", "num_clusters": 3, "embedding_width": 8}},
    "instruct": {"router": {"kind": "instruct"}},
    "modality_groups": {"router": {"kind": "modality_groups"}, "balance": {"on": ["vision"], "coefficient": 0.1}},
    "stgc": {"router": {"kind": "stgc", "coefficient": 1.0, "threshold": 0.1}},
    "shared and fine-grained": {"router": {"kind": "top_k"}, "shared_experts": 1, "fine_grained": 2},
}


@dataclass(frozen=True)
class Problem:
    """What is trained on what. is_starved: no token ever chooses the last two of the four experts. routing: a key of
    ROUTINGS. is_packed: each micro-batch is one row without padding."""

    layout: str = "mixed"
    train: tuple[str, ...] = ("moe",)
    family: str = "llama"
    is_sparse: bool = True
    is_starved: bool = False
    num_steps: int = 3
    routing: str = "ltdr"
    is_packed: bool = False

    @property
    def steps(self) -> tuple[tuple[MicroBatch, ...], ...]:
        return LAYOUTS[self.layout][: self.num_steps]


def build(problem: Problem) -> MoELlavaForConditionalGeneration:
    """The whole model in float32, in training mode."""
    if problem.is_sparse:
        few = FAVOURED if problem.is_starved else None
        config = MoEConfig.model_validate(
            {
                "num_experts": NUM_EXPERTS,
                "top_k": 2,
                "router": {"kind": "ltdr", "tail_k": few},
                "balance": {"on": ["language"], "coefficient": 0.1},
            }
            | ROUTINGS[problem.routing]
        )
        torch.manual_seed(0)  # for the routers, which upcycling draws anew
        model = tiny_moe_llava(config, problem.family)
        if problem.routing == "instruction_aware":
            model.set_attn_implementation("eager")  # the one kind of attention that gives its weights
    else:
        model = as_moe_llava(tiny_llava(problem.family))
    if problem.is_starved:
        _starve(model)
    if problem.is_packed:
        attend_within_samples(model.get_decoder())
    select_trainable(model, problem.train)
    model.train()
    return model


@torch.no_grad()
def _starve(model: MoELlavaForConditionalGeneration) -> None:
    """One coordinate of every hidden state is large and positive; the routers' weights on it decide."""
    model.get_input_embeddings().weight[:, 0] += 30
    model.model.multi_modal_projector.linear_2.bias[0] += 30
    for name, layer in moe_layers(model):
        norm = model.get_submodule(name.rpartition(".")[0] + ".post_attention_layernorm")
        norm.weight[0] = 1
        layer.router.gate.weight[:FAVOURED, 0] = 2
        layer.router.gate.weight[FAVOURED:, 0] = -2


def batches(problem: Problem, step: int) -> list[Batch]:
    """All micro-batches of a step, from the real collator."""
    collator = Collator(pad_token_id=PAD_ID, image_token_id=IMAGE_ID, has_task_labels=True, is_packed=problem.is_packed)
    return [
        collator([_sample(shape, seed=100 * step + 10 * number + row) for row, shape in enumerate(micro_batch)])
        for number, micro_batch in enumerate(problem.steps[step])
    ]


def _sample(shape: Shape, *, seed: int) -> Sample:
    images, words = shape
    made = tiny_sample(images, words, num_answer=2 + seed % 3, seed=seed)
    return Sample(
        key=f"tiny/{seed}",
        dataset="tiny",
        task=None,
        input_ids=made.input_ids,
        labels=made.labels,
        instruction=(made.labels == -100) & (made.input_ids != IMAGE_ID),
        pixel_values=made.pixel_values,
        image_tokens=(IMAGE_TOKENS,) * images,
        task_label=None if seed % 3 == 2 else seed % 3,
        cluster=seed % 3,
    )


@dataclass(frozen=True)
class Outcome:
    """losses, norms (before clipping): one a step. parameters: all, by name, after the last step."""

    losses: list[float]
    norms: list[float]
    parameters: dict[str, Tensor]

    @staticmethod
    def of(values: dict[str, Any]) -> Outcome:
        return Outcome(values["losses"], values["norms"], values["parameters"])
