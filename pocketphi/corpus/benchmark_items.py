"""What of a benchmark row must not be trained on: the question as it is asked, with what belongs to it."""

from __future__ import annotations

import re
from typing import Any

# Lengths in letters and digits (bytes of UTF-8). A shorter question than this is looked for together with its choices.
LONG_QUESTION = 64
_WITH_CHOICES = 40  # alone although it has choices: they are often asked without
_ALONE = 24
_MAX_CHARS = 6000

QUESTION_FIELDS = (
    "question", "query", "problem", "prompt", "input", "goal", "sentence", "text", "statement",
    "hypothesis", "instruction", "turns", "ctx", "sentence2",
)  # fmt: skip
CONTEXT_FIELDS = ("context", "passage", "premise", "sentence1")
CHOICE_FIELDS = ("choices", "options", "endings")
CHOICE_SETS = (
    ("sol1", "sol2"), ("answerA", "answerB", "answerC"), ("opa", "opb", "opc", "opd"), ("option1", "option2"),
    ("choice1", "choice2"),
)  # fmt: skip
_FRAME = re.compile(r"\A\s*(?:Question|Goal|Problem|Title|Passage|Q)\s*:\s*", re.IGNORECASE)
_ANSWER = re.compile(r"\n\s*(?:Answer|A)\s*:\s*\Z", re.IGNORECASE)
_ASKED = re.compile(r"\n\s*Question\s*:\s*", re.IGNORECASE)
_LABEL = re.compile(r"\A\s*\(?[A-Ja-j0-9][).:]\s*")
_NOT_TEXT = re.compile(r"[\W_]+")


def item_texts(row: dict[str, Any]) -> list[str]:
    """Return the texts by which a row is recognised; none when it asks nothing.

    The context with the question; the question alone when it is long enough to be told from ordinary
    text; a short one with its choices, bare, lettered and numbered.
    """
    low = {key.lower(): value for key, value in row.items()}
    question = _first(low, QUESTION_FIELDS)
    context = _first(low, CONTEXT_FIELDS)
    question = _ANSWER.sub("", _FRAME.sub("", question))
    before, *asked = _ASKED.split(question)
    if asked:
        context, question = before, asked[-1]
    choices = _choices(row)
    texts = []
    if context and question and context.strip() != question.strip():
        texts.append(f"{context}\n{question}")
    elif context:
        question = question or context
    length = len(_NOT_TEXT.sub("", question).encode("utf-8", "replace"))
    if length >= _WITH_CHOICES or (length >= _ALONE and not (choices or context)):
        texts.append(question)
    if length < LONG_QUESTION and question and choices:
        texts += [f"{question}\n{joined}" for joined in _joined(choices)]
    return [text[:_MAX_CHARS] for text in texts]


def _first(row: dict[str, Any], names: tuple[str, ...]) -> str:
    for name in names:
        value = row.get(name)
        if isinstance(value, list):
            value = "\n".join(part for part in value if isinstance(part, str))
        if isinstance(value, str) and value.strip():
            return value
    return ""


def _choices(row: dict[str, Any]) -> list[str]:
    for name in CHOICE_FIELDS:
        value = row.get(name)
        if isinstance(value, dict):
            value = value.get("text")
        if isinstance(value, list) and len(value) > 1:
            # Bare labels ("A", "B") and yes/no say nothing about the item.
            found = [_LABEL.sub("", str(choice)) for choice in value]
            if sum(len(choice) for choice in found) > 8:
                return found
    for names in CHOICE_SETS:
        if all(isinstance(row.get(name), str) for name in names):
            return [row[name] for name in names]
    return []


def _joined(choices: list[str]) -> list[str]:
    return [
        "\n".join(choices),
        "\n".join(f"{chr(ord('A') + i)}. {choice}" for i, choice in enumerate(choices)),
        "\n".join(f"{i}. {choice}" for i, choice in enumerate(choices, 1)),
    ]
