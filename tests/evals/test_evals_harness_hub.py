"""lm-eval's rows from the Hub, as lm-eval itself fetches them: `datasets` against a Hub of our own."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import urllib.parse
from pathlib import Path

import pytest
from hub_server import Hub, commit_of, serve

pytest.importorskip("lm_eval", reason="the package lm_eval is not installed")
ROOT = Path(__file__).resolve().parents[2]


class DatasetHub(Hub):
    """What `datasets` asks for beyond plain downloads: information, folders, heads of files."""

    def do_GET(self) -> None:
        asked = re.fullmatch(
            r"/api/datasets/([^/]+/[^/]+)(?:/(tree|revision)/([^/]+)(?:/(.*))?)?", self._path()
        )
        found = self._find(asked[1], asked[3] or "main") if asked else None
        if not asked or found is None:
            return super().do_GET()
        self.log.append({"path": self.path})
        files, commit = found
        if asked[2] == "tree":
            inside = {n: d for n, d in files.items() if n.startswith(asked[4] or "")}
            tree = [{"type": "file", "path": n, "size": len(d), "oid": "0" * 40} for n, d in inside.items()]
            if not asked[4]:
                folders = {n.partition("/")[0] for n in files if "/" in n}
                tree += [{"type": "directory", "path": f, "oid": "0" * 40} for f in folders]
            return self._json(tree)
        siblings = [{"rfilename": n} for n in files]
        return self._json({"id": asked[1], "sha": commit, "tags": [], "siblings": siblings, "private": False})

    def do_HEAD(self) -> None:
        self.log.append({"path": self.path})
        asked = re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._path())
        found = self._find(asked[1], asked[2]) if asked else None
        data = found[0].get(asked[3]) if asked and found else None
        self.send_response(200 if data is not None else 404)
        if found:
            self.send_header("X-Repo-Commit", found[1])
        if data is None:
            self.send_header("X-Error-Code", "EntryNotFound" if found else "RepoNotFound")
        else:
            self.send_header("ETag", '"' + hashlib.md5(data).hexdigest() + '"')
        self.send_header("Content-Length", str(len(data or b"")))
        self.end_headers()

    def _path(self) -> str:
        return urllib.parse.unquote(urllib.parse.urlparse(self.path).path)

    def _find(self, name: str, revision: str) -> tuple[dict[str, bytes], str] | None:
        for (repository, known), files in type(self).datasets.items():
            if repository == name and revision in (known, commit_of(known)):
                return files, commit_of(known)
        return None

    def _json(self, tree: object) -> None:
        self._send(200, json.dumps(tree).encode())


@pytest.mark.slow
def test_rows_are_fetched_when_asked_and_only_then(tiny: Path, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    handler, server, address = serve()
    hub = type("OneDatasetHub", (DatasetHub,), dict(vars(handler)))
    server.RequestHandlerClass = hub
    rows = {
        "goal": ["Get ice", "Sleep"],
        "sol1": ["freeze water", "lie"],
        "sol2": ["boil", "run"],
        "label": [0, 0],
    }
    table = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(rows), table)
    files = {f"data/{s}-00000-of-00001.parquet": table.getvalue() for s in ("train", "validation")}
    hub.datasets = {("baber/piqa", "main"): files}
    # `datasets` reads its settings when it is imported: a process of its own.
    settings = {
        "HF_ENDPOINT": address,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "",
    }

    def run(*more: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "pocketphi", "eval", "run", str(tiny), "-t", "lm-eval/piqa"]
        return subprocess.run(
            [*command, "--out", str(tmp_path / "e"), *more], capture_output=True, text=True, timeout=240,
            env={**os.environ, **settings}, cwd=ROOT,
        )  # fmt: skip

    try:
        refused = run()
        assert refused.returncode == 1 and "--hub fetches them" in refused.stderr
        assert hub.log == [], "nothing is asked of the Hub without --hub"
        done = run("--hub")
        assert done.returncode == 0, done.stderr
        (entry,) = json.loads((tmp_path / "e/results.json").read_text())["tasks"]
        assert entry["n"] == 2 and entry["file_sha256"] is None
        origin = {"repository": "baber/piqa", "config": None, "commit": commit_of("main")}
        assert entry["hub"] == {"piqa": origin}
        assert "lm-eval: fetching baber/piqa from the Hub" in done.stderr
    finally:
        server.shutdown()
        server.server_close()
