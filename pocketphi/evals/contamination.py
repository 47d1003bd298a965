"""Which items of a task occur in the corpus that made the model.

Words are compared without case and punctuation, in n-grams of 13; an item with fewer words is one n-gram
of its own length, and items under 8 words are left out because they cannot be told from ordinary speech.
An item counts as seen when one document of the training text holds at least half of its n-grams.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pocketphi.core import artifact, progress
from pocketphi.core.artifact import Artifact
from pocketphi.evals import harness, metrics
from pocketphi.evals.task import Prompt, Question

if TYPE_CHECKING:
    from pocketphi.evals.loading import Loaded

NGRAM_WORDS = 13
MIN_WORDS = 8
SEEN_SHARE = 0.5
RULE = (
    f"words without case and punctuation, {NGRAM_WORDS}-grams; an item of {MIN_WORDS} words or more counts as seen "
    f"when one training document holds at least {SEEN_SHARE:.0%} of its n-grams"
)
_TABLE_BITS = 24
_WORD = re.compile(r"\w+")
_MIX = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Contamination:
    """Per task: names of the items seen, and how many items were long enough to be judged."""

    seen: Mapping[str, frozenset[str]]
    judged: Mapping[str, int]
    documents: int


class _Index:
    """N-grams of all items: sorted hashes [K], the item of each [K], n-grams per item."""

    def __init__(self, items: Iterable[tuple[str, str]]) -> None:
        self.names: list[str] = []
        grams: list[np.ndarray] = []
        for name, text in items:
            words = _WORD.findall(text.lower())
            if len(words) < MIN_WORDS:
                continue
            self.names.append(name)
            grams.append(np.unique(_ngrams(_hashes(words), min(NGRAM_WORDS, len(words)))))
        self.totals = np.array([len(g) for g in grams], dtype=np.int64)
        hashes = np.concatenate(grams) if grams else np.zeros(0, dtype=np.uint64)
        items_K = np.repeat(np.arange(len(grams)), self.totals)
        order = np.argsort(hashes, kind="stable")
        self.hashes, self.items = hashes[order], items_K[order]
        self.table = np.zeros(1 << _TABLE_BITS, dtype=bool)
        self.table[_low(self.hashes)] = True

    def found(self, text: str) -> Iterator[int]:
        """Yield the numbers of the items of which a text holds enough."""
        hashes = _hashes(_WORD.findall(text.lower()))
        hits = []
        for n in range(MIN_WORDS, NGRAM_WORDS + 1):
            grams = _ngrams(hashes, n)
            grams = grams[self.table[_low(grams)]]
            place = np.searchsorted(self.hashes, grams)
            place[place == len(self.hashes)] = 0
            hits.append(grams[self.hashes[place] == grams])
        held = np.unique(np.concatenate(hits))
        if not len(held):
            return
        counts = np.bincount(self.items[np.isin(self.hashes, held)], minlength=len(self.names))
        yield from np.nonzero(counts >= np.maximum(SEEN_SHARE * self.totals, 1))[0].tolist()


def corpora_of(model: Any, given: Any) -> list[Artifact]:
    """The corpora that a model was made from: the one given, else all in the model's lineage on disk.

    model: an artifact, or the path of a file inside one; anything else has no lineage.
    """
    if given is not None:
        return [artifact.load(given, kind="corpus", verify=False)]
    if isinstance(model, Path) and (model.parent / artifact.MANIFEST).is_file():
        model = artifact.load(model.parent, verify=False)
    if not isinstance(model, Artifact):
        return []
    return [found for found in artifact.lineage(model) if found.kind == "corpus"]


def item_text(item: Any) -> str:
    """What is looked for: the question with its right answer (lm-eval's too), or a written task's prompt.

    A passage is left out: that a text stands in the corpus does not say that its questions do.
    """
    if isinstance(item, Question):
        return f"{item.text} {item.options[item.gold]}"
    return item.prompt if isinstance(item, Prompt) else f"{item.question} {item.target}"


def annotate(
    corpora: Sequence[Artifact], scored: Sequence[tuple[Loaded, dict[str, Any], list[dict[str, Any]]]]
) -> dict[str, Any]:
    """Check every scored item against the corpora; add the shares to entries and `seen` to records.

    scored: (task, entry of results.json, records of items.jsonl). Returns what results.json says of the
    check as a whole.
    """
    items = {
        each.task.label: [(item.id, item_text(item)) for item in each.items]
        for each, _, _ in scored
        if each.file is not None or each.task.kind == "harness" or each.task.name == "house"
    }
    parts = [check(corpus, items) for corpus in corpora]
    for each, entry, records in scored:
        label = each.task.label
        if label not in items:
            continue
        judged = parts[0].judged[label]
        seen = frozenset().union(*(p.seen[label] for p in parts))
        for record in records:
            record["seen_in_corpus"] = record["id"] in seen
        entry["num_judged_for_contamination"] = judged
        entry["num_seen_in_corpus"] = len(seen)
        entry["contaminated_share"] = round(len(seen) / judged, 6) if judged else 0.0
        unseen = [r for r in records if not r["seen_in_corpus"]]
        if seen and unseen:
            own = each.task.kind == "harness"
            figures = harness.figures(each, unseen) if own else metrics.figures(each.task, unseen)
            entry["value_unseen"] = round(figures["value"], 6)
            entry["value_unseen_stderr"] = None if figures["stderr"] is None else round(figures["stderr"], 6)
    return {
        "checked": True,
        "rule": RULE,
        "corpora": [c.checksum for c in corpora],
        "num_documents": sum(p.documents for p in parts),
    }


def check(corpus: Artifact, items: Mapping[str, Iterable[tuple[str, str]]]) -> Contamination:
    """Search the documents that were trained on for the items of several tasks at once.

    items: task -> (id, text of the question).
    """
    from pocketphi import corpus as corpora

    index = _Index((f"{task}\0{id_}", text) for task, found in items.items() for id_, text in found)
    judged = dict.fromkeys(items, 0)
    for name in index.names:
        judged[name.partition("\0")[0]] += 1
    seen: dict[str, set[str]] = {task: set() for task in items}
    documents = 0
    if index.names:
        with progress.bar("contamination", None, unit="documents") as shown:
            for batch in corpora.read(corpus, columns=["text"], heldout=False):
                for text in batch.column("text").to_pylist():
                    documents += 1
                    for number in index.found(text):
                        task, _, id_ = index.names[number].partition("\0")
                        seen[task].add(id_)
                shown.advance(batch.num_rows)
    return Contamination({t: frozenset(s) for t, s in seen.items()}, judged, documents)


_known: dict[str, int] = {}


def _hashes(words: Sequence[str]) -> np.ndarray:
    """A 64-bit number per word."""
    if len(_known) > 2_000_000:
        _known.clear()
    found = np.empty(len(words), dtype=np.uint64)
    for place, word in enumerate(words):
        number = _known.get(word)
        if number is None:
            digest = hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest()
            number = _known[word] = int.from_bytes(digest, "little")
        found[place] = number
    return found


def _ngrams(hashes: np.ndarray, n: int) -> np.ndarray:
    """One number per n-gram of a sequence of word numbers."""
    count = len(hashes) - n + 1
    if count <= 0:
        return np.zeros(0, dtype=np.uint64)
    found = np.full(count, n, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for offset in range(n):
            found = (found ^ hashes[offset : offset + count]) * _MIX
            found ^= found >> np.uint64(29)
    return found


def _low(hashes: np.ndarray) -> np.ndarray:
    return (hashes & np.uint64((1 << _TABLE_BITS) - 1)).astype(np.int64)
