"""How chunks travel to workers, and errors back: frames of one JSON header and raw bytes. No pickle."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Sequence
from typing import IO, Any

from pocketphi.core import errors
from pocketphi.core.errors import PocketPhiError
from pocketphi.corpus.document import Raw

_CONTENT = ("html", "text", "line")
_HEAD = struct.Struct("<II")
_SIZE = struct.Struct("<Q")


def write_frame(stream: IO[bytes], header: dict[str, Any], blobs: Sequence[bytes] = ()) -> None:
    """Write one frame and flush it."""
    head = json.dumps(header).encode()
    stream.write(_HEAD.pack(len(head), len(blobs)) + head)
    for blob in blobs:
        stream.write(_SIZE.pack(len(blob)))
        stream.write(blob)
    stream.flush()


def read_frame(stream: IO[bytes]) -> tuple[dict[str, Any], list[bytes]] | None:
    """Read one frame; None at the end of the stream or when the writer died inside a frame."""
    head = _exactly(stream, _HEAD.size)
    if head is None:
        return None
    length, count = _HEAD.unpack(head)
    text = _exactly(stream, length)
    if text is None:
        return None
    blobs: list[bytes] = []
    for _ in range(count):
        size = _exactly(stream, _SIZE.size)
        blob = _exactly(stream, _SIZE.unpack(size)[0]) if size is not None else None
        if blob is None:
            return None
        blobs.append(blob)
    return json.loads(text), blobs


def _exactly(stream: IO[bytes], size: int) -> bytes | None:
    parts: list[bytes] = []
    while size:
        data = stream.read(size)
        if not data:
            return None
        parts.append(data)
        size -= len(data)
    return b"".join(parts)


def pack(raws: Sequence[Raw]) -> tuple[list[dict[str, Any]], list[bytes]]:
    """Split records into JSON-ready fields and their contents."""
    rows: list[dict[str, Any]] = []
    blobs: list[bytes] = []
    for raw in raws:
        row: dict[str, Any] = {}
        for item in dataclasses.fields(raw):
            value = getattr(raw, item.name)
            if item.name in _CONTENT:
                if value is not None:
                    row[item.name] = [len(blobs), isinstance(value, str)]
                    blobs.append(value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value)
            elif value:
                row[item.name] = value
        rows.append(row)
    return rows, blobs


def unpack(rows: Sequence[dict[str, Any]], blobs: Sequence[bytes]) -> list[Raw]:
    """Inverse of `pack`."""
    raws = []
    for row in rows:
        fields = dict(row)
        for name in _CONTENT:
            if name in fields:
                index, is_text = fields[name]
                fields[name] = blobs[index].decode("utf-8", "surrogatepass") if is_text else blobs[index]
        raws.append(Raw(**fields))
    return raws


def describe(error: PocketPhiError | OSError) -> dict[str, Any]:
    """Return an error as JSON-ready fields: `raise_reply` in another process raises its like."""
    if isinstance(error, PocketPhiError):
        return {"error": error.message, "hint": error.hint, "type": type(error).__name__}
    where = None if error.filename is None else str(error.filename)
    return {"error": error.strerror or str(error), "errno": error.errno, "filename": where}


def raise_reply(reply: dict[str, Any]) -> None:
    """Raise what `describe` described: a full disk is an OSError again, a user's mistake a UserError."""
    if "type" in reply:
        raise getattr(errors, reply["type"])(reply["error"], hint=reply["hint"])
    if reply["errno"] is None:
        raise OSError(reply["error"])
    raise OSError(reply["errno"], reply["error"], reply["filename"])
