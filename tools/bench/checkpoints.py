"""A training checkpoint of about any size, and the work on it that is measured."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlavaProcessor, PreTrainedTokenizerFast

from moe_lvlm.checkpoint.fragments import LiveTraining, live_model
from moe_lvlm.checkpoint.ranks import SingleRank
from moe_lvlm.checkpoint.reshard import reshard
from moe_lvlm.checkpoint.rng import capture_rng
from moe_lvlm.checkpoint.save import save_checkpoint
from moe_lvlm.checkpoint.source import LazySource, LazyTensor
from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.config.recipe import ModelSettings
from moe_lvlm.conversion.check import check
from moe_lvlm.models.build import build_config, build_empty
from moe_lvlm.models.config import MoELlavaConfig

LAYERS, VOCABULARY, PARTS = 8, 2048, 16
_STEP = 160
_NAME = f"sparse-{_STEP:06d}"


@dataclass(frozen=True, slots=True)
class Work:
    """Something that is measured. source: the folder that it reads, None if it reads none. output: the folder below
    which it writes. group_bytes: the largest group of tensors. has_goal: whether a goal is set for it."""

    name: str
    label: str
    source: Path | None
    output: Path
    run: Callable[[], object]
    group_bytes: int
    has_goal: bool = True

    def clean(self) -> None:
        """Remove what it wrote."""
        shutil.rmtree(self.output, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Bench:
    """Everything that is measured, the model's sizes, and the works that cannot be measured with the reason."""

    works: tuple[Work, ...]
    width: int
    checkpoint_bytes: int
    unavailable: dict[str, str]


def prepare(folder: Path, *, num_bytes: int, num_experts: int, seed: int) -> Bench:
    """Make a run with one checkpoint of about so many bytes, in one file and in 16, and a dense model's folder."""
    torch.manual_seed(seed)
    moe = MoEConfig(num_experts=num_experts, top_k=min(2, num_experts))
    width = fitting_width(num_bytes, moe)
    dense, processor = _model_config(folder, width)
    config = dense.with_moe(moe)
    training = random_training(config)
    run = folder / "run"
    processor.save_pretrained(run / "processor")
    whole = _save(run / "checkpoints", training, config)
    parts = reshard(whole, folder / "parts", _NAME, num_files=PARTS).path
    group = largest_group(training.model)
    out = folder / "out"

    def rewrite(source: Path, **options: Any) -> Callable[[], object]:
        return lambda: reshard(source, out, _NAME, **options)

    works = [
        Work("save", "save", None, out, lambda: _save(out, training, config), group, has_goal=False),
        Work("verify", "verify, values too", whole, out, lambda: _check(whole), group, has_goal=False),
        Work("merge", f"reshard {PARTS} files to 1", parts, out, rewrite(parts, num_files=1), group),
        Work("split", f"reshard 1 file to {PARTS}", whole, out, rewrite(whole, num_files=PARTS), group),
        Work("drop", "reshard, drop the optimizer", whole, out, rewrite(whole, keeps_optimizer=False), group),
    ]
    setting = _Setting(whole=whole, folder=folder, output=out, dense=dense, moe=moe, processor=processor, group=group)
    unavailable: dict[str, str] = {}
    for name, add in {"export": _export_work, "upcycle": _upcycle_work}.items():
        try:
            works.append(add(setting))
        except ImportError as error:
            unavailable[name] = f"not available: {error}"
    size = sum(file.stat().st_size for file in whole.iterdir())
    return Bench(tuple(works), width, size, unavailable)


def fitting_width(num_bytes: int, moe: MoEConfig) -> int:
    """The model width, a multiple of 64, whose checkpoint comes nearest to so many bytes.

    Of the decoder's layers every second one is sparse and trained: a master and two moments, 12 bytes an element; all
    else is 4 bytes. F = 2.75 D, as in LLaMA.
    """

    def size(width: int) -> int:
        ffn, attention = 3 * width * _ffn_width(width), 4 * width * width
        sparse = len(moe.layer_indices(LAYERS))
        frozen = LAYERS * attention + (LAYERS - sparse) * ffn + 2 * VOCABULARY * width
        return 12 * sparse * moe.num_experts * ffn + 4 * frozen

    return min(range(64, 64 * 256, 64), key=lambda width: abs(size(width) - num_bytes))


def _ffn_width(width: int) -> int:
    return width * 11 // 4


def _model_config(folder: Path, width: int) -> tuple[MoELlavaConfig, LlavaProcessor]:
    words = ["<pad>", "<s>", "</s>", "<unk>", "<image>", *(f"word{index}" for index in range(VOCABULARY - 5))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    fast.save_pretrained(folder / "tokenizer")
    settings = {
        "vision_tower": {
            "from_config": {
                "model_type": "clip_vision_model", "image_size": 64, "patch_size": 16, "hidden_size": 64,
                "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
            }
        },
        "language_model": {
            "from_config": {
                "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": width,
                "intermediate_size": _ffn_width(width), "num_hidden_layers": LAYERS, "num_attention_heads": width // 64,
                "num_key_value_heads": width // 64, "max_position_embeddings": 2048,
            }
        },
        "tokenizer": str(folder / "tokenizer"),
    }  # fmt: skip
    return build_config(ModelSettings.model_validate(settings))


def random_training(config: MoELlavaConfig) -> LiveTraining:
    """The sparse model with random weights, its MoE layers in training by AdamW with random moments."""
    model = build_empty(config)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(torch.randn(parameter.shape), requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                module.register_buffer(name, torch.zeros(buffer.shape, dtype=buffer.dtype))
    trained = [parameter for name, parameter in model.named_parameters() if ".experts." in name or ".router." in name]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    for parameter in trained:
        optimizer.state[parameter] = {
            "step": torch.tensor(float(_STEP)),
            "exp_avg": torch.randn(parameter.shape),
            "exp_avg_sq": torch.rand(parameter.shape),
        }
    return live_model(model, optimizer)


def largest_group(model: nn.Module) -> int:
    """Bytes of the largest group of tensors that belong together: one layer's expert stacks, one kind of them."""
    groups: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        groups[owner] = groups.get(owner, 0) + parameter.nbytes
    return max(size for owner, size in groups.items() if owner.endswith(".experts"))


def _save(directory: Path, training: LiveTraining, config: MoELlavaConfig) -> Path:
    counts = {"stage": 1, "step": _STEP, "global_step": _STEP, "samples": 0, "bad": 0, "tokens": 0}
    topology = {"is_stage_done": False, "world_size": 1, "expert_parallel_size": 1, "zero_stage": 0}
    report = save_checkpoint(
        directory,
        _NAME,
        training,
        config=json.loads(config.to_json_string()),
        state=counts | topology,
        rng=capture_rng(),
        ranks=SingleRank(),
        log=lambda line: None,
    )
    return report.path


def _check(path: Path) -> None:
    if problems := check(path).problems:
        raise RuntimeError("; ".join(problems[:3]))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Setting:
    """What the conversions are made of."""

    whole: Path
    folder: Path
    output: Path
    dense: MoELlavaConfig
    moe: MoEConfig
    processor: LlavaProcessor
    group: int


def _export_work(setting: _Setting) -> Work:
    from moe_lvlm.conversion.export import export_model, plan_export

    form = plan_export(setting.whole).form  # also imports, before the clock runs, what the form needs

    def run() -> object:
        return export_model(plan_export(setting.whole), setting.output / "exported", is_checked=False)

    return Work("export", f"export ({form})", setting.whole, setting.output, run, setting.group)


def _upcycle_work(setting: _Setting) -> Work:
    from moe_lvlm.conversion.folder import Converted, write_converted
    from moe_lvlm.conversion.upcycling import upcycle_folder

    source, dense = setting.folder / "dense", setting.dense
    tensors = {
        name: LazyTensor.of(torch.randn(parameter.shape)) for name, parameter in build_empty(dense).named_parameters()
    }
    converted = Converted(
        config=dense, weights=LazySource(tensors), processor=setting.processor, before=dense.to_dict()
    )
    write_converted(converted, source)

    def run() -> object:
        return write_converted(upcycle_folder(source, setting.moe, router_seed=1), setting.output / "upcycled")

    return Work("upcycle", "convert: upcycle a dense model", source, setting.output, run, setting.group)
