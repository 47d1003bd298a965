"""Our own definitions that name a task of lm-eval's ask what it asks: same contexts, same continuations."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pocketphi.evals import EvalConfig, data, generation, likelihood, loading, prompts
from pocketphi.evals import tasks as _tasks  # noqa: F401  (fills the registry)
from pocketphi.evals.task import TASKS, Task, parse_task

pytest.importorskip("lm_eval", reason="the package lm_eval is not installed")

from pocketphi.evals import harness
from pocketphi.evals.harness import index, rows

CLAIMED = [name for name, task in TASKS.items() if task.lm_eval]
ROWS = 40
_ODD = "Où est  l'été?  (“no”\tidea)"


def _query(text: str, count: int = 4, **more: Any) -> dict[str, Any]:
    choices = ["a", "B c", " d ", "É, f."][:count]
    return {"id": text[:6], "query": f"Question: {text}\nAnswer:", "choices": choices, "gold": 1, **more}


_NLI = [
    {"uid": str(i), "context": c, "statement": s, "gold_label": g}
    for i, (c, s, g) in enumerate([("Ann ran. ", "Ann moved.", "e"), (_ODD, "No.", "c"), ("X", "Y?", "n")])
]
# Rows of our own making, in the columns of our files, with what real rows have seldom.
HAND_MADE: dict[str, list[dict[str, Any]]] = {
    "arc_easy": [_query("What is ice?"), _query(_ODD, 3), _query("Question: twice?", 2)],
    "arc_challenge": [_query("What is ice?"), _query(_ODD, 3)],
    "openbookqa": [_query("the sun is"), _query(_ODD), _query("ends with a space ")],
    "commonsense_qa": [_query("Where is it?") | {"choices": ["a", "b", "c", "d", "e f"]}],
    "hellaswag": [
        {"ind": 1, "activity_label": "Ice", "ctx_a": "A man sits.", "ctx_b": "he", "ctx": "A man sits. he",
         "endings": ["is [title] here.", "goes [step] on.", "  waits.", "a  b"], "label": "2"},
        {"ind": 2, "activity_label": "How to [header]", "ctx_a": "[title] Look.", "ctx_b": "", "ctx": "[title] Look.",
         "endings": ["a", "b", "c", "d"], "label": "0"},
    ],
    "piqa": [{"goal": _ODD, "sol1": "do so ", "sol2": " do not", "label": 1}],
    "winogrande": [
        {"sentence": "Ann saw _ by the sea.", "option1": "Bob", "option2": "the  dog", "answer": "1"},
        {"sentence": "_ was late because _ slept.", "option1": "Ann", "option2": "Bob", "answer": "2"},
    ],
    "boolq": [
        {"idx": 1, "query": "Ice -- is water.\nMore.\nQuestion: is ice wet?\nAnswer:", "choices": ["yes", "no"], "gold": 1},
        {"idx": 2, "query": f"{_ODD}\nQuestion: is it\nso?\nAnswer:", "choices": ["yes", "no"], "gold": 0},
    ],
    "sciq": [
        {"question": "Who?", "support": " \n Text. ", "distractor1": "a", "distractor2": "b ", "distractor3": "c", "correct_answer": "d"},
        {"question": _ODD, "support": "", "distractor1": "a", "distractor2": "b", "distractor3": "c", "correct_answer": "d e"},
    ],
    "lambada": [{"id": 0, "query": "She said “no” and", "answers_text": ["left"]}, {"id": 1, "query": "a  b", "answers_text": ["c"]}],
    "social_iqa": [{"context": "Ann ran. ", "question": "Why?", "answerA": "a", "answerB": "b c", "answerC": " d", "label": "2"}],
    "anli_r1": _NLI, "anli_r2": _NLI, "anli_r3": _NLI,
    "rte": [{"sentence1": "A. ", "sentence2": "B", "idx": 0, "label": 1}, {"sentence1": _ODD, "sentence2": _ODD, "idx": 1, "label": 0}],
}  # fmt: skip


def write(path: Path, found: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in found), encoding="utf-8")


def theirs_of(task: Task) -> str:
    return task.lm_eval.split()[0]


def both(task: Task, folder: Path) -> tuple[list[Any], list[Any], list[str]]:
    """What is asked of every row by ours and by lm-eval's: pairs of context and continuation, in one order."""
    config = EvalConfig(data_dir=folder)
    name = theirs_of(task)
    for leaf, definition in index.leaves(name):
        # Where lm-eval scores a split that we hold no rows of, it gets those that we do hold.
        split = definition.get("test_split") or definition.get("validation_split")
        place = definition["dataset_path"], str(definition.get("dataset_name") or "")
        source = rows.SOURCES.get(place) or rows.SOURCES[place[0], "*"]
        if split not in source.files:
            held = data.require(folder, task.file or "")
            write(folder / "lm-eval" / f"{leaf}.{split}.jsonl", rows.converted(source, held, place[1]))
    mine = loading.load_task(config, task, None)
    settings = {"shots": str(task.shots)}
    other = harness.load(config, index.parse(f"lm-eval/{name}", settings)[0], None)
    asked: list[tuple[str, Any]] = []
    for item in mine.items:
        if task.kind == "choice":
            shape, text = prompts.render(mine.task, item), likelihood.shots_text(mine, item.group)
            found: Any = [(text + c, k) for c, k in zip(shape.contexts, shape.continuations)]
        else:
            found = [(generation.full_prompt(mine, item), "")]
        asked.append((item.group, found))
    said = []
    for item in other.items:
        pairs = [(i.args[0], i.args[1] if task.kind == "choice" else "") for i in item.instances]
        said.append((re.sub(r"^(mmlu|bbh_cot_fewshot)_", "", item.part), pairs))
    grouped = any(group for group, _ in asked)
    ours = [x for _, x in (sorted(asked, key=lambda a: a[0]) if grouped else asked)]
    lm_evals = [x for _, x in (sorted(said, key=lambda a: a[0]) if grouped else said)]
    versions = [str(t.VERSION) for t in other.defined.tasks.values()]
    return ours, lm_evals, versions


def test_every_claim_is_tested() -> None:
    assert set(CLAIMED) == {*HAND_MADE, "mmlu", "gsm8k", "bbh"}


@pytest.mark.parametrize("name", HAND_MADE)
def test_hand_made_rows_are_asked_alike(name: str, tmp_path: Path) -> None:
    task = parse_task(name)
    write(tmp_path / f"{task.file}.jsonl", HAND_MADE[name])
    ours, theirs, _ = both(task, tmp_path)
    assert ours == theirs and len(ours) == len(HAND_MADE[name])


@pytest.mark.parametrize("name", CLAIMED)
def test_real_rows_are_asked_alike(name: str, shared_data: Path, tmp_path: Path) -> None:
    """Zero-shot; GSM8K and BIG-Bench-Hard with their exemplars, which are the same texts."""
    task = parse_task(name)
    for stem in {task.file, task.prefix_file} - {None}:
        found = list(data.read(data.require(shared_data / "benchmarks", stem), ()))
        if stem == task.file:
            found = some(found, {"mmlu": "subject", "bbh": "task"}.get(name))
        write(tmp_path / f"{stem}.jsonl", found)
    ours, theirs, versions = both(task, tmp_path)
    assert len(ours) >= 40
    assert ours == theirs
    claimed = task.lm_eval.split()[1:2]
    # lm-eval's CommonsenseQA has no version.
    assert set(versions) == ({claimed[0][1:]} if claimed else {"Yaml"})


def some(found: list[dict[str, Any]], column: str | None) -> list[dict[str, Any]]:
    if column is None:
        return found[:ROWS]
    seen: dict[str, int] = {}
    kept = []
    for row in found:
        seen[row[column]] = seen.get(row[column], 0) + 1
        if seen[row[column]] <= 2:
            kept.append(row)
    return kept


def test_mmlus_shots_are_lm_evals_shots(shared_data: Path, tmp_path: Path) -> None:
    """The first development rows, on both sides."""
    for stem in ("mmlu.test", "mmlu.dev"):
        found = list(data.read(data.require(shared_data / "benchmarks", stem), ()))
        write(tmp_path / f"{stem}.jsonl", some(found, "subject") if stem == "mmlu.test" else found)
    ours, theirs, _ = both(parse_task("mmlu:shots=5"), tmp_path)
    assert ours == theirs and "Answer: " in ours[0][0][0]


@pytest.mark.parametrize("name", ["arc_easy", "piqa", "winogrande", "openbookqa", "boolq", "commonsense_qa", "social_iqa"])  # fmt: skip
def test_shots_read_as_lm_evals_do(name: str, shared_data: Path, tmp_path: Path) -> None:
    """The draw is another (ours by hash, lm-eval's by a generator that goes on from item to item): with
    nothing to draw from but copies of one row, the texts are the same."""
    task = parse_task(f"{name}:shots=2")
    benchmarks = shared_data / "benchmarks"
    write(tmp_path / f"{task.file}.jsonl", list(data.read(data.require(benchmarks, task.file or ""), ()))[:5])
    shot = next(iter(data.read(data.require(benchmarks, task.shots_file or ""), ())))
    write(tmp_path / f"{task.shots_file}.jsonl", [shot] * 4)
    ours, theirs, _ = both(task, tmp_path)
    assert ours == theirs and len(ours) == 5
