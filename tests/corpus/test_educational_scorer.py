"""The scorer: figures against scikit-learn, scores that depend on the text alone, the file in the package."""

from __future__ import annotations

import gzip
import io
import json
import random
from pathlib import Path

import numpy as np
import pytest

from pocketphi.core.errors import DataError
from pocketphi.corpus.educational import DEFAULT_PATH, evaluation, features, load_scorer, metrics
from pocketphi.corpus.educational.cleaning import strip_style

LESSON = (
    "Photosynthesis is the process by which plants turn light into chemical energy. For example, when light "
    "is absorbed by chlorophyll, electrons are raised to a higher energy, and therefore water is split. "
)
SPAM = (
    "Click here now and buy cheap pills, free shipping today only!!! Reply to get your money, dear friend. "
)


def _texts(num: int = 200) -> list[str]:
    lot = random.Random(1)
    words = (LESSON + SPAM + "Zürich – café “quoted” 12,5 naïve 日本語 x").split()
    return [" ".join(lot.choices(words, k=lot.choice([0, 1, 5, 80, 2000]))) for _ in range(num)]


def test_lessons_score_above_spam() -> None:
    scorer = load_scorer()
    high, low = scorer.score([LESSON * 3, SPAM * 3])
    assert high > 3.5 and low < 1.5
    assert DEFAULT_PATH.stat().st_size <= 8 << 20


def test_a_score_depends_on_the_text_alone() -> None:
    scorer, texts = load_scorer(), _texts()
    together = scorer.score(texts)
    assert np.array_equal(together, np.concatenate([scorer.score([text]) for text in texts]))
    assert np.array_equal(together[::-1], scorer.score(texts[::-1]))
    assert together.min() >= 0 and together.max() <= 5 and together.std() > 0.05


def test_a_long_text_is_read_in_bounded_part_from_start_to_end() -> None:
    scorer = load_scorer()
    assert len(features.windows("ab " * 1_000_000)) <= features.MAX_CHARS + features.NUM_WINDOWS
    half = scorer.score([LESSON * 200 + SPAM * 200, LESSON * 400, SPAM * 400])
    assert half[2] < half[0] < half[1]


def test_a_text_without_words_is_not_good() -> None:
    assert (load_scorer().score(["", " \n", "...", "😀" * 50]) < 2.5).all()


def test_damaged_files_are_named(tmp_path: Path) -> None:
    raw = DEFAULT_PATH.read_bytes()
    for name, content in (
        ("cut.npz", raw[: len(raw) // 2]),
        ("empty.npz", b""),
        ("text.npz", b"not a scorer"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name):
            load_scorer(tmp_path / name)
    with pytest.raises(DataError, match="missing"):
        load_scorer(tmp_path / "missing.npz")


def test_figures_are_those_of_scikit_learn() -> None:
    from scipy.stats import spearmanr
    from sklearn.isotonic import IsotonicRegression
    from sklearn.metrics import f1_score, roc_auc_score

    lot = np.random.default_rng(0)
    labels = lot.integers(0, 6, 500).astype(float)
    scores = np.round(labels + lot.normal(0, 2, 500), 1)  # with ties
    truth = labels >= 3
    assert metrics.roc_auc(scores[truth], scores[~truth]) == pytest.approx(roc_auc_score(truth, scores))
    assert metrics.spearman(labels, scores) == pytest.approx(spearmanr(labels, scores).statistic)
    assert metrics.classification(labels, scores, 3)["f1"] == pytest.approx(f1_score(truth, scores >= 3))
    weights = lot.uniform(0.1, 2, 500)
    wanted = IsotonicRegression().fit_transform(scores, labels, sample_weight=weights)
    assert metrics.isotonic(scores, labels, weights) == pytest.approx(wanted)


def test_pairs_of_equal_topic_are_of_equal_topic_and_used_once() -> None:
    lot = np.random.default_rng(2)
    high, low = lot.normal(3.5, 0.8, 400), lot.normal(2.5, 0.8, 300)
    at_high, at_low = evaluation._equal_pairs(high, low)
    assert len(at_high) == len(at_low) > 100
    assert len(set(at_high.tolist())) == len(at_high) and len(set(at_low.tolist())) == len(at_low)
    assert np.abs(high[at_high] - low[at_low]).max() <= 0.1
    assert metrics.roc_auc(high, low) > 0.75
    assert abs(metrics.roc_auc(high[at_high], low[at_low]) - 0.5) < 0.05


def test_marks_of_a_source_are_taken_out() -> None:
    mail = (
        "From: a@b.org\nSubject: hello\n\nOn Monday Ann wrote:\n> See https://x.org/y or www.z.com now.\n"
        "Wikipedia has it: \\textbf{bold} $x^2$ <b>tag</b> &amp; mail me@home.net, docs.python.org too.\n"
    )
    assert " ".join(strip_style(mail).split()) == "See or now. has it: {bold} tag mail , too."
    plain = "Rice grows in water. The abc of it: a scheme, an organisation.\n"
    assert strip_style(plain) == plain


def test_collections_that_played_no_part_in_training(shared_data: Path) -> None:
    """Paragraphs of science books against prompts to a language model, fifty words and more."""
    import zstandard

    def rows(name: str) -> list[dict]:
        with open(shared_data / name, "rb") as file:
            raw = (
                zstandard.ZstdDecompressor().stream_reader(file)
                if name.endswith("zst")
                else gzip.GzipFile(fileobj=file)
            )
            return [json.loads(line) for line in io.TextIOWrapper(raw, encoding="utf-8")]

    high = [row["support"] for row in rows("benchmarks/sciq.validation.jsonl.zst")]
    low = [row["prompt"] for row in rows("safety/openai_moderation_samples-1680.jsonl.gz")]
    scorer = load_scorer()
    scores = [scorer.score([t for t in texts if len(t.split()) >= 50]) for texts in (high, low)]
    assert metrics.roc_auc(*scores) > 0.93
