"""Suites: named lists of tasks, kept as data in suites.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

from pocketphi.core.errors import ConfigError, did_you_mean
from pocketphi.evals.config import EvalConfig
from pocketphi.evals.task import Task, parse_task


@dataclass(frozen=True)
class Selection:
    """The tasks to run. `strict`: a task whose data is missing is an error, not a counted skip."""

    name: str
    tasks: tuple[Task, ...]
    limit: int | None
    strict: bool


def select(config: EvalConfig) -> Selection:
    """Return the tasks that a configuration asks for. ConfigError names the nearest known suite."""
    if config.tasks:
        tasks, name, limit = config.tasks, "custom", config.limit
    else:
        known = suites()
        if config.suite not in known:
            raise ConfigError(f"unknown suite '{config.suite}'{did_you_mean(config.suite, known)}")
        suite = known[config.suite]
        tasks, name = suite["tasks"], config.suite
        limit = config.limit if config.limit is not None else suite.get("limit")
    parsed = tuple(parse_task(t) for t in tasks)
    labels = [t.label for t in parsed]
    twice = next((x for x in labels if labels.count(x) > 1), None)
    if twice is not None:
        raise ConfigError(f"task '{twice}' is named twice")
    return Selection(name, parsed, limit, strict=bool(config.tasks))


@cache
def suites() -> dict[str, Any]:
    raw = resources.files("pocketphi.evals").joinpath("suites.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(raw)
