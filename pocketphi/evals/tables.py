"""Results as text and as flat JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pocketphi.core.artifact import Artifact
from pocketphi.core.errors import DataError
from pocketphi.evals import published
from pocketphi.evals.task import TASKS


def results(found: Artifact) -> dict[str, Any]:
    """Read results.json. DataError when its schema is newer than this version reads."""
    tree = json.loads(found.file("results.json").read_text(encoding="utf-8"))
    if tree.get("schema", 0) > 1:
        raise DataError(f"{found.path}: written by a newer version", hint="upgrade pocketphi")
    return tree


def flat(found: Artifact) -> list[dict[str, Any]]:
    """One flat object per task, each with what its score depends on."""
    tree = results(found)
    rows = []
    for entry in tree["tasks"]:
        row = {k: v for k, v in entry.items() if k not in ("groups", "metrics", "versions")}
        for cell in published.cells(entry, published.models()):
            row[f"published.{cell.model}"] = cell.score
        for group, figures in entry.get("groups", {}).items():
            row[f"group.{group}"] = figures["value"]
        for name, figures in entry.get("metrics", {}).items():
            row[f"metric.{name}"] = figures["value"]
        rows.append({**row, **{f"model.{k}": v for k, v in tree["identity"].items()}})
    return rows


def text(found: Artifact) -> str:
    """The table that `phi eval run` prints."""
    tree = results(found)
    width = _width(tree["tasks"])
    lines = [f"{'task':<{width}} {'metric':<14} {'value':>8} {'± stderr':>9} {'chance':>7} {'n':>6}"]
    for entry in tree["tasks"]:
        error = f"{entry['stderr']:.4f}" if entry["stderr"] is not None else "-"
        chance = f"{entry['chance']:.3f}" if entry.get("chance") else "-"
        lines.append(
            f"{entry['task']:<{width}} {entry['metric']:<14} {entry['value']:>8.4f} {error:>9} {chance:>7} {entry['n']:>6}"
        )
        lines += _other_metrics(entry, width)
        if entry["kind"] == "conversation":
            lines.append(f"{'':<{width}} {judge_words(entry)}")
        if entry.get("contaminated_share") is not None:
            lines.append(f"{'':<{width}} {contamination_words(entry)}")
    checked = tree.get("contamination") or {}
    if not checked.get("checked"):
        lines.append(
            f"items not checked against the training text: {checked.get('reason', 'older evaluation')}"
        )
    lines += [f"not scored: {s['task']}: {s['reason']}" for s in tree["skipped"]]
    side = tree["identity"]
    lines.append(f"\n{tree['model']}  {side['engine']}  start token {side['start_token']}")
    beside = published.table(tree["tasks"])
    if beside:
        lines += ["", beside]
    return "\n".join(lines)


def _other_metrics(entry: Mapping[str, Any], width: int) -> list[str]:
    """lm-eval's further figures of a task, a line each."""
    lines = []
    for key, figures in entry.get("metrics", {}).items():
        name, _, by = key.partition(",")
        words = name if by == "none" else f"{name} ({by})"
        if (name, by) == (entry["metric"], entry["filter"]):
            if by != "none":
                lines.append(f"{'':<{width}} the value above is {words}")
            continue
        error = "-" if figures["stderr"] is None else f"{figures['stderr']:.4f}"
        lines.append(f"{'':<{width}} {words}: {figures['value']:.4f} ± {error}")
    return lines


def _width(rows: Sequence[Mapping[str, Any]]) -> int:
    """Of the column of tasks."""
    return max([34, *(len(r["task"]) for r in rows)])


def planned(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table that `phi eval plan` prints, one line per task."""
    heads = ("items", "read", "shared", "written", "h here", "h H100")
    keys = ("items", "tokens_read", "tokens_saved_by_sharing", "tokens_written", "cpu_hours", "h100_hours")
    width = _width(rows)
    lines = [f"{'task':<{width}}" + "".join(f"{head:>12}" for head in heads)]
    for row in rows:
        cells = (f"{row[k]:12.4f}" if k.endswith("_hours") else f"{row[k]:12,}" for k in keys)
        lines.append(f"{row['task']:<{width}}" + "".join(cells))
    lines += [f"not counted: {r['task']}: {r['reason']}" for r in rows if r["reason"]]
    return "\n".join(lines)


def contamination_words(entry: Mapping[str, Any]) -> str:
    """The share of a task's items that the training text holds, in words."""
    if not entry["num_judged_for_contamination"]:
        return "no item is long enough to be looked for in the corpus"
    words = (
        f"{100 * entry['contaminated_share']:.1f}% of {entry['num_judged_for_contamination']} items "
        "occur in the corpus"
    )
    if entry.get("value_unseen") is not None:
        words += f"; without them {entry['value_unseen']:.4f}"
    return words


def judge_words(entry: Mapping[str, Any]) -> str:
    """Who judged, what could not be read, and whether the score may stand beside published ones."""
    words = f"judge {entry['judge_model']}; {entry['num_unreadable']} of {2 * entry['n']} verdicts unreadable"
    if entry["num_unreadable"]:
        words += " (counted as 1)"
    if not entry["comparable_with_published"]:
        words += "; not comparable with published MT-bench scores"
    return words


def known_tasks() -> list[dict[str, Any]]:
    """Name, kind, title, version, source and corresponding lm-eval task of every task."""
    from pocketphi.evals import tasks as _tasks  # noqa: F401  (fills the registry)

    return [
        {
            "task": task.name,
            "kind": task.kind,
            "title": task.title,
            "version": task.version,
            "file": task.file,
            "source": task.source,
            "hub": task.hub,
            "lm_eval": task.lm_eval,
        }
        for _, task in TASKS.items()
    ]


def judge_settings(address: str) -> list[str]:
    """`--set` assignments of a judge given as http://host:port/v1#model-name."""
    place, _, model = address.partition("#")
    return [f"judge_url={json.dumps(place)}", f"judge_model={json.dumps(model)}"]


def yaml_list(values: list[str]) -> str:
    """A YAML flow list of strings, for `--set`."""
    return json.dumps(values)


def yaml_text(value: Path) -> str:
    return json.dumps(str(value))
