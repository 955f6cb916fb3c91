"""The settings of a run as its report shows them, out of the recipe as it was written."""

from __future__ import annotations

from typing import Any

_PARTS = (("Vision tower", "vision_tower"), ("Language model", "language_model"))


def settings_rows(recipe: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of the table of settings: those that the recipe has."""
    model, moe = recipe.get("model") or {}, recipe.get("moe") or {}
    router, balance = moe.get("router") or {}, moe.get("balance") or {}
    train, parallel = recipe.get("train") or {}, recipe.get("parallel") or {}
    is_upcycled = any(stage.get("upcycle") for stage in recipe.get("stages") or [])
    rows = [("Model", model.get("from_pretrained") or None)]
    rows += [(title, _part(model.get(key))) for title, key in _PARTS]
    connector = model.get("connector") or {}
    rows.append(("Connector", _connector(connector)))
    if is_upcycled:
        rows += [
            ("Experts", f"{moe.get('num_experts')}, {_choice(moe)}, layers: {text_of(moe.get('layers'))}"),
            ("Router", _router(router)),
            ("Balance loss", f"{balance.get('coefficient')} on {text_of(balance.get('on')) or 'nothing'}"),
        ]
    elif connector.get("kind") == "qmoe":
        rows.append(("Experts", "in the connector only: no stage says upcycle, the language model is dense"))
    else:
        rows.append(("Experts", "none: no stage says upcycle, the model is dense"))
    if model.get("adapter"):
        is_adapted = any(stage.get("adapt") for stage in recipe.get("stages") or [])
        rows.append(("Adapter", _adapter(model["adapter"]) if is_adapted else "none: no stage says adapt"))
    rows += [
        ("Parallel", f"DeepSpeed {parallel.get('deepspeed')}, expert parallel {parallel.get('expert_parallel_size')}"),
        ("Precision", train.get("precision")),
        ("Seed", recipe.get("seed")),
    ]
    return [(title, str(value)) for title, value in rows if value is not None]


def _choice(moe: dict[str, Any]) -> str:
    is_dynamic = (moe.get("router") or {}).get("kind") == "dynamic"
    return "any number a token" if is_dynamic else f"top {moe.get('top_k')}"


def _part(part: dict[str, Any] | None) -> str | None:
    """Where a part of the model comes from."""
    if not part:
        return None
    if part.get("from_pretrained"):
        return str(part["from_pretrained"])
    config = part.get("from_config") or {}
    return f"new, from a config ({config.get('model_type', 'no model_type')})"


def _connector(connector: dict[str, Any]) -> str | None:
    """Its kind, and the experts of a Q-MoE."""
    kind = connector.get("kind")
    if kind != "qmoe":
        return {"mlp": "MLP", "qformer": "Q-Former"}.get(str(kind), kind)
    experts = connector.get("experts") or {}
    general = " and a general one" if experts.get("has_general_expert") else ""
    path = "greedy" if experts.get("selection") == "greedy" else f"by path, {experts.get('num_paths')} kept"
    return (
        f"Q-MoE: {experts.get('num_experts')} experts{general} in the top {experts.get('num_layers')} layers, router "
        f"{experts.get('router')}, chosen {path}"
    )


def _adapter(adapter: dict[str, Any]) -> str:
    """A LoRA, or LoRA experts and what their gate reads."""
    low_rank = f"rank {adapter.get('rank')}, alpha {adapter.get('alpha')}, on {text_of(adapter.get('target_modules'))}"
    if adapter.get("kind") != "mocle":
        return f"LoRA, {low_rank}"
    universal = " and a universal one" if adapter.get("has_universal") else f", top {adapter.get('top_k')}"
    rows = f" ({adapter.get('num_clusters')} rows)" if adapter.get("gating") in ("cluster", "dataset") else ""
    return (
        f"MoCLE: {adapter.get('num_experts')} LoRA experts{universal}, {low_rank}; gates by "
        f"{adapter.get('gating')}{rows}, temperature {adapter.get('temperature')}"
    )


def _router(router: dict[str, Any]) -> str:
    details = [f"{key} {value}" for key, value in router.items() if key in ("tail_k", "tail_scope", "eea_select")]
    return ", ".join([str(router.get("kind")), *(text.replace("tail_k None", "tail_k all") for text in details)])


def text_of(value: Any) -> str:
    """A list as its items, anything else as it is."""
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
