"""`phi tokenizer`: train a vocabulary, look at the ids of a text, write token shards."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from pocketphi.cli.common import (
    JsonOption,
    OutOption,
    RecipeOption,
    SetOption,
    print_figures,
    print_json,
    stage_config,
)

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Train a tokenizer; encode text; write token shards."
)


@app.command()
def train(
    corpus: Annotated[Path, typer.Argument(help="Corpus artifact, or a file or folder of .txt and .jsonl.")],
    recipe: RecipeOption = None,
    settings: SetOption = None,
    out: OutOption = None,
    json: JsonOption = False,
) -> None:
    """Train a byte-fallback BPE vocabulary of Phi-3's form."""
    from pocketphi import tokenizer

    config = stage_config(tokenizer.TokenizerConfig, "tokenizer", recipe, settings)
    made = tokenizer.run(config, {"corpus": corpus}, out=out)
    print_figures({"path": str(made.path), "checksum": made.checksum, **made.counts}, as_json=json)


@app.command()
def encode(
    path: Annotated[Path, typer.Argument(help="Folder, tokenizer.json, tokenizer.model or GGUF file.")],
    text: Annotated[str | None, typer.Argument(help="Text; read from stdin when left out.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Treat the text as a user's message.")] = False,
    template: Annotated[str | None, typer.Option(help="Chat template to use.")] = None,
    json: JsonOption = False,
) -> None:
    """Show the token ids of a text."""
    from pocketphi import tokenizer

    loaded = tokenizer.load(path, template=template)
    text = sys.stdin.read() if text is None else text
    ids = loaded.chat([{"role": "user", "content": text}]) if chat else loaded.encode(text)
    if json:
        print_json({"num_tokens": len(ids), "ids": ids, "tokens": [loaded.token(i) for i in ids]})
    else:
        print(" ".join(map(str, ids)))


@app.command()
def shard(
    corpus: Annotated[Path, typer.Argument(help="Corpus artifact.")],
    tokenizer: Annotated[Path, typer.Argument(help="Tokenizer artifact or folder.")],
    recipe: RecipeOption = None,
    settings: SetOption = None,
    out: OutOption = None,
    json: JsonOption = False,
) -> None:
    """Write a corpus as token shards for training."""
    from pocketphi.train import shards

    config = stage_config(shards.ShardsConfig, "shards", recipe, settings)
    made = shards.run(config, {"corpus": corpus, "tokenizer": tokenizer}, out=out)
    print_figures({"path": str(made.path), "checksum": made.checksum, **made.counts}, as_json=json)
