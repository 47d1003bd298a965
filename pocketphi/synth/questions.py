"""Questions with right answers, from the training splits of public benchmarks.

Rows are JSON lines (plain or .zst) of one of these forms, told by their fields:
{query, choices, gold}, {goal, sol1, sol2, label}, {sentence, option1, option2, answer},
{question, answer}.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketphi.core.errors import DataError
from pocketphi.synth.text import Chat, Document, generator, sentence


@dataclass(frozen=True)
class Item:
    """One question and its right answer, both as plain text; `text` reads as prose."""

    question: str
    answer: str
    text: str


def documents(
    path: Path, license_: str, items_per_document: int, max_items: int | None
) -> Iterator[Document]:
    """Yield documents of several items each, in the file's order."""
    items = list(_items(path, max_items))
    source = path.name.split(".")[0]
    for start in range(0, len(items), items_per_document):
        group = items[start : start + items_per_document]
        text = "\n\n".join(item.text for item in group)
        yield Document(
            text, source, license_, tuple(f"{path.name}:{start + i + 1}" for i in range(len(group)))
        )


def chats(path: Path, license_: str, count: int, seed: int) -> Iterator[Chat]:
    """Yield up to `count` items that read as a question, drawn at random."""
    asked = [(i, item) for i, item in enumerate(_items(path, None)) if item.question]
    random_ = generator(seed, "questions", path.name)
    for index, item in sorted(random_.sample(asked, min(count, len(asked)))):
        yield Chat(item.question, item.answer, path.name.split(".")[0], license_, f"{path.name}:{index + 1}")


def _items(path: Path, max_items: int | None) -> Iterator[Item]:
    found = 0
    for number, row in enumerate(_rows(path), start=1):
        try:
            item = _item(row)
        except (KeyError, IndexError, TypeError, ValueError):
            raise DataError(
                f"{path}:{number}: not a form of question that is known (fields: {', '.join(map(str, row))})"
            ) from None
        yield item
        found += 1
        if found == max_items:
            return
    if not found:
        raise DataError(f"{path}: holds no question")


def _item(row: dict[str, Any]) -> Item:
    if "goal" in row:
        goal, solution = row["goal"].strip(), row["choices"][row["gold"]].strip()
        question = goal if goal.endswith("?") else f"How can I do this: {goal.rstrip('.:, ')}?"
        return Item(question, sentence(solution), f"Goal: {goal}\nAnswer: {sentence(solution)}")
    if "sentence" in row:
        filled = row["sentence"].replace("_", row[f"option{row['gold'] + 1}"])
        return Item("", "", filled)
    if "answer" in row and "question" in row:
        worked = re.sub(r"<<[^>]*>>", "", row["answer"])
        steps, _, result = worked.partition("####")
        answer = f"{steps.strip()}\nThe answer is {result.strip()}." if result else steps.strip()
        return Item(row["question"], answer, f"Question: {row['question']}\nAnswer: {answer}")
    query, answer = row["query"].strip(), row["choices"][row["gold"]].strip()
    asked = re.fullmatch(r"Question:\s*(.*?)\s*Answer:", query, re.DOTALL)
    if asked:
        question = asked.group(1)
        return Item(question, sentence(answer), f"Question: {question}\nAnswer: {sentence(answer)}")
    if query.endswith("Answer:"):  # a passage, then the question about it
        return Item("", "", f"{query} {sentence(answer)}")
    joint = "" if answer[:1] in ",.;:!?'" else " "
    return Item("", "", f"{query}{joint}{answer}")


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, "rb") as raw:
        stream: Any = raw
        if path.suffix == ".zst":
            import zstandard

            stream = zstandard.ZstdDecompressor().stream_reader(raw)
        for number, line in enumerate(io.TextIOWrapper(stream, encoding="utf-8"), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}:{number}: not JSON: {error}") from None
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number}: expected an object, found {type(row).__name__}")
            yield row
