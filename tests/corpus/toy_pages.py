"""Small made-up documents for the corpus tests."""

from __future__ import annotations

import json
import random
from pathlib import Path

_NOUNS = [
    "plant",
    "river",
    "number",
    "cell",
    "planet",
    "triangle",
    "engine",
    "word",
    "metal",
    "cloud",
    "leaf",
    "stone",
    "wheel",
    "lever",
    "magnet",
    "crystal",
    "island",
    "forest",
    "insect",
    "muscle",
    "nerve",
    "kidney",
    "orbit",
    "comet",
    "valley",
    "glacier",
    "desert",
    "harbour",
    "bridge",
    "tunnel",
    "sentence",
    "verb",
    "chapter",
    "rhyme",
    "fraction",
    "angle",
    "circle",
    "matrix",
    "vector",
    "prime",
]
_VERBS = [
    "grows",
    "changes",
    "moves",
    "turns",
    "rests",
    "divides",
    "joins",
    "carries",
    "holds",
    "follows",
    "bends",
    "melts",
    "freezes",
    "falls",
    "rises",
    "spins",
    "burns",
    "sinks",
    "floats",
    "stretches",
    "shrinks",
    "cools",
    "warms",
    "breaks",
    "heals",
    "spreads",
]
_REASONS = [
    "water",
    "light",
    "heat",
    "time",
    "pressure",
    "air",
    "gravity",
    "salt",
    "energy",
    "sound",
    "friction",
    "oxygen",
    "carbon",
    "sugar",
    "protein",
    "sunlight",
    "rainfall",
    "erosion",
    "rotation",
    "voltage",
    "density",
    "volume",
    "momentum",
]
_LINKS = ("while every", "because a", "although that", "and so one", "until some", "where this", "but no")
_ENDS = (
    "to be of use",
    "without a cause",
    "that we have measured",
    "as they be told",
    "of its own",
    "in the end",
)
_OPENINGS = (
    "Usually",
    "In spring",
    "For this reason",
    "Nobody doubts that",
    "We have seen that",
    "Often",
    "As a rule",
)


def paragraph(seed: int, sentences: int = 6) -> str:
    """English that passes the web rules, different for every seed."""
    chance = random.Random(seed)
    pick = chance.choice
    return " ".join(
        f"{pick(_OPENINGS)} the {pick(_NOUNS)} {pick(_VERBS)} with {pick(_REASONS)} and {pick(_REASONS)}, "
        f"{pick(_LINKS)} {pick(_NOUNS)} near {pick(_NOUNS)} {chance.randrange(10**5)} {pick(_VERBS)} {pick(_ENDS)}."
        for _ in range(sentences)
    )


def page(seed: int) -> str:
    """An HTML page around `paragraph(seed)`, with the furniture of a site."""
    body = "".join(f"<p>{paragraph(100 * seed + i, 4)}</p>" for i in range(3))
    return (
        f"<html><head><title>Page {seed}</title></head><body><nav><a href='/'>Home</a> <a href='/a'>About</a></nav>"
        f"<article><h1>Page {seed}</h1><h2>On the {_NOUNS[seed % 10]}</h2>{body}</article>"
        f"<footer>All rights reserved</footer></body></html>"
    )


def write_inputs(folder: Path, num_pages: int = 30, num_lines: int = 60) -> Path:
    """Write a folder of pages, JSON lines, text and some that fail; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = folder / "pages"
    pages.mkdir()
    for seed in range(num_pages):
        (pages / f"p{seed:03d}.html").write_text(page(seed), encoding="utf-8")
    (pages / "empty.html").write_text("<html><body></body></html>")
    (pages / "picture.png").write_bytes(b"\x89PNG")
    with open(folder / "lines.jsonl", "w", encoding="utf-8") as file:
        for seed in range(num_lines):
            row = {"id": f"row-{seed}", "text": paragraph(10_000 + seed), "license": "CC0-1.0"}
            file.write(json.dumps(row) + "\n")
        file.write(json.dumps({"id": "copy", "text": paragraph(10_000).upper()}) + "\n")
        file.write("not json\n")
        file.write(json.dumps({"id": "short", "text": "Too short to be of any use to anyone at all."}) + "\n")
    return folder
