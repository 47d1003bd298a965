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

READ_WORDS = 320  # about what the scorer reads of a long document
CUT_WORDS = (50, 100, 200)
_MAX_COMMON = 0.2  # a word in more documents than this says nothing about the topic
_MIN_TOPIC = 0.08  # cosine of rare words that counts as the same topic
_TOPIC_WORDS = 100
_TOPIC_POOL = 4000  # documents of training that stand for all where topic alone is asked
_TOPIC_QUERIES = 600  # documents of each kind and fold that are asked about
_SAME_VOTE = 0.1  # of the 0 to 5 scale
_NEIGHBOURS = 10


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


def _topic_matched(held: HeldOut, good: np.ndarray, bad: np.ndarray) -> dict[str, Any]:
    """Two tests in which topic cannot tell high from low. A fold's model has seen the source of neither.

    *Topic matched*: each low document beside the high one of its fold that is nearest in topic; only pairs
    that share rare words count. Also for cuts of `_TOPIC_WORDS`, which takes length away as well.
    *Topic balanced*: first the label that topic alone would give (that of the nearest documents which the
    fold's model was trained on); then pairs of a low and a high document that get the same one. There the
    ROC AUC of topic alone is one half by choice of the pairs, and what the scorer shows is not topic.
    """
    data = held.data
    names = ("matched", "matched_cut", "balanced", "alone", "alone_balanced")
    found: dict[str, list[list[np.ndarray]]] = {name: [[], []] for name in names}
    similarities: list[np.ndarray] = []

    def add(name: str, high: np.ndarray, low: np.ndarray) -> None:
        found[name][0].append(high)
        found[name][1].append(low)

    for fold in range(len(held.models)):
        g = good[(held.fold_D[good] == fold) & (_lengths(data, good) >= _TOPIC_WORDS)]
        b = bad[(held.fold_D[bad] == fold) & (_lengths(data, bad) >= _TOPIC_WORDS)]
        if not len(g) or not len(b):
            continue
        b = _thinned(b, _TOPIC_QUERIES)
        nearest, similarity = _TopicIndex(data, g).nearest(b)
        same = similarity >= _MIN_TOPIC
        similarities.append(similarity[same])
        pair_g, pair_b = g[nearest[same]].tolist(), b[same].tolist()
        add("matched", held.raw(pair_g), held.raw(pair_b))
        add("matched_cut", held.raw(pair_g, _TOPIC_WORDS), held.raw(pair_b, _TOPIC_WORDS))
        g = _thinned(g, _TOPIC_QUERIES)
        known = _TopicIndex(data, _thinned(np.flatnonzero(held.fold_D != fold), _TOPIC_POOL))
        said_g, said_b = known.votes(g), known.votes(b)
        add("alone", said_g, said_b)
        at_g, at_b = _equal_pairs(said_g, said_b)
        add("balanced", held.raw(g[at_g].tolist()), held.raw(b[at_b].tolist()))
        add("alone_balanced", said_g[at_g], said_b[at_b])
    result: dict[str, Any] = {
        "topic_matched_pairs": sum(len(s) for s in similarities),
        "topic_balanced_pairs": 0,
    }
    joined = {k: tuple(np.concatenate(side) if side else np.zeros(0) for side in v) for k, v in found.items()}
    if result["topic_matched_pairs"]:
        result["topic_matched_mean_cosine"] = float(np.mean(np.concatenate(similarities)))
        high, low = joined["matched"]
        result["topic_matched_high_wins"] = float(np.mean(high > low) + np.mean(high == low) / 2)
    result["topic_balanced_pairs"] = len(joined["balanced"][0])
    for name, key in (
        ("topic_matched", "matched"),
        ("topic_and_length_matched", "matched_cut"),
        ("topic_balanced", "balanced"),
    ):
        result[f"{name}_roc_auc"] = metrics.roc_auc(*joined[key])
    result["roc_auc_of_topic_alone"] = metrics.roc_auc(*joined["alone"])
    result["topic_balanced_roc_auc_of_topic_alone"] = metrics.roc_auc(*joined["alone_balanced"])
    return result


def _thinned(documents: np.ndarray, most: int) -> np.ndarray:
    return documents[:: max(1, -(-len(documents) // most))]


def _equal_pairs(high: np.ndarray, low: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return places of pairs (high, low) whose values differ by at most `_SAME_VOTE`, none used twice."""
    order_h, order_l = np.argsort(high, kind="stable"), np.argsort(low, kind="stable")
    at_h, at_l = [], []
    i = j = 0
    while i < len(high) and j < len(low):
        difference = high[order_h[i]] - low[order_l[j]]
        if abs(difference) <= _SAME_VOTE:
            at_h.append(int(order_h[i]))
            at_l.append(int(order_l[j]))
        i += difference <= _SAME_VOTE
        j += difference >= -_SAME_VOTE
    return np.array(at_h, dtype=np.int64), np.array(at_l, dtype=np.int64)


class _TopicIndex:
    """Documents by their rare words (those of few documents of the pool): what they are about.

    Shape legend: P documents of the pool.
    """

    def __init__(self, data: Labelled, pool: np.ndarray) -> None:
        self.data, self.pool = data, pool
        sets = [self._terms_of(d) for d in pool.tolist()]
        self.terms, frequency = np.unique(np.concatenate(sets), return_counts=True)
        weight = np.log(len(sets) / frequency)
        weight[frequency > _MAX_COMMON * len(sets)] = 0.0
        self.squares = weight**2
        flat = np.searchsorted(self.terms, np.concatenate(sets))
        owner = np.repeat(np.arange(len(pool)), [len(s) for s in sets])
        self.norms_P = np.sqrt(np.bincount(owner, weights=self.squares[flat], minlength=len(pool)))
        self.norms_P[self.norms_P == 0] = 1.0
        order = np.argsort(flat, kind="stable")
        self.owner = owner[order]
        self.starts = np.searchsorted(flat[order], np.arange(len(self.terms) + 1))

    def _terms_of(self, document: int) -> np.ndarray:
        return np.unique(self.data.words[document][:READ_WORDS])

    def cosines(self, document: int) -> np.ndarray:
        """Cosine of a document to each of the pool, float64 [P]; words that the pool does not have count not."""
        own = self._terms_of(document)
        place = np.minimum(np.searchsorted(self.terms, own), len(self.terms) - 1)
        place = place[(self.terms[place] == own) & (self.squares[place] > 0)]
        if not len(place):
            return np.zeros(len(self.pool))
        holders = np.concatenate([self.owner[self.starts[t] : self.starts[t + 1]] for t in place])
        mass = np.repeat(self.squares[place], self.starts[place + 1] - self.starts[place])
        shared_P = np.bincount(holders, weights=mass, minlength=len(self.pool))
        return shared_P / (self.norms_P * np.sqrt(self.squares[place].sum()))

    def nearest(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (place in the pool, cosine) of the document nearest in topic to each of `documents`."""
        found = [self.cosines(d) for d in documents.tolist()]
        return np.array([int(c.argmax()) for c in found]), np.array([float(c.max()) for c in found])

    def votes(self, documents: np.ndarray) -> np.ndarray:
        """The label that the nearest documents of the pool would give, weighted by cosine."""
        labels_P = self.data.labels[self.pool]
        found = []
        for document in documents.tolist():
            cosine_P = self.cosines(document)
            top = np.argsort(-cosine_P, kind="stable")[:_NEIGHBOURS]
            found.append(float(np.average(labels_P[top], weights=cosine_P[top] + 1e-9)))
        return np.array(found)
