"""`phi quantize`: a checkpoint becomes a 4-bit or 8-bit GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pocketphi.cli.common import JsonOption, OutOption, RecipeOption, SetOption, print_figures, stage_config

app = typer.Typer(add_completion=False, help="Write a 4-bit or 8-bit GGUF file.")


@app.command()
def quantize(
    checkpoint: Annotated[
        Path, typer.Argument(help="Checkpoint artifact, Hugging Face folder or GGUF file.")
    ],
    type_: Annotated[
        str | None, typer.Option("--type", "-t", help="f16, bf16, q8_0, q6_k, q4_0, q4_1, q4_k or q4_k_m.")
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", "-m", help="auto, rtn, importance or gptq.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option("--calibration", "-c", help="Text for calibration (.txt, .jsonl, shards).")
    ] = None,
    recipe: RecipeOption = None,
    settings: SetOption = None,
    out: OutOption = None,
    json: JsonOption = False,
) -> None:
    """Write a checkpoint as a GGUF file and report how faithful it is."""
    from pocketphi import quant

    named = {"type": type_, "method": method, "calibration": calibration}
    chosen = [f"{key}={value}" for key, value in named.items() if value is not None]
    config = stage_config(quant.QuantConfig, "quantize", recipe, [*chosen, *(settings or [])])
    made = quant.run(config, {"checkpoint": checkpoint}, out=out)
    figures = {"path": str(made.file("model.gguf")), "checksum": made.checksum, **made.counts}
    print_figures(figures, as_json=json)
