from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlavaProcessor, PreTrainedTokenizerFast

from moe_lvlm.data.errors import BadRecordError, RecordFault
from moe_lvlm.data.records import Turn
from moe_lvlm.data.sample import Sample, SampleBuilder
from moe_lvlm.data.templates import build_template

from .conftest import MakeBuilder, MakeSource, conversation, image_processor, num_image_tokens

GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)


def supervised(sample: Sample, tokenizer: PreTrainedTokenizerFast) -> str:
    return tokenizer.decode(sample.labels[sample.labels != -100])


def test_ids_and_labels_by_hand(make_source: MakeSource) -> None:
    # one id a word; 4 image tokens for 16 x 16 pixels
    words = ["<pad>", "</s>", "<image>", "U:", "A:", "what", "?", "cat", "two", "dogs"]
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="</s>", additional_special_tokens=["<image>"],
        chat_template="{% for m in messages %}{{ ('U: ' if m['role'] == 'user' else 'A: ') + m['content'] }}"
        "{{ eos_token if m['role'] == 'assistant' else ' ' }}{% endfor %}{{ 'A:' if add_generation_prompt }}",
    )  # fmt: skip
    processor = LlavaProcessor(image_processor(), tokenizer, patch_size=8, vision_feature_select_strategy="default")
    template = build_template("chat", "tokenizer", tokenizer, "<image>")
    builder = SampleBuilder(processor, template, num_image_tokens=num_image_tokens, max_length=99)
    turns = conversation("<image> what ?", "cat", "what <image>", "two dogs")
    source = make_source([{"image": ["red.png", "wide.png"], "conversations": turns, "task": "count"}])

    sample = source.sample(0, builder)
    #                                U: <image>     what ? A: cat </s> U: what <image>   A: two dogs </s>
    assert sample.input_ids.tolist() == [3, 2, 2, 2, 2, 5, 6, 4, 7, 1, 3, 5, 2, 2, 2, 2, 4, 8, 9, 1]
    x = -100
    assert sample.labels.tolist() == [x, x, x, x, x, x, x, x, 7, 1, x, x, x, x, x, x, x, 8, 9, 1]
    assert sample.instruction.nonzero().flatten().tolist() == [5, 6, 11]
    assert (sample.key, sample.dataset, sample.task, sample.image_tokens) == ("a/0", "a", "count", (4, 4))
    assert sample.pixel_values is not None
    assert sample.pixel_values.shape == (2, 3, 16, 16)
    assert sample.pixel_values.dtype == torch.float32

    prompt = source.prompt(0, builder)
    assert prompt.input_ids.tolist() == [3, 2, 2, 2, 2, 5, 6, 4, 7, 1, 3, 5, 2, 2, 2, 2, 4]
    assert prompt.pixel_values is not None
    assert torch.equal(prompt.pixel_values, sample.pixel_values)


@pytest.mark.parametrize(
    "texts",
    [("what is it?", "a cat"), ("é 猫 ü", "猫é.", "  and ?\n", "\nred  "), ("user", "assistant", "mat", "<|im_end|")],
)
def test_labels_are_those_of_transformers_generation_blocks(
    make_builder: MakeBuilder, make_source: MakeSource, tokenizer: PreTrainedTokenizerFast, texts: tuple[str, ...]
) -> None:
    messages = [{"role": ("user", "assistant")[i % 2], "content": text.strip()} for i, text in enumerate(texts)]
    expected = tokenizer.apply_chat_template(
        messages, chat_template=GENERATION, return_assistant_tokens_mask=True, return_dict=True
    )
    sample = make_source([{"conversations": conversation(*texts)}]).sample(0, make_builder())
    assert sample.input_ids.tolist() == expected["input_ids"]
    assert (sample.labels != -100).long().tolist() == expected["assistant_masks"]
    assert torch.equal(sample.labels[sample.labels != -100], sample.input_ids[sample.labels != -100])


def test_supervised_text_and_pixels(
    make_builder: MakeBuilder, make_source: MakeSource, tokenizer: PreTrainedTokenizerFast
) -> None:
    source = make_source([{"image": "red.png", "conversations": conversation("<image>\nwhat is it?", " a cat ")}])
    chat = source.sample(0, make_builder())
    assert supervised(chat, tokenizer) == "a cat<|im_end|>"
    assert tokenizer.decode(chat.input_ids[chat.instruction]).strip() == "what is it?"
    assert supervised(source.sample(0, make_builder(chat_template="vicuna_v1")), tokenizer) == " a cat</s>"
    plain = source.sample(0, make_builder("plain"))
    assert supervised(plain, tokenizer) == "a cat</s>"
    assert tokenizer.decode(plain.input_ids) == "<image>" * 4 + "a cat</s>"
    # a red image by CLIP's published mean and deviation
    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    red = [(value - m) / d for value, m, d in zip((1, 0, 0), mean, deviation, strict=True)]
    assert plain.pixel_values is not None
    np.testing.assert_allclose(plain.pixel_values[0, :, 5, 5], red, rtol=1e-5)


def test_a_prompts_ids_are_the_beginning_of_the_samples(make_builder: MakeBuilder, make_source: MakeSource) -> None:
    texts = ("<image> what?", "red", "<image>where is the 猫 ", "on the mat", "and\n\n", "a dog")
    source = make_source([{"image": ["red.png", "red.png"], "conversations": conversation(*texts)}])
    for name in ("chatml", "vicuna_v1"):
        builder = make_builder(chat_template=name)
        sample, prompt = source.sample(0, builder), source.prompt(0, builder)
        length = len(prompt.input_ids)
        assert torch.equal(sample.input_ids[:length], prompt.input_ids)
        assert torch.equal(sample.instruction[:length], prompt.instruction)
        # the very next token is the first of the last answer
        assert int((sample.labels != -100).nonzero()[-1]) > length
        assert sample.labels[length] != -100
        assert sample.labels[length - 1] == -100


def test_max_length_cuts_or_refuses(make_builder: MakeBuilder, make_source: MakeSource) -> None:
    late_image = conversation("q", "a cat", "<image>", "b")
    source = make_source(
        [
            {"conversations": conversation("q", "a cat on the mat")},
            {"id": "late", "image": "red.png", "conversations": late_image},
        ]
    )
    whole = [source.sample(index, make_builder()) for index in range(2)]
    first = int((whole[0].labels != -100).nonzero()[0])
    cut = source.sample(0, make_builder(max_length=first + 1))
    assert torch.equal(cut.input_ids, whole[0].input_ids[: first + 1])
    assert (cut.labels != -100).sum() == 1
    with pytest.raises(
        BadRecordError, match=rf"{len(whole[0].input_ids)} tokens; .*max_length \({first}\).*no token of"
    ):
        source.sample(0, make_builder(max_length=first))

    image_token = make_builder().processor.image_token_id
    last_image = int((whole[1].input_ids == image_token).nonzero()[-1])
    assert len(source.sample(1, make_builder(max_length=last_image + 1)).input_ids) == last_image + 1
    with pytest.raises(BadRecordError, match=r"record 1 \(id 'late'\): .* would lose image tokens"):
        source.sample(1, make_builder(max_length=last_image))


def test_prompts_of_ones_own(make_builder: MakeBuilder) -> None:
    builder, image = make_builder(), Image.new("RGB", (9, 9))
    assert builder.prompt([Turn("human", "<image> q")], [image]).image_tokens == (4,)
    assert builder.prompt([Turn("human", "q")], []).pixel_values is None
    for turns, images, reason in (
        ([], [], "empty"),
        ([Turn("human", "q"), Turn("gpt", "a")], [], "is an answer"),
        ([Turn("human", "q")], [image], r"0 <image> mark\(s\) for 1"),
    ):
        with pytest.raises(RecordFault, match=reason):
            builder.prompt(turns, images)


def test_a_bad_record_names_file_record_and_reason(
    make_builder: MakeBuilder, make_source: MakeSource, tmp_path: Path
) -> None:
    qa = conversation("<image>", "a")
    source = make_source([{}, {"id": 9, "image": "none.png", "conversations": qa}])
    for index, id, reason in ((0, None, "`conversations` is missing"), (1, "9", "'none.png' is not a file")):
        with pytest.raises(BadRecordError) as caught:
            source.sample(index, make_builder())
        error = caught.value
        assert (error.file, error.index, error.id, error.key) == (str(tmp_path / "a.json"), index, id, f"a/{index}")
        assert reason in error.reason
        assert str(tmp_path / "a.json") in str(error)
