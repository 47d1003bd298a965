"""Reader of Parquet files: the text or HTML column and whatever origin columns there are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet

from pocketphi.corpus.config import InputConfig
from pocketphi.corpus.document import Raw
from pocketphi.corpus.readers import readers

_BATCH_ROWS = 256
ORIGIN_COLUMNS = ("id", "url", "source", "license", "fetched_at", "date")


@readers.add("parquet")
def read_parquet(path: Path, name: str, source: InputConfig, max_document_bytes: int) -> Iterator[Raw]:
    """One row is one record, read in small batches."""
    try:
        file = pyarrow.parquet.ParquetFile(path)
        columns = file.schema_arrow.names
        content = next((c for c in (source.text_field, source.html_field) if c in columns), None)
        if content is None:
            yield Raw(
                where=name,
                error=f"no column '{source.text_field}' or '{source.html_field}' (has: {', '.join(columns[:12])})",
            )
            return
        wanted = [content, *(c for c in ORIGIN_COLUMNS if c in columns)]
        index = 0
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=wanted):
            for row in batch.to_pylist():
                yield _record(row, content, f"{name}:{index}", source, max_document_bytes)
                index += 1
    except pyarrow.ArrowException as error:
        raise OSError(f"damaged Parquet file: {error}") from None


def _record(row: dict, content: str, where: str, source: InputConfig, max_document_bytes: int) -> Raw:
    value = row[content]
    if not isinstance(value, (str, bytes)):
        return Raw(where=where, error=f"column '{content}' holds {type(value).__name__}, not text")
    if len(value) > max_document_bytes:
        return Raw(
            where=where, error=f"{len(value)} bytes, more than max_document_bytes ({max_document_bytes})"
        )
    origin = {c: str(row[c]) for c in ORIGIN_COLUMNS if row.get(c) is not None}
    raw = Raw(
        where=where,
        key=origin.get("id") or origin.get("url") or where,
        url=origin.get("url", ""),
        source=origin.get("source", ""),
        license=origin.get("license", ""),
        fetched_at=origin.get("fetched_at", origin.get("date", "")),
    )
    if "id" in origin:
        raw.meta["original_id"] = origin["id"]
    if content == source.text_field:
        raw.text = value
    else:
        raw.html = value
    return raw
