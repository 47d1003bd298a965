"""A local server that speaks the part of the Hub's HTTP interface that downloads use."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WEIGHTS = bytes(range(256)) * 12_000  # 3 MB, so that it takes several reads


class Hub(BaseHTTPRequestHandler):
    """The model repository someone/model with the files of `served`, and the data sets of `datasets`
    ((owner/name, revision) -> files); what was asked is in `log`."""

    served: dict[str, bytes]
    datasets: dict[tuple[str, str], dict[str, bytes]]
    gated: bool  # data sets are listed, their files are not handed out
    log: list[dict[str, Any]]
    cut_after: int | None  # close the connection after so many bytes, once
    redirect_to: str | None
    statuses: list[int]  # answered first, one per request
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        hub = type(self)
        self.log.append({"path": self.path, **{k.lower(): v for k, v in self.headers.items()}})
        if hub.statuses:
            self._send(hub.statuses.pop(0), b"")
        elif self.path.startswith("/api/models/someone/model/revision/"):
            files = [self._entry(n, d) for n, d in hub.served.items()]
            self._send(200, json.dumps({"sha": "c0ffee", "siblings": files}).encode())
        elif self.path.startswith(("/api/datasets/", "/datasets/")):
            self._dataset()
        elif self.path.startswith("/someone/model/resolve/c0ffee/") and hub.redirect_to:
            self.send_response(302)
            self.send_header("Location", hub.redirect_to + "/files/" + self.path.rsplit("/", 1)[1])
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            data = hub.served.get(self.path.rsplit("/", 1)[1])
            self._send(404, b"") if data is None else self._file(data)

    def _dataset(self) -> None:
        hub = type(self)
        path = urllib.parse.urlparse(self.path).path
        asked = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/revision/([^/]+)", path)
        if asked:
            revision = urllib.parse.unquote(asked.group(2))
            files = hub.datasets.get((asked.group(1), revision))
            if files is None:
                return self._send(404, b"")
            tree = {"sha": commit_of(revision), "siblings": [self._entry(n, d) for n, d in files.items()]}
            return self._send(200, json.dumps(tree).encode())
        asked = re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/(\w+)/(.+)", path)
        if asked and hub.gated:
            return self._send(401, b"")
        for (name, revision), files in hub.datasets.items():
            if asked and (name, commit_of(revision)) == asked.group(1, 2):
                data = files.get(urllib.parse.unquote(asked.group(3)))
                if data is not None:
                    return self._file(data)
        self._send(404, b"")

    def _entry(self, name: str, data: bytes) -> dict[str, Any]:
        if name.endswith((".gguf", ".parquet")):
            return {"rfilename": name, "lfs": {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}}
        return {"rfilename": name, "size": len(data)}

    def _file(self, data: bytes) -> None:
        hub = type(self)
        tag = '"' + hashlib.md5(data).hexdigest() + '"'
        start, status = 0, 200
        asked = self.headers.get("Range")
        if asked and self.headers.get("If-Range") in (None, tag):
            start, status = int(asked.removeprefix("bytes=").removesuffix("-")), 206
        self.send_response(status)
        self.send_header("ETag", tag)
        self.send_header("Content-Length", str(len(data) - start))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        body = data[start:]
        if hub.cut_after is not None:
            body, hub.cut_after = body[: hub.cut_after], None
            self.close_connection = True
        self.wfile.write(body)

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def commit_of(revision: str) -> str:
    """The commit that a data set's revision stands for."""
    return hashlib.sha1(revision.encode()).hexdigest()


def serve() -> tuple[type[Hub], ThreadingHTTPServer, str]:
    handler = type("OneHub", (Hub,), {})
    handler.served, handler.log, handler.statuses = {"tiny-q4.gguf": WEIGHTS}, [], []
    handler.datasets, handler.gated = {}, False
    handler.cut_after = handler.redirect_to = None
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return handler, server, f"http://127.0.0.1:{server.server_port}"
