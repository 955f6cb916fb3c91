"""Folders in other programs' layouts, written by hand: names and configurations as those programs write them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import CLIPImageProcessorPil, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from tests.tiny_models import tiny_llava

SPECIALS = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "<user>", "<assistant>"]
WORDS = ["red", "green", "blue", "what", "color", "is", "it", "?"]
IMAGE_ID = SPECIALS.index("<image>")

Weights = dict[str, Tensor]


def write_tokenizer(folder: Path, *, has_image: bool = True) -> int:
    """A word tokenizer; the number of its tokens. Without the image token it ends where that would be new."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = [token for token in (*SPECIALS, *WORDS) if has_image or token != "<image>"]
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=[token for token in ("<image>", "<user>", "<assistant>") if token in tokens],
    ).save_pretrained(folder)
    return len(tokens)


def tiny_vlm(family: str = "llama", **fields: Any) -> LlavaForConditionalGeneration:
    """A dense LLaVA of transformers whose image token is that of `write_tokenizer`."""
    model = tiny_llava(family, **fields)
    model.config.image_token_index = IMAGE_ID
    return model


def batch() -> dict[str, Tensor]:
    """Two sequences with an image each."""
    images = [IMAGE_ID] * 4
    return {
        "input_ids": torch.tensor([[1, *images, 7, 8, 9, 10], [1, 11, *images, 12, 13, 14]]),
        "pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
    }


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(**batch()).logits
        return result


def write_tower(folder: Path, model: LlavaForConditionalGeneration) -> Path:
    """A whole CLIP, as it is published: the tower below `vision_model.`, a text model and an image processor."""
    folder.mkdir(parents=True, exist_ok=True)
    tower = model.model.vision_tower
    weights = {f"vision_model.{name}": value for name, value in tower.state_dict().items()}
    weights |= {
        "vision_model.embeddings.position_ids": torch.arange(5)[None],
        "text_model.final_layer_norm.weight": torch.ones(8),
        "visual_projection.weight": torch.ones(8, 16),
        "logit_scale": torch.tensor(2.0),
    }
    save_file({name: value.clone() for name, value in weights.items()}, folder / "model.safetensors")
    vision = tower.config.to_dict()
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": vision}, default=str))
    size = {"height": 8, "width": 8}
    CLIPImageProcessorPil(size=size, crop_size=size).save_pretrained(folder)
    return folder


def text_fields(model: LlavaForConditionalGeneration) -> dict[str, Any]:
    """The language model's configuration, flat, under the keys of transformers before 5."""
    text = model.config.text_config.to_dict()
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope["rope_theta"]
    if "partial_rotary_factor" in rope:
        text["partial_rotary_factor"] = rope["partial_rotary_factor"]
    for key in ("model_type", "architectures", "dtype"):
        text.pop(key, None)
    return text


def original_weights(model: LlavaForConditionalGeneration, *, tower: str = "", projector: str) -> Weights:
    """Under the names of LLaVA's first program. tower: the prefix under which it is in the file, if it is."""
    found = {}
    for name, value in model.state_dict().items():
        if name.startswith("model.language_model."):
            found["model." + name.removeprefix("model.language_model.")] = value
        elif name.startswith("model.multi_modal_projector.linear_"):
            index, leaf = name.removeprefix("model.multi_modal_projector.linear_").split(".")
            found[f"{projector}{2 * (int(index) - 1)}.{leaf}"] = value
        elif name.startswith("model.vision_tower."):
            if tower:
                found[tower + name.removeprefix("model.vision_tower.")] = value
        else:
            found[name] = value
    return found


def save_safetensors(folder: Path, weights: Mapping[str, Tensor]) -> None:
    save_file({name: value.clone() for name, value in weights.items()}, folder / "model.safetensors")


def save_bin_shards(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Two shards with their index."""
    names = sorted(weights)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: weights[name].clone() for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_original(
    folder: Path,
    model: LlavaForConditionalGeneration,
    *,
    family: str = "llava_llama",
    tower: Path,
    has_tower: bool = False,
    save: Callable[[Path, Weights], None] = save_safetensors,
    change: Callable[[Weights], None] = lambda weights: None,
    **fields: Any,
) -> Path:
    """LLaVA-1.5 as its first program writes it. fields: over those of its config.json."""
    if not (folder / "tokenizer.json").exists():
        write_tokenizer(folder)
    prefix = "model.vision_tower.vision_tower.vision_model." if has_tower else ""
    weights = original_weights(model, tower=prefix, projector="model.mm_projector.")
    change(weights)
    save(folder, weights)
    config = {
        **text_fields(model),
        "model_type": family,
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_vision_tower": str(tower),
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -1,
        "mm_vision_select_feature": "patch",
        "mm_hidden_size": 16,
        "image_aspect_ratio": "pad",
        **fields,
    }
    (folder / "config.json").write_text(json.dumps(config, default=str))
    return folder


def write_transformers(folder: Path, model: LlavaForConditionalGeneration, *, rename: Callable[[str], str]) -> Path:
    """Transformers' own layout, under any of its names; a processor of the days before it knew about placeholders."""
    write_tokenizer(folder)
    size = {"height": 8, "width": 8}
    CLIPImageProcessorPil(size=size, crop_size=size).save_pretrained(folder)
    save_safetensors(folder, {rename(name): value for name, value in model.state_dict().items()})
    model.config.save_pretrained(folder)
    return folder
