"""What the head of a page says: title, canonical address, licence, and whether machines may learn from it."""

from __future__ import annotations

import html
import json
import re
from dataclasses import dataclass
from typing import Any

_NOAI = ("noai", "noml")
_MAX_TITLE_CHARS = 300
_MAX_JSON_CHARS = 2_000_000
_MAX_JSON_NODES = 10_000
_TAG = re.compile(r"<[^<>]{0,2000}>")
_PARAGRAPH = re.compile(r"</p\s*>|<br\s*/?>\s*<br\s*/?>|</h\d>", re.IGNORECASE)


@dataclass
class Head:
    title: str = ""
    license: str = ""
    url: str = ""
    noai: str = ""
    body: str = ""  # the article's text, where the page repeats it in its metadata (JSON-LD)


def read_head(root: Any) -> Head:
    """Read `<title>`, `<meta>` and `<link>`."""
    found = Head()
    for element in root.iter("title", "meta", "link", "script"):
        tag = element.tag
        if tag == "script":
            if element.get("type") == "application/ld+json" and "articleBody" in (element.text or ""):
                found.body = max(found.body, article_body(element.text), key=len)
            continue
        if tag == "title":
            if not found.title and element.getparent() is not None and element.getparent().tag != "svg":
                found.title = " ".join("".join(element.itertext()).split())[:_MAX_TITLE_CHARS]
        elif tag == "meta":
            _read_meta(element, found)
        else:
            relation = (element.get("rel") or "").lower().split()
            address = (element.get("href") or "").strip()
            if "canonical" in relation and address.startswith("http"):
                found.url = found.url or address[:2000]
            if "license" in relation and address:
                found.license = found.license or address[:200]
    return found


def article_body(source: str) -> str:
    """Return the longest articleBody in a JSON-LD script, its markup taken off; "" when it is not valid."""
    if len(source) > _MAX_JSON_CHARS:
        return ""
    try:
        waiting: list[Any] = [json.loads(source, strict=False)]
    except (ValueError, RecursionError):
        return ""
    best = ""
    for _ in range(_MAX_JSON_NODES):
        if not waiting:
            break
        node = waiting.pop()
        if isinstance(node, dict):
            body = node.get("articleBody")
            if isinstance(body, str) and len(body) > len(best):
                best = body
            waiting.extend(value for value in node.values() if isinstance(value, (dict, list)))
        elif isinstance(node, list):
            waiting.extend(node)
    if "<" in best:
        best = _TAG.sub(" ", _PARAGRAPH.sub("\n\n", best))
    lines = (" ".join(line.split()) for line in html.unescape(best).split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _read_meta(element: Any, found: Head) -> None:
    name = (element.get("name") or element.get("property") or element.get("http-equiv") or "").lower()
    content = (element.get("content") or "").strip()
    if name in ("robots", "x-robots-tag", "ai-bots", "gptbot"):
        for directive in content.lower().replace(",", " ").split():
            if directive in _NOAI:
                found.noai = directive
    elif name == "tdm-reservation" and content == "1":
        found.noai = "tdm-reservation"
    elif name in ("og:title", "twitter:title") and not found.title:
        found.title = content[:_MAX_TITLE_CHARS]
    elif name == "og:url" and content.startswith("http"):
        found.url = found.url or content[:2000]
    elif name in ("dc.rights", "dcterms.license", "dc.rights.license", "license", "copyright") and content:
        found.license = found.license or content[:200]
