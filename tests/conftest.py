"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import Hub, serve

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real benchmarks, pages and texts; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("POCKETPHI_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data not present at {folder} (set POCKETPHI_DATA)")
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Hub]]:
    """A Hub of our own that downloads are sent to; see tests/hub_server.py."""
    from pocketphi.engine import download

    handler, server, address = serve()
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setenv("POCKETPHI_HOME", str(tmp_path))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(download, "_BACKOFF_S", 0.0)
    handler.address = address  # type: ignore[attr-defined]
    yield handler
    server.shutdown()
    server.server_close()
