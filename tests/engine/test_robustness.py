"""Hostile files and long use: every damaged file is refused with a clear error or loads, and memory stays flat."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pocketphi import engine

from .tiny import llama_gguf, llama_model, random_ids

COUNT = int(os.environ.get("POCKETPHI_MUTATIONS", "160"))
"""Damaged copies for each of the two runtimes; the nightly length is 1000 and more."""

TURNS = int(os.environ.get("POCKETPHI_SOAK_TURNS", "200"))
"""Turns of the soak; the nightly length is 10000."""


def _damaged(source: Path, backend: str, count: int, seed: int, folder: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.engine.mutations", str(source), backend, str(count), str(seed)]
    done = subprocess.run(
        [*command, str(folder)], capture_output=True, text=True, timeout=3600, cwd=Path(__file__).parents[2]
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, (
        f"the process ended with {done.returncode} after {len(found)} copies; last {found[-1:]}: {done.stderr[-500:]}"
    )
    return found


def test_damaged_files_are_refused_or_load(backend_name: Any, tmp_path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"t{i}" for i in range(317))]
    files = [
        llama_gguf(tmp_path / "a.gguf", llama_model(num_hidden_layers=1), kind="Q4_0", tokens=tokens),
        llama_gguf(tmp_path / "b.gguf", llama_model(num_hidden_layers=1), kind="Q8_0"),
    ]
    found = []
    for n, file in enumerate(files):
        found += _damaged(file, backend_name, COUNT // 2, seed=n, folder=tmp_path)
    ends = Counter(f["end"] for f in found)
    defects = [f for f in found if f["end"].startswith("!")]
    assert not defects, (len(defects), defects[:5])
    assert len(found) == 2 * (COUNT // 2)
    # The copies are damaged where it matters, and refusals say something.
    assert sum(ends[e] for e in ends if e != "loaded") > len(found) / 4, ends
    assert all(len(f["message"]) > 15 for f in found if f["end"] != "loaded")


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to see memory")
def test_soak_of_sessions_keeps_memory_flat(chat_model: engine.Engine, tmp_path: Path) -> None:
    """Turns of every kind: alone, in batches, with lookup, cancelled, saved and restored."""
    file = tmp_path / "session"

    def turns(count: int) -> None:
        for n in range(count):
            ids = random_ids(5 + n % 40, seed=n % 17)
            sequence = chat_model.new_sequence()
            stream = chat_model.generate(
                ids, max_new_tokens=4, stop_ids=[], temperature=n % 2, seed=n, sequence=sequence, stream=True
            )
            if n % 5 == 0:
                next(iter(stream), None)
                stream.stop()
            stream.finish()
            if n % 10 == 1:
                sequence.save(file, model="m")
                sequence.load(file, model="m", limit=256)
            sequence.close()
            if n % 20 == 2:
                chat_model.generate_batch([ids, ids[:3]], max_new_tokens=3, stop_ids=[])

    turns(max(100, TURNS // 10))
    before = _resident_bytes()
    turns(TURNS)
    grown = _resident_bytes() - before
    assert grown < 6 << 20, f"{grown} bytes more after {TURNS} turns"
