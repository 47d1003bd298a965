"""phi corpus: build, explain and score documents."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

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

app = typer.Typer(add_completion=False, help="Filter, score and explain documents.", no_args_is_help=True)

Inputs = Annotated[
    list[str] | None,
    typer.Argument(help="Files, folders, hf:NAME or python-docs; default: the recipe's, else python-docs."),
]


@app.command()
def build(
    inputs: Inputs = None,
    recipe: RecipeOption = None,
    settings: SetOption = None,
    out: OutOption = None,
    engine: Annotated[
        str | None, typer.Option(help="local (processes of this machine) or ray; the output is the same.")
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="Running Ray cluster; default: Ray is started on this machine.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Read, extract, score, deduplicate and judge documents; write a corpus artifact."""
    from pocketphi import corpus

    chosen = [f"{key}={value}" for key, value in (("engine", engine), ("ray_address", ray_address)) if value]
    built = corpus.run(_config(inputs, recipe, [*(settings or []), *chosen]), {}, out=out)
    print_figures({"path": str(built.path), "checksum": built.checksum, **built.counts}, as_json=as_json)


@app.command()
def score(
    file: Annotated[Path, typer.Argument(help="File or folder of documents.")],
    recipe: RecipeOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print the educational score and every rule's verdict of each document of FILE, one line each."""
    from pocketphi import corpus

    for answer in corpus.score_documents(_config([str(file)], recipe, settings)):
        if as_json:
            print(json.dumps(answer, ensure_ascii=False))
        elif "failed" in answer:
            print(f"failed    -     {answer['where']}: {answer['failed']}")
        else:
            verdict = "keep" if answer["keep"] else "reject"
            reasons = ", ".join(answer["reasons"])
            print(
                f"{verdict:<8}{answer['educational_score']:5.2f}  {answer['id'][:12]}  {answer['where']}  {reasons}"
            )


@app.command()
def why(
    identifier: Annotated[str, typer.Argument(metavar="ID", help="Id of a document, or its first digits.")],
    corpus_path: Annotated[
        Path | None,
        typer.Option("--corpus", "-c", help="Corpus artifact (folder); default: the latest under runs/."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Explain a document: every rule's score, threshold and verdict."""
    from pocketphi import corpus

    if corpus_path is None:
        corpus_path = corpus.latest()
        print(f"corpus {corpus_path}", file=sys.stderr)
    answers = corpus.why(corpus_path, identifier)
    if as_json:
        print_json(answers)
        return
    for answer in answers:
        _print_explanation(answer)


@app.command()
def stats(
    corpus_path: Annotated[Path, typer.Argument(metavar="CORPUS")], as_json: JsonOption = False
) -> None:
    """Show what each rule rejected, by source and phase."""
    from pocketphi import corpus

    tree = corpus.stats(corpus_path)
    if as_json:
        print_json(tree)
        return
    print_figures(tree["totals"], as_json=False)
    print(f"\n{'rule':<28}{'judged':>10}{'rejected':>10}{'alone':>10}{'median':>12}")
    for name, entry in tree["rules"].items():
        median = entry["quantiles"].get("p50", float("nan"))
        print(
            f"{name:<28}{entry['judged']:>10}{entry['rejected']:>10}{entry['rejected_alone']:>10}{median:>12.4g}"
        )
    print(
        f"\n{'source':<28}{'in':>10}{'kept':>10}{'rejected':>10}{'failed':>10}{'phase 1':>10}{'phase 2':>10}"
    )
    for name, entry in tree["sources"].items():
        cells = [
            entry.get(f"documents_{k}", 0) for k in ("in", "kept", "rejected", "failed", "phase1", "phase2")
        ]
        print(f"{name:<28}" + "".join(f"{cell:>10}" for cell in cells))
    for reason, number in tree["failures"].items():
        print(f"failed {number}: {reason}", file=sys.stderr)


@app.command()
def annotate(
    inputs: Annotated[list[str] | None, typer.Argument(help="JSON-lines files with a text per row.")] = None,
    corpus_path: Annotated[
        Path | None, typer.Option("--corpus", "-c", help="Corpus artifact to sample; rejected documents too.")
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(help="OpenAI-compatible address, such as http://localhost:8000/v1.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Name of the model that the endpoint serves.")] = None,
    local_model: Annotated[
        str | None,
        typer.Option(help="Grade with a model of this machine: a file, or a name of `phi models`."),
    ] = None,
    recipe: RecipeOption = None,
    settings: SetOption = None,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let a language model grade a sample of documents, with a reason; write an annotations artifact."""
    import dataclasses

    from pocketphi.corpus.educational import annotate as stage

    config = stage_config(stage.AnnotateConfig, "annotate", recipe, settings)
    given: dict[str, Any] = {"endpoint": endpoint, "model": model, "local_model": local_model}
    given["inputs"] = tuple(inputs or ())
    config = dataclasses.replace(config, **{name: value for name, value in given.items() if value})
    made = stage.run(config, {"corpus": corpus_path} if corpus_path else {}, out=out)
    print_figures({"path": str(made.path), "checksum": made.checksum, **made.counts}, as_json=as_json)


@app.command("train-scorer")
def train_scorer(
    annotations: Annotated[
        Path | None, typer.Option("--annotations", "-a", help="Annotations artifact (folder) to learn from.")
    ] = None,
    recipe: RecipeOption = None,
    settings: SetOption = None,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train an educational scorer on grades or labelled files; print how it does on what was held out."""
    from pocketphi.corpus.educational import train_scorer as stage

    config = stage_config(stage.TrainScorerConfig, "train-scorer", recipe, settings)
    made = stage.run(config, {"annotations": annotations} if annotations else {}, out=out)
    if as_json:
        report = json.loads(made.file("report.json").read_text(encoding="utf-8"))
        print_json({"path": str(made.path), "checksum": made.checksum, **report})
        return
    print(made.file("report.md").read_text(encoding="utf-8"))
    print_figures({"path": str(made.path), "checksum": made.checksum}, as_json=False)


@app.command()
def plan(
    corpus_path: Annotated[Path, typer.Argument(metavar="CORPUS")],
    recipe: RecipeOption = None,
    tokens: Annotated[
        list[str] | None, typer.Option(help="Tokens wanted of a phase: 1=2e9; default: the recipe's.")
    ] = None,
    weight: Annotated[
        list[str] | None, typer.Option(help="Share of a source in a phase: 1:textbook*=3; may be repeated.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say how often each phase will read each source, and warn past four times."""
    from dataclasses import asdict

    from pocketphi.core import artifact
    from pocketphi.corpus.mixture import corpus_plan

    wanted, weights = _phases_of(recipe)
    for entry in tokens or []:
        phase, _, number = entry.partition("=")
        wanted[_phase(phase, entry)] = int(_number(number, entry))
    for entry in weight or []:
        phase, _, rest = entry.partition(":")
        pattern, _, number = rest.rpartition("=")
        weights.setdefault(_phase(phase, entry), {})[pattern] = _number(number, entry)
    plans = corpus_plan(artifact.load(corpus_path, kind="corpus", verify=False), wanted, weights)
    if as_json:
        print_json(
            {f"phase{n}": [{**asdict(r), "warning": r.warning} for r in rows] for n, rows in plans.items()}
        )
        return
    for index, rows in plans.items():
        print(f"phase {index}: {sum(row.tokens_read for row in rows)} tokens")
        print(f"  {'source':<28}{'tokens':>14}{'tokens read':>14}{'share':>8}{'epochs':>8}{'weight':>10}")
        for row in rows:
            print(
                f"  {row.source:<28}{row.tokens:>14}{row.tokens_read:>14}{row.share:>8.1%}{row.epochs:>8.2f}"
                f"{row.weight:>10.4g}"
            )
        for row in rows:
            if row.warning:
                print(f"warning: phase {index}: {row.warning}", file=sys.stderr)


def _phases_of(recipe: Path | None) -> tuple[dict[int, int], dict[int, dict[str, float]]]:
    """Tokens wanted and weights of the splits phase1 and phase2, as the recipe's training names them."""
    from pocketphi.core import config as configuration

    wanted: dict[int, int] = {}
    weights: dict[int, dict[str, float]] = {}
    tree = (configuration.load_yaml(recipe).get("train") or {}) if recipe is not None else {}
    for phase in tree.get("phases") or []:
        number = {"phase1": 1, "phase2": 2}.get(phase.get("split", "phase1"))
        if number is not None:
            wanted[number] = wanted.get(number, 0) + int(phase["tokens"])
            weights.setdefault(number, dict(phase.get("mixture") or {}))
    return wanted, {number: found for number, found in weights.items() if found}


def _phase(text: str, entry: str) -> int:
    if text not in ("1", "2"):
        raise typer.BadParameter(f"'{entry}': phases are 1 and 2")
    return int(text)


def _number(text: str, entry: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"'{entry}': '{text}' is not a number") from None


@app.command()
def browse(
    corpus_path: Annotated[Path, typer.Argument(metavar="CORPUS")],
    out: Annotated[
        Path | None, typer.Option(help="HTML file; default: CORPUS.html beside the corpus.")
    ] = None,
    documents: Annotated[
        int, typer.Option(min=2, help="Documents to show, beside those near the borders.")
    ] = 400,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write an offline page: kept and rejected documents side by side, thresholds to move."""
    from pocketphi.corpus.browse import write_page

    out = out or corpus_path.resolve().with_name(corpus_path.resolve().name + ".html")
    print_figures(write_page(corpus_path, out, num_documents=documents), as_json=as_json)
    if open_page:
        import webbrowser

        webbrowser.open(out.resolve().as_uri())


def _config(inputs: list[str] | None, recipe: Path | None, settings: list[str] | None) -> Any:
    import dataclasses

    from pocketphi.corpus import CorpusConfig

    config = stage_config(CorpusConfig, "corpus", recipe, settings)
    return dataclasses.replace(config, inputs=tuple(inputs)) if inputs else config


def _print_explanation(answer: dict[str, Any]) -> None:
    where = answer["url"] or answer["meta"].get("where", "")
    print(f"{answer['id']}  {where}")
    print(f"  source {answer['source']}   licence {answer['license'] or 'not named'}")
    phases = [name for name in ("phase1", "phase2", "heldout") if answer[name]]
    verdict = "kept" if answer["keep"] else f"rejected by {', '.join(answer['reasons'])}"
    print(f"  {verdict}" + (f" ({', '.join(phases)})" if phases else ""))
    if answer["contamination_item"]:
        print(f"  nearest benchmark item: {answer['contamination_item']}")
    if answer["duplicate_of"]:
        print(f"  same text as {answer['duplicate_of']}")
    print()
    for line in answer["rules"]:
        low = "" if line["min"] is None else f"{line['min']:g} <= "
        high = "" if line["max"] is None else f" <= {line['max']:g}"
        limits = f"{low}x{high}" if low or high else "no bound"
        mark = "reject" if not line["keep"] else "keep" if line["judges"] else "-"
        print(f"  {mark:<7}{line['rule']:<26}{line['score']:>12.5g}   {limits:<22}{line['about']}")
    print(f"\n{answer['text'][:600]}\n")
