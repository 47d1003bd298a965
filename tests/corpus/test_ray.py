"""The Ray engine gives the bytes of the local pool."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from toy_pages import write_inputs

from pocketphi import corpus
from pocketphi.core.errors import ConfigError, UserError
from pocketphi.corpus import CorpusConfig


def settings(folder: Path, **changes: object) -> CorpusConfig:
    inputs = (str(folder / "pages"), str(folder / "lines.jsonl"))
    return CorpusConfig(inputs=inputs, chunk_documents=8, heldout_fraction=0.1, **changes)  # type: ignore[arg-type]


def processes_of(folder: Path) -> list[int]:
    """Process ids whose command line names `folder`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it may end while it is looked at
            if str(folder).encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


@pytest.fixture
def ray_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ray on this machine only, with a folder of its own, sending nothing; ended with all its processes."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("the package ray is not installed (pip install 'pocketphi[ray]')")
    # Names of sockets are limited to 107 bytes: the folders of tests are too long for them.
    folder = Path(tempfile.mkdtemp(prefix="phi-ray-", dir="/tmp"))
    settings = {"RAY_TMPDIR": str(folder), "RAY_USAGE_STATS_ENABLED": "0", "RAY_NUM_REDIS_GET_RETRIES": "120"}
    for name, value in settings.items():  # before the first import: Ray reads them there
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)  # a cluster that somebody runs is none of ours
    try:
        yield
        until = time.monotonic() + 60
        while (left := processes_of(folder)) and time.monotonic() < until:
            time.sleep(0.2)
        assert not left, "processes that Ray left behind"
    finally:
        for process in processes_of(folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def test_ray_and_local_outputs_are_the_same_bytes(tmp_path: Path, ray_alone: None) -> None:
    folder = write_inputs(tmp_path / "data", num_pages=16, num_lines=24)
    on_ray = corpus.run(settings(folder, engine="ray", workers=2), {}, out=tmp_path / "ray")
    here = corpus.run(settings(folder, workers=1), {}, out=tmp_path / "local")
    assert on_ray.manifest["files"] == here.manifest["files"] and on_ray.checksum == here.checksum
    assert sys.modules["ray"].is_initialized() is False  # what a run starts, it ends
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


def test_ray_that_does_not_start_is_an_error_with_a_way_out(
    tmp_path: Path, ray_alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    def slow(**settings: object) -> None:
        tries.append(settings)
        raise Exception("The current node timed out during startup.")

    tries: list[dict[str, object]] = []
    monkeypatch.setattr(ray, "init", slow)
    folder = write_inputs(tmp_path / "data", num_pages=1, num_lines=1)
    with pytest.raises(UserError, match=r"cannot be started on this machine.*timed out") as caught:
        corpus.run(settings(folder, engine="ray"), {}, out=tmp_path / "out")
    assert "local" in (caught.value.hint or "") and len(tries) == 3


def test_an_address_without_the_engine_is_an_error() -> None:
    with pytest.raises(ConfigError, match="engine is local"):
        CorpusConfig(ray_address="auto")
