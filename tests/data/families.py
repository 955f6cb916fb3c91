"""Small tokenizers of the families that InstructBLIP's language models and Q-Formers have."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import InstructBlipProcessor, PreTrainedTokenizerFast

from .conftest import byte_level_tokenizer, image_processor

WORDS = [
    *("what", "is", "in", "the", "image", "?", "a", "photo", "of", "short", "answer", ":", "question", "cat", "red"),
    *("two", "dogs", "q", ".", "choose", "from", "on", "mat"),
]
CORPUS = ["What is in the image? A photo of two dogs.", "Question: what is on the mat? Short answer: a red cat"] * 4
NUM_QUERIES = 3


def word_level() -> PreTrainedTokenizerFast:
    """One token a word, punctuation apart; a bos token first."""
    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + WORDS)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _fast(tokenizer, bos_token="<s>", unk_token="<unk>")


def llama(*, is_legacy: bool) -> PreTrainedTokenizerFast:
    """BPE over a text in which ▁ stands for blanks, bytes where a character is unknown; a bos token first.

    is_legacy: ▁ is put before every piece of text (Llama 2, Vicuna), else before the first alone.
    """
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    # split while learning, as SentencePiece does, and never afterwards
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    special = ["<unk>", "<s>", "</s>", "<pad>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=360, special_tokens=special))
    if is_legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([])
    else:
        tokenizer.normalizer = normalizers.Sequence([])
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _fast(tokenizer, bos_token="<s>", unk_token="<unk>")


def t5() -> PreTrainedTokenizerFast:
    """Unigram pieces, an eos token last, no bos token."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>")
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return _fast(tokenizer, unk_token="<unk>")


def bert() -> PreTrainedTokenizerFast:
    """One token a word between [CLS] and [SEP]; at most 9 in all."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=9,
    )


class QFormerProcessor(InstructBlipProcessor):
    """InstructBLIP's processor with the id that a batch is made by."""

    @property
    def image_token_id(self) -> int:
        return int(self.tokenizer.convert_tokens_to_ids("<image>"))


def processor(tokenizer: PreTrainedTokenizerFast) -> QFormerProcessor:
    return QFormerProcessor(image_processor(), tokenizer, bert(), num_query_tokens=NUM_QUERIES)


def num_queries(processor: InstructBlipProcessor, height: int, width: int) -> int:
    return int(processor.num_query_tokens)


DECODER_ONLY = {
    "word_level": word_level,
    "llama_legacy": lambda: llama(is_legacy=True),
    "llama": lambda: llama(is_legacy=False),
    "byte_level": byte_level_tokenizer,
}


def _fast(tokenizer: Tokenizer, **tokens: str) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken("<image>", special=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", **tokens)
