"""`phi recipe run|plan|show`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pocketphi.cli.common import JsonOption, OutOption, SetOption, print_json

app = typer.Typer(
    add_completion=False, help="Run, plan or show a whole recipe, from pages to chat.", no_args_is_help=True
)
RecipeFile = Annotated[Path, typer.Argument(help="The recipe, for example recipes/nano.yaml.")]


@app.command("run")
def run_command(
    recipe: RecipeFile, set_: SetOption = None, out: OutOption = None, json: JsonOption = False
) -> None:
    """Run every stage; what is done already is skipped, what was killed is continued."""
    from pocketphi import recipe as recipes

    result = recipes.run(recipes.read(recipe, set_ or []), out=out)
    figures = {
        "folder": str(result.folder),
        "wall_s": round(result.wall_s, 3),
        "stages_made": list(result.made),
        "checksums": {name: found.checksum for name, found in result.artifacts.items()},
    }
    if json:
        print_json(figures)
    else:
        for name, checksum in figures["checksums"].items():  # type: ignore[attr-defined]
            print(f"{name:<12} {checksum}")


@app.command("plan")
def plan_command(
    recipe: RecipeFile, set_: SetOption = None, out: OutOption = None, json: JsonOption = False
) -> None:
    """Forecast tokens, parameters, memory, time and disk; refuse what cannot fit."""
    from pocketphi import recipe as recipes
    from pocketphi.core.progress import duration

    forecast = recipes.plan(recipes.read(recipe, set_ or []), out)
    if json:
        total = {
            "wall_s": forecast.wall_s,
            "peak_memory_bytes": forecast.peak_memory_bytes,
            "disk_bytes": forecast.disk_bytes,
        }
        print_json({"stages": forecast.stages, "total": total})
    else:
        rows = [("stage", "time", "memory", "disk", "what"), *forecast.rows()]
        for row in rows:
            print(f"{row[0]:<10} {row[1]:>8} {row[2]:>10} {row[3]:>10}  {row[4]}")
        print(
            f"{'total':<10} {duration(forecast.wall_s):>8} {forecast.peak_memory_bytes / 1e6:>7.0f} MB "
            f"{forecast.disk_bytes / 1e6:>7.1f} MB"
        )
    forecast.check()


@app.command("show")
def show_command(recipe: RecipeFile, set_: SetOption = None, json: JsonOption = False) -> None:
    """Print every setting of the recipe, defaults included."""
    import yaml

    from pocketphi import recipe as recipes
    from pocketphi.core.config import to_tree

    found = recipes.read(recipe, set_ or [])
    tree = {
        "name": found.name,
        "seed": found.seed,
        **{stage.name: to_tree(found.config(stage)) for stage in found.stages()},
    }
    if json:
        print_json(tree)
    else:
        print(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), end="")
