"""Benchmark files: found by name, read line by line, checked for the columns a task needs.

A file is JSON Lines, plain or under zstandard or gzip. Its sha256 goes into every score made from it.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketphi.core.artifact import file_sha256
from pocketphi.core.errors import DataError, UserError, did_you_mean

SUFFIXES = (".jsonl.zst", ".jsonl.gz", ".jsonl", ".json")


class MissingData(DataError):
    """Rows that are not there: in a suite a counted skip, by hand an error."""


@dataclass(frozen=True)
class DataFile:
    """A benchmark file on disk. `origin`: data set and commit, where it was fetched from the Hub."""

    path: Path
    sha256: str
    origin: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        return self.path.name


def find(data_dir: Path, stem: str) -> DataFile | None:
    """Return the file `stem` + a known suffix in `data_dir`, or None."""
    for suffix in SUFFIXES:
        path = data_dir / (stem + suffix)
        if path.is_file():
            from pocketphi.evals import hub

            sha256 = file_sha256(path)
            return DataFile(path, sha256, hub.origin(path, sha256))
    return None


def require(data_dir: Path | None, stem: str, *, from_hub: bool = False) -> DataFile:
    """Return the file or raise MissingData that names it and the nearest one there.

    from_hub: fetch it from the Hub into the data folder (or the cache, without one) when it is not there.
    """
    if from_hub:
        from pocketphi.evals import hub

        data_dir = data_dir or hub.cache_folder()
        found = find(data_dir, stem)
        if found is None:
            hub.fetch(stem, data_dir)
            found = find(data_dir, stem)
        assert found is not None
        return found
    if data_dir is None:
        raise MissingData(
            f"the file {stem}{SUFFIXES[0]} is needed and no data folder is set",
            hint="name the folder: --set data_dir=PATH",
        )
    if not data_dir.is_dir():
        raise MissingData(f"{data_dir}: no such folder", hint="name the folder: --set data_dir=PATH")
    found = find(data_dir, stem)
    if found is None:
        near = did_you_mean(stem, {p.name.split(".jsonl")[0] for p in data_dir.glob("*.jsonl*")})
        raise MissingData(f"{data_dir}: no {stem}{SUFFIXES[0]} here{near if 'mean' in near else ''}")
    return found


def read(file: DataFile, columns: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file; every row must hold `columns`.

    Raises DataError that names file, line and column when the form is not the one the task was
    written for: a score on guessed columns would be worse than none.
    """
    wanted = tuple(columns)
    for number, line in enumerate(_lines(file.path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{file.path}: line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f"{file.path}: line {number} is not an object")
        missing = [c for c in wanted if c not in row]
        if missing:
            raise DataError(
                f"{file.path}: line {number} lacks the column '{missing[0]}'{did_you_mean(missing[0], row)}",
                hint="the file is not the version that this task was written for",
            )
        yield row


def text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _lines(path: Path) -> Iterator[str]:
    try:
        if path.name.endswith(".zst"):
            try:
                import zstandard
            except ModuleNotFoundError:
                raise UserError(
                    f"{path}: reading it needs the package 'zstandard'", hint="pip install 'pocketphi[make]'"
                ) from None
            with open(path, "rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as stream:
                yield from io.TextIOWrapper(stream, encoding="utf-8")
        elif path.name.endswith(".gz"):
            with gzip.open(path, "rt", encoding="utf-8") as file:
                yield from file
        else:
            with open(path, encoding="utf-8") as file:
                yield from file
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    except Exception as error:
        if type(error).__name__ == "ZstdError":
            raise DataError(f"{path}: damaged or truncated zstandard file: {error}") from None
        raise
