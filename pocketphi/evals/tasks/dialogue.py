"""MT-bench: eighty questions of two turns, rated by a judge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pocketphi.evals.task import Prompt, Task, register


def _mt_bench(row: Mapping[str, Any], number: int) -> Prompt:
    turns = [str(t) for t in row["turns"]]
    if len(turns) != 2:
        raise ValueError(f"two turns expected, found {len(turns)}")
    return Prompt(str(row["question_id"]), turns[0], "", group=row["category"], meta={"turns": turns})


register(
    Task(
        "mt_bench",
        "conversation",
        1,
        "MT-bench",
        "mt_bench_questions",
        ("question_id", "category", "turns"),
        "lm-sys/FastChat, Apache-2.0",
        hub="lmsys/mt_bench_human_judgments",
        read=_mt_bench,
        metric="rating",
        # The report decodes at temperature 0, where FastChat warms some categories up.
        max_new_tokens=1024,
    )
)
