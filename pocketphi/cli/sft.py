"""`phi sft`: fine-tune a model on chats."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pocketphi.cli.common import JsonOption, OutOption, RecipeOption, SetOption, print_figures, stage_config

app = typer.Typer(add_completion=False, help="Fine-tune a model on chat data.")


@app.command()
def sft(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint artifact or Hugging Face model folder.")],
    data: Annotated[
        list[Path] | None, typer.Argument(help="Chat files (JSON, JSON lines, .zst) or folders.")
    ] = None,
    corpus: Annotated[Path | None, typer.Option(help="Corpus artifact to make chats from, by rule.")] = None,
    synth: Annotated[Path | None, typer.Option(help="Synthesis artifact whose chats are added.")] = None,
    recipe: RecipeOption = None,
    settings: SetOption = None,
    out: OutOption = None,
    json: JsonOption = False,
) -> None:
    """Teach a model to answer: the loss counts what assistants say, and the end of their turn."""
    from pocketphi.train import sft as stage

    named = [f"data={[str(path) for path in data]}"] if data else []
    config = stage_config(stage.SftConfig, "sft", recipe, [*named, *(settings or [])])
    inputs: dict[str, Path] = {"checkpoint": checkpoint}
    for name, path in (("corpus", corpus), ("synth", synth)):
        if path is not None:
            inputs[name] = path
    made = stage.run(config, inputs, out=out)
    print_figures({"path": str(made.path), "checksum": made.checksum, **made.counts}, as_json=json)
