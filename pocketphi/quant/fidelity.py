"""How faithful a quantised file is: the written file, in the engine, against the checkpoint.

On the same text, token by token: the loss of both, the Kullback-Leibler divergence of the file's
distribution from the checkpoint's, and whether both put the same token first. Standard errors are over
the windows of text, since tokens of one window depend on each other.

Legend: T tokens of a window, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from pocketphi.core.errors import DataError, EngineError

Logits = Callable[[Sequence[int]], np.ndarray]
"""Token ids of a window -> logits after each of them, float32 [T, V]."""


@dataclass
class Comparison:
    """Sums over windows; `figures` turns them into the report."""

    _rows: list[tuple[int, float, float, float, int]] = field(default_factory=list)
    _divergences: list[np.ndarray] = field(default_factory=list)

    def add(self, reference_TV: np.ndarray, file_TV: np.ndarray, targets_T: np.ndarray) -> None:
        """Count one window: logits of both models, and the token that really followed each position."""
        p_TV, q_TV = log_softmax(reference_TV), log_softmax(file_TV)
        at = np.arange(len(targets_T))
        divergence_T = (np.exp(p_TV) * (p_TV - q_TV)).sum(axis=1)
        agree = int((reference_TV.argmax(axis=1) == file_TV.argmax(axis=1)).sum())
        self._divergences.append(divergence_T.astype(np.float32))
        self._rows.append(
            (
                len(targets_T),
                -float(p_TV[at, targets_T].sum()),
                -float(q_TV[at, targets_T].sum()),
                float(divergence_T.sum()),
                agree,
            )
        )

    def figures(self) -> dict[str, float]:
        """Return flat figures; losses and divergences in nats per token."""
        if not self._rows:
            raise DataError("no text to compare the models on")
        table = np.array(self._rows, dtype=np.float64)
        tokens = table[:, 0]
        reference, se_reference = mean(table[:, 1], tokens)
        file, se_file = mean(table[:, 2], tokens)
        gap, se_gap = mean(table[:, 2] - table[:, 1], tokens)
        divergence, se_divergence = mean(table[:, 3], tokens)
        agreement, se_agreement = mean(table[:, 4], tokens)
        every = np.concatenate(self._divergences)
        return {
            "num_tokens": int(tokens.sum()),
            "num_windows": len(tokens),
            "reference_nll_per_token": reference,
            "reference_nll_per_token_stderr": se_reference,
            "nll_per_token": file,
            "nll_per_token_stderr": se_file,
            "nll_gap": gap,
            "nll_gap_stderr": se_gap,
            "perplexity_ratio": math.exp(gap),
            "kl_divergence": divergence,
            "kl_divergence_stderr": se_divergence,
            "kl_divergence_median": float(np.median(every)),
            "kl_divergence_p99": float(np.quantile(every, 0.99)),
            "top1_agreement": agreement,
            "top1_agreement_stderr": se_agreement,
        }


def compare(reference: Logits, file: Logits, windows: Iterable[Sequence[int]]) -> dict[str, float]:
    """Run both models over windows of token ids (two tokens or more each); return the figures.

    Raises EngineError when the two give logits of different shapes, DataError when there is no text.
    """
    result = Comparison()
    for ids in windows:
        if len(ids) < 2:
            continue
        ours, theirs = file(ids[:-1]), reference(ids[:-1])
        if ours.shape != theirs.shape:
            raise EngineError(f"logits of shape {ours.shape} against {theirs.shape}: not the same model")
        result.add(theirs, ours, np.asarray(ids[1:]))
    return result.figures()


def mean(sums: np.ndarray, tokens: np.ndarray) -> tuple[float, float]:
    """Return the mean per token and its standard error, with windows as the independent units."""
    mean = sums.sum() / tokens.sum()
    if len(sums) < 2:
        return float(mean), float("nan")
    residual = sums - mean * tokens
    n = len(sums)
    return float(mean), float(np.sqrt(n / (n - 1) * (residual**2).sum()) / tokens.sum())


def log_softmax(logits_TV: np.ndarray) -> np.ndarray:
    """Return log-probabilities, float64 [T, V]."""
    shifted = logits_TV.astype(np.float64) - logits_TV.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
