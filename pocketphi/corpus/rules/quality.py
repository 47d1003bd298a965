"""Rules on the shape of a text: those of Gopher (Rae et al. 2021, table A1), C4 (Raffel et al. 2020,
section 2.2) and FineWeb (Penedo et al. 2024, section 3.6), one score each."""

from __future__ import annotations

import re

import numpy as np

from pocketphi.corpus.rules import rule
from pocketphi.corpus.rules.batch import Batch, ratio

_STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
_LETTER = re.compile(r"[^\W\d_]")
_SENTENCE_END = re.compile(r"[.!?][\"'”’)\]]?(?=\s|$)")
_LINE_END = tuple('.!?:;"”’)…。！？')
_BULLETS = ("- ", "* ", "• ", "● ", "‣ ", "– ")
_POLICY = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)
_BOILERPLATE = (
    "all rights reserved", "©", "accept cookies", "accept all cookies", "subscribe to", "subscribe now",
    "sign up for", "sign up to", "log in", "sign in", "share this", "share on", "follow us", "click here",
    "read more", "back to top", "add to cart", "newsletter", "skip to content", "skip to main content",
    "enable javascript", "leave a reply", "leave a comment", "posted by", "posted in", "related posts",
    "related articles", "related stories", "advertisement", "powered by", "terms of use",
    "terms of service", "terms and conditions", "privacy policy", "cookie policy",
)  # fmt: skip
_BOILERPLATE_LINE_CHARS = 120
_SHORT_LINE_CHARS = 30


@rule("num_words", min=50, max=100_000)
def num_words(batch: Batch) -> np.ndarray:
    """Number of words (Gopher: 50 to 100,000)."""
    return batch.num_words


@rule("num_chars", min=40, curated=True)
def num_chars(batch: Batch) -> np.ndarray:
    """Number of characters: what is left of an empty page is no document."""
    return np.array([len(text) for text in batch.texts])


@rule("mean_word_chars", min=3, max=10)
def mean_word_chars(batch: Batch) -> np.ndarray:
    """Mean number of characters of a word (Gopher: 3 to 10)."""
    _, lengths, starts = batch.word_ids
    sums = np.concatenate([[0], np.cumsum(lengths)])
    return ratio(sums[starts[1:]] - sums[starts[:-1]], batch.num_words)


@rule("symbols_per_word", max=0.1)
def symbols_per_word(batch: Batch) -> np.ndarray:
    """Hash signs and ellipses per word (Gopher: at most 0.1)."""
    counts = []
    for text in batch.texts:
        headings = text.count("\n#") + text.startswith("#")  # of our own Markdown, not of the page
        marks = text.count("#") - headings if headings == 0 else _hashes_outside_headings(text)
        counts.append(marks + text.count("...") + text.count("…"))
    return ratio(counts, batch.num_words)


def _hashes_outside_headings(text: str) -> int:
    return sum(line.lstrip("#").count("#") for line in text.split("\n") if "#" in line)


@rule("bullet_lines", max=0.9)
def bullet_lines(batch: Batch) -> np.ndarray:
    """Share of lines that start with a bullet (Gopher: at most 0.9)."""
    counts = [sum(line.startswith(_BULLETS) for line in lines) for lines in batch.lines]
    return ratio(counts, [len(lines) for lines in batch.lines])


@rule("ellipsis_lines", max=0.3)
def ellipsis_lines(batch: Batch) -> np.ndarray:
    """Share of lines that end in an ellipsis (Gopher: at most 0.3)."""
    counts = [sum(line.endswith(("...", "…")) for line in lines) for lines in batch.lines]
    return ratio(counts, [len(lines) for lines in batch.lines])


@rule("letter_words", min=0.7)
def letter_words(batch: Batch) -> np.ndarray:
    """Share of words with at least one letter (Gopher: 0.8; 0.7 here, tables and formulas survive)."""
    search = _LETTER.search
    counts = [sum(1 for word in words if word[0].isalpha() or search(word)) for words in batch.words]
    return ratio(counts, batch.num_words)


@rule("stop_words", min=2)
def stop_words(batch: Batch) -> np.ndarray:
    """Number of different common English words (Gopher: at least 2 of 8)."""
    return np.array([len(_STOP_WORDS.intersection(words)) for words in map(_lower_set, batch.words)])


def _lower_set(words: list[str]) -> set[str]:
    return {word.lower() for word in words[:2000]}


@rule("sentences", min=3)
def sentences(batch: Batch) -> np.ndarray:
    """Number of sentences (C4: at least 3 to 5)."""
    return np.array([len(_SENTENCE_END.findall(text)) for text in batch.texts])


@rule("braces_per_word", max=0.05)
def braces_per_word(batch: Batch) -> np.ndarray:
    """Curly brackets per word (C4 rejects any; code and formulas are wanted here, scripts are not)."""
    return ratio([text.count("{") + text.count("}") for text in batch.texts], batch.num_words)


@rule("lorem_ipsum", max=0)
def lorem_ipsum(batch: Batch) -> np.ndarray:
    """Number of times the filler text occurs (C4: never)."""
    return np.array([text.count("lorem ipsum") for text in batch.lowered])


@rule("script_lines", max=0.1)
def script_lines(batch: Batch) -> np.ndarray:
    """Share of lines that ask for JavaScript or speak of cookies and policies (C4 removes them)."""
    counts = []
    for text in batch.lowered:
        hits = 0
        if "javascript" in text or "cookie" in text or "policy" in text or "terms of" in text:
            for line in text.split("\n"):
                hits += ("enable javascript" in line) or any(mark in line for mark in _POLICY)
        counts.append(hits)
    return ratio(counts, [len(lines) for lines in batch.lines])


@rule("longest_word_chars", max=1000, curated=True)
def longest_word_chars(batch: Batch) -> np.ndarray:
    """Characters of the longest word (C4: at most 1,000; data, not text)."""
    return np.array([max(map(len, words), default=0) for words in batch.words])


@rule("ended_lines", min=0.12)
def ended_lines(batch: Batch) -> np.ndarray:
    """Share of lines that end in punctuation (FineWeb: at least 0.12)."""
    counts = [sum(line.endswith(_LINE_END) for line in lines) for lines in batch.lines]
    return ratio(counts, [len(lines) for lines in batch.lines])


@rule("short_lines", max=0.67)
def short_lines(batch: Batch) -> np.ndarray:
    """Share of lines of at most 30 characters (FineWeb: at most 0.67)."""
    counts = [sum(len(line) <= _SHORT_LINE_CHARS for line in lines) for lines in batch.lines]
    return ratio(counts, [len(lines) for lines in batch.lines])


@rule("lines_per_word", max=0.3)
def lines_per_word(batch: Batch) -> np.ndarray:
    """Lines per word (FineWeb: at most 0.3; more is a list of keywords)."""
    return ratio([len(lines) for lines in batch.lines], batch.num_words)


@rule("boilerplate_lines", max=0.3)
def boilerplate_lines(batch: Batch) -> np.ndarray:
    """Share of lines that are site furniture: sharing, signing in, rights, newsletters."""
    counts = []
    for text in batch.lowered:
        phrases = [phrase for phrase in _BOILERPLATE if phrase in text]
        counts.append(
            sum(
                1
                for line in text.split("\n")
                if len(line) <= _BOILERPLATE_LINE_CHARS and any(phrase in line for phrase in phrases)
            )
            if phrases
            else 0
        )
    return ratio(counts, [len(lines) for lines in batch.lines])


@rule("upper_case", max=0.3)
def upper_case(batch: Batch) -> np.ndarray:
    """Share of words of two and more letters written in capitals: shouting."""
    counts = [sum(1 for word in words if len(word) > 2 and word.isupper()) for words in batch.words]
    return ratio(counts, batch.num_words)
