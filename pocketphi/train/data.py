"""Which tokens a training step sees: a pure function of (seed, row number), for any number of ranks.

Shapes: B rows of a batch, T tokens of a row.

A split is one circular stream of tokens that ends with `<|endoftext|>`. It is cut into rows of T
consecutive *targets*; the inputs are the tokens one place before. So in one epoch every token is
predicted exactly once, the first token of a document too: it is predicted from the `<|endoftext|>`
that closed the document before it, which the document mask counts to the document it opens.

Rows are visited in the order of a Feistel permutation keyed by (seed, epoch): no list of rows is
ever held, any row of any epoch is found in constant time, and each epoch cuts the stream elsewhere.
The cursor of a run is one number, the rows consumed so far, and does not depend on the ranks.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pocketphi.core.errors import ConfigError, DataError
from pocketphi.train.shards import Source, Split

IGNORE = -100  # a target that is not counted in the loss
_SLOTS = 1000  # a mixture's weights are kept exactly over every run of so many rows
_MASK64 = (1 << 64) - 1


@dataclass(frozen=True)
class Batch:
    """Rows of training data: `ids_BT`, `targets_BT` (IGNORE where not counted), and
    `documents_BT`, numbers that differ where attention must not pass."""

    ids_BT: np.ndarray
    targets_BT: np.ndarray
    documents_BT: np.ndarray

    @property
    def num_targets(self) -> int:
        return int((self.targets_BT != IGNORE).sum())

    def rows(self, first: int, last: int) -> Batch:
        return Batch(self.ids_BT[first:last], self.targets_BT[first:last], self.documents_BT[first:last])


class Feed(Protocol):
    """What the trainer reads: row `i` of an endless sequence of rows."""

    sequence_length: int

    def batch(self, first_row: int, num_rows: int) -> Batch: ...

    @property
    def rows_per_epoch(self) -> int: ...

    def describe(self, num_rows: int) -> list[str]:
        """Say, in lines for people, what the first `num_rows` rows consist of."""
        ...


class Ahead:
    """Batches of a feed, the next one made in a thread while the device works on this one.

    `stride` rows lie between the first rows of two steps. Another row than the expected one (after a
    roll-back) is made when it is asked for. Only the thread touches the feed's caches.
    """

    def __init__(self, feed: Feed, stride: int) -> None:
        self._feed, self._stride = feed, stride
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._next: tuple[tuple[int, int], Future[Batch]] | None = None

    def batch(self, first_row: int, num_rows: int) -> Batch:
        """Return `feed.batch(first_row, num_rows)`, with what it raises."""
        wanted = (first_row, num_rows)
        ready = self._next if self._next is not None and self._next[0] == wanted else None
        future = ready[1] if ready else self._thread.submit(self._feed.batch, *wanted)
        following = (first_row + self._stride, num_rows)
        self._next = following, self._thread.submit(self._feed.batch, *following)
        return future.result()

    def close(self) -> None:
        """End the thread; a batch that nobody will ask for is dropped."""
        self._thread.shutdown(cancel_futures=True)


def mix64(*parts: int) -> int:
    """Hash integers to 64 bits (splitmix64's finaliser, chained)."""
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state = (state ^ (part & _MASK64)) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state = ((state ^ (state >> 31)) + 0x9E3779B97F4A7C15) & _MASK64
    return state


class Permutation:
    """A permutation of 0..n-1 in constant memory: a four-round Feistel network with cycle walking."""

    def __init__(self, n: int, *key: int) -> None:
        if n < 1:
            raise ValueError("a permutation needs at least one element")
        self.n = n
        self._half = max(1, ((n - 1).bit_length() + 1) // 2)
        self._mask = (1 << self._half) - 1
        self._keys = [mix64(*key, r) for r in range(4)]

    def __call__(self, index: int) -> int:
        if not 0 <= index < self.n:
            raise IndexError(index)
        # A walk of at most four domain sizes on average ends inside 0..n-1 again.
        while True:
            index = self._once(index)
            if index < self.n:
                return index

    def _once(self, index: int) -> int:
        left, right = index >> self._half, index & self._mask
        for key in self._keys:
            left, right = right, left ^ (mix64(right, key) & self._mask)
        return (left << self._half) | right


class _Stream:
    """The rows of some ranges of a split; ranges that follow one another are joined."""

    def __init__(self, split: Split, sources: Sequence[Source], length: int, seed: int, key: int) -> None:
        self.split, self.length, self.seed, self.key = split, length, seed, key
        ranges: list[list[int]] = []
        for source in sorted(sources, key=lambda s: s.first_token):
            end = source.first_token + source.num_tokens
            if ranges and ranges[-1][1] == source.first_token:
                ranges[-1][1] = end
            else:
                ranges.append([source.first_token, end])
        self._ranges = [(a, b) for a, b in ranges]
        self._first_rows = np.cumsum([0, *(-(-(b - a) // length) for a, b in self._ranges)])
        self.num_rows = int(self._first_rows[-1])
        self.num_tokens = sum(b - a for a, b in self._ranges)
        self._permutations: dict[int, Permutation] = {}

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row `index` of the endless sequence of epochs: ids_T, targets_T, documents_T."""
        epoch, place = divmod(index, self.num_rows)
        if epoch not in self._permutations:
            self._permutations = {epoch: Permutation(self.num_rows, self.seed, self.key, epoch)}
        row = self._permutations[epoch](place)
        which = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        start, end = self._ranges[which]
        size = end - start
        shift = mix64(self.seed, self.key, epoch, which) % size
        first = (row - int(self._first_rows[which])) * self.length
        count = min(self.length, size - first)
        positions = (np.arange(-1, count, dtype=np.int64) + (first + shift)) % size + start
        window = np.asarray(self.split.tokens[positions]).astype(np.int64)
        ids = np.full(self.length, self.split.eos_id, dtype=np.int64)
        targets = np.full(self.length, IGNORE, dtype=np.int64)
        ids[:count], targets[:count] = window[:-1], window[1:]
        documents = np.zeros(self.length, dtype=np.int32)
        documents[:count] = np.cumsum(self._is_start(positions[1:]))
        documents[count:] = documents[count - 1] + 1
        return ids, targets, documents

    def _is_start(self, positions: np.ndarray) -> np.ndarray:
        """True where a position opens a document; `positions` rise, with at most one wrap."""
        flags = np.zeros(len(positions), dtype=np.int32)
        wrap = np.flatnonzero(np.diff(positions) < 0) + 1
        begin = 0
        for stop in [*wrap.tolist(), len(positions)]:
            low, high = int(positions[begin]), int(positions[stop - 1])
            first, last = np.searchsorted(self.split.starts, [low, high + 1])
            flags[begin + (self.split.starts[first:last].astype(np.int64) - low)] = 1
            begin = stop
        return flags


class PackedFeed:
    """Rows packed from a split, in proportion to the sources' sizes or by a mixture.

    `mixture` maps source patterns ("textbooks-*") to weights: the share of rows drawn from the
    sources it matches, whatever their size (a small source is repeated, in epochs of its own).
    Raises ConfigError when a pattern matches no source, DataError when a split is too short.
    """

    def __init__(
        self, split: Split, sequence_length: int, *, seed: int, mixture: Mapping[str, float] | None = None
    ) -> None:
        self.split, self.sequence_length, self.seed = split, sequence_length, seed
        groups = _groups(split, mixture or {})
        self.names = [name for name, _, _ in groups]
        self.unused = [s.name for s in split.sources if not any(s in chosen for _, chosen, _ in groups)]
        self._streams = [
            _Stream(split, chosen, sequence_length, seed, key) for key, (_, chosen, _) in enumerate(groups)
        ]
        if any(stream.num_tokens < 2 for stream in self._streams):
            raise DataError(f"{split.path}: a source of fewer than two tokens cannot be trained on")
        self._slots = _apportion([weight for _, _, weight in groups], _SLOTS)
        for name, slots in zip(self.names, self._slots):
            if slots == 0:
                raise ConfigError(f"mixture weight of '{name}' is below 1/{_SLOTS} of the sum")
        self._pattern: tuple[int, np.ndarray] | None = None

    @property
    def rows_per_epoch(self) -> int:
        """Rows in which every token is predicted once (with a mixture: the sum over its groups)."""
        return sum(stream.num_rows for stream in self._streams)

    @property
    def num_tokens(self) -> int:
        return sum(stream.num_tokens for stream in self._streams)

    def batch(self, first_row: int, num_rows: int) -> Batch:
        rows = [self._row(first_row + i) for i in range(num_rows)]
        ids, targets, documents = (np.stack(column) for column in zip(*rows))
        return Batch(ids, targets, documents)

    def describe(self, num_rows: int) -> list[str]:
        lines = []
        for index, (name, stream) in enumerate(zip(self.names, self._streams)):
            rows = self._rows_before(num_rows, index)
            share, epochs = rows / max(num_rows, 1), rows / stream.num_rows
            lines.append(f"{name}: {share:.1%} of rows, {stream.num_tokens} tokens, {epochs:.2f} epochs")
        if self.unused:
            lines.append(f"not used (no weight in the mixture): {', '.join(self.unused)}")
        return lines

    def _row(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if len(self._streams) == 1:
            return self._streams[0].row(index)
        block, place = divmod(index, _SLOTS)
        which = int(self._slot_pattern(block)[place])
        return self._streams[which].row(self._rows_before(index, which))

    def _rows_before(self, index: int, which: int) -> int:
        """Rows of stream `which` among the first `index` rows."""
        if len(self._streams) == 1:
            return index
        block, place = divmod(index, _SLOTS)
        return block * self._slots[which] + int((self._slot_pattern(block)[:place] == which).sum())

    def _slot_pattern(self, block: int) -> np.ndarray:
        """Which stream each of the block's rows comes from: exact counts, shuffled by the seed."""
        if self._pattern is None or self._pattern[0] != block:
            order = Permutation(_SLOTS, self.seed, 0x51075, block)
            kinds = np.repeat(np.arange(len(self._slots)), self._slots)
            self._pattern = (block, kinds[[order(i) for i in range(_SLOTS)]])
        return self._pattern[1]


def _groups(split: Split, mixture: Mapping[str, float]) -> list[tuple[str, list[Source], float]]:
    """Resolve mixture patterns to sources; the first matching pattern takes a source."""
    if not mixture:
        return [("all sources", list(split.sources), 1.0)]
    taken: dict[str, list[Source]] = {pattern: [] for pattern in mixture}
    for source in split.sources:
        for pattern in mixture:
            if fnmatch.fnmatch(source.name, pattern):
                taken[pattern].append(source)
                break
    for pattern, weight in mixture.items():
        if not weight > 0:
            raise ConfigError(f"mixture weight of '{pattern}' must be positive, found {weight}")
        if not taken[pattern]:
            known = ", ".join(s.name for s in split.sources)
            raise ConfigError(f"mixture: '{pattern}' matches no source of {split.name} (sources: {known})")
    return [(pattern, taken[pattern], float(weight)) for pattern, weight in mixture.items()]


def _apportion(weights: Sequence[float], total: int) -> list[int]:
    """Split `total` in proportion to the weights, by largest remainder."""
    exact = [w * total / sum(weights) for w in weights]
    counts = [int(e) for e in exact]
    order = sorted(range(len(weights)), key=lambda i: (counts[i] - exact[i], i))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts
