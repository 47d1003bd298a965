"""A live page of a run on 127.0.0.1: curves drawn from metrics.jsonl as it grows. Offline, stdlib only.

The page (data/live.html) asks for what was written since it last asked; when a run goes back to a
checkpoint and its log is cut, it starts over.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from pocketphi.core import progress
from pocketphi.core.errors import UserError

METRICS = "metrics.jsonl"
_MOST_BYTES = 4_000_000  # of one answer; the page asks again at once when there is more


def find_metrics(folder: Path) -> Path | None:
    """The metrics.jsonl that is written now: of an artifact, of one in the making (`.partial`), or the
    newest of a recipe's stages."""
    places = [folder, folder.with_name(folder.name + ".partial")]
    if folder.is_dir():
        places += [place for place in folder.iterdir() if place.is_dir()]
    found = [place / METRICS for place in places if (place / METRICS).is_file()]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def answer(folder: Path, stage: str, offset: int) -> dict[str, Any]:
    """What the page gets: whole lines past `offset`, where to go on, and the name of the stage.

    `reset` is true when the page must forget what it has (another stage, or a log that was cut).
    """
    path = find_metrics(folder)
    if path is None:
        return {"stage": "", "reset": bool(stage), "offset": 0, "rows": []}
    name = path.parent.name.removesuffix(".partial")
    size = path.stat().st_size
    reset = bool(stage) and (name != stage or size < offset)
    begin = 0 if name != stage or reset else offset
    with open(path, "rb") as file:
        file.seek(begin)
        raw = file.read(_MOST_BYTES)
    raw = raw[: raw.rfind(b"\n") + 1]  # a line that is being written comes next time
    rows = [json.loads(line) for line in raw.splitlines() if line.strip()]
    return {
        "stage": name,
        "reset": reset,
        "offset": begin + len(raw),
        "more": begin + len(raw) < size,
        "rows": rows,
    }


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], folder: Path) -> None:
        self.run_folder = folder
        super().__init__(address, _Handler)


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        if parts.path == "/":
            page = (resources.files("pocketphi.train") / "data" / "live.html").read_bytes()
            self._send(200, "text/html; charset=utf-8", page)
            return
        if parts.path != "/data":
            self._send(404, "text/plain", b"not found")
            return
        asked = parse_qs(parts.query)
        try:
            offset = max(0, int(asked.get("offset", ["0"])[0]))
        except ValueError:
            self._send(400, "text/plain", b"offset must be a number")
            return
        assert isinstance(self.server, _Server)
        found = answer(self.server.run_folder, asked.get("stage", [""])[0], offset)
        self._send(200, "application/json", json.dumps(found).encode())

    def _send(self, code: int, kind: str, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        # Nothing may be loaded from elsewhere, and nothing may be sent there.
        self.send_header(
            "Content-Security-Policy",
            "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'",
        )
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


def server(folder: Path, port: int) -> ThreadingHTTPServer:
    """A server for this machine alone; port 0 takes a free one. Raises UserError when it is taken."""
    try:
        return _Server(("127.0.0.1", port), folder)
    except OSError as error:
        raise UserError(f"port {port} cannot be opened: {error}", hint="choose another port") from None


def is_main_rank() -> bool:
    """Whether this process is the one of a run that serves the page."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def page(folder: Path, port: int) -> Iterator[str]:
    """Serve the page of `folder` in the background while the block runs; yields its address."""
    serving = server(folder, port)
    thread = threading.Thread(target=serving.serve_forever, name="live page", daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{serving.server_address[1]}/"
    progress.say(f"live page: {address}")
    try:
        yield address
    finally:
        serving.shutdown()
        serving.server_close()
        thread.join()
