"""Chats are read from the forms people have, and what is left out is counted."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from pocketphi.core.errors import DataError
from pocketphi.train import chat_data

PAIR = (("user", "Hi"), ("assistant", "Hello"))


def one(row) -> tuple[tuple[str, str], ...]:
    return chat_data.checked(chat_data.messages_of(row))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello "}]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "Hello"}},
        {"instruction": "Hi", "input": "", "output": "Hello"},
        {"instruction": "Hi", "response": "Hello"},
        {"instruction": "Hi", "instances": [{"input": "", "output": "Hello"}]},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: Go away"},
        {"prompt": "Hi", "completion": "Hello"},
        {"question": "Hi", "answer": "Hello"},
        {"prompt": {"text": "Hi", "role": "prompter", "replies": [
            {"text": "No", "role": "assistant", "rank": 1, "replies": []},
            {"text": "Hello", "role": "assistant", "rank": 0, "replies": []}]}},
    ],
)  # fmt: skip
def test_known_forms_give_the_same_chat(row) -> None:
    assert one(row) == PAIR


def test_system_input_and_last_user_turn() -> None:
    assert one({"instruction": "Add", "input": "1 2", "output": "3"})[0] == ("user", "Add\n\n1 2")
    row = {"messages": [
        {"role": "system", "content": "Be kind"}, {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Bye"}]}  # fmt: skip
    assert one(row) == (("system", "Be kind"), *PAIR)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (3, "not an object"),
        ({"text": "a"}, "no known form"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "no answer"),
        ({"messages": [{"role": "assistant", "content": "Hello"}]}, "do not alternate"),
        ({"instruction": "Hi", "output": "  "}, "an empty turn"),
        ({"conversations": [{"from": "observation", "value": "x"}]}, "role 'observation'"),
        ({"messages": [], "label": False}, "bad answer"),
        ({"chosen": "Hello"}, "not a Human/Assistant text"),
    ],
)
def test_rows_that_cannot_be_used_give_a_reason(row, reason: str) -> None:
    with pytest.raises(chat_data.Skipped, match=reason):
        one(row)


def test_files_are_read_and_what_is_left_out_is_counted(tmp_path: Path) -> None:
    rows = [{"question": "Hi", "answer": "Hello"}, {"text": "x"}, {"question": "A", "answer": "B" * 99}]
    plain = tmp_path / "a.jsonl"
    plain.write_text("\n".join([json.dumps(r) for r in rows] + ["{broken", ""]))
    (tmp_path / "b.json").write_text(json.dumps(rows))
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write(json.dumps(rows[0]) + "\n")
    left_out: Counter[str] = Counter()
    assert [len(chat_data.read_file(p, left_out)) for p in chat_data.files_of([str(tmp_path)])] == [2, 2, 1]
    assert left_out == {"a: no known form": 1, "a: a line that is not JSON": 1, "b: no known form": 1}
    left_out.clear()
    assert len(chat_data.read_file(plain, left_out, max_characters=50)) == 1
    assert left_out["a: longer than max_characters"] == 1


def test_missing_empty_and_useless_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such chat file"):
        chat_data.files_of([str(tmp_path / "none.jsonl")])
    with pytest.raises(DataError, match="no chat file in this folder"):
        chat_data.files_of([str(tmp_path)])
    for name, text in (
        ("empty.jsonl", ""),
        ("forms.jsonl", '{"text": 1}\n'),
        ("cut.json", "[1, "),
        ("z.jsonl.gz", "no"),
    ):
        path = tmp_path / name
        path.write_text(text)
        with pytest.raises(DataError, match=name):
            chat_data.read_file(path, Counter())


def test_our_conversations_are_whole_and_distinct() -> None:
    chats = chat_data.built_in()
    assert len(chats) > 400
    assert len({c.messages for c in chats}) == len(chats)
    for chat in chats:
        assert chat_data.checked(chat.as_messages()) == chat.messages
        answer = chat.messages[-1][1]
        assert answer[-1] in ".!?", answer
        assert answer.isascii()
    assert (("user", "What is 3 plus 4?"), ("assistant", "3 plus 4 is 7.")) in {c.messages for c in chats}


LAW = (
    "Law\n\nLaw is a set of rules that are made by governments. It has been called a science. Old law is old."
)


def test_definitions_are_the_documents_own_words() -> None:
    found = chat_data.definition(LAW)
    assert found is not None
    assert (found.name, found.person) == ("law", False)
    assert found.first == "Law is a set of rules that are made by governments."
    assert found.more in LAW.replace("\n\n", " ")
    chats = dict(chat_data._chats_of(found, 0))
    assert chats["definitions"].messages[0] == ("user", "What is law?")
    assert chats["explanations"].messages == (("user", "Tell me about law."), ("assistant", found.more))
    summary = dict(chat_data._chats_of(found, 2))["summaries"]
    assert found.more in summary.messages[0][1]
    assert summary.messages[1][1] == found.first


@pytest.mark.parametrize(
    ("text", "question"),
    [
        ("High jump\n\nThe high jump is a track and field event. Two. Three.", "What is the high jump?"),
        (
            "Lawsuit\n\nA lawsuit is a proceeding by one party against another. Lawsuits cost.",
            "What is a lawsuit?",
        ),
        ("Palmyra\n\nPalmyra is an ancient city in central Syria. It lies in the east.", "What is Palmyra?"),
        (
            "Huldrych Zwingli\n\nHuldrych Zwingli was a Swiss Christian theologian. Born in 1484.",
            "Who was Huldrych Zwingli?",
        ),
        (
            "Bees\n\nBees are winged insects that are known for pollination. Many bees live alone.",
            "What are bees?",
        ),
    ],
)
def test_questions_are_asked_as_one_asks(text: str, question: str) -> None:
    found = chat_data.definition(text)
    assert found is not None
    assert next(iter(chat_data._chats_of(found, 0)))[1].messages[0][1] == question


@pytest.mark.parametrize(
    "text",
    [
        "It was a dark night\n\nIt was a dark and stormy night, and nobody was to be seen.",
        "Chapter One\n\nThe old man went down to the sea and looked for his boat for a long time.",
        "Law",
        "A title that is much too long to be the title of anything at all\n\nIt is a thing that is long.",
    ],
)
def test_texts_without_a_definition_give_none(text: str) -> None:
    assert chat_data.definition(text) is None


def test_first_sentences_do_not_end_at_abbreviations() -> None:
    text = "Dr. Smith (b. 1900, e.g. in St. Ives) was a man. He lived. No end here"
    assert chat_data.first_sentences(text, 100) == [
        "Dr. Smith (b. 1900, e.g. in St. Ives) was a man.",
        "He lived.",
    ]


def test_real_files_are_understood(shared_data: Path) -> None:
    left_out: Counter[str] = Counter()
    folder = shared_data / "alignment"
    minimum = {
        "codealpaca_2k.jsonl.zst": 1900,
        "gpteacher_roleplay.jsonl.zst": 1800,
        "hh-rlhf_harmless-base.test.jsonl.zst": 2200,
        "llamafactory_alpaca_en_demo.jsonl.zst": 900,
        "llamafactory_dpo_en_demo.jsonl.zst": 250,
        "llamafactory_kto_en_demo.jsonl.zst": 100,
        "open-assistant_en_100_trees.jsonl.zst": 90,
        "self-instruct_seed_tasks.jsonl.zst": 170,
        "fastchat_dummy_conversation.json": 400,
    }
    for name, count in minimum.items():
        assert len(chat_data.read_file(folder / name, left_out)) >= count, (name, left_out)
