"""The corpus: from raw pages to scored, filtered, deduplicated, decontaminated, explained documents.

    corpus = pocketphi.corpus.run(CorpusConfig(inputs=("pages/",)), {})
    for batch in pocketphi.corpus.read(corpus, columns=["id", "text"], phase=1): ...

The names below are imported when first used: reading a configuration needs no Parquet library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pocketphi.corpus.config import CorpusConfig, InputConfig, PhaseConfig, RuleConfig

if TYPE_CHECKING:
    from pocketphi.corpus.pipeline import run
    from pocketphi.corpus.planning import plan
    from pocketphi.corpus.reading import latest, read, stats, why
    from pocketphi.corpus.scoring import score_documents

__all__ = [
    "CorpusConfig",
    "InputConfig",
    "PhaseConfig",
    "RuleConfig",
    "latest",
    "plan",
    "read",
    "run",
    "score_documents",
    "stats",
    "why",
]

_PLACES = {
    "run": "pipeline",
    "plan": "planning",
    "read": "reading",
    "stats": "reading",
    "latest": "reading",
    "why": "reading",
    "score_documents": "scoring",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'pocketphi.corpus' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(f"pocketphi.corpus.{_PLACES[name]}"), name)
