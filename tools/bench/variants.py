"""The list of what is compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from bench import layers, rivals
from bench.layers import BenchLayer
from bench.problem import Problem

DENSE = "dense"
Computes = Literal["dense", "top_k", "ltdr", "dynamic"]


class Named(Protocol):
    """What is chosen by its name."""

    @property
    def name(self) -> str: ...


AnyVariant = TypeVar("AnyVariant", bound=Named)


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One row of the comparison.

    computes: variants that name the same function are held to the same result before anything is timed.
    """

    name: str
    label: str
    build: Callable[[Problem], BenchLayer]
    computes: Computes
    is_ours: bool = False


VARIANTS: tuple[Variant, ...] = (
    Variant(name=DENSE, label="dense FFN of equal activated FLOPs", build=layers.DenseFloor, computes="dense"),
    Variant(name="ours", label="moe_lvlm, top-k", build=layers.ours_top_k, computes="top_k", is_ours=True),
    Variant(name="ours_ltdr", label="moe_lvlm, LTDR", build=layers.ours_long_tail, computes="ltdr", is_ours=True),
    Variant(name="ours_stgc", label="moe_lvlm, STGC", build=layers.ours_conflict, computes="top_k", is_ours=True),
    Variant(
        name="ours_dynamic",
        label="moe_lvlm, top-any (DynMoE), E/2 experts a token on average",
        build=layers.ours_dynamic,
        computes="dynamic",
        is_ours=True,
    ),
    Variant(
        name="ours_ltdr_masked",
        label="LTDR by computing all experts for all tokens",
        build=layers.ours_long_tail_masked,
        computes="ltdr",
    ),
    Variant(
        name="transformers_eager",
        label="transformers, eager experts",
        build=rivals.transformers_eager,
        computes="top_k",
    ),
    Variant(
        name="transformers_grouped_mm",
        label="transformers, grouped_mm experts",
        build=rivals.transformers_grouped_mm,
        computes="top_k",
    ),
    Variant(
        name="deepspeed_dropless",
        label="DeepSpeed AutoEP, loop over experts",
        build=rivals.deepspeed_dropless,
        computes="top_k",
    ),
    Variant(
        name="deepspeed_dropless_grouped",
        label="DeepSpeed AutoEP, grouped kernels",
        build=rivals.deepspeed_dropless_grouped,
        computes="top_k",
    ),
    Variant(
        name="deepspeed_capacity",
        label="DeepSpeed MoE, capacity 1.5",
        build=rivals.DeepSpeedCapacity,
        computes="top_k",
    ),
    Variant(
        name="deepspeed_einsum",
        label="DeepSpeed MoE by einsum, capacity 1.5 (MoE-LLaVA)",
        build=rivals.DeepSpeedEinsum,
        computes="top_k",
    ),
)


def choose(names: str | None) -> tuple[Variant, ...]:
    """The layers that `choose_among` gives of VARIANTS."""
    return choose_among(VARIANTS, names)


def choose_among(variants: tuple[AnyVariant, ...], names: str | None) -> tuple[AnyVariant, ...]:
    """The variants that a comma-separated list names, in their own order, the floor always among them; all without one.

    Raises:
        ValueError: a name that does not exist.
    """
    if names is None:
        return variants
    wanted = {name.strip() for name in names.split(",") if name.strip()}
    known = [variant.name for variant in variants]
    if unknown := sorted(wanted.difference(known)):
        raise ValueError(f"--variants: {', '.join(unknown)}; allowed: {', '.join(known)}")
    return tuple(variant for variant in variants if variant.name in wanted | {DENSE})
