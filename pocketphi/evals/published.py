"""Scores that others published, shown beside ours with their source and never subtracted from them.

The numbers are data (data/published.yaml). A column belongs to a protocol: where the number of shots or
the form is not ours, the cell says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

from pocketphi.core.errors import UserError, did_you_mean

# Shown by default: the models of the report's claim, and the small model most people can run.
DEFAULT = (
    "phi-3-mini",
    "phi-3-small",
    "phi-3-medium",
    "Mixtral 8x7B",
    "GPT-3.5-1106",
    "SmolLM2-135M-Instruct",
)


@dataclass(frozen=True)
class Cell:
    """A published score, in percent (MT-bench: 1 to 10), and what sets its protocol apart from ours.

    over: the published number is the mean over these of our tasks, not this one alone.
    """

    model: str
    score: float
    source: str
    remark: str = ""
    over: tuple[str, ...] = ()


@cache
def tree() -> dict[str, Any]:
    """The data file, parsed."""
    raw = resources.files("pocketphi.evals").joinpath("data/published.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(raw)


def models() -> list[str]:
    return [c["model"] for c in tree()["columns"]]


def cells(entry: Mapping[str, Any], wanted: Sequence[str] = DEFAULT) -> list[Cell]:
    """Return what the named models score on the task of an entry of results.json.

    UserError for a model without a column.
    """
    data = tree()
    unknown = [m for m in wanted if m not in models()]
    if unknown:
        raise UserError(f"no published scores of '{unknown[0]}'{did_you_mean(unknown[0], models())}")
    found = []
    for column in data["columns"]:
        if column["model"] not in wanted:
            continue
        name, over = entry["name"], ()
        if name not in column["tasks"]:
            # "anli" stands for three of our tasks, "arc" for two.
            name = next(
                (m for m, parts in data["means"].items() if name in parts and m in column["tasks"]), ""
            )
            over = tuple(data["means"].get(name, ()))
        if not name:
            continue
        shots = data["shots"][column["source"]].get(name)
        remarks = []
        if over:
            remarks.append(f"mean of {', '.join(over)}")
        if shots is not None and shots != entry.get("shots"):
            remarks.append(f"{shots}-shot")
        if name == "mt_bench" and not entry.get("comparable_with_published"):
            remarks.append("another judge: not comparable")
        if column["source"] == "smollm2-card" and name == "mmlu" and entry.get("format") != "cloze":
            remarks.append("cloze form")
        found.append(Cell(column["model"], column["tasks"][name], column["source"], ", ".join(remarks), over))
    return found


def table(entries: Sequence[Mapping[str, Any]], wanted: Sequence[str] = DEFAULT) -> str:
    """Ours beside the published ones as text; "" when none of the tasks was published by anyone."""
    rows = [(e, {c.model: c for c in cells(e, wanted)}) for e in entries]
    rows = [(e, found) for e, found in rows if found]
    if not rows:
        return ""
    shown = [m for m in wanted if any(m in found for _, found in rows)]
    width = {m: max(8, len(m)) for m in shown}
    head = f"{'task (percent)':<34} {'ours':>7}  " + "  ".join(f"{m:>{width[m]}}" for m in shown)
    lines = [head]
    remarks: dict[str, int] = {}
    for entry, found in rows:
        ours = entry["value"] if entry["metric"] == "rating" else 100 * entry["value"]
        parts = []
        for model in shown:
            cell = found.get(model)
            if cell is None:
                parts.append(f"{'-':>{width[model]}}")
                continue
            mark = ""
            if cell.remark:
                number = remarks.setdefault(cell.remark, len(remarks) + 1)
                mark = f"[{number}]"
            text = f"{cell.score:g}{mark}"
            parts.append(f"{text:>{width[model]}}")
        lines.append(f"{entry['task']:<34} {ours:>7.2f}  " + "  ".join(parts))
    lines += [f"[{number}] {remark}" for remark, number in remarks.items()]
    used = {c.source for _, found in rows for c in found.values()}
    lines += [f"{name}: {s['cite']}; {s['about']}" for name, s in tree()["sources"].items() if name in used]
    lines.append("published with other software and prompts: for orientation, not for subtraction")
    return "\n".join(lines)
