"""How much of a text is sexual, hateful, harassing, violent or about self-harm: a learned score.

It judges web pages; curated sources keep their scores and pass. The model is a linear one over hashed words
and pairs, of the kind and in the file format of the educational scorer. It reads windows of a hundred words
or so: a sentence and a book are judged by the same measure, and one page on a war makes no book on history
unsafe. `benchmarks/unsafe_scorer.py` trains it again and measures it; docs/concepts/unsafe-text.md says on
what, and how well.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from pocketphi.corpus.educational.scorer import Scorer, load_scorer
from pocketphi.corpus.rules import rule
from pocketphi.corpus.rules.batch import Batch

MODEL_PATH = Path(__file__).with_name("unsafe.npz")
WINDOW_CHARS = 600
MAX_WINDOWS = 32


@lru_cache(maxsize=1)
def _model() -> Scorer:
    return load_scorer(MODEL_PATH)


def windows(text: str) -> list[str]:
    """Cut a text into pieces of about WINDOW_CHARS characters, at most MAX_WINDOWS spread over a long one."""
    count = max(1, round(len(text) / WINDOW_CHARS))
    if count == 1:
        return [text]
    chosen = min(count, MAX_WINDOWS)
    width = len(text) // count
    starts = (i * (len(text) - width) // (chosen - 1) for i in range(chosen))
    return [text[start : start + width] for start in starts]


def unsafe_share(texts: Sequence[str], model: Scorer | None = None) -> np.ndarray:
    """Return the mean over a text's windows of the probability that the window is unsafe, float64 [D]."""
    pieces = [windows(text) for text in texts]
    if not pieces:
        return np.zeros(0)
    found_P = (model or _model()).score([piece for parts in pieces for piece in parts])
    lengths = np.array([len(parts) for parts in pieces])
    return np.add.reduceat(found_P.astype(np.float64), np.cumsum(lengths) - lengths) / lengths


@rule("unsafe_share", max=0.4)
def unsafe_share_rule(batch: Batch) -> np.ndarray:
    """Share of an English text that is sexual, hateful, harassing, violent or about self-harm."""
    # The model knows English only, and "die" is a word of German; the rule on languages ran before.
    english = [meta.get("language", "en") == "en" for meta in batch.meta]
    found = np.zeros(len(batch))
    found[english] = unsafe_share([text for text, asked in zip(batch.texts, english) if asked])
    return found
