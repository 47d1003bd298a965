"""Engines: who computes the parts. The output does not depend on the engine or the number of workers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pocketphi.corpus.config import CorpusConfig
    from pocketphi.corpus.parts import Folders


def run_parts(config: CorpusConfig, folders: Folders) -> Iterator[dict[str, Any]]:
    """Have all sources read and processed by `config.engine`.

    Yields the summary of every part, in the order in which they end: those of parts that an earlier run
    finished say `resumed`. Raises what reading a source raises, DataError when a worker cannot be kept alive.
    """
    if config.engine == "ray":
        from pocketphi.corpus.engines import ray

        return ray.run_parts(config, folders)
    from pocketphi.corpus.engines import local
    from pocketphi.corpus.parts import open_chunks

    return local.run_chunks(config, folders, open_chunks(config, folders))
