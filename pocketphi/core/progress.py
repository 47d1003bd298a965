"""What a person sees while a stage runs, and the structured log that stays afterwards.

Messages and bars go to stderr; data goes to stdout. On a terminal a bar is redrawn in place; in a
file or a pipe one line is printed every few seconds. `event` adds one JSON line to the log of the
current run, so that a report can be drawn later from what really happened.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_LOG: contextvars.ContextVar[Path | None] = contextvars.ContextVar("run_log", default=None)
_REDRAW_S = 0.1
_LINE_S = 10.0


def say(message: str) -> None:
    """Print one line for the person at the terminal, on stderr."""
    print(message, file=sys.stderr, flush=True)


def event(name: str, **fields: Any) -> None:
    """Append one event to the log of the current run; does nothing outside a run."""
    path = _LOG.get()
    if path is None:
        return
    line = json.dumps({"time": round(time.time(), 3), "event": name, **fields}, default=str)
    # One write in append mode: lines of several processes do not mix, a kill leaves whole lines.
    with open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")


@contextlib.contextmanager
def run_log(path: Path | str) -> Iterator[Path]:
    """Send the events raised inside the block to `path` (JSON lines, appended)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    token = _LOG.set(path)
    try:
        yield path
    finally:
        _LOG.reset(token)


def duration(seconds: float) -> str:
    """`75` -> "1m15s"."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


def quantity(value: float) -> str:
    """`1234567` -> "1.23M"."""
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


class Bar:
    """Counts towards `total` and shows rate and time left. Use through `bar`."""

    def __init__(self, title: str, total: float | None, unit: str, done: float = 0) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done = self._first = done
        self._start = self._shown = time.monotonic()
        self._notes: dict[str, Any] = {}
        self._tty = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    def advance(self, amount: float = 1, **notes: Any) -> None:
        """Count `amount` more; `notes` (loss=2.3) are shown beside the bar."""
        self.done += amount
        self._notes.update(notes)
        now = time.monotonic()
        if now - self._shown >= (_REDRAW_S if self._tty else _LINE_S):
            self._shown = now
            self._draw()

    def _draw(self, last: bool = False) -> None:
        elapsed = max(time.monotonic() - self._start, 1e-9)
        rate = (self.done - self._first) / elapsed
        parts = [f"{self.title}: {quantity(self.done)}"]
        if self.total:
            parts[0] += f"/{quantity(self.total)} {self.unit} ({100 * self.done / self.total:.0f}%)"
        else:
            parts[0] += f" {self.unit}"
        parts.append(f"{quantity(rate)} {self.unit}/s")
        if last:
            parts.append(duration(elapsed))
        elif self.total and rate > 0:
            parts.append(f"{duration((self.total - self.done) / rate)} left")
        for key, value in self._notes.items():
            parts.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
        text = "  ".join(parts)
        if self._tty:
            width = _terminal_columns()
            end = "\n" if last else ""
            print(f"\r\x1b[2K{text[: width - 1]}", end=end, file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def bar(title: str, total: float | None = None, *, unit: str = "items", done: float = 0) -> Iterator[Bar]:
    """Show progress of a loop: `with bar("phase 1", n, unit="tokens") as b: b.advance(k)`.

    `done` is where a resumed stage continues, so that the rate counts only what this run did.
    """
    shown = Bar(title, total, unit, done)
    try:
        yield shown
    finally:
        shown._draw(last=True)


def _terminal_columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except OSError:
        return 100
