"""Processor, tokenizer, chat template and generation settings of a model as the files of its folder."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from transformers import GenerationConfig, InstructBlipProcessor, LlavaProcessor

from moe_lvlm.config.recipe import DataSettings
from moe_lvlm.conversion.provenance import Provenance
from moe_lvlm.conversion.tree import saved_files
from moe_lvlm.data.templates import Template, build_template, chat_template_text, end_of_turn_id, own_bos_token
from moe_lvlm.models.load import read_processor
from moe_lvlm.models.processor import load_processor

GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessorFiles:
    """files: content by name, generation_config.json among them. prompt: Python that makes `prompt` for the image mark
    and a question, as the model was trained to read it. image_token: the mark."""

    files: dict[str, bytes]
    prompt: str
    image_token: str


def processor_files(folder: Path, provenance: Provenance) -> ProcessorFiles:
    """The processor in `folder`, with the chat template that the run trained with in the place of its own.

    Raises:
        ValueError: the run's chat template cannot be found, or does not fit the tokenizer.
    """
    processor = load_processor(folder)
    tokenizer = processor.tokenizer
    data = DataSettings() if provenance.recipe is None else provenance.recipe.data
    kind = provenance.template
    if kind == "chat" and (provenance.recipe is not None or tokenizer.chat_template is not None):
        tokenizer.chat_template = chat_template_text(data.chat_template, tokenizer)
        processor.chat_template = tokenizer.chat_template
    # what the model's forward takes; a tokenizer may make more, which `generate` would refuse
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.init_kwargs["model_input_names"] = list(tokenizer.model_input_names)
    template: Template | None = None
    if provenance.recipe is not None:  # a template of elsewhere need not be one that can be trained on
        template = build_template(kind, "tokenizer", tokenizer, processor.image_token)
    with tempfile.TemporaryDirectory() as temporary:
        processor.save_pretrained(temporary)
        files = _read_flat(Path(temporary))
    files[GENERATION_CONFIG] = _generation_config(processor, template).to_json_string().encode()
    return ProcessorFiles(files=files, prompt=_prompt(processor, kind), image_token=processor.image_token)


def blip_processor_files(folder: Path) -> ProcessorFiles:
    """The same of an InstructBLIP: files by path, since the Q-Former's tokenizer has a folder of its own.

    Raises:
        ValueError: there is no processor, or another one's.
    """
    ours = read_processor(folder)
    if not isinstance(ours, InstructBlipProcessor):
        raise ValueError(f"{folder}: the processor has no tokenizer for a Q-Former; allowed: an InstructBLIP's")
    stock = InstructBlipProcessor(
        image_processor=ours.image_processor,
        tokenizer=ours.tokenizer,
        qformer_tokenizer=ours.qformer_tokenizer,
        num_query_tokens=ours.num_query_tokens,
    )
    files = saved_files(stock.save_pretrained)
    tokenizer = stock.tokenizer
    generation = GenerationConfig(
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    files[GENERATION_CONFIG] = generation.to_json_string().encode()
    return ProcessorFiles(files=files, prompt='prompt = "What is in this image?"', image_token=str(stock.image_token))


def _read_flat(folder: Path) -> dict[str, bytes]:
    for entry in folder.iterdir():
        if not entry.is_file():
            raise ValueError(f"processor: it saves a folder, {entry.name}/; allowed: files, so one chat template")
    return {entry.name: entry.read_bytes() for entry in sorted(folder.iterdir())}


def _generation_config(processor: LlavaProcessor, template: Template | None) -> GenerationConfig:
    """Greedy answers that end where the template ends a turn, and never hold an image mark."""
    tokenizer = processor.tokenizer
    end_ids = [tokenizer.eos_token_id]
    if template is not None:
        end_ids.append(end_of_turn_id(template, tokenizer))
    return GenerationConfig(
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=list(dict.fromkeys(one for one in end_ids if one is not None)),
        suppress_tokens=[processor.image_token_id],
    )


def _prompt(processor: LlavaProcessor, kind: str) -> str:
    mark = processor.image_token
    if kind == "plain":
        return f"prompt = {own_bos_token(processor.tokenizer) + mark!r}  # the model was trained to caption: the image alone"
    question = f"{mark}\nWhat is in this image?"
    if processor.tokenizer.chat_template is None:
        return f"prompt = {question!r}  # no chat template is known: write what the model was trained on"
    if kind == "instruct":
        bos = own_bos_token(processor.tokenizer)
        return f"prompt = {mark + bos + 'What is in this image?'!r}  # to be tokenized with add_special_tokens=False"
    return (
        f'messages = [{{"role": "user", "content": {question!r}}}]\n'
        "prompt = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)"
    )
