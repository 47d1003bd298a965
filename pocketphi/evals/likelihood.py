"""Running choice tasks: every option's log-likelihood, and the choice that follows."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

from pocketphi.core import progress
from pocketphi.evals import metrics, prompts
from pocketphi.evals.backends.base import Scorer
from pocketphi.evals.journal import Journal
from pocketphi.evals.loading import Loaded
from pocketphi.evals.task import Question, Task


def run_task(each: Loaded, scorer: Scorer, journal: Journal) -> list[dict[str, Any]]:
    """Score every item of a choice task that the journal does not hold; return all records in order."""
    label = each.task.label
    # Group by group, so that the few-shot text of one is computed once.
    order = sorted(range(len(each.items)), key=lambda i: (each.items[i].group, i))
    todo = [each.items[i] for i in order if journal.get(label, each.items[i].id) is None]
    score = _by_text if scorer.tokenizer is None else _by_tokens
    with progress.bar(label, len(order), unit="items", done=len(order) - len(todo)) as shown:
        for question, figures in score(each, todo, scorer):
            journal.add(
                {"task": label, "id": question.id, "group": question.group, **figures, **_shown(question)}
            )
            shown.advance()
    return [journal.records[(label, q.id)] for q in each.items]


def shots_text(each: Loaded, group: str) -> str:
    """The few-shot text that stands before every question of a group."""
    return prompts.shots_text(each.task, each.shots.get(group, each.shots.get("", [])), group)


def _by_tokens(
    each: Loaded, todo: list[Question], scorer: Scorer
) -> Iterator[tuple[Question, dict[str, Any]]]:
    prepared: dict[str, str] = {}
    # Questions on their way through the model, in step with the scores that come back.
    waiting: list[tuple[Question, prompts.Rendered, list[prompts.Request]]] = []

    def feed() -> Iterator[list[prompts.Request]]:
        for question in todo:
            if question.group not in prepared:
                prepared[question.group] = shots_text(each, question.group)
            text = prepared[question.group]
            shape = prompts.render(each.task, question)
            found = prompts.requests(scorer.tokenizer, shape, text, scorer.start_ids, scorer.max_tokens)
            waiting.append((question, shape, found))
            yield found

    scores = scorer.score(chain.from_iterable(feed()))
    for _ in todo:
        first = next(scores)
        question, shape, found = waiting.pop(0)
        parts = [first, *(next(scores) for _ in found[1:])]
        by_option: list[Any] = [None] * len(shape.continuations)
        tokens = [0] * len(shape.continuations)
        for request, part in zip(found, parts):
            for option, score, ids in zip(request.indices, part, request.options):
                by_option[option], tokens[option] = score, len(ids)
        cut_tokens = max(r.cut_tokens for r in found)
        yield question, _figures(each.task, question, by_option, shape, tokens, cut_tokens)


def _by_text(each: Loaded, todo: list[Question], scorer: Any) -> Iterator[tuple[Question, dict[str, Any]]]:
    shapes = [(shots_text(each, q.group), prompts.render(each.task, q)) for q in todo]
    for question, (_, shape), scores in zip(todo, shapes, scorer.score_texts(shapes)):
        yield question, _figures(each.task, question, scores, shape, [0] * len(scores), 0)


def _figures(
    task: Task,
    question: Question,
    scores: list[Any],
    shape: prompts.Rendered,
    tokens: list[int],
    cut_tokens: int,
) -> dict[str, Any]:
    record = metrics.choice_record(task, question, scores, shape.lengths, tokens)
    if question.true is not None:
        record["num_true"] = sum(question.true)
    record["cut_tokens"] = cut_tokens
    return record


def _shown(question: Question) -> dict[str, Any]:
    return {"question": question.text[:600], "options": [o[:200] for o in question.options]}
