"""`phi train`: pre-train a model in phases. Under torchrun, every rank runs this command.

`phi train SHARDS TOKENIZER` is `phi train run SHARDS TOKENIZER`; beside it are `ladder` and `live`.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import click
import typer
from typer.core import TyperGroup

from pocketphi.cli.common import JsonOption, OutOption, RecipeOption, SetOption, print_figures, stage_config


class _RunByDefault(TyperGroup):
    """Takes arguments that begin with no subcommand for those of `run`."""

    def parse_args(self, context: click.Context, arguments: list[str]) -> list[str]:
        own = {name for option in self.get_params(context) for name in option.opts}
        if arguments and arguments[0].startswith("-") and arguments[0] not in own:
            arguments = ["run", *arguments]
        return super().parse_args(context, arguments)

    def resolve_command(
        self, context: click.Context, arguments: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if arguments and arguments[0] not in self.commands:
            arguments = ["run", *arguments]
        return super().resolve_command(context, arguments)


app = typer.Typer(
    add_completion=False,
    help="Pre-train a model in phases (`phi train SHARDS TOKENIZER` is short for `phi train run ...`).",
    cls=_RunByDefault,
    no_args_is_help=True,
)
ShardsArgument = Annotated[Path, typer.Argument(help="Token shards (artifact).")]
TokenizerArgument = Annotated[
    Path, typer.Argument(help="Tokenizer the shards were made with (artifact or folder).")
]


@app.command()
def run(
    shards: ShardsArgument,
    tokenizer: TokenizerArgument,
    checkpoint: Annotated[Path | None, typer.Option(help="Continue from this checkpoint's weights.")] = None,
    live: Annotated[
        int | None, typer.Option(metavar="PORT", help="Serve a live page on 127.0.0.1:PORT while training.")
    ] = None,
    recipe: RecipeOption = None,
    settings: SetOption = None,
    out: OutOption = None,
    json: JsonOption = False,
) -> None:
    """Train a model on token shards; killed and run again, it continues to the same bits."""
    from pocketphi import train as stage
    from pocketphi.train import live as pages

    config = stage_config(stage.TrainConfig, "train", recipe, settings)
    inputs: dict[str, Path] = {"shards": shards, "tokenizer": tokenizer}
    if checkpoint is not None:
        inputs["checkpoint"] = checkpoint
    if live is not None and out is None:
        raise click.UsageError("--live needs --out, the folder it watches")
    with contextlib.ExitStack() as open_page:
        if live is not None and out is not None and pages.is_main_rank():
            open_page.enter_context(pages.page(out, live))
        made = stage.run(config, inputs, out=out)
    print_figures({"path": str(made.path), "checksum": made.checksum, **made.counts}, as_json=json)


@app.command()
def ladder(
    shards: ShardsArgument,
    tokenizer: TokenizerArgument,
    recipe: RecipeOption = None,
    settings: SetOption = None,
    out: OutOption = None,
    json: JsonOption = False,
) -> None:
    """Train a few small sizes, fit loss against parameters and tokens, forecast a larger run."""
    from pocketphi.train import ladder as stage

    config = stage_config(stage.LadderConfig, "ladder", recipe, settings)
    made = stage.run(config, {"shards": shards, "tokenizer": tokenizer}, out=out)
    print_figures({"path": str(made.path), **made.counts}, as_json=json)


@app.command()
def live(
    folder: Annotated[
        Path, typer.Argument(help="Folder of a run, such as runs/nano, or of its train stage.")
    ],
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1; 0 takes a free one.")] = 8765,
) -> None:
    """Serve a live page of a run that another process makes; Ctrl-C ends it."""
    import threading

    from pocketphi.train import live as pages

    with pages.page(folder, port):
        threading.Event().wait()
