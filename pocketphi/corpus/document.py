"""A document, and what a reader hands over before it is one."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

COLUMNS = ("id", "text", "url", "source", "license", "fetched_at", "meta")


@dataclass
class Raw:
    """One record as it was found: bytes to decode and extract, or text that is ready.

    `where` names the place for people ("pages.jsonl.zst:17"), without any folder of this machine;
    `key` is what makes the id stable when the file is cut or moved. `error` marks a record that the
    reader could not give out: it becomes a counted failure.
    """

    where: str
    key: str = ""
    html: bytes | str | None = None
    text: bytes | str | None = None
    line: bytes | None = None  # of JSON, parsed by the worker
    path: str | None = None  # of a file that the worker itself opens
    kind: str = ""  # of that file, when its name does not say: "docstrings"
    url: str = ""
    source: str = ""
    license: str = ""
    fetched_at: str = ""
    charset: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    error: str = ""

    @property
    def num_bytes(self) -> int:
        return sum(len(part) for part in (self.html, self.text, self.line) if part is not None)


@dataclass
class Document:
    """A text with its origin. `meta` is JSON-ready and says what was done to it."""

    id: str
    text: str
    url: str = ""
    source: str = ""
    license: str = ""
    fetched_at: str = ""
    meta: dict[str, Any] = field(default_factory=dict)

    def row(self) -> dict[str, str]:
        """Return the columns of documents/part-*.parquet."""
        meta = json.dumps(self.meta, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return {
            "id": self.id,
            "text": self.text,
            "url": self.url,
            "source": self.source,
            "license": self.license,
            "fetched_at": self.fetched_at,
            "meta": meta,
        }


def document_id(source: str, key: str, text: str) -> str:
    """Return 32 hex digits: equal for the same text of the same place, on every machine."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (source, key, text):
        digest.update(part.encode("utf-8", "surrogatepass"))
        digest.update(b"\0")
    return digest.hexdigest()


def fraction(identifier: str, salt: str = "") -> float:
    """Map an id to [0, 1), evenly and always alike: held-out sets are chosen by this."""
    digest = hashlib.blake2b(f"{salt}\0{identifier}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
