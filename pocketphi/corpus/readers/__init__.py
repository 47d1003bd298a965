"""Readers: everything a source may be made of, as one stream of raw records.

Reading is bounded: a record larger than the limit, a broken file, an unknown type becomes a Raw
with `error`, which the pipeline counts and names; reading goes on behind it. Nothing here decodes
or parses a document; that is the workers' part.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from pocketphi.core.errors import DataError, UserError
from pocketphi.core.registry import Registry
from pocketphi.corpus.config import PYTHON_DOCS, InputConfig
from pocketphi.corpus.document import Raw

# A reader yields the records of one file; `name` is how messages and ids call the file.
Reader = Callable[[Path, str, InputConfig, int], Iterator[Raw]]
readers: Registry[Reader] = Registry("document format")

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
SUFFIXES = {
    ".html": "page",
    ".htm": "page",
    ".xhtml": "page",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".markdown": "text",
    ".rst": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".warc": "warc",
    ".wet": "warc",
}
_SINGLE_FILE = {"page", "text"}  # formats that the worker opens itself


def format_of(path: Path | str) -> str:
    """Return the format of a file by its name ("jsonl" for `a.jsonl.zst`), "" when it is unknown."""
    name = os.path.basename(str(path)).lower()
    for ending in COMPRESSIONS:
        if name.endswith(ending):
            kind = SUFFIXES.get(os.path.splitext(name.removesuffix(ending))[1], "")
            return "" if kind in _SINGLE_FILE or kind == "parquet" else kind
    return SUFFIXES.get(os.path.splitext(name)[1], "")


def files_of(source: InputConfig) -> list[tuple[Path, str]]:
    """Return `(path, name)` of every file of a source in a fixed order; [] for a source without files.

    Raises UserError for a path that does not exist or a single file of unknown type, DataError for a
    folder without any file.
    """
    if source.path == PYTHON_DOCS or source.path.startswith("hf:"):
        return []
    path = Path(source.path)
    if not path.exists():
        raise UserError(
            f"{path}: no such file or folder", hint=f"inputs are paths, hf:NAME, or {PYTHON_DOCS}"
        )
    if path.is_file():
        if not format_of(path):
            raise UserError(
                f"{path}: unknown file type",
                hint=f"known: {', '.join(k for k, v in SUFFIXES.items() if v)}, also with {', '.join(COMPRESSIONS)}",
            )
        return [(path, path.name)]
    found = _walk(path)
    if not found:
        raise DataError(f"{path}: the folder holds no file")
    return found


def local_dataset(source: InputConfig) -> list[tuple[Path, str]]:
    """Return the files behind `hf:FOLDER`, a local copy of a dataset; [] for a name on the hub."""
    path = Path(source.path.removeprefix("hf:").partition("@")[0].partition("#")[0])
    return _walk(path) if source.path.startswith("hf:") and path.is_dir() else []


def _walk(path: Path) -> list[tuple[Path, str]]:
    found: list[tuple[Path, str]] = []
    for folder, subfolders, names in os.walk(path):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in names:
            if not name.startswith("."):
                file = Path(folder, name)
                found.append((file, file.relative_to(path).as_posix()))
    return sorted(found, key=lambda item: item[1])


def records(source: InputConfig, max_document_bytes: int) -> Iterator[Raw]:
    """Yield the raw records of a source, at most `source.max_documents`, spread evenly over it."""
    if source.max_documents is None:
        yield from _all_records(source, max_document_bytes)
        return
    total = sum(1 for _ in _all_records(source, max_document_bytes))
    wanted = min(source.max_documents, total)
    taken = 0
    for index, raw in enumerate(_all_records(source, max_document_bytes)):
        # Record i is taken when the running share i*wanted/total passes the next whole number.
        if index * wanted // total >= taken and taken < wanted:
            taken += 1
            yield raw


def _all_records(source: InputConfig, max_document_bytes: int) -> Iterator[Raw]:
    if source.path == PYTHON_DOCS:
        from pocketphi.corpus.readers.python_docs import python_docs

        yield from python_docs()
        return
    if source.path.startswith("hf:"):
        from pocketphi.corpus.readers.hub import hub_records

        yield from hub_records(source, max_document_bytes)
        return
    for path, name in files_of(source):
        kind = format_of(path)
        if not kind:
            yield Raw(where=name, error="unknown file type")
            continue
        count = 0
        try:
            for raw in _reader(kind)(path, name, source, max_document_bytes):
                yield raw
                count += 1
        except (OSError, EOFError, ValueError) as error:
            # The rest of the file cannot be read: one failure that says where it ended.
            yield Raw(where=name, error=f"file cannot be read past record {count}: {error}")


def _reader(kind: str) -> Reader:
    """Import the module that holds a reader; each needs its own libraries."""
    if kind == "warc":
        from pocketphi.corpus.readers import warc  # noqa: F401
    elif kind == "parquet":
        from pocketphi.corpus.readers import parquet  # noqa: F401
    else:
        from pocketphi.corpus.readers import files  # noqa: F401
    return readers[kind]
