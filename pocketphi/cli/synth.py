"""`phi synth`."""

from __future__ import annotations

import typer

from pocketphi.cli.common import JsonOption, OutOption, RecipeOption, SetOption, print_figures, stage_config

app = typer.Typer(add_completion=False, help="Make definitions, questions and arithmetic from seeds.")


@app.command()
def synth(
    recipe: RecipeOption = None, set_: SetOption = None, out: OutOption = None, json: JsonOption = False
) -> None:
    """Make definitions, questions and arithmetic from seeds; every text keeps its seed."""
    from pocketphi import synth as stage

    made = stage.run(stage_config(stage.SynthConfig, "synth", recipe, set_), {}, out=out)
    print_figures({"path": str(made.path), "checksum": made.checksum, **made.counts}, as_json=json)
