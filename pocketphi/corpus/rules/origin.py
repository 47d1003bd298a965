"""Rules on where a document comes from: address, licence, and what its owner says about machines."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from pocketphi.core.errors import UserError
from pocketphi.corpus.rules import rule
from pocketphi.corpus.rules.batch import Batch

_ADULT_URL = re.compile(
    r"(?:^|[.\-_/])(?:porn\w*|xxx|sex(?:cam|chat|tube|video)\w*|escorts?|hentai|nude\w*|milf|casino\w*|viagra)"
    r"(?:[.\-_/]|$)",
    re.IGNORECASE,
)


@rule("url_denied", max=0, curated=True)
def url_denied(batch: Batch) -> np.ndarray:
    """1 when the domain or address is on a deny list, or names adult or gambling content."""
    deny = batch.context.url_deny
    return np.array([float(_denied(document.url, deny)) for document in batch.documents])


def _denied(url: str, deny: frozenset[str]) -> bool:
    if not url:
        return False
    if _ADULT_URL.search(url):
        return True
    if not deny:
        return False
    try:
        parts = urlsplit(url if "//" in url else f"//{url}")
        host = (parts.hostname or "").removeprefix("www.")
    except ValueError:
        return False
    labels = host.split(".")
    if any(".".join(labels[i:]) in deny for i in range(len(labels))):
        return True
    path = host
    for piece in parts.path.split("/")[1:]:
        path = f"{path}/{piece}"
        if path in deny:
            return True
    return False


def load_url_lists(paths: Iterable[str]) -> frozenset[str]:
    """Read deny lists: one domain or address prefix per line, `#` starts a comment."""
    entries: set[str] = set()
    for path in paths:
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise UserError(f"{path}: cannot read the URL list: {error}") from None
        for line in lines:
            entry = line.split("#")[0].strip().lower()
            if entry:
                entries.add(
                    entry.removeprefix("http://").removeprefix("https://").removeprefix("www.").rstrip("/")
                )
    return frozenset(entries)


@rule("license_denied", max=0, curated=True)
def license_denied(batch: Batch) -> np.ndarray:
    """1 when the licence holds one of the substrings that license_deny names."""
    deny = tuple(text.lower() for text in batch.context.license_deny)
    found = np.zeros(len(batch))
    for index, document in enumerate(batch.documents):
        licence = document.license.lower()
        found[index] = any(text in licence if text else not licence for text in deny)
    return found


@rule("noai", max=0, curated=True)
def noai(batch: Batch) -> np.ndarray:
    """1 when the page says that machines must not learn from it (noai, tdm-reservation)."""
    respect = batch.context.respect_noai
    return np.array([float(respect and bool(meta.get("noai"))) for meta in batch.meta])
