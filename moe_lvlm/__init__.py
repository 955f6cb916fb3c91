"""Mixture-of-experts vision-language models: routing by modality, expert parallelism, one readable recipe a run.

`import moe_lvlm` is light: what needs torch is imported when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_lvlm.config.load import load_recipe as load_recipe
    from moe_lvlm.config.moe import MoEConfig as MoEConfig
    from moe_lvlm.config.recipe import Recipe as Recipe
    from moe_lvlm.evaluation.runner import evaluate as evaluate
    from moe_lvlm.models.load import load as load
    from moe_lvlm.models.upcycle import upcycle as upcycle
    from moe_lvlm.training.run import train as train

__version__ = "0.1.0"

_HOMES = {
    "MoEConfig": "moe_lvlm.config.moe",
    "Recipe": "moe_lvlm.config.recipe",
    "load_recipe": "moe_lvlm.config.load",
    "upcycle": "moe_lvlm.models.upcycle",
    "load": "moe_lvlm.models.load",
    "train": "moe_lvlm.training.run",
    "evaluate": "moe_lvlm.evaluation.runner",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'moe_lvlm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
