"""Reader of WARC and WET archives through fastwarc."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastwarc.warc import ArchiveIterator, WarcRecordType

from pocketphi.corpus.config import InputConfig
from pocketphi.corpus.document import Raw
from pocketphi.corpus.readers import readers

_PAGE_TYPES = ("text/html", "application/xhtml+xml", "application/xhtml", "")


@readers.add("warc")
def read_warc(path: Path, name: str, source: InputConfig, max_document_bytes: int) -> Iterator[Raw]:
    """Every response, resource and conversion record is one record; other types are no documents."""
    kinds = WarcRecordType.response | WarcRecordType.resource | WarcRecordType.conversion
    # Damage (bad gzip data, a broken header) is raised as OSError; the caller counts it.
    with open(path, "rb") as stream:
        archive = ArchiveIterator(stream, record_types=kinds, parse_http=True, auto_decode="all")
        for number, record in enumerate(archive):
            yield _record(record, f"{name}:{number}", max_document_bytes)


def _record(record: Any, where: str, max_document_bytes: int) -> Raw:
    headers = record.headers
    url = headers.get("WARC-Target-URI", "") or ""
    raw = Raw(
        where=where,
        key=headers.get("WARC-Record-ID", "") or url or where,
        url=url.strip("<>"),
        fetched_at=headers.get("WARC-Date", "") or "",
    )
    is_text = record.record_type == WarcRecordType.conversion
    if record.is_http and record.http_headers is not None:
        status = record.http_headers.status_code
        if status is not None and not 200 <= status < 300:
            raw.error = f"HTTP status {status}"
            return raw
        kind = (record.http_content_type or "").lower()
        raw.charset = record.http_charset or ""
        robots = record.http_headers.get("X-Robots-Tag")
        if robots:
            raw.headers["x-robots-tag"] = robots
    else:
        kind = (headers.get("Content-Type", "") or "").split(";")[0].strip().lower()
    if kind.startswith("text/plain"):
        is_text = True
    elif not is_text and kind not in _PAGE_TYPES:
        raw.error = f"content type {kind}"
        return raw
    content = record.reader.read(max_document_bytes + 1)
    if len(content) > max_document_bytes:
        raw.error = f"more than max_document_bytes ({max_document_bytes})"
        return raw
    if not content:
        raw.error = "empty record"
        return raw
    if is_text:
        raw.text = content
    else:
        raw.html = content
    return raw
