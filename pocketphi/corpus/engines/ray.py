"""The Ray engine: the local pool's workers, one per CPU of a cluster, fed by Ray Data.

A dataset of one row per chunk is read by one task, one chunk after the other, and mapped by a pool of actors
to rows that hold the summaries of the parts. No document passes through the driver, and of the input only
what the actors have in hand or waiting is in memory: Ray Data stops the reader when its object store is used up
to a limit. Each actor drives one worker process of `engines.local`, so that a document that crashes, hangs or
fills memory costs what it costs there, and the parts are the same bytes.

Reader and actors open the inputs and write the parts themselves: on more than one machine both lie on a shared
file system. A chunk whose actor is lost with its machine is given to another one. A reader that is lost reads
again from the start; Ray takes the rows it knows for read, which is right since row k is always part k.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import uuid
import warnings
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pyarrow

import pocketphi
from pocketphi.core import config as configuration
from pocketphi.core.config import to_tree
from pocketphi.core.errors import DataError, PocketPhiError, UserError
from pocketphi.corpus.config import PYTHON_DOCS, CorpusConfig
from pocketphi.corpus.engines import local
from pocketphi.corpus.engines.wire import describe, pack, raise_reply, unpack
from pocketphi.corpus.parts import Chunk, Folders, open_chunks

_MAX_LOSSES = 3
_START_TRIES = 3  # of Ray on this machine: on a busy one its processes may come too late
_QUEUED = 2  # chunks per actor: one at work, one on its way
_STORED = 6  # chunks per actor that the object store may hold: Ray Data shares them out among its steps
_ROW = pyarrow.schema(
    [("header", pyarrow.large_string()), ("blobs", pyarrow.large_list(pyarrow.large_binary()))]
)


@dataclasses.dataclass(frozen=True)
class Job:
    """What reader and actors are told; paths are absolute, since their working folder is Ray's."""

    tree: dict[str, Any]  # of the CorpusConfig
    final: str
    scratch: str
    run: str  # names this run among those that a kill ended

    @property
    def config(self) -> CorpusConfig:
        return configuration.parse(CorpusConfig, self.tree)

    @property
    def folders(self) -> Folders:
        return Folders(Path(self.final), Path(self.scratch))

    def tries(self, name: str) -> Path:
        """A file with one byte for every time that `name` was begun: a process that is lost cannot count."""
        return Path(self.scratch, f"tries-{self.run}-{name}")

    def begin(self, name: str) -> bool:
        """Count a try; returns whether there were few enough. Ray itself would try for ever."""
        with open(self.tries(name), "ab") as file:
            file.write(b".")
            return file.tell() <= _MAX_LOSSES


def read_rows(job: Job) -> Iterator[pyarrow.Table]:
    """Yield one row per chunk, then one with their number; an error of a reader is the last row instead.

    Ray passes over as many rows of a second try as it had of the first, errors among them: that a try
    did not come to its end shows in the number that is missing.
    """
    number = 0
    try:
        if not job.begin("reader"):
            return
        for chunk in open_chunks(job.config, job.folders):
            number += 1
            if chunk.finished is not None:
                yield _row({"reply": chunk.finished})
            else:
                rows, blobs = pack(chunk.raws)
                yield _row({"part": chunk.part, "source": chunk.source, "raws": rows}, blobs)
        yield _row({"reply": {"num_parts": number}})
    except (PocketPhiError, OSError) as error:
        yield _row({"reply": describe(error)})


def _row(header: dict[str, Any], blobs: list[bytes] | None = None) -> pyarrow.Table:
    return pyarrow.table({"header": [json.dumps(header)], "blobs": [blobs or []]}, schema=_ROW)


class PartMaker:
    """Lives in a Ray actor; owns one worker process."""

    def __init__(self, job: Job) -> None:
        self.job = job
        config = dataclasses.replace(job.config, workers=1)
        self.pool = local.Pool(config, job.folders, local.WORKER_COMMAND)

    def __call__(self, row: pyarrow.Table) -> pyarrow.Table:
        """Make the part of one row of `read_rows`; returns its summary, or what went wrong, as `reply`."""
        task = json.loads(row.column("header")[0].as_py())
        reply = task.get("reply")
        if reply is None:
            try:
                blobs = row.column("blobs")[0].as_py()
                reply = self._make(Chunk(task["part"], task["source"], unpack(task["raws"], blobs)))
            except (PocketPhiError, OSError) as error:
                reply = describe(error)
        return pyarrow.table({"reply": [json.dumps(reply)]})

    def _make(self, chunk: Chunk) -> dict[str, Any]:
        if not self.job.begin(str(chunk.part)):
            raise DataError(
                f"records {chunk.raws[0].where} to {chunk.raws[-1].where}: "
                f"the process that had them was lost {_MAX_LOSSES} times",
                hint="Ray's logs say why; a smaller chunk_documents (64) may help",
            )
        (summary,) = self.pool.run(iter([chunk]))
        self.job.tries(str(chunk.part)).unlink(missing_ok=True)
        return summary


def run_parts(config: CorpusConfig, folders: Folders) -> Iterator[dict[str, Any]]:
    """Have all sources read and processed on a Ray cluster; yields summaries as `engines.run_parts` says.

    Connects to `config.ray_address`, or starts Ray on this machine. Raises UserError when Ray is not
    installed, cannot be started or the address does not answer, DataError when a chunk takes down three
    actors or Ray itself goes away.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UserError(
            f"engine 'ray' needs the package ray with its data library: {error}",
            hint="pip install 'pocketphi[ray]'",
        ) from None
    ours = not ray.is_initialized()
    if ours:
        _connect(ray, config)
    try:
        yield from _run(ray, config, folders)
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


def _run(ray: Any, config: CorpusConfig, folders: Folders) -> Iterator[dict[str, Any]]:
    job = Job(
        to_tree(_absolute(config)),
        str(folders.final.resolve()),
        str(folders.scratch.resolve()),
        uuid.uuid4().hex,
    )
    count = config.workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    parts = 0
    expected: int | None = None
    with _quiet(), contextlib.closing(_replies(ray, config, job, count)) as replies:
        for reply in replies:
            if "error" in reply:
                raise_reply(reply)
            if "num_parts" in reply:
                expected = reply["num_parts"]
                continue
            parts += 1
            yield reply
    if expected is None:
        raise DataError(
            f"the process that reads the inputs was lost after {parts} parts, {_MAX_LOSSES} tries at most",
            hint="set engine to local to see why; the parts that are finished are not made again",
        )
    if parts != expected:
        raise DataError(f"Ray gave back {parts} of {expected} parts", hint="run again: only the rest is made")


def _replies(ray: Any, config: CorpusConfig, job: Job, count: int) -> Generator[dict[str, Any], None, None]:
    """Yield what `count` PartMakers answer to the rows of `read_rows`."""
    data = ray.data
    # The reader waits most of the time: it takes no CPU from the actors.
    rows = data.read_datasource(_datasource(data, job), override_num_blocks=1, num_cpus=0)
    context = rows.context
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = 1  # a row is a block: it goes on as soon as it is read
    context.max_errored_blocks = 0
    context.execution_no_progress_timeout_s = -1  # the pools know better how long a document may take
    limit = data.ExecutionResources.for_limits(object_store_memory=_STORED * count * config.chunk_bytes)
    context.execution_options.resource_limits = limit
    replies = rows.map_batches(
        PartMaker,
        fn_constructor_args=(job,),
        batch_size=1,
        batch_format="pyarrow",
        zero_copy_batch=True,
        compute=data.ActorPoolStrategy(size=count, max_tasks_in_flight_per_actor=_QUEUED),
        num_cpus=1,
    )
    try:
        for batch in replies.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield from map(json.loads, batch.column("reply").to_pylist())
    except ray.exceptions.RayTaskError:
        raise  # an error in our code: its traceback helps
    except ray.exceptions.RayError as error:
        raise DataError(
            f"Ray gave up: {error}", hint="run again: the parts that are finished are not made again"
        ) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what Ray Data says of its work; what matters comes as an exception."""
    logger = logging.getLogger("ray.data")
    level = logger.level
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"ray\.data\.")
        logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logger.setLevel(level)


def _datasource(data: Any, job: Job) -> Any:
    """Return a ray.data.Datasource of one task, which runs `read_rows`."""

    class Chunks(data.Datasource):
        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, parallelism: int, *arguments: Any, **settings: Any) -> list[Any]:
            unknown = data.block.BlockMetadata(
                num_rows=None, size_bytes=None, input_files=None, exec_stats=None
            )
            return [data.ReadTask(functools.partial(read_rows, job), unknown, schema=_ROW)]

    return Chunks()


def _absolute(config: CorpusConfig) -> CorpusConfig:
    """Return the configuration with absolute paths and the same names of sources."""

    def absolute(path: str) -> str:
        if path == PYTHON_DOCS:
            return path
        if path.startswith("hf:"):
            name = path.removeprefix("hf:")
            folder = Path(name.partition("@")[0].partition("#")[0])
            return f"hf:{os.path.abspath(name)}" if folder.is_dir() else path
        return os.path.abspath(path)

    return dataclasses.replace(
        config,
        inputs=tuple(dataclasses.replace(source, path=absolute(source.path)) for source in config.sources()),
        url_deny=tuple(os.path.abspath(path) for path in config.url_deny),
        scorer=config.scorer and os.path.abspath(config.scorer),
    )
