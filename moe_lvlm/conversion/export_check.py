"""Whether an exported folder computes what the trained model computes: both read from disk, on synthetic inputs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, LlavaForConditionalGeneration, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from moe_lvlm.conversion.remote_code import RemoteCode
from moe_lvlm.models.build import build_empty, open_weights
from moe_lvlm.models.config import MoELlavaConfig
from moe_lvlm.models.images import image_size
from moe_lvlm.models.weights import load_weights

# Largest difference of logits that rounding explains, for logits of size 1 (float32).
TOLERANCE = 1e-5
_NEW_TOKENS = 8
_WORDS = ((1, 7), (0, 12), (2, 4), (1, 2))  # images and words of the synthetic samples

Batch = dict[str, Tensor]


class ExportCheckError(ValueError):
    """The exported folder computes something else than the trained model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportCheck:
    """What a check found. Differences are absolute, over all positions but padding, in float32."""

    max_difference: float
    largest_logit: float
    positions: int
    tokens_generated: int


@dataclass(frozen=True, slots=True)
class _Outputs:
    """Of each batch: logits where there is no padding, and generated tokens."""

    logits: list[Tensor]
    generated: list[Tensor]


def check_export(
    source: Path, config: MoELlavaConfig, target: Path, *, dtype: torch.dtype, remote_code: RemoteCode | None
) -> ExportCheck:
    """Compare the model in `source`, built with `config`, with the exported folder `target`; one is loaded at a time.

    Both compute in float32, with weights rounded to `dtype`. Inputs: text alone, and text with images, padded on the
    right and on the left; logits must agree to TOLERANCE (times the largest logit where that is above 1), a native
    export's bit for bit, and greedy generation must give the same tokens.
    remote_code: of a native export; None is a stock one.

    Raises:
        ExportCheckError: they differ.
    """
    batches = synthetic_batches(config)
    ours = _run(lambda: _load_trained(source, config, dtype), batches, config)
    theirs = _run(lambda: _load_exported(target, remote_code, config.default_attention), batches, config)
    difference = max(float((a - b).abs().max()) for a, b in zip(ours.logits, theirs.logits, strict=True))
    largest = max(float(logits.abs().max()) for logits in ours.logits)
    limit = 0.0 if remote_code is not None else TOLERANCE * max(1.0, largest)
    if not difference <= limit:  # so that NaN is caught
        raise ExportCheckError(
            f"{target}: its logits differ from the trained model's by {difference:.3g}; allowed: {limit:.3g}. "
            "Do not use this folder"
        )
    if any(not torch.equal(a, b) for a, b in zip(ours.generated, theirs.generated, strict=True)):
        raise ExportCheckError(f"{target}: greedy generation gives other tokens than the trained model")
    return ExportCheck(
        max_difference=difference,
        largest_logit=largest,
        positions=sum(len(logits) for logits in ours.logits),
        tokens_generated=sum(ids.numel() for ids in ours.generated),
    )


def memory_needed(num_parameters: int) -> int:
    """Bytes that a check takes: one model in float32 at a time, and what reading it takes."""
    return int(1.3 * 4 * num_parameters)


def memory_available() -> int:
    """Bytes of memory that this machine can give, caches of files included where the system tells."""
    facts = Path("/proc/meminfo")
    if facts.is_file():
        for line in facts.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def synthetic_batches(config: MoELlavaConfig) -> list[Batch]:
    """Random words and images: text alone, and mixed with images, padded on the right and on the left."""
    generator = torch.Generator().manual_seed(0)
    texts = [_sample(config, 0, words, generator) for _, words in _WORDS]
    mixed = [_sample(config, images, words, generator) for images, words in _WORDS]
    num_images = sum(images for images, _ in _WORDS)
    height, width = image_size(config.vision_config)
    pixels = torch.randn(num_images, config.vision_config.num_channels, height, width, generator=generator)
    batches = [
        _pad(texts, side="right"),
        _pad(mixed, side="right") | {"pixel_values": pixels},
        _pad(mixed, side="left") | {"pixel_values": pixels},
    ]
    return [batch | _prompt_facts(config, batch) for batch in batches]


def _prompt_facts(config: MoELlavaConfig, batch: Batch) -> Batch:
    """What routers and gates want to know of a batch: all words are the instruction, and all of the first cluster."""
    is_word = (batch["attention_mask"] == 1) & (batch["input_ids"] != config.image_token_id)
    first = torch.zeros(len(is_word), dtype=torch.int64)
    facts = {"instruction_mask": is_word.long(), "cluster_ids": first, "dataset_ids": first}
    return {name: fact for name, fact in facts.items() if name in config.prompt_facts}


def _sample(config: MoELlavaConfig, images: int, words: int, generator: torch.Generator) -> Tensor:
    """Token ids [S]: images first, then words, none of them the image token."""
    ids = torch.randint(0, config.text_config.vocab_size - 1, (words,), generator=generator)
    ids += ids >= config.image_token_id
    return torch.cat((torch.full((images * config.image_seq_length,), config.image_token_id), ids))


def _pad(samples: Sequence[Tensor], *, side: str) -> Batch:
    length = max(map(len, samples))
    input_ids = torch.zeros(len(samples), length, dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(samples):
        place = slice(0, len(ids)) if side == "right" else slice(length - len(ids), length)
        input_ids[row, place], mask[row, place] = ids, 1
    return {"input_ids": input_ids, "attention_mask": mask}


def _load_trained(source: Path, config: MoELlavaConfig, dtype: torch.dtype) -> PreTrainedModel:
    config._attn_implementation = config.default_attention
    model = build_empty(config)
    load_weights(model, open_weights(source), dtype=dtype)
    return model.float().eval()


def _load_exported(target: Path, remote_code: RemoteCode | None, attention: str) -> PreTrainedModel:
    """As plain transformers loads it. Its auto classes would take this package's class instead of the folder's code."""
    if remote_code is None:
        model_class = LlavaForConditionalGeneration
    else:
        reference = remote_code.auto_map["AutoModelForImageTextToText"]
        model_class = get_class_from_dynamic_module(reference, str(target))
    model, found = model_class.from_pretrained(
        target, dtype=torch.float32, attn_implementation=attention, output_loading_info=True
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found[problem]:
            raise ExportCheckError(f"{target}: {problem.replace('_', ' ')}: {sorted(map(str, found[problem]))[:5]}")
    return model.eval()


@torch.inference_mode()
def _run(load: Callable[[], PreTrainedModel], batches: Sequence[Batch], config: MoELlavaConfig) -> _Outputs:
    model = load()
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=_NEW_TOKENS,
        min_new_tokens=_NEW_TOKENS,
        pad_token_id=0,
        eos_token_id=0,
        suppress_tokens=[config.image_token_id],
    )
    outputs = _Outputs([], [])
    for batch in batches:
        is_token = batch["attention_mask"].bool()
        outputs.logits.append(model(**batch).logits[is_token])
        if bool(is_token[:, -1].all()):  # generation goes on at the right end, where no padding may stand
            outputs.generated.append(model.generate(**batch, generation_config=settings))
    return outputs
