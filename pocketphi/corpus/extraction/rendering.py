"""Blocks to Markdown: headings, lists, quotes, tables and code keep their marks."""

from __future__ import annotations

from collections.abc import Sequence

from pocketphi.corpus.extraction.walk import Block


def render(blocks: Sequence[Block]) -> str:
    """Return the text of the blocks, one blank line between them, none inside a list."""
    pieces: list[str] = []
    before: Block | None = None
    for block in blocks:
        text = _text(block)
        if not text:
            continue
        tight = before is not None and before.kind == "item" and block.kind == "item"
        if pieces:
            pieces.append("\n" if tight else "\n\n")
        pieces.append(text)
        before = block
    return "".join(pieces)


def _text(block: Block) -> str:
    if block.kind == "heading":
        return f"{'#' * block.level} {block.text.replace(chr(10), ' ')}"
    if block.kind == "item":
        indent = "  " * block.level
        marker = block.marker or "  "
        return indent + marker + block.text.replace("\n", f"\n{indent}{' ' * len(marker)}")
    if block.kind == "quote":
        return "> " + block.text.replace("\n", "\n> ")
    if block.kind == "code":
        fence = "````" if "```" in block.text else "```"
        return f"{fence}\n{block.text}\n{fence}"
    return block.text
