"""Typed settings of low-rank adapters in a language model: one LoRA, or LoRA experts chosen by a gate (MoCLE)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, field_validator, model_validator

from moe_lvlm.config.base import Settings

Gating = Literal["cluster", "dataset", "sentence", "token"]


class LoRASettings(Settings):
    """One LoRA on each of some linear layers of the language model, which is frozen beside it.

    target_modules: names of linear layers as they end (`q_proj`, `mlp.up_proj`), or `re:<regular expression>` on whole
        names.
    rank, alpha, dropout: as PEFT has them; the output is scaled by alpha / rank, by alpha / sqrt(rank) with `rslora`.
    start_from: a PEFT adapter's folder that the LoRA (every expert) begins as; None draws A as PEFT does, and B is 0.
    """

    kind: Literal["lora"] = "lora"
    target_modules: tuple[str, ...] = Field(default=("q_proj", "v_proj"), min_length=1)
    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    rslora: bool = False
    start_from: str | None = None

    @field_validator("target_modules", mode="before")
    @classmethod
    def _take_lists(cls, value: Any) -> Any:
        # a recipe's `model` is no longer JSON when its defaults are filled in, and only JSON's lists are tuples
        return tuple(value) if isinstance(value, list) else value

    @property
    def scale(self) -> float:
        """What a LoRA's output is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


class MoCLESettings(LoRASettings):
    """LoRA experts behind a gate, and a universal expert that takes what the gate leaves (MoCLE eq. 1 to 3).

    num_experts: without the universal one. has_universal: whether there is one, with the weight 1 - G_max (eq. 3);
        without it the output is eq. 2's.
    top_k: experts of a sample; above 1 only without a universal expert.
    gating: what a gate reads. `cluster`: the learnable embedding of the instruction's cluster, one table for all layers
        that starts at the centres (`data.clusters`); `dataset`: the same with a row a dataset of the mixture, which starts
        anywhere; `sentence`: the mean hidden state of the sample's instruction tokens at the input of the linear;
        `token`: each token's hidden state there.
    temperature: tau. noise: standard deviation of the noise on scores in training; None is 1/sqrt(num_experts).
    num_clusters, embedding_width: rows and width of the table of `cluster` and `dataset`; the width is the sentence
        encoder's. Data with fewer clusters (or datasets) than rows is fine.
    compat: `paper`, or `released`: what the authors' public code computes (a table a layer, a bias in the gate, noise of
        0.1, the gate applied twice, its softmax in the type of the weights).
    """

    kind: Literal["mocle"] = "mocle"  # type: ignore[assignment]
    num_experts: int = Field(default=4, ge=1)
    has_universal: bool = True
    top_k: int = Field(default=1, ge=1)
    gating: Gating = "cluster"
    temperature: float = Field(default=0.05, gt=0)
    noise: float | None = Field(default=None, ge=0)
    num_clusters: int = Field(default=64, ge=1)
    embedding_width: int = Field(default=384, ge=1)
    compat: Literal["paper", "released"] = "paper"

    @model_validator(mode="after")
    def _check_choice(self) -> MoCLESettings:
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k: {self.top_k} is above num_experts ({self.num_experts}); allowed: 1 to num_experts"
            )
        if self.has_universal and self.top_k > 1:
            raise ValueError(f"top_k: {self.top_k} beside a universal expert; allowed: 1, or has_universal: false")
        if self.compat == "released" and self.gating != "cluster":
            raise ValueError(f"compat: released is for gating cluster, which is {self.gating}")
        return self

    @property
    def reads_table(self) -> bool:
        """Whether gates read rows of a table."""
        return self.gating in ("cluster", "dataset")

    @property
    def prompt_facts(self) -> frozenset[str]:
        """What a forward pass must be told of the prompt besides its tokens: `instruction_mask`, `cluster_ids`,
        `dataset_ids`, or nothing."""
        named = {"cluster": "cluster_ids", "dataset": "dataset_ids", "sentence": "instruction_mask"}
        return frozenset({named[self.gating]} if self.gating in named else ())

    @property
    def has_shared_table(self) -> bool:
        """Whether that is one table for all layers."""
        return self.reads_table and self.compat == "paper"

    @property
    def noise_std(self) -> float:
        """The standard deviation that is used."""
        if self.compat == "released" and self.noise is None:
            return 0.1
        return self.num_experts**-0.5 if self.noise is None else self.noise


Adapter = Annotated[LoRASettings | MoCLESettings, Field(discriminator="kind")]


def read_adapter(fields: Mapping[str, Any]) -> LoRASettings | MoCLESettings:
    """The settings that a model's configuration holds as a mapping."""
    return TypeAdapter(Adapter).validate_python(dict(fields))
