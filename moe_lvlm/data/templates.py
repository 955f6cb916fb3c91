"""How a conversation becomes one text, and which parts of it are answers and instructions.

A training text and a prompt for generation come from the same code: the prompt is a prefix of the training text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple, Protocol

from jinja2 import TemplateError as JinjaError
from transformers import PreTrainedTokenizerBase

from moe_lvlm.data import packs
from moe_lvlm.data.errors import RecordFault, TemplateError
from moe_lvlm.data.instructions import first_instruction
from moe_lvlm.data.records import IMAGE_MARK, Turn

BUILTIN_TEMPLATES = {
    # LLaVA-1.5's conversation "v1"; the generation prompt ends without a blank, as its own does
    "vicuna_v1": (
        "{{ bos_token or '' }}"
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}USER: {{ message['content'] }} "
        "{% else %}ASSISTANT: {{ message['content'] }}{{ eos_token }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}

CHAT_ROLES = {"human": "user", "gpt": "assistant"}


class Span(NamedTuple):
    """Characters start <= i < end of a rendered text."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text.

    answers: what the loss is on, each with the end of turn that follows it. instructions: the user's own words.
    cuts: where the text falls into pieces, each of which becomes tokens by itself: tokenizers treat a text's beginning
    in their own way.
    """

    text: str
    answers: tuple[Span, ...]
    instructions: tuple[Span, ...]
    cuts: tuple[int, ...] = ()


class Template(Protocol):
    """Renders a conversation whose last turn is an answer (training) or a human's (a prompt to go on from)."""

    def render(self, turns: Sequence[Turn]) -> Rendered:
        """Raises RecordFault if the conversation does not fit the template."""
        ...


class ChatTemplate:
    """LLaVA's stages II and III: the whole conversation by a chat template, loss on the answers.

    An answer's span reaches from the end of the generation prompt to the end of the turn's closing token; blanks after
    that token are left out, since generation has stopped by then. Turns lose outer blanks (tokenizers join them with
    what stands beside them). Raises TemplateError when built if, for this tokenizer, a generation prompt is not a
    prefix of the text with the answer (in characters and in tokens), or nothing ends an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_token: str, jinja: str, *, name: str) -> None:
        self._tokenizer = tokenizer
        self._image_token = image_token
        self._jinja = jinja
        self._name = name
        # what the template puts between a user's words and the answer, and after the answer, seen on a trial
        trial = (Turn("human", "azure"), Turn("gpt", "bronze"), Turn("human", "copper"), Turn("gpt", "the"))
        prompt, through = self._prompt(trial[:1]), self._text(trial[:2], add_generation_prompt=False)
        self._after_user = prompt.rpartition("azure")[2]
        self._after_answer = through.rpartition("bronze")[2]
        self._before_answer = through[len(prompt) :].partition("bronze")[0]
        if not self._after_answer:
            raise TemplateError(
                f"chat template {name!r}: nothing follows an answer, so no model could learn to end one; put the"
                f" end-of-turn or eos token there (this tokenizer's eos_token is {tokenizer.eos_token!r})"
            )
        try:
            rendered = self.render(trial)
        except RecordFault as fault:
            raise TemplateError(
                f"chat template {name!r} cannot be trained on: {fault.reason}. Allowed are templates that render a"
                f" conversation's beginning the same whatever follows, such as {', '.join(BUILTIN_TEMPLATES)}"
            ) from fault
        self._check_tokens(rendered)

    def render(self, turns: Sequence[Turn]) -> Rendered:
        """The conversation and its spans. Raises RecordFault if it breaks the template's own pattern."""
        text = self._text(turns, add_generation_prompt=turns[-1].role == "human")
        answers, instructions = [], []
        for end in range(1, len(turns) + 1):
            turn = turns[end - 1]
            if turn.role == "human":
                before = self._prompt(turns[:end])
                self._require_prefix(before, text, end)
                instructions.append(self._instruction(before, turn, end))
            else:
                answers.append(self._answer(before, text, turn, end))
        return Rendered(text, tuple(answers), tuple(instructions))

    def _instruction(self, prompt: str, turn: Turn, number: int) -> Span:
        end = len(prompt) - len(self._after_user)
        content = self._content(turn)
        if not prompt.endswith(self._after_user) or not prompt.endswith(content, 0, end):
            raise RecordFault(f"chat template {self._name!r} does not give turn {number} back as it was written")
        return Span(end - len(content), end)

    def _answer(self, prompt: str, text: str, turn: Turn, number: int) -> Span:
        # read off the whole text rather than rendered once more: rendering is most of a sample's cost
        answer = self._before_answer + self._content(turn)
        if not text.startswith(answer + self._after_answer, len(prompt)):
            raise RecordFault(
                f"chat template {self._name!r} does not render turn {number} as the generation prompt, the answer and"
                f" {self._after_answer!r}"
            )
        # a template may end a turn with a line break and nothing else: then that is what stops generation
        closing = self._after_answer.rstrip() or self._after_answer
        return Span(len(prompt), len(prompt) + len(answer) + len(closing))

    def _require_prefix(self, part: str, text: str, number: int) -> None:
        if not text.startswith(part):
            raise RecordFault(
                f"what chat template {self._name!r} renders up to turn {number} (the generation prompt included, after a"
                " human's) is not a prefix of what it renders for the whole conversation"
            )

    def _prompt(self, turns: Sequence[Turn]) -> str:
        return self._text(turns, add_generation_prompt=True)

    def _text(self, turns: Sequence[Turn], *, add_generation_prompt: bool) -> str:
        messages = [{"role": CHAT_ROLES[turn.role], "content": self._content(turn)} for turn in turns]
        try:
            text = self._tokenizer.apply_chat_template(
                messages, chat_template=self._jinja, add_generation_prompt=add_generation_prompt, tokenize=False
            )
        except JinjaError as error:
            raise TemplateError(f"chat template {self._name!r} fails: {error}") from error
        assert isinstance(text, str)
        return text

    def _content(self, turn: Turn) -> str:
        return turn.text.strip().replace(IMAGE_MARK, self._image_token)

    def _check_tokens(self, rendered: Rendered) -> None:
        """A prompt's tokens must be those that the training text begins with, else generation starts from tokens
        never seen: a prompt that ends in a blank is the usual case."""
        ids = tokenize(self._tokenizer, rendered.text).ids
        for span in rendered.answers:
            prompt_ids = tokenize(self._tokenizer, rendered.text[: span.start]).ids
            if ids[: len(prompt_ids)] != prompt_ids:
                raise TemplateError(
                    f"chat template {self._name!r}: the tokenizer joins the end of the generation prompt"
                    f" {self._after_user!r} with the answer's beginning; allowed is an end that stays a token of its"
                    " own (no blank there)"
                )


class PlainTemplate:
    """LLaVA's stage I: the images, the caption, the eos token; loss on the caption and the eos token.

    The human's text is dropped. A bos token stands first if the tokenizer puts one there by itself.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_token: str) -> None:
        if not isinstance(tokenizer.eos_token, str):
            raise TemplateError("template plain: the tokenizer has no eos_token; one must end the caption")
        self._image_token = image_token
        self._eos_token = tokenizer.eos_token
        self._bos_token = own_bos_token(tokenizer)

    def render(self, turns: Sequence[Turn]) -> Rendered:
        """Raises RecordFault unless there is one human turn with at least one image, and at most one answer."""
        if len(turns) > 2:
            raise RecordFault(
                f"conversations has {len(turns)} turns; template plain takes one question and one caption"
            )
        num_marks = turns[0].text.count(IMAGE_MARK)
        if num_marks == 0:
            raise RecordFault("the record has no image; template plain is for captions of images")
        prompt = self._bos_token + self._image_token * num_marks
        if len(turns) == 1:
            return Rendered(prompt, (), ())
        text = prompt + turns[1].text.strip() + self._eos_token
        return Rendered(text, (Span(len(prompt), len(text)),), ())


class InstructTemplate:
    """InstructBLIP's: the images, the words of the one question, its answer, loss on the answer and the eos token.

    Decoder-only: image marks, bos token if the tokenizer puts one there by itself, words, a blank, answer, eos token.
    Encoder-decoder (closes_prompt): image marks, words, eos token for the encoder; answer, eos token for the decoder.
    A prompt's tokens are those that InstructBlipProcessor makes of the words, which are tokenized apart from the image
    marks. Raises TemplateError when built if the tokenizer has no eos token, or joins the words' end with the answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_token: str, *, closes_prompt: bool) -> None:
        if not isinstance(tokenizer.eos_token, str):
            raise TemplateError("template instruct: the tokenizer has no eos_token; one must end the answer")
        self._image_token = image_token
        self._eos_token = tokenizer.eos_token
        self._bos_token = "" if closes_prompt else own_bos_token(tokenizer)
        self._closes_prompt = closes_prompt
        self._check_tokens(tokenizer)

    def render(self, turns: Sequence[Turn]) -> Rendered:
        """Raises RecordFault unless there is one human turn, and at most one answer."""
        if len(turns) > 2:
            raise RecordFault(
                f"conversations has {len(turns)} turns; template instruct takes one question and one answer"
            )
        opening = self._image_token * turns[0].text.count(IMAGE_MARK) + self._bos_token
        words = first_instruction(turns)
        instruction = Span(len(opening), len(opening) + len(words))
        prompt = opening + words + (self._eos_token if self._closes_prompt else "")
        cuts = (len(opening), len(prompt)) if self._closes_prompt else (len(opening),)
        if len(turns) == 1:
            return Rendered(prompt, (), (instruction,), cuts)
        blank = " " if words and not self._closes_prompt else ""
        text = prompt + blank + turns[1].text.strip() + self._eos_token
        return Rendered(text, (Span(len(prompt), len(text)),), (instruction,), cuts)

    def _check_tokens(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """A prompt's tokens must be those that the training text begins with, as for chat templates."""
        turns = (Turn("human", "the azure:"), Turn("gpt", "bronze"))
        prompt, whole = self.render(turns[:1]), self.render(turns)
        prompt_ids = tokenize(tokenizer, prompt.text, prompt.cuts).ids
        if tokenize(tokenizer, whole.text, whole.cuts).ids[: len(prompt_ids)] != prompt_ids:
            raise TemplateError(
                "template instruct: the tokenizer joins the question's end with the answer's beginning; allowed are "
                "tokenizers to which the blank between them belongs to the answer, or to neither"
            )


def build_template(
    kind: Literal["plain", "chat", "instruct"],
    chat_template: str,
    tokenizer: PreTrainedTokenizerBase,
    image_token: str,
    *,
    closes_prompt: bool = False,
) -> Template:
    """The template that a recipe names: `data.template` and `data.chat_template`.

    chat_template: `tokenizer` (its own), one of `BUILTIN_TEMPLATES`, or the path (`package:...` too) of a Jinja file.
    closes_prompt: prompts end with the eos token, as encoders of encoder-decoder models want them; for `instruct` only.
    Raises TemplateError, also for a tokenizer that cannot tell where in a text its tokens lie, or does not know the
    mark.
    """
    if closes_prompt and kind != "instruct":
        raise TemplateError(
            f"template {kind}: the language model is an encoder and a decoder, which read the question and the answer; "
            "allowed: instruct"
        )
    if not tokenizer.is_fast:
        raise TemplateError(
            f"{type(tokenizer).__name__} is a slow tokenizer, which gives no offsets; a fast one is needed"
            " (a folder with a tokenizer.json)"
        )
    if len(tokenize(tokenizer, image_token).ids) != 1:
        raise TemplateError(
            f"the image mark {image_token!r} is not one token of the tokenizer; add it as a special token"
        )
    if kind == "plain":
        return PlainTemplate(tokenizer, image_token)
    if kind == "instruct":
        return InstructTemplate(tokenizer, image_token, closes_prompt=closes_prompt)
    return ChatTemplate(tokenizer, image_token, chat_template_text(chat_template, tokenizer), name=chat_template)


def end_of_turn_id(template: Template, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token by which a template ends an answer, or None if that takes several tokens.

    It need not be the tokenizer's end token: a model trained with ChatML stops at <|im_end|>.
    """
    rendered = template.render((Turn("human", f"{IMAGE_MARK} azure"), Turn("gpt", "bronze")))
    closing = rendered.text[: rendered.answers[-1].end].rpartition("bronze")[2]
    ids = tokenize(tokenizer, closing).ids
    return ids[0] if len(ids) == 1 else None


def chat_template_text(chat_template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The Jinja text behind a recipe's `data.chat_template`. Raises TemplateError naming what is allowed."""
    if chat_template == "tokenizer":
        if tokenizer.chat_template is None:
            raise TemplateError(
                "data.chat_template: the tokenizer has no chat template of its own; allowed are"
                f" {', '.join(BUILTIN_TEMPLATES)} or the path of a Jinja file"
            )
        return tokenizer.get_chat_template()
    if chat_template in BUILTIN_TEMPLATES:
        return BUILTIN_TEMPLATES[chat_template]
    path = packs.resolve(chat_template)
    if not path.is_file():
        raise TemplateError(
            f"data.chat_template: {chat_template!r} is not a file; allowed are tokenizer,"
            f" {', '.join(BUILTIN_TEMPLATES)} or the path of a Jinja file"
        )
    return path.read_text(encoding="utf-8")


class Tokens(NamedTuple):
    """Token ids of a text, and the character at which each begins."""

    ids: list[int]
    starts: list[int]


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str, cuts: Sequence[int] = ()) -> Tokens:
    """A rendered text as tokens, piece by piece. The template has written all special tokens, so none is added."""
    ids, starts = [], []
    for start, end in pairwise(sorted({0, *cuts, len(text)})):
        encoding = tokenizer(
            text[start:end],
            add_special_tokens=False,
            return_offsets_mapping=True,
            truncation=False,
            padding=False,
            verbose=False,
        )
        ids += encoding["input_ids"]
        starts += [start + first for first, _ in encoding["offset_mapping"]]
    return Tokens(ids, starts)


def own_bos_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """The bos token if the tokenizer puts one before a text by itself, else nothing."""
    own_ids = tokenizer("a", add_special_tokens=True)["input_ids"]
    has_bos = isinstance(tokenizer.bos_token, str) and own_ids[:1] == [tokenizer.bos_token_id]
    return str(tokenizer.bos_token) if has_bos else ""
