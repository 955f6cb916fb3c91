"""Talk with a run's model about an image: one question, or a conversation on the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from transformers import TextStreamer

from moe_lvlm.data.errors import RecordFault
from moe_lvlm.data.images import load_image
from moe_lvlm.data.records import IMAGE_MARK, Turn
from moe_lvlm.evaluation.generation import stream_answer
from moe_lvlm.evaluation.loaded import LoadedRun, load_run, run_recipe

HELP = "/image PATH shows another image, /reset forgets the conversation, /quit leaves"


def chat(
    run: str | Path,
    image: Path | None = None,
    question: str | None = None,
    *,
    max_new_tokens: int = 64,
    device: str | None = None,
    dtype: str | None = None,
) -> None:
    """Print the model's answers as they are generated.

    Args:
        run: the run's folder.
        image: the image to ask about, or None to begin with text alone.
        question: one question; None reads them from the terminal until /quit or the end of input.
        max_new_tokens: the longest answer, in tokens.
        device, dtype: as in `evaluate`.

    Raises:
        ValueError: no run, no checkpoint, an image that cannot be read, or an empty question.
    """
    shown = None if image is None else open_image(image)
    folder = Path(run)
    conversation = Conversation(
        load_run(folder, run_recipe(folder), device=device, dtype=dtype), max_new_tokens=max_new_tokens
    )
    if shown is not None:
        conversation.show(shown)
    if question is not None:
        conversation.ask(question)
        return
    print(HELP)
    for line in _typed_lines():
        if line == "/quit":
            return
        try:
            _obey(conversation, line)
        except ValueError as error:
            print(f"error: {error}")


class Conversation:
    """What was said and shown so far. An image belongs to the question that follows it."""

    def __init__(self, loaded: LoadedRun, *, max_new_tokens: int) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: {max_new_tokens}; at least 1 is needed")
        self._loaded = loaded
        self._max_new_tokens = max_new_tokens
        self._turns: tuple[Turn, ...] = ()
        self._images: tuple[Image.Image, ...] = ()
        self._next_image: Image.Image | None = None

    @property
    def turns(self) -> tuple[Turn, ...]:
        """Questions and answers in turn."""
        return self._turns

    def show(self, image: Image.Image) -> None:
        """The next question is about this image."""
        self._next_image = image

    def reset(self) -> None:
        """Forget all questions, answers and images, but for the last image: the next question is about it."""
        if self._next_image is None and self._images:
            self._next_image = self._images[-1]
        self._turns, self._images = (), ()

    def ask(self, question: str) -> str:
        """Print the answer while it is generated, and remember both. Nothing is remembered of what fails.

        Raises:
            ValueError: an empty question, one that holds an image mark, or one that the template cannot render.
        """
        text = question.strip()
        if not text:
            raise ValueError("the question is empty; write at least a word")
        if IMAGE_MARK in text:
            raise ValueError(f"{IMAGE_MARK} stands in the question; show an image instead (/image PATH)")
        images = self._images
        if self._next_image is not None:
            text, images = f"{IMAGE_MARK}\n{text}", (*images, self._next_image)
        turns = (*self._turns, Turn("human", text))
        loaded = self._loaded
        answer = stream_answer(
            loaded.model,
            loaded.processor,
            loaded.builder.prompt(turns, images, connector_words=question.strip()),
            max_new_tokens=self._max_new_tokens,
            streamer=TextStreamer(loaded.processor.tokenizer, skip_prompt=True, skip_special_tokens=True),
            end_ids=loaded.end_ids,
        )
        if not answer:
            # an empty turn would not be a conversation that the model knows
            print("(the model gave no answer; the question is forgotten)")
            return answer
        self._turns, self._images, self._next_image = (*turns, Turn("gpt", answer)), images, None
        return answer


def open_image(path: Path) -> Image.Image:
    """An image file that the user named, RGB.

    Raises:
        ValueError: it is missing or broken.
    """
    file = path.expanduser().resolve()
    if not file.is_file():
        what = "not a file" if file.exists() else "no such file"
        raise ValueError(f"image {str(path)!r}: {what}; give the path of an image")
    try:
        return load_image(file.parent, file.name)
    except RecordFault as fault:
        raise ValueError(fault.reason) from fault


def _obey(conversation: Conversation, line: str) -> None:
    command, _, argument = line.partition(" ")
    match command:
        case "":
            return
        case "/reset":
            conversation.reset()
            print("(a new conversation)")
        case "/image":
            if not argument.strip():
                raise ValueError("/image: the path is missing; write /image PATH")
            conversation.show(open_image(Path(argument.strip())))
            print("(the next question is about this image)")
        case _ if command.startswith("/"):
            raise ValueError(f"unknown command {command}; {HELP}")
        case _:
            conversation.ask(line)


def _typed_lines() -> Iterator[str]:
    """Lines from the terminal until its end."""
    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            print()
            return
