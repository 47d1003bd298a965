"""What several verbs share: options, building a configuration, printing figures."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from pocketphi.core import config as configuration

T = TypeVar("T")

RecipeOption = Annotated[
    Path | None, typer.Option("--recipe", "-r", help="Recipe file whose section configures this stage.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override one setting; repeatable."),
]
OutOption = Annotated[
    Path | None, typer.Option("--out", "-o", help="Folder to write; default runs/<stage>-<fingerprint>.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print figures as JSON on stdout.")]


def stage_config(cls: type[T], section: str, recipe: Path | None, settings: list[str] | None) -> T:
    """Build a stage's configuration: defaults, then the recipe's section, then `--set` (keys of the section)."""
    tree: dict[str, Any] = {}
    where = section
    if recipe is not None:
        tree = configuration.load_yaml(recipe).get(section) or {}
        where = f"{recipe}: {section}"
    tree = configuration.override(tree, settings or [])
    return configuration.parse(cls, tree, where=where)


def print_json(figures: Any) -> None:
    """Print one JSON value on stdout."""
    print(json.dumps(figures, indent=1, ensure_ascii=False, default=str))


def print_figures(figures: Mapping[str, Any], *, as_json: bool) -> None:
    """Print flat figures: JSON for programs, aligned lines for people."""
    if as_json:
        print_json(dict(figures))
        return
    width = max((len(k) for k in figures), default=0)
    for key, value in figures.items():
        shown = f"{value:.6g}" if isinstance(value, float) else value
        print(f"{key:<{width}}  {shown}", file=sys.stdout)
