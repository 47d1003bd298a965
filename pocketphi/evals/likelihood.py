"""Running choice tasks: every option's log-likelihood, and the choice that follows."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, cast

from pocketphi.core import progress
from pocketphi.evals import metrics, prompts
from pocketphi.evals.backends.base import OptionScore, Scorer
from pocketphi.evals.journal import Journal
from pocketphi.evals.loading import Loaded
from pocketphi.evals.task import Question, Task


def run_task(each: Loaded, scorer: Scorer, journal: Journal) -> list[dict[str, Any]]:
    """Score every item of a choice task that the journal does not hold; return all records in order."""
    label = each.task.label
    # Group by group, so that the few-shot text of one is computed once.
    order = sorted(range(len(each.items)), key=lambda i: (each.items[i].group, i))
    todo = [each.items[i] for i in order if journal.get(label, each.items[i].id) is None]
    prepared = {group: shots_text(each, group) for group in dict.fromkeys(q.group for q in todo)}
    shapes = [prompts.render(each.task, q) for q in todo]
    found = scores(((prepared[q.group], shape) for q, shape in zip(todo, shapes)), scorer)
    with progress.bar(label, len(order), unit="items", done=len(order) - len(todo)) as shown:
        for question, shape, (by_option, tokens, cut_tokens) in zip(todo, shapes, found):
            figures = _figures(each.task, question, by_option, shape, tokens, cut_tokens)
            journal.add(
                {"task": label, "id": question.id, "group": question.group, **figures, **_shown(question)}
            )
            shown.advance()
    return [journal.records[(label, q.id)] for q in each.items]


def shots_text(each: Loaded, group: str) -> str:
    """The few-shot text that stands before every question of a group."""
    return prompts.shots_text(each.task, each.shots.get(group, each.shots.get("", [])), group)


def scores(
    shapes: Iterable[tuple[str, prompts.Rendered]], scorer: Scorer
) -> Iterator[tuple[list[OptionScore], list[int], int]]:
    """Yield per question, in order: the score of each option, its tokens, the tokens cut from its context.

    shapes: (few-shot text, question). Tokens are 0 where an endpoint keeps them to itself.
    """
    if scorer.tokenizer is None:
        for whole in cast(Any, scorer).score_texts(shapes):
            yield whole, [0] * len(whole), 0
        return
    # Questions on their way through the model, in step with the scores that come back.
    waiting: deque[tuple[int, list[prompts.Request]]] = deque()

    def feed() -> Iterator[list[prompts.Request]]:
        for text, shape in shapes:
            found = prompts.requests(scorer.tokenizer, shape, text, scorer.start_ids, scorer.max_tokens)
            waiting.append((len(shape.continuations), found))
            yield found

    parts = scorer.score(chain.from_iterable(feed()))
    for first in parts:
        count, found = waiting.popleft()
        by_option: list[Any] = [None] * count
        tokens = [0] * count
        for request, part in zip(found, chain((first,), parts)):
            for option, score, ids in zip(request.indices, part, request.options):
                by_option[option], tokens[option] = score, len(ids)
        yield by_option, tokens, max(r.cut_tokens for r in found)


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
