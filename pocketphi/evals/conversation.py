"""Running MT-bench: two turns of conversation, each rated by a judge.

Answers and ratings are kept as they come: a judge that goes away costs no answer twice.
"""

from __future__ import annotations

from typing import Any

from pocketphi.core import progress
from pocketphi.evals.backends.base import Reply, Scorer
from pocketphi.evals.backends.endpoint import in_order
from pocketphi.evals.config import EvalConfig
from pocketphi.evals.journal import Journal
from pocketphi.evals.judge import LOWEST, Judge
from pocketphi.evals.loading import Loaded
from pocketphi.evals.task import Prompt


def run_task(
    config: EvalConfig, each: Loaded, scorer: Scorer, judge: Judge, journal: Journal
) -> list[dict[str, Any]]:
    """Let the model answer both turns of every question, and the judge rate both. Resumes.

    Raises UserError for a model without a chat template, EngineError when model or judge fail.
    """
    label, answers_label = each.task.label, f"{each.task.label} answers"
    room = min(each.task.max_new_tokens, config.max_new_tokens)
    todo = [p for p in each.items if journal.get(answers_label, p.id) is None]
    with progress.bar(
        f"{label}: answers", len(each.items), unit="questions", done=len(each.items) - len(todo)
    ) as shown:
        for prompt in todo:
            journal.add({"task": answers_label, "id": prompt.id, **_converse(prompt, scorer, room)})
            shown.advance()
    todo = [p for p in each.items if journal.get(label, p.id) is None]

    def judged(prompt: Prompt) -> dict[str, Any]:
        kept = journal.get(answers_label, prompt.id)
        assert kept is not None
        return _rated(label, prompt, kept, judge)

    with progress.bar(
        f"{label}: judge", len(each.items), unit="questions", done=len(each.items) - len(todo)
    ) as shown:
        for record in in_order(judged, todo, judge.config.parallel):
            journal.add(record)
            shown.advance()
    return [journal.records[(label, p.id)] for p in each.items]


def _converse(prompt: Prompt, scorer: Scorer, room: int) -> dict[str, Any]:
    messages: list[dict[str, str]] = []
    replies: list[Reply] = []
    for turn in prompt.meta["turns"]:
        messages.append({"role": "user", "content": turn})
        (reply,) = scorer.complete([list(messages)], chat=True, max_new_tokens=room, stop=())
        replies.append(reply)
        messages.append({"role": "assistant", "content": reply.text})
    return {
        "answers": [r.text for r in replies],
        "ended": "length" if any(r.ended == "length" for r in replies) else "stop",
        "num_tokens": sum(r.num_tokens for r in replies),
        "cut_tokens": sum(r.cut_tokens for r in replies),
    }


def _rated(label: str, prompt: Prompt, kept: dict[str, Any], judge: Judge) -> dict[str, Any]:
    item = {"id": prompt.id, "category": prompt.group, "turns": prompt.meta["turns"]}
    found = [judge.rate(item, kept["answers"], turn) for turn in range(len(prompt.meta["turns"]))]
    ratings = [j.value for j in found]
    return {
        "task": label,
        "id": prompt.id,
        "group": prompt.group,
        "question": "\n\n".join(prompt.meta["turns"])[:1200],
        "turns": list(prompt.meta["turns"]),
        "answers": kept["answers"],
        "ratings": ratings,
        # An unreadable verdict is no success: it counts as the lowest rating.
        "rating": sum(LOWEST if r is None else r for r in ratings) / len(ratings),
        "num_unreadable": sum(r is None for r in ratings),
        "num_judge_replies": sum(j.tries for j in found),
        "judge": {"model": judge.config.judge_model, "served_as": found[0].served_as, "sha256": judge.sha256},
        "judge_texts": [j.text[:2000] for j in found],
        "answer": ", ".join("unreadable" if r is None else f"{r:g}" for r in ratings),
        "text": "\n\n".join(kept["answers"])[:4000],
        **{k: kept[k] for k in ("ended", "num_tokens", "cut_tokens")},
    }
