"""`phi chat`: talk to a model, or answer one prompt."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from pocketphi.cli.common import JsonOption, print_json
from pocketphi.core.errors import UserError

app = typer.Typer(add_completion=False, help="Talk to a model, or answer one prompt.")

ModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", help="GGUF file, Hugging Face folder, or a name from `phi models`."),
]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", "-t", min=1, help="Threads; default all cores.")
]
BackendOption = Annotated[str, typer.Option("--backend", help="auto, native or numpy.")]
ContextOption = Annotated[
    int | None,
    typer.Option("--context", min=1, help="Longest conversation in tokens; default the model's own."),
]
CacheOption = Annotated[
    str | None, typer.Option("--cache-type", help="Cache of keys and values: f32, f16 or q8_0.")
]


@app.command()
def chat(
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Answer this and exit.")] = None,
    model: ModelOption = None,
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens", "-n", min=1, help="Longest answer; default 512, or half of a small context."
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy; higher is more random.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from the k best tokens; 0 is off.")] = 0,
    top_p: Annotated[
        float, typer.Option(help="Draw from the best tokens of this probability; 1 is off.")
    ] = 1.0,
    min_p: Annotated[float, typer.Option(help="Least probability relative to the best; 0 is off.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Divides what was said; 1 is off.")] = 1.0,
    presence_penalty: Annotated[
        float, typer.Option(help="Subtracted from what was answered; 0 is off.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Same seed and prompt, same text.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="End the answer before this text; repeatable.")
    ] = None,
    context: ContextOption = None,
    context_policy: Annotated[
        str, typer.Option(help="When the conversation is too long: error, or drop-oldest (turns; said).")
    ] = "error",
    crossing: Annotated[
        str, typer.Option(help="When it outgrows LongRoPE's short factors: exact, fast or stop.")
    ] = "exact",
    lookup: Annotated[
        int | None,
        typer.Option(min=0, help="Tokens guessed at a time by prompt lookup; same text. 0 is off."),
    ] = None,
    draft: Annotated[
        str | None,
        typer.Option(help="A smaller model with the same tokenizer that guesses ahead; same text."),
    ] = None,
    draft_tokens: Annotated[int, typer.Option(min=1, help="Tokens the draft model guesses at a time.")] = 4,
    json_schema: Annotated[
        Path | None, typer.Option(help="Answer in JSON that fulfils the schema in this file (llguidance).")
    ] = None,
    grammar: Annotated[
        Path | None, typer.Option(help="Answer by the Lark grammar in this file (llguidance).")
    ] = None,
    regex: Annotated[
        str | None, typer.Option(help="Answer what this regular expression matches (llguidance).")
    ] = None,
    logit_bias: Annotated[
        list[str] | None, typer.Option(help="ID=VALUE added to a token's logit; repeatable.")
    ] = None,
    logprobs: Annotated[
        int | None, typer.Option(min=0, help="With --json: log-probabilities, and of this many best tokens.")
    ] = None,
    threads: ThreadsOption = None,
    backend: BackendOption = "auto",
    cache_type: CacheOption = None,
    stdin: Annotated[
        bool, typer.Option("--stdin", help="Wait for piped text, however long it takes.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Talk to a model, or answer one prompt (`-p`). Text piped in is given to it before the prompt."""
    started = time.perf_counter()
    if json and prompt is None and sys.stdin.isatty():
        raise UserError("--json prints the figures of one answer", hint="give the prompt with -p")
    if logprobs is not None and not json:
        raise UserError("--logprobs is printed with --json", hint="add --json")
    limit_blas_threads(threads)
    from pocketphi import engine
    from pocketphi.engine import console, measure

    wanted = _grammar(json_schema, grammar, regex)
    biases = _biases(logit_bias or [])
    path = engine.resolve(model)
    loaded = engine.load(
        path,
        num_threads=threads,
        backend=backend,  # type: ignore[arg-type]
        context_length=context,
        cache_type=cache_type,  # type: ignore[arg-type]
    )
    load_s = time.perf_counter() - started
    drafter = None
    if draft is not None:
        drafter = engine.load(
            engine.resolve(draft),
            num_threads=threads,
            backend=backend,  # type: ignore[arg-type]
            cache_type=cache_type,  # type: ignore[arg-type]
        )
    options: dict[str, Any] = {
        "max_new_tokens": max_tokens or min(512, loaded.context_length // 2),
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "seed": seed,
        "stop": stop or (),
        "context_policy": context_policy,
        "crossing": crossing,
        "lookup": lookup,
        "draft": drafter,
        "draft_tokens": draft_tokens,
        "grammar": wanted,
        "logit_bias": biases,
        "logprobs": logprobs,
    }
    if prompt is None and sys.stdin.isatty():
        console.Console(loaded, options, system=system).run()
        return
    # Without a prompt the piped text is the question, and worth waiting for.
    piped = console.read_piped(wait_s=None if stdin or prompt is None else console.STDIN_WAIT_S)
    question = "\n\n".join(t for t in (piped.strip(), prompt) if t)
    if not question.strip():
        raise UserError("there is nothing to answer", hint='phi chat -p "What is a plant?"')
    result = console.answer_once(loaded, question, options, system=system, out=None if json else sys.stdout)
    for note in console.notes_of(result, context=loaded.context_length):
        print(f"({note})", file=sys.stderr)
    if json:
        facts = loaded.describe()
        print_json(
            {**result.to_tree(), "load_s": load_s, "peak_rss_bytes": measure.peak_rss_bytes(), "model": facts}
        )
    else:
        print(console.summary(result, loaded), file=sys.stderr)
    if result.finish_reason == "interrupted":
        raise typer.Exit(130)


def _grammar(json_schema: Path | None, lark: Path | None, regex: str | None) -> Any:
    """The grammar that was asked for, or None."""
    from pocketphi.engine.grammar import Grammar

    given = [x for x in (json_schema, lark, regex) if x is not None]
    if len(given) > 1:
        raise UserError("--json-schema, --grammar and --regex: give one of them")
    if regex is not None:
        return Grammar.regex(regex)
    path = json_schema or lark
    if path is None:
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the grammar cannot be read: {error}") from None
    return Grammar.json_schema(text) if json_schema else Grammar.lark(text)


def _biases(given: list[str]) -> dict[int, float]:
    """`ID=VALUE` texts as a mapping. UserError for anything else."""
    found = {}
    for text in given:
        name, _, value = text.partition("=")
        try:
            found[int(name)] = float(value)
        except ValueError:
            raise UserError(f"--logit-bias wants ID=VALUE, found '{text}'") from None
    return found


def limit_blas_threads(threads: int | None) -> None:
    """Keep NumPy's BLAS to few threads; must run before NumPy is imported.

    Its threads spin at every product: one more than there are free cores makes it ten times slower.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", str(threads or 1))
