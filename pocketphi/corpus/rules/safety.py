"""Personal data is replaced; unsafe text is scored."""

from __future__ import annotations

import re
from ipaddress import ip_address

import numpy as np

from pocketphi.corpus.document import Document
from pocketphi.corpus.rules import rule
from pocketphi.corpus.rules.batch import Batch, ratio

_EMAIL = re.compile(r"\b[A-Za-z0-9][A-Za-z0-9._%+\-]{0,63}@(?:[A-Za-z0-9\-]{1,63}\.){1,8}[A-Za-z]{2,24}\b")
_IPV4 = re.compile(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d.]|-\d)")
_DOTTED = re.compile(r"\.\d{1,3}\.\d")
_PHONE = re.compile(
    r"(?<![\w.\-/])(?:\+\d{1,3}[ .\-]?(?:\(\d{1,4}\)[ .\-]?)?\d{2,4}(?:[ .\-]\d{2,4}){2,4}"
    r"|\(\d{3}\) ?\d{3}[ .\-]\d{4}|\d{3}-\d{3}-\d{4})(?![\w\-/])"
)
_KEY = re.compile(
    r"\b(?:AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{36,}|sk-[A-Za-z0-9_\-]{32,}|xox[abprs]-[A-Za-z0-9\-]{20,}"
    r"|AIza[0-9A-Za-z_\-]{35}|eyJ[A-Za-z0-9_\-]{15,}\.eyJ[A-Za-z0-9_\-]{15,}\.[A-Za-z0-9_\-]{10,})"
)
_KEY_MARKS = ("AKIA", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "sk-", "xox", "AIza", "eyJ")
_KEY_BEGIN = re.compile(r"-----BEGIN (?:[A-Z]+ ){0,4}PRIVATE KEY-----")
_KEY_END = re.compile(r"-----END (?:[A-Z]+ ){0,4}PRIVATE KEY-----")
_MAX_KEY_CHARS = 20_000

# Replacements keep the form of what they replace, so that sentences stay sentences.
EMAIL, PHONE, IP, KEY = "email@example.com", "555-0100", "192.0.2.1", "<key>"
_SAFE_DOMAINS = ("example.com", "example.org", "example.net")


def replace_personal_data(document: Document) -> None:
    """Replace mail addresses, telephone numbers, public IP addresses and keys; counts go into meta["pii"]."""
    text, counts = document.text, {}
    if "@" in text:
        text, counts["email"] = _substitute(_EMAIL, _mail, text)
    if "-" in text or "+" in text:
        text, counts["phone"] = _substitute(_PHONE, _phone, text)
    # Plain searches first: few texts hold anything that these patterns could match.
    if _DOTTED.search(text):
        text, counts["ip"] = _substitute(_IPV4, _address, text)
    counts["key"] = 0
    if any(mark in text for mark in _KEY_MARKS):
        text, counts["key"] = _KEY.subn(KEY, text)
    if "PRIVATE KEY-----" in text:
        text, number = _replace_private_keys(text)
        counts["key"] += number
    counts = {name: number for name, number in counts.items() if number}
    if counts:
        document.text = text
        document.meta["pii"] = counts


def _substitute(pattern: re.Pattern[str], change, text: str) -> tuple[str, int]:  # type: ignore[no-untyped-def]
    number = 0

    def replace(match: re.Match[str]) -> str:
        nonlocal number
        new = change(match.group())
        number += new != match.group()
        return new

    return pattern.sub(replace, text), number


def _replace_private_keys(text: str) -> tuple[str, int]:
    """One pass over begins and ends: a single expression for both takes quadratic time."""
    parts: list[str] = []
    at = number = 0
    for end in _KEY_END.finditer(text):
        begin = _KEY_BEGIN.search(text, max(at, end.start() - _MAX_KEY_CHARS), end.start())
        if begin:
            parts += [text[at : begin.start()], KEY]
            number += 1
        else:
            parts.append(text[at : end.end()])
        at = end.end()
    return "".join([*parts, text[at:]]), number


def _mail(found: str) -> str:
    return found if found.lower().endswith(_SAFE_DOMAINS) else EMAIL


def _phone(found: str) -> str:
    digits = sum(character.isdigit() for character in found)
    return PHONE if 7 <= digits <= 15 else found


def _address(found: str) -> str:
    """Private, documentation and loopback addresses are examples; version numbers are no addresses."""
    try:
        return IP if ip_address(found).is_global else found
    except ValueError:
        return found


@rule("pii_per_100_words", max=5)
def pii_per_100_words(batch: Batch) -> np.ndarray:
    """Replaced mail addresses, telephone numbers, IP addresses and keys per 100 words: a directory."""
    return ratio([100 * sum(meta.get("pii", {}).values()) for meta in batch.meta], batch.num_words)


# Weight per occurrence. A word that medicine, law or news needs weighs little: one use never rejects.
_UNSAFE = {
    3.0: "porn porno pornography xxx milf blowjob cumshot gangbang hentai hardcore-sex sexcam camgirl camgirls "
    "deepthroat handjob rimjob bukkake creampie fuckbuddy slut sluts whore whores cunt cunts",
    2.0: "fuck fucking fucked fucker motherfucker cock cocks pussy tits boobs dildo orgasm horny naked-girls "
    "faggot faggots nigger niggers kike spic retard retards escorts incest",
    1.0: "sex sexy nude nudes naked erotic fetish shit bitch bitches asshole bastard rape suicide massacre "
    "jihad behead genocide",
}
_WEIGHTS = {word: weight for weight, words in _UNSAFE.items() for word in words.split()}
# Shortest words that every other one contains: a text without them needs no look at each of its words.
_UNSAFE_PARTS = [word for word in _WEIGHTS if not any(other in word for other in _WEIGHTS if other != word)]
_UNSAFE_WORD = re.compile(
    r"\b(?:" + "|".join(sorted(map(re.escape, _WEIGHTS), key=len, reverse=True)) + r")\b"
)


@rule("unsafe_per_100_words", max=2.0, curated=True)
def unsafe_per_100_words(batch: Batch) -> np.ndarray:
    """Weighted sexual, hateful and abusive words per 100 words."""
    sums = [
        sum(_WEIGHTS[word] for word in _UNSAFE_WORD.findall(text))
        if any(part in text for part in _UNSAFE_PARTS)
        else 0.0
        for text in batch.lowered
    ]
    return ratio([100 * total for total in sums], np.maximum(batch.num_words, 50))
