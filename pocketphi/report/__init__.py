"""The report of a run: one offline HTML page, with plots, answers and where they come from.

    from pocketphi import report
    report.run(report.ReportConfig(), {"corpus": ..., "train": ..., "eval": ...})

The page needs no network, no script and no other file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pocketphi.report.config import ReportConfig

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from pocketphi.core.artifact import Artifact

__all__ = ["ReportConfig", "inputs_of", "plan", "run"]


def run(
    config: ReportConfig, inputs: Mapping[str, Artifact | Path | str], *, out: Path | None = None
) -> Artifact:
    """Draw the page; return the `report` artifact (index.html, figures.json). See `report.stage.run`."""
    from pocketphi.report import stage

    return stage.run(config, inputs, out=out)


def inputs_of(folder: Path) -> dict[str, Artifact]:
    """Find the artifacts of a run's folder. See `report.stage.inputs_of`."""
    from pocketphi.report import stage

    return stage.inputs_of(folder)


def plan(config: ReportConfig, inputs_plan: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Forecast of drawing the page: small, and mostly the sample answers."""
    answered = len(config.prompts) * config.max_new_tokens
    return {
        "wall_s": round(6 + 0.01 * answered, 1),
        "peak_memory_bytes": 500_000_000,
        "disk_bytes": 2_000_000,
    }
