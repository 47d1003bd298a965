"""Repetition inside a document (Rae et al. 2021, table A1), over a whole batch at once.

B documents, N words of the batch, R repeated n-grams. n-grams are compared by a 64-bit hash of their word numbers.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

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


@dataclass(frozen=True)
class _Repeats:
    """n-grams of one length that occur more than once in their document, in order of position.

    start_R, owner_R: where each begins and in which document; group_R: equal for equal n-grams.
    """

    start_R: np.ndarray
    owner_R: np.ndarray
    group_R: np.ndarray


def _repeats(batch: Batch, n: int) -> _Repeats:
    """Return the repeated n-grams of a batch; all lengths are found at once and kept with the batch."""
    found: dict[int, _Repeats] | None = batch.__dict__.get("_repeated_ngrams")
    if found is None:
        found = batch.__dict__["_repeated_ngrams"] = _find_repeats(batch, max(_REPEATED))
    return found[n]


def _find_repeats(batch: Batch, longest: int) -> dict[int, _Repeats]:
    """An n-gram can only be repeated where the one a word shorter is: few places are looked at twice."""
    ids, _, starts = batch.word_ids
    start = np.arange(len(ids))
    owner = np.repeat(np.arange(len(batch)), np.diff(starts))
    with np.errstate(over="ignore"):
        # Mixed before the first word comes in: plain numbers of documents and words cancel one another out,
        # and an n-gram of one document would count for the next.
        hashes = (owner.astype(np.uint64) + np.uint64(1)) * _MIX
        hashes ^= hashes >> np.uint64(32)
        hashes *= _MIX
        found: dict[int, _Repeats] = {}
        for n in range(1, longest + 1):
            inside = start + n <= starts[owner + 1]
            start, owner, hashes = start[inside], owner[inside], hashes[inside]
            hashes = (hashes ^ (ids[start + n - 1] + np.uint64(1))) * _MIX
            hashes ^= hashes >> np.uint64(29)
            if n < min(_TOP):
                continue
            _, group, counts = np.unique(hashes, return_inverse=True, return_counts=True)
            again = counts[group] > 1
            start, owner, hashes, group = start[again], owner[again], hashes[again], group[again]
            found[n] = _Repeats(start, owner, group)
    return found


def _spans(batch: Batch, positions: np.ndarray, n: int) -> np.ndarray:
    """Characters of the n-grams that start at `positions`, spaces included."""
    _, lengths, _ = batch.word_ids
    sums = np.concatenate([[0], np.cumsum(lengths)])
    return sums[positions + n] - sums[positions] + n - 1


def top_ngram(batch: Batch, n: int) -> np.ndarray:
    """Share of characters that the most frequent n-gram of each document covers."""
    repeats = _repeats(batch, n)
    covered = np.zeros(len(batch))
    if len(repeats.start_R):
        _, first, counts = np.unique(repeats.group_R, return_index=True, return_counts=True)
        chars = counts * _spans(batch, repeats.start_R[first], n)
        np.maximum.at(covered, repeats.owner_R[first], chars)
    return ratio(covered, [len(text) for text in batch.texts])


def repeated_ngrams(batch: Batch, n: int) -> np.ndarray:
    """Share of characters inside n-grams that occurred before, overlaps counted once."""
    repeats = _repeats(batch, n)
    covered = np.zeros(len(batch))
    if len(repeats.start_R):
        _, first = np.unique(repeats.group_R, return_index=True)
        again = np.ones(len(repeats.start_R), dtype=bool)
        again[first] = False
        if again.any():
            ids, lengths, starts = batch.word_ids
            change = np.zeros(len(ids) + 1, dtype=np.int64)
            np.add.at(change, repeats.start_R[again], 1)
            np.add.at(change, repeats.start_R[again] + n, -1)
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
