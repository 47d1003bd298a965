"""A batch of documents with what several rules need, computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from pocketphi.corpus.document import Document


@dataclass(frozen=True)
class RuleContext:
    """What rules need beside the text: choices of the run, loaded lists."""

    languages: tuple[str, ...] = ()
    license_deny: tuple[str, ...] = ()
    respect_noai: bool = True
    url_deny: frozenset[str] = frozenset()


@dataclass
class Batch:
    """Documents of one source. Derived lists are parallel to `documents`."""

    documents: Sequence[Document]
    context: RuleContext = field(default_factory=RuleContext)

    def __len__(self) -> int:
        return len(self.documents)

    @cached_property
    def texts(self) -> list[str]:
        return [document.text for document in self.documents]

    @cached_property
    def words(self) -> list[list[str]]:
        """Whitespace-separated words, punctuation attached."""
        return [text.split() for text in self.texts]

    @cached_property
    def num_words(self) -> np.ndarray:
        return np.array([len(words) for words in self.words], dtype=np.int64)

    @cached_property
    def lines(self) -> list[list[str]]:
        """Non-empty lines, stripped."""
        return [[s for line in text.split("\n") if (s := line.strip())] for text in self.texts]

    @cached_property
    def paragraphs(self) -> list[list[str]]:
        return [[s for part in text.split("\n\n") if (s := part.strip())] for text in self.texts]

    @cached_property
    def lowered(self) -> list[str]:
        return [text.lower() for text in self.texts]

    @cached_property
    def meta(self) -> list[dict[str, Any]]:
        return [document.meta for document in self.documents]

    @cached_property
    def word_ids(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`(ids, lengths, starts)`: all words of the batch as numbers, their characters, and where
        each document begins (one more entry than documents)."""
        vocabulary: dict[str, int] = {}
        number = vocabulary.setdefault
        ids: list[int] = []
        lengths: list[int] = []
        starts = [0]
        for words in self.words:
            ids.extend([number(word, len(vocabulary)) for word in words])
            lengths.extend(map(len, words))
            starts.append(len(ids))
        return (
            np.array(ids, dtype=np.uint64),
            np.array(lengths, dtype=np.int64),
            np.array(starts, dtype=np.int64),
        )


def ratio(numerator: Any, denominator: Any) -> np.ndarray:
    """Elementwise numerator / denominator, 0 where the denominator is 0."""
    top = np.asarray(numerator, dtype=np.float64)
    bottom = np.asarray(denominator, dtype=np.float64)
    return np.divide(top, bottom, out=np.zeros(np.broadcast(top, bottom).shape), where=bottom != 0)
