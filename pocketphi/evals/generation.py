"""Running tasks whose answer the model writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pocketphi.core import progress
from pocketphi.core.errors import DataError
from pocketphi.evals import longcontext, prompts
from pocketphi.evals.backends.base import Scorer
from pocketphi.evals.config import EvalConfig
from pocketphi.evals.data import read, require, text_sha256
from pocketphi.evals.journal import Journal
from pocketphi.evals.task import LETTERS, Prompt, Question, Task, prompt_version

if TYPE_CHECKING:
    from pocketphi.evals.loading import Loaded

_KEPT_CHARS = 4000


def run_task(config: EvalConfig, each: Loaded, scorer: Scorer, journal: Journal) -> list[dict[str, Any]]:
    """Let the model answer every prompt of a task and read the answers. Resumes from the journal."""
    task, label = each.task, each.task.label
    assert task.score is not None
    # A haystack cut short would lose its needle: it is asked as plain text or as a message, whole.
    partly = task.kind == "long"
    order = sorted(range(len(each.items)), key=lambda i: (each.items[i].group, i))
    todo = [i for i in order if journal.get(label, each.items[i].id) is None]
    limit = min(task.max_new_tokens, config.max_new_tokens)
    with progress.bar(label, len(order), unit="items", done=len(order) - len(todo)) as shown:
        texts = (full_prompt(each, each.items[i]) for i in todo)
        stop = task.chat_stop if config.chat and task.chat_stop is not None else task.stop
        replies = scorer.complete(texts, chat=config.chat, max_new_tokens=limit, stop=stop)
        for index, reply in zip(todo, replies):
            prompt: Prompt = each.items[index]
            verdict = task.score(reply.text, prompt)
            journal.add(
                {
                    "task": label,
                    "id": prompt.id,
                    "group": prompt.group,
                    "target": prompt.target[:_KEPT_CHARS],
                    "answer": verdict.answer,
                    "correct": longcontext.share(verdict) if partly else int(verdict.correct),
                    "note": verdict.note,
                    "ended": reply.ended,
                    "num_tokens": reply.num_tokens,
                    "cut_tokens": reply.cut_tokens,
                    "prompt_sha256": text_sha256(full_prompt(each, prompt))[:16],
                    "question": prompt.prompt[-600:],
                    "text": reply.text[:_KEPT_CHARS],
                }
            )
            shown.advance()
    return [journal.records[(label, p.id)] for p in each.items]


def prefix(each: Loaded, prompt: Prompt) -> str:
    """The few-shot text that stands before a prompt, that of its group."""
    return each.prefix.get(prompt.group, each.prefix.get("", ""))


def full_prompt(each: Loaded, prompt: Prompt) -> str:
    """The few-shot text of the prompt's group, and the prompt."""
    return prefix(each, prompt) + prompt.prompt


def version(each: Loaded) -> str:
    """The prompt version: settings and one whole prompt."""
    return prompt_version(each.task, full_prompt(each, each.items[0]))


def read_prefix(
    config: EvalConfig, task: Task, shots: Mapping[str, list[Prompt]]
) -> tuple[dict[str, str], Any]:
    """Return the few-shot text by group, and the file it was read from, if it was read from one."""
    from pocketphi.evals.tasks import generate

    if not task.shots:
        return {}, None
    if task.prefix_file is None:
        text = "".join(generate.solved(task, p) + "\n\n" for p in shots.get("", []))
        return {"": text}, None
    file = require(config.data_dir, task.prefix_file, from_hub=config.hub)
    rows = list(read(file, ()))
    if task.name == "bbh":
        return {row["task"]: _bbh_prefix(row["prompt"], task.shots) for row in rows}, file
    if len(rows) < task.shots:
        raise DataError(f"{file.path}: {task.shots} shots asked for, {len(rows)} rows there")
    solved = [f"Q: {row['question']}\nA: {row['target']}\n\n" for row in rows[: task.shots]]
    return {"": "".join(solved)}, file


def _bbh_prefix(text: str, shots: int) -> str:
    """The task's instruction and its first solved questions, without the canary line."""
    body = text.partition("-----\n")[2] or text
    # One task's exemplars go on in the same line; lm-eval puts all alike, as the question itself ends.
    body = body.replace("\nA: Let's think step by step. ", "\nA: Let's think step by step.\n")
    instruction, *examples = body.split("\n\nQ: ")
    return "".join(
        [instruction.strip() + "\n\n", *(f"Q: {example.strip()}\n\n" for example in examples[:shots])]
    )


def from_choice(each: Loaded) -> Loaded:
    """Turn a choice task into one answered by writing a letter, for models that only write.

    Options are listed with letters (the cloze form has nothing to write), the prompt asks for the
    letter, and a text without a readable letter is wrong and counted.
    """
    from pocketphi.evals.tasks.generate import letter_score

    task = each.task if each.task.format != "cloze" else replace(each.task, format="letters")
    turned = replace(
        task,
        kind="generate",
        metric="accuracy",
        score=letter_score,
        stop=("\n\n", "\nQuestion:"),
        max_new_tokens=32,
    )
    items, before = [], {}
    for question in each.items:
        context = prompts.render(task, question).contexts[0]
        items.append(
            Prompt(
                question.id,
                context,
                LETTERS[question.gold],
                question.group,
                {"count": len(question.options), "options": list(question.options)},
            )
        )
        if question.group not in before:
            shown: list[Question] = each.shots.get(question.group, each.shots.get("", []))
            before[question.group] = prompts.shots_text(task, shown, question.group)
    return replace(each, task=turned, items=items, prefix=before, by_writing=True)
