"""`phi eval`: score a model; compare two scores."""

from __future__ import annotations

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
    add_completion=False, help="Score a model on benchmarks; compare two scores.", no_args_is_help=True
)


@app.command()
def run(
    model: Annotated[
        str, typer.Argument(help="GGUF file, Hugging Face folder, artifact, or http://host/v1#name.")
    ],
    suite: Annotated[
        str | None, typer.Option(help="quick, pocket, phi3-report, open-llm or long-context.")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", "-t", help="NAME[:shots=N,format=F], or lm-eval/NAME; repeatable."),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder with the benchmark files.")] = None,
    hub: Annotated[
        bool, typer.Option("--hub", help="Fetch missing benchmark files from the Hub, by the task's name.")
    ] = False,
    limit: Annotated[int | None, typer.Option(help="Most items per task, drawn by hash.")] = None,
    shards: Annotated[Path | None, typer.Option(help="Shards artifact, for bits per byte.")] = None,
    corpus: Annotated[
        Path | None, typer.Option(help="Corpus artifact, for the share of items seen in it.")
    ] = None,
    judge: Annotated[
        str | None, typer.Option(help="Judge of MT-bench answers, http://host:port/v1#model-name.")
    ] = None,
    recipe: RecipeOption = None,
    settings: SetOption = None,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score MODEL and keep every item's record."""
    from pocketphi import evals
    from pocketphi.evals import tables

    assignments = list(settings or [])
    if suite is not None:
        assignments.append(f"suite={suite}")
    if task:
        assignments.append(f"tasks={tables.yaml_list(task)}")
    if data is not None:
        assignments.append(f"data_dir={tables.yaml_text(data)}")
    if hub:
        assignments.append("hub=true")
    if limit is not None:
        assignments.append(f"limit={limit}")
    if judge is not None:
        assignments += tables.judge_settings(judge)
    config = stage_config(evals.EvalConfig, "eval", recipe, assignments)
    inputs = {"model": model, "shards": shards, "corpus": corpus}
    found = evals.run(config, {k: v for k, v in inputs.items() if v is not None}, out=out)
    if as_json:
        print_json(tables.flat(found))
    else:
        typer.echo(tables.text(found))
        typer.echo(f"\nrecords: {found.path}", err=True)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="Evaluation that is subtracted.")],
    b: Annotated[Path, typer.Argument(help="Evaluation that it is subtracted from.")],
    recipe: RecipeOption = None,
    settings: SetOption = None,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Paired differences B - A with intervals; refuses what is not comparable, and draws a page."""
    from pocketphi.evals import compare as comparing

    config = stage_config(comparing.CompareConfig, "compare", recipe, list(settings or []))
    found = comparing.run(config, {"a": a, "b": b}, out=out)
    if as_json:
        print_json(comparing.flat(found))
    else:
        typer.echo(comparing.text(found))
        typer.echo(f"\npage: {found.path / 'index.html'}", err=True)


@app.command()
def judge(
    a: Annotated[Path, typer.Argument(help="Evaluation with MT-bench answers.")],
    b: Annotated[Path, typer.Argument(help="Another one.")],
    url: Annotated[str | None, typer.Option(help="Judge's endpoint, http://host:port/v1#model-name.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder with MT-bench's judge prompts.")] = None,
    recipe: RecipeOption = None,
    settings: SetOption = None,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let a judge compare two models' MT-bench answers, each pair in both orders."""
    from pocketphi.evals import pairwise, tables
    from pocketphi.evals.judge import JudgeConfig

    assignments = list(settings or [])
    if url is not None:
        assignments += tables.judge_settings(url)
    if data is not None:
        assignments.append(f"data_dir={tables.yaml_text(data)}")
    config = stage_config(JudgeConfig, "judge", recipe, assignments)
    found = pairwise.run(config, {"a": a, "b": b}, out=out)
    print_figures(pairwise.read(found), as_json=as_json)


@app.command()
def tasks(as_json: JsonOption = False) -> None:
    """List the tasks and suites."""
    from pocketphi.evals import tables

    if as_json:
        print_json(tables.known_tasks())
        return
    for entry in tables.known_tasks():
        typer.echo(f"{entry['task']:<18} {entry['kind']:<9} {entry['title']}")
    typer.echo(
        f"{'lm-eval/NAME':<18} {'harness':<9} any of lm-evaluation-harness (pip install 'pocketphi[lm-eval]')"
    )


@app.command()
def plan(
    suite: Annotated[
        str | None, typer.Option(help="quick, pocket, phi3-report, open-llm or long-context.")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option("--task", "-t", help="As of `phi eval run`; repeatable.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="Model shape: phi-3-mini-4k, pocket, nano, ...")
    ] = "phi-3-mini-4k",
    data: Annotated[Path | None, typer.Option(help="Folder with the benchmark files.")] = None,
    recipe: RecipeOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Forecast tokens and hours of a suite on this CPU and on one H100, without a model."""
    from pocketphi import evals
    from pocketphi.evals import forecast, tables

    assignments = list(settings or [])
    if suite is not None:
        assignments.append(f"suite={suite}")
    if task:
        assignments.append(f"tasks={tables.yaml_list(task)}")
    if data is not None:
        assignments.append(f"data_dir={tables.yaml_text(data)}")
    config = stage_config(evals.EvalConfig, "eval", recipe, assignments)
    shape = {"model_name": model}
    rates = forecast.machine_rates()
    rows = forecast.by_task(config, shape, rates)
    figures = forecast.totals(rows, shape, rates)
    if as_json:
        print_json({**figures, "tasks": rows})
        return
    typer.echo(tables.planned(rows) + "\n")
    print_figures(figures, as_json=False)
