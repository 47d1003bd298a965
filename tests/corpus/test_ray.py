"""The Ray engine gives the bytes of the local pool."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from toy_pages import paragraph, write_inputs

from pocketphi import corpus
from pocketphi.core.config import to_tree
from pocketphi.core.errors import ConfigError, DataError, PocketPhiError, UserError
from pocketphi.corpus import CorpusConfig
from pocketphi.corpus.engines import run_parts
from pocketphi.corpus.engines.ray import Job, PartMaker, read_rows
from pocketphi.corpus.engines.wire import describe, raise_reply
from pocketphi.corpus.parts import Folders


def settings(folder: Path, **changes: object) -> CorpusConfig:
    inputs = (str(folder / "pages"), str(folder / "lines.jsonl"))
    return CorpusConfig(inputs=inputs, chunk_documents=8, heldout_fraction=0.1, **changes)  # type: ignore[arg-type]


def processes_of(folder: Path, kind: str = "") -> list[int]:
    """Ids of processes that were started with the name of `folder`, those with `kind` in their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it may end while it is looked at
            command = (entry / "cmdline").read_bytes()
            if (
                kind.encode() in command
                and str(folder).encode() in command + (entry / "environ").read_bytes()
            ):
                found.append(int(entry.name))
    return found


def wait_for_end(folder: Path, kind: str = "") -> None:
    until = time.monotonic() + 60
    while (left := processes_of(folder, kind)) and time.monotonic() < until:
        time.sleep(0.2)
    assert not left, "processes that were left behind"


@contextlib.contextmanager
def ray_folder() -> Iterator[Path]:
    """Ray on this machine only, with a folder of its own, sending nothing; ended with all its processes."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("the package ray is not installed (pip install 'pocketphi[ray]')")
    # Names of sockets are limited to 107 bytes: the folders of tests are too long for them.
    folder = Path(tempfile.mkdtemp(prefix="phi-ray-", dir="/tmp"))
    settings = {"RAY_TMPDIR": str(folder), "RAY_USAGE_STATS_ENABLED": "0", "RAY_NUM_REDIS_GET_RETRIES": "120"}
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in settings.items():  # before the first import: Ray reads them there
                patch.setenv(name, value)
            patch.delenv("RAY_ADDRESS", raising=False)  # a cluster that somebody runs is none of ours
            yield folder
        wait_for_end(folder)
    finally:
        for process in processes_of(folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def ray_alone() -> Iterator[None]:
    with ray_folder():
        yield


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


def job_of(tmp_path: Path, config: CorpusConfig) -> Job:
    folders = Folders(tmp_path / "final", tmp_path / "scratch")
    folders.make()
    return Job(to_tree(config), str(folders.final), str(folders.scratch), "test")


def test_what_is_lost_again_and_again_is_given_up(tmp_path: Path) -> None:
    folder = write_inputs(tmp_path / "data", num_pages=4, num_lines=4)
    job = job_of(tmp_path, settings(folder))
    first, *others, last = read_rows(job)  # a reader that was not lost: one row per chunk, and their number
    maker = PartMaker(job)
    assert json.loads(maker(last).column("reply")[0].as_py()) == {"num_parts": 1 + len(others)}
    for _ in range(3):  # three actors that were lost with the first chunk
        assert job.begin("0")
    reply = json.loads(maker(first).column("reply")[0].as_py())
    with pytest.raises(DataError, match=r"records empty.html to picture.png: .* was lost 3 times") as caught:
        raise_reply(reply)
    assert "chunk_documents" in (caught.value.hint or "")
    for _ in range(2):
        assert job.begin("reader")
    assert list(read_rows(job)) == []  # the driver knows by the missing number


def test_errors_come_back_as_they_were() -> None:
    for error in (
        UserError("no such file", hint="name one"),
        ConfigError("wrong"),
        OSError(28, "No space left on device", "/full/part.parquet"),
        OSError("not a gzipped file"),
    ):
        with pytest.raises(type(error)) as caught:
            raise_reply(json.loads(json.dumps(describe(error))))
        assert type(caught.value) is type(error) and str(caught.value) == str(error)
        assert getattr(caught.value, "hint", None) == getattr(error, "hint", None)
        assert getattr(caught.value, "errno", None) == getattr(error, "errno", None)


@pytest.fixture(scope="class")
def running_ray() -> Iterator[Path]:
    """A Ray that somebody else started in this process; the folder that its processes name."""
    with ray_folder() as folder:
        import ray

        root = str(Path(corpus.__file__).resolve().parents[2])
        ray.init(
            num_cpus=2,
            _temp_dir=str(folder),
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            runtime_env={"env_vars": {"PYTHONPATH": root}},
        )
        try:
            yield folder
        finally:
            ray.shutdown()


class TestARunningRay:
    @pytest.fixture
    def lines(self, tmp_path: Path) -> Path:
        path = tmp_path / "lines.jsonl"
        path.write_text("".join(json.dumps({"text": paragraph(i, 3)}) + "\n" for i in range(160)))
        return path

    @staticmethod
    def small_chunks(lines: Path | str, **changes: object) -> CorpusConfig:
        # So small that the reader has to wait for the actors.
        return CorpusConfig(inputs=(str(lines),), chunk_bytes=1000, **changes)  # type: ignore[arg-type]

    @staticmethod
    def folders(path: Path) -> Folders:
        found = Folders(path, path.with_name(path.name + ".scratch"))
        found.make()
        return found

    @staticmethod
    def assert_same_parts(lines: Path, on_ray: Folders, tmp_path: Path) -> None:
        here = TestARunningRay.folders(tmp_path / "here")
        parts = sorted(s["part"] for s in run_parts(TestARunningRay.small_chunks(lines, workers=1), here))
        assert parts == list(range(len(parts))) and len(parts) > 25
        for part in parts:
            for name in (Folders.documents, Folders.scores, Folders.done):
                assert name(on_ray, part).read_bytes() == name(here, part).read_bytes()

    def test_killed_processes_cost_nothing(
        self, lines: Path, tmp_path: Path, running_ray: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import ray

        monkeypatch.chdir(tmp_path)
        on_ray = self.folders(tmp_path / "ray")
        for done, _ in enumerate(run_parts(self.small_chunks(lines.name, engine="ray"), on_ray), 1):
            # The one that reads, one that computes, and the Ray process above another such.
            kind = {1: "ray::Read", 4: "corpus.engines.worker", 8: "ray::MapWorker"}.get(done)
            if kind is not None:
                os.kill(processes_of(running_ray, kind)[0], signal.SIGKILL)
        self.assert_same_parts(lines, on_ray, tmp_path)
        assert ray.is_initialized()  # what a run did not start, it leaves alone
        assert ray.data.DataContext.get_current().target_max_block_size > 1
        wait_for_end(running_ray, "corpus.engines.worker")

    def test_a_run_that_is_left_ends_its_processes_and_is_continued(
        self, lines: Path, tmp_path: Path, running_ray: Path
    ) -> None:
        on_ray = self.folders(tmp_path / "ray")
        config = self.small_chunks(lines, engine="ray")
        parts = run_parts(config, on_ray)
        first = next(parts)["part"]
        parts.close()
        for kind in ("ray::MapWorker", "ray::Read", "corpus.engines.worker"):
            wait_for_end(running_ray, kind)
        made = on_ray.documents(first).stat().st_mtime_ns
        resumed = [summary["part"] for summary in run_parts(config, on_ray) if summary.get("resumed")]
        assert first in resumed and len(resumed) < 25
        assert on_ray.documents(first).stat().st_mtime_ns == made
        self.assert_same_parts(lines, on_ray, tmp_path)

    def test_a_source_that_goes_away_is_the_error_it_is_locally(
        self, lines: Path, tmp_path: Path, running_ray: Path
    ) -> None:
        folders = self.folders(tmp_path / "parts")

        def fails(**changes: object) -> PocketPhiError:
            gone = CorpusConfig(inputs=(str(lines), str(tmp_path / "gone.jsonl")), **changes)  # type: ignore[arg-type]
            with pytest.raises(UserError, match="no such file") as caught:
                list(run_parts(gone, folders))
            return caught.value

        on_ray, here = fails(engine="ray"), fails(workers=1)
        assert type(on_ray) is type(here)
        assert (on_ray.message, on_ray.hint) == (here.message, here.hint)
