"""From item records to figures with standard errors.

A record of a choice item holds `logprobs`, `pred`, `pred_norm`, `gold`; the functions here turn a list
of records into flat figures. All means are over items; standard errors are those of a mean of
independent items (sample variance over n), as in lm-evaluation-harness.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pocketphi.evals.backends.base import OptionScore
from pocketphi.evals.task import Question, Task


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error; None for fewer than two values, whose error nobody knows."""
    array = np.asarray(values, dtype=np.float64)
    if len(array) < 2:
        return float(array.mean()), None
    return float(array.mean()), float(array.std(ddof=1) / math.sqrt(len(array)))


def choice_record(
    task: Task,
    question: Question,
    scores: Sequence[OptionScore],
    lengths: Sequence[int],
    tokens: Sequence[int],
) -> dict[str, Any]:
    """Return the record of one item; the log-probabilities are rounded only after the choice is made."""
    logprobs = np.array([s.logprob for s in scores])
    record: dict[str, Any] = {"gold": question.gold}
    if len(scores) == 1:
        # A continuation to be guessed outright (LAMBADA): right when greedy decoding would write it.
        record.update(pred=0 if scores[0].greedy else -1, correct=int(scores[0].greedy))
    else:
        per_length = logprobs / np.maximum(np.asarray(lengths, dtype=np.float64), 1)
        pred, pred_norm = int(logprobs.argmax()), int(per_length.argmax())
        top = np.sort(logprobs)
        record.update(
            pred=pred,
            pred_norm=pred_norm,
            correct=int(pred == question.gold),
            correct_norm=int(pred_norm == question.gold),
            margin=round(float(top[-1] - top[-2]), 6),
        )
        if question.true is not None:
            # Probability of the right answers among all that are offered.
            weights = np.exp(logprobs - logprobs.max())
            record["mc2"] = round(float(weights[list(question.true)].sum() / weights.sum()), 6)
    record["logprobs"] = [round(float(x), 5) for x in logprobs]
    record["num_option_tokens"] = list(tokens)
    return record


def figures(task: Task, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of a task from its records, whatever its kind."""
    if task.kind == "bits":
        return bits_figures(records)
    if task.kind == "conversation":
        return conversation_figures(records)
    return choice_figures(task, records) if task.kind == "choice" else generation_figures(task, records)


def choice_figures(task: Task, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Accuracy, length-normalised accuracy and chance of a choice task."""
    figures: dict[str, Any] = {"n": len(records)}
    figures["accuracy"], figures["accuracy_stderr"] = mean_and_stderr([r["correct"] for r in records])
    if all("correct_norm" in r for r in records):
        if task.format == "cloze":
            figures["accuracy_norm"], figures["accuracy_norm_stderr"] = mean_and_stderr(
                [r["correct_norm"] for r in records]
            )
        figures["chance"] = float(np.mean([1 / len(r["logprobs"]) for r in records]))
        figures["num_ties"] = sum(r["margin"] < 1e-4 for r in records)
    else:
        nats = [-r["logprobs"][0] for r in records]
        figures["chance"] = 0.0
        figures["perplexity"] = math.exp(min(float(np.mean(nats)), 700.0))
    if all("mc2" in r for r in records):
        figures["mc2"], figures["mc2_stderr"] = mean_and_stderr([r["mc2"] for r in records])
        # What equal probabilities would get; 1 / number of options is the chance of MC1 only.
        figures["chance"] = float(np.mean([r["num_true"] / len(r["logprobs"]) for r in records]))
    metric = task.metric if task.metric in figures else "accuracy"
    figures["metric"], figures["value"], figures["stderr"] = (
        metric,
        figures[metric],
        figures[f"{metric}_stderr"],
    )
    groups = sorted({r["group"] for r in records if r.get("group")})
    if len(groups) > 1:
        figures["groups"] = {}
        key = {"accuracy": "correct", "accuracy_norm": "correct_norm"}.get(metric, metric)
        for group in groups:
            value, stderr = mean_and_stderr([r[key] for r in records if r["group"] == group])
            count = sum(r["group"] == group for r in records)
            figures["groups"][group] = {"value": value, "stderr": stderr, "n": count}
        figures["mean_over_groups"] = float(np.mean([g["value"] for g in figures["groups"].values()]))
    return figures


def generation_figures(task: Task, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Share of right answers, and of texts from which no answer could be read."""
    figures: dict[str, Any] = {"n": len(records), "chance": 0.0}
    value, stderr = mean_and_stderr([r["correct"] for r in records])
    figures.update(metric=task.metric, value=value, stderr=stderr)
    figures[task.metric], figures[f"{task.metric}_stderr"] = value, stderr
    figures["share_unreadable"] = float(np.mean([r["answer"] is None for r in records]))
    figures["share_cut_at_limit"] = float(np.mean([r["ended"] == "length" for r in records]))
    groups = sorted({r["group"] for r in records if r.get("group")})
    if len(groups) > 1:
        figures["groups"] = {}
        for group in groups:
            inside = [r["correct"] for r in records if r["group"] == group]
            mean, error = mean_and_stderr(inside)
            figures["groups"][group] = {"value": mean, "stderr": error, "n": len(inside)}
        figures["mean_over_groups"] = float(np.mean([g["value"] for g in figures["groups"].values()]))
    return figures


def conversation_figures(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean rating over questions, each the mean of its turns; unreadable verdicts as the lowest rating."""
    value, stderr = mean_and_stderr([r["rating"] for r in records])
    figures: dict[str, Any] = {"n": len(records), "metric": "rating", "value": value, "stderr": stderr}
    figures["rating"], figures["rating_stderr"] = value, stderr
    verdicts = [x for r in records for x in r["ratings"]]
    readable = [x for x in verdicts if x is not None]
    figures["num_unreadable"] = len(verdicts) - len(readable)
    figures["share_unreadable"] = figures["num_unreadable"] / len(verdicts)
    figures["rating_of_readable"] = float(np.mean(readable)) if readable else None
    for turn in (0, 1):
        rated = [r["ratings"][turn] for r in records if r["ratings"][turn] is not None]
        figures[f"rating_turn_{turn + 1}"] = float(np.mean(rated)) if rated else None
    figures["share_cut_at_limit"] = float(np.mean([r["ended"] == "length" for r in records]))
    groups = sorted({r["group"] for r in records})
    if len(groups) > 1:
        figures["groups"] = {}
        for group in groups:
            inside = [r["rating"] for r in records if r["group"] == group]
            mean, error = mean_and_stderr(inside)
            figures["groups"][group] = {"value": mean, "stderr": error, "n": len(inside)}
    return figures


def bits_figures(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Bits per byte over documents, with the standard error of a ratio of sums.

    Documents are the independent units; tokens inside one are not.
    """
    nll = np.array([r["nll"] for r in records])
    num_bytes = np.array([r["num_bytes"] for r in records], dtype=np.float64)
    tokens = int(sum(r["num_tokens"] for r in records))
    value = float(nll.sum() / num_bytes.sum() / math.log(2))
    stderr = None
    if len(records) > 1:
        n = len(records)
        spread = nll / math.log(2) - value * num_bytes
        stderr = float(math.sqrt(n / (n - 1) * float((spread**2).sum())) / num_bytes.sum())
    return {
        "metric": "bits_per_byte",
        "value": value,
        "stderr": stderr,
        "n": len(records),
        "bits_per_byte": value,
        "bits_per_byte_stderr": stderr,
        "nll_per_token": float(nll.sum() / tokens),
        "num_tokens": tokens,
        "num_bytes": int(num_bytes.sum()),
    }
