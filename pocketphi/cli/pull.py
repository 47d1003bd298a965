"""`phi pull`: download a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pocketphi.cli.common import JsonOption, print_json

app = typer.Typer(add_completion=False, help="Download a model from the Hub.")


@app.command()
def pull(
    source: Annotated[
        str, typer.Argument(help="Repository OWNER/NAME on the Hub, or the address of a file.")
    ],
    file: Annotated[
        str | None,
        typer.Option("--file", "-f", help="Which GGUF file: its name or a part of it, such as q4."),
    ] = None,
    revision: Annotated[str, typer.Option(help="Branch, tag or commit of the repository.")] = "main",
    sha256: Annotated[str | None, typer.Option(help="The checksum that the file must have.")] = None,
    to: Annotated[
        Path | None, typer.Option("--to", help="Folder to write; default the models folder.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Download a model, continuing where an earlier try stopped; print the path of its file."""
    from pocketphi.engine import download

    paths = download.pull(source, file=file, revision=revision, sha256=sha256, folder=to)
    if json:
        print_json([{"path": str(p), "file_bytes": p.stat().st_size} for p in paths])
    else:
        print(paths[0] if len(paths) == 1 else paths[0].parent)
