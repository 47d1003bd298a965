"""Synthesis: right by construction, traceable to its seed, the same every time."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from pocketphi import synth
from pocketphi.core.errors import ConfigError, DataError
from pocketphi.synth import arithmetic, dictionary, questions

HEADER = "  1 This header of two leading blanks is the licence.\n"
NOUNS = (
    '00000001 03 n 01 thing 0 000 | a separate and self-contained entity\n'
    '00000002 20 n 02 plant 0 flora 0 001 @ 00000001 n 0000 | a living organism that cannot move; "the plants grow"\n'
    '00000003 06 n 01 plant 1 001 @ 00000001 n 0000 | buildings for carrying on industrial labor\n'
    '00000004 27 n 01 water 0 001 @ 00000001 n 0000 | clear liquid that falls as rain\n'
)  # fmt: skip


@pytest.fixture
def wordnet(tmp_path: Path) -> Path:
    (tmp_path / "data.noun").write_text(HEADER + NOUNS)
    (tmp_path / "data.verb").write_text(
        '00000005 38 v 01 walk 0 000 01 + 01 00 | use one\'s feet; "walk home"\n'
    )
    (tmp_path / "data.adj").write_text("00000006 00 a 01 small(a) 0 000 | limited in size\n")
    (tmp_path / "cntlist.rev").write_text(
        "plant%1:20:00:: 2 90\nplant%1:06:01:: 1 20\nwater%1:27:00:: 1 50\nwalk%2:38:00:: 1 5\n"
    )
    return tmp_path


def test_the_frequent_sense_answers(wordnet: Path) -> None:
    found = {chat.seed: chat for chat in dictionary.chats(wordnet, 10, seed=0)}
    assert "n00000003" not in found, "each word is asked once, in its most frequent sense"
    assert found["n00000002"].answer == (
        "A plant is a living organism that cannot move. It is a kind of thing. For example: The plants grow."
    )
    assert found["n00000004"].answer.startswith("Water: clear liquid")
    assert found["v00000005"].answer == '"walk" means use one\'s feet. For example: Walk home.'
    assert [c.seed for c in dictionary.chats(wordnet, 2, seed=0)] == ["n00000002", "n00000004"]


def test_a_damaged_dictionary_names_the_line(wordnet: Path) -> None:
    with open(wordnet / "data.noun", "a") as file:
        file.write("00000007 03 n zz broken\n")
    with pytest.raises(DataError, match=r"data\.noun:6"):
        dictionary.read(wordnet)


def test_arithmetic_is_right() -> None:
    random_ = random.Random(0)
    checked = 0
    for _ in range(2000):
        question, answer = arithmetic.problem(random_)
        for a, sign, b, result in re.findall(r"(\d+) ([-+x]) (\d+) = (\d+)", answer):
            assert {"+": int(a) + int(b), "-": int(a) - int(b), "x": int(a) * int(b)}[sign] == int(result)
            checked += 1
        spoken = re.fullmatch(r"(\d+) (plus|minus|times|divided by) (\d+) is (\d+)\.", answer)
        if spoken:
            a, b, result = int(spoken[1]), int(spoken[3]), int(spoken[4])
            assert result == {"plus": a + b, "minus": a - b, "times": a * b, "divided by": a / b}[spoken[2]]
            assert f"{spoken[1]} {spoken[2]} {spoken[3]}" in question
            checked += 1
        larger = re.fullmatch(r"(\d+) is larger than (\d+)\.", answer)
        if larger:
            assert int(larger[1]) > int(larger[2])
            checked += 1
    assert checked > 1900


@pytest.mark.parametrize(
    ("row", "question", "answer", "text"),
    [
        (
            {"query": "Question: What falls?\nAnswer:", "choices": ["up", "rain"], "gold": 1},
            "What falls?",
            "Rain.",
            "Question: What falls?\nAnswer: Rain.",
        ),
        (
            {"goal": "To dry hands", "sol1": "x", "sol2": "y", "choices": ["use a towel", "y"], "gold": 0},
            "How can I do this: To dry hands?",
            "Use a towel.",
            "Goal: To dry hands\nAnswer: Use a towel.",
        ),
        ({"sentence": "He ate because _ was hungry.", "option1": "he", "option2": "it", "gold": 0}, "", "",
         "He ate because he was hungry."),
        (
            {"question": "How many?", "answer": "2+2=<<2+2=4>>4\n#### 4"},
            "How many?",
            "2+2=4\nThe answer is 4.",
            "Question: How many?\nAnswer: 2+2=4\nThe answer is 4.",
        ),
        ({"query": "A man sits. Then", "choices": [", he stands.", "x"], "gold": 0}, "", "", "A man sits. Then, he stands."),
        ({"query": "Text. Question: is it?\nAnswer:", "choices": ["no", "yes"], "gold": 1}, "", "",
         "Text. Question: is it?\nAnswer: Yes."),
    ],
)  # fmt: skip
def test_every_form_of_question(tmp_path: Path, row: dict, question: str, answer: str, text: str) -> None:
    path = tmp_path / "x.train.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (document,) = questions.documents(path, "MIT", 8, None)
    assert document.text == text and document.seeds == ("x.train.jsonl:1",)
    chats = list(questions.chats(path, "MIT", 5, seed=0))
    assert [(c.question, c.answer) for c in chats] == ([(question, answer)] if question else [])


def test_an_unknown_form_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "x.train.jsonl"
    path.write_text('{"prompt": "a"}\n')
    with pytest.raises(DataError, match=r"x\.train\.jsonl:1: not a form.*prompt"):
        list(questions.documents(path, "MIT", 8, None))


@pytest.mark.parametrize("name", ["arc_easy.test.jsonl.zst", "piqa.validation.jsonl", "mbpp.all.jsonl"])
def test_an_evaluation_split_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="evaluation split"):
        synth.QuestionSource(name, "MIT")


def test_the_stage_is_repeatable_and_skips(tmp_path: Path, wordnet: Path) -> None:
    config = synth.SynthConfig(wordnet=str(wordnet), arithmetic=20, seed=3)
    first = synth.run(config, {}, out=tmp_path / "a")
    second = synth.run(config, {}, out=tmp_path / "b")
    assert first.checksum == second.checksum
    assert first.counts["chats_arithmetic"] == 20 and first.counts["documents_wordnet"] == 1
    before = (tmp_path / "a/manifest.json").stat().st_mtime_ns
    synth.run(config, {}, out=tmp_path / "a")
    assert (tmp_path / "a/manifest.json").stat().st_mtime_ns == before
    other = synth.run(synth.SynthConfig(wordnet=str(wordnet), arithmetic=20, seed=4), {}, out=tmp_path / "c")
    assert other.checksum != first.checksum
    for row in map(json.loads, (tmp_path / "a/chats.jsonl").open()):
        assert row["license"] and row["seed"] and row["messages"][1]["content"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none/data\.noun: no such file"):
        synth.run(synth.SynthConfig(wordnet=str(tmp_path / "none")), {}, out=tmp_path / "x")
