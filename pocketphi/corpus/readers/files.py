"""Readers of pages, plain text and JSON lines, compressed or not."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pocketphi.corpus.config import InputConfig
from pocketphi.corpus.document import Raw
from pocketphi.corpus.readers import readers

_BLOCK_BYTES = 1 << 20
_MAX_ZSTD_WINDOW_BYTES = 1 << 27


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
    """Yield `(number from 1, line, its bytes)`; a line past `limit` bytes comes as None and is not kept."""
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
        else:
            rest += last
    if rest or dropped:
        size = dropped + len(rest)
        yield number, (None if dropped else rest), size


class _Errors(io.RawIOBase):
    """Turns the decompressors' own exceptions into OSError, so that one place handles them."""

    def __init__(self, stream: IO[bytes], errors: tuple[type[Exception], ...]) -> None:
        self._stream, self._errors = stream, errors

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        try:
            return self._stream.read(size)
        except self._errors as error:
            raise OSError(f"damaged compressed data: {error}") from None

    def close(self) -> None:
        self._stream.close()
        super().close()


def open_compressed(path: Path) -> IO[bytes]:
    """Open a file for reading bytes, decompressing by its name. Damage raises OSError when met."""
    name = path.name.lower()
    if name.endswith(".gz"):
        return _Errors(gzip.open(path, "rb"), (zlib.error, EOFError, OSError))  # type: ignore[return-value, arg-type]
    if name.endswith(".bz2"):
        return _Errors(bz2.open(path, "rb"), (EOFError, OSError, ValueError))  # type: ignore[return-value, arg-type]
    if name.endswith(".xz"):
        return _Errors(lzma.open(path, "rb"), (lzma.LZMAError, EOFError))  # type: ignore[return-value, arg-type]
    if name.endswith(".zst"):
        import zstandard

        # The window bound keeps a hostile frame header from asking for gigabytes.
        decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_ZSTD_WINDOW_BYTES)
        reader = decompressor.stream_reader(open(path, "rb"), read_across_frames=True, closefd=True)  # noqa: SIM115
        return _Errors(reader, (zstandard.ZstdError,))  # type: ignore[return-value, arg-type]
    return open(path, "rb", buffering=0)
