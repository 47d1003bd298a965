"""Read what a run left behind into plain figures. Whatever is missing is left out, never guessed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pocketphi.core.artifact import Artifact
from pocketphi.core.errors import DataError

_LEARNING_RATE = ("learning_rate", "lr")


def corpus_figures(corpus: Artifact) -> dict[str, Any]:
    """Counts by rule, by phase and by source, and the histogram of the educational score.

    `rejected_by` counts every rule that rejects a document; `rejected_only_by` those documents that
    no other rule would have rejected. Raises DataError when stats.json is not what a corpus writes.
    """
    path = corpus.file("stats.json")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        totals, rules = tree["totals"], tree["rules"]
        kept, rejected = totals.get("documents_kept", 0), totals.get("documents_rejected", 0)
        figures: dict[str, Any] = {
            "documents": kept + rejected,
            "kept": kept,
            "failed": totals.get("documents_failed", 0),
            "phase1": totals.get("documents_phase1", 0),
            "phase2": totals.get("documents_phase2", 0),
            "heldout": totals.get("documents_heldout", 0),
            "rejected_by": dict(
                sorted(
                    ((n, r["rejected"]) for n, r in rules.items() if r["rejected"]),
                    key=lambda item: (-item[1], item[0]),
                )
            ),
            "rejected_only_by": {n: r.get("rejected_alone", 0) for n, r in rules.items()},
            "sources": {
                name: {
                    "documents": s.get("documents_kept", 0) + s.get("documents_rejected", 0),
                    "kept": s.get("documents_kept", 0),
                    "quality": s.get("quality", ""),
                }
                for name, s in tree["sources"].items()
            },
        }
        histogram = tree.get("educational_histogram")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not the statistics of a corpus: {error!r}") from None
    if histogram and sum(histogram["kept"]) + sum(histogram["rejected"]):
        figures["educational"] = _trimmed(histogram)
    return figures


def _trimmed(histogram: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """Cut empty bins at both ends, so that the picture shows where documents are."""
    filled = [i for i, (k, r) in enumerate(zip(histogram["kept"], histogram["rejected"])) if k or r]
    first, last = filled[0], filled[-1] + 1
    return {
        "edges": histogram["edges"][first : last + 1],
        "kept": histogram["kept"][first:last],
        "rejected": histogram["rejected"][first:last],
    }


def parts(corpus: Artifact) -> Iterator[tuple[Path, Path]]:
    """Yield the (documents, verdicts) files part by part. DataError when one has no counterpart."""
    names = sorted(
        n for n in corpus.manifest["files"] if n.startswith("documents/") and n.endswith(".parquet")
    )
    for name in names:
        yield corpus.file(name), corpus.file("verdicts/" + name.partition("/")[2])


def train_figures(checkpoint: Artifact) -> dict[str, Any] | None:
    """The curves of a training stage: tokens, loss, learning rate and phase per logged step."""
    names = checkpoint.manifest["files"]
    if "metrics.jsonl" not in names:
        return None
    rows = list(json_lines(checkpoint.file("metrics.jsonl")))
    steps = [r for r in rows if isinstance(r.get("loss"), (int, float))]
    if not steps:
        return None
    rate_key = next((k for k in _LEARNING_RATE if k in steps[0]), None)
    figures: dict[str, Any] = {
        "step": [r.get("step", i) for i, r in enumerate(steps)],
        "tokens": [r.get("tokens", r.get("step", i)) for i, r in enumerate(steps)],
        "loss": [float(r["loss"]) for r in steps],
        "phase": [str(r.get("phase", "train")) for r in steps],
    }
    if rate_key is not None:
        figures["learning_rate"] = [float(r[rate_key]) for r in steps]
    checks = []
    for row in rows:
        for name, measured in (row.get("heldout") or {}).items():
            if isinstance(measured, Mapping) and isinstance(measured.get("nll_per_token"), (int, float)):
                checks.append({"tokens": row["tokens"], "name": name, "value": measured["nll_per_token"]})
    if checks:
        figures["checks"] = checks
    return figures


def speed_figures(stage: str, events: Iterable[dict[str, Any]]) -> dict[str, list[float]] | None:
    """Tokens per second over one training stage, from the run's log.

    A stage that was killed and continued shows what its last attempt measured where attempts overlap.
    """
    rows: list[dict[str, Any]] = []
    inside = False
    for event in events:
        if event.get("event") == "stage_start":
            inside = Path(str(event.get("path"))).name == stage
        elif inside and event.get("event") == "train_step" and "tokens_per_s" in event:
            while rows and rows[-1]["tokens"] >= event["tokens"]:
                rows.pop()
            rows.append(event)
    if not rows:
        return None
    return {
        "tokens": [float(r["tokens"]) for r in rows],
        "tokens_per_s": [float(r["tokens_per_s"]) for r in rows],
    }


def eval_figures(found: Artifact) -> dict[str, Any]:
    """results.json of an evaluation."""
    return json.loads(found.file("results.json").read_text(encoding="utf-8"))


def forecast_figures(run_dir: Path, artifacts: Mapping[str, Artifact]) -> list[dict[str, Any]]:
    """Per stage the forecast and the actual: seconds, bytes of memory, bytes on disk."""
    try:
        forecast = json.loads((run_dir / "forecast.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        forecast = {}
    if not isinstance(forecast, dict):
        forecast = {}
    rows = []
    for name, found in artifacts.items():
        guess = forecast.get(name)
        guess = guess if isinstance(guess, dict) else {}
        rows.append(
            {
                "stage": name,
                "forecast_s": guess.get("wall_s"),
                "actual_s": found.manifest["timings"].get("wall_s"),
                "forecast_memory_bytes": guess.get("peak_memory_bytes"),
                "actual_memory_bytes": found.manifest["timings"].get("peak_memory_bytes"),
                "forecast_disk_bytes": guess.get("disk_bytes"),
                "actual_disk_bytes": sum(f["bytes"] for f in found.manifest["files"].values()),
            }
        )
    return rows


def run_events(run_dir: Path) -> list[dict[str, Any]]:
    """The run's log; lines cut by a kill are passed over."""
    path = run_dir / "log.jsonl"
    return list(json_lines(path)) if path.is_file() else []


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                try:
                    row = json.loads(line)
                except ValueError:
                    continue
                if isinstance(row, dict):
                    yield row
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
