"""`phi report`: draw the offline HTML page of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pocketphi.cli.common import JsonOption, OutOption, RecipeOption, SetOption, print_figures, stage_config

app = typer.Typer(add_completion=False, help="Draw the offline HTML page of a run.")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a run, such as runs/nano.")],
    title: Annotated[str | None, typer.Option(help="Heading of the page; default the folder's name.")] = None,
    recipe: RecipeOption = None,
    settings: SetOption = None,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Draw the page of the run in FOLDER: data, training, scores, answers, lineage, cost."""
    import json

    from pocketphi import report as reports

    assignments = list(settings or [])
    if title is not None:
        assignments.append(f"title={json.dumps(title)}")
    config = stage_config(reports.ReportConfig, "report", recipe, assignments)
    found = reports.run(config, reports.inputs_of(folder), out=out or folder / "report")
    page = found.file("index.html")
    print_figures({"page": str(page), "page_bytes": found.counts["page_bytes"]}, as_json=as_json)
