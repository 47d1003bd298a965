"""The learned score of unsafe text: what it finds, what it leaves alone, and the file in the package."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from toy_pages import paragraph

from pocketphi.corpus.document import Document
from pocketphi.corpus.educational import metrics
from pocketphi.corpus.rules import rules
from pocketphi.corpus.rules.batch import Batch
from pocketphi.corpus.rules.unsafe import MAX_WINDOWS, MODEL_PATH, WINDOW_CHARS, unsafe_share, windows
from pocketphi.evals.data import DataFile, read

LIMIT = rules["unsafe_share"].max
HATE = (
    "These people are animals, all of them. I hate muslims and jews, they are filth and they should be killed "
    "or thrown out of our country, the stupid bastards. "
)
DESPAIR = (
    "I want to kill myself. I have been cutting myself again and I think about suicide every night, I just "
    "want to die and stop feeling this pain. "
)
WAR = (
    "In the spring of 1916 the army attacked the fortress. Artillery killed thousands of soldiers before noon, "
    "and by the end of the month the dead lay unburied between the lines. Historians disagree on the purpose "
    "of the battle, which cost both sides more than three hundred thousand lives. "
)
MEDICINE = (
    "The organs of reproduction differ between the sexes. In the female the ovary releases an egg each month; "
    "in the male sperm cells mature in the testis. Infections that are passed on through sexual contact are "
    "treated with antibiotics, and a vaccine prevents cancer of the cervix. "
)
HISTORY = (
    "The Nuremberg laws of 1935 took citizenship from the Jews of Germany. Persecution grew into genocide: six "
    "million Jews were murdered in the Holocaust, many of them in camps built for that purpose. "
)


@pytest.mark.parametrize("text", [HATE, DESPAIR])
def test_unsafe_text_is_found_short_and_long(text: str) -> None:
    assert (unsafe_share([text, text * 4, text * 60]) > LIMIT).all()


@pytest.mark.parametrize("text", [WAR, MEDICINE, HISTORY])
def test_chapters_on_hard_subjects_stay(text: str) -> None:
    chapters = [text, text * 4, text * 60, f"{paragraph(1, 40)}\n\n{text * 3}\n\n{paragraph(2, 40)}"]
    assert (unsafe_share(chapters) < LIMIT).all()


def test_the_share_follows_the_part_that_is_unsafe() -> None:
    clean = paragraph(3, 120)
    shares = unsafe_share([clean, clean + HATE * 12, clean + HATE * 60, HATE * 60])
    assert (np.diff(shares) > 0).all() and shares[0] < 0.1


def test_a_score_depends_on_the_text_alone() -> None:
    texts = [HATE, "", WAR * 30, "x", DESPAIR * 200, "日本語 " * 400, " \n", paragraph(4, 3)]
    together = unsafe_share(texts)
    assert np.array_equal(together, np.concatenate([unsafe_share([text]) for text in texts]))
    assert together.min() >= 0 and together.max() <= 1
    assert len(unsafe_share([])) == 0


def test_the_cost_of_a_document_is_bounded() -> None:
    pieces = windows("word " * 1_000_000)
    assert len(pieces) == MAX_WINDOWS and max(map(len, pieces)) <= 2 * WINDOW_CHARS
    text = "".join(f"{i:06d}" for i in range(5_000))  # 30,000 characters: too long for all to be read
    pieces = windows(text)
    assert pieces[0] == text[: len(pieces[0])] and pieces[-1] == text[-len(pieces[-1]) :]
    assert "".join(windows(text[:6000])) == text[:6000]  # short enough to be read whole
    assert windows("") == [""]


def test_other_languages_and_curated_sources_are_not_judged() -> None:
    rule = rules["unsafe_share"]
    assert rule.function is not None and not rule.curated
    texts = [Document("a", HATE, meta={"language": "en"}), Document("b", HATE, meta={"language": "de"})]
    english, german = rule.function(Batch(texts))
    assert english > LIMIT and german == 0


def test_the_file_is_small() -> None:
    assert MODEL_PATH.stat().st_size < 1 << 19


def test_collections_that_played_no_part_in_training(shared_data: Path) -> None:
    """Prompts that ask for abuse against harmless instructions; textbooks whose licence kept them out."""

    def rows(name: str, step: int, most: int) -> list[dict]:
        return list(islice(read(DataFile(shared_data / name, ""), ()), 0, step * most, step))

    prompts = [
        row["prompt"]
        for row in rows("safety/do_not_answer.jsonl.zst", 1, 939)
        if row["file"].startswith("discrimination")
    ]
    name = "safety/harmless_instructions_refusal_direction.jsonl.zst"
    harmless = [row["instruction"] for row in rows(name, 30, 1000)]
    assert metrics.roc_auc(unsafe_share(prompts), unsafe_share(harmless)) > 0.9
    books = [
        row["text"]
        for row in rows("corpus/textbooks-openstax.jsonl.zst", 9, 600)
        if "-nc" in row["license"].lower()
    ]
    assert len(books) > 300 and unsafe_share(books).max() < LIMIT
