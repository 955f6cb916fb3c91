"""Tokens of the pack scene_tasks: tokenizers that know all its words, and batches in InstructBLIP's form.

B rows, S sequence, L words of the Q-Former, A answer
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from scenes_teaching import IGNORED, pad
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

PAD, UNKNOWN, CLASSIFIER, SEPARATOR, BEGIN, END, IMAGE = (
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "<s>", "</s>"),
    "<image>",
)
SPECIAL = (PAD, UNKNOWN, CLASSIFIER, SEPARATOR, BEGIN, END, IMAGE)
# beside the words of records and instructions: what users may ask with
FURTHER_WORDS = "yes no zero one two three four 0 1 2 3 4 5 6 7 8 9 10 a b c d . , : ; ? ! ' \" ( ) -"
MAX_TOKENS = 128
SPLIT = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")])


class Tokenizers(NamedTuple):
    """language_model: `closes_prompt` tells an encoder's, which ends a text with </s>, from a decoder's, which begins
    it with <s>. qformer: [CLS] at place 0, [SEP] at the end, as BERT's."""

    language_model: PreTrainedTokenizerFast
    qformer: PreTrainedTokenizerFast
    closes_prompt: bool


class Exercise(NamedTuple):
    """words: what the Q-Former reads."""

    words: str
    instruction: str
    answer: str


def vocabulary(texts: Iterable[str]) -> dict[str, int]:
    """Ids of the special tokens and of every lower-case word and punctuation mark of the texts."""
    words = {word for text in {*texts, FURTHER_WORDS} for word, _ in SPLIT.pre_tokenize_str(text.lower())}
    return {token: index for index, token in enumerate((*SPECIAL, *sorted(words)))}


def make_tokenizers(ids: dict[str, int], *, closes_prompt: bool) -> Tokenizers:
    if closes_prompt:
        language_model = _tokenizer(ids, f"$A {END}", eos_token=END)
    else:
        # rows of different length are padded before the images, and generated text follows the prompts
        language_model = _tokenizer(ids, f"{BEGIN} $A", bos_token=BEGIN, eos_token=END, padding_side="left")
    qformer = _tokenizer(ids, f"{CLASSIFIER} $A {SEPARATOR}", cls_token=CLASSIFIER, sep_token=SEPARATOR)
    return Tokenizers(language_model, qformer, closes_prompt)


def _tokenizer(ids: dict[str, int], form: str, *, padding_side: str = "right", **marks: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(ids, UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = SPLIT
    special = [(mark, ids[mark]) for mark in marks.values()]
    tokenizer.post_processor = processors.TemplateProcessing(single=form, special_tokens=special)
    # joins words with spaces and takes away those before punctuation
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        # not as image_token: InstructBlipProcessor takes the text of a token of its own only
        additional_special_tokens=[IMAGE],
        model_max_length=MAX_TOKENS,
        padding_side=padding_side,
        pad_token=PAD,
        unk_token=UNKNOWN,
        **marks,
    )


def training_batch(exercises: Sequence[Exercise], tokenizers: Tokenizers, *, num_queries: int) -> dict[str, Tensor]:
    """What InstructBlipForConditionalGeneration takes beside pixels: image tokens first, loss on the answer and </s>.

    input_ids, attention_mask [B, S]; labels [B, S], for an encoder and a decoder [B, A]; qformer_* [B, L].
    """
    end = tokenizers.language_model.eos_token_id
    rows, labels = [], []
    for exercise in exercises:
        prompt = _prompt_ids(exercise, tokenizers, num_queries)
        answer = [*tokenizers.language_model(exercise.answer, add_special_tokens=False).input_ids, end]
        rows.append(prompt if tokenizers.closes_prompt else prompt + answer)
        labels.append(answer if tokenizers.closes_prompt else [IGNORED] * len(prompt) + answer)
    lengths = [len(row) for row in rows]
    # padding stands at the end, where a causal model's earlier tokens never look
    batch = {"input_ids": pad(rows, tokenizers.language_model.pad_token_id), "labels": pad(labels, IGNORED)}
    batch["attention_mask"] = pad([[1] * length for length in lengths], 0)
    return batch | _qformer_batch(exercises, tokenizers)


def prompt_batch(exercises: Sequence[Exercise], tokenizers: Tokenizers, *, num_queries: int) -> dict[str, Tensor]:
    """The same without answers, padded before the prompts, for generation."""
    rows = [_prompt_ids(exercise, tokenizers, num_queries) for exercise in exercises]
    # a causal model goes on from the end of a row; an encoder does not mind
    flipped = [row[::-1] for row in rows]
    return {
        "input_ids": pad(flipped, tokenizers.language_model.pad_token_id).flip(1),
        "attention_mask": pad([[1] * len(row) for row in rows], 0).flip(1),
        **_qformer_batch(exercises, tokenizers),
    }


def _prompt_ids(exercise: Exercise, tokenizers: Tokenizers, num_queries: int) -> list[int]:
    image = tokenizers.language_model.convert_tokens_to_ids(IMAGE)
    return [image] * num_queries + tokenizers.language_model(exercise.instruction).input_ids


def _qformer_batch(exercises: Sequence[Exercise], tokenizers: Tokenizers) -> dict[str, Tensor]:
    rows = [tokenizers.qformer(exercise.words).input_ids for exercise in exercises]
    ids_BL = pad(rows, tokenizers.qformer.pad_token_id)
    return {"qformer_input_ids": ids_BL, "qformer_attention_mask": (ids_BL != tokenizers.qformer.pad_token_id).long()}


def decode_answers(ids: Tensor, tokenizers: Tokenizers) -> list[str]:
    return [text.strip() for text in tokenizers.language_model.batch_decode(ids, skip_special_tokens=True)]


def plain(text: str) -> str:
    """The words that a tokenizer would give back, with single spaces."""
    return " ".join(word for word, _ in SPLIT.pre_tokenize_str(text.lower()))


def tokens_of(texts: Sequence[str], tokenizers: Tokenizers) -> list[list[int]]:
    return [tokenizers.language_model(text, add_special_tokens=False).input_ids for text in texts]
