"""HTML to text that keeps what educational text is made of: headings, lists, tables, code, formulas.

    page = extract(html)            # Page(text="# Photosynthesis\\n\\nPlants ...", title=..., license=...)

One walk over the tree (walk.py) flattens the page into blocks inside containers; selection.py decides
which blocks are the main content; rendering.py writes them as plain Markdown.
"""

from __future__ import annotations

from dataclasses import dataclass

from pocketphi.corpus.extraction.charset import decode
from pocketphi.corpus.extraction.head import read_head
from pocketphi.corpus.extraction.rendering import render
from pocketphi.corpus.extraction.selection import select
from pocketphi.corpus.extraction.walk import TooManyNodes, flatten, parse

__all__ = ["Page", "TooManyNodes", "decode", "extract"]


_HIDDEN_BODY_SHARE = 0.5


@dataclass
class Page:
    """The main text of a page and what its head says about it."""

    text: str
    title: str = ""
    license: str = ""  # an address or name from rel=license or a Creative Commons link
    url: str = ""  # canonical address
    noai: str = ""  # the directive by which the page forbids learning from it
    truncated: bool = False


def extract(html: str, max_nodes: int = 500_000) -> Page:
    """Return the main content of a page.

    Never raises for bad HTML: whatever a browser would show of it is taken. Raises TooManyNodes past
    `max_nodes` elements.
    """
    root = parse(html)
    if root is None:
        return Page("")
    head = read_head(root)
    flat = flatten(root, max_nodes)
    # Soft hyphens say where a line may be broken; they are no part of a word.
    text = render(select(flat)).replace("\u00ad", "").strip("\n")
    if head.body and len(text) < _HIDDEN_BODY_SHARE * len(head.body):
        # The article is only in the page's metadata: scripts would have put it into the page.
        text = head.body
    return Page(text, head.title, head.license or flat.license, head.url, head.noai)
