"""`phi bench`: speed and memory of a model on this machine."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from pocketphi.cli.chat import BackendOption, CacheOption, ContextOption, ThreadsOption, limit_blas_threads
from pocketphi.cli.common import JsonOption, print_figures

app = typer.Typer(help="Measure speed and memory of a model on this machine.")


@app.command()
def bench(
    model: Annotated[
        str | None,
        typer.Argument(help="GGUF file, folder, or a name from `phi models`; default the embedded."),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens to prefill.")] = 512,
    decode_tokens: Annotated[int, typer.Option(min=2, help="Tokens to decode.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Runs; medians are shown.")] = 3,
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

    loaded = engine.load(
        engine.resolve(model),
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
