"""Labelled documents for training a scorer: JSON lines with a text and a score, or a score per file."""

from __future__ import annotations

import gzip
import io
import json
import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pocketphi.core import progress
from pocketphi.core.errors import ConfigError, DataError
from pocketphi.corpus.educational.cleaning import strip_style
from pocketphi.corpus.educational.features import hash_batches

_CLEAN_BATCH = 256
_VERSION = re.compile(r"@[0-9a-f]{7,40}$|==")


@dataclass(frozen=True)
class LabelConfig:
    """One labelled file (.jsonl, .gz, .zst) or folder (an `annotations` artifact).

    `score` (0 to 5) labels every row; without it each row carries its own in `score_field`. `weight` is
    the total weight of the file in training, whatever its number of rows; `max_documents` takes that
    many, spread evenly. Rows are grouped by `source` and the first part of `id`: a group is never split
    between training and testing.
    """

    path: str
    score: float | None = None
    name: str | None = None
    weight: float = 1.0
    max_documents: int | None = None
    text_field: str = "text"
    score_field: str = "educational"

    def __post_init__(self) -> None:
        if self.score is not None and not 0 <= self.score <= 5:
            raise ConfigError(f"{self.path}: a label is between 0 and 5, found {self.score}")
        if self.weight <= 0:
            raise ConfigError(f"{self.path}: weight must be positive, found {self.weight}")


@dataclass
class Labelled:
    """D documents, hashed. words[d], pairs[d]: uint32 slots; labels, file (index), group (index): [D]."""

    words: list[np.ndarray]
    pairs: list[np.ndarray]
    labels: np.ndarray
    file: np.ndarray
    group: np.ndarray
    ids: list[str]
    excerpts: list[str]
    file_names: list[str]
    group_names: list[str]
    num_dropped: int  # without text, or shorter than the shortest cut

    def __len__(self) -> int:
        return len(self.labels)


def files_of(config: LabelConfig) -> list[Path]:
    """The files that one label entry names; raises DataError when there is none."""
    path = Path(config.path)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if ".jsonl" in p.name and not p.name.startswith("."))
        if found:
            return found
    raise DataError(f"{path}: no labelled file here (*.jsonl, *.jsonl.gz, *.jsonl.zst)")


def group_of(row: dict[str, Any]) -> str:
    """What a row must not be separated from: its source without version, and where in it it lies."""
    base = _VERSION.split(str(row.get("source") or ""))[0]
    identity = str(row.get("id") or "")
    return f"{base}:{identity.split('/', 1)[0]}" if "/" in identity else base


def load(
    configs: tuple[LabelConfig, ...], *, bits: int, max_chars: int, min_words: int, clean: bool
) -> Labelled:
    """Read, clean and hash all labelled documents.

    A document longer than `max_chars` is cut at a place that depends on its id only.
    Raises DataError for an unreadable file, a row without a score, or no document at all.
    """
    words: list[np.ndarray] = []
    pairs: list[np.ndarray] = []
    labels: list[float] = []
    files: list[int] = []
    groups: list[int] = []
    ids: list[str] = []
    excerpts: list[str] = []
    names: list[str] = []
    group_numbers: dict[str, int] = {}
    dropped = 0
    for number, config in enumerate(configs):
        names.append(config.name or Path(config.path).name.split(".jsonl")[0])
        with progress.bar(f"reading {names[-1]}", unit="documents") as bar:
            for rows in _batches(_spread(config)):
                texts = [_cut(str(row[config.text_field]), str(row.get("id")), max_chars) for row in rows]
                if clean:
                    texts = [strip_style(text) for text in texts]
                at = 0
                for batch in hash_batches(texts, bits, whole=True):
                    for start, end in zip(batch.starts_D.tolist(), batch.ends_D.tolist()):
                        row, text = rows[at], texts[at]
                        at += 1
                        if end - start < min_words:
                            dropped += 1
                            continue
                        words.append(batch.words_W[start:end].copy())
                        pairs.append(batch.pairs_W[start : end - 1].copy())
                        labels.append(_label(config, row))
                        files.append(number)
                        groups.append(group_numbers.setdefault(group_of(row), len(group_numbers)))
                        ids.append(str(row.get("id") or f"{names[-1]}:{len(ids)}"))
                        excerpts.append(" ".join(text[:400].split())[:200])
                bar.advance(len(rows))
    if not words:
        raise DataError("the labelled files hold no document with enough words")
    return Labelled(
        words,
        pairs,
        np.array(labels, dtype=np.float32),
        np.array(files),
        np.array(groups),
        ids,
        excerpts,
        names,
        list(group_numbers),
        dropped,
    )


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSON-lines file; raises DataError that names the line of a broken one."""
    number = 0
    try:
        with open(path, "rb") as raw:
            stream: Any = raw
            if path.suffix == ".zst":
                import zstandard

                stream = zstandard.ZstdDecompressor().stream_reader(raw)
            elif path.suffix == ".gz":
                stream = gzip.GzipFile(fileobj=raw)
            for line in io.TextIOWrapper(stream, encoding="utf-8"):
                number += 1
                if line.strip():
                    row = json.loads(line)
                    if isinstance(row, dict):
                        yield row
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{path}:{number}: cannot be read: {error}") from None


def _spread(config: LabelConfig) -> Iterator[dict[str, Any]]:
    paths = files_of(config)
    total = step = None
    if config.max_documents is not None:
        total = sum(1 for path in paths for _ in rows_of(path))
        step = max(1.0, total / config.max_documents)
    number, wanted = 0, 0.0
    for path in paths:
        for row in rows_of(path):
            if step is None or number >= wanted:
                wanted += step or 0
                if isinstance(row.get(config.text_field), str):
                    yield row
            number += 1


def _batches(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    waiting: list[dict[str, Any]] = []
    for row in rows:
        waiting.append(row)
        if len(waiting) == _CLEAN_BATCH:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def _cut(text: str, identity: str, max_chars: int) -> str:
    if len(text) <= max_chars:
        return text
    start = random.Random(zlib.crc32(identity.encode())).randrange(len(text) - max_chars)
    return text[start : start + max_chars]


def _label(config: LabelConfig, row: dict[str, Any]) -> float:
    value = config.score if config.score is not None else row.get(config.score_field)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 5:
        raise DataError(
            f"{config.path}: document {row.get('id')!r} has no label between 0 and 5 in '{config.score_field}'",
            hint="give the file one with `score`, or run `phi corpus annotate`",
        )
    return float(value)
