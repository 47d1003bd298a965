"""Counts of a corpus: by rule, by source, by phase, with histograms. Constant memory."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from pocketphi.corpus.config import MAX_EPOCHS, CorpusConfig, InputConfig
from pocketphi.corpus.document import fraction
from pocketphi.corpus.rules import bounds_for, rules
from pocketphi.corpus.verdicts import Verdicts

EDUCATIONAL_BINS = 50  # over 0 to 5
CHARS_PER_TOKEN = 4.0  # English in a vocabulary of 8,000 to 32,000; for plans only
_SAMPLE = 20_000
_QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


class Statistics:
    """Accumulates the verdicts of parts; `tree` is stats.json."""

    def __init__(self, config: CorpusConfig, num_documents: int) -> None:
        self.config = config
        self.sources = config.sources()
        self.totals: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()
        self.rejected_alone: Counter[str] = Counter()
        self.judged: Counter[str] = Counter()
        self.by_source: dict[str, Counter[str]] = {s.name or "": Counter() for s in self.sources}
        self.failures: Counter[str] = Counter()
        self.histogram = {"kept": _empty(), "rejected": _empty()}
        # An even sample by hash of id gives quantiles of every rule in constant memory.
        self.sample_share = min(1.0, _SAMPLE / max(num_documents, 1))
        self.sampled: dict[str, list[float]] = {name: [] for name in rules}
        self.bounds = [bounds_for(config, source) for source in self.sources]

    def add(self, source_number: int, summary: dict[str, Any], verdicts: Verdicts, chars: np.ndarray) -> None:
        """Count one part."""
        source = self.sources[source_number]
        counts = self.by_source[source.name or ""]
        keep = verdicts.keep
        numbers = {
            "documents_in": summary["documents_in"],
            "documents_failed": len(summary["failures"]),
            "documents_kept": int(keep.sum()),
            "documents_rejected": int((~keep).sum()),
            "documents_phase1": int(verdicts.phase1.sum()),
            "documents_phase2": int(verdicts.phase2.sum()),
            "documents_heldout": int(verdicts.heldout.sum()),
            "chars_in": int(chars.sum()),
            "chars_kept": int(chars[keep].sum()),
            "chars_phase1": int(chars[verdicts.phase1].sum()),
            "chars_phase2": int(chars[verdicts.phase2].sum()),
            "chars_heldout": int(chars[verdicts.heldout].sum()),
        }
        counts.update(numbers)
        self.totals.update(numbers)
        for failure in summary["failures"]:
            self.failures[_kind(failure["reason"])] += 1
        for name, column in verdicts.passes.items():
            self.rejected[name] += int((~column).sum())
            if self.bounds[source_number][name].applies:
                self.judged[name] += len(column)
        for reasons in verdicts.reasons():
            if len(reasons) == 1:
                self.rejected_alone[reasons[0]] += 1
        educational = np.clip(np.nan_to_num(verdicts.scores["educational"]), 0, 5)
        for name, rows in (("kept", keep), ("rejected", ~keep)):
            self.histogram[name] += np.histogram(educational[rows], EDUCATIONAL_BINS, (0, 5))[0]
        chosen = [i for i, name in enumerate(verdicts.ids) if fraction(name, "sample") < self.sample_share]
        for name, scores in verdicts.scores.items():
            self.sampled[name].extend(scores[chosen].tolist())

    def tree(self) -> dict[str, Any]:
        """Return everything as JSON-ready mappings."""
        return {
            "totals": dict(self.totals),
            "rules": {name: self._rule(name) for name in rules},
            "sources": {name: self._source(name, counts) for name, counts in self.by_source.items()},
            "failures": dict(sorted(self.failures.items())),
            "educational_histogram": {
                "edges": np.linspace(0, 5, EDUCATIONAL_BINS + 1).round(3).tolist(),
                **{name: counts.tolist() for name, counts in self.histogram.items()},
            },
            "mixture": mixture(self.sources, self.by_source),
        }

    def _rule(self, name: str) -> dict[str, Any]:
        values = np.array(self.sampled[name], dtype=np.float64)
        values = values[np.isfinite(values)]
        quantiles = {}
        if len(values):
            found = np.quantile(values, _QUANTILES)
            quantiles = {f"p{100 * q:g}": float(f"{v:.6g}") for q, v in zip(_QUANTILES, found)}
        return {
            "about": rules[name].about,
            "judged": self.judged[name],
            "rejected": self.rejected[name],
            "rejected_alone": self.rejected_alone[name],
            "quantiles": quantiles,
        }

    def _source(self, name: str, counts: Counter[str]) -> dict[str, Any]:
        source = next(s for s in self.sources if s.name == name)
        return {"quality": source.quality, **counts}


def mixture(sources: list[InputConfig], counts: dict[str, Counter[str]]) -> dict[str, dict[str, Any]]:
    """Return per phase and source the epochs, the tokens seen (an estimate) and their share."""
    plan: dict[str, dict[str, Any]] = {}
    for phase in (1, 2):
        seen: dict[str, dict[str, Any]] = {}
        for source in sources:
            chars = counts[source.name or ""][f"chars_phase{phase}"]
            epochs = source.epochs.get(str(phase), 1.0)
            if chars:
                tokens = round(chars / CHARS_PER_TOKEN)
                seen[source.name or ""] = {
                    "tokens": tokens,
                    "epochs": epochs,
                    "tokens_seen": round(tokens * epochs),
                }
        total = sum(entry["tokens_seen"] for entry in seen.values())
        for entry in seen.values():
            entry["share"] = round(entry["tokens_seen"] / total, 6) if total else 0.0
        plan[f"phase{phase}"] = seen
    return plan


def mixture_warnings(plan: dict[str, dict[str, Any]]) -> list[str]:
    """Return one sentence per source that is repeated more often than helps."""
    return [
        f"{phase}: {name} is read {entry['epochs']:g} times; past {MAX_EPOCHS:g} repetitions add little"
        for phase, sources in plan.items()
        for name, entry in sources.items()
        if entry["epochs"] > MAX_EPOCHS
    ]


def _kind(reason: str) -> str:
    """Fold reasons that differ in numbers only."""
    import re

    return re.sub(r"\d+(?:\.\d+)?", "N", reason)[:120]


def _empty() -> np.ndarray:
    return np.zeros(EDUCATIONAL_BINS, dtype=np.int64)
