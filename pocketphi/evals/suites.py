"""Suites: named lists of tasks, kept as data in suites.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

import yaml

from pocketphi.core.errors import ConfigError, did_you_mean
from pocketphi.evals import harness
from pocketphi.evals.config import EvalConfig
from pocketphi.evals.task import Task, parse_task, split_settings

HELDOUT_TOKENS = 100_000


@dataclass(frozen=True)
class Selection:
    """The tasks to run, and the most items of each.

    limits: of single tasks, by name, where the suite says less than `limit`. heldout_tokens: of each split
    or text, for bits per byte. strict: a task whose data is missing is an error, not a counted skip.
    """

    name: str
    tasks: tuple[Task, ...]
    limit: int | None
    strict: bool
    limits: Mapping[str, int] = field(default_factory=dict)
    heldout_tokens: int = HELDOUT_TOKENS

    def limit_of(self, task: Task) -> int | None:
        """Most items of a task; None takes all."""
        return self.limits.get(task.name, self.limit)


def select(config: EvalConfig) -> Selection:
    """Return the tasks that a configuration asks for. ConfigError names the nearest known suite."""
    limits: Mapping[str, int] = {}
    heldout_tokens = HELDOUT_TOKENS
    if config.tasks:
        tasks, name, limit = config.tasks, "custom", config.limit
    else:
        known = suites()
        if config.suite not in known:
            raise ConfigError(f"unknown suite '{config.suite}'{did_you_mean(config.suite, known)}")
        suite = known[config.suite]
        tasks, name = suite["tasks"], config.suite
        heldout_tokens = suite.get("heldout_tokens", heldout_tokens)
        limit = config.limit
        if limit is None:
            limit, limits = suite.get("limit"), suite.get("limits", {})
    parsed = tuple(found for text in tasks for found in parse(text))
    labels = [t.label for t in parsed]
    twice = next((x for x in labels if labels.count(x) > 1), None)
    if twice is not None:
        raise ConfigError(f"task '{twice}' is named twice")
    return Selection(
        name,
        parsed,
        limit,
        strict=bool(config.tasks),
        limits=limits,
        heldout_tokens=config.max_heldout_tokens or heldout_tokens,
    )


def parse(text: str) -> list[Task]:
    """Read the name of a task of ours, or of lm-eval's: `lm-eval/NAME` may stand for several."""
    name, settings = split_settings(text)
    if name.startswith(harness.PREFIX):
        return harness.parse(name, settings)
    return [parse_task(text)]


@cache
def suites() -> dict[str, Any]:
    raw = resources.files("pocketphi.evals").joinpath("suites.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(raw)
