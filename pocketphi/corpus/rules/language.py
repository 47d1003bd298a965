"""Which language a text is in."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from pocketphi.corpus.rules import rule
from pocketphi.corpus.rules.batch import Batch

_SLICE_CHARS = 300


@lru_cache(maxsize=1)
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def sample(text: str) -> str:
    """The beginning and the middle of a text: a foreign menu or a quotation alone does not decide."""
    if len(text) <= 2 * _SLICE_CHARS:
        return text
    middle = len(text) // 2
    return f"{text[:_SLICE_CHARS]} {text[middle : middle + _SLICE_CHARS]}"


def identify(text: str) -> tuple[str, dict[str, float]]:
    """Return the likeliest language (ISO 639-1) and the probability of each."""
    ranked = _identifier().rank(sample(text))
    return ranked[0][0], dict(ranked)


@rule("language", min=0.5, curated=True)
def language(batch: Batch) -> np.ndarray:
    """Probability that the text is in one of the languages asked for; its language goes into meta."""
    found = np.ones(len(batch))
    for index, document in enumerate(batch.documents):
        name, probabilities = identify(document.text)
        document.meta["language"] = name
        if batch.context.languages:
            found[index] = sum(probabilities.get(wanted, 0.0) for wanted in batch.context.languages)
    return found
