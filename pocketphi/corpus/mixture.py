"""What a training phase will read of a corpus: tokens and epochs of each source, before anything is trained.

    rows = phase_plan(chars, tokens_wanted=2_000_000_000, weights={"textbook*": 3, "web": 1})

Tokens are estimated from characters. Sources are those of the configuration (`InputConfig.name`), the same
that the trainer's `mixture` matches.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass

from pocketphi.core.artifact import Artifact
from pocketphi.core.config import parse
from pocketphi.core.errors import ConfigError
from pocketphi.corpus.config import MAX_EPOCHS, CorpusConfig
from pocketphi.corpus.reading import stats
from pocketphi.corpus.statistics import CHARS_PER_TOKEN


@dataclass(frozen=True)
class SourcePlan:
    """Of one source in one phase. `weight` is what the trainer's `mixture` takes."""

    source: str
    tokens: int  # in the corpus
    tokens_read: int
    epochs: float
    share: float
    weight: float

    @property
    def warning(self) -> str:
        if self.epochs <= MAX_EPOCHS:
            return ""
        needed = round(self.tokens_read / MAX_EPOCHS)
        return (
            f"{self.source} is read {self.epochs:.1f} times; past {MAX_EPOCHS:g} repetitions add little: "
            f"lower its weight, or find {needed - self.tokens} more tokens of its kind"
        )


def phase_plan(
    chars: Mapping[str, int], tokens_wanted: int | None = None, weights: Mapping[str, float] | None = None
) -> list[SourcePlan]:
    """Plan one phase over sources with `chars` characters each.

    `weights` maps patterns of source names to shares (of the trainer's rows, whatever the sources' sizes;
    the first match takes a source); without it sources are read in proportion to their size. Sources that
    share a pattern are read equally often. `tokens_wanted` None reads all once. Raises ConfigError for a
    pattern that matches no source and for weights that are not positive.
    """
    tokens = _tokens(chars)
    weights = dict(weights or {"*": 1.0})
    groups: dict[str, list[str]] = {pattern: [] for pattern in weights}
    for name in tokens:
        match = next((pattern for pattern in weights if fnmatch.fnmatch(name, pattern)), None)
        if match is not None:
            groups[match].append(name)
    for pattern, names in groups.items():
        if not weights[pattern] > 0:
            raise ConfigError(f"the weight of '{pattern}' must be positive, found {weights[pattern]}")
        if not names and tokens:
            raise ConfigError(
                f"'{pattern}' matches no source of this phase", hint=f"sources: {', '.join(tokens)}"
            )
    wanted = tokens_wanted if tokens_wanted is not None else sum(tokens.values())
    total = sum(weights.values())
    rows = []
    for pattern, names in groups.items():
        size = sum(tokens[name] for name in names)
        for name in names:
            epochs = wanted * weights[pattern] / total / size
            read = tokens[name] * epochs
            weight = weights[pattern] * tokens[name] / size
            rows.append(SourcePlan(name, tokens[name], round(read), epochs, read / max(wanted, 1), weight))
    return rows


def corpus_plan(
    found: Artifact,
    tokens_wanted: Mapping[int, int] | None = None,
    weights: Mapping[int, Mapping[str, float]] | None = None,
) -> dict[int, list[SourcePlan]]:
    """Plan phases 1 and 2 of a corpus.

    A phase without weights uses the sources' `epochs` (1 where none is given), and without tokens wanted
    reads exactly that.
    """
    config = parse(CorpusConfig, found.config, where=str(found.path))
    counted = stats(found)["sources"]
    plans: dict[int, list[SourcePlan]] = {}
    for phase in (1, 2):
        chars = {name: entry.get(f"chars_phase{phase}", 0) for name, entry in counted.items()}
        wanted = (tokens_wanted or {}).get(phase)
        chosen = (weights or {}).get(phase)
        if not chosen:
            epochs = {source.name or "": source.epochs.get(str(phase), 1.0) for source in config.sources()}
            sized = {n: tokens * epochs.get(n, 1.0) for n, tokens in _tokens(chars).items()}
            chosen = {_literal(name): value for name, value in sized.items()}
            wanted = round(sum(sized.values())) if wanted is None else wanted
        plans[phase] = phase_plan(chars, wanted, chosen) if any(chars.values()) else []
    return plans


def _tokens(chars: Mapping[str, int]) -> dict[str, int]:
    return {name: max(1, round(count / CHARS_PER_TOKEN)) for name, count in chars.items() if count}


def _literal(name: str) -> str:
    """A pattern that matches this name alone."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)
