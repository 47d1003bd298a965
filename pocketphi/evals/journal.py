"""The items already scored: appended as they finish, read again after a kill.

A line is written whole or not at all as far as a reader is concerned: a last line without its end is
dropped and its item scored again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Journal:
    """Records by (task, item id), in memory and in a file of the unfinished artifact."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.records: dict[tuple[str, str], dict[str, Any]] = {}
        kept = 0
        if path.exists():
            with open(path, "rb") as file:
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    try:
                        record = json.loads(line)
                        key = (record["task"], record["id"])
                    except (ValueError, KeyError, TypeError):
                        break
                    self.records[key] = record
                    kept += len(line)
            os.truncate(path, kept)
        self._file = open(path, "a", encoding="utf-8", errors="replace")  # noqa: SIM115 (closed by close)

    def get(self, task: str, id_: str) -> dict[str, Any] | None:
        return self.records.get((task, id_))

    def add(self, record: Mapping[str, Any]) -> None:
        """Keep a record. Flushed at once: an item that took a minute is not scored twice."""
        self.records[(record["task"], record["id"])] = dict(record)
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self, *, remove: bool = False) -> None:
        self._file.close()
        if remove:
            self._path.unlink()
