"""Evaluation: what a model scores, on the file that ships, with everything the score depends on.

    from pocketphi import evals
    result = evals.run(evals.EvalConfig(suite="quick"), {"model": "model.gguf"})

A score carries task version, prompt version, tokenizer and template hashes, the start-token rule, the
engine and the file's hash, n and its standard error; every item's record is kept. Two results that
differ in nothing but the model can be compared, others are refused (`pocketphi.evals.compare`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pocketphi.evals.config import EvalConfig

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from pocketphi.core.artifact import Artifact

__all__ = ["EvalConfig", "plan", "run"]


def run(
    config: EvalConfig, inputs: Mapping[str, Artifact | Path | str], *, out: Path | None = None
) -> Artifact:
    """Score `inputs["model"]` and return the `eval` artifact (results.json, items.jsonl).

    See `pocketphi.evals.stage.run`.
    """
    from pocketphi.evals import stage

    return stage.run(config, inputs, out=out)


def plan(config: EvalConfig, inputs_plan: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Forecast tokens and time of an evaluation. See `pocketphi.evals.forecast.plan`."""
    from pocketphi.evals import forecast

    return forecast.plan(config, inputs_plan or {})
