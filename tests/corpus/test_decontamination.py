"""Benchmark items hidden in documents are found in any case, wrapping and punctuation; clean text is not accused."""

from __future__ import annotations

import json
import random
import re
import textwrap
from pathlib import Path

import numpy as np
import pytest
from toy_pages import paragraph

from pocketphi import corpus
from pocketphi.core.errors import DataError
from pocketphi.corpus import CorpusConfig
from pocketphi.corpus.benchmark_items import item_texts
from pocketphi.corpus.decontamination import BenchmarkIndex, benchmark_files, benchmark_items
from pocketphi.corpus.rules import rules

LIMIT = rules["contamination"].max


def question(seed: int) -> dict:
    """A made-up multiple-choice row."""
    first, second, *_ = paragraph(5000 + seed, 2).split(". ")
    choices = [paragraph(7000 + 10 * seed + i, 1)[:40] for i in range(4)]
    return {"question": f"{first}. Why is it that {second.lower()}?", "choices": choices, "answer": seed % 4}


ROWS = [question(seed) for seed in range(200)]


@pytest.fixture(scope="module")
def index() -> BenchmarkIndex:
    return BenchmarkIndex.build((f"made:{i}", text) for i, row in enumerate(ROWS) for text in item_texts(row))


def asked(row: dict) -> str:
    return "\n".join([row["question"], *(f"({'ABCD'[i]}) {text}" for i, text in enumerate(row["choices"]))])


def repunctuated(text: str, chance: random.Random) -> str:
    return re.sub(
        r"[^\w\s]",
        lambda _: chance.choice(["", ";", "—", "…", "!"]),
        chance.choice([text.upper(), text.title()]),
    )


FORMS = {
    "verbatim": lambda text, chance: text,
    "rewrapped": lambda text, chance: textwrap.fill(text, chance.choice([20, 50])).replace(" ", "  "),
    "case and punctuation": repunctuated,
}


@pytest.mark.parametrize("form", FORMS)
def test_planted_items_are_found_and_named(index: BenchmarkIndex, form: str) -> None:
    chance = random.Random(1)
    texts = [
        f"{paragraph(i)}\n\n{FORMS[form](asked(row), chance)}\n\n{paragraph(900 + i)}"
        for i, row in enumerate(ROWS)
    ]
    scores, names = index.search(texts)
    assert (scores > LIMIT).mean() >= 0.99
    assert np.mean([name == f"made:{i}" for i, name in enumerate(names)]) >= 0.99


def test_clean_text_is_not_accused(index: BenchmarkIndex) -> None:
    scores, names = index.search([paragraph(i, 12) for i in range(1000)])
    assert (scores <= LIMIT).all() and not any(name for name, score in zip(names, scores) if score == 0)


def test_half_an_item_is_not_the_item(index: BenchmarkIndex) -> None:
    halves = [row["question"][: len(row["question"]) // 2] for row in ROWS[:50]]
    scores, _ = index.search([f"{paragraph(i)} {half}" for i, half in enumerate(halves)])
    assert (scores <= LIMIT).all()


def test_short_and_generic_items() -> None:
    rows = [
        {"question": "Who wrote the Iliad, as the ancients believed?"},
        {"question": "Why?", "choices": ["Because it rains a lot in spring", "Because nobody ever asked"]},
        {"question": "Yes?"},
        *({"question": "Which of the following statements is true?"} for _ in range(4)),
    ]
    index = BenchmarkIndex.build(
        (f"s:{i}", text) for i, row in enumerate(rows) for text in item_texts(row) or [""]
    )
    assert (index.num_items, index.num_short, index.num_generic) == (2, 1, 4)
    scores, names = index.search(
        [
            "One may ask: who wrote the ILIAD (as the ancients believed)? Homer.",
            "Who wrote the Iliad is disputed.",
            "Why? a) because it rains a lot in spring b) because nobody ever asked",
            "Which of the following statements is true?",
            "",
        ]
    )
    assert (scores > LIMIT).tolist() == [True, False, True, False, False]
    assert names[0] == "s:0" and names[2] == "s:1"


def test_an_index_is_the_same_after_saving(index: BenchmarkIndex, tmp_path: Path) -> None:
    index.save(tmp_path / "index.npz")
    again = BenchmarkIndex.load(tmp_path / "index.npz")
    texts = [asked(row) for row in ROWS[:20]] + [paragraph(3)]
    assert np.array_equal(index.search(texts)[0], again.search(texts)[0])
    assert index.search(texts)[1] == again.search(texts)[1]


def test_a_damaged_benchmark_is_an_error_not_a_short_index(tmp_path: Path) -> None:
    import zstandard

    content = zstandard.compress(b"".join(json.dumps(row).encode() + b"\n" for row in ROWS))
    (tmp_path / "made.test.jsonl.zst").write_bytes(content[: len(content) // 2])
    with pytest.raises((DataError, OSError), match=r"made\.test\.jsonl\.zst"):
        list(benchmark_items(benchmark_files([str(tmp_path)])))


def test_contaminated_documents_are_rejected_with_the_item(tmp_path: Path) -> None:
    (tmp_path / "made.test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "made.train.jsonl").write_text(json.dumps({"question": paragraph(0)}) + "\n")
    lines = [paragraph(i, 12) for i in range(6)]
    lines[2] += "\n\n" + asked(ROWS[17]).upper()
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps({"id": f"d{i}", "text": text}) + "\n" for i, text in enumerate(lines)))
    config = CorpusConfig(inputs=(str(file),), benchmarks=(str(tmp_path / "made.test.jsonl"),))
    answers = list(corpus.score_documents(config))
    assert [answer["reasons"] for answer in answers] == [[], [], ["contamination"], [], [], []]
    assert answers[2]["contamination.item"] == "made.test:18"  # lines are numbered from 1
    assert benchmark_files([str(tmp_path)]) == [tmp_path / "in.jsonl", tmp_path / "made.test.jsonl"]


def test_real_benchmarks_in_real_textbooks(shared_data: Path) -> None:
    """A sample of what benchmarks/corpus_quality.py measures in full."""
    from pocketphi.corpus.readers.files import bounded_lines, open_compressed

    path = shared_data / "benchmarks" / "arc_easy.test.jsonl.zst"
    index = BenchmarkIndex.build(benchmark_items([path]))
    with open_compressed(path) as stream:
        rows = [json.loads(line) for _, line, _ in bounded_lines(stream, 1 << 20) if line][:300]
    with open_compressed(shared_data / "corpus" / "textbooks-openstax.jsonl.zst") as stream:
        books = [
            json.loads(line)["text"]
            for _, (_, line, _) in zip(range(300), bounded_lines(stream, 1 << 24))
            if line
        ]
    scores, _ = index.search(books)
    assert (scores <= LIMIT).all()
    chance = random.Random(2)
    planted = [
        f"{book[:1500]}\n{repunctuated(' '.join([row['query'].removeprefix('Question: ').removesuffix('Answer:'), *row['choices']]), chance)}\n{book[1500:3000]}"
        for row, book in zip(rows, books)
    ]
    found, _ = index.search(planted)
    assert (found > LIMIT).mean() >= 0.99
