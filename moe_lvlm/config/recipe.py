"""A recipe: everything that a training run is, from its model to its stages."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, field_validator, model_validator

from moe_lvlm.config.adapter import Adapter
from moe_lvlm.config.base import Settings
from moe_lvlm.config.connector import Connector, PartSettings, QFormerConnectorSettings
from moe_lvlm.config.errors import RecipeError, did_you_mean
from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.config.records import RecordsSettings

Template = Literal["plain", "chat", "instruct"]


class VisionTowerSettings(PartSettings):
    """CLIP, SigLIP or DINOv2.

    feature_layer: the hidden state that is used, -2 as in LLaVA. feature_select: `default` leaves the class token
    out, `full` keeps all (towers without a class token).
    """

    feature_layer: int = -2
    feature_select: Literal["default", "full"] = "default"


class ModelSettings(Settings):
    """The parts of the model, or `from_pretrained`: a folder in the layout of LLaVA, InstructBLIP or BLIP-2, or a run of
    ours, to start from whole.

    connector: from parts an MLP if it is left out. Beside `from_pretrained` None is what the folder holds; `qmoe` begins
        with the folder's Q-Former, its query FFNs copied into the experts, or goes on with experts that are there.
    adapter: LoRA, or LoRA experts, in the language model, from the stage on that says `adapt: true`.
    tokenizer: a folder, a hub name or `package:...`; None takes the language model's.
    image_processor: the same; None takes the vision tower's, or CLIP's defaults at the tower's size.
    image_token: the mark that stands for an image in text; added to the tokenizer if it is new.
    """

    from_pretrained: str | None = None
    vision_tower: VisionTowerSettings | None = None
    connector: Connector | None = None
    adapter: Adapter | None = None
    language_model: PartSettings | None = None
    tokenizer: str | None = None
    image_processor: str | None = None
    image_token: str = "<image>"
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    trust_remote_code: bool = False

    @model_validator(mode="before")
    @classmethod
    def _fill_connector(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("from_pretrained") is None and values.get("connector") is None:
            return values | {"connector": {"kind": "mlp"}}
        return values

    @model_validator(mode="after")
    def _check_source(self) -> ModelSettings:
        parts = (self.vision_tower is not None, self.language_model is not None)
        if self.from_pretrained is None and not all(parts):
            raise ValueError("give vision_tower and language_model, or from_pretrained for a whole model")
        if self.from_pretrained is not None and any(parts):
            raise ValueError("from_pretrained gives the whole model: leave vision_tower and language_model out")
        connector = self.connector
        if isinstance(connector, QFormerConnectorSettings):
            if self.from_pretrained is None and connector.qformer is None:
                raise ValueError("connector.qformer: needed where vision_tower and language_model are parts")
            if self.from_pretrained is not None and connector.qformer is not None:
                raise ValueError("connector.qformer: from_pretrained brings the Q-Former; leave it out")
        return self


class SourceSettings(RecordsSettings):
    """One dataset of a mixture.

    weight: how often a record of it is drawn beside records of the others: an epoch holds weight x len records.
    ratio: the share of draws instead, whatever the dataset's length, beside the other sources' ratios; all sources of a
        mixture have one or none has. An epoch then is as long as it takes to see each record of every source once.
    """

    weight: float = Field(default=1.0, gt=0)
    ratio: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _check_share(self) -> SourceSettings:
        if self.ratio is not None and self.weight != 1:
            raise ValueError(f"weight: {self.weight} beside ratio: {self.ratio}; allowed: one of the two")
        return self


class TaskTypeSettings(Settings):
    """A rule that labels samples by task, for the router `task`; of a list of rules the first that fits counts.

    label: the task's number, 0, 1, ... What is given must all fit: `instruction`, a regular expression searched for in
    the human turns; `image`, one searched for in the image's path; `task`, the record's own task; `dataset`, the
    source's name. A rule that gives none of them fits every sample.
    """

    label: int = Field(ge=0)
    instruction: str | None = None
    image: str | None = None
    task: str | None = None
    dataset: str | None = None

    @field_validator("instruction", "image")
    @classmethod
    def _check_pattern(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"no regular expression: {error}; allowed: what Python's re takes") from error
        return pattern


class DataSettings(Settings):
    """What is read and how it becomes tokens.

    template: `chat` renders the conversation with the chat template, loss on the answers; `plain` is LLaVA's stage I:
        the images followed by the caption, loss on the caption; `instruct` is InstructBLIP's: the images, the words of
        the one question, its answer, loss on the answer.
    chat_template: `tokenizer` (its own), `vicuna_v1`, or the path of a Jinja file.
    connector_words: what a connector reads that reads words: the bare `question` where there is one (Q-MoE), or the whole
        `instruction` (InstructBLIP).
    task_types: rules that label samples by task; a sample that none fits has no label.
    clusters: a table of instruction clusters, as `tools/fit_clusters.py` writes it; for the router `cluster`, and for
        MoCLE's gates by cluster and by dataset.
    bad_sample_limit: share of records that may be bad (skipped, counted, listed in the run's bad_samples.jsonl)
        before the run stops.
    batching: `padded` gives each sample of a micro-batch a row; `packed` puts all into one row without padding, attention
        within each. balance: a step's samples are spread over its micro-batches by length (docs/data.md).
    num_workers: processes a rank that load ahead, `prefetch` micro-batches each; 0 loads in the trainer.
    feature_cache: a folder that `tools/cache_features.py` made; training reads the frozen tower's features from it in
        place of images.
    """

    image_root: str = "."
    mixture: tuple[SourceSettings, ...] = ()
    template: Template = "chat"
    chat_template: str = "tokenizer"
    connector_words: Literal["question", "instruction"] = "question"
    task_types: tuple[TaskTypeSettings, ...] = ()
    clusters: str | None = None
    feature_cache: str | None = None
    max_length: int = Field(default=2048, ge=8)
    bad_sample_limit: float = Field(default=0.001, ge=0, le=1)
    num_workers: int = Field(default=0, ge=0)
    batching: Literal["padded", "packed"] = "padded"
    balance: bool = False
    prefetch: int = Field(default=2, ge=1)


class OptimizerSettings(Settings):
    """AdamW. Weight decay leaves out biases, norms and other vectors."""

    kind: Literal["adamw"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)


class ScheduleSettings(Settings):
    """Learning rate over a stage: linear warm-up, then `cosine` or `linear` to `final_ratio`, or `constant`.

    warmup_from: the learning rate that the warm-up rises from; not above a stage's own, which it rises to.
    """

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = Field(default=0.03, ge=0, le=1)
    warmup_steps: int | None = Field(default=None, ge=0)
    warmup_from: float = Field(default=0.0, ge=0)
    final_ratio: float = Field(default=0.0, ge=0, le=1)


class CheckpointSettings(Settings):
    """When a run saves, and what it keeps.

    every: steps between saves (0: at the end of each stage only).
    keep_last: how many of the newest are kept. keep_every: those at multiples of so many steps of a stage stay for
        good (0: none). The ends of stages always stay.
    background: write beside training, out of a copy of each process's share in host memory; the end of a stage and a
        stop are waited for. background_gib: the most that a process may copy; larger shares are written at once.
    save_frozen: false leaves out the weights that no stage has trained so far and that the model's pretrained folders
        hold; a checkpoint then needs these folders, unchanged (docs/checkpoints.md). None is false where the model has
        an adapter, else true.
    """

    every: int = Field(default=0, ge=0)
    keep_last: int = Field(default=2, ge=1)
    keep_every: int = Field(default=0, ge=0)
    background: bool = False
    background_gib: float = Field(default=16.0, gt=0)
    save_frozen: bool | None = None


class TrainSettings(Settings):
    """How a step is made, the same for all stages.

    gradient_checkpointing: layers that compute their activations again in the backward pass instead of keeping them: none,
        all, or a number of the language model's, those without experts first.
    loss_average: `step` divides the sum of token losses by the supervised tokens of the whole step; `micro_batch`
        averages each micro-batch by itself (compat with DeepSpeed's and LLaVA's code).
    hang_timeout: seconds without progress (a step, or a part of a start or a save) after which a process writes its
        stacks, and the run ends with status 85 (docs/reliability.md); 0: never. Longer than the longest of them takes.
    """

    precision: Literal["fp32", "bf16"] = "bf16"
    gradient_clipping: float = Field(default=1.0, ge=0)
    gradient_checkpointing: StrictBool | Annotated[int, Field(ge=1, strict=True)] = False
    loss_average: Literal["step", "micro_batch"] = "step"
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    log_every: int = Field(default=10, ge=1)
    max_skipped_steps: int = Field(default=5, ge=1)
    hang_timeout: float = Field(default=1800.0, ge=0, le=604_800)


class ParallelSettings(Settings):
    """deepspeed: a name under ds_configs/ (zero1, zero2, zero2_offload, zero3, zero3_offload) or the path of a JSON
    file. expert_parallel_size must divide the number of experts and the number of processes."""

    expert_parallel_size: int = Field(default=1, ge=1)
    deepspeed: str = "zero2"


class StageSettings(Settings):
    """What is trained, on which data, for how long.

    train: parts by name (connector, language_model, vision_tower, moe, router, experts, dense_ffn, adapter; released: what
        MoE-LLaVA's code trains in stage III), or `re:<regular expression>` on parameter names.
    upcycle: the stage begins by turning the dense model into the recipe's MoE model. adapt: it begins by putting the
        recipe's adapter (`model.adapter`) into the language model.
    steps or epochs: exactly one.
    micro_batch: samples of one forward pass; global_batch: samples of a step, a multiple of it.
    mixture, template: in place of those under `data`.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    train: tuple[str, ...] = Field(min_length=1)
    upcycle: bool = False
    adapt: bool = False
    steps: int | None = Field(default=None, ge=1)
    epochs: float | None = Field(default=None, gt=0)
    micro_batch: int = Field(default=1, ge=1)
    global_batch: int = Field(default=1, ge=1)
    learning_rate: float = Field(gt=0)
    mixture: tuple[SourceSettings, ...] | None = None
    template: Template | None = None

    @model_validator(mode="after")
    def _check(self) -> StageSettings:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        if self.global_batch % self.micro_batch:
            raise ValueError(f"global_batch: {self.global_batch} is not a multiple of micro_batch ({self.micro_batch})")
        return self


class TaskSettings(RecordsSettings):
    """One evaluation set: records whose `task` names the score they count for, or the set's name.

    metric: `exact_match` compares the normalised answer with the record's; `choice` the option that it chooses, by letter,
        or by text where the records' answers are texts; `vqa` gives VQA accuracy over the record's ten `answers`, or
        beside its one; `yes_no` is POPE's rule, with precision, recall and F1; `mme`
        MME's, with its scores by `category`; `cider` scores captions by their `references`. docs/evaluation.md says what
        records hold for each.
    """

    name: str
    metric: Literal["exact_match", "choice", "vqa", "yes_no", "mme", "cider"] = "exact_match"
    max_new_tokens: int = Field(default=16, ge=1)
    limit: int | None = Field(default=None, ge=1)


class EvaluationSettings(Settings):
    tasks: tuple[TaskSettings, ...] = ()
    batch_size: int = Field(default=32, ge=1)


class Recipe(Settings):
    """A whole run. `train(recipe)` writes it, resolved, beside its results.

    output_dir: the run's folder; None is runs/<name>.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(default=0, ge=0)
    output_dir: str | None = None
    model: ModelSettings
    moe: MoEConfig = MoEConfig()
    data: DataSettings = DataSettings()
    train: TrainSettings = TrainSettings()
    parallel: ParallelSettings = ParallelSettings()
    stages: Annotated[tuple[StageSettings, ...], Field(min_length=1)]
    evaluation: EvaluationSettings = EvaluationSettings()

    def stage_index(self, name: str) -> int:
        """Place of a stage, from 0.

        Raises:
            RecipeError: no stage has that name.
        """
        names = [stage.name for stage in self.stages]
        if name not in names:
            raise RecipeError(
                f"{name}: no stage of recipe {self.name}{did_you_mean(name, names)}; stages: {', '.join(names)}"
            )
        return names.index(name)

    @field_validator("stages")
    @classmethod
    def _check_names(cls, stages: tuple[StageSettings, ...]) -> tuple[StageSettings, ...]:
        names = [stage.name for stage in stages]
        if len(set(names)) != len(names):
            raise ValueError(f"each stage needs a name of its own, got {names}")
        upcycling = [place for place, stage in enumerate(stages) if stage.upcycle]
        adapting = [place for place, stage in enumerate(stages) if stage.adapt]
        for key, places in (("upcycle", upcycling), ("adapt", adapting)):
            if len(places) > 1:
                raise ValueError(f"at most one stage may say {key}: true")
        if upcycling and adapting and upcycling[0] > adapting[0]:
            raise ValueError(
                f"stage {stages[upcycling[0]].name}: upcycle: true after adapt: true; allowed: in the same stage, or before it"
            )
        return stages

    @model_validator(mode="after")
    def _check_adapter(self) -> Recipe:
        adapts = any(stage.adapt for stage in self.stages)
        if adapts and self.model.adapter is None:
            raise ValueError("adapt: true, but model.adapter is not given; allowed: an adapter of kind lora or mocle")
        if self.model.adapter is not None and not adapts:
            raise ValueError("model.adapter: no stage puts it into the model; allowed: adapt: true in one stage")
        return self

    @model_validator(mode="after")
    def _check_parallel(self) -> Recipe:
        size = self.parallel.expert_parallel_size
        if self.moe.num_experts % size:
            raise ValueError(
                f"parallel.expert_parallel_size: {size} does not divide moe.num_experts ({self.moe.num_experts})"
            )
        for stage in self.stages:
            if not (stage.mixture or self.data.mixture):
                raise ValueError(f"stage {stage.name}: no data; give data.mixture or the stage's own mixture")
        return self

    @model_validator(mode="after")
    def _check_warmup(self) -> Recipe:
        start = self.train.schedule.warmup_from
        for stage in self.stages:
            if start > stage.learning_rate:
                raise ValueError(
                    f"train.schedule.warmup_from: {start} is above the learning rate of stage {stage.name} "
                    f"({stage.learning_rate})"
                )
        return self
