"""The two things synthesis makes: a document and a chat, each with what it was made from."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Document:
    """Text for pre-training. `seeds` names the entries it was made from."""

    text: str
    source: str
    license: str
    seeds: tuple[str, ...]

    def as_row(self) -> dict[str, Any]:
        return {
            "id": hashlib.sha256(self.text.encode()).hexdigest()[:16],
            "text": self.text,
            "source": f"synth/{self.source}",
            "license": self.license,
            "meta": {"seeds": list(self.seeds)},
        }


@dataclass(frozen=True)
class Chat:
    """One question and its answer, for fine-tuning."""

    question: str
    answer: str
    source: str
    license: str
    seed: str

    def as_row(self) -> dict[str, Any]:
        return {
            "messages": [
                {"role": "user", "content": self.question},
                {"role": "assistant", "content": self.answer},
            ],
            "source": f"synth/{self.source}",
            "license": self.license,
            "seed": self.seed,
        }


def generator(seed: int, *names: str) -> random.Random:
    """Return a random generator that depends on the seed and the names alone."""
    digest = hashlib.sha256("\0".join([str(seed), *names]).encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))


def sentence(text: str) -> str:
    """Return the text as a sentence: first letter upper case, an end mark at the end."""
    text = " ".join(text.split()).strip()
    if not text:
        return text
    text = text[0].upper() + text[1:]
    return text if text[-1] in ".!?\"'" else text + "."


def article(noun: str) -> str:
    """Return the noun with "a" or "an", by its first letter's usual sound."""
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"
