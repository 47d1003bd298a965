"""Parts: the unit of work, of resumption and of files.

A source is cut into chunks of raw records; chunk k becomes `documents/part-k.parquet` (final) and,
in the scratch folder, `part-k.parquet` (scores, hashes) and `part-k.json` (counts, failures), which
is written last and marks the part as done.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from pocketphi.core import artifact
from pocketphi.corpus import readers
from pocketphi.corpus.config import CorpusConfig, InputConfig
from pocketphi.corpus.decontamination import BenchmarkIndex
from pocketphi.corpus.document import COLUMNS, Raw
from pocketphi.corpus.minhash import Banding, band_keys
from pocketphi.corpus.processing import Processed, Processor
from pocketphi.corpus.repeated_lines import line_records

_SPACE = re.compile(r"\s+")
DOCUMENT_SCHEMA = pyarrow.schema([(name, pyarrow.string()) for name in COLUMNS])


@dataclass
class Chunk:
    """Raw records `raws` of source number `source`, which become part number `part`.

    `finished` is the summary of a part that an earlier run made; the records are left out then.
    """

    part: int
    source: int
    raws: list[Raw]
    finished: dict[str, Any] | None = None


@dataclass(frozen=True)
class Folders:
    """Where parts are written: `final` becomes the artifact, `scratch` is deleted after it."""

    final: Path
    scratch: Path

    def documents(self, part: int) -> Path:
        return self.final / "documents" / f"part-{part:05d}.parquet"

    def verdicts(self, part: int) -> Path:
        return self.final / "verdicts" / f"part-{part:05d}.parquet"

    def scores(self, part: int) -> Path:
        return self.scratch / f"part-{part:05d}.parquet"

    def done(self, part: int) -> Path:
        return self.scratch / f"part-{part:05d}.json"

    @property
    def index(self) -> Path:
        return self.scratch / "benchmarks.npz"

    def make(self) -> None:
        for folder in (self.final / "documents", self.final / "verdicts", self.scratch):
            folder.mkdir(parents=True, exist_ok=True)


def chunks(config: CorpusConfig) -> Iterator[Chunk]:
    """Cut all sources into chunks, in a fixed order that depends on the inputs and the chunk size only."""
    part = 0
    for number, source in enumerate(config.sources()):
        waiting: list[Raw] = []
        size = 0
        for raw in readers.records(source, config.max_document_bytes):
            waiting.append(raw)
            size += raw.num_bytes + int(raw.meta.get("file_bytes", 0))
            if len(waiting) >= config.chunk_documents or size >= config.chunk_bytes:
                yield Chunk(part, number, waiting)
                part, waiting, size = part + 1, [], 0
        if waiting:
            yield Chunk(part, number, waiting)
            part += 1


def open_chunks(config: CorpusConfig, folders: Folders) -> Iterator[Chunk]:
    """Yield `chunks(config)`, those whose part is there already with its summary in place of the records."""
    for chunk in chunks(config):
        summary = read_done(folders, chunk.part)
        if summary is not None:
            chunk = Chunk(chunk.part, chunk.source, [], {**summary, "resumed": True})
        yield chunk


class PartWriter:
    """Processes chunks into part files. Lives in a worker."""

    def __init__(self, config: CorpusConfig, folders: Folders) -> None:
        self.folders = folders
        self.sources: list[InputConfig] = config.sources()
        index = BenchmarkIndex.load(folders.index) if folders.index.exists() else None
        self.processor = Processor(config, index)
        self.repeated_lines = config.repeated_lines
        self.banding = (
            Banding.for_threshold(config.near_duplicate_jaccard) if config.near_duplicates else None
        )

    def write(
        self,
        chunk: Chunk,
        started: Callable[[int], None] = lambda index: None,
        skip: dict[int, str] | None = None,
    ) -> dict[str, Any]:
        """Process one chunk, write its files, return its summary (as stored in part-k.json)."""
        done = self.processor.process(self.sources[chunk.source], chunk.raws, started, skip)
        rows = [document.row() for document in done.documents]
        documents = pyarrow.table(
            {name: [row[name] for row in rows] for name in COLUMNS}, schema=DOCUMENT_SCHEMA
        )
        write_parquet(documents, self.folders.documents(chunk.part))
        scores = _score_table(done, self.banding, self.repeated_lines)
        write_parquet(scores, self.folders.scores(chunk.part))
        summary = {
            "part": chunk.part,
            "source": chunk.source,
            "documents_in": len(chunk.raws),
            "documents": len(done.documents),
            "chars": sum(len(document.text) for document in done.documents),
            "failures": done.failures,
        }
        artifact.write_atomic(self.folders.done(chunk.part), json.dumps(summary))
        return summary


def _score_table(done: Processed, banding: Banding | None, repeated_lines: bool) -> pyarrow.Table:
    texts = [document.text for document in done.documents]
    columns: dict[str, Any] = {"id": pyarrow.array([d.id for d in done.documents], pyarrow.string())}
    for name, scores in done.scores.items():
        columns[f"{name}.score"] = pyarrow.array(scores, pyarrow.float32())
    columns["contamination.item"] = pyarrow.array(done.contamination_items, pyarrow.string())
    columns["text_hash"] = pyarrow.array([text_hash(text) for text in texts], pyarrow.binary(16))
    columns["chars"] = pyarrow.array([len(text) for text in texts], pyarrow.int64())
    if banding is not None:
        keys = band_keys(texts, banding).astype("<u8")
        columns["band_keys"] = pyarrow.array(
            [row.tobytes() for row in keys], pyarrow.binary(8 * banding.num_bands)
        )
    if repeated_lines:
        columns["lines"] = pyarrow.array(
            [line_records(document.text, document.url) for document in done.documents], pyarrow.binary()
        )
    return pyarrow.table(columns)


def text_hash(text: str) -> bytes:
    """16 bytes that are equal for texts that differ only in case and white space."""
    return hashlib.blake2b(_SPACE.sub(" ", text.lower()).encode(), digest_size=16).digest()


def write_parquet(table: pyarrow.Table, path: Path) -> None:
    """Write a table whole or not at all; equal tables give equal bytes."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    pyarrow.parquet.write_table(table, temporary, compression="zstd", compression_level=3)
    temporary.replace(path)


def read_done(folders: Folders, part: int) -> dict[str, Any] | None:
    """Return the summary of a finished part, None when it is still to be made."""
    try:
        summary = json.loads(folders.done(part).read_text())
    except (OSError, ValueError):
        return None
    return summary if folders.documents(part).exists() and folders.scores(part).exists() else None
