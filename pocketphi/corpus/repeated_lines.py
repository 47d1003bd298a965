"""Lines that recur across the documents of one site: menus, banners, notices, repeated paragraphs.

A worker packs a hash and a length for each line of a document (`line_records`). `find` counts in how
many documents of the same site each line occurs and gives every document the share of its characters
that lies in recurring lines. Lines are compared without case and white space. A document without a web
address belongs to no site, and none of its lines recurs.

Memory: `memory_bytes` for counting (hashes are taken in as many ranges as that asks for), 8 bytes per
document included.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from pocketphi.core.errors import UserError

MIN_DOCUMENTS = 3  # a line in two documents of a site may be chance, or a copy
LINE = np.dtype([("hash", "<u8"), ("chars", "<u2")])
_SORT_BYTES = 48
_DOCUMENT_BYTES = 8
_MIN_MEMORY_BYTES = 4 << 20


@dataclass
class PartLines:
    """Of one part: `lines`, per document the bytes that `line_records` returned."""

    part: int
    lines: Sequence[bytes]


@dataclass
class ShareTable:
    """Share of characters in recurring lines, per document, on disk; `counts` says what was counted."""

    path: Path
    parts: list[int]
    first: list[int]
    counts: dict[str, int]

    def of_part(self, part: int) -> np.ndarray:
        """Return float32 [documents of the part]."""
        index = bisect.bisect_left(self.parts, part)
        with open(self.path, "rb") as file:
            file.seek(4 * self.first[index])
            return np.frombuffer(file.read(4 * (self.first[index + 1] - self.first[index])), dtype="<f4")


def site_of(url: str) -> str:
    """`https://www.Example.org:80/a` -> "example.org"; "" when the address names no host."""
    try:
        host = urlsplit(url if "//" in url else f"//{url}").hostname or ""
    except ValueError:
        return ""
    return host.removeprefix("www.") if "." in host else ""


def line_records(text: str, url: str) -> bytes:
    """Return packed LINE records of the non-empty lines; empty for a document of no site."""
    site = site_of(url)
    if not site:
        return b""
    key = site.encode()[:64]
    hashes: list[bytes] = []
    chars: list[int] = []
    for line in text.splitlines():
        words = line.split()
        if words:
            bare = " ".join(words).lower().encode("utf-8", "replace")
            hashes.append(hashlib.blake2b(bare, digest_size=8, key=key).digest())
            chars.append(min(len(line), 0xFFFF))
    records = np.zeros(len(hashes), dtype=LINE)
    records["hash"] = np.frombuffer(b"".join(hashes), dtype="<u8")
    records["chars"] = chars
    return records.tobytes()


def find(
    parts: Callable[[], Iterable[PartLines]],
    num_documents: int,
    path: Path,
    *,
    min_documents: int = MIN_DOCUMENTS,
    memory_bytes: int = 1 << 30,
) -> ShareTable:
    """Count lines over all parts and write each document's share to `path`.

    `parts()` is iterated once to count and twice per range, in the same order each time.
    Raises UserError when `memory_bytes` cannot hold the bookkeeping of `num_documents`.
    """
    budget = memory_bytes - num_documents * _DOCUMENT_BYTES
    if budget < _MIN_MEMORY_BYTES:
        need = num_documents * _DOCUMENT_BYTES + _MIN_MEMORY_BYTES
        raise UserError(
            f"repeated lines of {num_documents} documents need {need} bytes of memory, "
            f"dedup_memory_bytes allows {memory_bytes}",
            hint=f"set dedup_memory_bytes to {need} or more",
        )
    numbers: list[int] = []
    first = [0]
    num_lines = 0
    total_D = np.zeros(num_documents, dtype=np.uint32)
    for part, owners, records in _decoded(parts()):
        start = first[-1]
        size = len(part.lines)
        total_D[start : start + size] = np.bincount(owners, weights=records["chars"], minlength=size)
        num_lines += len(records)
        numbers.append(part.part)
        first.append(start + size)
    if first[-1] != num_documents:
        raise ValueError(f"the parts hold {first[-1]} documents, {num_documents} were announced")

    ranges = max(1, -(-num_lines * _SORT_BYTES // budget))
    repeated_D = np.zeros(num_documents, dtype=np.uint32)
    num_recurring = 0
    for number in range(ranges):
        recurring = _recurring(parts, number, ranges, min_documents)
        num_recurring += len(recurring)
        if not len(recurring):
            continue
        for index, (part, owners, records) in enumerate(_decoded(parts())):
            place = np.searchsorted(recurring, records["hash"])
            place[place == len(recurring)] = 0
            weights = np.where(recurring[place] == records["hash"], records["chars"], 0)
            size = len(part.lines)
            repeated_D[first[index] : first[index] + size] += np.bincount(
                owners, weights=weights, minlength=size
            ).astype(np.uint32)
    share_D = repeated_D / np.maximum(total_D, 1)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(share_D.astype("<f4").tobytes())
    temporary.replace(path)
    counts = {"lines": num_lines, "recurring_lines": num_recurring, "line_passes": ranges}
    return ShareTable(path, numbers, first, counts)


def _decoded(parts: Iterable[PartLines]) -> Iterator[tuple[PartLines, np.ndarray, np.ndarray]]:
    """Yield each part with the owner (row) of every line and the LINE records."""
    for part in parts:
        sizes = [len(lines) // LINE.itemsize for lines in part.lines]
        records = np.frombuffer(b"".join(part.lines), dtype=LINE)
        yield part, np.repeat(np.arange(len(sizes)), sizes), records


def _recurring(
    parts: Callable[[], Iterable[PartLines]], number: int, ranges: int, min_documents: int
) -> np.ndarray:
    """Return the sorted hashes of one range that occur in at least `min_documents` documents."""
    kept: list[np.ndarray] = []
    for _, owners, records in _decoded(parts()):
        hashes = records["hash"]
        within = (hashes >> np.uint64(32)) * np.uint64(ranges) >> np.uint64(32) == np.uint64(number)
        hashes, owners = hashes[within], owners[within]
        order = np.lexsort((hashes, owners))  # a line counts once per document
        hashes, owners = hashes[order], owners[order]
        new = np.ones(len(hashes), dtype=bool)
        new[1:] = (hashes[1:] != hashes[:-1]) | (owners[1:] != owners[:-1])
        kept.append(hashes[new])
    hashes, counts = np.unique(np.concatenate(kept or [np.zeros(0, dtype=np.uint64)]), return_counts=True)
    return hashes[counts >= min_documents]
