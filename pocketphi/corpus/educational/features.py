"""Hashed words and word pairs of many documents at once, in numpy.

A batch of documents is one byte buffer: lower-cased, digits made alike, everything that is neither a
letter nor a digit made a space. A running polynomial hash over the whole buffer gives the hash of any
word by one subtraction and one multiplication, so no Python code runs per word or per byte.

A document longer than `NUM_WINDOWS * WINDOW_CHARS` characters is read in that many windows spread evenly
from its start to its end: the cost of a document is bounded, and a book is judged by all its parts.

Shape legend: N bytes of the batch, W words of the batch, D documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

NUM_WINDOWS = 8
WINDOW_CHARS = 512
MAX_CHARS = NUM_WINDOWS * WINDOW_CHARS

_SPACE = 0x20
_BASE = 0x2C9277B5  # odd, so that it has an inverse modulo 2**32
_BASE_INVERSE = pow(_BASE, -1, 1 << 32)
_MIX = np.uint32(0x9E3779B1)
_PAIR = np.uint32(0x85EBCA6B)
_FOLD = np.uint32(15)
# Buffers of about this size keep every temporary array of a batch inside the second-level cache.
_BATCH_BYTES = 1 << 16


def _translation() -> bytes:
    table = bytearray([_SPACE]) * 256
    for byte in range(128):
        character = chr(byte)
        if character.isalpha():
            table[byte] = ord(character.lower())
        elif character.isdigit():
            table[byte] = ord("0")
    # Bytes of longer UTF-8 sequences are letters; punctuation among them is blanked separately.
    table[128:256] = bytes(range(128, 256))
    return bytes(table)


_TABLE = _translation()


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
    parts = []
    for i in range(NUM_WINDOWS):
        at = int(i * step)
        parts.append(text[at : at + WINDOW_CHARS])
    return " ".join(parts)


def hash_batches(texts: Sequence[str], bits: int) -> Iterator[HashedBatch]:
    """Hash documents in order, in batches of bounded size; every document is in exactly one batch."""
    pending: list[bytes] = []
    size = 0
    for text in texts:
        if len(text) > MAX_CHARS:
            text = windows(text)
        # A lone surrogate cannot be encoded; as "?" it is a separator like any punctuation.
        raw = text.encode("utf-8", "replace")
        pending.append(raw)
        size += len(raw) + 1
        if size >= _BATCH_BYTES:
            yield _hash(pending, bits)
            pending, size = [], 0
    if pending:
        yield _hash(pending, bits)


_powers: tuple[np.ndarray, np.ndarray] | None = None


def _power_tables(length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return base**i and base**-i modulo 2**32 for i < length, kept between calls."""
    global _powers
    if _powers is None or len(_powers[0]) < length:
        room = max(length, 2 * _BATCH_BYTES)
        tables = []
        for base in (_BASE, _BASE_INVERSE):
            table = np.full(room, base, dtype=np.uint32)
            table[0] = 1
            tables.append(np.cumprod(table, dtype=np.uint32))
        _powers = (tables[0], tables[1])
    return _powers


def _hash(raws: list[bytes], bits: int) -> HashedBatch:
    # The buffer begins and ends with a separator, and one stands between documents.
    text = b" " + b" ".join(raws) + b" "
    lengths_D = np.fromiter(map(len, raws), dtype=np.int64, count=len(raws))
    buffer_N = np.frombuffer(text.translate(_TABLE), dtype=np.uint8)
    if not text.isascii():
        buffer_N = _blank_punctuation(buffer_N)

    is_word_N = buffer_N != _SPACE
    edges = np.flatnonzero(is_word_N[1:] != is_word_N[:-1])
    before_W, last_W = edges[0::2], edges[1::2]  # the word is bytes before+1 .. last

    power_N, inverse_N = _power_tables(len(buffer_N))
    running_N = np.multiply(buffer_N, power_N[: len(buffer_N)])
    np.cumsum(running_N, out=running_N)
    # Spaces have a value too, but it cancels: only bytes of the word lie between the two ends.
    words_W = running_N.take(last_W)
    words_W -= running_N.take(before_W)
    words_W *= inverse_N.take(before_W)
    words_W *= _MIX
    words_W ^= words_W >> _FOLD

    pairs_W = words_W * _PAIR
    pairs_W[:-1] += words_W[1:]
    pairs_W ^= pairs_W >> _FOLD
    pairs_W *= _MIX
    shift = np.uint32(32 - bits)
    pairs_W >>= shift
    words_W = words_W * _PAIR
    words_W >>= shift

    ends_N = np.cumsum(lengths_D + 1)  # position of the separator after each document
    ends_D = np.searchsorted(before_W, ends_N)
    starts_D = np.concatenate([[0], ends_D[:-1]])
    return HashedBatch(words_W, pairs_W, starts_D, ends_D)


def _blank_punctuation(buffer_N: np.ndarray) -> np.ndarray:
    """Blank U+0080-00BF (C2 xx) and U+2000-207F (E2 80 xx, E2 81 xx): spaces, quotes, dashes, signs."""
    buffer_N = buffer_N.copy()
    two = np.flatnonzero(buffer_N == 0xC2)
    buffer_N[two] = _SPACE
    buffer_N[two + 1] = _SPACE
    three = np.flatnonzero(buffer_N == 0xE2)
    second = buffer_N[three + 1]
    three = three[(second == 0x80) | (second == 0x81)]
    for offset in range(3):
        buffer_N[three + offset] = _SPACE
    return buffer_N
