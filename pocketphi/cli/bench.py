"""`phi bench`: speed and memory of a model on this machine."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from pocketphi.cli.chat import BackendOption, CacheOption, ContextOption, ThreadsOption, limit_blas_threads
from pocketphi.cli.common import JsonOption, print_figures
from pocketphi.core.errors import UserError

app = typer.Typer(add_completion=False, help="Measure speed and memory of a model on this machine.")


@app.command()
def bench(
    model: Annotated[
        str | None,
        typer.Argument(help="GGUF file, folder, or a name from `phi models`; default the embedded."),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens to prefill.")] = 512,
    decode_tokens: Annotated[int, typer.Option(min=2, help="Tokens to decode.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Runs; medians are shown.")] = 3,
    shape: Annotated[
        str | None, typer.Option(help="Random weights of a known shape instead, such as phi-3-mini-4k.")
    ] = None,
    type: Annotated[str, typer.Option(help="Number format of --shape.")] = "Q4_0",
    threads: ThreadsOption = None,
    backend: BackendOption = "auto",
    context: ContextOption = None,
    cache_type: CacheOption = None,
    json: JsonOption = False,
) -> None:
    """Measure prefill and decode speed, time to first token, memory, and the bandwidth reached."""
    limit_blas_threads(threads)
    started = time.perf_counter()
    from pocketphi import engine
    from pocketphi.engine import measure
    from pocketphi.engine.random_weights import random_weights, shape_named

    if shape is not None and model is not None:
        raise UserError("name a model or a --shape, not both")
    loaded = engine.load(
        random_weights(shape_named(shape), type=type, name=shape) if shape else engine.resolve(model),
        num_threads=threads,
        backend=backend,  # type: ignore[arg-type]
        context_length=context,
        cache_type=cache_type,  # type: ignore[arg-type]
    )
    load_s = time.perf_counter() - started
    room = loaded.context_length
    # A small model's whole context is less than the usual prompt: measure with what it has.
    if prompt_tokens + decode_tokens > room and (prompt_tokens, decode_tokens) == (512, 64):
        decode_tokens = min(64, max(2, room // 4))
        prompt_tokens = room - decode_tokens
    figures = measure.bench(loaded, prompt_tokens=prompt_tokens, decode_tokens=decode_tokens, repeats=repeats)
    print_figures({**figures, "load_s": load_s}, as_json=json)
