"""`phi train`: pre-train a model in phases. Under torchrun, every rank runs this command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pocketphi.cli.common import JsonOption, OutOption, RecipeOption, SetOption, print_figures, stage_config

app = typer.Typer(add_completion=False, help="Pre-train a model in phases.")


@app.command()
def train(
    shards: Annotated[Path, typer.Argument(help="Token shards (artifact).")],
    tokenizer: Annotated[
        Path, typer.Argument(help="Tokenizer the shards were made with (artifact or folder).")
    ],
    checkpoint: Annotated[Path | None, typer.Option(help="Continue from this checkpoint's weights.")] = None,
    recipe: RecipeOption = None,
    settings: SetOption = None,
    out: OutOption = None,
    json: JsonOption = False,
) -> None:
    """Train a model on token shards; killed and run again, it continues to the same bits."""
    from pocketphi import train as stage

    config = stage_config(stage.TrainConfig, "train", recipe, settings)
    inputs: dict[str, Path] = {"shards": shards, "tokenizer": tokenizer}
    if checkpoint is not None:
        inputs["checkpoint"] = checkpoint
    made = stage.run(config, inputs, out=out)
    print_figures({"path": str(made.path), "checksum": made.checksum, **made.counts}, as_json=json)
