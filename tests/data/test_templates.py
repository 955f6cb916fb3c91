from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moe_lvlm.data.errors import RecordFault, TemplateError
from moe_lvlm.data.records import Turn
from moe_lvlm.data.templates import Rendered, build_template, tokenize

TURNS = (Turn("human", "<image>\nwhat is it?"), Turn("gpt", "a cat"), Turn("human", "where?"), Turn("gpt", " mat "))

LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# as Qwen3's: the newest answer gets a block that earlier ones lose
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def parts(rendered: Rendered) -> tuple[list[str], list[str]]:
    return (
        [rendered.text[slice(*span)] for span in rendered.answers],
        [rendered.text[slice(*span)] for span in rendered.instructions],
    )


def test_vicuna_is_llavas_conversation_v1(tokenizer: PreTrainedTokenizerFast) -> None:
    # LLaVA's Conversation.get_prompt with sep " ", sep2 "</s>", roles USER and ASSISTANT, written out
    system = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful,"
        " detailed, and polite answers to the user's questions."
    )
    rendered = build_template("chat", "vicuna_v1", tokenizer, "<image>").render(TURNS)
    assert rendered.text == (
        f"<s>{system} USER: <image>\nwhat is it? ASSISTANT: a cat</s>USER: where? ASSISTANT: mat</s>"
    )
    assert parts(rendered) == ([" a cat</s>", " mat</s>"], ["<image>\nwhat is it?", "where?"])


def test_chatml_ends_an_answer_with_its_token(tokenizer: PreTrainedTokenizerFast) -> None:
    rendered = build_template("chat", "tokenizer", tokenizer, "<image>").render(TURNS)
    assert rendered.text == (
        "<|im_start|>user\n<image>\nwhat is it?<|im_end|>\n<|im_start|>assistant\na cat<|im_end|>\n"
        "<|im_start|>user\nwhere?<|im_end|>\n<|im_start|>assistant\nmat<|im_end|>\n"
    )
    assert parts(rendered) == (["a cat<|im_end|>", "mat<|im_end|>"], ["<image>\nwhat is it?", "where?"])


def test_a_template_from_a_file(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "llama2.jinja").write_text(LLAMA2)
    rendered = build_template("chat", str(tmp_path / "llama2.jinja"), tokenizer, "<image>").render(TURNS)
    assert parts(rendered) == ([" a cat </s>", " mat </s>"], ["<image>\nwhat is it?", "where?"])


@pytest.mark.parametrize("name", ["vicuna_v1", "chatml"])
@pytest.mark.parametrize(
    "word", ["user", "USER: ", "ASSISTANT", "t", ">", "<|im_end|>", "{{ 7 }}", "assistant\n", "猫"]
)
def test_words_of_the_template_in_a_turn_confuse_nothing(
    tokenizer: PreTrainedTokenizerFast, name: str, word: str
) -> None:
    turns = (Turn("human", word), Turn("gpt", word), Turn("human", word), Turn("gpt", word))
    ending = {"vicuna_v1": "</s>", "chatml": "<|im_end|>"}[name]
    blank = {"vicuna_v1": " ", "chatml": ""}[name]
    answers, instructions = parts(build_template("chat", name, tokenizer, "<image>").render(turns))
    assert answers == [blank + word.strip() + ending] * 2
    assert instructions == [word.strip()] * 2


def test_the_prompt_is_the_beginning_of_the_training_text(tokenizer: PreTrainedTokenizerFast) -> None:
    for name in ("vicuna_v1", "chatml"):
        template = build_template("chat", name, tokenizer, "<image>")
        prompt, whole = template.render(TURNS[:3]), template.render(TURNS)
        assert whole.text.startswith(prompt.text)
        assert len(prompt.text) == whole.answers[1].start
        assert (prompt.answers, prompt.instructions) == (whole.answers[:1], whole.instructions)


def test_the_image_mark_may_have_another_name(tokenizer: PreTrainedTokenizerFast) -> None:
    template = build_template("chat", "chatml", tokenizer, "<|im_start|>")
    assert template.render(TURNS[:1]).text.startswith("<|im_start|>user\n<|im_start|>\nwhat")


@pytest.mark.parametrize(
    ("jinja", "message"),
    [
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "nothing follows an answer"),
        (FORGETFUL, "does not render turn 2 as.*Allowed are.*chatml"),
        ("{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}{% if add_generation_prompt %}GO{% endif %}",
         "up to turn 1 .* not a prefix"),
        ("{% for m in messages %}{{ m['content'] | upper + eos_token }}{% endfor %}", "back as it was written"),
        ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
         "{% if add_generation_prompt %}assistant: {% endif %}", "joins the end of the generation prompt"),
        ("{{ raise_exception('no') }}", "fails: no"),
        ("{% if %}", "fails"),
    ],
)  # fmt: skip
def test_a_template_that_cannot_be_trained_on_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, jinja: str, message: str
) -> None:
    (tmp_path / "t.jinja").write_text(jinja)
    with pytest.raises(TemplateError, match=message):
        build_template("chat", str(tmp_path / "t.jinja"), tokenizer, "<image>")


def test_what_a_recipe_may_name(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TemplateError, match="'vicuna_v2' is not a file; allowed are tokenizer, vicuna_v1"):
        build_template("chat", "vicuna_v2", tokenizer, "<image>")
    with pytest.raises(TemplateError, match="'<picture>' is not one token"):
        build_template("chat", "chatml", tokenizer, "<picture>")
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<image>": 0, "u": 1}, unk_token="u")))
    with pytest.raises(TemplateError, match="has no chat template of its own"):
        build_template("chat", "tokenizer", bare, "<image>")
    with pytest.raises(TemplateError, match="no eos_token"):
        build_template("plain", "tokenizer", bare, "<image>")


def test_plain_is_images_and_caption(tokenizer: PreTrainedTokenizerFast) -> None:
    template = build_template("plain", "tokenizer", tokenizer, "<image>")
    rendered = template.render((Turn("human", "describe <image> <image>"), Turn("gpt", "two dogs\n")))
    assert rendered.text == "<image><image>two dogs</s>"  # this tokenizer puts no bos token by itself
    assert parts(rendered) == (["two dogs</s>"], [])
    assert template.render((Turn("human", "<image>"),)).text == "<image>"
    with pytest.raises(RecordFault, match="has no image"):
        template.render((Turn("human", "q"), Turn("gpt", "a")))
    with pytest.raises(RecordFault, match="has 4 turns"):
        template.render(TURNS)


def test_plain_starts_with_bos_where_the_tokenizer_does() -> None:
    from tokenizers.processors import TemplateProcessing

    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<image>": 2, "cat": 3, "?": 4}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", additional_special_tokens=["<image>"]
    )
    rendered = build_template("plain", "tokenizer", tokenizer, "<image>").render(
        (Turn("human", "<image>"), Turn("gpt", "cat"))
    )
    assert tokenize(tokenizer, rendered.text).ids == [0, 2, 3, 1]
