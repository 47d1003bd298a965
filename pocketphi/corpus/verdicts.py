"""From scores to verdicts: what is kept, why not, and which phase reads it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow

from pocketphi.corpus.config import CorpusConfig, InputConfig
from pocketphi.corpus.document import fraction
from pocketphi.corpus.rules import Bounds, bounds_for


@dataclass
class Verdicts:
    """Decisions on the documents of one part (n rows, aligned with documents/part-k.parquet)."""

    ids: list[str]
    scores: dict[str, np.ndarray]  # float32 [n] by rule
    passes: dict[str, np.ndarray]  # bool [n] by rule
    contamination_items: list[str]
    duplicate_of: list[str]
    phase1: np.ndarray
    phase2: np.ndarray
    heldout: np.ndarray

    @property
    def keep(self) -> np.ndarray:
        kept = np.ones(len(self.ids), dtype=bool)
        for column in self.passes.values():
            kept &= column
        return kept

    def reasons(self) -> list[list[str]]:
        """Per document the rules that reject it, all of them."""
        found: list[list[str]] = [[] for _ in self.ids]
        for name, column in self.passes.items():
            for row in np.nonzero(~column)[0]:
                found[row].append(name)
        return found

    def table(self) -> pyarrow.Table:
        """Return the columns of verdicts/part-k.parquet."""
        columns: dict[str, pyarrow.Array] = {"id": pyarrow.array(self.ids, pyarrow.string())}
        for name, scores in self.scores.items():
            columns[f"{name}.score"] = pyarrow.array(scores, pyarrow.float32())
            columns[f"{name}.keep"] = pyarrow.array(self.passes[name], pyarrow.bool_())
        columns["contamination.item"] = pyarrow.array(self.contamination_items, pyarrow.string())
        columns["duplicate_of"] = pyarrow.array(self.duplicate_of, pyarrow.string())
        columns["keep"] = pyarrow.array(self.keep, pyarrow.bool_())
        columns["reasons"] = pyarrow.array(self.reasons(), pyarrow.list_(pyarrow.string()))
        columns["phase1"] = pyarrow.array(self.phase1, pyarrow.bool_())
        columns["phase2"] = pyarrow.array(self.phase2, pyarrow.bool_())
        columns["heldout"] = pyarrow.array(self.heldout, pyarrow.bool_())
        return pyarrow.table(columns)


def passes(scores: dict[str, np.ndarray], bounds: dict[str, Bounds]) -> dict[str, np.ndarray]:
    """Apply the thresholds: bool [n] by rule. A NaN score passes: the rule has nothing to say."""
    found: dict[str, np.ndarray] = {}
    for name, score in scores.items():
        limit = bounds[name]
        if not limit.applies:
            found[name] = np.ones(len(score), dtype=bool)
            continue
        # Bounds as float32, the type of the scores: 0.3 must not reject a score of 0.3.
        low, high = np.float32(limit.min), np.float32(limit.max)
        found[name] = np.isnan(score) | ((score >= low) & (score <= high))
    return found


def decide(
    config: CorpusConfig,
    source: InputConfig,
    ids: list[str],
    scores: dict[str, np.ndarray],
    contamination_items: list[str],
    duplicate_of: list[str],
) -> Verdicts:
    """Return the verdicts on one part of one source."""
    passed = passes(scores, bounds_for(config, source))
    verdicts = Verdicts(
        ids,
        scores,
        passed,
        contamination_items,
        duplicate_of,
        *(np.zeros(len(ids), dtype=bool) for _ in range(3)),
    )
    keep = verdicts.keep
    educational = scores["educational"]
    for number, phase, column in ((1, config.phase1, "phase1"), (2, config.phase2, "phase2")):
        enters = keep & (number in source.phases)
        if source.quality not in phase.always:
            enters &= educational >= np.float32(phase.min_educational)
        setattr(verdicts, column, enters)
    share = np.array([fraction(name, "heldout") for name in ids])
    verdicts.heldout = keep & (share < config.heldout_fraction)
    verdicts.phase1 &= ~verdicts.heldout
    verdicts.phase2 &= ~verdicts.heldout
    return verdicts
