"""The local engine: a pool of worker processes that survive, and outlive, hostile documents."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pocketphi
from pocketphi.core.config import to_tree
from pocketphi.core.errors import DataError
from pocketphi.corpus.config import CorpusConfig
from pocketphi.corpus.engines.wire import pack, raise_reply, read_frame, write_frame
from pocketphi.corpus.parts import Chunk, Folders

_START_TIMEOUT_S = 120.0
_SCORING_TIMEOUT_S = 600.0
_PATIENCE = 30  # wall seconds that count like one CPU second
_MAX_DEATHS_WITHOUT_CULPRIT = 3


def num_workers(config: CorpusConfig) -> int:
    """Return the number of processes: what is configured, or one per usable core."""
    if config.workers:
        return config.workers
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    ready: bool = False
    chunk: Chunk | None = None
    at: int | None = None  # number of the record it works on
    since: float = field(default_factory=time.monotonic)  # last sign of life
    cpu_s: float = 0.0  # its CPU time then


@dataclass
class _Trouble:
    """What is known of a chunk on which workers died: records to leave out, and how often it happened.

    killed: records at which a worker was killed from outside, once.
    """

    skip: dict[int, str] = field(default_factory=dict)
    killed: set[int] = field(default_factory=set)
    blind: int = 0


WORKER_COMMAND = (sys.executable, "-m", "pocketphi.corpus.engines.worker")


def run_chunks(
    config: CorpusConfig,
    folders: Folders,
    chunks: Iterable[Chunk],
    command: Sequence[str] = WORKER_COMMAND,
) -> Iterator[dict[str, Any]]:
    """Have all chunks processed; yields the summaries of parts in the order in which they end.

    Raises DataError when workers die again and again without a document at fault.
    """
    pool = Pool(config, folders, command)
    try:
        yield from pool.run(iter(chunks))
    finally:
        pool.close()


class Pool:
    """Worker processes that live as long as the pool; `run` may be called again and again."""

    def __init__(self, config: CorpusConfig, folders: Folders, command: Sequence[str]) -> None:
        self.config, self.folders, self.command = config, folders, command
        self.size = num_workers(config)
        self.workers: list[_Worker] = []
        self.selector = selectors.DefaultSelector()
        self.trouble: dict[int, _Trouble] = {}

    def run(self, chunks: Iterator[Chunk]) -> Iterator[dict[str, Any]]:
        again: list[Chunk] = []  # of workers that died
        exhausted = False
        while True:
            # Only as many workers as there are chunks to give out.
            while not exhausted or again:
                worker = next((w for w in self.workers if w.ready and w.chunk is None), None)
                if worker is None:
                    if len(self.workers) < self.size:
                        self._start()
                        continue
                    break
                chunk = again.pop() if again else next(chunks, None)
                if chunk is None:
                    exhausted = True
                    break
                if chunk.finished is not None:
                    yield chunk.finished
                    continue
                lost = self._give(worker, chunk)
                if lost is not None:
                    again.append(lost)
            if exhausted and not again and all(w.chunk is None for w in self.workers):
                return
            summary, lost = self._wait()
            if lost is not None:
                again.append(lost)
            if summary is not None:
                yield summary

    def close(self) -> None:
        for worker in self.workers:
            worker.process.kill()
        for worker in self.workers:
            self._reap(worker)
        self.selector.close()

    def _start(self) -> None:
        environment = dict(os.environ)
        # The package may be run from its folder: the child must find the same one.
        root = str(Path(pocketphi.__file__).resolve().parents[1])
        environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [environment.get("PYTHONPATH")])])
        # One worker is one core: libraries must not start threads of their own.
        environment.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", ARROW_DEFAULT_MEMORY_POOL="system")
        process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        worker = _Worker(process)
        self.workers.append(worker)
        assert process.stdout is not None
        self.selector.register(process.stdout, selectors.EVENT_READ, worker)
        header = {
            "config": to_tree(self.config),
            "final": str(self.folders.final),
            "scratch": str(self.folders.scratch),
        }
        self._send(worker, header, [])

    def _give(self, worker: _Worker, chunk: Chunk) -> Chunk | None:
        """Send a chunk; returns it when the worker is gone already."""
        rows, blobs = pack(chunk.raws)
        trouble = self.trouble.get(chunk.part, _Trouble())
        worker.chunk, worker.at, worker.since = chunk, None, time.monotonic()
        worker.cpu_s = _cpu_s(worker.process.pid)
        header = {"part": chunk.part, "source": chunk.source, "raws": rows, "skip": trouble.skip}
        if self._send(worker, header, blobs):
            return None
        return self._bury(worker, "ended")

    def _send(self, worker: _Worker, header: dict[str, Any], blobs: list[bytes]) -> bool:
        try:
            assert worker.process.stdin is not None
            write_frame(worker.process.stdin, header, blobs)
        except BrokenPipeError:
            return False
        return True

    def _wait(self) -> tuple[dict[str, Any] | None, Chunk | None]:
        """Wait for one message or timeout; returns `(summary, chunk to give out again)`."""
        for key, _ in self.selector.select(timeout=1.0):
            worker: _Worker = key.data
            assert worker.process.stdout is not None
            # Unbuffered: a frame left in a buffer would never wake the selector.
            frame = read_frame(worker.process.stdout.raw)  # type: ignore[attr-defined]
            if frame is None:
                return None, self._bury(worker, "ended")
            reply, _ = frame
            worker.since, worker.cpu_s = time.monotonic(), _cpu_s(worker.process.pid)
            if "ready" in reply:
                worker.ready = True
            elif "at" in reply:
                worker.at = reply["at"]
            elif "error" in reply:
                raise_reply(reply)
            else:
                worker.chunk = None
                self.trouble.pop(reply["part"], None)
                return reply, None
        for worker in self.workers:
            limit = self._limit(worker)
            if (worker.chunk is not None or not worker.ready) and self._spent_s(worker) > limit:
                worker.process.kill()
                return None, self._bury(worker, f"took longer than {limit:g} s and was killed")
        return None, None

    def _spent_s(self, worker: _Worker) -> float:
        """CPU seconds since the last sign of life; of a worker that does not even compute, a part of the wall's."""
        wall = time.monotonic() - worker.since
        return max(_cpu_s(worker.process.pid) - worker.cpu_s, wall / _PATIENCE)

    def _limit(self, worker: _Worker) -> float:
        if not worker.ready:
            return _START_TIMEOUT_S
        if worker.chunk is None or worker.at is None or worker.at >= len(worker.chunk.raws):
            return _SCORING_TIMEOUT_S
        # The worker cuts itself off after document_timeout_s unless it is stuck inside a C library.
        return 2 * self.config.document_timeout_s

    def _bury(self, worker: _Worker, how: str) -> Chunk | None:
        """Remove a dead worker; returns its chunk, with the record at fault marked to be left out."""
        code = self._reap(worker)
        self.workers.remove(worker)
        if not worker.ready:
            raise DataError(
                f"a worker process ended while starting (exit code {code})", hint="its own message is above"
            )
        chunk = worker.chunk
        if chunk is None:
            return None
        from_outside = how == "ended" and code == -signal.SIGKILL
        if how == "ended":
            how = (
                f"made its process end (signal {-code})"
                if code < 0
                else f"made its process end (code {code})"
            )
        trouble = self.trouble.setdefault(chunk.part, _Trouble())
        if worker.at is not None and worker.at < len(chunk.raws):
            # SIGKILL that we did not send comes from outside, where it strikes by chance: once is no proof.
            if from_outside and worker.at not in trouble.killed:
                trouble.killed.add(worker.at)
            else:
                trouble.skip[worker.at] = how
            return chunk
        trouble.blind += 1
        if trouble.blind >= _MAX_DEATHS_WITHOUT_CULPRIT:
            first, last = chunk.raws[0].where, chunk.raws[-1].where
            raise DataError(
                f"records {first} to {last}: {how}, {trouble.blind} times, outside any one document",
                hint="a smaller chunk_documents (64) or fewer workers may help",
            )
        return chunk

    def _reap(self, worker: _Worker) -> int:
        assert worker.process.stdout is not None and worker.process.stdin is not None
        self.selector.unregister(worker.process.stdout)
        with contextlib.suppress(BrokenPipeError):
            worker.process.stdin.close()
        worker.process.stdout.close()
        return worker.process.wait()


def _cpu_s(pid: int) -> float:
    """CPU time of a process so far; 0 where the system does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return 0.0
