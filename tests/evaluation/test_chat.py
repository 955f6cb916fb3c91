"""Chat on a tiny run: what is printed, what is remembered, what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedModel

from moe_lvlm.data.records import Turn
from moe_lvlm.evaluation.chat import Conversation, chat, open_image
from moe_lvlm.evaluation.loaded import load_run, run_recipe

from .conftest import IMAGE_SIZE, NAMES, TinyPrompt, greedy_by_hand, write_run

NEW_TOKENS = 4
MARKS = "<image> <image> <image> <image>"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, moe_model: PreTrainedModel, processor: Any) -> Path:
    """A run's folder, with two pictures beside it."""
    folder = tmp_path_factory.mktemp("chat")
    generator = np.random.default_rng(4)
    for name in ("a", "b"):
        pixels = generator.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return write_run(folder, moe_model, processor, sets={})


@pytest.fixture
def conversation(run: Path) -> Conversation:
    return Conversation(load_run(run, run_recipe(run), device="cpu", dtype=None), max_new_tokens=NEW_TOKENS)


def pixels(*paths: Path) -> torch.Tensor | None:
    images = [torch.tensor(np.array(Image.open(path)), dtype=torch.float32).permute(2, 0, 1) for path in paths]
    return torch.stack(images) / 127.5 - 1 if images else None


def answer_by_hand(model: PreTrainedModel, text: str, *images: Path) -> str:
    prompt = TinyPrompt(torch.tensor([NAMES.index(word) for word in text.split()]), pixels(*images))
    ids = greedy_by_hand(model, prompt, steps=NEW_TOKENS, end_id=NAMES.index("</s>"))
    answer = " ".join(NAMES[token] for token in ids if token >= NAMES.index("what"))
    assert answer, "the tiny model is to say something here"
    return answer


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    waiting: Iterator[str] = iter(lines)

    def read_line(prompt: str) -> str:
        try:
            return next(waiting)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read_line)


def test_one_question_prints_its_answer(
    run: Path, moe_model: PreTrainedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    image = run.parent / "a.png"
    chat(run, image, "what is it ?", max_new_tokens=NEW_TOKENS, device="cpu")
    expected = answer_by_hand(moe_model, f"<s> Q : {MARKS} what is it ? A :", image)
    assert capsys.readouterr().out.split() == expected.split()


def test_a_conversation_keeps_its_history_and_its_images(
    run: Path, conversation: Conversation, moe_model: PreTrainedModel
) -> None:
    first, second = run.parent / "a.png", run.parent / "b.png"
    conversation.show(open_image(first))
    said = conversation.ask("what is it ?")
    text = f"<s> Q : {MARKS} what is it ? A : {said} </s> Q : how many ? A :"
    more = answer_by_hand(moe_model, text, first)
    assert conversation.ask("how many ?") == more
    conversation.show(open_image(second))
    text = text + f" {more} </s> Q : {MARKS} where ? A :"
    assert conversation.ask("where ?") == answer_by_hand(moe_model, text, first, second)
    assert [turn.role for turn in conversation.turns] == ["human", "gpt"] * 3

    conversation.reset()
    assert conversation.turns == ()
    # the last image stays in view
    expected = answer_by_hand(moe_model, f"<s> Q : {MARKS} where ? A :", second)
    assert conversation.ask("where ?") == expected


@pytest.mark.parametrize(("question", "message"), [(" ", "empty"), ("is <image> it ?", "<image> stands in the")])
def test_a_refused_question_leaves_no_trace(conversation: Conversation, question: str, message: str) -> None:
    conversation.ask("what ?")
    before = conversation.turns
    with pytest.raises(ValueError, match=message):
        conversation.ask(question)
    assert conversation.turns == before
    assert before[0] == Turn("human", "what ?")


def test_the_terminal_goes_on_after_mistakes(
    run: Path, moe_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image = run.parent / "b.png"
    typed(monkeypatch, "", "/image", "/image nowhere.png", "/hop", f"/image {image}", "where ?", "/quit", "what ?")
    chat(run, max_new_tokens=NEW_TOKENS, device="cpu")
    printed = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("error: ") for line in printed) == 3
    assert "error: image 'nowhere.png': no such file; give the path of an image" in printed
    expected = answer_by_hand(moe_model, f"<s> Q : {MARKS} where ? A :", image)
    assert printed[-1].split() == expected.split()


def test_the_end_of_input_ends_the_conversation(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(monkeypatch, "/reset")
    chat(run, device="cpu")
    assert "(a new conversation)" in capsys.readouterr().out


def test_images_that_cannot_be_read_are_named(run: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    for path, message in (
        (tmp_path / "none.png", "no such file"),
        (tmp_path, "not a file"),
        (tmp_path / "text.png", "'text.png' cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            chat(run, path, "what ?", device="cpu")


def test_an_answer_needs_room(run: Path) -> None:
    with pytest.raises(ValueError, match="max_new_tokens: 0"):
        chat(run, None, "what ?", max_new_tokens=0, device="cpu")
