"""Both engines of the corpus on inputs of growing size: same files, wall time, and memory that does not grow.

    python benchmarks/corpus_engines.py --documents 20000 200000 [--workers 2] [--chunk-bytes 33554432]

The inputs are JSON lines of made-up text. Every run is a process of its own; beside it, the memory of all its
processes is read ten times a second. Prints one JSON object per run: the highest anonymous memory of one
process of each kind in MB, and the highest shared memory of one process: the part of Ray's object store that
has been used, as the reader fills all of it. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from corpus_kills import paragraph, start

_KINDS = {  # by a piece of the command line
    "ray::Read": "reader",
    "ray::MapWorker": "actor",
    "corpus.engines.worker": "worker",
}


def write_lines(path: Path, number: int, sentences: int) -> None:
    with open(path, "w") as file:
        for index in range(number):
            file.write(json.dumps({"id": str(index), "text": paragraph(index, sentences)}) + "\n")


def processes(root: int) -> dict[int, str]:
    """Return the kinds of the process `root` and of those it started, by id."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found = {root: "driver"}
    for process in parents:
        above = process
        while above in parents and above != root:
            above = parents[above]
        if above == root and process != root:
            with contextlib.suppress(OSError):
                command = (Path("/proc") / str(process) / "cmdline").read_bytes().decode(errors="replace")
                found[process] = next((kind for piece, kind in _KINDS.items() if piece in command), "other")
    return found


def memory_mb(process: int, field: str) -> float:
    with contextlib.suppress(OSError):
        for line in (Path("/proc") / str(process) / "status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) / 1024
    return 0.0


def measure(config: dict, out: Path) -> dict:
    """Run one corpus; return its checksum, wall seconds and peaks by kind of process."""
    started = time.monotonic()
    run = start(config, out, subprocess.PIPE, start_new_session=True)
    peaks: dict[str, float] = {}
    try:
        while run.poll() is None:
            for process, kind in processes(run.pid).items():
                peaks[kind] = max(peaks.get(kind, 0.0), memory_mb(process, "RssAnon"))
                peaks["shared"] = max(peaks.get("shared", 0.0), memory_mb(process, "RssShmem"))
            time.sleep(0.1)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
    if run.returncode:
        sys.exit(f"the run ended with code {run.returncode}")
    assert run.stdout is not None
    checksum, documents = run.stdout.read().decode().split()
    return {
        "documents": int(documents),
        "seconds": round(time.monotonic() - started, 1),
        "checksum": checksum,
        "peak_mb": {kind: round(peak) for kind, peak in sorted(peaks.items()) if kind != "other"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, nargs="+", default=[20_000, 200_000])
    parser.add_argument("--sentences", type=int, default=12, help="of a document, 113 bytes each")
    parser.add_argument("--engines", nargs="+", choices=["local", "ray"], default=["local", "ray"])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--chunk-bytes", type=int, default=32 << 20)
    options = parser.parse_args()
    equal = True
    for number in options.documents:
        with tempfile.TemporaryDirectory() as name:
            lines = Path(name, "lines.jsonl")
            write_lines(lines, number, options.sentences)
            checksums = set()
            for engine in options.engines:
                config = {
                    "inputs": [str(lines)],
                    "engine": engine,
                    "workers": options.workers,
                    "chunk_bytes": options.chunk_bytes,
                    "dedup_memory_bytes": 16 << 20,
                }
                found = measure(config, Path(name, engine))
                checksums.add(found.pop("checksum"))
                print(json.dumps({"engine": engine, **found}), flush=True)
            if len(checksums) > 1:
                equal = False
                print(f"{number} documents: the engines' files differ", file=sys.stderr)
    print(json.dumps({"same_checksums": equal}))
    sys.exit(0 if equal else 1)


if __name__ == "__main__":
    main()
