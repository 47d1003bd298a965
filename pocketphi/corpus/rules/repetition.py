"""Repetition inside a document (Rae et al. 2021, table A1), over a whole batch at once.

B documents, N words of the batch. n-grams are compared by a 64-bit hash of their word numbers.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from pocketphi.corpus.rules import rule
from pocketphi.corpus.rules.batch import Batch, ratio

_MIX = np.uint64(0x9E3779B97F4A7C15)
_TOP = {2: 0.20, 3: 0.18, 4: 0.16}
_REPEATED = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


@rule("duplicate_lines", max=0.3)
def duplicate_lines(batch: Batch) -> np.ndarray:
    """Share of lines that occurred before in the document (at most 0.30)."""
    return ratio([len(x) - len(set(x)) for x in batch.lines], [len(x) for x in batch.lines])


@rule("duplicate_line_chars", max=0.2)
def duplicate_line_chars(batch: Batch) -> np.ndarray:
    """Share of characters in lines that occurred before (at most 0.20)."""
    return ratio([_repeated_chars(x) for x in batch.lines], [len(text) for text in batch.texts])


@rule("duplicate_paragraphs", max=0.3)
def duplicate_paragraphs(batch: Batch) -> np.ndarray:
    """Share of paragraphs that occurred before (at most 0.30)."""
    return ratio([len(x) - len(set(x)) for x in batch.paragraphs], [len(x) for x in batch.paragraphs])


@rule("duplicate_paragraph_chars", max=0.2)
def duplicate_paragraph_chars(batch: Batch) -> np.ndarray:
    """Share of characters in paragraphs that occurred before (at most 0.20)."""
    return ratio([_repeated_chars(x) for x in batch.paragraphs], [len(text) for text in batch.texts])


def _repeated_chars(parts: list[str]) -> int:
    if len(set(parts)) == len(parts):
        return 0
    return sum((count - 1) * len(part) for part, count in Counter(parts).items())


def _ngrams(batch: Batch, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return `(hash, document, position)` of every n-gram that lies inside one document."""
    ids, _, starts = batch.word_ids
    count = len(ids) - n + 1
    if count <= 0:
        empty = np.zeros(0, dtype=np.int64)
        return empty.astype(np.uint64), empty, empty
    owner = np.repeat(np.arange(len(batch)), np.diff(starts))
    inside = np.nonzero(owner[:count] == owner[n - 1 :])[0]
    with np.errstate(over="ignore"):
        # Mixed before the first word comes in: plain numbers of documents and words cancel one another out,
        # and an n-gram of one document would count for the next.
        hashes = (owner[:count].astype(np.uint64) + np.uint64(1)) * _MIX
        hashes ^= hashes >> np.uint64(32)
        hashes *= _MIX
        for offset in range(n):
            hashes = (hashes ^ (ids[offset : offset + count] + np.uint64(1))) * _MIX
            hashes ^= hashes >> np.uint64(29)
    return hashes[inside], owner[inside], inside


def _spans(batch: Batch, positions: np.ndarray, n: int) -> np.ndarray:
    """Characters of the n-grams that start at `positions`, spaces included."""
    _, lengths, _ = batch.word_ids
    sums = np.concatenate([[0], np.cumsum(lengths)])
    return sums[positions + n] - sums[positions] + n - 1


def top_ngram(batch: Batch, n: int) -> np.ndarray:
    """Share of characters that the most frequent n-gram of each document covers."""
    hashes, owner, positions = _ngrams(batch, n)
    covered = np.zeros(len(batch))
    if len(hashes):
        _, first, counts = np.unique(hashes, return_index=True, return_counts=True)
        chars = counts * _spans(batch, positions[first], n) * (counts > 1)
        np.maximum.at(covered, owner[first], chars)
    return ratio(covered, [len(text) for text in batch.texts])


def repeated_ngrams(batch: Batch, n: int) -> np.ndarray:
    """Share of characters inside n-grams that occurred before, overlaps counted once."""
    hashes, _owner, positions = _ngrams(batch, n)
    covered = np.zeros(len(batch))
    if len(hashes):
        _, first = np.unique(hashes, return_index=True)
        again = np.ones(len(hashes), dtype=bool)
        again[first] = False
        if again.any():
            ids, lengths, starts = batch.word_ids
            change = np.zeros(len(ids) + 1, dtype=np.int64)
            np.add.at(change, positions[again], 1)
            np.add.at(change, positions[again] + n, -1)
            inside = np.cumsum(change[:-1]) > 0
            owners = np.repeat(np.arange(len(batch)), np.diff(starts))
            covered = np.bincount(owners[inside], lengths[inside] + 1, minlength=len(batch)).astype(
                np.float64
            )
    return ratio(covered, [len(text) for text in batch.texts])


def _register() -> None:
    for n, limit in _TOP.items():

        def top(batch: Batch, n: int = n) -> np.ndarray:
            return top_ngram(batch, n)

        top.__doc__ = f"Share of characters of the most frequent {n}-gram (at most {limit:.2f})."
        rule(f"top_{n}gram", max=limit)(top)
    for n, limit in _REPEATED.items():

        def repeated(batch: Batch, n: int = n) -> np.ndarray:
            return repeated_ngrams(batch, n)

        repeated.__doc__ = f"Share of characters in {n}-grams that occurred before (at most {limit:.2f})."
        rule(f"repeated_{n}grams", max=limit)(repeated)


_register()
