"""Arithmetic whose answers are right by construction, with the steps written out."""

from __future__ import annotations

import random
from collections.abc import Iterator

from pocketphi.synth.text import Chat, Document, generator

_LICENSE = "MIT"
_NAMES = [
    "Ana",
    "Ben",
    "Chen",
    "Dina",
    "Eli",
    "Fatima",
    "Grace",
    "Hugo",
    "Ines",
    "Jon",
    "Kofi",
    "Lena",
    "Maya",
]
_THINGS = ["apples", "books", "pencils", "coins", "stamps", "cards", "eggs", "shells", "stickers", "marbles"]


def problem(random_: random.Random) -> tuple[str, str]:
    """Return one question and its worked answer."""
    kind = random_.randrange(8)
    a, b, c = random_.randint(1, 20), random_.randint(1, 20), random_.randint(2, 10)
    name, other = random_.sample(_NAMES, 2)
    thing = random_.choice(_THINGS)
    if kind == 0:
        return f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}."
    if kind == 1:
        high, low = max(a, b), min(a, b)
        return f"What is {high} minus {low}?", f"{high} minus {low} is {high - low}."
    if kind == 2:
        return f"What is {a} times {c}?", f"{a} times {c} is {a * c}."
    if kind == 3:
        return f"What is {a * c} divided by {c}?", f"{a * c} divided by {c} is {a}."
    if kind == 4:
        return (
            f"{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have now?",
            f"{name} starts with {a} {thing} and gets {b} more. {a} + {b} = {a + b}. {name} has {a + b} {thing}.",
        )
    if kind == 5:
        have = a + b
        return (
            f"{name} has {have} {thing} and gives {b} to {other}. How many {thing} are left?",
            f"{name} had {have} {thing} and gave away {b}. {have} - {b} = {a}. {name} has {a} {thing} left.",
        )
    if kind == 6:
        return (
            f"There are {c} boxes with {a} {thing} in each. How many {thing} are there in all?",
            f"Each of the {c} boxes holds {a} {thing}. {c} x {a} = {c * a}. There are {c * a} {thing} in all.",
        )
    if a == b:
        b += 1
    more, less = (a, b) if a > b else (b, a)
    return f"Which number is larger, {a} or {b}?", f"{more} is larger than {less}."


def chats(count: int, seed: int) -> Iterator[Chat]:
    """Yield `count` problems as chats."""
    random_ = generator(seed, "arithmetic chats")
    for index in range(count):
        question, answer = problem(random_)
        yield Chat(question, answer, "arithmetic", _LICENSE, f"arithmetic:{seed}:{index}")


def documents(count: int, seed: int) -> Iterator[Document]:
    """Yield `count` problems, ten to a document."""
    random_ = generator(seed, "arithmetic documents")
    for start in range(0, count, 10):
        items = [problem(random_) for _ in range(start, min(start + 10, count))]
        text = "\n\n".join(f"Question: {question}\nAnswer: {answer}" for question, answer in items)
        yield Document(text, "arithmetic", _LICENSE, (f"arithmetic:{seed}:{start}",))
