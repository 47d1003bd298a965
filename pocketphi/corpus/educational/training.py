"""Fit the scorer: logistic regression of soft labels on hashed words and pairs, in numpy.

Documents are seen through cuts of random length and place, so that length teaches nothing. A slot
counts only when it occurs in enough documents of enough groups (sources): a word that one source alone
uses would tell where a text comes from, not what it is worth.

The bias is fixed at the bottom of the scale: a text without a known word scores low, and what a text
scores above that, its words have earned.

Shape legend: D documents, C cuts, S slots of a batch of cuts, V slots kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pocketphi.corpus.educational.features import hash_batches
from pocketphi.corpus.educational.labels import Labelled

BIAS = -2.0
# Mean weights are small numbers; this only moves the learning rate into a usual range.
_SCALE = 10.0
_BATCH = 512
_MAX_WEIGHT = 32767


@dataclass(frozen=True)
class FitConfig:
    """How weights are fitted; defaults were chosen on sources held out (see the scorer's card)."""

    bits: int = 20
    epochs: int = 4
    learning_rate: float = 0.3
    shrinkage: float = 20.0  # in words and pairs
    min_documents: int = 5
    min_groups: int = 4
    min_files: int = 1
    min_cut_words: int = 30
    max_cut_words: int = 500
    cuts_per_document: int = 4
    seed: int = 0


@dataclass(frozen=True)
class Weights:
    """dense float32 [2**bits]; raw(document) = scale * sum / (count + shrinkage) + bias."""

    dense: np.ndarray
    scale: float
    bias: float
    shrinkage: float
    num_kept: int

    def raw(self, data: Labelled, document: int, *, start: int = 0, words: int | None = None) -> float:
        """Uncalibrated value of a document, or of `words` words of it from `start`."""
        own, joined = data.words[document], data.pairs[document]
        if words is not None:
            own, joined = own[start : start + words], joined[start : start + words - 1]
        total = float(self.dense[own].sum(dtype=np.float64) + self.dense[joined].sum(dtype=np.float64))
        return self.scale * total / (len(own) + len(joined) + self.shrinkage) + self.bias

    def quantised(self) -> tuple[np.ndarray, float]:
        """Return (int16 weights, scale) of the shipped form."""
        largest = float(np.abs(self.dense).max()) or 1.0
        integers = np.round(self.dense * (_MAX_WEIGHT / largest)).astype(np.int16)
        return integers, self.scale * largest / _MAX_WEIGHT


def fit(data: Labelled, documents: np.ndarray, file_weights: np.ndarray, config: FitConfig) -> Weights:
    """Fit on the given documents (indices into `data`); the same input gives the same weights."""
    random = np.random.default_rng(config.seed)
    owner_C, slots = _cuts(data, documents, config, random)
    keep = _frequent(owner_C, slots, data, config)
    number = np.cumsum(keep, dtype=np.int32) - 1
    num_kept = int(keep.sum())
    counts_C = np.array([len(s) for s in slots], dtype=np.float64) + config.shrinkage
    known = [number[s[keep[s]]] for s in slots]
    lengths_C = np.array([len(s) for s in known])
    ends_C = np.cumsum(lengths_C)
    flat = np.concatenate(known) if known else np.zeros(0, dtype=np.int32)
    del slots, known

    target_C = np.clip(data.labels[owner_C] / 5.0, 0.0, 1.0)
    weight_C = _balance(data, owner_C, file_weights)
    weights_V = np.zeros(num_kept, dtype=np.float32)
    squares_V = np.full(num_kept, 1e-6, dtype=np.float32)
    for _ in range(config.epochs):
        order = random.permutation(len(owner_C))
        for low in range(0, len(order), _BATCH):
            batch = order[low : low + _BATCH]
            slots_S = np.concatenate([flat[ends_C[c] - lengths_C[c] : ends_C[c]] for c in batch])
            place_S = np.repeat(np.arange(len(batch)), lengths_C[batch])
            factor = _SCALE / counts_C[batch]
            sums = np.bincount(place_S, weights=weights_V[slots_S], minlength=len(batch))
            said = 1.0 / (1.0 + np.exp(-(sums * factor + BIAS)))
            slope = weight_C[batch] * (said - target_C[batch]) / len(batch)
            gradient_V = np.bincount(slots_S, weights=(slope * factor)[place_S], minlength=num_kept).astype(
                np.float32
            )
            squares_V += gradient_V * gradient_V
            weights_V -= config.learning_rate * gradient_V / np.sqrt(squares_V)
    dense = np.zeros(1 << config.bits, dtype=np.float32)
    dense[keep] = weights_V
    return Weights(dense, _SCALE, BIAS, config.shrinkage, num_kept)


def _cuts(
    data: Labelled, documents: np.ndarray, config: FitConfig, random: np.random.Generator
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return (document of each cut [C], slots of words and pairs of each cut)."""
    owners: list[int] = []
    slots: list[np.ndarray] = []
    low, high = np.log(config.min_cut_words), np.log(config.max_cut_words)
    for document in documents.tolist():
        own, joined = data.words[document], data.pairs[document]
        for _ in range(min(config.cuts_per_document, max(1, len(own) // 150))):
            length = int(np.exp(random.uniform(low, high)))
            start = int(random.integers(0, len(own) - length)) if len(own) > length else 0
            owners.append(document)
            slots.append(np.concatenate([own[start : start + length], joined[start : start + length - 1]]))
    return np.array(owners), slots


def _frequent(owner_C: np.ndarray, slots: list[np.ndarray], data: Labelled, config: FitConfig) -> np.ndarray:
    """bool [2**bits]: slots in at least min_documents cuts of at least min_groups groups and min_files files.

    With fewer groups or files than that in the data (annotations of one source), half of them are asked for.
    """
    size = 1 << config.bits
    documents, groups, files = (np.zeros(size, dtype=np.int32) for _ in range(3))
    group_C, file_C = data.group[owner_C], data.file[owner_C]
    present, num_groups = np.unique(file_C), 0
    for file in present:
        of_file = np.zeros(size, dtype=bool)
        for group in np.unique(group_C[file_C == file]):
            within = np.zeros(size, dtype=np.int32)
            for cut in np.flatnonzero((group_C == group) & (file_C == file)):
                within[np.unique(slots[cut])] += 1
            documents += within
            groups += within > 0
            of_file |= within > 0
            num_groups += 1
        files += of_file
    keep = documents >= config.min_documents
    keep &= groups >= min(config.min_groups, max(1, num_groups // 2))
    keep &= files >= min(config.min_files, max(1, len(present) // 2))
    keep[_single_letters(config.bits)] = False
    return keep


def _single_letters(bits: int) -> np.ndarray:
    """Slots of words of one letter and of their pairs.

    They are variables in mathematics and debris in broken text; a scorer that counts them takes the
    second for the first. "a" and "I" stay.
    """
    letters = [chr(code) for code in range(ord("b"), ord("z") + 1) if chr(code) != "i"]
    text = " ".join(f"{left} {right}" for left in letters for right in letters)
    (batch,) = hash_batches([text], bits, whole=True)
    return np.unique(np.concatenate([batch.words_W, batch.pairs_W[:-1]]))


def _balance(data: Labelled, owner_C: np.ndarray, file_weights: np.ndarray) -> np.ndarray:
    """Weight of each cut: files as configured; within a file a group counts as the root of its size."""
    weight_C = np.zeros(len(owner_C))
    for file in np.unique(data.file[owner_C]):
        chosen = data.file[owner_C] == file
        _, place, counts = np.unique(data.group[owner_C][chosen], return_inverse=True, return_counts=True)
        own = 1.0 / np.sqrt(counts)[place]
        weight_C[chosen] = own / own.sum() * file_weights[file]
    return weight_C / weight_C.mean()
