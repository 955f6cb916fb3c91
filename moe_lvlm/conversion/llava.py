"""LLaVA-1.5 becomes a dense model of ours: out of the original layout, or out of transformers' own.

Original (`LlavaLlamaForCausalLM`): a flat configuration, `model.layers...`, `model.mm_projector.{0,2}`, the tower
elsewhere; `original.py` says what becomes of the image token. Transformers' (`llava-hf`): nested, and `language_model.
model.layers...` or, since transformers 5, `model.language_model.layers...`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moe_lvlm.checkpoint.source import LazySource
from moe_lvlm.conversion.folder import Converted, open_model, read_config
from moe_lvlm.conversion.original import OriginalModel, OriginalOptions, open_original, text_config_dict
from moe_lvlm.conversion.target import build_target
from moe_lvlm.data.packs import resolve
from moe_lvlm.models.config import MoELlavaConfig

FAMILIES = {"llava_llama": "llama", "llava": "llama", "llava_mistral": "mistral"}


def from_llava(path: str | Path, options: OriginalOptions) -> Converted:
    """A folder in either layout as our dense model.

    Raises:
        ValueError: another layout, or a model that its configuration does not describe.
    """
    folder = resolve(path)
    fields = read_config(folder)
    if "text_config" in fields:
        if fields.get("model_type") != "llava":
            raise ValueError(f"{folder}: model_type {fields.get('model_type')!r}; allowed: llava")
        return _from_transformers(folder)
    if "moe" in fields:
        raise ValueError(f"{folder}: a sparse model in MoE-LLaVA's layout: convert it with `moe-llava`")
    if "mm_vision_tower" not in fields and "mm_hidden_size" not in fields:
        raise ValueError(f"{folder}: neither text_config nor mm_vision_tower in its config.json, so it is no LLaVA")
    return _from_original(folder, options)


def _from_transformers(folder: Path) -> Converted:
    opened = open_model(folder)
    target = build_target(opened.config)
    weights = target.complete(target.adopt(opened.weights, ()))
    return Converted(config=opened.config, weights=weights, processor=opened.processor, before=opened.config.to_dict())


def _from_original(folder: Path, options: OriginalOptions) -> Converted:
    original = open_original(
        folder,
        families=FAMILIES,
        tower_key="mm_vision_tower",
        projector_keys=("mm_projector_type",),
        renames={},
        options=options,
    )
    config, processor = original.build_config()
    config, weights = original_weights(config, original)
    return Converted(
        config=config,
        weights=weights,
        processor=processor,
        before={"text_config": text_config_dict(original.text)},
        notes=tuple(preprocessing_notes(original)),
    )


def original_weights(config: MoELlavaConfig, original: OriginalModel) -> tuple[MoELlavaConfig, LazySource]:
    """Its weights under our names."""
    target = build_target(config)
    return config, target.complete(original.tensors(target))


def preprocessing_notes(original: OriginalModel) -> Iterator[str]:
    """What the original does around its model, and ours does not.

    Raises:
        ValueError: image features that are put together in another way than one tower pass an image.
    """
    fields, folder = original.fields, original.folder
    ratio = fields.get("image_aspect_ratio")
    if ratio == "anyres" or fields.get("mm_patch_merge_type", "flat") != "flat":
        raise ValueError(f"{folder}: image_aspect_ratio {ratio!r} (LLaVA-NeXT) is not supported; allowed: square, pad")
    if ratio == "pad":
        yield "image_aspect_ratio: pad: images were padded to squares; the image processor here crops them to the centre"
    if fields.get("mm_use_im_start_end"):
        yield "mm_use_im_start_end: prompts had <im_start> and <im_end> around an image; a chat template must give them"
    if original.options.tokenizer is None:
        yield "the tokenizer brings no chat template: train and ask with data.chat_template: vicuna_v1, or your own"
