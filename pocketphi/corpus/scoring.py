"""Scoring documents without building a corpus: what `phi corpus score FILE` prints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pocketphi.corpus import readers
from pocketphi.corpus.config import CorpusConfig
from pocketphi.corpus.decontamination import BenchmarkIndex, benchmark_files, benchmark_items
from pocketphi.corpus.document import Raw
from pocketphi.corpus.processing import Processor
from pocketphi.corpus.rules import bounds_for
from pocketphi.corpus.verdicts import passes

_BATCH = 64


def score_documents(config: CorpusConfig) -> Iterator[dict[str, Any]]:
    """Yield one flat mapping per record of `config.inputs`, in order: `id`, `educational_score`, `keep`,
    `reasons`, then `<rule>.score` and `<rule>.keep`; a record without text gives `where` and `failed`.

    Duplicates are not looked for: each document is judged alone.
    """
    index = None
    if config.benchmarks:
        files = benchmark_files(config.benchmarks)
        index = BenchmarkIndex.build(benchmark_items(files), config.contamination_chars)
    processor = Processor(replace(config), index)
    for source in config.sources():
        bounds = bounds_for(config, source)
        waiting: list[Raw] = []

        def flush(raws: list[Raw], source=source, bounds=bounds) -> Iterator[dict[str, Any]]:  # type: ignore[no-untyped-def]
            done = processor.process(source, raws)
            passed = passes(done.scores, bounds)
            for row, document in enumerate(done.documents):
                reasons = [name for name, column in passed.items() if not column[row]]
                answer: dict[str, Any] = {
                    "id": document.id,
                    "where": document.meta.get("where", ""),
                    "url": document.url,
                    "educational_score": float(done.scores["educational"][row]),
                    "keep": not reasons,
                    "reasons": reasons,
                }
                if done.contamination_items[row]:
                    answer["contamination.item"] = done.contamination_items[row]
                for name, column in done.scores.items():
                    answer[f"{name}.score"] = float(column[row])
                    answer[f"{name}.keep"] = bool(passed[name][row])
                yield answer
            for failure in done.failures:
                yield {"where": failure["where"], "failed": failure["reason"]}

        for raw in readers.records(source, config.max_document_bytes):
            waiting.append(raw)
            if len(waiting) == _BATCH:
                yield from flush(waiting)
                waiting = []
        if waiting:
            yield from flush(waiting)
