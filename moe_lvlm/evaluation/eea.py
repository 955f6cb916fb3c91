"""What LTDR's extra experts for vision tail tokens (EEA) do to a trained model: it is run with them and without.

B batch   S sequence   T tokens   P answer positions   V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaProcessor

from moe_lvlm.analysis.measures import site_name
from moe_lvlm.config.load import load_recipe
from moe_lvlm.config.moe import LongTailRouterSettings
from moe_lvlm.config.recipe import Recipe, StageSettings
from moe_lvlm.data.collator import Collator
from moe_lvlm.data.sample import IGNORED_LABEL
from moe_lvlm.data.templates import end_of_turn_id
from moe_lvlm.evaluation.eea_samples import LookedAt, NoSamplesError, Samples, find_samples
from moe_lvlm.evaluation.generation import generate_ids
from moe_lvlm.evaluation.loaded import choose_device
from moe_lvlm.evaluation.metrics import exact_match
from moe_lvlm.models.build import build_empty
from moe_lvlm.models.llava import MoELlavaForConditionalGeneration
from moe_lvlm.models.load import CHECKPOINTS, find_model, load
from moe_lvlm.routing.eea import without_eea
from moe_lvlm.routing.trace import RoutingTrace
from moe_lvlm.routing.types import LANGUAGE_MODEL, Modality, Site


def measure_eea(
    path: str | Path,
    *,
    num_samples: int = 32,
    records: Path | None = None,
    image_root: Path | None = None,
    batch_size: int = 8,
    max_new_tokens: int = 32,
    device: str | None = None,
) -> dict[str, Any]:
    """A report, of plain JSON types, on what changes when EEA is switched off.

    path: a run, one of its checkpoints, or a model folder. The samples are those of `records`, else of the run's
    evaluation sets, else of its training mixture (`eea_samples.find_samples`). Without data, `samples` is None and
    `reason` says why. Computed in float32. Else the report holds: tail_share, the share of vision tokens in the tail by
    layer (None without a vision token); rows_per_token, expert rows a token takes in a MoE layer, on average; logits, at
    the positions that answers are predicted from: absolute differences over [P, V], KL(with, without), the share of
    equal greedy tokens; answers: greedily generated ones that differ, and exact match on evaluation sets, else None.

    Raises:
        ValueError: no such model, or one without EEA; num_samples below 1; records that cannot be read.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples: {num_samples}; at least 1 is needed")
    model, processor = load(path, device=choose_device(device))
    without = with_eea_off(model)
    recipe, stage = _recipe_of(find_model(path)[0])
    try:
        samples = find_samples(
            recipe, stage, processor,
            count=num_samples, records=records, image_root=image_root, max_new_tokens=max_new_tokens,
        )  # fmt: skip
    except NoSamplesError as error:
        return {"samples": None, "reason": str(error)}
    moe = model.config.moe_config
    assert moe is not None and isinstance(moe.router, LongTailRouterSettings)
    comparison = _Comparison(model, without, top_k=moe.top_k)
    collator = Collator.for_processor(processor)
    for start in range(0, len(samples.found), batch_size):
        comparison.update(collator, samples.found[start : start + batch_size])
    return {
        "samples": len(samples.found),
        "source": samples.source,
        "skipped": samples.skipped,
        "top_k": moe.top_k,
        "tail_k": moe.router.tail_k or moe.num_experts,
        **comparison.summary(),
        "answers": _compare_answers(model, without, processor, samples, batch_size=batch_size),
    }


def with_eea_off(model: MoELlavaForConditionalGeneration) -> MoELlavaForConditionalGeneration:
    """A second model on the same weights, without EEA; nothing is copied.

    Raises:
        ValueError: the model has no EEA.
    """
    config = model.config.with_moe(without_eea(model.config.moe_config))
    config._attn_implementation = model.config._attn_implementation
    twin = build_empty(config)
    twin.load_state_dict(model.state_dict(), assign=True)
    twin.tie_weights()
    twin.generation_config = model.generation_config
    return twin.to(model.device).eval()


def _recipe_of(folder: Path) -> tuple[Recipe | None, StageSettings | None]:
    """The recipe of the run that a checkpoint or a model folder lies in, and the stage that wrote it."""
    is_checkpoint = folder.absolute().parent.name == CHECKPOINTS
    run = folder.absolute().parent.parent if is_checkpoint else folder
    if not (run / "recipe.yaml").is_file():
        return None, None
    recipe = load_recipe(run / "recipe.yaml")
    name = folder.name.rpartition("-")[0]
    written = [stage for stage in recipe.stages if is_checkpoint and stage.name == name]
    return recipe, written[0] if written else recipe.stages[-1]


class _Comparison:
    """Sums over batches of what differs between a model and its twin."""

    def __init__(
        self, model: MoELlavaForConditionalGeneration, without: MoELlavaForConditionalGeneration, *, top_k: int
    ) -> None:
        self._model, self._without, self._top_k = model, without, top_k
        self._tail: dict[Site, int] = {}
        self._rows = {"with_eea": 0, "without_eea": 0, "vision_with_eea": 0, "vision_without_eea": 0}
        self._tokens = self._vision = 0
        self._sum_abs = self._max_abs = self._sum_kl = self._max_kl = 0.0
        self._positions = self._values = self._equal = 0

    @torch.inference_mode()
    def update(self, collator: Collator, items: Sequence[LookedAt]) -> None:
        """Run both on one batch."""
        batch: dict[str, Any] = dict(collator([item.sample for item in items]))
        labels_BS = batch.pop("labels")
        device = self._model.device
        batch = {name: value.to(device) for name, value in batch.items()}
        one = self._model(**batch, output_routing=True, use_cache=False)
        other = self._without(**batch, output_routing=True, use_cache=False)
        is_answer_BS = (labels_BS[:, 1:] != IGNORED_LABEL).to(device)
        self._add_logits(one.logits[:, :-1][is_answer_BS], other.logits[:, :-1][is_answer_BS])
        self._add_routing(one.routing, other.routing)

    def _add_logits(self, with_PV: Tensor, without_PV: Tensor) -> None:
        difference_PV = (with_PV - without_PV).abs()
        self._sum_abs += float(difference_PV.double().sum())
        self._max_abs = max(self._max_abs, float(difference_PV.max()))
        log_with_PV, log_without_PV = (x.double().log_softmax(dim=-1) for x in (with_PV, without_PV))
        kl_P = (log_with_PV.exp() * (log_with_PV - log_without_PV)).sum(dim=-1)
        self._sum_kl += float(kl_P.sum())
        self._max_kl = max(self._max_kl, float(kl_P.max()))
        self._equal += int((with_PV.argmax(dim=-1) == without_PV.argmax(dim=-1)).sum())
        self._positions += len(kl_P)
        self._values += difference_PV.numel()

    def _add_routing(self, with_eea: RoutingTrace, without: RoutingTrace) -> None:
        modality_T = with_eea.context.modality_T
        is_vision_T = modality_T == int(Modality.VISION)
        self._tokens += int((modality_T != int(Modality.PADDING)).sum())
        self._vision += int(is_vision_T.sum())
        for name, trace in (("with_eea", with_eea), ("without_eea", without)):
            for site, decision in trace.of(LANGUAGE_MODEL):
                rows_T = decision.keep_RK.sum(dim=-1)
                self._rows[name] += int(rows_T.sum())
                self._rows[f"vision_{name}"] += int(rows_T[is_vision_T].sum())
                if name == "with_eea":
                    tail = int((rows_T > self._top_k).sum())
                    self._tail[site] = self._tail.get(site, 0) + tail

    def summary(self) -> dict[str, Any]:
        """Means over everything."""
        places, vision_places = (tokens * len(self._tail) for tokens in (self._tokens, self._vision))
        return {
            "tail_share": {site_name(site): _share(count, self._vision) for site, count in self._tail.items()},
            "rows_per_token": {
                name: _share(rows, vision_places if name.startswith("vision") else places)
                for name, rows in self._rows.items()
            },
            "logits": {
                "positions": self._positions,
                "mean_abs": self._sum_abs / self._values,
                "max_abs": self._max_abs,
                "mean_kl": self._sum_kl / self._positions,
                "max_kl": self._max_kl,
                "greedy_agreement": self._equal / self._positions,
            },
        }


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _compare_answers(
    model: MoELlavaForConditionalGeneration,
    without: MoELlavaForConditionalGeneration,
    processor: LlavaProcessor,
    samples: Samples,
    *,
    batch_size: int,
) -> dict[str, Any]:
    tokenizer = processor.tokenizer
    end_id = end_of_turn_id(samples.builder.template, tokenizer)

    def answers(one: MoELlavaForConditionalGeneration) -> list[list[int]]:
        generated: list[list[int]] = [[] for _ in samples.found]
        for length in sorted({item.max_new_tokens for item in samples.found}):
            chosen = [index for index, item in enumerate(samples.found) if item.max_new_tokens == length]
            found = generate_ids(
                one, tokenizer, [samples.found[index].prompt for index in chosen],
                batch_size=batch_size, max_new_tokens=length, end_ids=() if end_id is None else (end_id,),
            )  # fmt: skip
            for index, ids in zip(chosen, found, strict=True):
                generated[index] = ids
        return generated

    def score(generated: Sequence[Sequence[int]]) -> float:
        correct = [
            exact_match(tokenizer.decode(ids, skip_special_tokens=True).strip(), item.answer)
            for ids, item in zip(generated, samples.found, strict=True)
            if item.is_scored
        ]
        return sum(correct) / len(correct)

    with_eea, without_it = answers(model), answers(without)
    is_scored = any(item.is_scored for item in samples.found)
    return {
        "generated": len(with_eea),
        "different": sum(a != b for a, b in zip(with_eea, without_it, strict=True)),
        "exact_match": {"with_eea": score(with_eea), "without_eea": score(without_it)} if is_scored else None,
    }
