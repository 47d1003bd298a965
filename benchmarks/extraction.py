"""Main text of labelled pages: ours beside trafilatura and plain resiliparse, quality and speed.

    python benchmarks/extraction.py DATA [--pages 0] [--sets NAME ...] [--half held-out] [--worst 10]
        [--out FOLDER] [--json]

DATA holds webpages/*.jsonl.zst (see below). Every page goes through every extractor in turn, so that all
see the same machine; speed is pages per second of processor time of this process (one core).

Sets and their truth:
  scrapinghub-articles   the article's text
  fundus-news            summary, headlines and paragraphs
  mozilla-readability    cleaned HTML, read as text
  trafilatura-eval       strings that must and must not be there (no full text)

Figures per set, averages over its pages: F1, precision and recall of words (as a bag); of runs of four
words, which sees order and joins (the measure of scrapinghub's benchmark); of lines, a line counting as
found when four fifths of its words stand in one line of the other side. For trafilatura-eval: F1 of its
strings, counted over the whole set as its own evaluation counts them.

Rules for what belongs to an article were chosen by looking at the pages of one half only (--half tuned; a
hash of the page's id decides); the other half is --half held-out.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import io
import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SETS = ("scrapinghub-articles", "fundus-news", "mozilla-readability", "trafilatura-eval")
_WORD = re.compile(r"\w+")
_LINE_SHARE = 0.8
_MIN_LINE_WORDS = 4  # shorter lines match by accident
_BLOCKS = (
    *("p", "div", "li", "h1", "h2", "h3", "h4", "h5", "h6", "td", "th", "tr", "br", "pre", "blockquote"),
    *("figcaption", "dd", "dt", "section", "article", "ul", "ol"),
)


def pages(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a set."""
    import zstandard

    with open(folder / "webpages" / f"{name}.jsonl.zst", "rb") as file:
        for line in io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file), encoding="utf-8"):
            yield json.loads(line)


def half_of(page_id: str) -> str:
    """Which half a page is in: the one whose pages were looked at, or the one that was kept out."""
    return "held-out" if hashlib.md5(page_id.encode()).digest()[0] & 1 else "tuned"


def extractors() -> dict[str, Callable[[str], str]]:
    """Name to function from HTML to text."""
    import trafilatura
    from resiliparse.extract.html2text import extract_plain_text

    from pocketphi.corpus.extraction import extract

    return {
        "pocketphi": lambda html: extract(html).text,
        "trafilatura": lambda html: trafilatura.extract(html, include_comments=False) or "",
        "trafilatura-fast": lambda html: trafilatura.extract(html, include_comments=False, fast=True) or "",
        "resiliparse": lambda html: extract_plain_text(html, main_content=True),
    }


def truth_of(name: str, row: dict[str, Any]) -> str:
    """The text that a person marked as the page's content."""
    truth = row["truth"]
    if name == "scrapinghub-articles":
        return truth["articleBody"]
    if name == "fundus-news":
        lines = list(truth["body"]["summary"])
        for section in truth["body"]["sections"]:
            lines += [*section["headline"], *section["paragraphs"]]
        return "\n".join(lines)
    from lxml import html as parser

    root = parser.fromstring(truth["expected_html"])
    for node in root.iter("script", "style"):
        node.text = None
    for node in root.iter(*_BLOCKS):
        node.tail = "\n" + (node.tail or "")
        node.text = "\n" + (node.text or "")
    return "\n".join(line for line in (s.strip() for s in root.text_content().split("\n")) if line)


def f1(hits: float, found: float, wanted: float) -> tuple[float, float, float]:
    """Return (F1, precision, recall); nothing found of nothing wanted is right."""
    if not found and not wanted:
        return 1.0, 1.0, 1.0
    precision, recall = hits / found if found else 0.0, hits / wanted if wanted else 0.0
    return (2 * precision * recall / (precision + recall) if hits else 0.0), precision, recall


def bags(found: list[str], wanted: list[str], width: int) -> tuple[float, float, float]:
    """F1 of runs of `width` words."""
    a, b = (
        Counter(zip(*(words[i:] for i in range(width)))) if len(words) >= width else Counter([tuple(words)])
        for words in (found, wanted)
    )
    return f1(sum((a & b).values()), sum(a.values()), sum(b.values()))


def lines_f1(found: str, wanted: str) -> float:
    """F1 of lines (paragraphs), each weighing as many words as it has."""

    def split(text: str) -> list[Counter[str]]:
        return [Counter(w) for w in (_WORD.findall(s.lower()) for s in text.split("\n")) if w]

    def matched(lines: list[Counter[str]], others: list[Counter[str]]) -> tuple[int, int]:
        holders: dict[str, list[int]] = {}
        for number, other in enumerate(others):
            for word in other:
                holders.setdefault(word, []).append(number)
        hit = total = 0
        for line in lines:
            size = sum(line.values())
            if size < _MIN_LINE_WORDS:
                continue
            total += size
            shared: Counter[int] = Counter()
            for word, number in line.items():
                for place in holders.get(word, ()):
                    shared[place] += min(number, others[place][word])
            if shared and max(shared.values()) >= _LINE_SHARE * size:
                hit += size
        return hit, total

    a, b = split(found), split(wanted)
    hit_a, total_a = matched(a, b)
    hit_b, total_b = matched(b, a)
    precision = hit_a / total_a if total_a else float(not total_b)
    recall = hit_b / total_b if total_b else float(not total_a)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def measure(name: str, rows: list[dict[str, Any]], tools: dict[str, Callable[[str], str]]) -> dict[str, Any]:
    """Run all extractors over one set; return figures by extractor, and scores page by page."""
    seconds = dict.fromkeys(tools, 0.0)
    failed = dict.fromkeys(tools, 0)
    sums: dict[str, Counter[str]] = {tool: Counter() for tool in tools}
    by_page: list[dict[str, Any]] = []
    for row in rows:
        texts = {}
        for tool, run in tools.items():
            began = time.process_time()
            try:
                texts[tool] = run(row["html"])
            except Exception as error:
                texts[tool] = ""
                failed[tool] += 1
                print(f"{tool} failed on {row['id']}: {type(error).__name__}", file=sys.stderr)
            seconds[tool] += time.process_time() - began
        page: dict[str, Any] = {"set": name, "id": row["id"], "url": row["url"]}
        strings = row["truth"] if name == "trafilatura-eval" else None
        truth = None if strings else truth_of(name, row)
        wanted = _WORD.findall(truth.lower()) if truth is not None else []
        for tool, text in texts.items():
            if strings:
                # White space is not judged: line ends and tables are set differently.
                flat = " ".join(text.split())
                has = [" ".join(s.split()) in flat for s in strings["with"] or []]
                bad = [" ".join(s.split()) in flat for s in strings["without"] or []]
                sums[tool].update(tp=sum(has), fn=len(has) - sum(has), fp=sum(bad), tn=len(bad) - sum(bad))
                page[tool] = f1(sum(has), sum(has) + sum(bad), len(has))[0]
            else:
                assert truth is not None
                found = _WORD.findall(text.lower())
                score, precision, recall = bags(found, wanted, 1)
                page[tool] = score
                sums[tool].update(
                    word_f1=score,
                    word_precision=precision,
                    word_recall=recall,
                    four_word_f1=bags(found, wanted, 4)[0],
                    line_f1=lines_f1(text, truth),
                )
        by_page.append(page)
    figures = {}
    for tool, total in sums.items():
        if name == "trafilatura-eval":
            tp, fp, fn = total["tp"], total["fp"], total["fn"]
            score, precision, recall = f1(tp, tp + fp, tp + fn)
            figures[tool] = {"string_f1": score, "string_precision": precision, "string_recall": recall}
        else:
            figures[tool] = {key: value / len(rows) for key, value in total.items()}
        figures[tool] |= {"pages_per_s": len(rows) / seconds[tool], "failed": failed[tool]}
    return {"figures": figures, "pages": by_page}


def interval(by_page: list[dict[str, Any]], one: str, other: str) -> tuple[float, float, float]:
    """Mean difference of page scores `one` - `other`, and its 95% interval by resampling pages."""
    differences = [page[one] - page[other] for page in by_page]
    lot = random.Random(0)
    means = sorted(sum(lot.choices(differences, k=len(differences))) / len(differences) for _ in range(1000))
    return sum(differences) / len(differences), means[25], means[974]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path, help="folder that holds webpages/")
    parser.add_argument("--pages", type=int, default=0, help="of each set, evenly spread; 0 takes all")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--half", choices=("tuned", "held-out"), help="default: both")
    parser.add_argument("--worst", type=int, default=10, help="pages shown where ours is furthest behind")
    parser.add_argument("--out", type=Path, help="folder for pages.jsonl, the scores page by page")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    tools = extractors()
    flat: dict[str, Any] = {
        f"version_{name}": importlib.metadata.version(name) for name in ("trafilatura", "resiliparse")
    }
    everything: list[dict[str, Any]] = []
    for name in arguments.sets:
        rows = [row for row in pages(arguments.data, name) if arguments.half in (None, half_of(row["id"]))]
        if arguments.pages:
            rows = rows[:: max(1, len(rows) // arguments.pages)]
        result = measure(name, rows, tools)
        everything += result["pages"]
        if not arguments.json:
            print(f"\n{name}: {len(rows)} pages", flush=True)
        for tool, figures in result["figures"].items():
            flat |= {f"{name}.{tool}.{key}": value for key, value in figures.items()}
            if not arguments.json:
                print(f"  {tool:<18}" + "  ".join(f"{k} {v:.4g}" for k, v in figures.items()))
        for other in list(tools)[1:]:
            mean, low, high = interval(result["pages"], "pocketphi", other)
            flat[f"{name}.difference_to_{other}"] = mean
            if not arguments.json:
                print(f"  page F1, ours - {other}: {mean:+.4f} (95%: {low:+.4f} to {high:+.4f})")
    if arguments.json:
        print(json.dumps(flat, indent=1))
    else:
        behind = sorted(everything, key=lambda page: page["pocketphi"] - page["trafilatura"])
        print(f"\nWhere ours is furthest behind trafilatura ({arguments.worst} of {len(behind)} pages):")
        for page in behind[: arguments.worst]:
            print(
                f"  {page['pocketphi']:.3f} against {page['trafilatura']:.3f}  {page['id']}  {page['url'][:70]}"
            )
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(page, ensure_ascii=False) + "\n" for page in everything)
        (arguments.out / "pages.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
