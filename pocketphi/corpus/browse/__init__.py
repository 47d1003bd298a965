"""`phi corpus browse`: one offline page on which a person reads what was kept and what was rejected.

The page holds a bounded sample (at random, and near the border of every rule) and, for every rule, exact
counts over the whole corpus, so that a moved threshold says at once how many documents change sides.
Two passes over the verdicts, one part in memory at a time; the texts of the sample only are read.

What is written into the page comes from the web and is hostile: it goes in as JSON with `<`, `>` and `&`
escaped, is shown through textContent only, and the page's content policy runs no script but its own.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet

from pocketphi.core import artifact
from pocketphi.core.artifact import Artifact
from pocketphi.core.config import parse
from pocketphi.core.errors import UserError
from pocketphi.corpus.config import CorpusConfig
from pocketphi.corpus.reading import part_files, stats
from pocketphi.corpus.rules import Bounds, bounds_for, rules

_BINS = 120
_TEXT_CHARS = 4000
_BORDER = 5  # documents on either side of each border


@dataclass
class _Border:
    """The nearest documents to one bound of one rule, on one side: parallel arrays, nearest first."""

    distance: np.ndarray = field(default_factory=lambda: np.zeros(0))
    place: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), dtype=np.int64))

    def offer(self, distance: np.ndarray, place: np.ndarray) -> None:
        distance = np.concatenate([self.distance, distance])
        place = np.concatenate([self.place, place])
        nearest = np.argsort(distance, kind="stable")[:_BORDER]
        self.distance, self.place = distance[nearest], place[nearest]


@dataclass
class _Counts:
    """Of one rule: bins [edges[i], edges[i + 1]) and the documents in them that it judges.

    `decided` are those that pass every other rule: they change sides when this threshold moves.
    """

    edges: np.ndarray
    decided: np.ndarray
    others: np.ndarray
    unjudged_kept: int = 0  # kept, and this rule does not judge them

    def add(self, scores: np.ndarray, decided: np.ndarray) -> None:
        bins = np.searchsorted(self.edges, scores, side="right") - 1
        self.decided += np.bincount(bins[decided], minlength=len(self.decided))
        self.others += np.bincount(bins[~decided], minlength=len(self.others))


def write_page(corpus: Artifact | Path | str, out: Path, *, num_documents: int = 400) -> dict[str, Any]:
    """Write the page of a corpus to `out`; returns how many documents it shows and its size.

    `num_documents` are taken at random, half of them kept, half rejected, beside those near the borders.
    Raises UserError when `out` lies inside the artifact, whose files are checked.
    """
    found = artifact.load(corpus, kind="corpus", verify=False)
    if found.path.resolve() in (out.resolve(), *out.resolve().parents):
        raise UserError(f"{out} lies inside the corpus, whose files are checked", hint="choose another --out")
    page = render(page_data(found, num_documents))
    out.parent.mkdir(parents=True, exist_ok=True)
    artifact.write_atomic(out, page)
    return {"path": str(out), "bytes": len(page.encode())}


def page_data(found: Artifact, num_documents: int) -> dict[str, Any]:
    """Return what the page shows, ready for JSON."""
    config = parse(CorpusConfig, found.config, where=str(found.path))
    sources = {source.name or "": source for source in config.sources()}
    tree = stats(found)
    general = {name: Bounds(item.min, item.max, True) for name, item in rules.items()}
    for name, change in config.rules.items():
        low = change.min if change.min is not None else general[name].min
        high = change.max if change.max is not None else general[name].max
        general[name] = Bounds(low, high, change.enabled)
    bounds = {name: bounds_for(config, source) for name, source in sources.items()}
    counts = {name: _empty_counts(general[name], tree["rules"].get(name, {}), bounds, name) for name in rules}
    borders: dict[tuple[str, str, bool], _Border] = {}
    share = {True: num_documents - num_documents // 2, False: num_documents // 2}
    randomly: dict[bool, list[tuple[str, int, int]]] = {True: [], False: []}
    totals = {"kept": 0, "rejected": 0}
    parts = part_files(found)
    source_of: list[str] = []
    for number, (documents_path, verdicts_path) in enumerate(parts):
        table = pyarrow.parquet.read_table(verdicts_path)
        source_of.append(_source_of(documents_path))
        if not table.num_rows:
            continue
        limits = bounds.get(source_of[-1], general)
        keep = table.column("keep").to_numpy()
        totals["kept"] += int(keep.sum())
        totals["rejected"] += int((~keep).sum())
        names = [name for name in rules if f"{name}.keep" in table.column_names]
        passed = {name: table.column(f"{name}.keep").to_numpy() for name in names}
        num_failed = np.sum([~column for column in passed.values()], axis=0)
        place = np.stack([np.full(len(keep), number), np.arange(len(keep))], axis=1)
        for name in names:
            scores = table.column(f"{name}.score").to_numpy()
            decided = num_failed == ~passed[name]
            judged = np.isfinite(scores) & limits[name].applies
            counts[name].unjudged_kept += int((keep & ~judged).sum())
            counts[name].add(scores[judged], decided[judged])
            for side, bound in (("min", limits[name].min), ("max", limits[name].max)):
                if not math.isfinite(bound):
                    continue
                for kept in (True, False):
                    rows = judged & decided & (passed[name] == kept)
                    distance = np.abs(scores[rows].astype(np.float64) - bound)
                    borders.setdefault((name, side, kept), _Border()).offer(distance, place[rows])
        ids = table.column("id").to_pylist()
        for kept in (True, False):
            rows = np.flatnonzero(keep == kept)
            # Ids are hashes: the smallest of them are an even sample.
            offered = [*randomly[kept], *((ids[row], number, int(row)) for row in rows)]
            randomly[kept] = sorted(offered)[: share[kept]]
    places = {(part, row) for listed in randomly.values() for _, part, row in listed}
    places |= {(int(part), int(row)) for border in borders.values() for part, row in border.place}
    return {
        "title": found.path.name,
        "totals": totals,
        "failed": tree["totals"].get("documents_failed", 0),
        "failures": tree["failures"],
        "rules": {
            name: {
                "about": rules[name].about,
                "min": _number(general[name].min),
                "max": _number(general[name].max),
                "rejected": tree["rules"].get(name, {}).get("rejected", 0),
                "edges": [_number(edge) for edge in found_counts.edges.tolist()],
                "decided": found_counts.decided.tolist(),
                "others": found_counts.others.tolist(),
                "unjudged_kept": found_counts.unjudged_kept,
            }
            for name, found_counts in counts.items()
        },
        "applies": {
            name: [rule for rule, limit in bounds.get(name, general).items() if limit.applies]
            for name in sorted(set(source_of))
        },
        "documents": _documents(parts, source_of, sorted(places)),
    }


def _empty_counts(
    limit: Bounds, entry: dict[str, Any], by_source: dict[str, dict[str, Bounds]], name: str
) -> _Counts:
    quantiles = entry.get("quantiles", {})
    marks = {limit.min, limit.max}
    for bounds in by_source.values():
        marks |= {bounds[name].min, bounds[name].max}
    finite = [mark for mark in marks if math.isfinite(mark)]
    values = [quantiles[q] for q in ("p1", "p99") if q in quantiles] + finite
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if low == high:
        low, high = min(low, 0.0), high + 1.0
    room = 0.05 * (high - low)
    inner = np.linspace(
        low - room if low < 0 else max(0.0, low - room), high + room, _BINS + 1, dtype=np.float32
    )
    # The bounds in force are edges, so that the page starts with the corpus's own counts. A maximum
    # still passes: its edge is the next number.
    lows = np.array([limit.min for limit in _all(by_source, name, limit)], dtype=np.float32)
    highs = np.nextafter(
        np.array([limit.max for limit in _all(by_source, name, limit)], dtype=np.float32), np.float32(np.inf)
    )
    edges = np.unique(np.concatenate([np.array([-np.inf], dtype=np.float32), inner, lows, highs]))
    edges = edges[edges < np.inf].astype(np.float64)
    zeros = np.zeros(len(edges), dtype=np.int64)
    return _Counts(edges, zeros, zeros.copy())


def _all(by_source: dict[str, dict[str, Bounds]], name: str, general: Bounds) -> list[Bounds]:
    return [general, *(bounds[name] for bounds in by_source.values())]


def _source_of(documents_path: Path) -> str:
    file = pyarrow.parquet.ParquetFile(documents_path)
    for batch in file.iter_batches(batch_size=1, columns=["meta"]):
        for meta in batch.column("meta").to_pylist():
            return json.loads(meta)["input"]
    return ""


def _documents(
    parts: list[tuple[Path, Path]], source_of: list[str], places: list[tuple[int, int]]
) -> list[dict[str, Any]]:
    shown: list[dict[str, Any]] = []
    for number in sorted({part for part, _ in places}):
        rows = [row for part, row in places if part == number]
        documents = pyarrow.parquet.read_table(parts[number][0]).take(rows).to_pylist()
        verdicts = pyarrow.parquet.read_table(parts[number][1]).take(rows).to_pylist()
        for document, verdict in zip(documents, verdicts):
            text = document["text"]
            shown.append(
                {
                    "id": document["id"],
                    "url": document["url"] or json.loads(document["meta"]).get("where", ""),
                    "source": source_of[number],
                    "license": document["license"],
                    "text": text[:_TEXT_CHARS],
                    "chars": len(text),
                    "keep": verdict["keep"],
                    "reasons": verdict["reasons"],
                    "like": verdict["contamination.item"] or verdict["duplicate_of"],
                    "scores": {
                        name: _number(verdict[f"{name}.score"])
                        for name in rules
                        if f"{name}.score" in verdict
                    },
                }
            )
    return shown


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def render(data: dict[str, Any]) -> str:
    """Return the page: markup, style and script of this package, and `data`, which no parser can leave."""
    folder = resources.files("pocketphi.corpus.browse")
    script = folder.joinpath("page.js").read_text(encoding="utf-8")
    style = folder.joinpath("page.css").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    body = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    for character in "<>&":  # inside JSON these stand in strings only
        body = body.replace(character, f"\\u{ord(character):04x}")
    page = folder.joinpath("page.html").read_text(encoding="utf-8")
    for name, value in (("POLICY", policy), ("STYLE", style), ("SCRIPT", script), ("DATA", body)):
        page = page.replace(f"[[{name}]]", value, 1)
    return page


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
