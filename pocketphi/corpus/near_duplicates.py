"""Near-duplicates over the whole corpus: MinHash bands propose pairs, exact Jaccard decides.

Of each document the workers store band keys (`minhash.band_keys`). `find` then works out of core:

1. band keys go to one file, band after band;
2. each band is sorted, in as many key ranges as the memory asks for; documents with equal keys are
   candidate pairs, written to a file;
3. candidates' shingles are computed from their texts, read once in order, and kept in a file;
4. every candidate pair is compared exactly, in the order of documents, and a document is a duplicate
   when an earlier document *that itself stays* is at least as similar as the threshold.

So no document is dropped unless its like remains, and a pair below the threshold is never called a
duplicate: what MinHash can do wrong is miss a pair (`Banding.recall`).

Documents that other rules reject count as later than all kept ones, so a kept document is never dropped
for a rejected one. Memory: `memory_bytes` for sorting and comparing, 1 byte per document included.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pocketphi.core.errors import UserError
from pocketphi.corpus.minhash import Banding, jaccard, shingles

# Most bytes that one item takes at once. Of a band: key and document, their order, the sorted copies, and the
# place in a bucket. Of a pair: as read, as joined, its order, as sorted, without repeats.
_SORT_BYTES = 72
_PAIR_BYTES = 88
_DOCUMENT_BYTES = 1  # three flags, and the tables of parts
_SORT_SHARE = 0.75  # of the budget; the rest is for blocks that are read or written
_BLOCK_SHARE = 1 / 32
_PAIR_BINS = 1 << 14  # pairs are counted by the later rank in so many bins, to cut them into even ranges
_MIN_MEMORY_BYTES = 4 << 20
# In a bucket (equal keys) larger than this, a document is compared with its nearest predecessors and
# with the first ones of the bucket, not with all: pairs grow linearly with the bucket.
_FULL_BUCKET = 16
_NEAREST = 8
_FIRST = 4
_FOUND = np.dtype([("stays", "<i8"), ("jaccard", "<f4")])  # per document; stays: document + 1, 0 for none
_SCRATCH = ("keys.bin", "pairs.bin", "shingles.bin", "offsets.bin")


@dataclass
class PartKeys:
    """Of one part: `keys` uint64 [n, B] from `band_keys`, `ids` hex ids, `kept` bool [n] by the rules so far.

    `skip` bool [n] leaves documents out altogether (exact duplicates: they are dropped already).
    """

    part: int
    keys: np.ndarray
    ids: list[str]
    kept: np.ndarray
    skip: np.ndarray | None = None


@dataclass
class DuplicateTable:
    """Which rows are near-duplicates, and of what; on disk in `folder`. `counts` says how they were found."""

    folder: Path
    parts: list[int]
    first: np.ndarray
    counts: dict[str, int]

    def __len__(self) -> int:
        return self.counts["near_duplicates"]

    def of_part(self, part: int) -> dict[int, tuple[str, float]]:
        """Return row -> (id of the document that stays, similarity to it)."""
        index = bisect.bisect_left(self.parts, part)
        start, count = int(self.first[index]), int(self.first[index + 1] - self.first[index])
        answer: dict[int, tuple[str, float]] = {}
        with open(self.folder / "found.bin", "rb") as found, open(self.folder / "ids.bin", "rb") as ids:
            found.seek(_FOUND.itemsize * start)
            records = np.frombuffer(found.read(_FOUND.itemsize * count), dtype=_FOUND)
            for row in np.flatnonzero(records["stays"]).tolist():
                ids.seek(32 * (int(records["stays"][row]) - 1))
                name = ids.read(32).rstrip(b"\0").decode()
                answer[row] = (name, float(records["jaccard"][row]))
        return answer


def find(
    parts: Callable[[], Iterable[PartKeys]],
    texts: Callable[[int], list[str]],
    num_documents: int,
    folder: Path,
    *,
    threshold: float = 0.8,
    memory_bytes: int = 1 << 30,
) -> DuplicateTable:
    """Find all near-duplicates; `folder` takes scratch files and the result.

    `parts()` is iterated once, in order of increasing part number; `texts(part)` returns the texts of a
    part's rows and is called once for each part that holds a candidate.
    Raises UserError when `memory_bytes` cannot hold the bookkeeping of `num_documents`.
    """
    budget = memory_bytes - num_documents * _DOCUMENT_BYTES
    if budget < _MIN_MEMORY_BYTES:
        need = num_documents * _DOCUMENT_BYTES + _MIN_MEMORY_BYTES
        raise UserError(
            f"near-duplicates of {num_documents} documents need {need} bytes of memory, "
            f"dedup_memory_bytes allows {memory_bytes}",
            hint=f"set dedup_memory_bytes to {need} or more",
        )
    folder.mkdir(parents=True, exist_ok=True)
    banding = Banding.for_threshold(threshold)
    layout = _write_keys(parts(), folder, num_documents, banding.num_bands)
    counts = {"documents_compared": int(layout.num_compared), "num_bands": banding.num_bands}
    proposed, pairs_N = _propose(layout, folder, banding.num_bands, budget)
    _store_shingles(layout, folder, texts)
    counts |= proposed | _decide(layout, folder, threshold, budget, pairs_N)
    for name in _SCRATCH:
        (folder / name).unlink(missing_ok=True)
    return DuplicateTable(folder, layout.parts, layout.first, counts)


class _Flags:
    """One bit per document."""

    def __init__(self, count: int) -> None:
        self._bits = np.zeros(-(-count // 8), dtype=np.uint8)

    def at(self, documents: np.ndarray) -> np.ndarray:
        return (self._bits[documents >> 3] >> (documents & 7).astype(np.uint8)) & np.uint8(1) != 0

    def set(self, documents: np.ndarray) -> None:
        np.bitwise_or.at(self._bits, documents >> 3, np.uint8(1) << (documents & 7).astype(np.uint8))

    def __contains__(self, document: int) -> bool:
        return bool(self._bits[document >> 3] >> (document & 7) & 1)

    def add(self, document: int) -> None:
        self._bits[document >> 3] |= 1 << (document & 7)


@dataclass
class _Layout:
    """Documents in order: part p has documents first[i] .. first[i + 1] where parts[i] == p."""

    parts: list[int]
    first: np.ndarray  # int64 [parts + 1]
    late: _Flags  # other rules reject it
    involved: _Flags  # in a candidate pair
    num_compared: int

    @property
    def num_documents(self) -> int:
        return int(self.first[-1])

    def rank(self, documents: np.ndarray) -> np.ndarray:
        """Order in which documents have the right to stay."""
        return documents + self.num_documents * self.late.at(documents).astype(np.int64)


def _write_keys(parts: Iterable[PartKeys], folder: Path, num_documents: int, num_bands: int) -> _Layout:
    numbers: list[int] = []
    first = [0]
    late = _Flags(num_documents)
    compared = 0
    with open(folder / "keys.bin", "w+b") as file, open(folder / "ids.bin", "wb") as ids:
        file.truncate(8 * num_bands * num_documents)
        for part in parts:
            start, count = first[-1], len(part.keys)
            if start + count > num_documents:
                raise ValueError("the parts hold more documents than announced")
            keys = part.keys if part.skip is None else np.where(part.skip[:, None], np.uint64(0), part.keys)
            for band in range(num_bands):
                file.seek(8 * (band * num_documents + start))
                file.write(np.ascontiguousarray(keys[:, band], dtype="<u8").tobytes())
            ids.write(np.array(part.ids, dtype="S32").tobytes())
            late.set(start + np.flatnonzero(~part.kept))
            compared += int((keys[:, 0] != 0).sum()) if count else 0
            numbers.append(part.part)
            first.append(start + count)
    if first[-1] != num_documents:
        raise ValueError(f"the parts hold {first[-1]} documents, {num_documents} were announced")
    return _Layout(numbers, np.array(first), late, _Flags(num_documents), compared)


def _propose(layout: _Layout, folder: Path, num_bands: int, budget: int) -> tuple[dict[str, int], np.ndarray]:
    """Write candidate pairs (stays, goes) as int64 ranks to pairs.bin; pairs of several bands repeat.

    Returns counts, and int64 [_PAIR_BINS]: pairs by the later rank.
    """
    total = layout.num_documents
    ranges = max(1, -(-total * _SORT_BYTES // int(_SORT_SHARE * budget)))
    block = max(1024, int(_BLOCK_SHARE * budget) // 32)
    pairs_N = np.zeros(_PAIR_BINS, dtype=np.int64)
    num_pairs = num_large = 0
    with open(folder / "keys.bin", "rb") as file, open(folder / "pairs.bin", "wb") as out:
        for band in range(num_bands):
            for number in range(ranges):
                # Not kept in names here: the generator lets go of them as soon as they are sorted.
                for pairs, large in _bucket_pairs(
                    layout, *_read_range(file, band * total, total, block, number, ranges), budget
                ):
                    pairs_N += np.bincount(_bin_of(pairs[:, 1], total), minlength=_PAIR_BINS)
                    out.write(pairs.astype("<i8").tobytes())
                    num_pairs += len(pairs)
                    num_large += large
    counts = {
        "candidate_pairs_with_repeats": num_pairs,
        "large_buckets": num_large,
        "passes": num_bands * ranges,
    }
    return counts, pairs_N


def _bin_of(ranks: np.ndarray, num_documents: int) -> np.ndarray:
    return ranks * _PAIR_BINS // (2 * num_documents)


def _pair_ranges(pairs_N: np.ndarray, most: int) -> list[tuple[int, int]]:
    """Return ranges of bins [low, high) that hold at most `most` pairs each (or are one bin)."""
    ranges: list[tuple[int, int]] = []
    low = held = 0
    for number, count in enumerate(pairs_N.tolist()):
        if held and held + count > most:
            ranges.append((low, number))
            low, held = number, 0
        held += count
    return [*ranges, (low, len(pairs_N))]


def _read_range(
    file, offset: int, total: int, block: int, number: int, ranges: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the keys of one band that lie in range `number`, and their documents; keys of 0 are left out."""
    keys: list[np.ndarray] = []
    documents: list[np.ndarray] = []
    for start in range(0, total, block):
        count = min(block, total - start)
        file.seek(8 * (offset + start))
        read = np.frombuffer(file.read(8 * count), dtype="<u8")
        within = (read >> np.uint64(32)) * np.uint64(ranges) >> np.uint64(32)
        chosen = np.flatnonzero((read != 0) & (within == np.uint64(number)))
        keys.append(read[chosen])
        documents.append(chosen + start)
    if not keys:
        return np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64)
    joined = np.concatenate(keys)
    keys.clear()
    return joined, np.concatenate(documents)


def _bucket_pairs(
    layout: _Layout, keys: np.ndarray, documents: np.ndarray, budget: int
) -> Iterator[tuple[np.ndarray, int]]:
    """Yield ([n, 2] ranks (earlier, later), number of large buckets) for documents with equal keys."""
    order = np.lexsort((layout.rank(documents), keys))
    keys, documents = keys[order], documents[order]
    del order
    new = np.ones(len(keys), dtype=bool)
    new[1:] = keys[1:] != keys[:-1]
    del keys
    sizes = np.diff(np.append(np.flatnonzero(new), len(new)))
    del new
    many = sizes > 1
    # Only members of buckets with company from here on: size of the bucket, and place in it.
    member_M = documents[np.repeat(many, sizes)]
    del documents
    sizes = sizes[many]
    if not len(sizes):
        return
    num_large = int((sizes > _FULL_BUCKET).sum())
    size_M = np.repeat(sizes.astype(np.int32), sizes)
    place_M = np.arange(len(member_M), dtype=np.int32)
    place_M -= np.repeat((np.cumsum(sizes) - sizes).astype(np.int32), sizes)
    layout.involved.set(member_M)
    rank_M = layout.rank(member_M)
    del member_M
    block = max(1024, int(_BLOCK_SHARE * budget) // _PAIR_BYTES)
    for low in range(0, len(rank_M), block):
        here = np.arange(low, min(low + block, len(rank_M)))
        place, size, rank = place_M[here], size_M[here], rank_M[here]
        for back in range(1, _FULL_BUCKET):  # the predecessor at distance `back`
            ok = (place >= back) & ((size <= _FULL_BUCKET) | (back <= _NEAREST))
            if ok.any():
                yield np.stack([rank_M[here[ok] - back], rank[ok]], axis=1), 0
        for ahead in range(_FIRST):  # the first ones of a large bucket, unless they were near
            ok = (size > _FULL_BUCKET) & (place - ahead > _NEAREST)
            if ok.any():
                yield np.stack([rank_M[here[ok] - place[ok] + ahead], rank[ok]], axis=1), 0
    yield np.zeros((0, 2), dtype=np.int64), num_large


def _store_shingles(layout: _Layout, folder: Path, texts: Callable[[int], list[str]]) -> None:
    """Write shingles.bin, the sets of all involved documents in order, and offsets.bin, where each begins."""
    at = 0
    with open(folder / "shingles.bin", "wb") as file, open(folder / "offsets.bin", "wb") as offsets:
        for index, part in enumerate(layout.parts):
            low, high = int(layout.first[index]), int(layout.first[index + 1])
            rows = np.flatnonzero(layout.involved.at(np.arange(low, high))).tolist()
            sizes = np.zeros(high - low, dtype=np.int64)
            if rows:
                every = texts(part)
                for row, found in zip(rows, shingles(every[row] for row in rows)):
                    file.write(found.astype("<u4").tobytes())
                    sizes[row] = len(found)
            offsets.write((at + np.cumsum(sizes) - sizes).astype("<i8").tobytes())
            at += int(sizes.sum())
        offsets.write(np.array([at], dtype="<i8").tobytes())


class _Sets:
    """Reads the stored shingles of one document at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> _Sets:
        with contextlib.ExitStack() as stack:
            self._sets = stack.enter_context(open(self._folder / "shingles.bin", "rb"))
            self._offsets = stack.enter_context(open(self._folder / "offsets.bin", "rb"))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self, document: int) -> np.ndarray:
        self._offsets.seek(8 * document)
        start, end = np.frombuffer(self._offsets.read(16), dtype="<i8").tolist()
        self._sets.seek(4 * start)
        return np.frombuffer(self._sets.read(4 * (end - start)), dtype="<u4")


def _decide(
    layout: _Layout, folder: Path, threshold: float, budget: int, pairs_N: np.ndarray
) -> dict[str, int]:
    """Compare candidate pairs in the order of the later document; write found.bin."""
    num_pairs = (folder / "pairs.bin").stat().st_size // 16
    total = layout.num_documents
    ranges = _pair_ranges(pairs_N, int(_SORT_SHARE * budget) // _PAIR_BYTES)
    gone = _Flags(total)
    distinct = compared = similar = 0
    with (
        open(folder / "pairs.bin", "rb") as file,
        open(folder / "found.bin", "wb") as out,
        _Sets(folder) as sets,
    ):
        out.truncate(_FOUND.itemsize * total)
        for low, high in ranges:
            before, words = -1, np.zeros(0, dtype=np.uint32)
            for earlier, later in _rows(_read_pairs(file, num_pairs, low, high, total, budget)):
                distinct += 1
                document, like = later % total, earlier % total
                if document in gone or like in gone:
                    continue
                if document != before:
                    before, words = document, sets.read(document)
                others = sets.read(like)
                small, large = sorted((len(words), len(others)))
                if small < threshold * large:
                    continue  # cannot reach the threshold, whatever they share
                compared += 1
                value = jaccard(others, words)
                if value >= threshold:
                    similar += 1
                    gone.add(document)
                    out.seek(_FOUND.itemsize * document)
                    out.write(np.array([(like + 1, value)], dtype=_FOUND).tobytes())
    return {
        "candidate_pairs": distinct,
        "pairs_compared": compared,
        "near_duplicates": similar,
        "pair_passes": len(ranges),
    }


def _read_pairs(file, num_pairs: int, low: int, high: int, total: int, budget: int) -> np.ndarray:
    """Return the distinct pairs whose later rank is in bins [low, high), by later rank, then earlier."""
    block = max(1024, int(_BLOCK_SHARE * budget) // _PAIR_BYTES)
    chosen: list[np.ndarray] = []
    file.seek(0)
    for start in range(0, num_pairs, block):
        count = min(block, num_pairs - start)
        read = np.frombuffer(file.read(16 * count), dtype="<i8").reshape(-1, 2)
        place = _bin_of(read[:, 1], total)
        inside = read[(place >= low) & (place < high)]
        if len(inside):
            chosen.append(_distinct(inside))
    return _distinct(np.concatenate(chosen)) if chosen else np.zeros((0, 2), dtype=np.int64)


def _rows(pairs: np.ndarray) -> Iterator[list[int]]:
    """Rows as Python numbers, a few at a time: a list of all would take many times the array's memory."""
    for start in range(0, len(pairs), 1024):
        yield from pairs[start : start + 1024].tolist()


def _distinct(pairs: np.ndarray) -> np.ndarray:
    order = np.lexsort((pairs[:, 0], pairs[:, 1]))
    pairs = pairs[order]
    new = np.ones(len(pairs), dtype=bool)
    new[1:] = (pairs[1:] != pairs[:-1]).any(axis=1)
    return pairs[new]
