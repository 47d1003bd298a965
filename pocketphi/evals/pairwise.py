"""Two models' MT-bench answers against each other: a judge sees every pair in both orders.

A win counts only when the judge holds to it with the two swapped; a verdict that turns with the order is
a tie by position and is counted as such (Zheng et al., section 3.4). Pairs with an unreadable verdict are
left out of the rate and counted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pocketphi.core import artifact, progress
from pocketphi.core.artifact import Artifact
from pocketphi.core.errors import DataError
from pocketphi.evals import judge as judges
from pocketphi.evals import paired
from pocketphi.evals.backends.endpoint import in_order
from pocketphi.evals.journal import Journal
from pocketphi.evals.judge import Judge, JudgeConfig

TASK = "mt_bench"
_JOURNAL = "verdicts.partial.jsonl"


def run(
    config: JudgeConfig, inputs: Mapping[str, Artifact | Path | str], *, out: Path | None = None
) -> Artifact:
    """Judge the MT-bench answers of the `eval` artifacts `a` and `b`; return the `pairwise` artifact.

    Files: pairwise.json (counts and the rate at which B wins) and verdicts.jsonl (one line per question
    and turn, with both replies). Resumable. DataError when the two did not answer the same questions.
    """
    sides = [artifact.load(inputs[name], kind="eval") for name in ("a", "b")]
    judge = judges.load(config)
    answers = [_answers(s) for s in sides]
    if answers[0].keys() != answers[1].keys():
        both = len(answers[0].keys() & answers[1].keys())
        raise DataError(
            f"the two answered other questions ({len(answers[0])} and {len(answers[1])}, {both} in common)"
        )
    out = out or artifact.default_path("pairwise", config, sides)
    if done := artifact.reuse(out, kind="pairwise", config=config, parents=sides):
        return done
    with artifact.create(out, kind="pairwise", config=config, parents=sides, resumable=True) as draft:
        journal = Journal(draft.path / _JOURNAL)
        todo = [(i, t) for i in answers[0] for t in (0, 1) if journal.get(TASK, f"{i}/{t + 1}") is None]
        count = 2 * len(answers[0])
        try:
            with progress.bar("pairs", count, unit="verdicts", done=count - len(todo)) as shown:
                for record in in_order(
                    lambda x: _pair(judge, answers[0][x[0]], answers[1][x[0]], x[1]), todo, config.parallel
                ):
                    journal.add(record)
                    shown.advance()
        finally:
            journal.close()
        records = [journal.records[(TASK, f"{i}/{t + 1}")] for i in answers[0] for t in (0, 1)]
        tree = {**figures(records), **judge.identity(records)}
        (draft.path / "pairwise.json").write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
        with open(draft.path / "verdicts.jsonl", "w", encoding="utf-8", errors="replace") as file:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        (draft.path / _JOURNAL).unlink()
        draft.counts.update({k: v for k, v in tree.items() if isinstance(v, int)})
    return draft.artifact


def read(found: Artifact) -> dict[str, Any]:
    """The figures of a `pairwise` artifact."""
    return json.loads(found.file("pairwise.json").read_text(encoding="utf-8"))


def figures(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Count verdicts; the win rate of B (ties half) with a bootstrap interval over questions."""
    counts = {
        f"num_{w}": sum(r["winner"] == w for r in records)
        for w in ("a", "b", "tie", "tie_by_position", "unreadable")
    }
    by_question: dict[str, list[float]] = {}
    for r in records:
        if r["winner"] != "unreadable":
            by_question.setdefault(r["question_id"], []).append({"a": 0.0, "b": 1.0}.get(r["winner"], 0.5))
    found: dict[str, Any] = {
        "num_verdicts": len(records),
        **counts,
        "share_unreadable": counts["num_unreadable"] / len(records) if records else 0.0,
        "win_rate_b": None,
        "low": None,
        "high": None,
    }
    if by_question:
        sums, sizes = zip(*((sum(v), len(v)) for v in by_question.values()))
        rate = paired.difference([0.0] * len(sums), sums, sizes)
        found.update(win_rate_b=rate.value, low=rate.low, high=rate.high)
    return found


def winner(first: str | None, swapped: str | None) -> str:
    """What two verdicts say together; `first` was given with A shown first, `swapped` with B first."""
    if first is None or swapped is None:
        return "unreadable"
    one = {"A": "a", "B": "b", "C": "tie"}[first]
    other = {"A": "b", "B": "a", "C": "tie"}[swapped]
    if one == other:
        return one
    # The same place twice is a judge's habit; a win beside a tie is a tie.
    return "tie" if "tie" in (one, other) else "tie_by_position"


def _pair(judge: Judge, a: Mapping[str, Any], b: Mapping[str, Any], turn: int) -> dict[str, Any]:
    item = {"id": a["id"], "category": a["group"], "turns": a["turns"]}
    straight = judge.prefer(item, a["answers"], b["answers"], turn)
    swapped = judge.prefer(item, b["answers"], a["answers"], turn)
    return {
        "task": TASK,
        "id": f"{a['id']}/{turn + 1}",
        "question_id": a["id"],
        "group": a["group"],
        "winner": winner(straight.value, swapped.value),
        "verdict_a_first": straight.value,
        "verdict_b_first": swapped.value,
        "num_judge_replies": straight.tries + swapped.tries,
        "judge": {"model": judge.config.judge_model, "served_as": straight.served_as, "sha256": judge.sha256},
        "judge_texts": [straight.text[:2000], swapped.text[:2000]],
    }


def _answers(found: Artifact) -> dict[str, dict[str, Any]]:
    kept = {}
    with open(found.file("items.jsonl"), encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            if record["task"] == TASK:
                kept[record["id"]] = record
    if not kept:
        raise DataError(f"{found.path}: holds no MT-bench answers", hint="phi eval run MODEL -t mt_bench ...")
    return kept
