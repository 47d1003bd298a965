"""Engines: who computes the parts. The output does not depend on the engine or the number of workers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pocketphi.corpus.config import CorpusConfig
    from pocketphi.corpus.parts import Chunk, Folders


def run_chunks(config: CorpusConfig, folders: Folders, chunks: Iterable[Chunk]) -> Iterator[dict[str, Any]]:
    """Have all chunks processed by `config.engine`; yields the summaries of parts in the order in which they end."""
    if config.engine == "ray":
        from pocketphi.corpus.engines import ray

        return ray.run_chunks(config, folders, chunks)
    from pocketphi.corpus.engines import local

    return local.run_chunks(config, folders, chunks)
