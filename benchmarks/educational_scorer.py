"""The educational scorer: how well it separates, what explains it, where it errs, how fast it is.

    python benchmarks/educational_scorer.py DATA [--out FOLDER] [--max-documents N] [--speed-only] [--json]

DATA holds corpus/*.jsonl.zst (and benchmarks/, safety/ for the last test). In this order:

1. Trains the scorer of the package again from its recipe (pocketphi/corpus/educational/default.yaml), with
   every fold's sources held out, and says whether the file that comes out is the shipped one, byte by byte.
2. ROC AUC between textbooks and low-quality text on sources unseen in training; the same for cuts of equal
   length, for pairs of equal topic, for pairs in which topic alone is right half the time; what length
   alone and topic alone reach.
3. The worst confusions.
4. Two collections that played no part in the recipe: paragraphs of science books (SciQ) against prompts
   that people sent to a language model (the OpenAI moderation set), with the shipped scorer.
5. Documents per second of processor time, on one core, of the shipped scorer.

Writes FOLDER/scorer (the artifact with report.md and confusions.jsonl) and FOLDER/figures.json.
`--max-documents` takes that many of each file: a trial of the script, not a measurement.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from pocketphi.core import config as configuration
from pocketphi.corpus.educational import load_scorer, metrics, train_scorer
from pocketphi.corpus.educational.scorer import DEFAULT_PATH
from pocketphi.evals.data import DataFile, read

RECIPE = DEFAULT_PATH.with_name("default.yaml")
SHOWN = (
    *("roc_auc_unseen_sources", "roc_auc_worst_fold", "roc_auc_of_length_alone", "roc_auc_50_words"),
    *("roc_auc_100_words", "roc_auc_200_words", "roc_auc_of_topic_alone", "topic_matched_pairs"),
    *("topic_matched_roc_auc", "topic_matched_high_wins", "topic_and_length_matched_roc_auc"),
    *("topic_balanced_pairs", "topic_balanced_roc_auc", "topic_balanced_roc_auc_of_topic_alone"),
    *("spearman_labels", "f1_at_3", "precision_at_3", "recall_at_3", "calibration_error"),
    *("documents_high", "documents_low", "num_features", "scorer_bytes"),
)
SPEED_FILES = ("web-mixed", "lowquality", "encyclopedia", "textbooks-openstax")


def trained(data: Path, out: Path, max_documents: int | None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train by the package's recipe; return (report, confusions)."""
    tree = configuration.load_yaml(RECIPE)["train-scorer"]
    config = configuration.parse(train_scorer.TrainScorerConfig, tree, where=str(RECIPE))
    labels = tuple(
        dataclasses.replace(
            entry, path=str(data / "corpus" / Path(entry.path).name), max_documents=max_documents
        )
        for entry in config.labels
    )
    made = train_scorer.run(dataclasses.replace(config, labels=labels), {}, out=out / "scorer")
    report = json.loads(made.file("report.json").read_text(encoding="utf-8"))
    digests = [
        hashlib.sha256(path.read_bytes()).hexdigest() for path in (made.file("scorer.npz"), DEFAULT_PATH)
    ]
    report["shipped_scorer_reproduced"] = digests[0] == digests[1]
    lines = made.file("confusions.jsonl").read_text(encoding="utf-8").splitlines()
    return report, [json.loads(line) for line in lines]


def other_collections(data: Path, min_words: int = 50) -> dict[str, Any]:
    """ROC AUC of the shipped scorer on collections that are in no part of its recipe."""
    science = {
        row["support"] for row in read(DataFile(data / "benchmarks/sciq.validation.jsonl.zst", ""), ())
    }
    prompts = {
        row["prompt"]
        for row in read(DataFile(data / "safety/openai_moderation_samples-1680.jsonl.gz", ""), ())
    }
    high, low = (sorted(t for t in texts if len(t.split()) >= min_words) for texts in (science, prompts))
    scorer = load_scorer()
    cut = [[" ".join(text.split()[:min_words]) for text in texts] for texts in (high, low)]
    return {
        "other_documents_high": len(high),
        "other_documents_low": len(low),
        "other_roc_auc": metrics.roc_auc(scorer.score(high), scorer.score(low)),
        f"other_roc_auc_{min_words}_words": metrics.roc_auc(scorer.score(cut[0]), scorer.score(cut[1])),
        "other_median_high": float(np.median(scorer.score(high))),
        "other_median_low": float(np.median(scorer.score(low))),
    }


def speed(
    data: Path,
    score: Callable[[list[str]], object],
    names: Sequence[str] = SPEED_FILES,
    num_documents: int = 4000,
    rounds: int = 7,
) -> dict[str, Any]:
    """Documents per second of processor time that `score` takes, by collection: median of `rounds`."""
    figures: dict[str, Any] = {}
    for name in names:
        file = DataFile(data / "corpus" / f"{name}.jsonl.zst", "")
        texts = [row["text"] for row in islice(read(file, ("text",)), num_documents)]
        texts = (texts * (num_documents // len(texts) + 1))[:num_documents]
        score(texts[:100])
        found = []
        for _ in range(rounds):
            began = time.process_time()
            score(texts)
            found.append(num_documents / (time.process_time() - began))
        figures[f"speed.{name}.mean_chars"] = statistics.mean(len(text) for text in texts)
        figures[f"speed.{name}.documents_per_s"] = statistics.median(found)
        figures[f"speed.{name}.documents_per_s_least"] = min(found)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/educational-scorer"))
    parser.add_argument("--max-documents", type=int)
    parser.add_argument("--speed-only", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {}
    cases: list[dict[str, Any]] = []
    if not arguments.speed_only:
        report, cases = trained(arguments.data, arguments.out, arguments.max_documents)
        figures["shipped_scorer_reproduced"] = report["shipped_scorer_reproduced"]
        figures |= {key: report[key] for key in SHOWN if report.get(key) is not None}
        for fold in report["folds"]:
            figures[f"roc_auc.{'+'.join(fold['low_sources'])}"] = fold["roc_auc"]
        figures |= other_collections(arguments.data)
    figures |= speed(arguments.data, load_scorer().score)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if arguments.json:
        print(json.dumps(figures, indent=1))
        return
    for key, value in figures.items():
        print(f"{key:<60}{value:.4f}" if isinstance(value, float) else f"{key:<60}{value}")
    for kind in sorted({case["kind"] for case in cases}):
        print(f"\n{kind}:")
        for case in [c for c in cases if c["kind"] == kind][:10]:
            print(f"  {case['score']:.2f}  {case['words']:>5} words  {case['id']}  {case['excerpt'][:80]}")
    print(f"\nreport: {arguments.out / 'scorer' / 'report.md'}")


if __name__ == "__main__":
    main()
