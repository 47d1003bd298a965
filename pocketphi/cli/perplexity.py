"""`phi perplexity`: how well a model predicts a text, and how far a file is from its checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pocketphi.cli.common import JsonOption, print_figures

app = typer.Typer(add_completion=False, help="Measure how well a model predicts a text.")


@app.command()
def perplexity(
    model: Annotated[Path, typer.Argument(help="GGUF file, Hugging Face folder or artifact.")],
    text: Annotated[Path, typer.Argument(help="A .txt or .jsonl file, a folder of them, or token shards.")],
    reference: Annotated[
        Path | None, typer.Option("--reference", help="The checkpoint; adds divergence and agreement.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to read at most.")] = 16384,
    window: Annotated[int, typer.Option(help="Tokens of context at most.")] = 512,
    threads: Annotated[int | None, typer.Option(help="Threads; default all cores.")] = None,
    json: JsonOption = False,
) -> None:
    """Measure the loss of a model on a text: nats per token, bits per byte."""
    from pocketphi.quant import perplexity as measured

    figures = measured.perplexity(
        model, text, reference=reference, max_tokens=max_tokens, window=window, num_threads=threads
    )
    print_figures(figures, as_json=json)
