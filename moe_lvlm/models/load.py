"""A trained model and its processor from a folder; no launcher, no GPU and no DeepSpeed needed."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from transformers import GenerationConfig

from moe_lvlm.checkpoint.verify import newest_valid
from moe_lvlm.config.connector import QFormerConnectorSettings
from moe_lvlm.data.packs import resolve
from moe_lvlm.models.blip import is_published
from moe_lvlm.models.build import VLM, build_empty, config_of, is_plain_llava, load_plain_llava, open_weights
from moe_lvlm.models.processor import Processor, load_blip_processor, load_processor
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
) -> tuple[VLM, Processor]:
    """The model, in evaluation mode, and its processor.

    path: a run's folder (its newest valid checkpoint), one checkpoint of a run, or a folder written by
        `save_pretrained` that holds the processor too (plain LLaVA and InstructBLIP folders load as models without
        experts).
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
        load_weights(model, open_weights(model_folder), device=device, dtype=dtype)
    processor = read_processor(processor_folder)
    tokenizer = processor.tokenizer
    model.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return model.to(device).eval(), processor


def read_processor(folder: Path, connector: QFormerConnectorSettings | None = None) -> Processor:
    """The processor in a folder of ours, or of a published model. connector: a recipe's, which may bring the tokenizer.

    Raises:
        ValueError: there is none.
    """
    if is_published(folder):
        return load_blip_processor(folder, connector)
    return load_processor(folder)


def find_model(path: str | Path) -> tuple[Path, Path]:
    """(folder with config and weights, folder with the processor) of a run, a checkpoint or a model folder.

    Raises:
        ValueError: the folder is none of these.
    """
    folder = resolve(path)
    if not folder.is_dir():
        raise ValueError(
            f"{folder}: no such folder; allowed: a run, a checkpoint of a run, or a saved model "
            "(in the layout of LLaVA, InstructBLIP or BLIP-2)"
        )
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
