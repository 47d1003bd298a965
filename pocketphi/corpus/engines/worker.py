"""A worker process: reads chunks on stdin, writes part files, reports on stdout.

Started as `python -m pocketphi.corpus.engines.worker`. Its own process, so that a crash or a call
that never returns costs one document, not the run.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from pathlib import Path
from typing import Any

from pocketphi.core import config as configuration
from pocketphi.core.errors import PocketPhiError
from pocketphi.corpus.config import CorpusConfig
from pocketphi.corpus.engines.wire import describe, read_frame, unpack, write_frame
from pocketphi.corpus.parts import Chunk, Folders, PartWriter


def main() -> None:
    """Serve chunks until stdin ends."""
    requests = sys.stdin.buffer
    # Whatever a library prints must not mix with the frames.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    first = read_frame(requests)
    if first is None:
        return
    header, _ = first
    die_with_parent()
    config = configuration.parse(CorpusConfig, header["config"])
    limit_memory(config.worker_memory_bytes)
    writer = PartWriter(config, Folders(Path(header["final"]), Path(header["scratch"])))
    write_frame(replies, {"ready": True})
    while (frame := read_frame(requests)) is not None:
        task, blobs = frame
        chunk = Chunk(task["part"], task["source"], unpack(task["raws"], blobs))
        skip = {int(index): reason for index, reason in task["skip"].items()}
        try:
            reply: dict[str, Any] = writer.write(
                chunk, lambda index: write_frame(replies, {"at": index}), skip
            )
        except (PocketPhiError, OSError) as error:
            reply = describe(error)
        write_frame(replies, reply)


def die_with_parent() -> None:
    """Ask the kernel to end this process when the pool's process is killed (Linux)."""
    if sys.platform == "linux":
        import ctypes

        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL


def limit_memory(num_bytes: int) -> None:
    """Make allocations past `num_bytes` beyond what is mapped now fail with MemoryError."""
    try:
        with open("/proc/self/statm") as file:
            mapped = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + num_bytes, resource.RLIM_INFINITY))
    except (OSError, ValueError):  # other systems: the timeout still holds
        pass


if __name__ == "__main__":
    main()
