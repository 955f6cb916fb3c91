"""A run made ready to answer: its recipe, model and processor, and what turns conversations into prompts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from moe_lvlm.config.load import load_recipe
from moe_lvlm.config.recipe import Recipe
from moe_lvlm.data.mixture import build_samples, needed_data
from moe_lvlm.data.sample import SampleBuilder
from moe_lvlm.data.templates import end_of_turn_id
from moe_lvlm.models.load import load
from moe_lvlm.models.processor import Processor, num_image_tokens

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def run_recipe(run: Path) -> Recipe:
    """The recipe that a run was made by.

    Raises:
        ValueError: the folder or its recipe.yaml is missing, or the recipe is wrong.
    """
    if not run.is_dir():
        raise ValueError(f"{run}: no such folder; a run's folder is expected, such as runs/quickstart")
    if not (run / "recipe.yaml").is_file():
        raise ValueError(f"{run}: not a run's folder, recipe.yaml is missing; `moe-lvlm train` writes it")
    return load_recipe(run / "recipe.yaml")


def choose_device(name: str | None) -> torch.device:
    """The device of this name; None is a GPU if there is one.

    Raises:
        ValueError: no such device here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device: {name!r} cannot be used here ({reason}); allowed: cpu, cuda, cuda:1, ...") from error
    return device


def choose_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    """The type to compute in; None is float32.

    Raises:
        ValueError: another one than float32 and bfloat16.
    """
    if dtype is None:
        return torch.float32
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise ValueError(f"dtype: {dtype!r}; allowed: {', '.join(DTYPES)}")
    return found


@dataclass(frozen=True, slots=True)
class LoadedRun:
    """builder: makes prompts as the run's last stage made its samples. end_ids: tokens that end an answer there."""

    model: PreTrainedModel
    processor: Processor
    builder: SampleBuilder
    end_ids: tuple[int, ...]


def load_run(run: Path, recipe: Recipe, *, device: str | None, dtype: str | torch.dtype | None) -> LoadedRun:
    """Model and processor of a run's newest checkpoint, without launcher and DeepSpeed.

    Raises:
        ValueError: there is no checkpoint, or no such device or type.
    """
    target, computed_in = choose_device(device), choose_dtype(dtype)
    model, processor = load(run, device=target, dtype=computed_in)
    template = recipe.stages[-1].template or recipe.data.template
    builder = build_samples(
        needed_data(recipe.data, model.config.moe_config, model.config.adapter_settings),
        template,
        processor,
        num_image_tokens,
        mixture=recipe.stages[-1].mixture,
        answers_apart=model.config.is_answer_apart,
    )
    end_id = end_of_turn_id(builder.template, processor.tokenizer)
    return LoadedRun(model, processor, builder, () if end_id is None else (end_id,))
