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

app = typer.Typer(help="Filter, score and explain documents.", no_args_is_help=True)

Inputs = Annotated[
    list[str] | None,
    typer.Argument(help="Files, folders, hf:NAME or python-docs; default: the recipe's, else python-docs."),
]
Corpus = Annotated[Path, typer.Option("--corpus", "-c", help="Corpus artifact (folder).")]


@app.command()
def build(
    inputs: Inputs = None,
    recipe: RecipeOption = None,
    settings: SetOption = None,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read, extract, score, deduplicate and judge documents; write a corpus artifact."""
    from pocketphi import corpus

    built = corpus.run(_config(inputs, recipe, settings), {}, out=out)
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
    corpus_path: Corpus,
    as_json: JsonOption = False,
) -> None:
    """Explain a document: every rule's score, threshold and verdict."""
    from pocketphi import corpus

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
