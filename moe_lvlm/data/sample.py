"""A record as the model sees it: token ids with one placeholder a visual token, labels, pixels.

S sequence   A answer   L words of the connector   n images   C, H, W channels, height, width
M features of an image   D their width
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin

from moe_lvlm.data.clusters import InstructionClusters
from moe_lvlm.data.connector_text import ConnectorText
from moe_lvlm.data.errors import ImageSizeError, RecordFault, TemplateError
from moe_lvlm.data.features import FeatureCache
from moe_lvlm.data.image_sizes import ImageSizes
from moe_lvlm.data.images import load_image
from moe_lvlm.data.instructions import first_instruction
from moe_lvlm.data.records import IMAGE_MARK, Record, Turn, check_turns
from moe_lvlm.data.tasks import TaskRules
from moe_lvlm.data.templates import Rendered, Span, Template, tokenize

IGNORED_LABEL = -100

NumImageTokens = Callable[[ProcessorMixin, int, int], int]
"""(processor, height, width of the processed image) -> placeholders."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One conversation, ready for a batch.

    key: `<dataset>/<index>`. input_ids [S] int64, image marks expanded. labels [S] int64, not shifted, -100 except on
    answers; where answers stand apart (encoder-decoder) [1 + A], the first for the decoder's start, and input_ids are the
    prompt. instruction [S] bool, the user's words without image tokens. pixel_values [n, C, H, W] float32, or None.
    image_features [n, M, D], in the type of the cache that they are from, in their place; None without images or cache.
    image_tokens: placeholders of each image. task: the record's own; task_label: its number by the recipe's rules, None
    if none fits. cluster: of its first instruction, None without a table of clusters. connector_ids [L] int64, what the
    connector reads beside each image, None if it reads nothing. dataset_index: of its dataset in the mixture, None where
    it is in none. draw: 0 <= draw < 2^63, the number of the draw that
    brought it, None outside of a mixture.
    """

    key: str
    dataset: str
    task: str | None
    input_ids: Tensor
    labels: Tensor
    instruction: Tensor
    pixel_values: Tensor | None
    image_tokens: tuple[int, ...]
    task_label: int | None = None
    cluster: int | None = None
    connector_ids: Tensor | None = None
    draw: int | None = None
    dataset_index: int | None = None
    image_features: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What generation starts from: fields as in `Sample`."""

    input_ids: Tensor
    instruction: Tensor
    pixel_values: Tensor | None
    image_tokens: tuple[int, ...]
    cluster: int | None = None
    connector_ids: Tensor | None = None
    dataset_index: int | None = None


@dataclass(frozen=True, slots=True)
class _Images:
    """Fields as in `Sample`."""

    pixel_values: Tensor | None
    image_tokens: tuple[int, ...]
    image_features: Tensor | None = None


@dataclass(frozen=True, slots=True)
class _Tokens:
    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    instruction: NDArray[np.bool_]


class SampleBuilder:
    """Makes samples for training and prompts for generation, by one code path: the ids of a prompt are those that the
    training sample of the same conversation begins with.

    A sample of more than `max_length` tokens, its answer among them, is cut on the right if all image tokens and at least
    one supervised token remain; else it is bad. A prompt is never cut.

    answers_apart: samples are for an encoder and a decoder, which read the prompt and the answer (template `instruct`
    with `closes_prompt`). connector_text: None where the connector reads no words.
    reads_instruction: it reads the whole first human turn, even where a record tells its bare question. datasets: names
    of the mixture's, in its order; what is from another one has the index that the table of clusters gives its
    instruction, if that is a table by dataset. features: samples take these in the place of images; prompts never do.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        template: Template,
        *,
        num_image_tokens: NumImageTokens,
        max_length: int,
        tasks: TaskRules | None = None,
        clusters: InstructionClusters | None = None,
        connector_text: ConnectorText | None = None,
        answers_apart: bool = False,
        reads_instruction: bool = False,
        datasets: Sequence[str] = (),
        features: FeatureCache | None = None,
    ) -> None:
        self.processor = processor
        self.template = template
        self.max_length = max_length
        self.tasks = tasks
        self.clusters = clusters
        self.connector_text = connector_text
        self.answers_apart = answers_apart
        self.reads_instruction = reads_instruction
        self.datasets = tuple(datasets)
        self.features = features
        self._num_image_tokens = num_image_tokens
        self._image_sizes = ImageSizes(partial(process_image, processor))

    def length(self, record: Record, image_root: Path) -> int:
        """Tokens of the training sample of a record, prompt and answer, whose images are not decoded. Raises RecordFault
        for what is wrong with the rest."""
        rendered = self.template.render(record.turns)
        if self.features is None:
            sizes = [self._image_sizes.processed(image_root, path) for path in record.images]
            image_tokens = tuple(self._num_image_tokens(self.processor, *size) for size in sizes)
        else:
            image_tokens = (self._tokens_of_features(self.features),) * len(record.images)
        return len(self._cut(self._tokens(rendered, image_tokens)).ids)

    def sample(self, record: Record, image_root: Path, *, dataset: str, key: str, draw: int | None = None) -> Sample:
        """The training sample of a record. draw: the number of the draw that brought it. Raises RecordFault."""
        images = self._record_images(record, image_root)
        tokens = self._cut(self._tokens(self.template.render(record.turns), images.image_tokens))
        if self.answers_apart:
            tokens = _part(tokens)
        cluster = self._cluster(record.turns)
        return Sample(
            key=key,
            dataset=dataset,
            task=record.task,
            input_ids=torch.from_numpy(tokens.ids),
            labels=torch.from_numpy(tokens.labels),
            instruction=torch.from_numpy(tokens.instruction),
            pixel_values=images.pixel_values,
            image_tokens=images.image_tokens,
            task_label=None if self.tasks is None else self.tasks.label(record, dataset),
            cluster=cluster,
            connector_ids=self._connector_ids(record.turns, record.question),
            draw=draw,
            dataset_index=self._dataset_index(dataset, cluster),
            image_features=images.image_features,
        )

    def prompt(
        self,
        turns: Sequence[Turn],
        images: Sequence[Image.Image],
        *,
        connector_words: str | None = None,
        dataset: str | None = None,
    ) -> Prompt:
        """What the model goes on from: a conversation whose last turn is a human's. images: RGB, one a mark.

        connector_words: what the connector reads; None takes the words of the first turn. dataset: the name of the
        dataset that it is from, if it is from one.

        Raises RecordFault if turns do not alternate, end in an answer, or marks and images differ in number.
        """
        turns = tuple(turns)
        num_marks = check_turns(turns)
        if turns[-1].role != "human":
            raise RecordFault("the last turn of a prompt is an answer; it must be a human's")
        if num_marks != len(images):
            raise RecordFault(f"the turns hold {num_marks} {IMAGE_MARK} mark(s) for {len(images)} image(s)")
        processed = self._processed(images)
        tokens = self._tokens(self.template.render(turns), processed.image_tokens)
        cluster = self._cluster(turns)
        return Prompt(
            input_ids=torch.from_numpy(tokens.ids),
            instruction=torch.from_numpy(tokens.instruction),
            pixel_values=processed.pixel_values,
            image_tokens=processed.image_tokens,
            cluster=cluster,
            connector_ids=self._connector_ids(turns, connector_words),
            dataset_index=self._dataset_index(dataset, cluster),
        )

    def record_prompt(self, record: Record, image_root: Path, *, dataset: str | None = None) -> Prompt:
        """The prompt for a record's last answer. Raises RecordFault."""
        images = [load_image(image_root, path) for path in record.images]
        return self.prompt(record.turns[:-1], images, connector_words=record.question, dataset=dataset)

    def _cluster(self, turns: Sequence[Turn]) -> int | None:
        return None if self.clusters is None else self.clusters.cluster(first_instruction(turns))

    def _dataset_index(self, dataset: str | None, cluster: int | None) -> int | None:
        if dataset in self.datasets:
            return self.datasets.index(dataset)
        is_by_dataset = self.clusters is not None and self.clusters.table.datasets is not None
        return cluster if is_by_dataset else None

    def _connector_ids(self, turns: Sequence[Turn], words: str | None) -> Tensor | None:
        if self.connector_text is None:
            return None
        if words is None or self.reads_instruction:
            words = first_instruction(turns)
        return self.connector_text(words)

    def _record_images(self, record: Record, image_root: Path) -> _Images:
        if self.features is None:
            return self._processed([load_image(image_root, path) for path in record.images])
        features = [self.features.read(image_root, path) for path in record.images]
        image_tokens = (self._tokens_of_features(self.features),) * len(features)
        return _Images(None, image_tokens, torch.stack(features) if features else None)

    def _tokens_of_features(self, features: FeatureCache) -> int:
        """A Q-Former makes as many tokens of an image as it has queries, a projector one of each feature."""
        num_queries: int | None = getattr(self.processor, "num_query_tokens", None)
        return features.shape[0] if num_queries is None else num_queries

    def _processed(self, images: Sequence[Image.Image]) -> _Images:
        pixels = [process_image(self.processor, image) for image in images]
        if len({image.shape for image in pixels}) > 1:
            raise ImageSizeError(
                f"the image processor gave sizes {sorted({tuple(image.shape[-2:]) for image in pixels})} (height, width)"
                " within one record; images of a record must have one processed size: set a fixed size or crop_size"
            )
        image_tokens = tuple(self._num_image_tokens(self.processor, *image.shape[-2:]) for image in pixels)
        return _Images(torch.stack(pixels) if pixels else None, image_tokens)

    def _tokens(self, rendered: Rendered, image_tokens: tuple[int, ...]) -> _Tokens:
        ids_list, starts_list = tokenize(self.processor.tokenizer, rendered.text, rendered.cuts)
        ids, starts = np.asarray(ids_list, dtype=np.int64), np.asarray(starts_list, dtype=np.int64)
        is_mark = ids == self.processor.image_token_id
        if int(is_mark.sum()) != len(image_tokens):
            mark = str(self.processor.image_token)
            raise RecordFault(
                f"the text has {int(is_mark.sum())} tokens {mark!r} for {len(image_tokens)} image(s); in a record only"
                f" {IMAGE_MARK} may stand for an image"
            )
        labels = np.where(_inside(starts, rendered.answers), ids, IGNORED_LABEL)
        instruction = _inside(starts, rendered.instructions) & ~is_mark
        repeats = np.ones(len(ids), dtype=np.int64)
        repeats[is_mark] = image_tokens
        return _Tokens(np.repeat(ids, repeats), np.repeat(labels, repeats), np.repeat(instruction, repeats))

    def _cut(self, tokens: _Tokens) -> _Tokens:
        num_tokens, limit = len(tokens.ids), self.max_length
        cut = _Tokens(tokens.ids[:limit], tokens.labels[:limit], tokens.instruction[:limit])
        if (tokens.ids[limit:] == self.processor.image_token_id).any():
            raise RecordFault(
                f"the sample has {num_tokens} tokens; cut to max_length ({limit}) it would lose image tokens"
            )
        if not (cut.labels != IGNORED_LABEL).any():
            raise RecordFault(
                f"the sample has {num_tokens} tokens; cut to max_length ({limit}) it would keep no token of an answer"
            )
        return cut


def _part(tokens: _Tokens) -> _Tokens:
    """The prompt's ids, and labels of the answer behind a place for the decoder's start."""
    # the one answer is the text's end, and a sample has some of it left
    first = int(np.argmax(tokens.labels != IGNORED_LABEL))
    labels = np.concatenate(([IGNORED_LABEL], tokens.labels[first:]))
    return _Tokens(tokens.ids[:first], labels, tokens.instruction[:first])


def process_image(processor: ProcessorMixin, image: Image.Image) -> Tensor:
    """What the tower reads of one RGB image, [C, H, W] float32."""
    pixel_values: Tensor = processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
    return pixel_values[0].float()


def check_processor(processor: ProcessorMixin) -> None:
    """Raises TemplateError unless batches can be padded and images marked with this processor's tokenizer."""
    tokenizer = processor.tokenizer
    if tokenizer.pad_token_id is None:
        raise TemplateError("the tokenizer has no pad_token; set one (padding takes part in nothing, eos may serve)")
    if tokenizer.pad_token_id == processor.image_token_id:
        raise TemplateError(f"the tokenizer pads with the image mark {str(processor.image_token)!r}; they must differ")


def _inside(starts: NDArray[np.int64], spans: Sequence[Span]) -> NDArray[np.bool_]:
    """Which tokens begin inside one of the spans."""
    inside = np.zeros(len(starts), dtype=np.bool_)
    for span in spans:
        inside |= (starts >= span.start) & (starts < span.end)
    return inside
