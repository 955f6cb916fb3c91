"""Template `instruct` and what a Q-Former reads: prompts against InstructBlipProcessor's, samples by hand."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moe_lvlm.config.recipe import DataSettings
from moe_lvlm.data.collator import Collator, pad_rows
from moe_lvlm.data.connector_text import ConnectorText
from moe_lvlm.data.errors import BadRecordError, RecordFault, TemplateError
from moe_lvlm.data.mixture import build_samples
from moe_lvlm.data.records import Record, Turn
from moe_lvlm.data.sample import Prompt, SampleBuilder
from moe_lvlm.data.templates import build_template, end_of_turn_id

from .conftest import MakeSource, conversation, image_processor
from .families import DECODER_ONLY, NUM_QUERIES, WORDS, QFormerProcessor, bert, num_queries, processor, t5, word_level

FAMILIES = {**DECODER_ONLY, "t5": t5}
ASKED = ("What is in the image?", "Question: what is on the mat? Short answer:", "zzé 猫  x", "A photo of")
RED = Image.new("RGB", (20, 20), (255, 0, 0))
X = -100


def builder_of(family: str, max_length: int = 99) -> SampleBuilder:
    settings = DataSettings(max_length=max_length)
    made = processor(FAMILIES[family]())
    return build_samples(settings, "instruct", made, num_queries, answers_apart=family == "t5")


def by_hand(text: str, first: int) -> list[int]:
    """Ids of a word-level tokenizer whose words begin at id `first`."""
    return [first + WORDS.index(word) for word in text.split()]


def connector_ids(prompt: Prompt) -> list[int]:
    assert prompt.connector_ids is not None
    assert prompt.connector_ids.dtype == torch.int64
    return prompt.connector_ids.tolist()


@pytest.fixture(scope="module", params=list(FAMILIES))
def builder(request: pytest.FixtureRequest) -> SampleBuilder:
    return builder_of(request.param)


@pytest.mark.parametrize("words", ASKED)
def test_prompts_are_those_of_instructblips_processor(builder: SampleBuilder, words: str) -> None:
    expected = builder.processor(images=RED, text=words)
    prompt = builder.prompt([Turn("human", f"<image>\n{words} ")], [RED])
    assert prompt.input_ids.tolist() == expected["input_ids"][0]
    # its Q-Former text is not cut to the tokenizer's length, which is 9
    ids = expected["qformer_input_ids"][0]
    assert connector_ids(prompt) == (ids if len(ids) <= 9 else [*ids[:8], ids[-1]])
    assert prompt.pixel_values is not None
    assert torch.equal(prompt.pixel_values[0], torch.as_tensor(expected["pixel_values"][0]))


@pytest.mark.parametrize("words", [*ASKED, ""])
def test_a_sample_begins_with_the_prompt_and_learns_the_answer(
    builder: SampleBuilder, make_source: MakeSource, words: str
) -> None:
    record = {"image": "red.png", "conversations": conversation(f"<image>\n{words}", " a red cat\n")}
    source = make_source([record])
    sample, prompt = source.sample(0, builder), source.prompt(0, builder)
    tokenizer, length = builder.processor.tokenizer, len(prompt.input_ids)
    assert torch.equal(sample.input_ids[:length], prompt.input_ids)
    assert torch.equal(sample.instruction[:length], prompt.instruction)
    if builder.answers_apart:
        # as a text-to-text model is taught: the answer by itself, closed as its own tokenizer does
        assert len(sample.input_ids) == len(sample.instruction) == length
        assert sample.labels.tolist() == [X, *tokenizer("a red cat")["input_ids"]]
    else:
        assert (sample.labels[:length] == X).all()
        assert torch.equal(sample.labels[length:], sample.input_ids[length:])
        assert sample.labels[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(sample.labels[length:-1]).strip() == "a red cat"
    marks = [builder.processor.image_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id]
    is_mark = torch.tensor([id in marks for id in prompt.input_ids.tolist()])
    assert torch.equal(prompt.instruction, ~is_mark)
    assert sample.connector_ids is not None
    assert sample.connector_ids.tolist() == connector_ids(prompt)


def test_decoder_only_by_hand(make_source: MakeSource) -> None:
    turns = conversation("<image>\nQuestion: what is on the mat?", "two dogs")
    sample = make_source([{"image": "red.png", "conversations": turns}]).sample(0, builder_of("word_level"))
    # <pad> <s> </s> <unk> <image> are 0 to 4
    question, answer = by_hand("question : what is on the mat ?", 5), [*by_hand("two dogs", 5), 2]
    assert sample.input_ids.tolist() == [4] * NUM_QUERIES + [1] + question + answer
    assert sample.labels.tolist() == [X] * (NUM_QUERIES + 1 + len(question)) + answer
    assert sample.instruction.nonzero().flatten().tolist() == list(range(NUM_QUERIES + 1, NUM_QUERIES + 9))
    assert sample.image_tokens == (NUM_QUERIES,)


def test_max_length_counts_prompt_and_answer(make_source: MakeSource) -> None:
    turns = conversation("<image> what is red?", "a red cat on the mat")
    source = make_source([{"image": "red.png", "conversations": turns}])
    for family in ("word_level", "t5"):
        whole = source.sample(0, builder_of(family))
        length = len(source.prompt(0, builder_of(family)).input_ids)
        cut = source.sample(0, builder_of(family, max_length=length + 2))
        assert torch.equal(cut.labels[cut.labels != X], whole.labels[whole.labels != X][:2])
        assert len(cut.input_ids) == (length if family == "t5" else length + 2)
        with pytest.raises(BadRecordError, match="would keep no token of an answer"):
            source.sample(0, builder_of(family, max_length=length))


def test_the_connector_reads_the_bare_question() -> None:
    builder = builder_of("word_level")
    turns = (Turn("human", "<image>\nQ: what is red? Short answer:"),)
    # [CLS] and [SEP] are 2 and 3
    assert connector_ids(builder.prompt(turns, [RED])) == [2, *by_hand("q : what is red ? short", 4), 3]
    bare = builder.prompt(turns, [RED], connector_words="what is red?")
    assert connector_ids(bare) == [2, *by_hand("what is red ?", 4), 3]
    assert torch.equal(bare.input_ids, builder.prompt(turns, [RED]).input_ids)
    assert connector_ids(builder.prompt(turns, [RED], connector_words="")) == [2, 3]


def test_the_connector_reads_the_whole_instruction(make_source: MakeSource) -> None:
    builder, root = builder_of("word_level"), make_source([{}]).image_root
    builder.reads_instruction = True
    turns = (Turn("human", "<image>\nQ: what is red? Short answer:"), Turn("gpt", "a cat"))
    record = Record(id=None, images=("red.png",), turns=turns, question="what is red?")
    whole = [2, *by_hand("q : what is red ? short", 4), 3]
    sample = builder.sample(record, root, dataset="d", key="d/0")
    assert sample.connector_ids is not None
    assert sample.connector_ids.tolist() == whole
    assert connector_ids(builder.record_prompt(record, root)) == whole


def test_a_records_question_reaches_samples_and_prompts(make_source: MakeSource) -> None:
    builder, root = builder_of("word_level"), make_source([{}]).image_root
    turns = (Turn("human", "<image>\nQ: what is red? Short answer:"), Turn("gpt", "a cat"))
    record = Record(id=None, images=("red.png",), turns=turns, question="what is red?")
    sample = builder.sample(record, root, dataset="d", key="d/0", draw=7)
    assert sample.draw == 7
    assert sample.connector_ids is not None
    assert sample.connector_ids.tolist() == [2, *by_hand("what is red ?", 4), 3]
    assert connector_ids(builder.record_prompt(record, root)) == sample.connector_ids.tolist()


def test_answers_end_with_eos(builder: SampleBuilder) -> None:
    tokenizer = builder.processor.tokenizer
    assert end_of_turn_id(builder.template, tokenizer) == tokenizer.eos_token_id


def test_what_does_not_fit_the_template(builder: SampleBuilder) -> None:
    turns = tuple(Turn(("human", "gpt")[i % 2], "a") for i in range(3))
    with pytest.raises(RecordFault, match="3 turns; template instruct takes one question and one answer"):
        builder.template.render(turns)


def test_what_the_template_cannot_be_built_for() -> None:
    tokenizer = word_level()
    for kind in ("plain", "chat"):
        with pytest.raises(TemplateError, match=f"template {kind}: .* allowed: instruct"):
            build_template(kind, "vicuna_v1", tokenizer, "<image>", closes_prompt=True)
    tokenizer.eos_token = None
    with pytest.raises(TemplateError, match="template instruct: the tokenizer has no eos_token"):
        build_template("instruct", "tokenizer", tokenizer, "<image>")
    # one whose tokens may reach over a blank
    joining = Tokenizer(
        models.BPE({"<image>": 0, "</s>": 1, ":": 2, " ": 3, ": ": 4, "?": 5}, [(":", " ")], unk_token="?")
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=joining, eos_token="</s>", additional_special_tokens=["<image>"])
    with pytest.raises(TemplateError, match="joins the question's end with the answer's beginning"):
        build_template("instruct", "tokenizer", fast, "<image>")


def plain_words(**tokens: str) -> PreTrainedTokenizerFast:
    """A tokenizer that puts no special token anywhere."""
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[CLS]", "<s>", "?", "red", "cat"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", **tokens)


def test_what_stands_first_in_a_connectors_text() -> None:
    bos = ConnectorText(plain_words(pad_token="[PAD]", bos_token="<s>"))
    assert [bos("red cat").tolist(), bos("").tolist()] == [[2, 4, 5], [2]]
    both = ConnectorText(plain_words(pad_token="[PAD]", bos_token="<s>", cls_token="[CLS]"))
    assert both("cat").tolist() == [1, 5]
    with pytest.raises(TemplateError, match="neither cls_token nor bos_token"):
        ConnectorText(plain_words(pad_token="[PAD]"))
    with pytest.raises(TemplateError, match="no pad_token"):
        ConnectorText(plain_words(cls_token="[CLS]"))


def test_a_connectors_text_is_cut_to_its_tokenizers_length() -> None:
    words = "what is in the image a photo of red dogs"
    assert ConnectorText(bert())(words).tolist() == [2, *by_hand(words, 4)[:7], 3]
    short = plain_words(pad_token="[PAD]", bos_token="<s>")
    short.model_max_length = 3
    assert ConnectorText(short)("red cat red cat").tolist() == [2, 4, 5]


def test_a_batch_has_a_row_of_words_an_image(make_source: MakeSource) -> None:
    builder = builder_of("word_level")
    source = make_source(
        [
            {"image": ["red.png", "red.png"], "conversations": conversation("<image> what is <image> ?", "a cat")},
            {"conversations": conversation("what is red?", "cat")},
            {"image": "red.png", "conversations": conversation("<image>A photo", "dogs")},
        ]
    )
    collator = Collator.for_processor(builder.processor)
    batch = collator([source.sample(index, builder, draw=(5, 2**63 - 1, 0)[index]) for index in range(3)])
    asked = [2, *by_hand("what is ?", 4), 3]
    caption = [2, *by_hand("a photo", 4), 3]
    assert batch["qformer_input_ids"].tolist() == [asked, asked, [*caption, 0]]
    assert batch["qformer_attention_mask"].tolist() == [[1] * 5, [1] * 5, [1, 1, 1, 1, 0]]
    assert batch["qformer_input_ids"].shape[0] == batch["pixel_values"].shape[0]
    assert batch["routing"].draw_N is not None
    assert batch["routing"].draw_N.tolist() == [5, 2**63 - 1, 0]
    text = collator([source.sample(1, builder)])
    assert "qformer_input_ids" not in text
    assert text["routing"].draw_N is None


def test_a_batch_of_answers_apart(make_source: MakeSource) -> None:
    builder = builder_of("t5")
    turns = [conversation("<image> what is red?", "a cat"), conversation("<image> what?", "two dogs on the mat")]
    source = make_source([{"image": "red.png", "conversations": one} for one in turns])
    samples = [source.sample(index, builder) for index in range(2)]
    batch = Collator.for_processor(builder.processor)(samples)
    assert len(samples[0].input_ids) > len(samples[1].input_ids)
    assert len(samples[0].labels) < len(samples[1].labels)
    for row, sample in enumerate(samples):
        ids, labels = batch["input_ids"][row].tolist(), batch["labels"][row].tolist()
        assert ids == sample.input_ids.tolist() + [0] * (len(samples[0].input_ids) - len(sample.input_ids))
        assert labels == sample.labels.tolist() + [X] * (len(samples[1].labels) - len(sample.labels))
        assert batch["attention_mask"][row].sum() == len(sample.input_ids)


def test_no_sample_gives_an_empty_batch_of_known_draws() -> None:
    made = QFormerProcessor(image_processor(), word_level(), bert(), num_query_tokens=NUM_QUERIES)
    batch = Collator.for_processor(made)([])
    assert (batch["input_ids"].tolist(), batch["labels"].tolist()) == ([[0]], [[X]])
    assert "qformer_input_ids" not in batch
    assert batch["routing"].draw_N is not None
    assert batch["routing"].draw_N.shape == (0,)


def test_rows_are_padded_on_the_right() -> None:
    ids, mask = pad_rows([torch.tensor([4, 5]), torch.tensor([6]), torch.tensor([], dtype=torch.int64)], 9)
    assert ids.tolist() == [[4, 5], [6, 9], [9, 9]]
    assert mask.tolist() == [[1, 1], [1, 0], [0, 0]]
    assert (ids.dtype, mask.dtype) == (torch.int64, torch.int64)
