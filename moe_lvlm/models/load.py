"""A trained model and its processor from a folder; no launcher, no GPU and no DeepSpeed needed."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from transformers import GenerationConfig, LlavaProcessor

from moe_lvlm.checkpoint.source import open_source
from moe_lvlm.checkpoint.verify import newest_valid
from moe_lvlm.data.packs import resolve
from moe_lvlm.models.build import build_empty, config_of, is_plain_llava, load_plain_llava
from moe_lvlm.models.llava import MoELlavaForConditionalGeneration
from moe_lvlm.models.processor import load_processor
from moe_lvlm.models.weights import load_weights

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
PROCESSOR = "processor"


def load(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
) -> tuple[MoELlavaForConditionalGeneration, LlavaProcessor]:
    """The model, in evaluation mode, and its processor.

    path: a run's folder (its newest valid checkpoint), one checkpoint of a run, or a folder written by
        `save_pretrained` that holds the processor too (plain LLaVA folders load as dense models).
    attention: None is sdpa, or eager where a router reads attention weights.

    Raises:
        ValueError: none of these, or a folder with a missing, unexpected or misshapen tensor; nothing is left random.
    """
    model_folder, processor_folder = find_model(path)
    if is_plain_llava(model_folder):
        model = load_plain_llava(model_folder, dtype=dtype, attention=attention or "sdpa")
    else:
        config = config_of(model_folder)
        config._attn_implementation = attention or config.default_attention
        model = build_empty(config)
        load_weights(model, open_source(model_folder), device=device, dtype=dtype)
    processor = load_processor(processor_folder)
    tokenizer = processor.tokenizer
    model.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return model.to(device).eval(), processor


def find_model(path: str | Path) -> tuple[Path, Path]:
    """(folder with config and weights, folder with the processor) of a run, a checkpoint or a model folder.

    Raises:
        ValueError: the folder is none of these.
    """
    folder = resolve(path)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; allowed: a run, a checkpoint of a run, or a saved model")
    if (folder / CHECKPOINTS).is_dir():
        newest = newest_valid(folder / CHECKPOINTS, logger.warning)
        if newest is None:
            raise ValueError(f"{folder}: a run without a valid checkpoint in {CHECKPOINTS}/; train it first")
        return newest, folder / PROCESSOR
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: neither a run ({CHECKPOINTS}/) nor a model (config.json)")
    if folder.parent.name == CHECKPOINTS and (folder.parent.parent / PROCESSOR).is_dir():
        return folder, folder.parent.parent / PROCESSOR
    return folder, folder
