"""The Ray engine gives the bytes of the local pool."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from toy_pages import write_inputs

from pocketphi import corpus
from pocketphi.core.errors import ConfigError, UserError
from pocketphi.corpus import CorpusConfig


def settings(folder: Path, **changes: object) -> CorpusConfig:
    inputs = (str(folder / "pages"), str(folder / "lines.jsonl"))
    return CorpusConfig(inputs=inputs, chunk_documents=8, heldout_fraction=0.1, **changes)  # type: ignore[arg-type]


def test_ray_and_local_outputs_are_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the package ray is not installed (pip install 'pocketphi[ray]')")
    folder = write_inputs(tmp_path / "data", num_pages=16, num_lines=24)
    on_ray = corpus.run(settings(folder, engine="ray", workers=2), {}, out=tmp_path / "ray")
    here = corpus.run(settings(folder, workers=1), {}, out=tmp_path / "local")
    assert on_ray.manifest["files"] == here.manifest["files"] and on_ray.checksum == here.checksum
    assert on_ray.counts == here.counts and on_ray.counts["documents_failed"] == 3
    # Who computed it plays no part: the local run takes the other's artifact for its own.
    stamp = (on_ray.path / "manifest.json").stat().st_mtime_ns
    corpus.run(settings(folder, workers=1), {}, out=tmp_path / "ray")
    assert (on_ray.path / "manifest.json").stat().st_mtime_ns == stamp


def test_without_ray_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    folder = write_inputs(tmp_path / "data", num_pages=1, num_lines=1)
    with pytest.raises(UserError, match="needs the package ray"):
        corpus.run(settings(folder, engine="ray"), {}, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_address_without_the_engine_is_an_error() -> None:
    with pytest.raises(ConfigError, match="engine is local"):
        CorpusConfig(ray_address="auto")
