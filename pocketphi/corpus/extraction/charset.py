"""Bytes to text: which encoding a page is in."""

from __future__ import annotations

import re

from resiliparse.parse.encoding import bytes_to_str, detect_encoding, map_encoding_to_html5

_META = re.compile(
    rb"<(?:meta|\?xml)[^>]{0,200}?(?:charset|encoding)\s*=\s*[\"']?\s*([A-Za-z0-9_\-:]{2,40})", re.I
)
_HEAD_BYTES = 4096
_MARKS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"))


def decode(content: bytes, charset: str = "") -> tuple[str, str]:
    """Return `(text, encoding)`: by byte order mark, as UTF-8 if valid, as declared, or by a guess.

    `charset` is what the HTTP header says. Bytes that the encoding does not have become U+FFFD.
    """
    for mark, name in _MARKS:
        if content.startswith(mark):
            return content[len(mark) :].decode(name, "replace"), name
    declared = charset or ""
    if not declared:
        found = _META.search(content[:_HEAD_BYTES])
        declared = found.group(1).decode("ascii") if found else ""
    name = map_encoding_to_html5(declared, False) if declared else None  # type: ignore[assignment]
    try:
        return content.decode("utf-8"), "utf-8"
    except UnicodeDecodeError as error:
        # Cut off in the middle of the last character: still UTF-8.
        if error.reason == "unexpected end of data" and (name is None or name.startswith("utf-8")):
            return content[: error.start].decode("utf-8"), "utf-8"
    if name is None or name.lower().startswith(("utf-16", "utf-8")):
        # Declared UTF-8 but is not: some broken characters in UTF-8, or another encoding altogether.
        text = content.decode("utf-8", "replace")
        if text.count("\ufffd") * 200 <= len(text):
            return text, "utf-8"
        name = detect_encoding(content) or "utf-8"
    return bytes_to_str(content, name, "replace"), name
