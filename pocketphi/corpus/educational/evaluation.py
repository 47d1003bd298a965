"""How good is a scorer on sources it has not seen: the figures of its report.

Every document is judged by a model that was trained without its source. Beside the overall figures two
controls ask whether something cheap explains them: length (both sides cut to the same number of words)
and topic (each low document against a high one that shares its rare words).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pocketphi.corpus.educational import metrics
from pocketphi.corpus.educational.labels import Labelled
from pocketphi.corpus.educational.training import Weights

READ_WORDS = 650  # about what the scorer reads of a long document
CUT_WORDS = (50, 100, 200)
_MAX_COMMON = 0.2  # a word in more documents than this says nothing about the topic
_MIN_TOPIC = 0.08  # cosine of rare words that counts as the same topic


@dataclass
class HeldOut:
    """fold_D: which model judges a document; unseen_D: its source is unseen, not only the document."""

    data: Labelled
    models: list[Weights]
    fold_D: np.ndarray
    unseen_D: np.ndarray

    def raw(self, documents: Sequence[int], words: int = READ_WORDS) -> np.ndarray:
        """Uncalibrated values of `words` words from the middle of documents, float64."""
        values = []
        for document in documents:
            start = max(0, (len(self.data.words[document]) - words) // 2)
            model = self.models[self.fold_D[document]]
            values.append(model.raw(self.data, document, start=start, words=words))
        return np.array(values)


def folds(
    data: Labelled, patterns: Sequence[Sequence[str]], num_folds: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Assign documents to folds; return (fold_D, unseen_D, number of folds).

    `patterns` are lists of substrings of group names, one list per fold. Groups that match none, and all
    without patterns, are dealt out file by file, largest first. The only group of a file is divided by
    document: its documents are unseen, its source is not.
    """
    count = len(patterns) if patterns else num_folds
    fold_D = np.full(len(data), -1)
    unseen_D = np.ones(len(data), dtype=bool)
    named: dict[int, int] = {}
    for group, name in enumerate(data.group_names):
        for fold, wanted in enumerate(patterns):
            if any(part in name for part in wanted):
                named[group] = fold
                break
    for group, fold in named.items():
        fold_D[data.group == group] = fold
    offset = 0
    for file in range(len(data.file_names)):
        open_D = (data.file == file) & (fold_D < 0)
        groups, sizes = np.unique(data.group[open_D], return_counts=True)
        if len(groups) == 1 and not (fold_D[data.file == file] >= 0).any():
            for document in np.flatnonzero(open_D):
                fold_D[document] = zlib.crc32(data.ids[document].encode()) % count
            unseen_D[open_D] = False
            continue
        for place, group in enumerate(groups[np.argsort(-sizes, kind="stable")]):
            fold_D[open_D & (data.group == group)] = (place + offset) % count
        offset += len(groups)
    return fold_D, unseen_D, count


def figures(
    held: HeldOut, raw_D: np.ndarray, score_D: np.ndarray, *, high: float, low: float
) -> dict[str, Any]:
    """Return the report's numbers; `score_D` are calibrated without the document's own fold."""
    data = held.data
    good = np.flatnonzero((data.labels >= high) & held.unseen_D)
    bad = np.flatnonzero((data.labels <= low) & held.unseen_D)
    weight_D = _equal_files(data)
    error, bins = metrics.calibration(data.labels, score_D, weight_D)
    # Models of different folds differ a little in level; calibration puts them on one scale.
    result: dict[str, Any] = {
        "documents": len(data),
        "documents_too_short": data.num_dropped,
        "documents_source_unseen": int(held.unseen_D.sum()),
        "documents_high": len(good),
        "documents_low": len(bad),
        "roc_auc_unseen_sources": metrics.roc_auc(score_D[good], score_D[bad]),
        "roc_auc_unseen_documents": metrics.roc_auc(
            score_D[data.labels >= high], score_D[data.labels <= low]
        ),
        "roc_auc_at_3": metrics.roc_auc(score_D[data.labels >= 3], score_D[data.labels < 3]),
        "roc_auc_of_length_alone": metrics.roc_auc(_lengths(data, good), _lengths(data, bad)),
        "spearman_labels": metrics.spearman(data.labels, score_D),
        "calibration_error": error,
    }
    for name, value in metrics.classification(data.labels, score_D, 3.0).items():
        result[f"{name}_at_3"] = value
    per_fold = []
    for fold in range(len(held.models)):
        g, b = good[held.fold_D[good] == fold], bad[held.fold_D[bad] == fold]
        if len(g) and len(b):
            per_fold.append(
                {
                    "roc_auc": metrics.roc_auc(raw_D[g], raw_D[b]),
                    "documents_high": len(g),
                    "documents_low": len(b),
                    "low_sources": sorted({data.group_names[i] for i in data.group[b]}),
                }
            )
    result["roc_auc_worst_fold"] = min((float(f["roc_auc"]) for f in per_fold), default=float("nan"))  # type: ignore[arg-type]
    for words in CUT_WORDS:
        result[f"roc_auc_{words}_words"] = _length_matched(held, good, bad, words)
    result |= _topic_matched(held, good, bad)
    result["folds"] = per_fold
    result["calibration_bins"] = bins
    result["confusion_label_by_score"] = metrics.confusion(data.labels, score_D)
    result["by_file"] = [
        {
            "name": name,
            "documents": int((data.file == file).sum()),
            "mean_label": float(data.labels[data.file == file].mean()),
            **{f"score_p{p:02d}": float(np.percentile(score_D[data.file == file], p)) for p in (5, 50, 95)},
        }
        for file, name in enumerate(data.file_names)
        if (data.file == file).any()
    ]
    return result


def confusions(
    data: Labelled, score_D: np.ndarray, *, high: float, low: float, num: int = 25
) -> list[dict[str, Any]]:
    """The worst mistakes: low documents that score highest, and high documents that score lowest."""
    cases = []
    for kind, chosen, sign in (
        ("low label, high score", np.flatnonzero(data.labels <= low), -1.0),
        ("high label, low score", np.flatnonzero(data.labels >= high), 1.0),
    ):
        for document in chosen[np.argsort(sign * score_D[chosen], kind="stable")][:num].tolist():
            cases.append(
                {
                    "kind": kind,
                    "id": data.ids[document],
                    "group": data.group_names[data.group[document]],
                    "label": float(data.labels[document]),
                    "score": round(float(score_D[document]), 3),
                    "words": len(data.words[document]),
                    "excerpt": data.excerpts[document],
                }
            )
    return cases


def _equal_files(data: Labelled) -> np.ndarray:
    return 1.0 / np.bincount(data.file)[data.file]


def _lengths(data: Labelled, documents: np.ndarray) -> np.ndarray:
    return np.array([len(data.words[d]) for d in documents])


def _by_fold(
    held: HeldOut, good: np.ndarray, bad: np.ndarray, words: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Raw values of high and low documents, fold by fold: values of different models are not compared."""
    pairs = []
    for fold in range(len(held.models)):
        g, b = good[held.fold_D[good] == fold], bad[held.fold_D[bad] == fold]
        if len(g) and len(b):
            pairs.append((held.raw(g.tolist(), words), held.raw(b.tolist(), words)))
    return pairs


def _length_matched(held: HeldOut, good: np.ndarray, bad: np.ndarray, words: int) -> float:
    """Mean AUC over folds of cuts of exactly `words` words of both kinds."""
    long = [d[_lengths(held.data, d) >= words] for d in (good, bad)]
    values = [metrics.roc_auc(g, b) for g, b in _by_fold(held, long[0], long[1], words)]
    return float(np.mean(values)) if values else float("nan")


def _topic_matched(held: HeldOut, good: np.ndarray, bad: np.ndarray, words: int = 100) -> dict[str, Any]:
    """Pair each low document with the high one of its fold that is nearest in topic, both cut to `words`.

    A fold's model has seen the source of neither. Only pairs that share rare words count.
    """
    data = held.data
    wins = ties = pairs = 0
    highs: list[float] = []
    lows: list[float] = []
    similarities: list[float] = []
    for fold in range(len(held.models)):
        g = good[(held.fold_D[good] == fold) & (_lengths(data, good) >= words)]
        b = bad[(held.fold_D[bad] == fold) & (_lengths(data, bad) >= words)]
        if not len(g) or not len(b):
            continue
        nearest, similarity = _nearest_topic(data, b, g)
        same = similarity >= _MIN_TOPIC
        if not same.any():
            continue
        low = held.raw(b[same].tolist(), words)
        high = held.raw(g[nearest[same]].tolist(), words)
        wins += int((high > low).sum())
        ties += int((high == low).sum())
        pairs += int(same.sum())
        highs += high.tolist()
        lows += low.tolist()
        similarities += similarity[same].tolist()
    if not pairs:
        return {"topic_matched_pairs": 0}
    return {
        "topic_matched_pairs": pairs,
        "topic_matched_mean_cosine": float(np.mean(similarities)),
        "topic_matched_high_wins": (wins + ties / 2) / pairs,
        "topic_matched_roc_auc": metrics.roc_auc(np.array(highs), np.array(lows)),
    }


def _nearest_topic(data: Labelled, queries: np.ndarray, pool: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (place in pool, cosine) of the pool document that shares most rare words with each query."""
    sets = [np.unique(data.words[d][:READ_WORDS]) for d in (*queries.tolist(), *pool.tolist())]
    terms, frequency = np.unique(np.concatenate(sets), return_counts=True)
    weight = np.log(len(sets) / frequency)
    weight[(frequency > _MAX_COMMON * len(sets)) | (frequency < 2)] = 0.0
    ids = [np.searchsorted(terms, s) for s in sets]
    norms = np.array([float(np.sqrt((weight[i] ** 2).sum())) or 1.0 for i in ids])
    flat = np.concatenate(ids[len(queries) :])
    owner = np.repeat(np.arange(len(pool)), [len(i) for i in ids[len(queries) :]])
    order = np.argsort(flat, kind="stable")
    flat, owner = flat[order], owner[order]
    starts = np.searchsorted(flat, np.arange(len(terms) + 1))
    best = np.zeros(len(queries), dtype=np.int64)
    cosine = np.zeros(len(queries))
    pool_norms = norms[len(queries) :]
    for row in range(len(queries)):
        own = ids[row][weight[ids[row]] > 0]
        if not len(own):
            continue
        holders = np.concatenate([owner[starts[t] : starts[t + 1]] for t in own])
        mass = np.repeat(weight[own] ** 2, starts[own + 1] - starts[own])
        shared = np.bincount(holders, weights=mass, minlength=len(pool)) / (pool_norms * norms[row])
        best[row] = int(shared.argmax())
        cosine[row] = float(shared[best[row]])
    return best, cosine
