"""The Ray engine: the local pool's workers, one per CPU of a cluster.

Each Ray actor drives one worker process of `engines.local`, so that a document that crashes, hangs or
fills memory costs what it costs there, and the parts are the same bytes. Actors write their parts where
the driver reads them: on more than one machine the inputs and the output lie on a shared file system.
A chunk whose actor is lost with its machine is given to another one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pocketphi
from pocketphi.core import config as configuration
from pocketphi.core.config import to_tree
from pocketphi.core.errors import DataError, PocketPhiError, UserError
from pocketphi.corpus.config import CorpusConfig
from pocketphi.corpus.engines import local
from pocketphi.corpus.engines.wire import pack, unpack
from pocketphi.corpus.parts import Chunk, Folders

_MAX_LOSSES = 3
_START_TRIES = 3  # of Ray on this machine: on a busy one its processes may come too late
_QUEUED = 2  # chunks per actor: one at work, one on its way


class PartActor:
    """Lives in a Ray process; owns one worker process."""

    def __init__(self, tree: dict[str, Any], final: str, scratch: str) -> None:
        config = dataclasses.replace(configuration.parse(CorpusConfig, tree), workers=1)
        self.pool = local.Pool(config, Folders(Path(final), Path(scratch)), local.WORKER_COMMAND)

    def process(
        self, part: int, source: int, rows: list[dict[str, Any]], blobs: list[bytes]
    ) -> dict[str, Any]:
        """Make one part; returns its summary, or what went wrong as `error`."""
        try:
            (summary,) = self.pool.run(iter([Chunk(part, source, unpack(rows, blobs))]))
        except PocketPhiError as error:
            return {"part": part, "error": error.message, "hint": error.hint}
        except OSError as error:
            return {"part": part, "error": str(error), "errno": error.errno, "filename": error.filename}
        return summary


def run_chunks(config: CorpusConfig, folders: Folders, chunks: Iterable[Chunk]) -> Iterator[dict[str, Any]]:
    """Have all chunks processed on a Ray cluster; yields summaries as `engines.local.run_chunks` does.

    Connects to `config.ray_address`, or starts Ray on this machine. Raises UserError when Ray is not
    installed, cannot be started or the address does not answer, DataError when a chunk takes down three actors.
    """
    try:
        import ray
    except ImportError:
        raise UserError("engine 'ray' needs the package ray", hint="pip install 'pocketphi[ray]'") from None
    ours = not ray.is_initialized()
    if ours:
        _connect(ray, config)
    try:
        yield from _run(ray, config, folders, chunks)
    finally:
        if ours:
            ray.shutdown()


def _connect(ray: Any, config: CorpusConfig) -> None:
    root = str(Path(pocketphi.__file__).resolve().parents[1])
    settings: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": "error",
        "runtime_env": {"env_vars": {"PYTHONPATH": root}},
    }
    if config.ray_address:
        try:
            ray.init(address=config.ray_address, **settings)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f"no Ray cluster at {config.ray_address}: {error}") from None
        return
    # Ray reports its use to its makers unless told otherwise; documents are nobody's business.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    for attempt in range(_START_TRIES):
        try:
            ray.init(num_cpus=local.num_workers(config), include_dashboard=False, **settings)
            return
        except Exception as error:  # Ray waits 30 s for its own processes and then raises a bare Exception
            ray.shutdown()
            if attempt == _START_TRIES - 1:
                raise UserError(
                    f"Ray cannot be started on this machine: {error}",
                    hint="set engine to local: the output is the same",
                ) from None


def _run(
    ray: Any, config: CorpusConfig, folders: Folders, chunks: Iterable[Chunk]
) -> Iterator[dict[str, Any]]:
    count = config.workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    remote = ray.remote(num_cpus=1, max_restarts=-1)(PartActor)
    arguments = (to_tree(config), str(folders.final.resolve()), str(folders.scratch.resolve()))
    actors = [remote.remote(*arguments) for _ in range(count)]
    load = [0] * count
    running: dict[Any, tuple[int, Chunk]] = {}
    losses: dict[int, int] = {}

    def give(chunk: Chunk) -> None:
        actor = load.index(min(load))
        load[actor] += 1
        rows, blobs = pack(chunk.raws)
        running[actors[actor].process.remote(chunk.part, chunk.source, rows, blobs)] = (actor, chunk)

    waiting = iter(chunks)
    exhausted = False
    try:
        while True:
            while not exhausted and len(running) < _QUEUED * count:
                chunk = next(waiting, None)
                if chunk is None:
                    exhausted = True
                else:
                    give(chunk)
            if not running:
                return
            (done,), _ = ray.wait(list(running), num_returns=1)
            actor, chunk = running.pop(done)
            load[actor] -= 1
            try:
                summary = ray.get(done)
            except ray.exceptions.RayActorError as error:
                losses[chunk.part] = losses.get(chunk.part, 0) + 1
                if losses[chunk.part] >= _MAX_LOSSES:
                    raise DataError(
                        f"records {chunk.raws[0].where} to {chunk.raws[-1].where}: "
                        f"the process that had them was lost {_MAX_LOSSES} times: {error}"
                    ) from None
                give(chunk)
                continue
            if "error" in summary:
                local.raise_reply(summary)
            yield summary
    finally:
        for actor_handle in actors:
            with contextlib.suppress(Exception):  # the cluster may be gone: nothing is left to end
                ray.kill(actor_handle)
