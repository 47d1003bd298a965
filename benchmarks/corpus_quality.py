"""What decontamination and near-duplicate search find, miss and invent.

    python benchmarks/corpus_quality.py                      # both sections, some minutes
    python benchmarks/corpus_quality.py decontamination --items 20000
    python benchmarks/corpus_quality.py near-duplicates --sizes 10000,1000000

Real benchmarks and texts are read from the folder POCKETPHI_DATA (or ../shared/data). Prints one JSON
object per section; `--show` prints the documents behind every false alarm.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pocketphi.corpus import minhash, near_duplicates  # noqa: E402
from pocketphi.corpus.decontamination import BenchmarkIndex, benchmark_files, benchmark_items  # noqa: E402
from pocketphi.corpus.readers.files import bounded_lines, open_compressed  # noqa: E402
from pocketphi.corpus.rules import rules  # noqa: E402

TEXTBOOKS = ("textbooks-openstax.jsonl.zst", "textbooks-math.jsonl.zst")
THRESHOLD = 0.8
QUESTION = (
    "question",
    "query",
    "problem",
    "prompt",
    "input",
    "goal",
    "sentence",
    "text",
    "statement",
    "ctx",
    "turns",
)
CONTEXT = ("context", "passage", "premise")
CHOICES = ("choices", "options", "endings")
CHOICE_SETS = (("opa", "opb", "opc", "opd"), ("answera", "answerb", "answerc"), ("option1", "option2"))


def json_rows(path: Path) -> Iterator[tuple[int, dict]]:
    with open_compressed(path) as stream:
        for number, line, _ in bounded_lines(stream, 1 << 26):
            if line and line.strip():
                yield number, json.loads(line)


# Decontamination ------------------------------------------------------------------------------------------


def asked(row: dict) -> str:
    """An item as somebody would copy it: context, question, lettered choices, each on a line."""
    low = {key.lower(): value for key, value in row.items()}

    def first(names: tuple[str, ...]) -> str:
        for name in names:
            value = low.get(name)
            value = "\n".join(map(str, value)) if isinstance(value, list) else value
            if isinstance(value, str) and value.strip():
                return value
        return ""

    # "Question:" and "Answer:" are a harness's frame, not the item's words.
    question = re.sub(r"\A\s*(?:Question|Goal)\s*:\s*|\n\s*Answer\s*:\s*\Z", "", first(QUESTION))
    lines = [first(CONTEXT), question]
    choices = next((low[name] for name in CHOICES if low.get(name)), None)
    if isinstance(choices, dict):
        choices = choices.get("text")
    if choices is None:
        choices = next(([low[n] for n in names] for names in CHOICE_SETS if all(n in low for n in names)), [])
    lines += [
        choice if re.match(r"\(?[A-J][).:]", choice) else f"{chr(65 + i)}) {choice}"
        for i, choice in enumerate(map(str, choices if isinstance(choices, list) else []))
    ]
    return "\n".join(line for line in lines if line)


def wrapped(text: str, chance: random.Random) -> str:
    width = chance.choice((30, 45, 60))
    return "\n".join(textwrap.fill(line, width, break_on_hyphens=False) for line in text.split("\n"))


def repunctuated(text: str, chance: random.Random) -> str:
    """Another case, and every mark of punctuation dropped, doubled or exchanged."""
    text = chance.choice((str.upper, str.lower, str.title, str.swapcase))(text)
    marks = ("", ".", ",", ";", " -", "!", "…", " – ", "’", "“")
    return re.sub(r"[^\w\s]|_", lambda _: chance.choice(marks), text)


FORMS = {"verbatim": lambda text, chance: text, "rewrapped": wrapped, "case_and_punctuation": repunctuated}


def decontamination(data: Path, num_items: int, show: bool) -> dict:
    files = benchmark_files([str(data / "benchmarks")])
    started = time.monotonic()
    index = BenchmarkIndex.build(benchmark_items(files))
    recognised = {index.names[entry] for entry in np.unique(index.owners).tolist()}
    recognised |= {index.names[entry] for entry in index.short}
    chance = random.Random(0)
    figures: dict = {
        "benchmark_files": len(files),
        "items": index.num_items + index.num_short + index.num_generic,
        "items_recognisable": index.num_items,
        "items_too_short": index.num_short,
        "items_too_generic": index.num_generic,
        "index_s": round(time.monotonic() - started, 1),
    }
    limit = rules["contamination"].max

    books = [row["text"] for name in TEXTBOOKS for _, row in json_rows(data / "corpus" / name)]
    started = time.monotonic()
    scores, names = index.search(books)
    seconds = time.monotonic() - started
    alarms = np.flatnonzero(scores > limit).tolist()
    figures["textbooks"] = len(books)
    figures["textbooks_flagged"] = len(alarms)
    figures["false_alarm_share"] = len(alarms) / len(books)
    figures["search_bytes_per_s"] = round(sum(len(text.encode()) for text in books) / seconds)
    figures["flagged_items"] = [names[i] for i in alarms]
    if show:
        for i in alarms:
            print(f"--- {names[i]} {scores[i]:.2f}\n{books[i][:1500]}\n", file=sys.stderr)

    # Items to plant: an even sample of those that can be recognised at all.
    rows = [
        (f"{path.name.split('.jsonl')[0]}:{number}", row)
        for path in files
        for number, row in json_rows(path)
        if isinstance(row, dict)
    ]
    rows = [(name, row) for name, row in rows if name in recognised and asked(row)]
    step = max(1.0, len(rows) / num_items)
    chosen = [rows[int(i * step)] for i in range(min(num_items, len(rows)))]
    clean = [text for i, text in enumerate(books) if scores[i] == 0]
    figures["planted"] = len(chosen)
    for form, change in FORMS.items():
        found = named = 0
        missed: Counter[str] = Counter()
        for start in range(0, len(chosen), 200):
            part = chosen[start : start + 200]
            texts = []
            for _, row in part:
                host = clean[chance.randrange(len(clean))].split("\n\n")
                host = host[: chance.randrange(2, 12)]
                host.insert(chance.randrange(len(host) + 1), change(asked(row), chance))
                texts.append("\n\n".join(host))
            values, items = index.search(texts)
            for (name, row), value, item in zip(part, values, items):
                found += value > limit
                named += value > limit and item == name
                if value <= limit:
                    missed[name.split(":")[0]] += 1
                    if show:
                        print(f"--- missed {form}: {name} {value:.2f}\n{asked(row)[:600]}\n", file=sys.stderr)
        figures[f"found_{form}"] = found / len(chosen)
        figures[f"named_{form}"] = named / len(chosen)
        figures[f"missed_{form}"] = dict(missed.most_common(6))
    return figures


# Near-duplicates ------------------------------------------------------------------------------------------


def edited_texts(data: Path, num_documents: int) -> list[str]:
    """Passages of textbooks, with copies in which words are exchanged, dropped, or parts left out."""
    chance = random.Random(1)
    words = [
        w
        for _, row in zip(range(200), json_rows(data / "corpus" / TEXTBOOKS[0]))
        for w in row[1]["text"].split()
    ]
    texts: list[str] = []
    while len(texts) < num_documents:
        start = chance.randrange(len(words) - 400)
        base = words[start : start + chance.randrange(60, 400)]
        texts.append(" ".join(base))
        for _ in range(chance.randrange(4)):
            rate = chance.uniform(0, 0.06)
            copy = [chance.choice(words) if chance.random() < rate else word for word in base]
            if chance.random() < 0.3:
                copy = copy[: int(len(copy) * chance.uniform(0.7, 1.0))]
            texts.append(re.sub(r"[,;]", "", " ".join(copy)))
    chance.shuffle(texts)
    return texts[:num_documents]


def similar_pairs(texts: list[str]) -> dict[tuple[int, int], float]:
    """Every pair past the threshold, by counting shared word 5-grams: no hashing, no sampling."""
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    sizes: list[int] = []
    pairs: dict[tuple[int, int], float] = {}
    for number, text in enumerate(texts):
        words = re.findall(r"[^\W_]+", text.lower())
        own = {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))}
        shared: Counter[int] = Counter()
        for shingle in own:
            shared.update(holders[shingle])
            holders[shingle].append(number)
        for other, count in shared.items():
            value = count / (len(own) + sizes[other] - count)
            if value >= THRESHOLD:
                pairs[other, number] = value
        sizes.append(len(own))
    return pairs


def parts_of(texts_of, num_documents: int, size: int = 500):  # type: ignore[no-untyped-def]
    banding = minhash.Banding.for_threshold(THRESHOLD)

    def parts() -> Iterator[near_duplicates.PartKeys]:
        for part in range(-(-num_documents // size)):
            texts = texts_of(part)
            ids = [f"{part * size + row:032x}" for row in range(len(texts))]
            keys = minhash.band_keys(texts, banding)
            yield near_duplicates.PartKeys(part, keys, ids, np.ones(len(texts), dtype=bool))

    return parts


def against_brute_force(data: Path, num_documents: int) -> dict:
    texts = edited_texts(data, num_documents)
    pairs = similar_pairs(texts)
    like: dict[int, set[int]] = defaultdict(set)
    for i, j in pairs:
        like[i].add(j)
        like[j].add(i)
    stays: set[int] = set()
    for document in range(len(texts)):
        if not like[document] & stays:
            stays.add(document)
    truth = set(range(len(texts))) - stays
    with tempfile.TemporaryDirectory() as folder:
        texts_of = lambda part: texts[500 * part : 500 * part + 500]  # noqa: E731
        table = near_duplicates.find(parts_of(texts_of, len(texts)), texts_of, len(texts), Path(folder))
        found = {
            500 * part + row: int(name, 16)
            for part in table.parts
            for row, (name, _) in table.of_part(part).items()
        }
    right_pairs = sum((min(pair), max(pair)) in pairs for pair in found.items())
    return {
        "documents": len(texts),
        "similar_pairs": len(pairs),
        "duplicates_by_brute_force": len(truth),
        "duplicates_found": len(found),
        "recall": len(truth & found.keys()) / len(truth),
        "precision": len(truth & found.keys()) / len(found),
        "pairs_past_the_threshold": right_pairs / len(found),
    }


def generated(part: int, size: int = 500) -> list[str]:
    """Documents of 80 words, a function of the part alone; every fifth is an edited copy of its neighbour."""
    chance = np.random.default_rng(part)
    words = chance.integers(0, 50_000, size=(size, 80))
    copies = np.arange(4, size, 5)
    words[copies] = words[copies - 1]
    words[copies, chance.integers(0, 80, size=len(copies))] = 7
    return [" ".join(map(str, row)) for row in words.tolist()]


def memory_child(num_documents: int, budget: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        list(parts_of(generated, 500)())  # tables that a run of any size needs
        started = time.monotonic()
        table = near_duplicates.find(
            parts_of(generated, num_documents), generated, num_documents, Path(folder), memory_bytes=budget
        )
        seconds = time.monotonic() - started
    # Not ru_maxrss: a child inherits the peak of the process that started it.
    status = Path("/proc/self/status").read_text()
    peak = int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024  # type: ignore[index]
    print(json.dumps({"peak_rss_bytes": peak, "found": len(table), "wall_s": round(seconds, 1)}))


def near(data: Path, num_documents: int, sizes: list[int], budget: int) -> dict:
    figures: dict = against_brute_force(data, num_documents)
    figures["memory_budget_bytes"] = budget
    for size in sizes:
        command = [sys.executable, __file__, "memory-child", "--sizes", str(size), "--budget", str(budget)]
        child = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        for name, value in child.items():
            figures[f"documents_{size}_{name}"] = value
        figures[f"documents_{size}_found_share"] = child["found"] / (size // 5)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("section", nargs="?", choices=["decontamination", "near-duplicates", "memory-child"])
    parser.add_argument("--items", type=int, default=6000, help="benchmark items to plant, in each form")
    parser.add_argument("--documents", type=int, default=5000, help="documents compared by brute force")
    parser.add_argument(
        "--sizes", default="10000,200000", help="numbers of documents whose memory is compared"
    )
    parser.add_argument("--budget", type=int, default=16 << 20, help="dedup_memory_bytes of the memory runs")
    parser.add_argument("--show", action="store_true", help="print the documents behind false alarms")
    options = parser.parse_args()
    sizes = [int(size) for size in options.sizes.split(",")]
    if options.section == "memory-child":
        memory_child(sizes[0], options.budget)
        return
    data = Path(os.environ.get("POCKETPHI_DATA", ROOT.parent / "shared" / "data"))
    if not data.is_dir():
        sys.exit(f"real data not present at {data} (set POCKETPHI_DATA)")
    if options.section in (None, "decontamination"):
        print(
            json.dumps({"decontamination": decontamination(data, options.items, options.show)}, indent=1),
            flush=True,
        )
    if options.section in (None, "near-duplicates"):
        print(json.dumps({"near_duplicates": near(data, options.documents, sizes, options.budget)}, indent=1))


if __name__ == "__main__":
    main()
