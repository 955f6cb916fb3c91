"""What real models keep and hold, to judge estimates by. Small models, but wide enough that no estimate is about rounding."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.data.collator import Collator
from moe_lvlm.data.sample import Sample
from moe_lvlm.estimation.shape import BatchShape
from moe_lvlm.models.build import VLM
from moe_lvlm.models.upcycle import as_moe_llava
from moe_lvlm.training.trainable import select_trainable
from tests.tiny_models import (
    IMAGE_ID,
    IMAGE_TOKENS,
    PAD_ID,
    _made_llava,
    tiny_llava,
    tiny_moe_llava,
    tiny_sample,
)

WIDE = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4}
WORDS = (60, 25, 90, 44)
TOP_2: dict[str, Any] = {"num_experts": 4, "top_k": 2, "router": {"kind": "top_k"}}


def build(moe: dict[str, Any] | None, family: str, train: Sequence[str], **fields: Any) -> VLM:
    """A model in training, dense where `moe` is None."""
    fields = WIDE | fields
    if moe is None:
        model: VLM = as_moe_llava(tiny_llava(family, **fields))
    else:
        model = tiny_moe_llava(MoEConfig.model_validate(moe), family, **fields)
    select_trainable(model, train)
    return model.train()


def samples(words: Sequence[int] = WORDS) -> list[Sample]:
    """One image each, then so many words, of which a quarter is the answer."""
    made = []
    for index, count in enumerate(words):
        tiny = tiny_sample(1, count, num_answer=count // 4, seed=index)
        made.append(
            Sample(
                key=f"tiny/{index}",
                dataset="tiny",
                task=None,
                input_ids=tiny.input_ids,
                labels=tiny.labels,
                instruction=(tiny.labels == -100) & (tiny.input_ids != IMAGE_ID),
                pixel_values=tiny.pixel_values,
                image_tokens=(IMAGE_TOKENS,),
                cluster=index % 3,
                task_label=index % 2,
                draw=index,
                dataset_index=index % 3,
            )
        )
    return made


def collate(of: Sequence[Sample], *, is_packed: bool = False) -> dict[str, Any]:
    collator = Collator(
        pad_token_id=PAD_ID,
        image_token_id=IMAGE_ID,
        has_task_labels=True,
        connector_pad_id=None,
        is_packed=is_packed,
    )
    return dict(collator(of))


def shape_of(of: Sequence[Sample], *, is_packed: bool = False, tail_share: float = 0.0) -> BatchShape:
    """The shape of a batch of these samples."""
    lengths = tuple(len(sample.input_ids) for sample in of)
    return BatchShape(
        sample_lengths=lengths,
        num_images=len(of),
        supervised=sum(int((sample.labels != -100).sum()) for sample in of),
        padded_to=None if is_packed else max(lengths),
        tail_share=tail_share,
    )


def saved_bytes(model: nn.Module, batch: dict[str, Any]) -> int:
    """Bytes that autograd keeps between forward and backward: each storage once, parameters left out."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address and address not in parameters:
            kept[address] = tensor  # held, so that no other storage can take its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(**batch)
    assert output.loss is not None
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def living_bytes() -> int:
    """Bytes of all tensors that this process holds, each storage once."""
    gc.collect()
    found = [one for one in gc.get_objects() if issubclass(type(one), Tensor)]
    # a gradient that nobody has looked at is no Python object yet
    found += [one.grad for one in found if one.is_leaf and one.grad is not None]
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in found}
    return sum(storages.values())


def held_by_engine(
    moe: dict[str, Any] | None,
    zero: dict[str, Any],
    expert_parallel_size: int,
    precision: str,
    train: tuple[str, ...],
) -> tuple[int, int]:
    """Of this process's engine: bytes of its tensors between two steps, and between two micro-batches of a step.

    A job for a server of ranks. zero: `zero_optimization` of the DeepSpeed dict.
    """
    from moe_lvlm.config.recipe import OptimizerSettings
    from moe_lvlm.parallel.engine import start_engine
    from moe_lvlm.parallel.expert_parallel import bind_expert_parallel
    from moe_lvlm.parallel.process_group import join_world
    from moe_lvlm.training.build import DTYPES
    from moe_lvlm.training.optimizer import parameter_groups

    join_world()
    batch = collate(samples())
    batch["pixel_values"] = batch["pixel_values"].to(DTYPES[precision])
    before = living_bytes()
    model = build(moe, "llama", train).to(DTYPES[precision])
    bind_expert_parallel(model, expert_parallel_size, zero_stage=zero["stage"])
    engine = start_engine(
        model,
        parameter_groups(model, learning_rate=1e-3, settings=OptimizerSettings()),
        optimizer_options={"lr": 1e-3},
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 2,
            "bf16": {"enabled": precision == "bf16"},
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        },
    )
    engine.train()
    held = []
    for _ in range(3):
        engine.backward(engine(**batch).loss)
        engine.step()
        # tiny models are cached by what makes them
        held.append(living_bytes() - before - _cached_bytes())
    dist.barrier()
    dist.destroy_process_group()
    return held[1], held[2]


def _cached_bytes() -> int:
    """Of the model that `tiny_llava` keeps to copy from."""
    cached = _made_llava("llama", "clip", 0, tuple(sorted(WIDE.items())))
    return sum(parameter.numel() * parameter.element_size() for parameter in cached.parameters())
