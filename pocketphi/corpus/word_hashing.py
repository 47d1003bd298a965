"""Hashes of all words of many texts at once, in numpy: the ground of the scorer and of MinHash.

A batch of texts is one byte buffer in which everything that belongs to no word is a space. A running
polynomial hash over the buffer gives the hash of any word by one subtraction and one multiplication, so
no Python code runs per word or per byte.

Shape legend: N bytes of the batch, W words of the batch, D texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

_SPACE = 0x20
_BASE = 0x2C9277B5  # odd, so that it has an inverse modulo 2**32
_BASE_INVERSE = pow(_BASE, -1, 1 << 32)
_MIX = np.uint32(0x9E3779B1)
_FOLD = np.uint32(15)
# Buffers of about this size keep every temporary array of a batch inside the second-level cache.
BATCH_BYTES = 1 << 16


def byte_table(*, digits_alike: bool) -> bytes:
    """Return what each byte becomes: letters lower case, digits kept or all "0", the rest a space."""
    table = bytearray([_SPACE]) * 256
    for byte in range(128):
        character = chr(byte)
        if character.isalpha():
            table[byte] = ord(character.lower())
        elif character.isdigit():
            table[byte] = ord("0") if digits_alike else byte
    # Bytes of longer UTF-8 sequences are letters; punctuation among them is blanked separately.
    table[128:256] = bytes(range(128, 256))
    return bytes(table)


@dataclass(frozen=True)
class HashedWords:
    """Words of D texts: text d owns words_W[starts_D[d] : ends_D[d]].

    words_W: uint32, well mixed. starts_D, ends_D: int64.
    """

    words_W: np.ndarray
    starts_D: np.ndarray
    ends_D: np.ndarray


def hash_words(texts: Iterable[str], table: bytes) -> Iterator[HashedWords]:
    """Hash texts in order, in batches of about BATCH_BYTES; every text is in exactly one batch."""
    pending: list[bytes] = []
    size = 0
    for text in texts:
        # A lone surrogate cannot be encoded; as "?" it is a separator like any punctuation.
        raw = text.encode("utf-8", "replace")
        pending.append(raw)
        size += len(raw) + 1
        if size >= BATCH_BYTES:
            yield _hash(pending, table)
            pending, size = [], 0
    if pending:
        yield _hash(pending, table)


_powers: tuple[np.ndarray, np.ndarray] | None = None


def _power_tables(length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return base**i and base**-i modulo 2**32 for i < length; those of usual length are kept."""
    global _powers
    if _powers is not None and len(_powers[0]) >= length:
        return _powers
    room = max(length, 4 * BATCH_BYTES)
    tables = []
    for base in (_BASE, _BASE_INVERSE):
        table = np.full(room, base, dtype=np.uint32)
        table[0] = 1
        tables.append(np.cumprod(table, dtype=np.uint32))
    found = (tables[0], tables[1])
    if room == 4 * BATCH_BYTES:  # one huge text must not leave a huge table behind
        _powers = found
    return found


def _hash(raws: list[bytes], table: bytes) -> HashedWords:
    # The buffer begins and ends with a separator, and one stands between texts.
    text = b" " + b" ".join(raws) + b" "
    lengths_D = np.fromiter(map(len, raws), dtype=np.int64, count=len(raws))
    buffer_N = np.frombuffer(text.translate(table), dtype=np.uint8)
    if not text.isascii():
        buffer_N = _blank_punctuation(buffer_N)

    is_word_N = buffer_N != _SPACE
    edges = np.flatnonzero(is_word_N[1:] != is_word_N[:-1])
    before_W, last_W = edges[0::2], edges[1::2]  # the word is bytes before+1 .. last

    power_N, inverse_N = _power_tables(len(buffer_N))
    running_N = np.multiply(buffer_N, power_N[: len(buffer_N)])
    np.cumsum(running_N, out=running_N)
    words_W = running_N.take(last_W)
    words_W -= running_N.take(before_W)
    words_W *= inverse_N.take(before_W)
    words_W *= _MIX
    words_W ^= words_W >> _FOLD

    ends_N = np.cumsum(lengths_D + 1)  # position of the separator after each text
    ends_D = np.searchsorted(before_W, ends_N)
    starts_D = np.concatenate([np.zeros(1, dtype=ends_D.dtype), ends_D[:-1]])
    return HashedWords(words_W, starts_D, ends_D)


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
