"""Comparing two evaluations: paired differences with intervals, and the items on which they differ.

    from pocketphi.evals import compare
    found = compare.run(compare.CompareConfig(), {"a": "runs/eval-1", "b": "runs/eval-2"})

Writes comparison.json (one entry per task, refused ones with their reasons), differing.jsonl (every
item that the two answered differently) and index.html (an offline page).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pocketphi.core import artifact, progress
from pocketphi.core.artifact import Artifact
from pocketphi.core.errors import ConfigError, DataError
from pocketphi.evals import comparability, compare_page, paired, tables

COMPARISON_SCHEMA = 1
# Which column of an item's record a task's metric is the mean of.
_COLUMNS = {
    "accuracy": "correct",
    "accuracy_norm": "correct_norm",
    "pass_at_1": "correct",
    "recall": "correct",
}


@dataclass
class CompareConfig:
    """How two evaluations are compared.

    resamples: draws of the paired bootstrap. confidence: of the intervals. seed: of the draws.
    max_items_shown: most items per task on the page; differing.jsonl holds all of them.
    """

    resamples: int = 10_000
    confidence: float = 0.95
    seed: int = 0
    max_items_shown: int = 40

    def __post_init__(self) -> None:
        if self.resamples < 100:
            raise ConfigError(f"resamples must be at least 100, found {self.resamples}")
        if not 0.5 <= self.confidence < 1:
            raise ConfigError(f"confidence must be in 0.5..1, found {self.confidence}")
        if self.max_items_shown < 0:
            raise ConfigError(f"max_items_shown cannot be negative, found {self.max_items_shown}")


def run(
    config: CompareConfig, inputs: Mapping[str, Artifact | Path | str], *, out: Path | None = None
) -> Artifact:
    """Compare the `eval` artifacts `inputs["a"]` and `inputs["b"]`; return the `comparison` artifact.

    DataError when no task of the two may be subtracted, with the reasons; when some may, the others
    are listed as refused.
    """
    sides = []
    for name in ("a", "b"):
        if name not in inputs:
            raise DataError(f"nothing to compare: inputs hold no '{name}'")
        sides.append(artifact.load(inputs[name], kind="eval"))
    if sides[0].checksum == sides[1].checksum:
        progress.say("the two evaluations are the same one, to the byte")
    out = out or artifact.default_path("comparison", config, sides)
    if done := artifact.reuse(out, kind="comparison", config=config, parents=sides):
        return done
    tree, differing = compare(config, *sides)
    if not tree["compared"]:
        why = "; ".join(f"{r['task']}: {', '.join(r['reasons'])}" for r in tree["refused"])
        raise DataError(
            f"nothing can be subtracted: {why or 'the two have no task in common'}",
            hint="score both with the same tasks, settings and data",
        )
    with artifact.create(out, kind="comparison", config=config, parents=sides) as draft:
        text = json.dumps(tree, indent=1, ensure_ascii=False) + "\n"
        (draft.path / "comparison.json").write_text(text, encoding="utf-8", errors="replace")
        with open(draft.path / "differing.jsonl", "w", encoding="utf-8", errors="replace") as file:
            for row in differing:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        page = compare_page.render(tree, differing, config.max_items_shown)
        (draft.path / "index.html").write_text(page, encoding="utf-8", errors="replace")
        draft.counts.update(
            num_compared=len(tree["compared"]),
            num_refused=len(tree["refused"]),
            num_items_differing=len(differing),
        )
    return draft.artifact


def compare(config: CompareConfig, a: Artifact, b: Artifact) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the comparison as one tree, and the differing items."""
    results = [tables.results(a), tables.results(b)]
    entries = [{e["task"]: e for e in r["tasks"]} for r in results]
    records = [_records(a), _records(b)]
    sides = [r["identity"] for r in results]
    compared, refused, differing = [], [], []
    for label in dict.fromkeys([*entries[0], *entries[1]]):
        if label not in entries[0] or label not in entries[1]:
            refused.append({"task": label, "reasons": [_only_in_one(label, entries)]})
            continue
        pair = [e[label] for e in entries]
        items = [r.get(label, {}) for r in records]
        ruling = comparability.rule(*pair, *sides, *items)
        if ruling.refusals:
            refused.append({"task": label, "reasons": ruling.refusals})
            continue
        compared.append(_difference(config, label, pair, items, ruling.notes))
        differing += _differing(label, *items)
    for row, p_value in zip(
        [c for c in compared if c["p_value"] is not None],
        paired.holm([c["p_value"] for c in compared if c["p_value"] is not None]),
    ):
        row["p_value_adjusted"] = round(p_value, 6)
    tree = {
        "schema": COMPARISON_SCHEMA,
        "a": _about(a, results[0]),
        "b": _about(b, results[1]),
        "confidence": config.confidence,
        "resamples": config.resamples,
        "compared": compared,
        "refused": refused,
    }
    return tree, differing


def flat(found: Artifact) -> list[dict[str, Any]]:
    """One flat object per task, refused ones with their reasons."""
    tree = json.loads(found.file("comparison.json").read_text(encoding="utf-8"))
    rows = [{**c, "comparable": True, "notes": "; ".join(c["notes"])} for c in tree["compared"]]
    return rows + [
        {"task": r["task"], "comparable": False, "reasons": "; ".join(r["reasons"])} for r in tree["refused"]
    ]


def text(found: Artifact) -> str:
    """The table that `phi eval compare` prints: B minus A."""
    tree = json.loads(found.file("comparison.json").read_text(encoding="utf-8"))
    percent = f"{100 * tree['confidence']:g}%"
    lines = [
        f"A  {tree['a']['model']}  {tree['a']['checksum'][:12]}",
        f"B  {tree['b']['model']}  {tree['b']['checksum'][:12]}",
        "",
        f"{'task':<30} {'metric':<13} {'A':>8} {'B':>8} {'B - A':>8}  {percent + ' interval':<20} {'p':>7} {'n':>6}",
    ]
    common = compare_page.common_notes(tree["compared"])
    for row in tree["compared"]:
        interval = "-" if row["low"] is None else f"{row['low']:+.4f} .. {row['high']:+.4f}"
        p_value = "-" if row["p_value"] is None else f"{row['p_value']:.3f}"
        lines.append(
            f"{row['task']:<30} {row['metric']:<13} {row['a']:>8.4f} {row['b']:>8.4f} {row['difference']:>+8.4f}"
            f"  {interval:<20} {p_value:>7} {row['n']:>6}"
        )
        lines += [f"{'':<30} {note}" for note in row["notes"] if note not in common]
    lines += [f"all tasks: {note}" for note in common]
    lines += [f"not subtracted: {r['task']}: {'; '.join(r['reasons'])}" for r in tree["refused"]]
    return "\n".join(lines)


def _records(found: Artifact) -> dict[str, dict[str, dict[str, Any]]]:
    """Records by task and item id."""
    by_task: dict[str, dict[str, dict[str, Any]]] = {}
    with open(found.file("items.jsonl"), encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            by_task.setdefault(record["task"], {})[record["id"]] = record
    return by_task


def _about(found: Artifact, results: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model": results["model"],
        "suite": results["suite"],
        "checksum": found.checksum,
        "identity": results["identity"],
    }


def _only_in_one(label: str, entries: list[dict[str, Any]]) -> str:
    here, there = ("A", "B") if label in entries[0] else ("B", "A")
    mine, other = (entries[0], entries[1]) if here == "A" else (entries[1], entries[0])
    near = [x for x, e in other.items() if e["name"] == mine[label]["name"]]
    more = f" ({there} has {', '.join(near)}: another protocol)" if near else ""
    return f"scored only in {here}{more}"


def _difference(
    config: CompareConfig,
    label: str,
    pair: list[dict[str, Any]],
    items: list[dict[str, dict[str, Any]]],
    notes: list[str],
) -> dict[str, Any]:
    metric = pair[0]["metric"]
    ids = list(items[0])
    weights = None
    if pair[0]["kind"] == "harness":
        values = [[items[s][i]["value"] for i in ids] for s in (0, 1)]
        weights = [items[0][i]["weight"] for i in ids] if "weight" in items[0][ids[0]] else None
    elif pair[0]["kind"] == "bits":
        values = [[items[s][i]["nll"] / math.log(2) for i in ids] for s in (0, 1)]
        weights = [items[0][i]["num_bytes"] for i in ids]
    else:
        column = _COLUMNS.get(metric, metric)
        values = [[float(items[s][i][column]) for i in ids] for s in (0, 1)]
    found = paired.difference(
        values[0],
        values[1],
        weights,
        resamples=config.resamples,
        confidence=config.confidence,
        seed=config.seed,
    )
    row = {
        "task": label,
        "title": pair[0]["title"],
        "metric": metric,
        "lower_is_better": metric == "bits_per_byte" or pair[0].get("higher_is_better") is False,
        "a": pair[0]["value"],
        "b": pair[1]["value"],
        "a_stderr": pair[0]["stderr"],
        "b_stderr": pair[1]["stderr"],
        "chance": pair[0].get("chance"),
        "difference": found.value,
        **{k: v for k, v in asdict(found).items() if k != "value"},
        "notes": list(notes),
    }
    if weights is not None and any(n.startswith("tokenizers differ") for n in notes):
        row["notes"].append("nll_per_token is left out")
    # Both are computed from the same items; a gap would mean that records and figures went apart.
    if abs((pair[1]["value"] - pair[0]["value"]) - found.value) > 1e-4:
        raise DataError(
            f"{label}: the items' difference is {found.value:.6f}, that of the figures is another"
        )
    return {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}


def _differing(
    label: str, items_a: Mapping[str, Mapping[str, Any]], items_b: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Items that the two answered differently: those with another verdict first."""
    rows = []
    for id_, a in items_a.items():
        b = items_b[id_]
        answers = [_answer(r) for r in (a, b)]
        scores = [_score(r) for r in (a, b)]
        if answers[0] == answers[1] and scores[0] == scores[1]:
            continue
        if scores[0] is None:
            continue
        rows.append(
            {
                "task": label,
                "id": id_,
                "group": a.get("group", ""),
                "question": a.get("question", ""),
                "options": a.get("options", []),
                "right": _right(a),
                "a": answers[0],
                "b": answers[1],
                "a_score": scores[0],
                "b_score": scores[1],
                "a_text": str(a.get("text", ""))[:1500],
                "b_text": str(b.get("text", ""))[:1500],
            }
        )
    rows.sort(key=lambda r: -abs(r["b_score"] - r["a_score"]))
    return rows


def _answer(record: Mapping[str, Any]) -> str | None:
    """What a model chose or wrote, in words."""
    if "nll" in record:
        return None
    if "pred" in record:
        # With the length-normalised choice where the two kinds of choice disagree.
        index = record.get("pred_norm", record["pred"])
        options = record.get("options") or []
        return options[index] if 0 <= index < len(options) else "another word"
    answer = record.get("answer")
    return None if answer is None else str(answer)


def _score(record: Mapping[str, Any]) -> float | None:
    for key in ("rating", "correct_norm", "correct", "value"):
        if key in record:
            return float(record[key])
    return None


def _right(record: Mapping[str, Any]) -> str:
    if "gold" in record and record.get("options"):
        return str(record["options"][record["gold"]])
    return str(record.get("target", ""))
