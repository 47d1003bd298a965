"""What is taken off the chosen part of a page, and what is put back: lines about the article, not of it.

Pages differ in markup but little in what they set around an article: a lead under the title, in a frame of
its own; a date, a name, the minutes it takes to read; credits of pictures; and at its end other articles.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from pocketphi.corpus.extraction.walk import Block, Container

# What follows these is other articles.
_END = re.compile(
    r"^(?:related (?:articles|posts|stories|content|news)|read (?:more|next|also)\b.{0,80}|more (?:from|on|in|stories)\b.{0,60}"
    r"|share this.{0,40}|comments?(?: \(\d+\))?|leave a (?:reply|comment)|you (?:may|might) also (?:like|enjoy).{0,40}"
    r"|(?:recommended|popular|trending|most read)\b.{0,30}|ähnliche (?:artikel|beiträge).{0,30}|kommentare?(?: \(\d+\))?"
    r"|mehr zum thema.{0,40}|das könnte (?:sie|dich|ihnen|euch) auch.{0,40}|weitere (?:artikel|beiträge|themen).{0,30})$",
    re.IGNORECASE,
)
# These point to one other article, often from the middle: the line goes, what follows only near the end.
_POINTER = re.compile(
    r"^(?:(?:noch )?mehr (?:zum thema|infos?|artikel|beiträge|kolumnen|news)\b.{0,40}|auch interessant.{0,20}"
    r"|(?:lesen sie|lies|lest) (?:auch|mehr|dazu)\b.{0,50}|weiterlesen|themen (?:im|in diesem) (?:artikel|beitrag)"
    r"|empfehlungen (?:aus )?der redaktion|(?:über|zu) (?:den autor|die autorin|die autoren)|about the authors?"
    r"|(?:à|a) lire (?:aussi|également)\b.{0,60}|sur le même (?:sujet|thème)|articles? (?:liés|similaires)|lire aussi\b.{0,60}"
    r"|(?:lea|lee|ver|leer|leé) (?:también|además|más)\b.{0,60}|(?:artículos|noticias|notas) relacionad[ao]s"
    r"|te puede interesar.{0,40}|leggi anche\b.{0,60}|leia (?:também|mais)\b.{0,60}|czytaj (?:też|także|również|więcej)\b.{0,60}"
    r"|zobacz (?:też|także|również)\b.{0,60}|lees ook\b.{0,60}|läs (?:också|mer|även)\b.{0,60}"
    r"|also read\b.{0,60})$",
    re.IGNORECASE,
)
_JUNK = re.compile(
    r"^(?:advertisement|anzeige|-\s*anzeige\s*-|werbung|publicité|publicidad|reklama|sponsored|share|tweet|print|email|e-mail"
    r"|facebook|twitter|whatsapp|pinterest"
    r"|linkedin|reply|like|save|copy link|sign up|subscribe|log in|read more|continue reading.{0,40}|loading.{0,3}"
    r"|image|photo|video|gallery|\[?edit\]?|jump to navigation|skip to .{0,30}|back to top|by|tags?:?|share this:?"
    r"|like this:?|image (?:copyright|caption|source).{0,80}|play video|watch:?|listen|close|menu|search"
    r"|(?:externer inhalt|embedded content|contenu externe)"
    r"|(?:bild|fotos?|titelbild|titelfoto|bildquelle|photos?|crédits? photos?|image credits?|photo credits?|fot\.|zdj\.|foto de)"
    r"\s?:.{1,80}"
    r"|(?:©|\(c\) ?\d{4}|copyright (?:©|\(c\)|\d|by\b)|all rights reserved|alle rechte vorbehalten|tous droits réservés).{0,90}"
    r"|.{0,40}\b\d{1,2}\s?-?(?:minutes?|mins?\.?|minuten|minut|minutos) (?:read|to read|lesezeit|czytania|de lectura|de lecture).{0,10}"
    r"|(?:lesezeit|reading time|temps de lecture|tiempo de lectura)\s?:.{0,30}"
    r"|https?://\S+)$",
    re.IGNORECASE,
)
# A short paragraph that asks the reader for something: to subscribe, to follow, to give, to take part.
_APPEAL = re.compile(
    r"\b(?:follow (?:us|me)\b.{0,40}\b(?:on|at)\b|follow\b.{0,60}\bon (?:twitter|facebook|instagram|linkedin|youtube|telegram)"
    r"|(?:sign up|subscribe)\b.{0,60}\b(?:newsletters?|full story|podcast|e-?edition|our \w+)|sign up (?:here|now|today)"
    r"|join our\b.{0,40}\b(?:newsletter|channel|community|mailing)|submit (?:a|your) letter to"
    r"|(?:like|folge|folgt) uns (?:auf|bei)|(?:newsletter|abo)\b.{0,50}\b(?:abonnieren|anmelden|bestellen|sichern)"
    r"|abonn(?:ier|ez)\w*\b.{0,60}\b(?:newsletter|kanal|chaîne|lettre)|s[ií]guenos (?:en|a)\b"
    r"|suscr[ií]b\w+\b.{0,60}\b(?:bolet[ií]n|newsletter|canal)|canal de (?:telegram|whatsapp|youtube)"
    r"|suivez-nous|seguici su|siga-nos|obserwuj nas|affiliate[- ]?links?\b"
    r"|may (?:earn|receive) (?:a|an|some)?\s?(?:\w+ )?commission|(?:erhält|erhalten|bekommen) .{0,40}provision"
    r"|um den inhalt von .{1,60} zu laden)",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile("[.!?…。！？।][\"'»”’“)\\]*]*$")
# Frames beside a title that hold text, but no lead: pictures, people, buttons.
_NO_LEAD = re.compile(
    r"caption|galler|carousel|slide|photo|image|picture|figure|video|credit|media|author|\bbio|tooltip|byline|share|social"
    r"|comment|login|promo|related|widget|tagline|branding|sidebar"
)
_LINE_CHARS = 90
_END_SHARE = 0.3
_POINTER_SHARE = 0.12
_PROSE_BYTES = 100  # a paragraph this long is text of the article
_NOTE_BYTES = 80
_APPEAL_CHARS = 300
_MAX_NOTES = 8
_GOES_ON = re.compile(r"[a-z]+ [a-z]|[,;.]")
_MIN_LEAD_CHARS = 60
_MAX_LEAD_CHARS = 1200
_MAX_LEADS = 3
_HEADING_CHARS = 120  # longer ones are paragraphs set in large type
_NO_LEAD_TAGS = frozenset(("aside", "footer", "nav", "form", "figure", "li", "table"))


def _inside_figures(containers: Sequence[Container]) -> list[bool]:
    inside = [False] * len(containers)
    for container in containers:
        inside[container.index] = container.tag == "figure" or (
            container.parent >= 0 and inside[container.parent]
        )
    return inside


def clean(blocks: Sequence[Block], containers: Sequence[Container], chosen: list[int]) -> list[int]:
    """Drop blocks of links and single words of furniture; cut off what follows the article."""
    kept: list[int] = []
    figures = _inside_figures(containers)
    for i in chosen:
        block = blocks[i]
        size = len(block.text)
        if block.kind in ("text", "item") and (block.tag == "figcaption" or figures[block.container]):
            continue  # describes a picture that is not in the text
        if block.kind in ("code", "table"):
            if block.kind == "table" and block.link_chars > 0.7 * size:
                continue
            kept.append(i)
            continue
        if block.link_chars > 0.6 * size and (block.kind == "item" or size < 200):
            continue
        if size < 100 and _JUNK.match(block.text):
            continue
        if size < _APPEAL_CHARS and block.kind == "text" and _APPEAL.search(block.text):
            continue
        kept.append(i)
    kept = _cut(blocks, kept)
    # Headings with nothing under them say nothing; the first of the page is its title, kept apart.
    result: list[int] = []
    for place, i in enumerate(kept[:4]):
        if blocks[i].kind == "heading" and blocks[i].level == 1:
            del kept[place]
            break
    for place, i in enumerate(kept):
        if blocks[i].kind == "heading" and place > 0 and len(blocks[i].text) < _HEADING_CHARS:
            following = kept[place + 1] if place + 1 < len(kept) else -1
            if following < 0 or (
                blocks[following].kind == "heading" and blocks[following].level <= blocks[i].level
            ):
                continue
        result.append(i)
    return result


def _cut(blocks: Sequence[Block], kept: list[int]) -> list[int]:
    """Cut off what follows a line that announces other articles; drop lines that point to one."""
    rest = total = sum(len(blocks[i].text) for i in kept)
    result: list[int] = []
    for i in kept:
        text = blocks[i].text
        if len(text) < _LINE_CHARS and blocks[i].kind != "code":
            line = text.strip(" :")
            pointer = bool(_POINTER.match(line))
            share = _POINTER_SHARE if pointer else _END_SHARE
            if rest < share * total and (pointer or _END.match(line)):
                break
            if pointer:
                rest -= len(text)
                continue
        rest -= len(text)
        result.append(i)
    return result


def lead(
    blocks: Sequence[Block], containers: Sequence[Container], chosen: list[int], never: Sequence[bool]
) -> list[int]:
    """Put back the paragraphs between the page's title and the article: its lead, set in a frame of its own."""
    if not chosen:
        return chosen
    first = next((i for i in chosen if _is_prose(blocks[i])), chosen[0])
    title = next(
        (i for i in range(first - 1, -1, -1) if blocks[i].kind == "heading" and blocks[i].level == 1), -1
    )
    if title < 0:
        return chosen
    taken = set(chosen)
    there = {blocks[i].text for i in chosen}
    found: list[int] = []
    size = 0
    for i in range(title + 1, first):
        block = blocks[i]
        length = len(block.text)
        if i in taken or block.kind != "text" or length < _MIN_LEAD_CHARS or block.tag == "figcaption":
            continue
        if block.link_chars > 0.3 * length or block.text in there or not _SENTENCE_END.search(block.text):
            continue
        if never[block.container] or _no_lead(containers, block.container):
            continue
        size += length
        there.add(block.text)
        found.append(i)
    if not found or len(found) > _MAX_LEADS or size > _MAX_LEAD_CHARS:
        return chosen
    return sorted(chosen + found)


def trim(blocks: Sequence[Block], chosen: list[int]) -> list[int]:
    """Drop notes before the first and after the last sentence: dates, names, sources, reading times."""
    prose = [place for place, i in enumerate(chosen) if _is_prose(blocks[i])]
    if not prose:
        return chosen
    before = [place for place in range(prose[0]) if _is_note(blocks, chosen, place)]
    after = [place for place in range(prose[-1] + 1, len(chosen)) if _is_note(blocks, chosen, place)]
    dropped: set[int] = set()
    for notes in (before, after):
        # Many short lines, or one that goes on in the middle of a sentence, are the text itself.
        if len(notes) <= _MAX_NOTES and not any(_GOES_ON.match(blocks[chosen[p]].text) for p in notes):
            dropped.update(notes)
    return [i for place, i in enumerate(chosen) if place not in dropped]


def _no_lead(containers: Sequence[Container], index: int) -> bool:
    """Whether the nearest frames are named as something else, or any frame is no part of an article's head."""
    level = 0
    while index >= 0:
        if containers[index].tag in _NO_LEAD_TAGS or (level < 2 and _NO_LEAD.search(containers[index].names)):
            return True
        index = containers[index].parent
        level += 1
    return False


def _is_prose(block: Block) -> bool:
    return block.kind in ("text", "quote") and _weight(block.text) >= _PROSE_BYTES


def _weight(text: str) -> int:
    """Length as UTF-8: a sign of a script without spaces says as much as several letters."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _is_note(blocks: Sequence[Block], chosen: Sequence[int], place: int) -> bool:
    block = blocks[chosen[place]]
    if block.kind != "text" or block.tag in ("dt", "dd", "caption") or _weight(block.text) >= _NOTE_BYTES:
        return False
    if "$" in block.text or _SENTENCE_END.search(block.text):
        return False
    following = blocks[chosen[place + 1]].kind if place + 1 < len(chosen) else ""
    return following not in ("item", "table", "code")
