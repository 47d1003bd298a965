"""From an answer back to the documents: the chain of artifacts, and the training text nearest to it.

The chain (model file, checkpoint, shards, corpus) is exact: every artifact names its parents by
checksum. Which document an answer owes its words to nobody can say of a neural network; what is shown
is the training documents that share the most uncommon word triples with the answer, with the verdicts
that let them in.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from pocketphi.core.artifact import Artifact
from pocketphi.report.gather import parts

_WORD = re.compile(r"[a-z0-9']+")
_EXCERPT_CHARS = 280
_NEAREST = 3


def chain(artifacts: Sequence[Artifact]) -> list[dict[str, Any]]:
    """One row per artifact, nearest to the answer first: kind, checksum, parents, a few counts."""
    rows = []
    for found in artifacts:
        counts = {k: v for k, v in found.counts.items() if isinstance(v, (int, float, str))}
        rows.append(
            {
                "kind": found.kind,
                "name": found.path.name,
                "checksum": found.checksum,
                "parents": [p["checksum"] for p in found.parents],
                "counts": dict(list(counts.items())[:6]),
                "code_version": found.manifest.get("code_version"),
            }
        )
    return rows


def nearest_documents(corpus: Artifact, answers: Sequence[str], max_bytes: int) -> dict[str, Any]:
    """For each answer the kept documents that share the most uncommon word triples with it.

    Returns {"searched_documents", "searched_bytes", "complete", "nearest": [[{document}, ...], ...]}.
    A triple counts 1 / (1 + log of the number of documents that hold it).
    """
    import pyarrow.parquet

    wanted = [triples(a) for a in answers]
    union = set().union(*wanted) if wanted else set()
    holders: Counter[tuple[str, str, str]] = Counter()
    hits: list[tuple[int, int, frozenset[tuple[str, str, str]]]] = []
    searched_bytes = searched = 0
    complete = True
    files = list(parts(corpus))
    for number, (documents, verdicts) in enumerate(files):
        if not union:
            break
        if searched_bytes >= max_bytes:
            complete = False
            break
        texts = pyarrow.parquet.read_table(documents, columns=["text"])["text"]
        keep = pyarrow.parquet.read_table(verdicts, columns=["keep"])["keep"].to_pylist()
        for row, kept in enumerate(keep):
            if not kept:
                continue
            text = texts[row].as_py() or ""
            searched += 1
            searched_bytes += len(text)
            shared = frozenset(triples(text) & union)
            if shared:
                holders.update(shared)
                hits.append((number, row, shared))
    nearest = []
    for mine in wanted:
        scored: list[tuple[float, int, int, frozenset[tuple[str, str, str]]]] = []
        for number, row, shared in hits:
            both = shared & mine
            if both:
                scored.append((sum(1 / (1 + math.log(holders[t])) for t in both), number, row, both))
        scored.sort(key=lambda s: (-s[0], s[1], s[2]))
        nearest.append([_document(files, *s) for s in scored[:_NEAREST]])
    return {
        "searched_documents": searched,
        "searched_bytes": searched_bytes,
        "complete": complete,
        "nearest": nearest,
    }


def triples(text: str) -> set[tuple[str, str, str]]:
    words = _WORD.findall(text.lower())
    return set(zip(words, words[1:], words[2:]))


def _document(
    files: list[Any], score: float, number: int, row: int, shared: frozenset[tuple[str, str, str]]
) -> dict[str, Any]:
    import pyarrow.parquet

    documents, verdicts = files[number]
    document = pyarrow.parquet.read_table(documents).slice(row, 1).to_pylist()[0]
    verdict = pyarrow.parquet.read_table(verdicts).slice(row, 1).to_pylist()[0]
    rules = [n.removesuffix(".keep") for n in verdict if n.endswith(".keep")]
    text = document["text"]
    phrase = max(shared, key=lambda t: (len(" ".join(t)), t))
    return {
        "id": document["id"],
        "source": document.get("source") or "",
        "license": document.get("license") or "",
        "url": document.get("url") or "",
        "score": round(score, 3),
        "shared_triples": len(shared),
        "phrase": " ".join(phrase),
        "excerpt": _excerpt(text, phrase),
        "educational_score": _rounded(verdict.get("educational.score")),
        "rules_passed": [r for r in rules if verdict[f"{r}.keep"]],
        "phases": [name for name in ("phase1", "phase2", "heldout") if verdict.get(name)],
    }


def _rounded(value: Any) -> float | None:
    return round(float(value), 3) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _excerpt(text: str, phrase: tuple[str, str, str]) -> str:
    """A piece of the text around the phrase, cut at word borders."""
    pattern = r"\W+".join(re.escape(w) for w in phrase)
    found = re.search(pattern, text, re.IGNORECASE)
    middle = found.start() if found else 0
    start = max(0, middle - _EXCERPT_CHARS // 2)
    piece = text[start : start + _EXCERPT_CHARS]
    piece = " ".join(piece.split())
    if start > 0:
        piece = "… " + piece.partition(" ")[2]
    if start + _EXCERPT_CHARS < len(text):
        piece = piece.rpartition(" ")[0] + " …"
    return piece
