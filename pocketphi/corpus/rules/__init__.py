"""Rules: small registered functions over a batch of documents, each returning one score per document.

A rule never decides alone: its score is stored, and a document is kept while min <= score <= max.
Thresholds therefore move without reading the documents again. A rule marked `curated` holds for any
text; the others judge web pages only and let curated sources (textbooks, manuals) pass, with their
scores stored all the same.

    @rule("lorem_ipsum", max=0)
    def lorem_ipsum(batch: Batch) -> FloatArray:
        "Number of times the filler text occurs."
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pocketphi.core.errors import ConfigError, did_you_mean
from pocketphi.core.registry import Registry
from pocketphi.corpus.config import CorpusConfig, InputConfig, RuleConfig
from pocketphi.corpus.rules.batch import Batch

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Rule:
    """A named score with its default bounds. `function` is None when a global step fills the score."""

    name: str
    function: Callable[[Batch], FloatArray] | None
    min: float
    max: float
    curated: bool
    about: str


rules: Registry[Rule] = Registry("rule")


def rule(
    name: str, *, min: float = -math.inf, max: float = math.inf, curated: bool = False
) -> Callable[[Callable[[Batch], FloatArray]], Callable[[Batch], FloatArray]]:
    """Decorator: register a scoring function; the first line of its docstring explains it to people."""

    def register(function: Callable[[Batch], FloatArray]) -> Callable[[Batch], FloatArray]:
        about = (function.__doc__ or "").strip().splitlines()[0]
        rules.add(name)(Rule(name, function, min, max, curated, about))
        return function

    return register


def declare(
    name: str, *, about: str, min: float = -math.inf, max: float = math.inf, curated: bool = True
) -> None:
    """Register a rule whose score needs the whole corpus (duplicates)."""
    rules.add(name)(Rule(name, None, min, max, curated, about))


declare("educational", about="Educational value on the 0 to 5 scale of the scorer.")
declare("contamination", max=0.5, about="Largest share of a benchmark item's n-grams found in the document.")
declare(
    "exact_duplicate",
    max=0,
    about="1 when another document that stays has the same text but for case and spaces.",
)
declare(
    "near_duplicate",
    max=0,
    about="Similarity to a document that stays, when it is past near_duplicate_jaccard; else 0.",
)
declare(
    "repeated_lines",
    max=0.5,
    curated=False,
    about="Share of characters in lines that three and more documents of the same web site have.",
)

# Imported for their registrations; the order is the order of columns and of reasons.
from pocketphi.corpus.rules import language, origin, quality, repetition, safety, unsafe  # noqa: E402, F401


@dataclass(frozen=True)
class Bounds:
    """The thresholds of a rule for one source; `applies` is false where the rule only keeps its score."""

    min: float
    max: float
    applies: bool

    def keep(self, score: float) -> bool:
        """Whether the score passes; NaN (no score) passes."""
        return not self.applies or math.isnan(score) or self.min <= score <= self.max


def bounds_for(config: CorpusConfig, source: InputConfig) -> dict[str, Bounds]:
    """Return every rule's bounds for a source: the rule's defaults, the config's, then the source's own."""
    check_names(config.rules, "rules")
    check_names(source.rules, f"{source.name}: rules")
    found: dict[str, Bounds] = {}
    for name, item in rules.items():
        layers = [config.rules.get(name), source.rules.get(name)]
        low, high = item.min, item.max
        applies = item.curated or source.quality == "web"
        for layer in (one for one in layers if one is not None):
            low = layer.min if layer.min is not None else low
            high = layer.max if layer.max is not None else high
            applies = layer.enabled and (applies or layer is source.rules.get(name))
        found[name] = Bounds(low, high, applies)
    return found


def check_names(chosen: Mapping[str, RuleConfig], where: str) -> None:
    """Raise ConfigError for a rule that does not exist, naming the nearest."""
    for name in chosen:
        if name not in rules:
            raise ConfigError(f"{where}: unknown rule '{name}'{did_you_mean(name, rules)}")


def scores(batch: Batch) -> dict[str, FloatArray]:
    """Return the score of every rule that needs only the document itself, by rule name."""
    found: dict[str, FloatArray] = {}
    for name, item in rules.items():
        if item.function is not None:
            found[name] = np.asarray(item.function(batch), dtype=np.float32)
            if found[name].shape != (len(batch),):
                raise ValueError(
                    f"rule '{name}' returned shape {found[name].shape} for {len(batch)} documents"
                )
    return found
