"""What a corpus run will cost, before it starts."""

from __future__ import annotations

from typing import Any

from pocketphi.corpus import readers
from pocketphi.corpus.config import PYTHON_DOCS, CorpusConfig
from pocketphi.corpus.engines.local import num_workers

# Estimates, not measurements.
HTML_BYTES_PER_S = 8e6
TEXT_BYTES_PER_S = 3e6
_COMPRESSION = 4.0  # of text and pages under zstd and gzip
_PYTHON_DOCS_BYTES = 12e6
_WORKER_BYTES = 400 << 20
_DRIVER_BYTES = 300 << 20


def plan(config: CorpusConfig, inputs_plan: dict[str, Any] | None = None) -> dict[str, Any]:
    """Forecast wall time, memory, disk, documents' characters and tokens from the sizes of the files."""
    page_bytes = text_bytes = 0.0
    files = 0
    for source in config.sources():
        if source.path == PYTHON_DOCS:
            text_bytes += _PYTHON_DOCS_BYTES
            continue
        for path, name in readers.files_of(source):
            files += 1
            size = float(path.stat().st_size)
            if name.endswith(readers.COMPRESSIONS):
                size *= _COMPRESSION
            if readers.format_of(name) in ("page", "warc") or source.quality == "web":
                page_bytes += size
            else:
                text_bytes += size
    workers = num_workers(config)
    chars = 0.05 * page_bytes + text_bytes
    return {
        "wall_s": round(3 + (page_bytes / HTML_BYTES_PER_S + text_bytes / TEXT_BYTES_PER_S) / workers, 1),
        "peak_memory_bytes": _DRIVER_BYTES + workers * _WORKER_BYTES,
        "disk_bytes": round(0.45 * chars),
        "files": files,
        "input_bytes": round(page_bytes + text_bytes),
        "tokens": round(0.8 * chars / 4),
    }
