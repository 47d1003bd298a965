"""The corpus stage: sources in, scored and judged documents out.

First every chunk on its own, by workers (parts.py): decode, extract, clean, score. Then, over all
parts: duplicates, verdicts, phases, counts. Either half continues where a kill left it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from pocketphi.core import artifact, progress
from pocketphi.core.artifact import Artifact
from pocketphi.core.errors import DataError
from pocketphi.corpus import exact_duplicates, near_duplicates, readers, repeated_lines, verdicts
from pocketphi.corpus.config import PYTHON_DOCS, CorpusConfig, InputConfig
from pocketphi.corpus.decontamination import BenchmarkIndex, benchmark_files, benchmark_items
from pocketphi.corpus.engines import run_parts
from pocketphi.corpus.parts import Folders, read_done, write_parquet
from pocketphi.corpus.rules import bounds_for, rules
from pocketphi.corpus.statistics import Statistics, mixture_warnings

KIND = "corpus"


def run(
    config: CorpusConfig,
    inputs: Mapping[str, Artifact | Path | str] | None = None,
    *,
    out: Path | None = None,
) -> Artifact:
    """Build a corpus from `config.inputs` and publish it.

    `inputs` may hold `synth`, an artifact whose documents join as one more source of textbook quality.
    Raises UserError for a path that does not exist, ConfigError for an unknown rule, DataError when no
    document comes out at all. Single broken records are counted and named in failures.jsonl.
    """
    parents: list[Artifact] = []
    if inputs and "synth" in inputs:
        synth = artifact.load(inputs["synth"], kind="synth")
        made = InputConfig(str(synth.file("documents.jsonl")), name="synth", quality="textbook")
        config = dataclasses.replace(config, inputs=(*config.inputs, made))
        parents.append(synth)
    check(config)
    sources = source_identity(config)
    identity = config.identity()
    out = Path(out) if out is not None else artifact.default_path(KIND, identity, parents, sources)
    scratch = out.with_name(out.name + ".scratch")
    if done := artifact.reuse(out, kind=KIND, config=identity, parents=parents, sources=sources):
        shutil.rmtree(scratch, ignore_errors=True)
        return done
    with artifact.create(
        out,
        kind=KIND,
        config=identity,
        parents=parents,
        sources=sources,
        seed=config.seed,
        resumable=True,
    ) as draft:
        if not draft.resumed:
            shutil.rmtree(scratch, ignore_errors=True)
        folders = Folders(draft.path, scratch)
        folders.make()
        _remove_unfinished(draft.path)
        if config.benchmarks and not folders.index.exists():
            _index_benchmarks(config, folders)
        summaries = _make_parts(config, folders)
        counts = _judge(config, folders, summaries)
        draft.counts.update(counts)
        _remove_unfinished(draft.path)
    shutil.rmtree(scratch, ignore_errors=True)
    return draft.artifact


def check(config: CorpusConfig) -> None:
    """Raise on anything wrong that can be known before reading: rules, paths, lists, the scorer."""
    from pocketphi.corpus.rules.origin import load_url_lists

    for source in config.sources():
        bounds_for(config, source)
        readers.files_of(source)
    benchmark_files(config.benchmarks)
    load_url_lists(config.url_deny)


def source_identity(config: CorpusConfig) -> list[str]:
    """Return what identifies the files read: their paths, and one hash over names, sizes and times."""
    digest = hashlib.sha256()
    roots: list[str] = []
    for source in config.sources():
        if source.path == PYTHON_DOCS:
            import sys

            digest.update(sys.version.encode())
            continue
        for path, name in readers.files_of(source) or readers.local_dataset(source):
            stat = path.stat()
            digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        roots.append(source.path)
    for path in benchmark_files(config.benchmarks):
        stat = path.stat()
        digest.update(f"{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    for extra in (*config.url_deny, *([config.scorer] if config.scorer else [])):
        roots.append(extra)
    return [*roots, f"listing:{digest.hexdigest()}"]


def _remove_unfinished(folder: Path) -> None:
    for path in folder.rglob(".*.tmp"):
        path.unlink(missing_ok=True)


def _index_benchmarks(config: CorpusConfig, folders: Folders) -> None:
    files = benchmark_files(config.benchmarks)
    index = BenchmarkIndex.build(benchmark_items(files), config.contamination_chars)
    temporary = folders.index.with_name("benchmarks.tmp")
    index.save(temporary)
    temporary.replace(folders.index)
    progress.say(
        f"decontamination: {index.num_items} items of {len(files)} benchmark files; "
        f"{index.num_short + index.num_generic} items are too short or too common to be recognised"
    )


def _make_parts(config: CorpusConfig, folders: Folders) -> list[dict[str, Any]]:
    """Have every part made that is not done yet; return all summaries in order, without the failures."""
    summaries: dict[int, dict[str, Any]] = {}
    failed = 0
    with progress.bar("corpus", unit="documents") as bar:
        for summary in run_parts(config, folders):
            failed += len(summary["failures"])
            # A source may fail a million times: the failures stay on disk until they are written out.
            summaries[summary["part"]] = {n: summary[n] for n in ("part", "source", "documents")}
            bar.advance(0 if summary.get("resumed") else summary["documents_in"], failed=failed)
    if not summaries:
        raise DataError(
            "the inputs hold no document", hint="see `phi corpus build --help` for what can be read"
        )
    return [summaries[part] for part in range(len(summaries))]


def _judge(config: CorpusConfig, folders: Folders, summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """Write verdicts, failures and statistics over all parts; return the counts."""
    sources = config.sources()
    num_documents = sum(summary["documents"] for summary in summaries)
    copies, near = _find_duplicates(config, folders, summaries, num_documents)
    recurring = _find_repeated_lines(config, folders, summaries, num_documents, copies, near)
    statistics = Statistics(config, num_documents)
    with open(folders.final / "failures.jsonl", "w", encoding="utf-8") as failures:
        for part in (summary["part"] for summary in summaries):
            summary = read_done(folders, part)
            assert summary is not None, f"part {part} has gone"
            table = pyarrow.parquet.read_table(folders.scores(part))
            scores = _scores(table)
            duplicate_of = [""] * table.num_rows
            scores["exact_duplicate"] = np.zeros(table.num_rows, dtype=np.float32)
            scores["near_duplicate"] = np.zeros(table.num_rows, dtype=np.float32)
            for row, first in copies.of_part(part).items():
                duplicate_of[row] = first
                scores["exact_duplicate"][row] = 1
            for row, (first, similarity) in (near.of_part(part) if near else {}).items():
                duplicate_of[row] = first
                scores["near_duplicate"][row] = similarity
            scores["repeated_lines"] = (
                recurring.of_part(part) if recurring else np.zeros(table.num_rows, dtype=np.float32)
            )
            judged = verdicts.decide(
                config,
                sources[summary["source"]],
                table.column("id").to_pylist(),
                _in_order(scores),
                table.column("contamination.item").to_pylist(),
                duplicate_of,
            )
            write_parquet(judged.table(), folders.verdicts(part))
            statistics.add(summary["source"], summary, judged, table.column("chars").to_numpy())
            for failure in summary["failures"]:
                failures.write(json.dumps(failure, ensure_ascii=False, sort_keys=True) + "\n")
    tree = statistics.tree()
    if near:
        tree["near_duplicates"] = near.counts
    if recurring:
        tree["repeated_lines"] = recurring.counts
    artifact.write_atomic(folders.final / "stats.json", json.dumps(tree, indent=1) + "\n")
    for warning in mixture_warnings(tree["mixture"]):
        progress.say(f"mixture: {warning}")
    counts = dict(statistics.totals)
    _check_counts(counts)
    return counts


def _find_duplicates(
    config: CorpusConfig, folders: Folders, summaries: list[dict[str, Any]], num_documents: int
) -> tuple[exact_duplicates.DuplicateTable, near_duplicates.DuplicateTable | None]:
    """Find exact copies, then, among the rest, near-duplicates. What other rules reject comes last."""
    bounds = [bounds_for(config, source) for source in config.sources()]

    def kept(table: pyarrow.Table, source: int) -> np.ndarray:
        passed = verdicts.passes(_scores(table), bounds[source])
        return np.logical_and.reduce([np.ones(table.num_rows, dtype=bool), *passed.values()])

    def hashes() -> Iterator[exact_duplicates.PartHashes]:
        for summary in summaries:
            table = pyarrow.parquet.read_table(folders.scores(summary["part"]))
            yield exact_duplicates.PartHashes(
                summary["part"],
                _fixed_binary(table, "text_hash", 2),
                table.column("id").to_pylist(),
                kept(table, summary["source"]),
            )

    copies = exact_duplicates.find(
        hashes, num_documents, config.dedup_memory_bytes, folders.scratch / "exact.npy"
    )
    if not config.near_duplicates:
        return copies, None

    def keys() -> Iterator[near_duplicates.PartKeys]:
        for summary in summaries:
            table = pyarrow.parquet.read_table(folders.scores(summary["part"]))
            skip = np.zeros(table.num_rows, dtype=bool)
            skip[list(copies.of_part(summary["part"]))] = True
            yield near_duplicates.PartKeys(
                summary["part"],
                _fixed_binary(table, "band_keys", table.schema.field("band_keys").type.byte_width // 8),
                table.column("id").to_pylist(),
                kept(table, summary["source"]),
                skip,
            )

    def texts(part: int) -> list[str]:
        return (
            pyarrow.parquet.read_table(folders.documents(part), columns=["text"]).column("text").to_pylist()
        )

    near = near_duplicates.find(
        keys,
        texts,
        num_documents,
        folders.scratch / "near",
        threshold=config.near_duplicate_jaccard,
        memory_bytes=config.dedup_memory_bytes,
    )
    return copies, near


def _find_repeated_lines(
    config: CorpusConfig,
    folders: Folders,
    summaries: list[dict[str, Any]],
    num_documents: int,
    copies: exact_duplicates.DuplicateTable,
    near: near_duplicates.DuplicateTable | None,
) -> repeated_lines.ShareTable | None:
    """Find lines that recur on a site. Copies do not count: three of them would make all their lines recur."""
    if not config.repeated_lines:
        return None

    def parts() -> Iterator[repeated_lines.PartLines]:
        for summary in summaries:
            part = summary["part"]
            lines = (
                pyarrow.parquet.read_table(folders.scores(part), columns=["lines"])
                .column("lines")
                .to_pylist()
            )
            for row in (*copies.of_part(part), *(near.of_part(part) if near else ())):
                lines[row] = b""
            yield repeated_lines.PartLines(part, lines)

    return repeated_lines.find(
        parts, num_documents, folders.scratch / "lines.bin", memory_bytes=config.dedup_memory_bytes
    )


def _fixed_binary(table: pyarrow.Table, name: str, width: int) -> np.ndarray:
    """Return a column of `width` 64-bit numbers per row as uint64 [rows, width]."""
    return np.frombuffer(b"".join(table.column(name).to_pylist()), dtype="<u8").reshape(-1, width)


def _check_counts(counts: dict[str, int]) -> None:
    parts = sum(counts[f"documents_{name}"] for name in ("kept", "rejected", "failed"))
    if counts["documents_in"] != parts:
        raise DataError(
            f"internal count mismatch: {counts['documents_in']} documents in, {parts} accounted for"
        )
    progress.say(
        f"{counts['documents_in']} documents in: {counts['documents_kept']} kept, "
        f"{counts['documents_rejected']} rejected, {counts['documents_failed']} failed"
    )
    progress.event("corpus_counts", **counts)
    if not counts["documents_kept"]:
        progress.say("warning: no document was kept; stats.json says which rules rejected them")


def _scores(table: Any) -> dict[str, np.ndarray]:
    ending = ".score"
    return {
        name.removesuffix(ending): table.column(name).to_numpy()
        for name in table.column_names
        if name.endswith(ending)
    }


def _in_order(scores: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Columns in the order of the registry: one order, whatever step filled them."""
    return {name: scores[name] for name in rules if name in scores}
