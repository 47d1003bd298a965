"""Definitions from a WordNet database: "What is a plant?" and what a dictionary answers.

Format: the `data.noun` and `index.noun` files of WordNet 3.x (wndb(5WN)); `cntlist.rev` counts how
often each sense was met in running text, which says what is common enough to be asked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pocketphi.core.errors import DataError
from pocketphi.synth.text import Chat, Document, article, generator, sentence

FILES = ("data.noun", "data.verb", "data.adj", "cntlist.rev")
_LICENSE = "WordNet-3.0"
_SOURCE = "wordnet"
_PARTS = {"n": "noun", "v": "verb", "a": "adjective", "s": "adjective"}
_ENTRIES_PER_DOCUMENT = 12


@dataclass(frozen=True)
class Sense:
    """One synset under one of its words. `count` is how often the sense was seen in tagged text."""

    word: str
    part: str
    synonyms: tuple[str, ...]
    gloss: str
    examples: tuple[str, ...]
    parents: tuple[str, ...]
    offset: str
    count: int


def read(folder: Path) -> list[Sense]:
    """Read nouns, verbs and adjectives, each synset under its first word.

    Raises DataError naming file and line when a line is not WordNet's format.
    """
    counts = _counts(folder / "cntlist.rev")
    senses: list[Sense] = []
    names: dict[tuple[str, str], str] = {}
    raw = []
    for part, file in (("n", "data.noun"), ("v", "data.verb"), ("a", "data.adj")):
        for number, line in enumerate(_lines(folder / file), start=1):
            if line.startswith("  "):  # the licence header
                continue
            try:
                fields, gloss = line.split("|", 1)
                parts = fields.split()
                offset, lexical_file, _, num_words = parts[0], parts[1], parts[2], int(parts[3], 16)
                words = [parts[4 + 2 * i].replace("_", " ").split("(")[0] for i in range(num_words)]
                ids = [parts[5 + 2 * i] for i in range(num_words)]
                pointers = parts[4 + 2 * num_words :]
                parents = [
                    pointers[i + 1] for i in range(1, len(pointers) - 3, 4) if pointers[i] in ("@", "@i")
                ]
            except (ValueError, IndexError):
                raise DataError(f"{folder / file}:{number}: not a line of WordNet's data format") from None
            names[part, offset] = words[0]
            key = f"{words[0].lower().replace(' ', '_')}%{'nv a'.index(part) + 1}:{lexical_file}:{int(ids[0], 16):02d}"
            raw.append((part, offset, words, gloss.strip(), parents, counts.get(key, 0)))
    for part, offset, words, gloss, parents, count in raw:
        definition, *examples = re.split(r';\s*"', gloss)
        senses.append(
            Sense(
                word=words[0],
                part=part,
                synonyms=tuple(words[1:]),
                gloss=definition.strip(" ;"),
                examples=tuple(e.strip(' ";') for e in examples),
                parents=tuple(names[part, p] for p in parents if (part, p) in names),
                offset=f"{part}{offset}",
                count=count,
            )
        )
    if not senses:
        raise DataError(f"{folder}: holds no dictionary entry")
    return senses


def documents(folder: Path, seed: int) -> Iterator[Document]:
    """Yield the dictionary as glossary pages, the entries of a page in a random mix."""
    senses = [s for s in read(folder) if len(s.gloss) > 10]
    generator(seed, "dictionary documents").shuffle(senses)
    for start in range(0, len(senses), _ENTRIES_PER_DOCUMENT):
        page = senses[start : start + _ENTRIES_PER_DOCUMENT]
        text = "\n\n".join(_entry(sense) for sense in page)
        yield Document(text, _SOURCE, _LICENSE, tuple(s.offset for s in page))


def chats(folder: Path, count: int, seed: int) -> Iterator[Chat]:
    """Yield up to `count` definitions as chats, frequent senses first, each word once."""
    random_ = generator(seed, "dictionary chats")
    senses = sorted(read(folder), key=lambda s: (-s.count, s.offset))
    asked: set[str] = set()
    made = 0
    for sense in senses:
        if made == count:
            return
        plain = sense.word.replace("-", "").replace(" ", "").isalpha()
        if sense.word.lower() in asked or not plain or len(sense.gloss) < 12:
            continue
        asked.add(sense.word.lower())
        made += 1
        # The plain question most often; now and then another way of asking.
        form = random_.choice((0, 0, 0, 1, 2, 3))
        yield Chat(_question(sense, form), _answer(sense), _SOURCE, _LICENSE, sense.offset)


def _entry(sense: Sense) -> str:
    shown = f"{sense.word} ({_PARTS[sense.part]}): {sentence(sense.gloss)}"
    if sense.synonyms:
        shown += f" Also called {', '.join(sense.synonyms[:3])}."
    if sense.parents and sense.part == "n":
        shown += f" It is a kind of {sense.parents[0]}."
    if sense.examples:
        shown += f" For example: {sentence(sense.examples[0])}"
    return shown


def _question(sense: Sense, form: int) -> str:
    word = sense.word
    if sense.part != "n":
        return [
            f'What does "{word}" mean?',
            f"What does {word} mean?",
            f"Define {word}.",
            f'Explain the word "{word}".',
        ][form]
    is_name = word[:1].isupper()
    thing = word if is_name or _is_mass(sense) else article(word)
    return [f"What is {thing}?", f"Tell me what {thing} is.", f'What does "{word}" mean?', f"Define {word}."][
        form
    ]


def _answer(sense: Sense) -> str:
    word, gloss = sense.word, sense.gloss
    if sense.part == "n":
        gloss = re.sub(r"^\([^)]*\)\s*", "", gloss)
        if re.match(r"(a|an|the|any|one|some|someone|something)\b", gloss):
            subject = word if word[:1].isupper() or _is_mass(sense) else article(word)
            text = sentence(f"{subject} is {gloss}")
        else:
            text = sentence(f"{word}: {gloss}")
        if sense.parents and sense.parents[0].lower() not in gloss.lower():
            text += f" It is a kind of {sense.parents[0]}."
    else:
        text = sentence(f'"{word}" means {gloss}')
    if sense.examples:
        text += f" For example: {sentence(sense.examples[0])}"
    return text


def _is_mass(sense: Sense) -> bool:
    """Guess whether the noun takes no article, from the gloss: only "a ..." glosses are countable."""
    return re.match(r"(\([^)]*\)\s*)?(a|an|any|one|someone)\b", sense.gloss) is None


def _counts(path: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    for line in _lines(path):
        parts = line.split()
        if len(parts) == 3 and parts[2].isdigit():
            key = ":".join(parts[0].split(":")[:3])
            found[key] = found.get(key, 0) + int(parts[2])
    return found


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot read: {error}") from None
