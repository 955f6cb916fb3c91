"""What a model is asked: named sets of instruction templates, and the fields that patterns of a recipe may hold."""

from __future__ import annotations

from collections.abc import Sequence
from string import Formatter

QUESTION, ANSWER = "QUESTION", "ANSWER"
CANDIDATES, OPTIONS = "CANDIDATES", "OPTIONS"
OCR_TOKENS, CONTEXT = "OCR_TOKENS", "CONTEXT"
"""Fields of templates: the question; its answer, where the question is asked for; what there is to choose from, as
`x, y` and as `(a) x (b) y`; the words that were read in the image; a text beside it."""

# Q-MoE, supplement, table 4, without the commas and blanks that the print put at the ends of lines.
QMOE_SETS: dict[str, tuple[str, ...]] = {
    "vqa": (
        "{QUESTION}",
        "Q: {QUESTION} A:",
        "Based on the image, respond to this question with a short answer: {QUESTION}",
        "{QUESTION} A short answer to the question is",
        "Question: {QUESTION} Short answer:",
    ),
    "choice": (
        "{QUESTION} Choose from {CANDIDATES}.",
        "Q: {QUESTION} Multi Choices: {CANDIDATES} A:",
        "question: {QUESTION} Multi Choices: {CANDIDATES} Answer:",
        "{QUESTION} Choose one from the following possible answers: {CANDIDATES}.",
        "{QUESTION} Choose from {CANDIDATES}. The answer is",
    ),
    "caption": (
        "A photo of",
        "An image that shows",
        "Write a short description for the image.",
        "Write a description for the photo.",
        "A short image description:",
    ),
}

# MoCLE, tables 10 and 11, which are InstructBLIP's.
_CAP = (
    "A short image caption:",
    "A short image description:",
    "A photo of",
    "An image that shows",
    "Write a short description for the image.",
    "Write a description for the photo.",
    "Provide a description of what is presented in the photo.",
    "Briefly describe the content of the image.",
    "Can you briefly explain what you see in the image?",
    "Could you use a few words to describe what you perceive in the photo?",
    "Please provide a short depiction of the picture.",
    "Using language, provide a short account of the image.",
    "Use a few words to illustrate what is happening in the picture.",
)
MOCLE_SETS: dict[str, tuple[str, ...]] = {
    # table 10, for training
    "mocle_cap": _CAP,
    "mocle_vqa": (
        "{QUESTION}",
        "Question: {QUESTION}",
        "{QUESTION} A short answer to the question is",
        "Q: {QUESTION} A:",
        "Question: {QUESTION} Short answer:",
        "Given the image, answer the following question with no more than three words. {QUESTION}",
        "Based on the image, respond to this question with a short answer: {QUESTION}. Answer:",
        "Use the provided image to answer the question: {QUESTION} Provide your answer as short as possible:",
        'What is the answer to the following question? "{QUESTION}"',
        'The question "{QUESTION}" can be answered using the image. A short answer is',
    ),
    "mocle_vqg": (
        "Given the image, generate a question whose answer is: {ANSWER}. Question:",
        "Based on the image, provide a question with the answer: {ANSWER}. Question:",
        'Given the visual representation, create a question for which the answer is "{ANSWER}".',
        "From the image provided, craft a question that leads to the reply: {ANSWER}. Question:",
        "Considering the picture, come up with a question where the answer is: {ANSWER}.",
        "Taking the image into account, generate an question that has the answer: {ANSWER}. Question:",
    ),
    "mocle_ocrcaps": tuple(f"OCR tokens: {{OCR_TOKENS}}. {template}" for template in _CAP),
    # the options behind the question; table 16 has a comma where words follow
    "mocle_vqamc": (
        "{QUESTION} Options: {OPTIONS}",
        "Question: {QUESTION} Options: {OPTIONS}",
        "{QUESTION} Options: {OPTIONS}, A short answer to the question is",
        "Q: {QUESTION} Options: {OPTIONS}, A:",
        "Question: {QUESTION} Options: {OPTIONS}, Short answer:",
        "Given the image, answer the following question with no more than three words. {QUESTION} Options: {OPTIONS}",
        "Based on the image, respond to this question with a short answer: {QUESTION} Options: {OPTIONS}. Answer:",
        "Use the provided image to answer the question: {QUESTION} Options: {OPTIONS}, Provide your answer as short as "
        "possible:",
        'What is the answer to the following question? "{QUESTION} Options: {OPTIONS}"',
        'The question "{QUESTION} Options: {OPTIONS}" can be answered using the image. A short answer is',
    ),
    # table 11, for evaluation
    "mocle_eval_vqa": ("Question: {QUESTION} Short answer:",),
    "mocle_eval_choice": ("Question: {QUESTION} Options: {OPTIONS}. Short answer:",),
    "mocle_eval_caption": ("A short image description:",),
    "mocle_eval_ocr": ("OCR tokens: {OCR_TOKENS}. Question: {QUESTION} Short answer:",),
    "mocle_eval_science": ("Context: {CONTEXT} Question: {QUESTION} Options: {OPTIONS}. Answer:",),
    "mocle_eval_statement": ("{QUESTION} Answer:",),
}

INSTRUCTION_SETS: dict[str, tuple[str, ...]] = QMOE_SETS | MOCLE_SETS


def check_instructions(templates: Sequence[str], *, fields: Sequence[str]) -> None:
    """Whether templates can be filled by the records of a dataset, and ask what a record asks. fields: what records have
    to fill them with; without QUESTION they are captions.

    Raises:
        ValueError: no template, an empty or broken one, a field that records do not have, none for their question, or
            the answer beside the question.
    """
    if not templates:
        raise ValueError("no template; at least one is needed")
    for template in templates:
        used = [field for field, _ in template_fields(template)]
        if not template.strip():
            raise ValueError(f"{template!r} asks nothing")
        if wrong := [field for field in used if field not in fields]:
            shown = ", ".join(f"{{{name}}}" for name in fields) or "none, since records have no question"
            raise ValueError(f"{template!r} has the field {{{wrong[0]}}}; allowed: {shown}")
        if QUESTION in fields and QUESTION not in used and ANSWER not in used:
            raise ValueError(
                f"{template!r} leaves the question out; it needs {{{QUESTION}}}, or {{{ANSWER}}} to ask for the question"
            )
        if QUESTION in used and ANSWER in used:
            raise ValueError(f"{template!r} gives the answer away; allowed: one of {{{QUESTION}}} and {{{ANSWER}}}")


def asks_for_question(template: str) -> bool:
    """Whether the answer is given and the question is wanted."""
    return any(field == ANSWER for field, _ in template_fields(template))


def template_fields(pattern: str) -> list[tuple[str, str]]:
    """The fields of a pattern for `str.format`, with their format specifications.

    Raises:
        ValueError: braces that do not match, or a field that is not a plain name.
    """
    try:
        parts = list(Formatter().parse(pattern))
    except ValueError as error:
        raise ValueError(f"{pattern!r}: {error}; a brace that is meant as one is written twice") from error
    fields = []
    for _, name, spec, conversion in parts:
        if name is None:
            continue
        if not name.isidentifier() or conversion is not None or "{" in (spec or ""):
            raise ValueError(
                f"{pattern!r}: the field {{{name}}} is not a plain name such as {{image_id}} or {{id:06d}}"
            )
        fields.append((name, spec or ""))
    return fields
