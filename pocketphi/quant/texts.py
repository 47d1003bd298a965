"""Text for calibration and for the fidelity report, as windows of token ids."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from pocketphi.core import artifact
from pocketphi.core.artifact import Artifact
from pocketphi.core.errors import DataError
from pocketphi.tokenizer import Tokenizer

MIN_WINDOW = 16


def shards_of(checkpoint: Artifact | None) -> Artifact | None:
    """Return the token shards that a checkpoint was trained on, if they are still on disk."""
    if checkpoint is None:
        return None
    return next((a for a in artifact.lineage(checkpoint) if a.kind == "shards"), None)


def windows_from(
    source: Path, tokenizer: Tokenizer, num_tokens: int, size: int, *, heldout: bool
) -> tuple[list[list[int]], list[Path]]:
    """Return windows of `size` ids, about `num_tokens` in all, and the files that they came from.

    `source` is a shards folder (the last training phase, or with `heldout` the held-out splits), a
    .txt or .jsonl file, or a folder of them. Windows are spread evenly over the text. Where no piece of
    it fills a window, the windows are as long as the longest piece. Raises DataError when that is shorter
    than MIN_WINDOW tokens, which say nothing about a model.
    """
    if source.is_dir() and list(source.glob("*.bin")):
        streams, files = _shard_streams(source, tokenizer, heldout)
    else:
        streams, files = _text_streams(source, tokenizer, num_tokens)
    longest = max(map(len, streams))
    if longest < min(size, MIN_WINDOW):
        raise DataError(f"{source}: {longest} tokens of text, too few to measure on (at least {MIN_WINDOW})")
    size = min(size, longest)
    total = sum(len(s) // size for s in streams)
    wanted = max(1, min(total, num_tokens // size))
    chosen = {int(i * total / wanted) for i in range(wanted)}
    windows, number = [], 0
    for stream in streams:
        for start in range(0, len(stream) - size + 1, size):
            if number in chosen:
                windows.append([int(i) for i in stream[start : start + size]])
            number += 1
    return windows, files


def _shard_streams(folder: Path, tokenizer: Tokenizer, heldout: bool) -> tuple[list[Any], list[Path]]:
    from pocketphi.train import shards

    names = shards.split_names(folder)
    found = [n for n in names if n.startswith("heldout") == heldout]
    if not found:
        raise DataError(f"{folder}: no {'held-out' if heldout else 'training'} split among {names}")
    used = found if heldout else found[-1:]
    splits = [shards.open_split(folder, n, tokenizer_sha256=tokenizer.sha256) for n in used]
    return [s.tokens for s in splits], [s.path for s in splits]


def _text_streams(source: Path, tokenizer: Tokenizer, num_tokens: int) -> tuple[list[Any], list[Path]]:
    from pocketphi.tokenizer import training

    files = training.text_files(source)
    # Twice the characters that the windows are likely to need; the rest is never encoded.
    texts, _ = training.sample(lambda: training.file_texts(files), 10 * num_tokens, quiet=True)
    return [_joined(texts, tokenizer)], files


def _joined(texts: Iterable[str], tokenizer: Tokenizer) -> np.ndarray:
    """Encode documents one after another, each ended by the end-of-text token."""
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    parts: list[int] = []
    for text in texts:
        parts += tokenizer.encode(text)
        parts += end
    return np.array(parts, dtype=np.int64)
