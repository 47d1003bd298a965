"""Synthetic text: questions with answers, definitions and worked arithmetic, made by rule.

Every text here is made from a seed that is kept beside it (a dictionary entry, a question of a
training split, two random numbers), so an answer of the model can be traced to what taught it. The
teachers of this module are rules, not language models: what they write is checked by construction.

The artifact holds `documents.jsonl` (text for pre-training) and `chats.jsonl` (messages for
fine-tuning), each row with source, licence and seed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pocketphi.core import artifact, progress
from pocketphi.core.artifact import Artifact
from pocketphi.core.errors import ConfigError, DataError
from pocketphi.synth import arithmetic, dictionary, questions
from pocketphi.synth.text import Chat, Document


@dataclass
class QuestionSource:
    """A file of questions with right answers: a *training* split, never an evaluation split."""

    path: str
    license: str
    max_items: int | None = None
    chats: int = 2000
    """How many of its items also become chats."""

    def __post_init__(self) -> None:
        name = Path(self.path).name
        if any(word in name for word in (".test.", ".validation.", ".dev.", ".all.")):
            raise ConfigError(f"{self.path}: an evaluation split; only training splits may be learned from")


@dataclass
class SynthConfig:
    """What to make. With nothing named, arithmetic alone is made: it needs no input."""

    wordnet: str | None = None
    """Folder with WordNet's data.noun, index.noun and cntlist.rev (Debian: wordnet-base)."""
    definitions: int = 20_000
    """How many dictionary entries become chats, the most frequent words first."""
    questions: list[QuestionSource] = field(default_factory=list)
    arithmetic: int = 3000
    """How many worked arithmetic problems; each becomes a chat, and ten of them a document."""
    items_per_document: int = 8
    seed: int = 0


def run(
    config: SynthConfig, inputs: Mapping[str, Artifact | Path | str] | None = None, *, out: Path | None = None
) -> Artifact:
    """Make the texts and publish them as a `synth` artifact. Takes no input artifact.

    Raises DataError when a named file is missing, unreadable, or yields nothing.
    """
    sources = [Path(q.path) for q in config.questions]
    if config.wordnet:
        sources += [Path(config.wordnet) / name for name in dictionary.FILES]
    for path in sources:
        if not path.is_file():
            raise DataError(f"{path}: no such file", hint="correct the path in the recipe's synth section")
    out = out or artifact.default_path("synth", config, (), sources)
    ask: dict[str, Any] = {"kind": "synth", "config": config, "sources": sources}
    if done := artifact.reuse(out, **ask):
        return done
    with artifact.create(out, **ask, seed=config.seed) as draft:
        documents = _write(draft.path / "documents.jsonl", _documents(config))
        chats = _write(draft.path / "chats.jsonl", _chats(config))
        draft.counts.update(
            documents=sum(documents.values()),
            chats=sum(chats.values()),
            **{f"documents_{k}": v for k, v in documents.items()},
            **{f"chats_{k}": v for k, v in chats.items()},
        )
    return draft.artifact


def plan(config: SynthConfig, inputs_plan: Mapping[str, Any]) -> dict[str, float]:
    """Forecast: about 20k items a second, 400 bytes an item, on one core."""
    items = config.arithmetic + (150_000 if config.wordnet else 0)
    items += sum(q.max_items or 20_000 for q in config.questions)
    return {"wall_s": 1 + items / 20_000, "peak_memory_bytes": 300e6, "disk_bytes": 400.0 * items}


def _documents(config: SynthConfig) -> Iterator[Document]:
    if config.wordnet:
        yield from dictionary.documents(Path(config.wordnet), config.seed)
    for source in config.questions:
        yield from questions.documents(
            Path(source.path), source.license, config.items_per_document, source.max_items
        )
    yield from arithmetic.documents(config.arithmetic, config.seed)


def _chats(config: SynthConfig) -> Iterator[Chat]:
    if config.wordnet:
        yield from dictionary.chats(Path(config.wordnet), config.definitions, config.seed)
    for source in config.questions:
        yield from questions.chats(Path(source.path), source.license, source.chats, config.seed)
    yield from arithmetic.chats(config.arithmetic, config.seed)


def _write(path: Path, rows: Iterable[Document | Chat]) -> dict[str, int]:
    """Write rows as JSON lines; return how many came from each source."""
    counts: dict[str, int] = {}
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row.as_row(), ensure_ascii=False) + "\n")
            counts[row.source] = counts.get(row.source, 0) + 1
    progress.say(f"synth: {sum(counts.values())} rows in {path.name} from {len(counts)} sources")
    return counts
