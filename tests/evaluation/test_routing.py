"""Masks on the grid of visual tokens, and prompts in batches, against values worked out by hand."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)

from moe_lvlm.config.adapter import MoCLESettings
from moe_lvlm.config.connector import ExpertSettings
from moe_lvlm.evaluation.generation import Prompt
from moe_lvlm.evaluation.routing import Answered, RoutingCollector, foreground_of, has_patch_tokens, normalisation
from moe_lvlm.models.adapt import adapt
from moe_lvlm.models.config import MoELlavaConfig
from moe_lvlm.models.instructblip_config import MoEInstructBlipConfig
from moe_lvlm.models.upcycle import as_moe_llava
from moe_lvlm.routing.trace import RoutingTrace
from moe_lvlm.routing.types import RoutingContext, RoutingDecision, Site
from tests.analysis.traces import connector_trace
from tests.tiny_models import blip_batch, tiny_moe_blip

from .conftest import IMAGE_TOKENS, TinyPrompt


def processor_of(**keys: Any) -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(crop_size={"height": 8, "width": 8}, **keys)


def test_a_mask_is_stretched_like_its_image() -> None:
    # 16 x 8 pixels become 8 x 8: each patch of 4 x 4 shows 8 rows and 4 columns of the mask
    mask = np.zeros((16, 8), dtype=bool)
    mask[:4, :4] = True
    mask[8:, 4:6] = True
    found = foreground_of(mask, processor_of(size={"height": 8, "width": 8}), patch_size=4)
    assert found.tolist() == pytest.approx([0.5, 0.0, 0.0, 0.5], abs=1e-3)


def test_a_mask_is_cropped_like_its_image() -> None:
    # 16 x 32 becomes 8 x 16, of which the middle 8 columns stay: columns 8 to 24 of the mask
    mask = np.zeros((16, 32), dtype=bool)
    mask[:, :8] = True
    mask[:8, 8:16] = True
    found = foreground_of(mask, processor_of(size={"shortest_edge": 8}), patch_size=4)
    assert found.tolist() == pytest.approx([1.0, 0.0, 0.0, 0.0], abs=1e-3)


def test_normalisation_is_the_image_processor_s() -> None:
    half = processor_of(size={"shortest_edge": 8}, image_mean=[0.1, 0.2, 0.3], image_std=[0.5] * 3)
    assert normalisation(half) == {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5, 0.5)}
    none = processor_of(size={"shortest_edge": 8}, do_normalize=False)
    assert normalisation(none) == {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def test_routing_depends_neither_on_batches_nor_on_their_padding(
    moe_model: PreTrainedModel, processor: Any, prompts: list[TinyPrompt]
) -> None:
    found = []
    for batch_size in (1, 3):
        collector = RoutingCollector(moe_model, processor)
        collector.update([answered(prompt) for prompt in prompts], batch_size=batch_size)
        found.append({site: (part.load.tolist(), part.tokens.tolist()) for site, part in collector.statistics.items()})
    assert found[0] == found[1]
    assert len(found[0]) == 3


def test_a_foreground_of_another_grid_is_refused(
    moe_model: PreTrainedModel, processor: Any, prompts: list[TinyPrompt]
) -> None:
    collector = RoutingCollector(moe_model, processor)
    wrong = answered(prompts[0], np.ones(IMAGE_TOKENS + 1, dtype=np.float32))
    with pytest.raises(ValueError, match="foreground of image 0"):
        collector.update([wrong], batch_size=1)


def test_a_language_model_s_experts_make_no_paths(
    moe_model: PreTrainedModel, processor: Any, prompts: list[TinyPrompt]
) -> None:
    collector = RoutingCollector(moe_model, processor)
    collector.update([answered(prompt) for prompt in prompts], batch_size=4)
    assert len(collector.paths) == 0
    assert len(collector.examples) == 4  # one a prompt with images


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_lora_experts_are_counted_by_task_and_are_no_moe_layers(
    kind: str,
    dense_model: LlavaForConditionalGeneration,
    moe_model: PreTrainedModel,
    processor: Any,
    prompts: list[TinyPrompt],
) -> None:
    model = copy.deepcopy(moe_model) if kind == "moe" else as_moe_llava(copy.deepcopy(dense_model))
    adapt(model, MoCLESettings(gating="token", num_experts=3, rank=2, temperature=0.5), seed=0)
    shake_gates(model)
    items = [answered(prompt, task=("vqa", "caption")[place % 2]) for place, prompt in enumerate(prompts)]
    found = []
    for batch_size in (1, 3):
        collector = RoutingCollector(model, processor)
        collector.update(items, batch_size=batch_size)
        assert collector.adapters is not None
        assert {name: one.samples for name, one in collector.adapters.subsets.items()} == {"vqa": 4, "caption": 3}
        tokens = sum(prompt.input_ids.numel() for prompt in prompts[::2])
        assert collector.adapters.subsets["vqa"].rows_L.tolist() == [tokens] * 6
        found.append({name: one.experts_LE.tolist() for name, one in collector.adapters.subsets.items()})
        # what is said of tokens is said of the MoE layers alone
        assert [site.part for site, _ in collector.statistics.items()] == ["language_model"] * (3 * (kind == "moe"))
        assert len(collector.examples) == (4 if kind == "moe" else 0)
        assert len(collector.paths) == 0
    assert found[0] == found[1]
    assert RoutingCollector(moe_model, processor).adapters is None


def shake_gates(model: PreTrainedModel) -> None:
    """Gates that are sure of themselves: as drawn they hardly tell experts apart."""
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if "gate" in name.split("."):
            parameter.data.add_(torch.randn(parameter.shape, generator=generator))


class RoutedByHand:
    """Stands for a model: its connector sends image after image over the paths it was given, in the order of the batch.

    also: decisions of the language model besides.
    """

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(
        self, config: PreTrainedConfig, paths: list[tuple[int, ...]], also: RoutingTrace | None = None
    ) -> None:
        self.config = config
        self._paths = paths
        self._also = also

    def __call__(self, *, pixel_values: torch.Tensor | None = None, **batch: Any) -> SimpleNamespace:
        num_images = 0 if pixel_values is None else len(pixel_values)
        taken, self._paths = self._paths[:num_images], self._paths[num_images:]
        trace = connector_trace(taken, layers=(4, 5)) if taken else blank_trace()
        if self._also is not None:
            for site, decision in self._also.items():
                trace.record(site, decision)
        return SimpleNamespace(routing=trace)


def blank_trace() -> RoutingTrace:
    """Of words alone: the connector saw the image that stands for none."""
    trace = RoutingTrace(RoutingContext.all_language((1, 3), torch.device("cpu")))
    for site, decision in connector_trace([(0, 0)], layers=(4, 5), keep=[False]).items():
        trace.record(site, decision)
    return trace


def test_paths_are_counted_by_the_task_of_each_image(processor: Any, prompts: list[TinyPrompt]) -> None:
    # the prompts hold 1, 1, 0, 2, 0, 1 and 0 images
    paths = [(0, 1), (2, 2), (1, 1), (1, 0), (0, 1)]
    tasks = ["vqa", "caption", "text", "caption", "text", "vqa", "text"]
    for batch_size in (1, 3, 7):
        model = RoutedByHand(MoELlavaConfig(qformer={}), list(paths))
        collector = RoutingCollector(model, processor)
        items = [answered(prompt, task=task) for prompt, task in zip(prompts, tasks, strict=True)]
        collector.update(items, batch_size=batch_size)
        assert collector.paths.layers == (4, 5)
        assert collector.paths.tasks == ("vqa", "caption")
        assert collector.paths.counts("vqa") == {(0, 1): 2}
        assert collector.paths.counts("caption") == {(2, 2): 1, (1, 1): 1, (1, 0): 1}
        # queries are no patches, and what is routed as a whole has no tokens
        assert len(collector.examples) == 0
        assert len(collector.statistics) == 0


def test_tokens_behind_a_q_former_have_statistics_but_no_examples(processor: Any, prompts: list[TinyPrompt]) -> None:
    # the batch that is routed by hand has an image of two visual tokens, and a word
    probs = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]])
    top = probs.topk(1)
    of_tokens = RoutingTrace(RoutingContext.all_language((1, 3), torch.device("cpu")))
    decision = RoutingDecision(probs.log(), probs, top.indices, top.values, torch.ones(3, 1).bool())
    of_tokens.record(Site("language_model", 0), decision)
    model = RoutedByHand(MoELlavaConfig(qformer={}), [(0, 1)], of_tokens)
    collector = RoutingCollector(model, processor)
    collector.update([answered(prompts[0])], batch_size=1)
    ((site, statistics),) = collector.statistics.items()
    assert site == Site("language_model", 0)
    assert statistics.load.tolist() == [[0, 1], [2, 0]]
    assert len(collector.examples) == 0
    assert len(collector.paths) == 1


@pytest.mark.parametrize("text", ["llama", "t5"])
def test_paths_are_those_of_each_image_alone(text: str, processor: Any) -> None:
    model = tiny_moe_blip(ExpertSettings(num_layers=2), text)
    items: list[Answered] = []
    expected: dict[str, Counter[tuple[int, ...]]] = {}
    for index, row in enumerate(blip_rows(text, num_samples=9)):
        task = ("vqa", "caption")[index % 2]
        prompt = WordedPrompt(row["input_ids"][0], row["pixel_values"], row["qformer_input_ids"][0])
        items.append(answered(prompt, task=task))
        with torch.no_grad():
            trace = model(**row, output_routing=True).routing
        path = tuple(int(trace[Site("connector", layer)].expert_ids_RK) for layer in (2, 3))
        expected.setdefault(task, Counter())[path] += 1
    assert len({path for counts in expected.values() for path in counts}) > 1  # else nothing could be mixed up
    for batch_size in (1, 4):
        collector = RoutingCollector(model, processor)
        collector.update(items, batch_size=batch_size)
        assert {task: collector.paths.counts(task) for task in collector.paths.tasks} == expected
        assert (len(collector.examples), len(collector.statistics)) == (0, 0)


@dataclass(frozen=True)
class WordedPrompt:
    """A prompt with words for the Q-Former."""

    input_ids: torch.Tensor
    pixel_values: torch.Tensor
    connector_ids: torch.Tensor
    cluster: None = None

    @property
    def instruction(self) -> torch.Tensor:
        return torch.ones_like(self.input_ids)


def blip_rows(text: str, *, num_samples: int) -> list[dict[str, torch.Tensor]]:
    """Samples of `blip_batch` one by one, without padding."""
    batch = blip_batch(text, num_samples=num_samples)
    rows = []
    for index in range(num_samples):
        row = {"pixel_values": batch["pixel_values"][index : index + 1]}
        for ids, mask in (("input_ids", "attention_mask"), ("qformer_input_ids", "qformer_attention_mask")):
            row[ids] = batch[ids][index, batch[mask][index].bool()][None]
        rows.append(row)
    return rows


def test_only_llava_s_projector_keeps_patches() -> None:
    assert has_patch_tokens(LlavaConfig())
    assert has_patch_tokens(MoELlavaConfig())
    assert not has_patch_tokens(MoELlavaConfig(qformer={}))
    assert not has_patch_tokens(MoEInstructBlipConfig())


def answered(prompt: Prompt, share: np.ndarray | None = None, *, task: str = "what") -> Answered:
    num_images = 0 if prompt.pixel_values is None else len(prompt.pixel_values)
    return Answered(
        key=str(torch.sum(prompt.input_ids).item()),
        task=task,
        question="what ?",
        answer="cat",
        prediction="dog",
        prompt=prompt,
        foreground=[share] * num_images,
    )
