"""Which blocks of a page are its main content.

Paragraphs vote for the containers that hold them (the idea of Readability, Arc90 2009); what the page
marks itself (article, main, itemprop=articleBody) is believed when enough text lies in it. Inside the
chosen container, blocks of links and containers named like furniture are left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from pocketphi.corpus.extraction.walk import Block, Container, FlatPage

_MIN_VOTE_CHARS = 25
_MIN_CONTENT_CHARS = 250

# Names that say what a container is not. Matched on class, id and role.
_FURNITURE = re.compile(
    r"(?:^|[\s_\-])(?:nav\w*|menus?|breadcrumbs?|footer|foot|sidebar\w*|side|aside|widget\w*|banner|ads?|advert\w*"
    r"|sponsor\w*|promo\w*|newsletter\w*|subscri\w*|signup|sign-up|login|cookie\w*|gdpr|consent|popup|modal|overlay"
    r"|share\w*|sharing|social\w*|addthis|tags?|taglist|related\w*|recommend\w*|popular|trending|most-read"
    r"|more-(?:stories|news|articles|from)|read-more|readmore|also-(?:like|read)|outbrain|taboola|pagination|pager"
    r"|comments?|commentlist|respond|disqus\w*|replies|masthead|toolbar|skip-link|copyright|legal|print|meta|byline"
    r"|author-?(?:bio|box|info)|bio|rating\w*|toc|navbox|catlinks|mw-jump\w*|editsection|noprint|hidden|hide|sr-only"
    r"|screen-reader\w*|visually-?hidden|caption|credits?|teaser\w*|complementary|navigation|search\w*)"
    r"(?:$|[\s_\-])"
)
_CONTENT = re.compile(
    r"(?:^|[\s_\-])(?:article-?(?:body|content|text|detail\w*)|articlebody|entry-?content|post-?(?:content|body|text|entry)"
    r"|story-?(?:body|content|text)|content-?(?:body|main|article|text)|main-?(?:content|text)|page-?content"
    r"|body-?(?:content|text|copy)|mw-parser-output|markdown-body|prose|rich-?text|text-?body|hentry|blog-?post)"
    r"(?:$|[\s_\-])"
)
_NEUTRAL_TAGS = frozenset(("body", "html"))
_FURNITURE_TAGS = frozenset(("footer", "aside", "form"))
_END = re.compile(
    r"^(?:related (?:articles|posts|stories|content|news)|read (?:more|next|also)\b.{0,80}|more (?:from|on|in|stories)\b.{0,60}"
    r"|share this.{0,40}|comments?(?: \(\d+\))?|leave a (?:reply|comment)|you (?:may|might) also (?:like|enjoy).{0,40}"
    r"|(?:recommended|popular|trending|most read)\b.{0,30}|ähnliche (?:artikel|beiträge).{0,30}|kommentare?(?: \(\d+\))?"
    r"|mehr zum thema.{0,40}|das könnte (?:sie|dich|ihnen|euch) auch.{0,40}|weitere (?:artikel|beiträge|themen).{0,30})$",
    re.IGNORECASE,
)
_JUNK = re.compile(
    r"^(?:advertisement|anzeige|werbung|sponsored|share|tweet|print|email|e-mail|facebook|twitter|whatsapp|pinterest"
    r"|linkedin|reply|like|save|copy link|sign up|subscribe|log in|read more|continue reading.{0,40}|loading.{0,3}"
    r"|image|photo|video|gallery|\[?edit\]?|jump to navigation|skip to .{0,30}|back to top|by|tags?:?|share this:?"
    r"|like this:?|image (?:copyright|caption|source).{0,80}|play video|watch:?|listen|close|menu|search"
    r"|https?://\S+)$",
    re.IGNORECASE,
)


def select(page: FlatPage) -> list[Block]:
    """Return the blocks of the main content, in order."""
    blocks, containers = page.blocks, page.containers
    if not blocks or not containers:
        return blocks
    bad = _furniture(blocks, containers)
    live = [not bad[block.container] for block in blocks]
    root = _root(blocks, containers, live)
    inside = _descendants(containers, root)
    chosen = [i for i, block in enumerate(blocks) if live[i] and block.container in inside]
    chosen = _clean(blocks, containers, chosen)
    if _chars(blocks, chosen) < _MIN_CONTENT_CHARS:
        # Nothing that looks like an article: take every block that reads like a sentence or a list of them.
        everything = _clean(blocks, containers, [i for i in range(len(blocks)) if live[i]])
        if _chars(blocks, everything) > 2 * _chars(blocks, chosen):
            chosen = everything
    if not chosen:
        chosen = [i for i in range(len(blocks)) if live[i]] or list(range(len(blocks)))
    return [blocks[i] for i in chosen]


def _chars(blocks: Sequence[Block], chosen: Sequence[int]) -> int:
    return sum(len(blocks[i].text) for i in chosen)


def _descendants(containers: Sequence[Container], root: int) -> set[int]:
    """Containers come parents first, so one pass finds everything below `root`."""
    inside = {root}
    for container in containers[root + 1 :]:
        if container.parent in inside:
            inside.add(container.index)
    return inside


def _furniture(blocks: Sequence[Block], containers: Sequence[Container]) -> list[bool]:
    """Mark containers that are furniture by name or tag, with all they hold, unless most of the text is there."""
    size = [0] * len(containers)
    for block in blocks:
        if block.container >= 0:
            size[block.container] += max(0, len(block.text) - block.link_chars)
    for container in reversed(containers):
        if container.parent >= 0:
            size[container.parent] += size[container.index]
    total = max(1, size[0])
    bad = [False] * len(containers)
    article = [False] * len(containers)
    for container in containers:
        index, parent = container.index, container.parent
        if parent >= 0:
            article[index] = article[parent]
            if bad[parent]:
                bad[index] = True
                continue
        if container.tag in ("article", "main"):
            article[index] = True
        if container.tag in _NEUTRAL_TAGS:
            continue
        named = container.names
        furniture = container.tag in _FURNITURE_TAGS or (container.tag == "header" and not article[index])
        if named and not furniture:
            furniture = bool(_FURNITURE.search(named)) and not _CONTENT.search(named)
        if furniture and size[index] < 0.35 * total:
            bad[index] = True
    return bad


def _root(blocks: Sequence[Block], containers: Sequence[Container], live: Sequence[bool]) -> int:
    """Return the container of the main content."""
    count = len(containers)
    score = [0.0] * count
    text = [0] * count
    links = [0] * count
    for alive, block in zip(live, blocks):
        index = block.container
        if not alive or index < 0:
            continue
        size = len(block.text)
        text[index] += size
        links[index] += block.link_chars
        plain = size - block.link_chars
        if plain < _MIN_VOTE_CHARS or block.link_chars > 0.5 * size or block.kind == "heading":
            continue
        vote = 1.0 + min(block.text.count(",") + block.text.count("、"), 10) + min(plain / 100, 5.0)
        share, level = 1.0, 0
        while index >= 0 and level < 5:
            score[index] += vote * share
            index = containers[index].parent
            level += 1
            share = 0.5 if level == 1 else 1 / (3 * level)
    for container in reversed(containers):
        if container.parent >= 0:
            text[container.parent] += text[container.index]
            links[container.parent] += links[container.index]
    total = max(1, text[0] - links[0])
    best, best_score = 0, -1.0
    for container in containers:
        index = container.index
        if score[index] <= 0 or text[index] == 0:
            continue
        value = score[index] * (1 - links[index] / text[index])
        names = container.names
        if "articlebody" in container.itemprop:
            value *= 2.0
        elif container.tag == "article" or (names and _CONTENT.search(names)):
            value *= 1.5
        elif container.tag == "main":
            value *= 1.2
        elif container.tag in ("li", "td", "th", "ul", "ol", "dl", "blockquote", "form"):
            value *= 0.7
        if value > best_score:
            best, best_score = index, value
    # Climb while the parent adds a good deal of plain text: an article in several sections.
    while containers[best].parent >= 0:
        parent = containers[best].parent
        own = text[best] - links[best]
        above = text[parent] - links[parent]
        if own >= 0.9 * total:
            break
        gain = (above - own) / max(own, 1)
        density = (links[parent] - links[best]) / max(1, text[parent] - text[best])
        if above == own or (gain > 0.15 and density < 0.2 and containers[parent].tag not in _NEUTRAL_TAGS):
            best = parent
            continue
        break
    return best


def _clean(blocks: Sequence[Block], containers: Sequence[Container], chosen: list[int]) -> list[int]:
    """Drop blocks of links and single words of furniture; cut off what follows the article."""
    kept: list[int] = []
    for i in chosen:
        block = blocks[i]
        size = len(block.text)
        if block.kind in ("code", "table"):
            if block.kind == "table" and block.link_chars > 0.7 * size:
                continue
            kept.append(i)
            continue
        if block.link_chars > 0.6 * size and (block.kind == "item" or size < 200):
            continue
        if size < 100 and _JUNK.match(block.text):
            continue
        kept.append(i)
    for place, i in enumerate(kept):
        if len(blocks[i].text) < 90 and place > 0.5 * len(kept) and _END.match(blocks[i].text.strip(" :")):
            kept = kept[:place]
            break
    # Headings with nothing under them say nothing.
    result: list[int] = []
    for place, i in enumerate(kept):
        if blocks[i].kind == "heading" and place > 0:
            following = kept[place + 1] if place + 1 < len(kept) else -1
            if following < 0 or (
                blocks[following].kind == "heading" and blocks[following].level <= blocks[i].level
            ):
                continue
        result.append(i)
    return result
