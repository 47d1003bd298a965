"""Bits per byte: how well a model predicts text, comparable across tokenizers.

Each document is read alone, from a start token on, in windows of the model's context; a window after
the first starts with the last token of the one before. lm-evaluation-harness does the same but for a
document's last window, which it fills up with context to the left: its figures of long documents are a
little lower.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pocketphi.core import artifact
from pocketphi.core.artifact import Artifact
from pocketphi.core.errors import DataError
from pocketphi.evals import prompts
from pocketphi.evals.backends.base import Scorer
from pocketphi.evals.data import DataFile, read, text_sha256

WINDOW_RULE = "windows of the whole context, one token of overlap"


def heldout_splits(shards: Artifact) -> list[str]:
    """Names of the held-out splits of a shards artifact ("heldout-web")."""
    return sorted(
        n.removesuffix(".bin")
        for n in shards.manifest["files"]
        if n.startswith("heldout") and n.endswith(".bin")
    )


def heldout_documents(shards: Artifact, split: str, scorer: Scorer) -> Iterator[tuple[str, str]]:
    """Yield (id, text) of a held-out split, decoded with the tokenizer that wrote it.

    Texts and not ids are handed on, so that models with another tokenizer are measured on the same
    bytes. Raises DataError when the tokenizer that wrote the shard cannot be found.
    """
    index = json.loads(shards.file(f"{split}.json").read_text(encoding="utf-8"))
    ids_T = np.memmap(shards.file(f"{split}.bin"), dtype=np.dtype(index["dtype"]).newbyteorder("<"), mode="r")
    if len(ids_T) != index["num_tokens"]:
        raise DataError(
            f"{shards.path}/{split}.bin: {len(ids_T)} tokens, the index says {index['num_tokens']}"
        )
    tokenizer = _writer_of(shards, index["tokenizer_sha256"], scorer)
    starts = index.get("document_starts")
    if starts is None:
        starts = np.fromfile(shards.file(f"{split}.idx"), dtype="<u8").tolist()
    ends = [*starts[1:], len(ids_T)]
    eos = tokenizer.eos_id
    for number, (start, end) in enumerate(zip(starts, ends)):
        ids = [int(i) for i in ids_T[start:end]]
        if ids and ids[-1] == eos:
            ids = ids[:-1]
        if ids:
            yield f"{split}/{number}", tokenizer.decode(ids)


def file_documents(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (id, text) of a local text file: the whole of a plain file, each row's `text` of JSON Lines."""
    if ".jsonl" in path.name:
        for number, row in enumerate(read(DataFile(path, ""), ("text",))):
            yield f"{path.name}/{row.get('id', number)}", row["text"]
        return
    try:
        yield path.name, path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {error}") from None


def document_record(scorer: Scorer, id_: str, text: str) -> dict[str, Any]:
    """Score one document: nats, tokens and bytes."""
    ids = [int(i) for i in scorer.tokenizer.encode(text)]
    lead = list(scorer.start_ids) or [prompts.lead_id(scorer.tokenizer, end_first=True)]
    total, counted = 0.0, 0
    for window in windows([*lead, *ids], scorer.max_tokens):
        logprobs = scorer.rolling(window)
        total -= float(logprobs.sum())
        counted += len(logprobs)
    return {
        "id": id_,
        "nll": round(total, 5),
        "num_tokens": counted,
        "num_bytes": len(text.encode("utf-8", "surrogatepass")),
        "text_sha256": text_sha256(text)[:16],
    }


def windows(ids: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Cut ids so that every token but the first is predicted once, each window reading <= size tokens."""
    for start in range(0, len(ids) - 1, size):
        yield ids[start : start + size + 1]


def lead_rule(scorer: Scorer) -> str:
    """What stands before the first token of a document, in words."""
    return "start token" if scorer.start_ids else "end-of-text token, as between documents in training"


def _writer_of(shards: Artifact, sha256: str, scorer: Scorer) -> Any:
    if getattr(scorer.tokenizer, "sha256", None) == sha256:
        return scorer.tokenizer
    from pocketphi import tokenizer as tokenizers

    for parent in artifact.lineage(shards):
        if parent.kind == "tokenizer":
            found = tokenizers.load(parent.path)
            if found.sha256 == sha256:
                return found
    raise DataError(
        f"{shards.path}: the tokenizer that wrote these shards ({sha256[:12]}) is not at hand",
        hint="keep its tokenizer artifact beside the shards, or evaluate a model that carries it",
    )
