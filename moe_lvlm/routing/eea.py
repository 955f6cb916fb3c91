"""Whether LTDR's extra experts for vision tail tokens (EEA) are on, and the same settings with them off."""

from __future__ import annotations

from moe_lvlm.config.moe import LongTailRouterSettings, MoEConfig


def has_eea(moe: MoEConfig | None) -> bool:
    """Whether some vision tokens may use more experts than other tokens. None is a dense model."""
    router = None if moe is None else moe.router
    if moe is None or not isinstance(router, LongTailRouterSettings) or router.eea_select == "none":
        return False
    return (router.tail_k or moe.num_experts) > moe.top_k


def without_eea(moe: MoEConfig | None) -> MoEConfig:
    """The same mixture with ordinary top-k.

    Raises:
        ValueError: there is nothing to switch off.
    """
    if moe is None or not has_eea(moe):
        kind = "dense" if moe is None else f"routed by {moe.router.kind} without it"
        raise ValueError(f"EEA cannot be switched off: the model is {kind}; allowed: a model of router ltdr with EEA")
    router = moe.router.model_copy(update={"eea_select": "none"})
    return moe.model_copy(update={"router": router})
