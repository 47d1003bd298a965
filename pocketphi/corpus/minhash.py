"""Shingles, MinHash signatures and their bands: what near-duplicate search compares.

A text is the set of its word 5-grams (lower case, without punctuation); two texts are near-duplicates
when the Jaccard similarity of their sets reaches a threshold. A MinHash agrees for two texts with
probability equal to their similarity J (Broder 1997); a band of r of them agrees with J**r, and at least
one of b bands with 1 - (1 - J**r)**b. `Banding.for_threshold` chooses r and b.

Shape legend: D texts, S shingles of a batch, B bands.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from pocketphi.core.errors import ConfigError
from pocketphi.corpus.word_hashing import byte_table, hash_words

SHINGLE_WORDS = 5
_TABLE = byte_table(digits_alike=False)
_MIX = np.uint32(0x9E3779B1)
_FOLD = np.uint32(15)
_MIX64 = np.uint64(0x9E3779B97F4A7C15)
_EMPTY = np.uint64(0)  # band key of a text without words: never compared


@dataclass(frozen=True)
class Banding:
    """`num_bands` bands of `rows` MinHashes each."""

    num_bands: int
    rows: int

    @property
    def num_hashes(self) -> int:
        return self.num_bands * self.rows

    def recall(self, jaccard: float) -> float:
        """Probability that two texts of this similarity share a band."""
        return 1 - (1 - jaccard**self.rows) ** self.num_bands

    @classmethod
    def for_threshold(cls, jaccard: float, *, recall: float = 0.99, max_hashes: int = 128) -> Banding:
        """Return the longest bands (fewest false candidates) that find pairs at the threshold.

        Raises ConfigError for a threshold outside (0, 1).
        """
        if not 0 < jaccard < 1:
            raise ConfigError(f"the Jaccard threshold must be between 0 and 1, found {jaccard}")
        for rows in range(16, 0, -1):
            for num_bands in range(1, max_hashes // rows + 1):
                if cls(num_bands, rows).recall(jaccard) >= recall:
                    return cls(num_bands, rows)
        return cls(max_hashes, 1)


def shingles(texts: Iterable[str]) -> list[np.ndarray]:
    """Return per text the sorted set of its shingles' hashes, uint32 [n]; [0] for a text without words.

    A text of fewer than SHINGLE_WORDS words is one shingle.
    """
    found: list[np.ndarray] = []
    for hashes_S, starts_D, ends_D in _shingle_batches(texts):
        found += [np.unique(hashes_S[start:end]) for start, end in zip(starts_D.tolist(), ends_D.tolist())]
    return found


def jaccard(left: np.ndarray, right: np.ndarray) -> float:
    """Similarity of two sets as `shingles` returns them; two empty sets are not similar."""
    if not len(left) or not len(right):
        return 0.0
    shared = len(np.intersect1d(left, right, assume_unique=True))
    return shared / (len(left) + len(right) - shared)


def band_keys(texts: Iterable[str], banding: Banding) -> np.ndarray:
    """Return uint64 [D, B]: texts with an equal key in any band are candidates; 0 for no words at all."""
    parts = [
        _keys(hashes_S, starts_D, ends_D, banding) for hashes_S, starts_D, ends_D in _shingle_batches(texts)
    ]
    return np.concatenate(parts) if parts else np.zeros((0, banding.num_bands), dtype=np.uint64)


def _shingle_batches(texts: Iterable[str]) -> Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield (hashes_S, starts_D, ends_D) of batches; shingles of one text are in order, with repeats."""
    for batch in hash_words(texts, _TABLE):
        words_W = batch.words_W
        num_D = batch.ends_D - batch.starts_D
        # hash of words i..i+k-1 for every i; those that cross into the next text are dropped below
        hashes_W = words_W.copy()
        for offset in range(1, SHINGLE_WORDS):
            hashes_W *= _MIX
            hashes_W[: len(words_W) - offset] += words_W[offset:]
            hashes_W ^= hashes_W >> _FOLD
        hashes_W *= _MIX
        hashes_W ^= hashes_W >> _FOLD
        count_D = np.where(num_D >= SHINGLE_WORDS, num_D - (SHINGLE_WORDS - 1), np.minimum(num_D, 1))
        ends_S = np.cumsum(count_D)
        starts_S = ends_S - count_D
        pick = np.arange(int(ends_S[-1])) + np.repeat(batch.starts_D - starts_S, count_D)
        hashes_S = hashes_W[pick]
        for text in np.flatnonzero((num_D > 0) & (num_D < SHINGLE_WORDS)):
            start, end = int(batch.starts_D[text]), int(batch.ends_D[text])
            hashes_S[starts_S[text]] = _short(words_W[start:end])
        yield hashes_S, starts_S, ends_S


def _short(words: np.ndarray) -> int:
    value = len(words)
    for word in words.tolist():
        value = ((value ^ word) * 0x9E3779B1 + 1) & 0xFFFFFFFF
        value ^= value >> 15
    return value


def _keys(hashes_S: np.ndarray, starts_D: np.ndarray, ends_D: np.ndarray, banding: Banding) -> np.ndarray:
    keys_DB = np.zeros((len(starts_D), banding.num_bands), dtype=np.uint64)
    some_D = np.flatnonzero(ends_D > starts_D)
    if not len(some_D):
        return keys_DB
    starts = starts_D[some_D]
    multipliers, offsets = _permutations(banding.num_hashes)
    permuted_S = np.empty_like(hashes_S)
    for band in range(banding.num_bands):
        key = np.full(len(some_D), band + 1, dtype=np.uint64)
        for row in range(banding.rows):
            i = band * banding.rows + row
            np.multiply(hashes_S, multipliers[i], out=permuted_S)
            permuted_S += offsets[i]
            key = (key ^ np.minimum.reduceat(permuted_S, starts)) * _MIX64
            key ^= key >> np.uint64(29)
        keys_DB[some_D, band] = np.maximum(key, np.uint64(1))
    return keys_DB


def _permutations(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Fixed odd multipliers and offsets, so that signatures of different runs can be compared."""
    random = np.random.Generator(np.random.PCG64(20260521))
    numbers = random.integers(0, 1 << 32, size=(2, count), dtype=np.uint32)
    return numbers[0] | np.uint32(1), numbers[1]
