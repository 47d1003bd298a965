"""Reading a published corpus: documents with their verdicts, by phase, and why a document was judged so."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.compute
import pyarrow.parquet

from pocketphi.core import artifact
from pocketphi.core.artifact import Artifact
from pocketphi.core.config import parse
from pocketphi.core.errors import DataError, UserError
from pocketphi.corpus.config import CorpusConfig
from pocketphi.corpus.document import COLUMNS
from pocketphi.corpus.rules import bounds_for, rules

_MIN_PREFIX = 4


def read(
    corpus: Artifact | Path | str,
    columns: Sequence[str] | None = None,
    keep: bool | None = True,
    phase: int | None = None,
    heldout: bool | None = None,
    batch_rows: int = 1024,
) -> Iterator[pyarrow.RecordBatch]:
    """Yield record batches of documents and verdict columns, in a fixed order.

    `keep` selects kept (True), rejected (False) or all (None) documents; `phase` (1 or 2) those of a
    training phase, which never holds held-out ones; `heldout` selects by that flag. `columns` names
    document columns (id, text, ...) and verdict columns; default: all document columns.
    """
    found = artifact.load(corpus, kind="corpus", verify=False)
    wanted = list(columns) if columns is not None else list(COLUMNS)
    for documents_path, verdicts_path in part_files(found):
        verdicts = pyarrow.parquet.read_table(verdicts_path)
        mask = _mask(verdicts, keep, phase, heldout)
        if not pyarrow.compute.any(mask).as_py():
            continue
        unknown = [c for c in wanted if c not in COLUMNS and c not in verdicts.column_names]
        if unknown:
            raise UserError(f"{found.path}: no column '{unknown[0]}' in documents or verdicts")
        of_documents = [c for c in wanted if c in COLUMNS]
        file = pyarrow.parquet.ParquetFile(documents_path)
        start = 0
        for batch in file.iter_batches(batch_size=batch_rows, columns=of_documents or ["id"]):
            rows = slice(start, start + batch.num_rows)
            start = rows.stop
            part = verdicts.slice(rows.start, batch.num_rows)
            table = pyarrow.table(
                {c: batch.column(c) if c in COLUMNS else part.column(c).combine_chunks() for c in wanted}
            )
            chosen = table.filter(mask.slice(rows.start, batch.num_rows))
            yield from chosen.combine_chunks().to_batches()


def _mask(verdicts: pyarrow.Table, keep: bool | None, phase: int | None, heldout: bool | None) -> Any:
    mask = pyarrow.array([True] * verdicts.num_rows, pyarrow.bool_())
    conditions = []
    if keep is not None:
        conditions.append((verdicts.column("keep"), keep))
    if phase is not None:
        if phase not in (1, 2):
            raise UserError(f"phases are 1 and 2, found {phase}")
        conditions.append((verdicts.column(f"phase{phase}"), True))
    if heldout is not None:
        conditions.append((verdicts.column("heldout"), heldout))
    for column, value in conditions:
        column = column.combine_chunks()
        mask = pyarrow.compute.and_(mask, column if value else pyarrow.compute.invert(column))
    return mask


def part_files(found: Artifact) -> list[tuple[Path, Path]]:
    """Return `(documents, verdicts)` of every part, in order."""
    names = sorted(name for name in found.manifest["files"] if name.startswith("documents/"))
    return [(found.path / name, found.path / name.replace("documents/", "verdicts/", 1)) for name in names]


def latest(runs: Path | str = "runs") -> Path:
    """Return the corpus under `runs` that was written last; UserError when there is none."""
    written: list[tuple[int, Path]] = []
    for manifest in (*Path(runs).glob("*/manifest.json"), *Path(runs).glob("*/*/manifest.json")):
        try:
            if json.loads(manifest.read_text(encoding="utf-8"))["kind"] == "corpus":
                written.append((manifest.stat().st_mtime_ns, manifest.parent))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not an artifact: whoever opens it says what is wrong with it
    if not written:
        raise UserError(
            f"no corpus under {runs}/", hint="name its folder with --corpus, or build one: phi corpus build"
        )
    return max(written)[1]


def why(corpus: Artifact | Path | str, identifier: str) -> list[dict[str, Any]]:
    """Explain every document whose id starts with `identifier`: each rule's score, bounds and verdict.

    Raises UserError for a prefix of fewer than four digits or one that no document has.
    """
    found = artifact.load(corpus, kind="corpus", verify=False)
    if len(identifier) < _MIN_PREFIX:
        raise UserError(f"'{identifier}': give at least {_MIN_PREFIX} digits of the id")
    config = parse(CorpusConfig, found.config, where=str(found.path))
    sources = {source.name: source for source in config.sources()}
    answers: list[dict[str, Any]] = []
    for documents_path, verdicts_path in part_files(found):
        ids = pyarrow.parquet.read_table(verdicts_path, columns=["id"]).column("id")
        rows = pyarrow.compute.indices_nonzero(
            pyarrow.compute.starts_with(ids, identifier.lower())
        ).to_pylist()
        if not rows:
            continue
        documents = pyarrow.parquet.read_table(documents_path).take(rows).to_pylist()
        verdicts = pyarrow.parquet.read_table(verdicts_path).take(rows).to_pylist()
        for document, verdict in zip(documents, verdicts):
            meta = json.loads(document["meta"])
            answers.append(_explain(document, meta, verdict, config, sources[meta["input"]]))
    if not answers:
        raise UserError(
            f"{found.path}: no document's id starts with '{identifier}'",
            hint="documents that failed before they had an id are in failures.jsonl",
        )
    return answers


def _explain(
    document: dict[str, Any], meta: dict[str, Any], verdict: dict[str, Any], config: CorpusConfig, source: Any
) -> dict[str, Any]:
    bounds = bounds_for(config, source)
    lines = []
    for name, limit in bounds.items():
        if f"{name}.score" not in verdict:
            continue
        lines.append(
            {
                "rule": name,
                "score": verdict[f"{name}.score"],
                "min": None if math.isinf(limit.min) else limit.min,
                "max": None if math.isinf(limit.max) else limit.max,
                "judges": limit.applies,
                "keep": verdict[f"{name}.keep"],
                "about": rules[name].about,
            }
        )
    return {
        **{name: document[name] for name in ("id", "url", "source", "license", "fetched_at")},
        "meta": meta,
        "keep": verdict["keep"],
        "reasons": verdict["reasons"],
        "phase1": verdict["phase1"],
        "phase2": verdict["phase2"],
        "heldout": verdict["heldout"],
        "contamination_item": verdict["contamination.item"],
        "duplicate_of": verdict["duplicate_of"],
        "rules": lines,
        "text": document["text"],
    }


def stats(corpus: Artifact | Path | str) -> dict[str, Any]:
    """Return stats.json of a corpus."""
    found = artifact.load(corpus, kind="corpus", verify=False)
    try:
        return json.loads(found.file("stats.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{found.path}/stats.json: not valid JSON: {error}") from None
