"""The unsafe-text rule of the corpus on texts that people labelled, and its false alarms on clean text.

    python benchmarks/safety_rules.py DATA

DATA holds safety/openai_moderation_samples-1680.jsonl.gz (prompts labelled by category) and corpus/. Prints
the ROC AUC of the score by category against prompts with no label, the share of each that the rule's
default threshold rejects, and that share on collections of clean text.
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

import numpy as np

from pocketphi.corpus import rules
from pocketphi.corpus.document import Document
from pocketphi.corpus.educational import metrics
from pocketphi.corpus.rules.batch import Batch, RuleContext
from pocketphi.evals.data import DataFile, read

RULE, THRESHOLD = "unsafe_per_100_words", 2.0
CATEGORIES = {
    "sexual": ("S", "S3"),
    "hateful": ("H", "H2"),
    "violent": ("V", "V2"),
    "harassing": ("HR",),
    "self-harm": ("SH",),
}
CLEAN = (
    "textbooks-openstax",
    "textbooks-math",
    "encyclopedia",
    "docs-technical",
    "books-classics",
    "web-mixed",
)
LENGTH = 8000


def score(texts: list[str]) -> np.ndarray:
    """The rule's score of each text."""
    documents = [
        Document(id="", text=text[:LENGTH], url="", source="", license="", fetched_at="", meta={})
        for text in texts
    ]
    context = RuleContext(languages=("en",), license_deny=(), respect_noai=True, url_deny=None)  # type: ignore[arg-type]
    return np.asarray(rules.scores(Batch(documents, context))[RULE])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path)
    data = parser.parse_args().data
    prompts = list(read(DataFile(data / "safety/openai_moderation_samples-1680.jsonl.gz", ""), ("prompt",)))
    scores = score([row["prompt"] for row in prompts])
    marks = {
        name: np.array([any(str(row.get(key)) == "1" for key in keys) for row in prompts])
        for name, keys in CATEGORIES.items()
    }
    labelled = np.any(list(marks.values()), axis=0)
    print(f"{'':<22}{'texts':>8}{'ROC AUC':>10}{'rejected':>10}")
    for name, mark in {**marks, "any of these": labelled, "none of these": ~labelled}.items():
        area = metrics.roc_auc(scores[mark], scores[~labelled])
        print(f"{name:<22}{mark.sum():>8}{area:>10.3f}{(scores[mark] > THRESHOLD).mean():>10.3f}")
    for name in CLEAN:
        found = score(
            [
                row["text"]
                for row in islice(
                    read(DataFile(data / "corpus" / f"{name}.jsonl.zst", ""), ("text",)), 0, None, 10
                )
            ]
        )
        print(f"{name:<22}{len(found):>8}{'':>10}{(found > THRESHOLD).mean():>10.4f}")


if __name__ == "__main__":
    main()
