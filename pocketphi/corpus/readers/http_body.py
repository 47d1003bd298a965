"""Bodies of archived HTTP responses: transfer and content encodings undone, never past a limit.

Archives are made by many crawlers: some keep the encodings, some undo them and keep the headers. A body
that is not in the encoding its headers name is taken as it is.
"""

from __future__ import annotations

import io
import zlib

_GZIP_MAGIC = b"\x1f\x8b"
_MAX_SIZE_LINE = 64


def decode_body(body: bytes, transfer_encoding: str, content_encoding: str, limit: int) -> bytes:
    """Return the content of a response body, at most `limit` + 1 bytes of it.

    `transfer_encoding` and `content_encoding` are the headers' values. Raises ValueError for damaged content
    and for an encoding that cannot be read here, with the reason.
    """
    if "chunked" in transfer_encoding.lower():
        body = _joined_chunks(body)
    for encoding in reversed([part.strip() for part in content_encoding.lower().split(",") if part.strip()]):
        body = _decompressed(body, encoding, limit)
    return body


def _joined_chunks(body: bytes) -> bytes:
    parts: list[bytes] = []
    at = 0
    while True:
        end = body.find(b"\r\n", at, at + _MAX_SIZE_LINE)
        try:
            size = int(body[at:end].split(b";")[0], 16) if end >= 0 else -1
        except ValueError:
            size = -1
        if size < 0:
            return b"".join(parts) if parts else body  # not chunked, or broken: what came before counts
        if size == 0:
            return b"".join(parts)
        parts.append(body[end + 2 : end + 2 + size])
        at = end + 2 + size + 2


def _decompressed(body: bytes, encoding: str, limit: int) -> bytes:
    if encoding in ("gzip", "x-gzip", "deflate"):
        if encoding != "deflate" and not body.startswith(_GZIP_MAGIC):
            return body
        windows = (47,) if encoding != "deflate" else (15, -15)  # deflate is sent with and without its header
        for window in windows:
            try:
                return zlib.decompressobj(window).decompress(body, limit + 1)
            except zlib.error as error:
                reason = str(error)
        raise ValueError(f"damaged {encoding} content: {reason}")
    if encoding == "zstd":
        import zstandard

        decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 27)
        try:
            return decompressor.stream_reader(io.BytesIO(body)).read(limit + 1)
        except zstandard.ZstdError as error:
            raise ValueError(f"damaged zstd content: {error}") from None
    if encoding in ("identity", "utf-8", "none"):
        return body
    raise ValueError(f"content encoding {encoding} cannot be read")
