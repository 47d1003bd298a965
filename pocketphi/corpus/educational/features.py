"""What the scorer sees of a document: hashed words and pairs of neighbouring words.

Case, punctuation and the value of digits are not seen. A document longer than
`NUM_WINDOWS * WINDOW_CHARS` characters is read in that many windows spread evenly from its start to its
end: the cost of a document is bounded, and a book is judged by all its parts.

Shape legend: W words of a batch, D documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pocketphi.corpus.word_hashing import byte_table, hash_words

NUM_WINDOWS = 4
WINDOW_CHARS = 512
MAX_CHARS = NUM_WINDOWS * WINDOW_CHARS

_MIX = np.uint32(0x9E3779B1)
_PAIR = np.uint32(0x85EBCA6B)
_FOLD = np.uint32(15)
_TABLE = byte_table(digits_alike=True)


@dataclass(frozen=True)
class HashedBatch:
    """Slots of the words and word pairs of D documents.

    words_W, pairs_W: uint32 slots below 2**bits; pairs_W[i] joins words i and i+1.
    starts_D, ends_D: int64, document d owns words [starts_D[d], ends_D[d]) and, of the pairs,
    [starts_D[d], ends_D[d] - 1): a pair never joins two documents.
    """

    words_W: np.ndarray
    pairs_W: np.ndarray
    starts_D: np.ndarray
    ends_D: np.ndarray


def windows(text: str) -> str:
    """Return the part of `text` that is read: all of it, or evenly spread windows of a long one."""
    length = len(text)
    if length <= MAX_CHARS:
        return text
    step = (length - WINDOW_CHARS) / (NUM_WINDOWS - 1)
    return " ".join(text[int(i * step) : int(i * step) + WINDOW_CHARS] for i in range(NUM_WINDOWS))


def hash_batches(texts: Sequence[str], bits: int, *, whole: bool = False) -> Iterator[HashedBatch]:
    """Hash documents in order, in batches of bounded size; every document is in exactly one batch.

    `whole` reads long documents from end to end (for training, which takes its own cuts).
    """
    read = texts if whole else (t if len(t) <= MAX_CHARS else windows(t) for t in texts)
    shift = np.uint32(32 - bits)
    for batch in hash_words(read, _TABLE):
        words_W = batch.words_W
        pairs_W = words_W * _PAIR
        pairs_W[:-1] += words_W[1:]
        pairs_W ^= pairs_W >> _FOLD
        pairs_W *= _MIX
        pairs_W >>= shift
        slots_W = words_W * _PAIR
        slots_W >>= shift
        yield HashedBatch(slots_W, pairs_W, batch.starts_D, batch.ends_D)
