"""Which blocks of a page are its main content.

Paragraphs vote for the containers that hold them (the idea of Readability, Arc90 2009); what the page
marks itself (article, main, itemprop=articleBody) is believed when enough text lies in it. Inside the
chosen container, blocks of links and containers named like furniture are left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from pocketphi.corpus.extraction.trimming import clean, lead, trim
from pocketphi.corpus.extraction.walk import Block, Container, FlatPage

_MIN_VOTE_CHARS = 25
_MIN_CONTENT_CHARS = 250
_MIN_LEFT_SHARE = 0.4

# Names that say what a container is not. Matched on class, id and role, after `plain_names`.
_FURNITURE = re.compile(
    r"(?:^|[\s_\-])(?:nav\w*|menus?|footer|foot|sidebar\w*|side|aside|widget\w*|banner|ads?|sponsor\w*|promo\w*"
    r"|subscri\w*|signup|sign-up|login|overlay|share\w*|sharing|social\w*|addthis|tags?|taglist|popular"
    r"|more-(?:stories|news|articles|from)|read-more|readmore|also-(?:like|read)|pagination|pager|masthead|toolbar"
    r"|skip-link|copyright|legal|print|meta|byline|author\w*|bio|rating\w*|toc|navbox|catlinks|mw-jump\w*|editsection"
    r"|noprint|hidden|hide|sr-only|screen-reader\w*|visually-?hidden|\w*captions?|\w*credits?|teaser\w*|complementary"
    r"|navigation|search\w*|info-?box\w*|fact-?box\w*|timestamp|metadata|kicker|attribution|galler\w*|carousel\w*"
    r"|slideshow\w*|lightbox\w*|slick\w*|prev|previous|next|prevnext|tooltip\w*|toast|key-?points|paywall\w*|capping"
    r"|disclosure|affiliate\w*|news-letter\w*|cta|app-?stores?|content-blocker|embed-article|donat\w*|kommentar\w*"
    r"|image-?(?:box|wrap\w*)|img-?(?:wrap\w*|inline)|third-party-\w+)"
    r"(?:$|[\s_\-])"
)
# Names that are never the content, however much text they hold.
_NEVER = re.compile(
    r"(?:^|[\s_\-])(?:comments?|comment-?(?:list|area|form|section|thread|wrap\w*|content|body|text)|commentlist|respond"
    r"|disqus\w*|replies|related\w*|recommend\w*|cookie\w*|gdpr|consent|onetrust\w*|outbrain|taboola|newsletter\w*"
    r"|advert\w*|breadcrumbs?|most-read|trending|popup|modal|dialog|privacy\w*)(?:$|[\s_\-])"
)
_CONTENT = re.compile(
    r"(?:^|[\s_\-])(?:article-?(?:body|content|text|detail\w*)|articlebody|entry-?content|post-?(?:content|body|text|entry)"
    r"|story-?(?:body|content|text)|content-?(?:body|main|article|text)|main-?(?:content|text)|page-?content"
    r"|body-?(?:content|text|copy)|mw-parser-output|markdown-body|prose|rich-?text|text-?body|hentry|blog-?post)"
    r"(?:$|[\s_\-])"
)
# Words of a layout or a state, not of a part: "sidebar-grid", "has-comments", "modal-enabled".
_STATE = re.compile(
    r"(?:^|[\-_])(?:grid|layout|row|col\w*|enabled|disabled|open|closed|allowed|has|no|not|with|without|is|js|single"
    r"|template|page|type|format|category|tag|status)(?:$|[\-_])"
)
_NAMELESS = (False, False, False)
_NEUTRAL_TAGS = frozenset(("body", "html"))
_FURNITURE_TAGS = frozenset(("footer", "aside", "form"))


def select(page: FlatPage) -> list[Block]:
    """Return the blocks of the main content, in order."""
    blocks, containers = page.blocks, page.containers
    if not blocks or not containers:
        return blocks
    # First without believing names (but for those that never lie), so that an article inside a
    # "sidebar-layout" is found; then nothing above it counts as furniture.
    never = _furniture(blocks, containers, frozenset(), only_never=True)
    first = _root(blocks, containers, [not never[block.container] for block in blocks])
    bad = _furniture(blocks, containers, _ancestors(containers, first), only_never=False)
    inside = _descendants(containers, first)
    before = _plain_chars(blocks, inside, never)
    if _plain_chars(blocks, inside, bad) < _MIN_LEFT_SHARE * before:
        bad = never  # names that would remove most of the article mean something else here
    live = [not bad[block.container] for block in blocks]
    root = _root(blocks, containers, live)
    inside = _descendants(containers, root)
    chosen = [i for i, block in enumerate(blocks) if live[i] and block.container in inside]
    chosen = clean(blocks, containers, chosen)
    if _chars(blocks, chosen) < _MIN_CONTENT_CHARS:
        # Nothing that looks like an article: take every block that reads like a sentence or a list of them.
        everything = clean(blocks, containers, [i for i in range(len(blocks)) if live[i]])
        if _chars(blocks, everything) > 2 * _chars(blocks, chosen):
            chosen = everything
    if not chosen:
        chosen = [i for i in range(len(blocks)) if live[i]] or list(range(len(blocks)))
    chosen = trim(blocks, lead(blocks, containers, chosen, never))
    return [blocks[i] for i in chosen]


def plain_names(names: str) -> str:
    """Reduce class names to what they call the part: "block__element--modifier" to "element", no states."""
    tokens = []
    for token in names.split():
        token = token.split("--")[0].rpartition("__")[2]
        if token and not _STATE.search(token):
            tokens.append(token)
    return " ".join(tokens)


@lru_cache(maxsize=20_000)
def _named(names: str) -> tuple[bool, bool, bool]:
    """What class names say: (never content, furniture, content)."""
    plain = plain_names(names)
    if not plain:
        return False, False, False
    content = bool(_CONTENT.search(plain))
    return bool(_NEVER.search(plain)), not content and bool(_FURNITURE.search(plain)), content


def _ancestors(containers: Sequence[Container], index: int) -> frozenset[int]:
    found = set()
    while index >= 0:
        found.add(index)
        index = containers[index].parent
    return frozenset(found)


def _plain_chars(blocks: Sequence[Block], inside: set[int], bad: Sequence[bool]) -> int:
    """Characters outside links, in containers `inside` that are not `bad`."""
    return sum(
        len(block.text) - block.link_chars
        for block in blocks
        if block.container in inside and not bad[block.container]
    )


def _chars(blocks: Sequence[Block], chosen: Sequence[int]) -> int:
    return sum(len(blocks[i].text) for i in chosen)


def _descendants(containers: Sequence[Container], root: int) -> set[int]:
    """Containers come parents first, so one pass finds everything below `root`."""
    inside = {root}
    for container in containers[root + 1 :]:
        if container.parent in inside:
            inside.add(container.index)
    return inside


def _furniture(
    blocks: Sequence[Block], containers: Sequence[Container], spared: frozenset[int], only_never: bool
) -> list[bool]:
    """Mark containers that are furniture by name or tag, with all they hold, but none that is `spared`."""
    size = [0] * len(containers)
    for block in blocks:
        if block.container >= 0:
            size[block.container] += max(0, len(block.text) - block.link_chars)
    for container in reversed(containers):
        if container.parent >= 0:
            size[container.parent] += size[container.index]
    total = max(1, size[0])
    # What the page itself calls its main part is in no dialog, however its frame is named (Drupal's is).
    spared = spared.union(*(_ancestors(containers, c.parent) for c in containers if c.tag == "main"))
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
        if container.tag in _NEUTRAL_TAGS or index in spared:
            continue
        never, furnished, _ = _named(container.names) if container.names else _NAMELESS
        if only_never:
            bad[index] = (never or container.tag in ("footer", "aside")) and size[index] < 0.8 * total
            continue
        if never and size[index] < 0.8 * total:
            bad[index] = True
            continue
        furniture = container.tag in _FURNITURE_TAGS or (container.tag == "header" and not article[index])
        if (furniture or furnished) and size[index] < 0.5 * total:
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
    best, best_score = 0, -1.0
    for container in containers:
        index = container.index
        if score[index] <= 0 or text[index] == 0:
            continue
        value = score[index] * (1 - links[index] / text[index])
        if "articlebody" in container.itemprop:
            value *= 2.0
        elif container.tag == "article" or (container.names and _named(container.names)[2]):
            value *= 1.5
        elif container.tag == "main":
            value *= 1.2
        elif container.tag in ("li", "td", "th", "ul", "ol", "dl", "blockquote", "form"):
            value *= 0.7
        if value > best_score:
            best, best_score = index, value
    return _climb(containers, best, text, links)


def _climb(containers: Sequence[Container], best: int, text: Sequence[int], links: Sequence[int]) -> int:
    """Return the highest ancestor that still adds mostly plain text: an article in several sections."""
    index = top = best
    for _ in range(6):
        index = containers[index].parent
        if index < 0 or containers[index].tag in _NEUTRAL_TAGS:
            break
        own, above = text[top] - links[top], text[index] - links[index]
        added = text[index] - text[top]
        if added <= 0:
            continue
        density = (links[index] - links[top]) / added
        gain = above - own
        if (
            (gain > 0.15 * own and density < 0.25)
            or (gain > 0.03 * own and density < 0.08)
            or containers[index].tag == "article"
        ):
            top = index
    return top
