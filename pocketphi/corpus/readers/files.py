"""Readers of pages, plain text and JSON lines, compressed or not."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from pocketphi.corpus.config import InputConfig
from pocketphi.corpus.document import Raw
from pocketphi.corpus.readers import readers

_BLOCK_BYTES = 1 << 20
_ZSTD_BLOCK_BYTES = 1 << 18
# A record past this many times its limit ends the file: what follows is a decompression bomb, not text.
_MAX_SKIPPED = 64


@readers.add("page")
def read_page(path: Path, name: str, source: InputConfig, max_document_bytes: int) -> Iterator[Raw]:
    """One HTML file is one record; the worker opens it."""
    yield _file_record(path, name, max_document_bytes)


@readers.add("text")
def read_text(path: Path, name: str, source: InputConfig, max_document_bytes: int) -> Iterator[Raw]:
    """One text or Markdown file is one record."""
    yield _file_record(path, name, max_document_bytes)


def _file_record(path: Path, name: str, max_document_bytes: int) -> Raw:
    size = path.stat().st_size
    if size > max_document_bytes:
        return Raw(where=name, error=f"{size} bytes, more than max_document_bytes ({max_document_bytes})")
    return Raw(where=name, key=name, path=str(path), meta={"file_bytes": size})


@readers.add("jsonl")
def read_jsonl(path: Path, name: str, source: InputConfig, max_document_bytes: int) -> Iterator[Raw]:
    """One JSON object per line; a file that starts with `[` is taken as one array."""
    with open_compressed(path) as stream:
        first = True
        for number, line, num_bytes in bounded_lines(stream, max_document_bytes):
            where = f"{name}:{number}"
            if line is None:
                yield Raw(
                    where=where,
                    error=f"line of {num_bytes} bytes, more than max_document_bytes ({max_document_bytes})",
                )
                continue
            stripped = line.strip()
            if not stripped:
                continue
            if first and stripped.startswith(b"["):
                yield Raw(
                    where=where, error="a JSON array; one object per line is expected (jq -c '.[]' makes it)"
                )
                return
            first = False
            yield Raw(where=where, key=f"{name}:{number}", line=line)


def bounded_lines(stream: IO[bytes], limit: int) -> Iterator[tuple[int, bytes | None, int]]:
    """Yield `(number from 1, line, its bytes)`; a line past `limit` bytes comes as None and is not kept.

    Raises OSError for a line of more than 64 times the limit: skipping it could take for ever.
    """
    number, rest, dropped = 1, b"", 0
    while block := stream.read(_BLOCK_BYTES):
        pieces = block.split(b"\n")
        last = pieces.pop()
        for piece in pieces:
            size = dropped + len(rest) + len(piece)
            yield number, (rest + piece if size <= limit else None), size
            number, rest, dropped = number + 1, b"", 0
        if dropped or len(rest) + len(last) > limit:
            dropped += len(rest) + len(last)
            rest = b""
            if dropped > _MAX_SKIPPED * limit:
                raise OSError(f"line {number} has more than {_MAX_SKIPPED * limit} bytes")
        else:
            rest += last
    if rest or dropped:
        size = dropped + len(rest)
        yield number, (None if dropped else rest), size


class _Errors(io.RawIOBase):
    """Turns the decompressors' own exceptions into OSError, so that one place handles them.

    Reads piece by piece: all that precedes the damage is given out before the damage is raised.
    """

    def __init__(self, stream: Any, errors: tuple[type[Exception], ...]) -> None:
        self._stream, self._errors = stream, errors
        self._read = getattr(stream, "read1", None) or self._read_block

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        try:
            return self._read(size)
        except self._errors as error:
            raise OSError(f"damaged or cut-off compressed data: {error}") from None

    def _read_block(self, size: int) -> bytes:
        return self._stream.read(_ZSTD_BLOCK_BYTES if size < 0 else min(size, _ZSTD_BLOCK_BYTES))

    def close(self) -> None:
        self._stream.close()
        super().close()


def open_compressed(path: Path) -> IO[bytes]:
    """Open a file for reading bytes, decompressing by its name.

    `read(n)` gives up to n bytes, b"" at the end. Damage, and data that end before their end mark,
    raise OSError when met.
    """
    name = path.name.lower()
    if name.endswith(".gz"):
        return _Errors(gzip.open(path, "rb"), (zlib.error, EOFError, OSError))  # type: ignore[return-value]
    if name.endswith(".bz2"):
        return _Errors(bz2.open(path, "rb"), (EOFError, OSError, ValueError))  # type: ignore[return-value]
    if name.endswith(".xz"):
        return _Errors(lzma.open(path, "rb"), (lzma.LZMAError, EOFError))  # type: ignore[return-value]
    if name.endswith(".zst"):
        import pyarrow

        # The package zstandard takes a cut-off frame for the end of the file; Arrow does not. Frames that
        # ask for a window of more than 128 MiB are refused (zstd's own default).
        stream = pyarrow.input_stream(str(path), compression="zstd")
        return _Errors(stream, (OSError, ValueError))  # type: ignore[return-value]
    return open(path, "rb", buffering=0)
