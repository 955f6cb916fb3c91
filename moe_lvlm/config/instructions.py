"""What a model is asked: named sets of instruction templates, and the fields that patterns of a recipe may hold."""

from __future__ import annotations

from collections.abc import Sequence
from string import Formatter

QUESTION, CANDIDATES = "QUESTION", "CANDIDATES"

# Q-MoE, supplement, table 4, without the commas and blanks that the print put at the ends of lines.
INSTRUCTION_SETS: dict[str, tuple[str, ...]] = {
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


def check_instructions(templates: Sequence[str], *, has_question: bool, has_candidates: bool) -> None:
    """Whether templates can be filled by the records of a dataset, and ask what a record asks.

    Raises:
        ValueError: no template, an empty or broken one, a field that records do not have, or none for their question.
    """
    if not templates:
        raise ValueError("no template; at least one is needed")
    allowed = [QUESTION] * has_question + [CANDIDATES] * has_candidates
    for template in templates:
        fields = [field for field, spec in template_fields(template)]
        if not template.strip():
            raise ValueError(f"{template!r} asks nothing")
        if wrong := [field for field in fields if field not in allowed]:
            shown = ", ".join(f"{{{name}}}" for name in allowed) or "none, since records have no question"
            raise ValueError(f"{template!r} has the field {{{wrong[0]}}}; allowed: {shown}")
        if has_question and QUESTION not in fields:
            raise ValueError(f"{template!r} leaves the question out; it needs {{{QUESTION}}}")


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
