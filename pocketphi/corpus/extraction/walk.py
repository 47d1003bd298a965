"""One walk over the tree: the page as blocks of text inside containers.

A block is what a browser would set as one paragraph, heading, list item, table or piece of code. A
container is an element that groups blocks; selection looks at containers only, so the cost of
deciding does not grow with inline markup.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lxml import etree

from pocketphi.corpus.extraction.formulas import delimited, is_display, latex_of

# Never text of the page.
_DROP = frozenset(
    [
        "script",
        "style",
        "noscript",
        "template",
        "svg",
        "iframe",
        "object",
        "embed",
        "applet",
        "canvas",
        "audio",
        "video",
        "map",
        "area",
        "head",
        "link",
        "meta",
        "base",
        "source",
        "track",
        "param",
        "button",
        "select",
        "option",
        "optgroup",
        "input",
        "textarea",
        "datalist",
        "dialog",
        "menu",
        "frameset",
        "frame",
        "noframes",
        "progress",
        "meter",
        "nav",
    ]
)
_INLINE = frozenset(
    [
        "a",
        "abbr",
        "acronym",
        "b",
        "bdi",
        "bdo",
        "big",
        "cite",
        "data",
        "del",
        "dfn",
        "em",
        "font",
        "i",
        "ins",
        "kbd",
        "label",
        "mark",
        "nobr",
        "q",
        "s",
        "samp",
        "small",
        "span",
        "strike",
        "strong",
        "sub",
        "sup",
        "time",
        "tt",
        "u",
        "var",
        "wbr",
        "img",
        "ruby",
        "rb",
        "rt",
        "rp",
        "code",
        "math",
        "center",
    ]
)
_CONTAINERS = frozenset(
    [
        "body",
        "div",
        "section",
        "article",
        "main",
        "aside",
        "header",
        "footer",
        "form",
        "td",
        "th",
        "blockquote",
        "ul",
        "ol",
        "dl",
        "li",
        "figure",
        "fieldset",
        "details",
        "center",
        "table",
        "tbody",
        "tr",
        "html",
        "hgroup",
        "address",
    ]
)
_HEADINGS = {"h1": 1, "h2": 2, "h3": 3, "h4": 4, "h5": 5, "h6": 6}
_HIDDEN = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.IGNORECASE)
_POWER = re.compile(r"[-−+]?\d{1,4}|[a-z]|[-−+]\d*")
_FORMULA_IMAGE = re.compile(r"\b(?:tex|latex|mwe-math\S*|math|equation|formula)\b", re.IGNORECASE)
_CC = re.compile(
    r"https?://creativecommons\.org/(?:licenses|publicdomain)/[a-z\-+]+(?:/[\d.]+)?", re.IGNORECASE
)
_MAX_DEPTH = 150  # three frames each; deeper than any page that people read
_EMPTY_PAGE_CHARS = 300
_LONG_TAG_CHARS = 4000
_TAG_NAME = re.compile(r"[a-zA-Z][\w-]{0,30}")
_MAX_ATTRIBUTES = 500
_MAX_TABLE_CELLS = 5000


class TooManyNodes(ValueError):
    """The page has more elements than the limit."""


@dataclass(slots=True)
class Container:
    """An element that groups blocks. `names` is its class, id and role, lower case."""

    index: int
    parent: int  # -1 for the root
    tag: str
    names: str
    itemprop: str = ""
    depth: int = 0


@dataclass(slots=True)
class Block:
    """One paragraph-like piece: `kind` is text, heading, item, code, table, quote or rule."""

    kind: str
    text: str
    container: int
    tag: str = ""
    link_chars: int = 0
    level: int = 0  # of a heading, or of nesting of a list item
    marker: str = ""  # "- " or "3. " before the first block of a list item
    num_links: int = 0


@dataclass
class FlatPage:
    blocks: list[Block] = field(default_factory=list)
    containers: list[Container] = field(default_factory=list)
    license: str = ""


def parse(html: str) -> Any | None:
    """Return the root element of a page, None when there is nothing in it."""
    parser = etree.HTMLParser(encoding="utf-8", remove_comments=True, remove_pis=True, huge_tree=True)
    html = html.replace("\0", "") if "\0" in html else html
    # A start tag lies between two ">", and few pieces are this long: only those are searched.
    pieces = html.split(">")
    if max(map(len, pieces)) > _LONG_TAG_CHARS:
        html = ">".join([_bounded(piece) if len(piece) > _LONG_TAG_CHARS else piece for piece in pieces])
    try:
        return etree.fromstring(html.encode("utf-8", "replace"), parser)
    except (etree.ParserError, etree.XMLSyntaxError, ValueError):
        return None


def _bounded(piece: str) -> str:
    """A start tag of more attributes than any page needs loses them: libxml2 compares each with all others."""
    chunks = piece.split("<")
    for number, chunk in enumerate(chunks):
        if (
            number
            and len(chunk) > _LONG_TAG_CHARS
            and len(chunk.split(None, _MAX_ATTRIBUTES)) > _MAX_ATTRIBUTES
        ):
            name = _TAG_NAME.match(chunk)
            chunks[number] = name.group() if name else chunk
    return "<".join(chunks)


def flatten(root: Any, max_nodes: int) -> FlatPage:
    """Walk the tree once. Raises TooManyNodes past `max_nodes` elements.

    A page of almost no text is walked again, into navigation, noscript and hidden parts as well: an end tag
    that is missing puts the whole page inside, and a page that is sent in pieces keeps them hidden until a
    script puts them in their place.
    """
    walker = _Walker(max_nodes, _DROP)
    walker.element(root, -1, 0)
    walker.flush()
    if sum(len(block.text) for block in walker.page.blocks) < _EMPTY_PAGE_CHARS:
        again = _Walker(max_nodes, _DROP - {"nav", "noscript", "menu", "dialog", "button"}, show_hidden=True)
        again.element(root, -1, 0)
        again.flush()
        if len(again.page.blocks) > len(walker.page.blocks):
            return again.page
    return walker.page


class _Walker:
    def __init__(self, max_nodes: int, drop: frozenset[str], *, show_hidden: bool = False) -> None:
        self.page = FlatPage()
        self.drop = drop
        self.show_hidden = show_hidden  # parts that group others, not single paragraphs
        self.left = max_nodes
        self.parts: list[str] = []  # of the block that is being gathered
        self.link_chars = 0
        self.num_links = 0
        self.in_link = 0
        self.container = -1
        self.kind, self.tag, self.level = "text", "", 0
        self.lists: list[list[Any]] = []  # open lists: [tag, next number]
        self.marker = ""
        self.quotes = 0

    def flush(self) -> None:
        """End the block that is being gathered."""
        if self.parts:
            text = "".join(self.parts)
            if "\n" in text:
                lines = [" ".join(line.split()) for line in text.split("\n")]
                text = "\n".join([line for line in lines if line])
            else:
                text = " ".join(text.split())
            if text:
                kind = "quote" if self.quotes and self.kind == "text" else self.kind
                level = self.level
                if self.lists and kind == "text":
                    kind, level = "item", len(self.lists) - 1
                self.page.blocks.append(
                    Block(
                        kind,
                        text,
                        self.container,
                        self.tag,
                        self.link_chars,
                        level,
                        self.marker,
                        self.num_links,
                    )
                )
                self.marker = ""
            self.parts = []
        self.link_chars = self.num_links = 0

    def text(self, text: str | None) -> None:
        if text:
            if not self.parts and text.isspace():
                return  # most text of a page: indentation between elements
            # Line ends inside a paragraph are spaces; only <br> ends a line. Runs of spaces go in flush().
            self.parts.append(text.replace("\n", " "))
            if self.in_link:
                self.link_chars += len(text.strip())

    def element(self, element: Any, container: int, depth: int) -> None:
        """Handle one element and everything in it (not its tail)."""
        self.left -= 1
        if self.left < 0:
            raise TooManyNodes("more elements than max_nodes")
        tag = element.tag
        if not isinstance(tag, str):
            return
        if tag in self.drop:
            if tag == "script" and element.get("type") and element.text:
                self.script(element, element.get("type").lower(), container, depth)
            return
        if depth > _MAX_DEPTH:
            # Deeper than any page means it: take the text, without its structure.
            self.text(" ".join(element.itertext()))
            return
        if tag in _INLINE:
            self.inline(element, tag, container, depth)
        elif tag == "br":
            self.parts.append("\n")
        elif tag == "pre":
            self.pre(element, container)
        elif tag in _HEADINGS:
            self.block(element, container, depth, "heading", _HEADINGS[tag])
        elif tag == "table":
            self.table(element, container, depth)
        elif tag in _CONTAINERS:
            self.group(element, tag, container, depth)
        elif tag == "hr":
            self.flush()
        else:  # p, dt, dd, figcaption, summary, legend, caption and unknown elements
            self.block(element, container, depth, "text", 0)

    def script(self, element: Any, kind: str, container: int, depth: int) -> None:
        """Two kinds of script are text: formulas for MathJax, and the articles of Blogger's templates."""
        if kind.startswith("math/tex"):
            self.parts.append(delimited(element.text, "display" in kind))
        elif kind == "text/template" and element.text.lstrip().startswith("<") and "<p" in element.text:
            inner = parse(element.text)
            body = inner.find("body") if inner is not None else None
            if body is not None:
                self.children(body, container, depth + 1)

    def children(self, element: Any, container: int, depth: int) -> None:
        self.text(element.text)
        for child in element:
            self.element(child, container, depth + 1)
            self.text(child.tail)

    def inline(self, element: Any, tag: str, container: int, depth: int) -> None:
        if tag == "a":
            address = element.get("href")
            if address:
                if "creativecommons.org/" in address and not self.page.license:
                    found = _CC.match(address)
                    self.page.license = found.group() if found else ""
                self.num_links += 1
                self.in_link += 1
                self.children(element, container, depth)
                self.in_link -= 1
                return
        elif tag == "math":
            latex = latex_of(element)
            self.parts.append(delimited(latex, is_display(element)))
            return
        elif tag == "img":
            names = element.get("class") or ""
            if names and _FORMULA_IMAGE.search(names):
                self.parts.append(delimited(element.get("alt") or "", False))
            return
        elif tag == "code":
            if len(element) == 0 and element.text and "\n" in element.text.strip():
                self.pre(element, container)
                return
        elif tag in ("sup", "sub"):
            inner = (element.text or "").strip()
            if len(element) == 0 and _POWER.fullmatch(inner) and self.parts and self.parts[-1][-1:].isalnum():
                self.text(("^" if tag == "sup" else "") + inner if tag == "sup" else inner)
                return
        if _hidden(element) and tag == "span":
            return
        self.children(element, container, depth)

    def block(self, element: Any, container: int, depth: int, kind: str, level: int) -> None:
        if _hidden(element):
            return
        self.flush()
        before = self.kind, self.tag, self.level, self.container
        self.kind, self.tag, self.level, self.container = kind, element.tag, level, container
        self.children(element, container, depth)
        self.flush()
        self.kind, self.tag, self.level, self.container = before

    def group(self, element: Any, tag: str, container: int, depth: int) -> None:
        if tag not in ("html", "body") and not self.show_hidden and _hidden(element):
            return
        self.flush()
        names = " ".join(filter(None, (element.get("class"), element.get("id"), element.get("role")))).lower()
        if tag in ("tbody", "tr") and not names:
            inside = container
        else:
            inside = len(self.page.containers)
            itemprop = (element.get("itemprop") or "").lower()
            self.page.containers.append(Container(inside, container, tag, names, itemprop, depth))
        before = self.kind, self.tag, self.level, self.container
        self.kind, self.tag, self.level, self.container = "text", tag, 0, inside
        if tag in ("ul", "ol"):
            try:
                first = int(element.get("start") or 1)
            except ValueError:
                first = 1
            self.lists.append([tag, first])
            self.children(element, inside, depth)
            self.flush()
            self.lists.pop()
        elif tag == "li":
            if self.lists and self.lists[-1][0] == "ol":
                self.marker = f"{self.lists[-1][1]}. "
                self.lists[-1][1] += 1
            else:
                self.marker = "- "
            if not self.lists:
                self.lists.append(["ul", 1])
                self.children(element, inside, depth)
                self.flush()
                self.lists.pop()
            else:
                self.children(element, inside, depth)
                self.flush()
            self.marker = ""
        elif tag == "blockquote":
            self.quotes += 1
            self.children(element, inside, depth)
            self.flush()
            self.quotes -= 1
        else:
            self.children(element, inside, depth)
            self.flush()
        self.kind, self.tag, self.level, self.container = before

    def pre(self, element: Any, container: int) -> None:
        """Code keeps its line ends and indentation."""
        if _hidden(element):
            return
        self.flush()
        pieces: list[str] = []
        for node in element.iter():
            self.left -= 1
            if self.left < 0:
                raise TooManyNodes("more elements than max_nodes")
            if not isinstance(node.tag, str):
                continue
            if node.tag == "br":
                pieces.append("\n")
            elif node.tag in ("script", "style", "button"):
                continue
            elif node.text:
                pieces.append(node.text)
            if node is not element and node.tail:
                pieces.append(node.tail)
        text = "".join(_in_document_order(element)) if len(element) else "".join(pieces)
        text = "\n".join(line.rstrip() for line in text.expandtabs(4).split("\n")).strip("\n")
        if text.strip():
            self.page.blocks.append(Block("code", text, container, "pre", marker=self.marker))
            self.marker = ""

    def table(self, element: Any, container: int, depth: int) -> None:
        """A table of data becomes one block of rows; a table that lays out a page is a container."""
        if _hidden(element):
            return
        rows = _data_rows(element)
        if rows is None:
            self.group(element, "table", container, depth)
            return
        self.flush()
        lines: list[str] = []
        link_chars = num_links = 0
        caption = element.find("caption")
        for number, row in enumerate(rows):
            cells: list[str] = []
            for cell in row:
                inner = _Walker(self.left, self.drop, show_hidden=self.show_hidden)
                inner.kind, inner.tag, inner.container = "text", "td", container
                inner.children(cell, container, depth + 1)
                inner.flush()
                self.left = inner.left
                cells.append(" ".join(block.text.replace("\n", " ") for block in inner.page.blocks).strip())
                link_chars += sum(block.link_chars for block in inner.page.blocks)
                num_links += sum(block.num_links for block in inner.page.blocks)
            if any(cells):
                lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
                if (
                    len(lines) == 1
                    and len(rows) > 1
                    and (number == 0 and any(cell.tag == "th" for cell in row))
                ):
                    lines.append("|" + " --- |" * len(cells))
        if caption is not None:
            words = " ".join("".join(caption.itertext()).split())
            if words:
                self.page.blocks.append(Block("text", words, container, "caption"))
        if lines:
            self.page.blocks.append(
                Block("table", "\n".join(lines), container, "table", link_chars, 0, self.marker, num_links)
            )
            self.marker = ""


def _in_document_order(element: Any) -> Iterator[str]:
    for event, node in etree.iterwalk(element, events=("start", "end")):
        if not isinstance(node.tag, str):
            continue
        if event == "start":
            if node.tag == "br":
                yield "\n"
            elif node.tag not in ("script", "style", "button") and node.text:
                yield node.text
        elif node is not element:
            # Highlighters set one line per block element.
            if node.tag in ("div", "li", "p", "tr"):
                yield "\n"
            if node.tail:
                yield node.tail


def _data_rows(table: Any) -> list[list[Any]] | None:
    """Return the cells of a data table by row, None for a layout table."""
    rows: list[list[Any]] = []
    cells = 0
    for section in table:
        if section.tag in ("thead", "tbody", "tfoot"):
            members = list(section)
        elif section.tag == "tr":
            members = [section]
        else:
            continue
        for row in members:
            if row.tag == "tr":
                rows.append([cell for cell in row if cell.tag in ("td", "th")])
                cells += len(rows[-1])
                if cells > _MAX_TABLE_CELLS:
                    return None
    if len(rows) < 2 or max(len(row) for row in rows) < 2:
        return None
    if (table.get("role") or "") == "presentation":
        return None
    for node in table.iter("table", "pre", "article", "h1", "h2", "p", "div", "form", "ul"):
        if node is table:
            continue
        if node.tag in ("p", "div", "ul"):
            # Cells of one paragraph are still data; several, or long ones, are layout.
            inside = "".join(node.itertext())
            if len(inside) > 300:
                return None
            continue
        return None
    return rows


def _hidden(element: Any) -> bool:
    if element.get("hidden") is not None:
        return True
    style = element.get("style")
    if style and _HIDDEN.search(style):
        return True
    return element.get("aria-hidden") == "true"
