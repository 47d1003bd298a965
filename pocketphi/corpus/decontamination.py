"""Decontamination: which documents hold an item of a benchmark, and which item.

Texts are compared as streams of letters and digits: case, white space, line breaks, punctuation and
hyphens play no part, so that an item is found verbatim, re-wrapped or re-punctuated. An item is cut into
overlapping pieces of `piece_chars` characters that begin where words begin; the score of a document is
the largest share of one item's pieces that it holds. It is halved unless the item's first and last words
are there too: a textbook that holds the passage a question quotes, or the sentence it was made from, does
not hold the question. Items shorter than two pieces count only when the document holds all of them.

Shape legend: N letters and digits of a batch, S word starts, D documents, G pieces of all items.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pocketphi.core.errors import DataError, UserError
from pocketphi.corpus.benchmark_items import item_texts

PIECE_CHARS = 32
MIN_CHARS = 24  # letters and digits; anything shorter is everyday speech
_MAX_PIECES = 96  # of one item; longer ones are sampled evenly
_GENERIC = 3  # a short text that so many items share says nothing about any of them
_EDGE = 24  # first and last letters of an item that must be there
_CANDIDATE = 0.25
_BATCH_BYTES = 1 << 16
_PIECE_OF_STREAM = 1 << 18
_BASE = 0x9E3779B97F4A7C15 | 1
_BASE_INVERSE = pow(_BASE, -1, 1 << 64)
_MIX = np.uint64(0xD6E8FEB86659FD93)
_FOLD = np.uint64(32)
_SIEVE_BITS = 26


def _byte_table() -> bytes:
    table = bytearray(256)
    for byte in range(128):
        character = chr(byte)
        table[byte] = ord(character.lower()) if character.isalnum() else 0
    table[128:256] = bytes(range(128, 256))
    return bytes(table)


_TABLE = _byte_table()
# Punctuation and spaces beyond ASCII: U+0080-00BF, U+2000-207F, U+3000-303F, U+FF00-FF0F.
_PUNCTUATION = re.compile(
    rb"\xc2[\x80-\xbf]|\xe2[\x80\x81][\x80-\xbf]|\xe3\x80[\x80-\xbf]|\xef\xbc[\x80-\x8f]"
)


@dataclass
class _Stream:
    """Letters and digits of D texts: text d owns bytes [bounds[d], bounds[d + 1]) of `bytes_N`."""

    bytes_N: np.ndarray
    starts_S: np.ndarray  # positions where words begin
    spaced_S: np.ndarray  # bool: after white space, so that no change of punctuation moves it
    bounds: np.ndarray


def _stream(texts: Sequence[str]) -> _Stream:
    raws = []
    for text in texts:
        if text.isascii():
            raws.append(text.encode())
        else:
            raws.append(_PUNCTUATION.sub(b" ", text.lower().encode("utf-8", "replace")))
    joined = b" " + b" ".join(raws)
    lengths = np.fromiter(map(len, raws), dtype=np.int64, count=len(raws))
    every = np.frombuffer(joined.translate(_TABLE), dtype=np.uint8)
    kept = every != 0
    begins = kept.copy()
    begins[1:] &= ~kept[:-1]
    # Scripts without spaces: each of their letters begins a word.
    begins |= (every >= 0xE3) & (every <= 0xEF)
    before = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(kept)])
    ends = np.cumsum(lengths + 1)
    bounds = before[np.concatenate([np.zeros(1, dtype=np.int64), ends])]
    at = np.flatnonzero(begins)
    source = np.frombuffer(joined, dtype=np.uint8)
    spaced = (source[at - 1] <= 0x20) | (every[at] >= 0xE3)
    return _Stream(every[kept], before[at], spaced, bounds)


_powers: tuple[np.ndarray, np.ndarray] | None = None


def _power_tables() -> tuple[np.ndarray, np.ndarray]:
    global _powers
    if _powers is None:
        tables = []
        for base in (_BASE, _BASE_INVERSE):
            table = np.full(_PIECE_OF_STREAM + 64, base, dtype=np.uint64)
            table[0] = 1
            tables.append(np.cumprod(table, dtype=np.uint64))
        _powers = (tables[0], tables[1])
    return _powers


def _piece_hashes(bytes_N: np.ndarray, starts_S: np.ndarray, length: int) -> np.ndarray:
    """uint64 [S]: a hash of `length` bytes from each start; all must lie inside the stream."""
    power, inverse = _power_tables()
    hashes_S = np.empty(len(starts_S), dtype=np.uint64)
    low = 0
    for begin in range(0, len(bytes_N), _PIECE_OF_STREAM):
        high = int(np.searchsorted(starts_S, begin + _PIECE_OF_STREAM))
        if high > low:
            part = bytes_N[begin : begin + _PIECE_OF_STREAM + length]
            running = np.zeros(len(part) + 1, dtype=np.uint64)
            np.cumsum(part * power[: len(part)], out=running[1:])
            at = starts_S[low:high] - begin
            found = running.take(at + length)
            found -= running.take(at)
            found *= inverse.take(at)
            found ^= found >> _FOLD
            found *= _MIX
            found ^= found >> _FOLD
            hashes_S[low:high] = found
        low = high
    return hashes_S


@dataclass
class BenchmarkIndex:
    """Pieces of all items, and whole short items.

    hashes uint64 [G] sorted, owners int32 [G] (entry of each piece); totals int32 [entries] (pieces of each
    entry; 0 for a short one); edges uint8 [entries, 2, 24] (first and last letters); names per entry; short:
    all letters of short entries. One benchmark row may have several entries (with and without choices).
    """

    piece_chars: int
    hashes: np.ndarray
    owners: np.ndarray
    totals: np.ndarray
    edges: np.ndarray
    names: list[str]
    short: dict[int, bytes]
    num_items: int  # benchmark rows that can be recognised
    num_short: int  # rows too short to be told from ordinary speech
    num_generic: int  # rows whose text many rows share, and nothing else tells apart
    _sieves: dict[int, np.ndarray] = field(default_factory=dict, repr=False)
    _short_index: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, repr=False)

    @classmethod
    def build(cls, items: Iterable[tuple[str, str]], piece_chars: int = PIECE_CHARS) -> BenchmarkIndex:
        """Index `(name, text)` items; the same name may come with several texts."""
        rows: dict[str, bool] = {}
        entry_names: list[str] = []
        lengths: list[np.ndarray] = []
        contents: dict[int, bytes] = {}  # of entries short enough to be generic
        shared: Counter[bytes] = Counter()
        columns: list[tuple[np.ndarray, np.ndarray]] = []
        edges: list[np.ndarray] = []
        for names, texts in _batches(items):
            stream = _stream(texts)
            first = len(entry_names)
            entry_names += names
            sizes = np.diff(stream.bounds)
            lengths.append(sizes)
            for place in np.flatnonzero((sizes >= MIN_CHARS) & (sizes < 3 * piece_chars)).tolist():
                content = stream.bytes_N[stream.bounds[place] : stream.bounds[place + 1]].tobytes()
                contents[first + place] = content
                shared[content] += 1
            hashes, owners = _pieces(stream, piece_chars)
            columns.append((hashes, owners + first))
            edges.append(_edges(stream))
        length = np.concatenate(lengths) if lengths else np.zeros(0, dtype=np.int64)
        usable = length >= MIN_CHARS
        for entry, content in contents.items():
            usable[entry] &= shared[content] < _GENERIC
        for entry, name in enumerate(entry_names):
            rows[name] = rows.get(name, False) or bool(usable[entry])
        lost = {name for name, found in rows.items() if not found}
        generic = {name for name, enough in zip(entry_names, length >= MIN_CHARS) if enough and name in lost}
        whole = usable & (length < 2 * piece_chars)
        empty = (np.zeros(0, np.uint64), np.zeros(0, np.int64))
        hashes, owners = (np.concatenate(column) for column in zip(*(columns or [empty])))
        chosen = (usable & ~whole)[owners]
        hashes, owners = hashes[chosen], owners[chosen]
        order = np.lexsort((owners, hashes))
        return cls(
            piece_chars,
            hashes[order],
            owners[order].astype(np.int32),
            np.bincount(owners, minlength=len(entry_names)).astype(np.int32),
            np.concatenate(edges) if edges else np.zeros((0, 2, _EDGE), dtype=np.uint8),
            entry_names,
            {int(entry): contents[int(entry)] for entry in np.flatnonzero(whole)},
            len(rows) - len(lost),
            len(lost) - len(generic),
            len(generic),
        )

    def search(self, texts: Sequence[str]) -> tuple[np.ndarray, list[str]]:
        """Return per text its score, float32 between 0 and 1, and the name of the item found ("" for none)."""
        scores: list[np.ndarray] = []
        names: list[str] = []
        start = size = 0
        for end, text in enumerate(texts, 1):
            size += len(text)
            if size >= _BATCH_BYTES or end == len(texts):
                part, found = self._search(texts[start:end])
                scores.append(part)
                names += found
                start, size = end, 0
        return (np.concatenate(scores) if scores else np.zeros(0, dtype=np.float32)), names

    def _search(self, texts: Sequence[str]) -> tuple[np.ndarray, list[str]]:
        stream = _stream(texts)
        owner_S = np.searchsorted(stream.bounds, stream.starts_S, side="right") - 1
        room_S = stream.bounds[owner_S + 1] - stream.starts_S
        best: dict[int, tuple[float, int]] = {}
        self._search_long(stream, owner_S, room_S, best)
        self._search_short(stream, owner_S, room_S, best)
        scores = np.zeros(len(texts), dtype=np.float32)
        names = [""] * len(texts)
        for document, (score, entry) in best.items():
            scores[document] = score
            names[document] = self.names[entry]
        return scores, names

    def _search_long(
        self, stream: _Stream, owner_S: np.ndarray, room_S: np.ndarray, best: dict[int, tuple[float, int]]
    ) -> None:
        inside = room_S >= self.piece_chars
        hashed = _piece_hashes(stream.bytes_N, stream.starts_S[inside], self.piece_chars)
        documents, hashed = self._sift(owner_S[inside], hashed, self.piece_chars, self.hashes)
        if not len(hashed):
            return
        # Each distinct piece of a document counts once.
        order = np.lexsort((hashed, documents))
        documents, hashed = documents[order], hashed[order]
        new = np.ones(len(hashed), dtype=bool)
        new[1:] = (hashed[1:] != hashed[:-1]) | (documents[1:] != documents[:-1])
        documents, hashed = documents[new], hashed[new]
        lows = np.searchsorted(self.hashes, hashed, side="left")
        counts = np.searchsorted(self.hashes, hashed, side="right") - lows
        place = np.repeat(lows - np.cumsum(counts) + counts, counts) + np.arange(int(counts.sum()))
        pair = np.repeat(documents, counts) * len(self.names) + self.owners[place]
        pairs, inverse = np.unique(pair, return_inverse=True)
        entries = pairs % len(self.names)
        share = np.bincount(inverse) / self.totals[entries]
        documents = pairs // len(self.names)
        for row in np.flatnonzero(share >= _CANDIDATE).tolist():
            document, entry, score = int(documents[row]), int(entries[row]), float(share[row])
            held = stream.bytes_N[stream.bounds[document] : stream.bounds[document + 1]].tobytes()
            if any(edge.tobytes() not in held for edge in self.edges[entry]):
                score /= 2
            if document not in best or score > best[document][0]:
                best[document] = (score, entry)

    def _search_short(
        self, stream: _Stream, owner_S: np.ndarray, room_S: np.ndarray, best: dict[int, tuple[float, int]]
    ) -> None:
        if not self.short:
            return
        if not self._short_index:
            entries = np.array(list(self.short), dtype=np.int64)
            content = np.frombuffer(b"".join(c[:MIN_CHARS] for c in self.short.values()), dtype=np.uint8)
            hashes = _piece_hashes(content, np.arange(len(entries)) * MIN_CHARS, MIN_CHARS)
            order = np.argsort(hashes, kind="stable")
            self._short_index[0] = (hashes[order], entries[order])
        hashes, entries = self._short_index[0]
        inside = room_S >= MIN_CHARS
        hashed = _piece_hashes(stream.bytes_N, stream.starts_S[inside], MIN_CHARS)
        places, hashed = self._sift(np.flatnonzero(inside), hashed, MIN_CHARS, hashes)
        for place, value in zip(places.tolist(), hashed):
            at, document = int(stream.starts_S[place]), int(owner_S[place])
            low, high = np.searchsorted(hashes, value, side="left"), np.searchsorted(hashes, value, "right")
            for entry in entries[low:high].tolist():
                item = self.short[entry]
                end = at + len(item)
                held = end <= stream.bounds[document + 1] and stream.bytes_N[at:end].tobytes() == item
                if held and (document not in best or best[document][0] < 1.0):
                    best[document] = (1.0, entry)

    def _sift(
        self, labels: np.ndarray, hashed: np.ndarray, kind: int, wanted: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Keep the hashes that are in `wanted` (sorted). A bit table turns nearly all others away first."""
        sieve = self._sieves.get(kind)
        shift = np.uint64(64 - _SIEVE_BITS)
        if sieve is None:
            sieve = np.zeros(1 << (_SIEVE_BITS - 3), dtype=np.uint8)
            slots = wanted >> shift
            np.bitwise_or.at(sieve, slots >> np.uint64(3), (1 << (slots & np.uint64(7))).astype(np.uint8))
            self._sieves[kind] = sieve
        slots = hashed >> shift
        bits = sieve.take(slots >> np.uint64(3)) >> (slots & np.uint64(7)).astype(np.uint8)
        chosen = np.flatnonzero(bits & np.uint8(1))
        if len(chosen):
            place = np.searchsorted(wanted, hashed[chosen])
            place[place == len(wanted)] = 0
            chosen = chosen[wanted[place] == hashed[chosen]]
        return labels[chosen], hashed[chosen]

    def save(self, path: Path) -> None:
        """Write the index for the workers (arrays only; nothing is executed on loading)."""
        facts = {
            "piece_chars": self.piece_chars,
            "names": self.names,
            "short": {str(entry): content.hex() for entry, content in self.short.items()},
            "counts": [self.num_items, self.num_short, self.num_generic],
        }
        buffer = io.BytesIO()
        np.savez(
            buffer,
            hashes=self.hashes,
            owners=self.owners,
            totals=self.totals,
            edges=self.edges,
            facts=np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8),
        )
        path.write_bytes(buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> BenchmarkIndex:
        with np.load(path, allow_pickle=False) as arrays:
            facts = json.loads(arrays["facts"].tobytes())
            return cls(
                facts["piece_chars"],
                arrays["hashes"],
                arrays["owners"],
                arrays["totals"],
                arrays["edges"],
                facts["names"],
                {int(entry): bytes.fromhex(content) for entry, content in facts["short"].items()},
                *facts["counts"],
            )


def _batches(items: Iterable[tuple[str, str]]) -> Iterator[tuple[list[str], list[str]]]:
    names: list[str] = []
    texts: list[str] = []
    size = 0
    for name, text in items:
        names.append(name)
        texts.append(text)
        size += len(text)
        if size >= _BATCH_BYTES:
            yield names, texts
            names, texts, size = [], [], 0
    if names:
        yield names, texts


def _pieces(stream: _Stream, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (hashes, owners) of the distinct pieces of each text; of a long text an even sample."""
    owners = np.searchsorted(stream.bounds, stream.starts_S, side="right") - 1
    inside = (stream.bounds[owners + 1] - stream.starts_S >= length) & stream.spaced_S
    starts, owners = stream.starts_S[inside], owners[inside]
    counts = np.bincount(owners, minlength=len(stream.bounds) - 1)[owners]
    ordinal = np.arange(len(owners)) - np.searchsorted(owners, owners)
    sampled = ordinal % -(-counts // _MAX_PIECES) == 0
    hashes, owners = _piece_hashes(stream.bytes_N, starts[sampled], length), owners[sampled]
    order = np.lexsort((hashes, owners))
    hashes, owners = hashes[order], owners[order]
    new = np.ones(len(hashes), dtype=bool)
    new[1:] = (hashes[1:] != hashes[:-1]) | (owners[1:] != owners[:-1])
    return hashes[new], owners[new]


def _edges(stream: _Stream) -> np.ndarray:
    """uint8 [D, 2, 24]: the first and last letters of each text; of no use for a shorter one."""
    first = np.minimum(stream.bounds[:-1], max(0, len(stream.bytes_N) - _EDGE))
    last = np.maximum(stream.bounds[1:] - _EDGE, 0)
    at = np.stack([first, last], axis=1)[:, :, None] + np.arange(_EDGE)
    return (
        stream.bytes_N[np.minimum(at, max(0, len(stream.bytes_N) - 1))]
        if len(stream.bytes_N)
        else (np.zeros(at.shape, dtype=np.uint8))
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
    """Yield `(name, text)` of every item, several texts for some; names look like "arc_easy.test:17"."""
    from pocketphi.corpus.readers.files import bounded_lines, open_compressed

    for path in paths:
        base = path.name.split(".jsonl")[0]
        try:
            with open_compressed(path) as stream:
                yield from _items_of(path, base, bounded_lines(stream, 1 << 24))
        except OSError as error:
            # Half a benchmark must not pass for the whole.
            raise DataError(f"{path}: {error}") from None


def _items_of(
    path: Path, base: str, lines: Iterable[tuple[int, bytes | None, int]]
) -> Iterator[tuple[str, str]]:
    for number, line, num_bytes in lines:
        if line is None:
            raise DataError(f"{path}:{number}: a line of {num_bytes} bytes is no benchmark item")
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: not valid JSON: {error}") from None
        if isinstance(row, dict):
            for text in item_texts(row):
                yield f"{base}:{number}", text
