"""HTML to text. (First version: resiliparse's extractor.)"""

from __future__ import annotations

import re
from dataclasses import dataclass

from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.encoding import bytes_to_str, detect_encoding, map_encoding_to_html5
from resiliparse.parse.html import HTMLTree

_META_CHARSET = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([A-Za-z0-9_\-:]{2,40})", re.IGNORECASE)


@dataclass
class Page:
    text: str
    title: str = ""
    license: str = ""
    url: str = ""
    noai: str = ""
    charset: str = ""


def decode(content: bytes, charset: str = "") -> tuple[str, str]:
    """Return `(text, encoding)`: byte order mark, then valid UTF-8, then what is declared, then a guess."""
    for mark, name in ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be")):
        if content.startswith(mark):
            return content[len(mark) :].decode(name, "replace"), name
    try:
        return content.decode("utf-8"), "utf-8"
    except UnicodeDecodeError:
        pass
    declared = charset
    if not declared:
        found = _META_CHARSET.search(content[:4096])
        declared = found.group(1).decode("ascii") if found else ""
    name = map_encoding_to_html5(declared, fallback_utf8=False) if declared else None
    name = name or detect_encoding(content) or "utf-8"
    return bytes_to_str(content, name, errors="replace"), name


def extract(html: str, max_nodes: int = 500_000) -> Page:
    tree = HTMLTree.parse(html)
    text = extract_plain_text(tree, main_content=True, preserve_formatting=True)
    return Page(text=text, title=tree.title or "")
