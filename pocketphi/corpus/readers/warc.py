"""Reader of WARC and WET archives through fastwarc.

fastwarc takes the end of a cut-off file for the end of the archive. Here the decompressed bytes are
counted, so that a record that the file does not hold whole is a counted failure, whatever the compression.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from fastwarc.warc import ArchiveIterator, WarcRecordType

from pocketphi.corpus.config import InputConfig
from pocketphi.corpus.document import Raw
from pocketphi.corpus.readers import readers
from pocketphi.corpus.readers.files import open_compressed
from pocketphi.corpus.readers.http_body import decode_body

_PAGE_TYPES = ("text/html", "application/xhtml+xml", "application/xhtml", "")
_VERSION_LINE = len("WARC/1.0\r\n\r\n")
_POLICY_HEADERS = ("x-robots-tag", "tdm-reservation")


class _Counted:
    """What fastwarc reads from: counts bytes, and keeps an error instead of raising it inside fastwarc."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.num_bytes = 0
        self.tail = b""
        self.error: OSError | None = None

    def read(self, size: int = -1) -> bytes:
        if self.error is not None:
            return b""
        try:
            data = self._stream.read(size)
        except OSError as error:
            self.error = error
            return b""
        self.num_bytes += len(data)
        self.tail = (self.tail + data[-4:])[-4:]
        return data

    def tell(self) -> int:
        return self.num_bytes

    def close(self) -> None:
        self._stream.close()


@readers.add("warc")
def read_warc(path: Path, name: str, source: InputConfig, max_document_bytes: int) -> Iterator[Raw]:
    """Every response, resource and conversion record is one record; other types are no documents.

    Raises OSError where the file cannot be read on. The record in which it ends is given out with an error.
    """
    kinds = WarcRecordType.response | WarcRecordType.resource | WarcRecordType.conversion
    with open_compressed(path) as stream:
        counted = _Counted(stream)
        waiting: Raw | None = None  # the last record: only the end of the file shows whether it is whole
        end = 0.0
        error: OSError | None = None
        try:
            for number, record in enumerate(_archive(counted, kinds)):
                if waiting is not None:
                    yield waiting
                end = _end_of(record)
                waiting = _record(record, f"{name}:{number}", max_document_bytes)
        except OSError as found:
            error = found
        # Every record ends in two line ends; where they are missing, the estimate counts to the byte.
        slack = 0 if counted.tail == b"\r\n\r\n" else _VERSION_LINE
        cut = waiting is not None and end + slack > counted.num_bytes
        if waiting is not None:
            if cut:
                why = f": {counted.error}" if counted.error else ""
                waiting.html = waiting.text = None
                waiting.error = f"cut off: the file ends inside this record{why}"
            yield waiting
        if not cut and (error := counted.error or error) is not None:
            raise error


def _archive(stream: _Counted, kinds: WarcRecordType) -> Iterator[Any]:
    """Iterate over fastwarc's records; a panic inside it is damage like any other."""
    try:
        yield from ArchiveIterator(cast(Any, stream), record_types=kinds, parse_http=True, auto_decode="none")
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of its Rust core; no name to import
            raise
        raise OSError(f"the WARC parser gave up: {error}") from None


def _end_of(record: Any) -> float:
    """Position behind the content of a record in the decompressed file, or a few bytes before it.

    Infinite for a record without its length, which the standard demands: its headers were cut off.
    """
    headers = sum(len(name) + len(value) + 4 for name, value in record.headers)
    try:
        return record.stream_pos + headers + int(record.headers.get("Content-Length", ""))
    except ValueError:
        return math.inf


def _record(record: Any, where: str, max_document_bytes: int) -> Raw:
    headers = record.headers
    url = headers.get("WARC-Target-URI", "") or ""
    raw = Raw(
        where=where,
        key=headers.get("WARC-Record-ID", "") or url or where,
        url=url.strip("<>"),
        fetched_at=headers.get("WARC-Date", "") or "",
    )
    if shortened := headers.get("WARC-Truncated"):  # by the crawler
        raw.meta["truncated"] = shortened
    is_text = record.record_type == WarcRecordType.conversion
    encodings = ("", "")
    if record.is_http and record.http_headers is not None:
        status = record.http_headers.status_code
        if status is not None and not 200 <= status < 300:
            raw.error = f"HTTP status {status}"
            return raw
        kind = (record.http_content_type or "").lower()
        raw.charset = record.http_charset or ""
        sent = record.http_headers
        encodings = (sent.get("Transfer-Encoding") or "", sent.get("Content-Encoding") or "")
        for header, value in record.http_headers:
            if header.lower() in _POLICY_HEADERS:  # may come several times
                said = raw.headers.get(header.lower())
                raw.headers[header.lower()] = f"{said}, {value}" if said else value
    else:
        kind = (headers.get("Content-Type", "") or "").split(";")[0].strip().lower()
    if kind.startswith("text/plain"):
        is_text = True
    elif not is_text and kind not in _PAGE_TYPES:
        raw.error = f"content type {kind}"
        return raw
    content = record.reader.read(max_document_bytes + 1)
    if any(encodings):
        # Not left to fastwarc: it loses its place in the archive when a decoded body is not read to the end.
        try:
            content = decode_body(content, *encodings, max_document_bytes)
        except ValueError as error:
            raw.error = str(error)
            return raw
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
