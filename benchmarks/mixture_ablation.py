"""The report's claim, tested: does filtering the data, and ending on textbooks, make a better small model?

    apt-cache dumpavail > LISTS                                        # a catalogue: lists and boilerplate
    python benchmarks/mixture_ablation.py prepare OUT --data DATA --lists LISTS   # corpora, shards; a CPU
    python benchmarks/mixture_ablation.py train OUT [--seeds 3]        # nine runs; a GPU
    python benchmarks/mixture_ablation.py score OUT --data DATA        # bits per byte by source, four tasks
    python benchmarks/mixture_ablation.py table OUT                    # means over seeds, plot

Three arms of one shape (about 15M parameters), one tokenizer, equal tokens and steps:

raw         what a crawl gives: whole texts of web pages with their menus and notices (15% of the rows),
            list mail, spam, forum posts and jokes (25%), pages of a catalogue (20%, 20 entries of a Linux
            distribution's package index each), and the other sources as they come (40%); no rule, no
            near-duplicate is taken out.
filtered    the same sources through the corpus stage with its defaults, pages reduced to their main text;
            phase 2 reads the more educational part.
textbooks   the same in phase 1; in phase 2 40% of the rows are textbooks.

Nine runs take ten minutes of one H200 when three processes share them (`train OUT --part 1/3` and so on);
`score` needs the package zstandard where it runs. Texts that overlap the benchmarks are taken out of every
arm. All arms are measured on the same documents,
held out by their ids. The sources are small for such a claim: how often each arm repeats its text is printed
by `train` and belongs beside the result. Licences do not matter here: none of these models is given on.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pocketphi.core import artifact, progress
from pocketphi.core.artifact import Artifact

ARMS = ("raw", "filtered", "textbooks")
TASKS = ("arc_easy", "piqa", "hellaswag", "sciq")
SHAPE = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 7,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
}
PAGES = ("mozilla-readability", "scrapinghub-articles", "trafilatura-eval")
KEPT = ("id", "source", "license", "url")  # of a page, beside its text
LOW = ("lowquality", "web-mixed")
CATALOGUE_BYTES = 30_000_000
OTHERS = {
    "docs-technical": "docs",
    "books-classics": "book",
    "encyclopedia": "encyclopedia",
    "stories": "story",
    "howto-cookbook": "howto",
    "news-speeches": "news",
}
TEXTBOOKS = ("textbooks-openstax", "textbooks-math")


def prepare(out: Path, data: Path, lists: Path) -> None:
    """Two corpora of the same documents, one tokenizer, shards of both."""
    from pocketphi import corpus, tokenizer
    from pocketphi.corpus import rules
    from pocketphi.corpus.config import CorpusConfig, InputConfig, RuleConfig
    from pocketphi.corpus.config import PhaseConfig as CorpusPhase
    from pocketphi.tokenizer import TokenizerConfig
    from pocketphi.train import shards

    catalogue = _catalogue(out, lists)

    def files(quality: bool) -> list[InputConfig]:
        found = [InputConfig(str(data / "corpus" / f"{n}.jsonl.zst"), name=n) for n in LOW]
        found.append(InputConfig(str(catalogue), name="lists"))
        for name, kind in OTHERS.items():
            path = str(data / "corpus" / f"{name}.jsonl.zst")
            found.append(InputConfig(path, name=name, quality=kind if quality else "web"))  # type: ignore[arg-type]
        return found

    common: dict[str, Any] = {"benchmarks": (str(data / "benchmarks"),), "heldout_fraction": 0.01}
    pages = [
        InputConfig(str(data / "webpages" / f"{n}.jsonl.zst"), name=f"pages-{n}", quality="web")
        for n in PAGES
    ]
    books = [
        InputConfig(str(data / "corpus" / f"{n}.jsonl.zst"), name=n, quality="textbook", phases=(2,))
        for n in TEXTBOOKS
    ]
    filtered = CorpusConfig(
        inputs=(*pages, *files(quality=True), *books),
        phase1=CorpusPhase(min_educational=1.0),
        phase2=CorpusPhase(min_educational=2.5),
        **common,
    )
    whole = InputConfig(str(_whole_pages(out, data)), name="pages")
    off = RuleConfig(enabled=False)
    raw = CorpusConfig(
        inputs=(whole, *files(quality=False)),
        rules={name: off for name, _ in rules.rules.items() if name != "contamination"},
        languages=(),
        near_duplicates=False,
        repeated_lines=False,
        replace_pii=False,
        respect_noai=False,
        phase1=CorpusPhase(min_educational=-math.inf),
        phase2=CorpusPhase(min_educational=-math.inf),
        **common,
    )
    made = {
        name: corpus.run(config, {}, out=out / f"corpus-{name}")
        for name, config in (("raw", raw), ("filtered", filtered))
    }
    words = tokenizer.run(TokenizerConfig(vocab_size=8192), {"corpus": made["raw"]}, out=out / "tokenizer")
    for name, texts in made.items():
        inputs = {"corpus": texts, "tokenizer": words}
        shards.run(shards.ShardsConfig(), inputs, out=out / f"shards-{name}")


def _catalogue(out: Path, lists: Path) -> Path:
    """Pages of a catalogue: 20 entries of a package index each, without checksums, up to CATALOGUE_BYTES."""
    path = out / "lists.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    kept = [
        line
        for line in lists.read_text(encoding="utf-8").split("\n")
        if not line.startswith(("MD5sum:", "SHA256:", "Description-md5:"))
    ]
    entries = "\n".join(kept).split("\n\n")
    lines, size = [], 0
    for begin in range(0, len(entries), 20):
        text = "\n\n".join(entries[begin : begin + 20]).strip()
        size += len(text.encode())
        if size > CATALOGUE_BYTES:
            break
        row = {"id": f"lists-{begin}", "source": "package index", "license": "", "url": "", "text": text}
        lines.append(json.dumps(row) + "\n")
    artifact.write_atomic(path, "".join(lines))
    return path


def _whole_pages(out: Path, data: Path) -> Path:
    """All visible text of the labelled web pages, menus and notices too, under the pages' ids."""
    from resiliparse.extract.html2text import extract_plain_text

    from pocketphi.evals.data import DataFile, read

    path = out / "whole-pages.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for name in PAGES:
        for row in read(DataFile(data / "webpages" / f"{name}.jsonl.zst", ""), ("html", *KEPT)):
            text = extract_plain_text(row["html"], main_content=False)
            lines.append(json.dumps({**{key: row[key] for key in KEPT}, "text": text}) + "\n")
    artifact.write_atomic(path, "".join(lines))
    return path


def train_config(arm: str, seed: int, options: argparse.Namespace) -> Any:
    """The run of an arm: the arms differ in splits and mixtures alone."""
    from pocketphi.train.config import OptimizerConfig, PhaseConfig, TrainConfig

    rest = "[!lpt]*"  # neither lists and low quality, nor pages, nor textbooks
    crawl = {"pages": 15.0, "lowquality": 25.0, "lists": 20.0, rest: 40.0}
    mixtures: dict[str, tuple[dict[str, float], dict[str, float]]] = {
        "raw": (crawl, crawl),
        "filtered": ({"[!t]*": 1.0}, {"[!t]*": 1.0}),
        "textbooks": ({"[!t]*": 1.0}, {"textbooks-*": 40.0, "[!t]*": 60.0}),
    }
    tokens = int(options.tokens)
    batch, length = options.batch_tokens, 512
    first = tokens * 6 // 10 // batch * batch
    common: dict[str, Any] = {
        "sequence_length": length,
        "batch_tokens": batch,
        "micro_batch_tokens": batch,
        "learning_rate": 3e-3,
    }
    phases = [
        PhaseConfig(
            name="phase1",
            tokens=first,
            mixture=mixtures[arm][0],
            warmup_tokens=min(first, 20 * batch),
            **common,
        ),
        PhaseConfig(
            name="phase2",
            split="phase2",
            tokens=tokens - first,
            mixture=mixtures[arm][1],
            decay_tokens=tokens - first,
            **common,
        ),
    ]
    on_gpu = options.device == "cuda"
    return TrainConfig(
        seed=seed,
        model="pocket",
        model_overrides=SHAPE,
        device=options.device,
        dtype="bfloat16" if on_gpu else "float32",
        compile=on_gpu,
        export_dtype="bfloat16",
        loss_chunk_tokens=8192,
        optimizer=OptimizerConfig(kind="muon"),
        phases=phases,
        evaluate_tokens=options.evaluate_tokens,
        checkpoint_every_tokens=tokens,
        sample_prompts=[],
    )


def _own_part(work: list[Any], options: argparse.Namespace) -> list[Any]:
    part, parts = (int(n) for n in options.part.split("/"))
    return work[part - 1 :: parts]


def train(out: Path, options: argparse.Namespace) -> None:
    """Train every arm with every seed, or this process's part of them; what is done already is skipped."""
    from pocketphi.train import pretrain

    for seed, arm in _own_part([(s, a) for s in range(options.seeds) for a in ARMS], options):
        source = "raw" if arm == "raw" else "filtered"
        inputs = {"shards": out / f"shards-{source}", "tokenizer": out / "tokenizer"}
        found = pretrain.run(train_config(arm, seed, options), inputs, out=out / f"{arm}-{seed}")
        progress.say(f"{arm}, seed {seed}: loss {found.counts['final_loss']:.4f}")


def score(out: Path, data: Path, options: argparse.Namespace) -> None:
    """Every model, or this process's part of them, on the held-out documents of both corpora and the four tasks."""
    from pocketphi import evals
    from pocketphi.evals import EvalConfig

    for place in _own_part(_models(out), options):
        for name, tasks, shards in (
            ("tasks", list(TASKS), None),
            ("filtered", ["bits"], out / "shards-filtered"),
            ("raw", ["bits"], out / "shards-raw"),
        ):
            config = EvalConfig(
                tasks=tasks,
                data_dir=data / "benchmarks",
                limit=options.limit,
                max_context_tokens=512,  # what it was trained on: beyond it all arms only get worse
                max_heldout_tokens=options.evaluate_tokens,
                batch_size=32,
                contamination=False,
            )
            inputs: dict[str, Artifact | Path | str] = {"model": place}
            if shards is not None:
                inputs["shards"] = shards
            evals.run(config, inputs, out=out / "scores" / place.name / name)


def _models(out: Path) -> list[Path]:
    return sorted(p for arm in ARMS for p in out.glob(f"{arm}-[0-9]*") if (p / artifact.MANIFEST).exists())


def _scored(out: Path) -> list[Path]:
    return sorted(p for arm in ARMS for p in (out / "scores").glob(f"{arm}-[0-9]*"))


def differences(out: Path) -> list[str]:
    """Lines "task, arm - arm: difference ± paired error over items, ± error over seeds" of the four tasks."""
    from pocketphi.evals.task import parse_task

    right: dict[str, dict[str, list[dict[str, float]]]] = {}
    for place in _scored(out):
        arm = place.name.rpartition("-")[0]
        by_task: dict[str, dict[str, float]] = {}
        for line in (place / "tasks" / "items.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            name = "correct" if parse_task(row["task"]).metric == "accuracy" else "correct_norm"
            by_task.setdefault(row["task"], {})[row["id"]] = float(row[name])
        for task, items in by_task.items():
            right.setdefault(task, {}).setdefault(arm, []).append(items)
    lines = []
    for task, arms in right.items():
        for one, other in (("filtered", "raw"), ("textbooks", "filtered"), ("textbooks", "raw")):
            if len(arms.get(one, ())) < 2 or len(arms.get(other, ())) < 2:
                continue
            ids = list(arms[one][0])
            gaps = [
                statistics.mean(s[i] for s in arms[one]) - statistics.mean(s[i] for s in arms[other])
                for i in ids
            ]
            items_error = statistics.stdev(gaps) / len(gaps) ** 0.5
            spread = [
                statistics.variance([statistics.mean(s.values()) for s in arms[a]]) / len(arms[a])
                for a in (one, other)
            ]
            lines.append(
                f"{task}, {one} - {other}: {statistics.mean(gaps):+.4f} "
                f"± {items_error:.4f} over {len(ids)} items, ± {sum(spread) ** 0.5:.4f} over seeds"
            )
    return lines


def figures(out: Path) -> dict[str, dict[str, list[float]]]:
    """{measure: {arm: one value a seed}}."""
    found: dict[str, dict[str, list[float]]] = {}
    for place in _scored(out):
        arm = place.name.rpartition("-")[0]
        for file in sorted(place.glob("*/results.json")):
            for entry in json.loads(file.read_text(encoding="utf-8"))["tasks"]:
                named = entry.get("groups") or {}
                if entry["task"] == "bits":
                    values = {
                        f"bits per byte, {n} ({file.parent.name})": g["value"] for n, g in named.items()
                    }
                else:
                    values = {f"{entry['task']}": entry["value"]}
                for name, value in values.items():
                    found.setdefault(name, {}).setdefault(arm, []).append(float(value))
    # Most sources hold out the same documents in both corpora: once is enough.
    once: dict[str, dict[str, list[float]]] = {}
    for name, by_arm in found.items():
        if by_arm not in once.values():
            once[name] = by_arm
    return once


def table(out: Path) -> None:
    """Means over seeds with the standard error of the mean, as Markdown; a plot beside them."""
    found = figures(out)
    print("| measure | " + " | ".join(ARMS) + " |\n|---|" + "---|" * len(ARMS))
    for name, by_arm in found.items():
        cells = []
        for arm in ARMS:
            values = by_arm.get(arm, [])
            error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan
            cells.append(f"{statistics.mean(values):.4f} ± {error:.4f}" if values else "")
        print(f"| {name} | " + " | ".join(cells) + " |")
    print("", *differences(out), sep="\n")
    artifact.write_atomic(out / "figures.json", json.dumps(found, indent=1))
    _plot(found, out / "ablation.svg")


def _plot(found: dict[str, dict[str, list[float]]], path: Path) -> None:
    """One row a measure, one dot a seed, each row on its own scale; lower rows of the page are tasks."""
    colours = {"raw": "#b33", "filtered": "#36c", "textbooks": "#283"}
    height, left, width = 26, 330, 420
    lines = []
    for row, (name, by_arm) in enumerate(found.items()):
        values = [v for vs in by_arm.values() for v in vs]
        low, high = min(values), max(values)
        span = high - low or 1.0
        y = 40 + row * height
        lines.append(f'<text x="{left - 12}" y="{y + 4}" text-anchor="end">{name}</text>')
        lines.append(f'<line x1="{left}" x2="{left + width}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        lines.append(f'<text x="{left + width + 10}" y="{y + 4}" fill="#777">{low:.3f} to {high:.3f}</text>')
        for arm, of_seeds in by_arm.items():
            for value in of_seeds:
                x = left + width * (value - low) / span
                lines.append(
                    f'<circle cx="{x:.1f}" cy="{y}" r="5" fill="{colours[arm]}" fill-opacity="0.7"/>'
                )
    legend = "".join(
        f'<circle cx="{left + 110 * i}" cy="14" r="5" fill="{c}"/><text x="{left + 110 * i + 10}" y="18">{a}</text>'
        for i, (a, c) in enumerate(colours.items())
    )
    page = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 140}" height="{50 + len(found) * height}" '
        f'font-family="sans-serif" font-size="12">{legend}{"".join(lines)}</svg>\n'
    )
    artifact.write_atomic(path, page)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("prepare", "train", "score", "table"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, help="folder with corpus/, webpages/ and benchmarks/")
    parser.add_argument("--lists", type=Path, help="a package index as text: apt-cache dumpavail")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--part", default="1/1", help="I/N: train or score every N-th, from the I-th; one process each"
    )
    parser.add_argument("--tokens", type=float, default=1.5e8)
    parser.add_argument("--batch-tokens", type=int, default=131072)
    parser.add_argument("--evaluate-tokens", type=int, default=20000)
    parser.add_argument("--limit", type=int, default=1000)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    if options.what in ("prepare", "score") and options.data is None:
        parser.error(f"{options.what} needs --data")
    if options.what == "prepare":
        if options.lists is None:
            parser.error("prepare needs --lists")
        prepare(options.out, options.data, options.lists)
    elif options.what == "train":
        train(options.out, options)
    elif options.what == "score":
        score(options.out, options.data, options)
    else:
        table(options.out)


if __name__ == "__main__":
    main()
