"""phi pull against a local server that speaks the Hub's address scheme: resume, checksums, tokens, refusals."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hub_server import WEIGHTS, Hub, serve

from pocketphi.core.errors import DataError, UserError
from pocketphi.engine import catalog, download


def test_pull_finds_and_checks_the_one_file(hub: type[Hub], tmp_path: Path) -> None:
    (path,) = download.pull("someone/model")
    assert path == tmp_path / "models" / "someone--model" / "tiny-q4.gguf"
    assert path.read_bytes() == WEIGHTS
    assert sorted(p.name for p in path.parent.iterdir()) == ["tiny-q4.gguf"]
    assert catalog.resolve("tiny-q4") == path
    hub.log.clear()
    assert download.pull("someone/model") == [path]
    assert [e["path"].split("/")[1] for e in hub.log] == ["api"], "a second pull fetches nothing"


def test_a_cut_connection_continues_where_it_stopped(hub: type[Hub]) -> None:
    hub.cut_after = 2_000_000
    (path,) = download.pull("someone/model")
    assert path.read_bytes() == WEIGHTS
    ranges = [e.get("range") for e in hub.log if "resolve" in e["path"]]
    assert ranges == [None, "bytes=2000000-"]


def test_a_killed_pull_continues_in_the_next_run(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_RETRIES", 1)
    hub.cut_after = 1_500_000
    with pytest.raises(DataError, match="after 1500000 of 3072000 bytes") as caught:
        download.pull("someone/model")
    assert "run the same command again" in (caught.value.hint or "")
    (path,) = download.pull("someone/model")
    assert path.read_bytes() == WEIGHTS
    assert hub.log[-1]["range"] == "bytes=1500000-"


def test_another_file_on_the_server_starts_anew(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_RETRIES", 1)
    hub.cut_after = 1_500_000
    with pytest.raises(DataError):
        download.pull("someone/model")
    hub.served["tiny-q4.gguf"] = WEIGHTS[::-1]
    (path,) = download.pull("someone/model")
    assert path.read_bytes() == WEIGHTS[::-1], "no mixture of two files"


def test_wrong_bytes_are_not_kept(hub: type[Hub], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="checksum or size differs"):
        download.pull("someone/model", sha256="0" * 64)
    assert not list((tmp_path / "models").rglob("*.gguf*"))
    good = hashlib.sha256(WEIGHTS).hexdigest()
    address = f"{hub.address}/x/tiny-q4.gguf"  # type: ignore[attr-defined]
    (path,) = download.pull(address, sha256=good)
    assert path.name == "tiny-q4.gguf" and path.read_bytes() == WEIGHTS


def test_a_changed_local_file_is_fetched_again(hub: type[Hub]) -> None:
    (path,) = download.pull("someone/model")
    path.write_bytes(b"x" + WEIGHTS[1:])
    assert download.pull("someone/model")[0].read_bytes() == WEIGHTS


def test_server_trouble_is_tried_again(hub: type[Hub]) -> None:
    address = f"{hub.address}/x/tiny-q4.gguf"  # type: ignore[attr-defined]
    hub.statuses.extend([503, 429])
    assert download.pull(address)[0].read_bytes() == WEIGHTS


def test_the_token_stays_with_the_hub(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    other, server, address = serve()
    try:
        monkeypatch.setenv("HF_TOKEN", "secret")
        hub.redirect_to = address
        (path,) = download.pull("someone/model")
        assert path.read_bytes() == WEIGHTS
        assert all(e["authorization"] == "Bearer secret" for e in hub.log)
        assert other.log and all("authorization" not in e for e in other.log)
    finally:
        server.shutdown()
        server.server_close()


def test_choosing_among_files(hub: type[Hub]) -> None:
    hub.served.update({"tiny-q8.gguf": b"8", "README.md": b"r"})
    with pytest.raises(UserError, match=r"2 GGUF files: tiny-q4\.gguf \(0\.00 GB\), tiny-q8"):
        download.pull("someone/model")
    with pytest.raises(UserError, match="no file matching 'q5'"):
        download.pull("someone/model", file="q5")
    assert download.pull("someone/model", file="q8")[0].read_bytes() == b"8"
    hub.served = {"config.json": b"{}", "model.safetensors": b"w", "tokenizer.json": b"t", "x.bin": b"no"}
    names = sorted(p.name for p in download.pull("someone/model"))
    assert names == ["config.json", "model.safetensors", "tokenizer.json"], "no pickles"
    hub.served = {"pytorch_model.bin": b"no"}
    with pytest.raises(UserError, match="neither GGUF nor safetensors"):
        download.pull("someone/model")


def test_refusals(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="neither an address nor a repository"):
        download.pull("model")
    with pytest.raises(UserError, match="answers 404"):
        download.pull("someone/absent")
    hub.statuses.append(401)
    with pytest.raises(UserError) as caught:
        download.pull("someone/model")
    assert "HF_TOKEN" in (caught.value.hint or "")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DataError) as failed:
        download.pull("someone/model")
    assert "network" in (failed.value.hint or "")


def test_a_full_disk_is_told_before(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download.machine, "disk_free_bytes", lambda _: 1000)
    with pytest.raises(UserError, match="needs 3072000 bytes more, 1000 are free"):
        download.pull("someone/model")
