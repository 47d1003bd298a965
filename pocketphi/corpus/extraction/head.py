"""What the head of a page says: title, canonical address, licence, and whether machines may learn from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_NOAI = ("noai", "noml")
_MAX_TITLE_CHARS = 300


@dataclass
class Head:
    title: str = ""
    license: str = ""
    url: str = ""
    noai: str = ""


def read_head(root: Any) -> Head:
    """Read `<title>`, `<meta>` and `<link>`."""
    found = Head()
    for element in root.iter("title", "meta", "link"):
        tag = element.tag
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
