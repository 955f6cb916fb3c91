"""Whether what an export of adapters wrote computes what the trained model computes, for every row of its gates.

B batch   S sequence   P last positions   I inputs, O outputs of a linear   r rank
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_lvlm.checkpoint.source import WeightSource
from moe_lvlm.config.adapter import LoRASettings, MoCLESettings
from moe_lvlm.conversion.adapter_base import AdapterBase
from moe_lvlm.conversion.export_check import TOLERANCE, ExportCheckError
from moe_lvlm.models.build import build_empty
from moe_lvlm.models.config import MoELlavaConfig
from moe_lvlm.models.images import image_size
from moe_lvlm.models.instructblip_config import VLMConfig
from moe_lvlm.models.weights import load_weights, replace_parameter

_WORDS = (12, 5)  # of the synthetic samples, one image each
_QFORMER_WORDS = 4
_LAST = 4  # positions that are compared: those of all rows are kept at once
# How many steps of the written type, times the largest logit, rounding may move a logit by; in float32 it is TOLERANCE
_STEPS = 16

Batch = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterCheck:
    """Largest absolute difference of logits over all that was compared, the largest logit, and how many rows of the
    gates (1 for a single LoRA) were compared."""

    max_difference: float
    largest_logit: float
    rows: int


class TrainedLogits:
    """Logits of the trained model in float32 at the last positions of a synthetic batch, by row of its gates.

    source: its weights; where those of the base are exported in another type, they are rounded to it first.
    """

    @torch.inference_mode()
    def __init__(self, config: VLMConfig, source: WeightSource, base: AdapterBase, rows: tuple[int, ...]) -> None:
        self.batch = synthetic_batch(config, has_images=base.form == "vlm")
        config._attn_implementation = config.default_attention
        model = build_empty(config)
        load_weights(model, source)
        model.eval()
        settings = config.adapter_settings
        assert settings is not None
        self.by_row = {
            row: _last_logits(model, self.batch | _row_facts(settings, row, len(self.batch["input_ids"])))
            for row in rows or (None,)
        }

    def compare(self, found: dict[int | None, Tensor], *, dtype: torch.dtype, what: Path) -> AdapterCheck:
        """Compare with logits of what was exported in `dtype`, by row.

        Raises:
            ExportCheckError: they differ by more than rounding explains.
        """
        difference = max(float((logits - self.by_row[row]).abs().max()) for row, logits in found.items())
        largest = max(float(logits.abs().max()) for logits in self.by_row.values())
        step = TOLERANCE if dtype == torch.float32 else _STEPS * torch.finfo(dtype).eps
        limit = step * max(1.0, largest)
        if not difference <= limit:  # so that NaN is caught
            raise ExportCheckError(
                f"{what}: with it the base's logits differ from the trained model's by {difference:.3g}; allowed: "
                f"{limit:.3g}. Do not use this folder"
            )
        return AdapterCheck(max_difference=difference, largest_logit=largest, rows=len(found))


@torch.inference_mode()
def logits_with_adapters(
    model: PreTrainedModel, batch: Batch, folders: dict[Path, tuple[int | None, ...]]
) -> dict[int | None, Tensor]:
    """Logits of a base under each written adapter, by the rows that it stands for."""
    found: dict[int | None, Tensor] = {}
    for folder, rows in folders.items():
        with _put_on(model, folder):
            found |= dict.fromkeys(rows, _last_logits(model, batch))
    return found


@torch.inference_mode()
def logits_of_base(model: PreTrainedModel, batch: Batch) -> Tensor:
    """[B, P, words] of a model without adapters."""
    return _last_logits(model, batch)


def build_base(base: AdapterBase, weights: WeightSource) -> PreTrainedModel:
    """The base in float32 with weights under its names in memory.

    Raises:
        ValueError: a weight that is missing, or that it has no place for.
    """
    base.config._attn_implementation = "sdpa"
    with init_empty_weights(include_buffers=False):
        model = base.new_model()
    tied = set(model.all_tied_weights_keys or {})
    left = set(weights.names())
    for owner, module in model.named_modules():
        for leaf in list(module._parameters):
            name = f"{owner}.{leaf}" if owner else leaf
            if module._parameters[leaf] is None or name in tied:
                continue
            if name not in left:
                raise ValueError(f"{name}: {base.architecture} has it, the exported base does not")
            left.remove(name)
            replace_parameter(module, leaf, weights.read(name).float())
    if left - tied:
        raise ValueError(f"{base.architecture} has no place for {', '.join(sorted(left - tied)[:5])}")
    model.tie_weights()
    return model.eval()


def load_base(base: AdapterBase, folder: Path) -> PreTrainedModel:
    """A written base as plain transformers loads it, in float32.

    Raises:
        ExportCheckError: a tensor is missing or has no place.
    """
    model, found = base.auto_class.from_pretrained(  # type: ignore[attr-defined]
        folder, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found[problem]:
            raise ExportCheckError(f"{folder}: {problem.replace('_', ' ')}: {sorted(map(str, found[problem]))[:5]}")
    return model.eval()


@contextmanager
def _put_on(model: PreTrainedModel, folder: Path) -> Iterator[None]:
    """The files of an adapter act as PEFT has it, on exactly the modules that they name."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    rank = config["r"]
    scale = config["lora_alpha"] / (rank**0.5 if config["use_rslora"] else rank)
    tensors = load_file(folder / "adapter_model.safetensors")
    hooks = []
    try:
        for key, a_rI in tensors.items():
            name, is_a, _ = key.removeprefix("base_model.model.").partition(".lora_A.weight")
            if is_a:
                b_Or = tensors[key.replace(".lora_A.", ".lora_B.")]
                hook = _adding(a_rI.float(), b_Or.float(), scale)
                hooks.append(model.get_submodule(name).register_forward_hook(hook))
        yield
    finally:
        for handle in hooks:
            handle.remove()


def _adding(a_rI: Tensor, b_Or: Tensor, scale: float) -> Any:
    def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + (args[0] @ a_rI.T) @ b_Or.T * scale

    return add


def _last_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    return model(**batch).logits[:, -_LAST:].float()


def _row_facts(settings: LoRASettings, row: int | None, batch: int) -> Batch:
    if not isinstance(settings, MoCLESettings) or row is None:
        return {}
    (name,) = settings.prompt_facts
    return {name: torch.full((batch,), row)}


def synthetic_batch(config: VLMConfig, *, has_images: bool) -> Batch:
    """Random words, behind an image each if asked for, padded on the left."""
    generator = torch.Generator().manual_seed(0)
    image_id, image_length = config.image_token_id, 0
    if has_images:
        image_length = config.image_seq_length if isinstance(config, MoELlavaConfig) else config.num_query_tokens
    length = image_length + max(_WORDS)
    input_ids = torch.zeros(len(_WORDS), length, dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    for row, num_words in enumerate(_WORDS):
        words = torch.randint(0, config.text_config.vocab_size - 1, (num_words,), generator=generator)
        ids = torch.cat((torch.full((image_length,), image_id), words + (words >= image_id).long()))
        input_ids[row, length - len(ids) :], mask[row, length - len(ids) :] = ids, 1
    batch = {"input_ids": input_ids, "attention_mask": mask}
    if not has_images:
        return batch
    height, width = image_size(config.vision_config)
    shape = (len(_WORDS), getattr(config.vision_config, "num_channels", 3), height, width)  # InstructBLIP's do not say
    batch["pixel_values"] = torch.randn(shape, generator=generator)
    if not isinstance(config, MoELlavaConfig):
        words = torch.randint(0, config.qformer_config.vocab_size, (len(_WORDS), _QFORMER_WORDS), generator=generator)
        batch |= {"qformer_input_ids": words, "qformer_attention_mask": torch.ones_like(words)}
    return batch
