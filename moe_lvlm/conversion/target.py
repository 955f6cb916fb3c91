"""What a conversion must give: the names and shapes of the model that its configuration describes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_lvlm.checkpoint.source import LazySource, LazyTensor, WeightSource
from moe_lvlm.models.build import VLM, build_empty
from moe_lvlm.models.instructblip_config import VLMConfig

# Prefix of a name -> what stands there instead; the first that fits is taken.
Rules = Sequence[tuple[str, str]]

# Names of LLaVA: ours, which are transformers' own, and those on disk, before and since transformers 5.
LLAVA_RULES: Rules = (
    ("model.language_model.", "language_model."),
    ("model.vision_tower.vision_model.", "vision_tower."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("language_model.model.", "language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("vision_tower.vision_model.", "vision_tower."),
)

# What earlier versions of transformers stored, and what is computed from the configuration today.
_COMPUTED = (".embeddings.position_ids", ".rotary_emb.inv_freq")


@dataclass(frozen=True, slots=True)
class Target:
    """A model on meta tensors. shapes: of all that is stored of it. tied: names that share another one's tensor."""

    model: VLM
    shapes: Mapping[str, tuple[int, ...]]
    tied: frozenset[str]

    def complete(self, tensors: Mapping[str, LazyTensor]) -> LazySource:
        """These tensors in the model's order, if they are exactly the model's.

        Raises:
            ValueError: tensors that are missing, misshapen, or that the model has no place for; all are named.
        """
        wrong = [
            f"{name} is {list(tensors[name].shape)}, the model needs {list(shape)}"
            for name, shape in self.shapes.items()
            if name in tensors and tensors[name].shape != shape
        ]
        problems = {
            "missing": [name for name in self.shapes if name not in tensors],
            "unexpected": sorted(tensors.keys() - self.shapes.keys()),
            "misshapen": wrong,
        }
        if any(problems.values()):
            parts = [f"{len(names)} {kind}: {_some(names)}" for kind, names in problems.items() if names]
            raise ValueError(f"the weights are not those of {self._words()}; {'; '.join(parts)}")
        return LazySource({name: tensors[name] for name in self.shapes})

    def adopt(
        self,
        source: WeightSource,
        rules: Rules,
        *,
        is_wanted: Callable[[str], bool] = lambda name: True,
        own_rules: Rules = LLAVA_RULES,
    ) -> dict[str, LazyTensor]:
        """A source's tensors under the model's names. One without a place keeps its name, for `complete` to name it.

        rules: from the source's names to the common ones. own_rules: from the model's names to the common ones.

        Raises:
            ValueError: two tensors of the source have the same place.
        """
        ours = {renamed(name, own_rules): name for name in (*self.shapes, *self.tied)}
        came_from: dict[str, str] = {}
        for name in source.names():
            common = renamed(name, rules)
            place = ours.get(common, name)
            if not is_wanted(name) or place in self.tied or (common not in ours and name.endswith(_COMPUTED)):
                continue
            if place in came_from:
                raise ValueError(f"{name} and {came_from[place]} of the source are both {place}")
            came_from[place] = name
        return {place: LazyTensor.from_source(source, name) for place, name in came_from.items()}

    def _words(self) -> str:
        config = self.model.config
        kind = "dense" if config.moe_config is None else "sparse"
        return f"the {kind} model that the configuration describes ({config.text_config.model_type})"


def build_target(config: VLMConfig) -> Target:
    """The model of a configuration, without its weights.

    Raises:
        ValueError: a decoder layer that cannot become sparse, or settings that do not fit the model.
    """
    with torch.random.fork_rng(devices=[]):  # even on meta tensors, initialisation moves the generator on
        model = build_empty(config)
    tied = frozenset(model.all_tied_weights_keys or {})
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    return Target(model, shapes, tied)


def renamed(name: str, rules: Rules) -> str:
    """A name after the first rule that fits it."""
    for prefix, replacement in rules:
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    return name


def with_rows(tensor: LazyTensor, rows: Tensor) -> LazyTensor:
    """A tensor with these rows below its own, in its own type."""
    num_old = tensor.num_rows

    def read(start: int, stop: int) -> Tensor:
        pieces = [rows[max(start - num_old, 0) : max(stop - num_old, 0)].to(tensor.dtype)]
        if start < num_old:
            pieces.insert(0, tensor.read(start, min(stop, num_old)))
        return torch.cat(pieces)

    return LazyTensor(shape=(num_old + rows.shape[0], *tensor.shape[1:]), dtype=tensor.dtype, read=read)


class LastRead:
    """Keeps the last tensor that was computed whole, since the writer asks for it a few rows at a time."""

    def __init__(self) -> None:
        self._name: str | None = None
        self._tensor: Tensor | None = None

    def __call__(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """The tensor of that name; `compute` is called unless it was the last one."""
        if self._tensor is None or name != self._name:
            self._tensor = None  # gone before the next one comes
            self._name, self._tensor = name, compute()
        return self._tensor


def _some(names: Iterable[str]) -> str:
    shown = list(names)
    return ", ".join(shown[:8]) + (f", and {len(shown) - 8} more" if len(shown) > 8 else "")
