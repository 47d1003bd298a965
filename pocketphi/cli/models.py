"""`phi models`: the models on this machine."""

from __future__ import annotations

import sys

import typer

from pocketphi.cli.common import JsonOption, print_json

app = typer.Typer(add_completion=False, help="List the models on this machine.")


@app.command()
def models(json: JsonOption = False) -> None:
    """List the embedded model, the downloaded ones and those made in ./runs."""
    from pocketphi.engine import catalog

    found = list(catalog.find_models())
    if json:
        print_json(
            [
                {"name": f.name, "where": f.where, "file_bytes": f.file_bytes, "path": str(f.path)}
                for f in found
            ]
        )
        return
    width = max((len(f.name) for f in found), default=0)
    for f in found:
        print(f"{f.name:<{width}}  {f.file_bytes / 1e6:>9.1f} MB  {f.where:<10}  {f.path}")
    if not found:
        print(
            f"no models: none embedded, none in {catalog.models_folder()}, none in ./runs\n"
            "`phi pull` downloads one, `phi recipe run recipes/nano.yaml` makes one",
            file=sys.stderr,
        )
