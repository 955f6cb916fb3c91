"""Typed settings of what stands between the vision tower and the language model."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from moe_lvlm.config.base import Settings


class PartSettings(Settings):
    """A pretrained part (`from_pretrained`: a folder, a hub name, or `package:<pack>/<folder>`) or a new one
    (`from_config`: keys of its transformers config, `model_type` among them; random weights)."""

    from_pretrained: str | None = None
    from_config: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_one(self) -> PartSettings:
        if (self.from_pretrained is None) == (self.from_config is None):
            raise ValueError("give exactly one of from_pretrained and from_config")
        return self


class MLPConnectorSettings(Settings):
    """LLaVA's two-layer projector."""

    kind: Literal["mlp"] = "mlp"
    activation: str = "gelu"
    bias: bool = True


class QFormerConnectorSettings(Settings):
    """InstructBLIP's Q-Former: learned queries and the instruction's words look at the image together.

    qformer: where it comes from, beside a causal language model: an InstructBLIP or BLIP-2 folder (queries and Q-Former
        are taken, the projection into the language model is new), or keys of transformers' InstructBlipQFormerConfig
        (model_type is not needed). None where `model.from_pretrained` brings it.
    text_from: an InstructBLIP folder whose word embeddings and text FFNs a BLIP-2 Q-Former takes, which has none.
    num_queries: visual tokens of an image; None is what `qformer` or `model.from_pretrained` has, 32 for a new one.
    tokenizer: of the Q-Former's text, a folder, a hub name or `package:...`; None takes the one that comes with it.
    max_text_length: tokens of that text; more are cut off on the right (LAVIS' number).
    dropout: of hidden states and attention in the Q-Former; None is what its configuration says (BERT's 0.1).
    """

    kind: Literal["qformer"] = "qformer"
    qformer: PartSettings | None = None
    text_from: str | None = None
    num_queries: int | None = Field(default=None, ge=1)
    tokenizer: str | None = None
    max_text_length: int = Field(default=128, ge=2)
    dropout: float | None = Field(default=None, ge=0, lt=1)


class ExpertSettings(Settings):
    """The Task Experts Blocks of Q-MoE's top layers, and how a path through them is chosen.

    num_experts, has_general_expert: expert FFNs of a block, and whether one more that every sample passes stands beside
        them (gate 1, outside the softmax).
    num_layers: how many of the Q-Former's top layers hold a block.
    router: `cross` (Q-MoE eq. 2, 3), or `pre`, `post`, `cls` (suppl. eq. 1 to 4).
    selection: `path` is ExpertPath, the beam search over layers (algorithm 1); `greedy` takes each layer's best expert.
    num_paths: K, paths that are kept from layer to layer.
    normalize_output: divide a block's output by the sum of the gates used, so that a connector of equal experts is the
        plain Q-Former.
    noise: standard deviation of the noise on routing scores in training; None is 1/sqrt(num_experts).
    importance_coefficient: of the importance loss (eq. 7, 9, 10).
    """

    num_experts: int = Field(default=3, ge=1)
    has_general_expert: bool = True
    num_layers: int = Field(default=6, ge=1)
    router: Literal["cross", "pre", "post", "cls"] = "cross"
    selection: Literal["path", "greedy"] = "path"
    num_paths: int = Field(default=3, ge=1)
    normalize_output: bool = False
    noise: float | None = Field(default=None, ge=0)
    importance_coefficient: float = Field(default=0.01, ge=0)

    @property
    def noise_std(self) -> float:
        """The standard deviation that is used."""
        return self.num_experts**-0.5 if self.noise is None else self.noise


class QMoEConnectorSettings(QFormerConnectorSettings):
    """Q-MoE: a Q-Former whose top layers hold task experts, each begun as a copy of its layer's query FFN."""

    kind: Literal["qmoe"] = "qmoe"  # type: ignore[assignment]
    experts: ExpertSettings = ExpertSettings()


Connector = Annotated[
    MLPConnectorSettings | QFormerConnectorSettings | QMoEConnectorSettings, Field(discriminator="kind")
]
