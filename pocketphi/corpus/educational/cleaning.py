"""Take the marks of a source out of a text, so that a scorer learns from what the text says.

Labels come by source: a textbook kept in LaTeX, a mail kept with its headers. A scorer trained on such
text as it lies would learn `textbf` and `Received:`. These patterns are removed from training text; at
scoring time nothing is removed, since words never seen in training count for nothing.
"""

from __future__ import annotations

import re

_HEADER_BLOCK = re.compile(r"\A(?:[ \t]*\n)*(?:[A-Za-z][\w-]{1,30}:[^\n]*\n(?:[ \t]+[^\n]*\n)*){1,60}")
_MARKDOWN_HEADER = re.compile(r"\A(?:\s*#{1,3} (?:Title|Author|Year):[^\n]*\n)+", re.IGNORECASE)
_FRONT_MATTER = re.compile(r"\A---\n.{0,2000}?\n---\n", re.DOTALL)
_MAIL_LINE = re.compile(
    r"^[>| ]*(?:From|To|Cc|Bcc|Subject|Date|Sent|Reply-To|Message-Id|Return-Path|Received|List-[\w-]+|"
    r"X-[\w-]+|Content-[\w-]+|MIME-Version|User-Agent|URL|In-Reply-To|References|Sender|Organization):[^\n]*$",
    re.IGNORECASE | re.MULTILINE,
)
_ATTRIBUTION = re.compile(r"^.{0,120}\b(?:wrote|writes|said):[ \t]*$", re.MULTILINE)
_LIST_FOOTER = re.compile(
    r"^[-_=*]{5,}\s*\n(?:[^\n]*\n){0,6}[^\n]*(?:mailing list|mailman|unsubscribe)[^\n]*$", re.I | re.M
)
_QUOTE_MARK = re.compile(r"^[ \t]*(?:[>|][ \t]?)+", re.MULTILINE)
_STYLE = re.compile(r"<(style|script)\b.{0,20000}?</\1\s*>|<!--.{0,20000}?-->", re.IGNORECASE | re.DOTALL)
_TAG = re.compile(r"</?[a-zA-Z!][^<>]{0,2000}>")
_ENTITY = re.compile(r"&#?\w{1,10};")
_LINK = re.compile(r"(?:https?://|www\.|ftp://)\S+", re.IGNORECASE)
_MAIL = re.compile(r"[^\s@]+@[\w.-]+\.\w+")
_HOST = re.compile(r"\b[\w-]+(?:\.[\w-]+)*\.(?:com|net|org|edu|gov)\b\S*", re.IGNORECASE)
_HOST_ENDS = (".com", ".net", ".org", ".edu", ".gov")
_LATEX = re.compile(
    r"\\(?:begin|end|label|ref|eqref|cite|input|include\w*|PM\w+)\s*\{[^{}]*\}|\\[A-Za-z]+\*?|\\."
)
_MATH = re.compile(r"\$\$.{0,4000}?\$\$|\$[^$\n]{0,400}\$", re.DOTALL)
_ENCODED = re.compile(r"\S{40,}")
# The first words of the names: a plain search for them is much faster than the pattern.
_NAME_STARTS = (
    *("openstax", "rice", "connexions", "planetmath", "stacks", "wikipedia", "wikibooks", "gutenberg"),
    *("spamassassin", "razor", "exmh", "rpm", "freshrpms", "ilug", "sourceforge", "newsisfree", "webnote"),
    *("foldoc", "jargon", "gcide", "webster", "abc", "postgresql", "sqlite"),
)
_SOURCE_NAMES = re.compile(
    r"\b(?:openstax|rice university|connexions|planetmath|stacks project|wikipedia|wikibooks|gutenberg|"
    r"spamassassin|razor-users|exmh\w*|rpm-list|freshrpms|ilug|sourceforge|newsisfree|webnote|"
    r"foldoc|jargon file|gcide|webster|abc (?:news|science|rural)|postgresql|sqlite)\b",
    re.IGNORECASE,
)


def strip_style(text: str) -> str:
    """Return `text` without headers, quoting, markup, LaTeX commands, addresses and source names."""
    text = _FRONT_MATTER.sub("", text, count=1)
    text = _MARKDOWN_HEADER.sub("", text, count=1)
    text = _HEADER_BLOCK.sub("", text, count=1)
    text = _LIST_FOOTER.sub("", text)
    text = _MAIL_LINE.sub("", text)
    if "wrote:" in text or "writes:" in text or "said:" in text:
        text = _ATTRIBUTION.sub("", text)
    text = _QUOTE_MARK.sub("", text)
    if "<" in text:
        text = _TAG.sub(" ", _STYLE.sub(" ", text))
    text = _ENTITY.sub(" ", text)
    lower = text.lower()
    if "://" in lower or "www." in lower:
        text = _LINK.sub(" ", text)
    if "@" in text:
        text = _MAIL.sub(" ", text)
    if any(end in lower for end in _HOST_ENDS):
        text = _HOST.sub(" ", text)
    if "\\" in text or "$" in text:
        text = _LATEX.sub(" ", _MATH.sub(" ", text))
    text = _ENCODED.sub(" ", text)
    return _SOURCE_NAMES.sub(" ", text) if any(name in lower for name in _NAME_STARTS) else text
