"""Exact duplicates over the whole corpus, in memory bounded by the configuration.

Documents are compared by a 128-bit hash of their text without case and white space. Of equal
documents the first that the other rules keep stays; the order is that of the parts. Hashes are
taken in ranges, as many as the memory asks for, so that any number of documents fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_BYTES_PER_DOCUMENT = 160  # sort keys, copies that sorting makes
_RECORD = np.dtype([("part", "<i8"), ("row", "<i8"), ("first", "S32")])


@dataclass
class PartHashes:
    """Of one part: `hashes` uint64 [n, 2], `ids` list of hex ids, `kept` bool [n] by the rules so far."""

    part: int
    hashes: np.ndarray
    ids: list[str]
    kept: np.ndarray


class DuplicateTable:
    """Which rows are duplicates, and of what; kept on disk, sorted by part."""

    def __init__(self, path: Path) -> None:
        self.records = np.load(path, mmap_mode="r") if path.stat().st_size else np.zeros(0, dtype=_RECORD)

    def __len__(self) -> int:
        return len(self.records)

    def of_part(self, part: int) -> dict[int, str]:
        """Return row -> id of the document that stays."""
        parts = self.records["part"]
        low, high = np.searchsorted(parts, [part, part + 1])
        return {int(r["row"]): r["first"].decode() for r in self.records[low:high]}


def find(
    parts: Callable[[], Iterable[PartHashes]], num_documents: int, memory_bytes: int, path: Path
) -> DuplicateTable:
    """Find all duplicates and write them to `path`; `parts()` is iterated once per pass."""
    passes = max(1, -(-num_documents * _BYTES_PER_DOCUMENT // memory_bytes))
    found = [_one_pass(parts(), number, passes) for number in range(passes)]
    records = np.concatenate(found) if found else np.zeros(0, dtype=_RECORD)
    records = records[np.lexsort((records["row"], records["part"]))]
    temporary = path.with_name(path.name + ".tmp.npy")
    np.save(temporary, records)
    temporary.replace(path)
    return DuplicateTable(path)


def _one_pass(parts: Iterable[PartHashes], number: int, passes: int) -> np.ndarray:
    columns = list(_in_range(parts, number, passes))
    if not columns:
        return np.zeros(0, dtype=_RECORD)
    high, low, part, row, rejected, ids = (np.concatenate(column) for column in zip(*columns))
    # Equal hashes next to one another, kept documents first, then in order of the parts.
    order = np.lexsort((row, part, rejected, low, high))
    high, low, part, row, ids = high[order], low[order], part[order], row[order], ids[order]
    same = np.zeros(len(high), dtype=bool)
    same[1:] = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
    first = np.maximum.accumulate(np.where(same, 0, np.arange(len(high))))
    found = np.zeros(int(same.sum()), dtype=_RECORD)
    found["part"], found["row"], found["first"] = part[same], row[same], ids[first[same]]
    return found


def _in_range(
    parts: Iterable[PartHashes], number: int, passes: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    step = 2**64 // passes + 1
    for part in parts:
        if not len(part.hashes):
            continue
        chosen = (
            np.nonzero(part.hashes[:, 0] // np.uint64(step) == np.uint64(number))[0] if passes > 1 else None
        )
        rows = np.arange(len(part.hashes)) if chosen is None else chosen
        ids = np.array(part.ids, dtype="S32")[rows]
        yield (
            part.hashes[rows, 0],
            part.hashes[rows, 1],
            np.full(len(rows), part.part, dtype=np.int64),
            rows.astype(np.int64),
            ~part.kept[rows],
            ids,
        )
