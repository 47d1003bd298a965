"""Decontamination: which documents hold an item of a benchmark.

An item is the text that a model would be asked (with its choices, if any). Words are compared
without case and punctuation, so re-wrapped and re-punctuated copies count. The score of a document
is the largest share of one item's n-grams that it holds; the item is named. Items with fewer words
than `MIN_WORDS` cannot be told from ordinary speech; they are counted and left out.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pocketphi.core.errors import DataError, UserError

MIN_WORDS = 8
_WORD = re.compile(r"\w+")
_FILTER_BITS = 27  # 16 MiB
_MIX = np.uint64(0x9E3779B97F4A7C15)
# Fields that hold what is asked, in the benchmarks of the field; `choices` and `endings` follow them.
QUESTION_FIELDS = (
    "question", "query", "problem", "prompt", "input", "goal", "ctx", "context", "sentence", "text",
    "statement", "instruction", "turns",
)  # fmt: skip


def normalised(text: str) -> list[str]:
    """Lower-case words without punctuation."""
    return _WORD.findall(text.lower().replace("_", " "))


def word_hashes(words: Sequence[str]) -> np.ndarray:
    """A 64-bit number per word, the same on every machine."""
    known: dict[str, int] = {}
    number = known.setdefault
    ids = np.array([number(word, len(known)) for word in words], dtype=np.int64)
    codes = b"".join(hashlib.blake2b(word.encode(), digest_size=8).digest() for word in known)
    return np.frombuffer(codes, dtype="<u8")[ids]


def _bit(place: np.ndarray) -> np.ndarray:
    return np.left_shift(np.uint8(1), (place & np.uint64(7)).astype(np.uint8))


def ngram_hashes(hashes: np.ndarray, n: int) -> np.ndarray:
    """One number per n-gram of a sequence of word numbers."""
    count = len(hashes) - n + 1
    if count <= 0:
        return np.zeros(0, dtype=np.uint64)
    found = np.full(count, n, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for offset in range(n):
            found = (found ^ hashes[offset : offset + count]) * _MIX
            found ^= found >> np.uint64(29)
    return found


@dataclass
class BenchmarkIndex:
    """All n-grams of all items: sorted hashes, the item of each, and per item its number of n-grams."""

    ngram_words: int
    hashes: np.ndarray  # uint64 [K], sorted
    items: np.ndarray  # int32 [K]
    totals: np.ndarray  # int32 [items]
    names: list[str]
    lengths: tuple[int, ...]  # of the n-grams that occur
    num_short: int  # items with fewer than MIN_WORDS words

    def __post_init__(self) -> None:
        # One bit per possible high part of a hash: nearly every word of ordinary text is answered by
        # one look here instead of a binary search through all n-grams.
        self._bits = np.zeros(1 << (_FILTER_BITS - 3), dtype=np.uint8)
        place = self.hashes >> np.uint64(64 - _FILTER_BITS)
        np.bitwise_or.at(self._bits, place >> np.uint64(3), _bit(place))

    def _maybe(self, hashed: np.ndarray) -> np.ndarray:
        """Positions of hashes that may be in the index."""
        place = hashed >> np.uint64(64 - _FILTER_BITS)
        return np.nonzero(self._bits[place >> np.uint64(3)] & _bit(place))[0]

    @classmethod
    def build(cls, items: Iterable[tuple[str, str]], ngram_words: int = 13) -> BenchmarkIndex:
        """Index `(name, text)` items; an item shorter than an n-gram is one n-gram of its own length."""
        names: list[str] = []
        words: list[list[str]] = []
        short = 0
        for name, text in items:
            found = normalised(text)
            if len(found) < min(MIN_WORDS, ngram_words):
                short += 1
                continue
            names.append(name)
            words.append(found)
        sizes = np.array([len(one) for one in words], dtype=np.int64)
        flat = word_hashes([word for one in words for word in one])
        owner = np.repeat(np.arange(len(words)), sizes)
        lengths = tuple(sorted({min(ngram_words, size) for size in sizes.tolist()}))
        grams: list[np.ndarray] = []
        owners: list[np.ndarray] = []
        for n in lengths:
            hashed = ngram_hashes(flat, n)
            first = owner[: len(hashed)]
            wanted = (first == owner[n - 1 :]) & (np.minimum(sizes[first], ngram_words) == n)
            grams.append(hashed[wanted])
            owners.append(first[wanted].astype(np.int32))
        every = np.concatenate(grams) if grams else np.zeros(0, dtype=np.uint64)
        every_owner = np.concatenate(owners) if owners else np.zeros(0, dtype=np.int32)
        order = np.lexsort((every_owner, every))
        every, every_owner = every[order], every_owner[order]
        fresh = np.ones(len(every), dtype=bool)  # an n-gram that an item repeats counts once
        fresh[1:] = (every[1:] != every[:-1]) | (every_owner[1:] != every_owner[:-1])
        every, every_owner = every[fresh], every_owner[fresh]
        totals = np.bincount(every_owner, minlength=len(names)).astype(np.int32)
        return cls(ngram_words, every, every_owner, totals, names, lengths, short)

    def search(self, texts: Sequence[str]) -> tuple[np.ndarray, list[str]]:
        """Return per text the largest share of an item found in it, and that item's name ("" for none)."""
        shares = np.zeros(len(texts), dtype=np.float32)
        found = [""] * len(texts)
        if not len(self.hashes):
            return shares, found
        words = [normalised(text) for text in texts]
        flat = word_hashes([word for one in words for word in one])
        starts = np.concatenate([[0], np.cumsum([len(one) for one in words])])
        owner = np.repeat(np.arange(len(texts)), np.diff(starts))
        documents: list[np.ndarray] = []
        grams: list[np.ndarray] = []
        for n in self.lengths:
            hashed = ngram_hashes(flat, n)
            if not len(hashed):
                continue
            hit = self._maybe(hashed)
            hit = hit[owner[hit] == owner[hit + n - 1]]
            place = np.searchsorted(self.hashes, hashed[hit])
            place[place == len(self.hashes)] = 0
            hit = hit[self.hashes[place] == hashed[hit]]
            documents.append(owner[hit])
            grams.append(hashed[hit])
        if not documents:
            return shares, found
        pairs = np.unique(
            np.stack([np.concatenate(documents).astype(np.uint64), np.concatenate(grams)]), axis=1
        )
        best: dict[int, tuple[float, int]] = {}
        counts: dict[tuple[int, int], int] = {}
        lows = np.searchsorted(self.hashes, pairs[1], side="left")
        highs = np.searchsorted(self.hashes, pairs[1], side="right")
        for document, low, high in zip(pairs[0].tolist(), lows.tolist(), highs.tolist()):
            for item in self.items[low:high].tolist():
                counts[document, item] = counts.get((document, item), 0) + 1
        for (document, item), count in counts.items():
            share = count / int(self.totals[item])
            if document not in best or (share, -item) > (best[document][0], -best[document][1]):
                best[document] = (share, item)
        for document, (share, item) in best.items():
            shares[document] = share
            found[document] = self.names[item]
        return shares, found

    def save(self, path: Path) -> None:
        """Write the index for the workers (arrays only; nothing is executed on loading)."""
        facts = json.dumps(
            {"n": self.ngram_words, "names": self.names, "lengths": self.lengths, "short": self.num_short}
        )
        buffer = io.BytesIO()
        np.savez(
            buffer,
            hashes=self.hashes,
            items=self.items,
            totals=self.totals,
            facts=np.frombuffer(facts.encode(), dtype=np.uint8),
        )
        path.write_bytes(buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> BenchmarkIndex:
        with np.load(path, allow_pickle=False) as arrays:
            facts = json.loads(arrays["facts"].tobytes())
            return cls(
                facts["n"],
                arrays["hashes"],
                arrays["items"],
                arrays["totals"],
                facts["names"],
                tuple(facts["lengths"]),
                facts["short"],
            )


def benchmark_files(paths: Iterable[str]) -> list[Path]:
    """Return the JSON-lines files that `paths` name; a folder gives all of its evaluation splits."""
    found: list[Path] = []
    for name in paths:
        path = Path(name)
        if path.is_dir():
            inside = [p for p in sorted(path.iterdir()) if ".jsonl" in p.name and ".train." not in p.name]
            if not inside:
                raise DataError(f"{path}: holds no benchmark (*.jsonl, *.jsonl.zst)")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"{path}: no such benchmark file")
    return found


def benchmark_items(paths: Iterable[Path]) -> Iterator[tuple[str, str]]:
    """Yield `(name, text)` of every item; names look like "arc_easy.test:17"."""
    from pocketphi.corpus.readers.files import bounded_lines, open_compressed

    for path in paths:
        base = path.name.split(".jsonl")[0]
        with open_compressed(path) as stream:
            for number, line, _ in bounded_lines(stream, 1 << 24):
                if line is None or not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise DataError(f"{path}:{number}: not valid JSON: {error}") from None
                if isinstance(row, dict):
                    for text in item_texts(row):
                        yield f"{base}:{number}", text


def item_texts(row: dict[str, Any]) -> list[str]:
    """Return what is asked in a benchmark row: the question alone, and with its choices when it is short."""
    question = ""
    for name in QUESTION_FIELDS:
        value = row.get(name)
        if isinstance(value, list):
            value = "\n".join(part for part in value if isinstance(part, str))
        if isinstance(value, str) and value.strip():
            question = value
            break
    if not question:
        return []
    return [question]
