"""Benchmark rows from the Hugging Face Hub, by the task's own name for them.

A task's file that is not in the data folder is fetched from the data set it comes from: the split's
files are listed at one commit, downloaded as models are (`pocketphi.engine.download`), and their rows
written in the columns that the task reads, as `<stem>.jsonl`. From there on it is a local file like any
other, so a score cannot depend on where the rows came from. Beside it `<stem>.source.json` keeps the data
set, its commit and the checksum of every file.

Where a data set is still a script, its files are those that the Hub itself converts (`refs/convert/parquet`).
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketphi.core import progress
from pocketphi.core.artifact import file_sha256, write_atomic
from pocketphi.core.errors import DataError, UserError
from pocketphi.engine import catalog, download
from pocketphi.evals.data import MissingData

Row = Mapping[str, Any]
Convert = Callable[[Row, int, str], dict[str, Any]]

_CONVERTED = "refs/convert/parquet"
_KINDS = (".parquet", ".jsonl", ".csv")


@dataclass(frozen=True)
class Source:
    """Where rows are: data set, its configurations (None: it has one without a name), its splits.

    row: turns a row of the Hub, its number and its configuration into the columns that a task reads;
    None keeps the columns.
    """

    repository: str
    configs: tuple[str | None, ...]
    splits: tuple[str, ...]
    row: Convert | None = None


def cache_folder() -> Path:
    """Where fetched rows are kept when no data folder is named."""
    return catalog.models_folder().parent / "benchmarks"


def fetch(stem: str, folder: Path) -> Path:
    """Write `<stem>.jsonl` and `<stem>.source.json` into `folder`; return the first.

    Raises MissingData for rows that no data set is known for or that the Hub refuses (gated ones),
    saying what to do; DataError when they are not where they should be or cannot be reached.
    """
    source = SOURCES.get(stem)
    if source is None:
        raise MissingData(
            f"no data set on the Hub is known for {stem}", hint="put the file into the data folder (--data)"
        )
    try:
        return _fetch(stem, source, folder)
    except UserError as error:
        # What the Hub refuses: an unknown name, or terms that were not accepted.
        raise MissingData(error.message, hint=error.hint) from None


def _fetch(stem: str, source: Source, folder: Path) -> Path:
    staging = folder / f".{stem}.download"
    target, note = folder / f"{stem}.jsonl", folder / f"{stem}.source.json"
    staging.mkdir(parents=True, exist_ok=True)
    used: list[dict[str, Any]] = []
    number = 0
    temporary = folder / f".{stem}.jsonl.tmp"
    listed: dict[str, list[download.Remote]] = {}
    progress.say(f"{stem}: fetching {source.repository} from {download.endpoint()}")
    with open(temporary, "w", encoding="utf-8") as out:
        for config in source.configs:
            for split in source.splits:
                for remote in _files(source.repository, config, split, listed):
                    place = download.fetch(remote, staging / remote.name)
                    used.append(
                        {
                            "name": remote.name,
                            "commit": remote.commit,
                            "bytes": place.stat().st_size,
                            "sha256": file_sha256(place),
                        }
                    )
                    for raw in rows(place):
                        out.write(json.dumps(_converted(source, raw, number, config, stem)) + "\n")
                        number += 1
        out.flush()
        os.fsync(out.fileno())
    if not number:
        raise DataError(f"{source.repository}: the files of {stem} hold no row")
    tree = {"repository": source.repository, "files": used, "rows": number, "sha256": file_sha256(temporary)}
    # The note first: rows that are there without one would be taken for a file of unknown origin.
    write_atomic(note, json.dumps(tree, indent=1) + "\n")
    os.replace(temporary, target)
    shutil.rmtree(staging)
    progress.say(f"{stem}: {number} rows, commit {used[0]['commit']}")
    return target


def origin(path: Path, sha256: str) -> dict[str, Any] | None:
    """Data set and commits that a fetched file was made from; None for a file that came otherwise.

    A file that was changed since has another checksum and is not the Hub's any more.
    """
    try:
        tree = json.loads((path.parent / f"{path.name.split('.jsonl')[0]}.source.json").read_text())
        if tree["sha256"] != sha256:
            return None
        commits = sorted({str(f["commit"]) for f in tree["files"]})
        digest = hashlib.sha256("".join(f["sha256"] for f in tree["files"]).encode()).hexdigest()
        return {"repository": tree["repository"], "commit": ", ".join(commits), "files_sha256": digest}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a .parquet, .jsonl or .csv file. DataError for a damaged one."""
    try:
        if path.suffix == ".parquet":
            try:
                import pyarrow.parquet
            except ModuleNotFoundError:
                raise UserError(
                    f"{path.name}: reading it needs the package 'pyarrow'",
                    hint="pip install 'pocketphi[make]'",
                ) from None
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
                yield from batch.to_pylist()
        elif path.suffix == ".csv":
            with open(path, encoding="utf-8", newline="") as file:
                yield from csv.DictReader(file)
        else:
            with open(path, encoding="utf-8") as file:
                yield from (json.loads(line) for line in file if line.strip())
    except (OSError, ValueError, csv.Error) as error:  # pyarrow's errors are ValueErrors and OSErrors
        raise DataError(f"{path.name}: cannot be read: {error}") from None


def _converted(source: Source, raw: Row, number: int, config: str | None, stem: str) -> dict[str, Any]:
    if source.row is None:
        return dict(raw)
    try:
        return source.row(raw, number, config or "")
    except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
        raise DataError(
            f"{source.repository}: row {number} of {stem} is not what was expected: "
            f"{type(error).__name__}: {error}",
            hint="the data set has changed since this task was written",
        ) from None


def _files(
    repository: str, config: str | None, split: str, listed: dict[str, list[download.Remote]]
) -> list[download.Remote]:
    """Return the files of a split, in order: at the main revision, else where the Hub has converted them."""
    for revision in ("main", _CONVERTED):
        if revision not in listed:
            try:
                listed[revision] = download.list_repository(repository, revision, kind="datasets")
            except UserError:
                if revision == "main":
                    raise
                listed[revision] = []
        for suffix in _KINDS:
            found = [r for r in listed[revision] if _belongs(r.name, config, split, suffix)]
            if found:
                return sorted(found, key=lambda r: r.name)
    there = ", ".join(sorted(r.name for r in listed["main"])[:8])
    raise DataError(
        f"{repository}: no file of {f'{config}, ' if config else ''}{split} is there (it has {there or 'nothing'})"
    )


def _belongs(name: str, config: str | None, split: str, suffix: str) -> bool:
    """Whether a repository's file holds a split, by the layouts that the Hub itself reads."""
    folders = {config, f"data/{config}"} if config else {"", "data", "default", "plain_text"}
    folder, _, base = name.rpartition("/")
    if not base.endswith(suffix):
        return False
    bare = base.removesuffix(suffix)
    if folder in folders and re.fullmatch(rf"{re.escape(split)}(-\d+-of-\d+)?", bare):
        return True
    # Converted by the Hub: CONFIG/SPLIT/0000.parquet.
    if folder in {f"{f}/{split}" if f else split for f in folders} and bare.isdigit():
        return True
    return config is not None and not folder and bare in (config, f"{config}_{split}", f"{config}-{split}")


# From the columns of a data set to those that a task reads.


def _lettered(row: Row, text: str) -> dict[str, Any]:
    labels = [str(x) for x in row["choices"]["label"]]
    gold = labels.index(str(row["answerKey"]).strip())
    query = f"Question: {row[text]}\nAnswer:"
    return {"id": row["id"], "query": query, "choices": list(row["choices"]["text"]), "gold": gold}


def _by_question(row: Row, number: int, config: str) -> dict[str, Any]:
    return _lettered(row, "question")


def _by_stem(row: Row, number: int, config: str) -> dict[str, Any]:
    return _lettered(row, "question_stem")


def _boolq(row: Row, number: int, config: str) -> dict[str, Any]:
    query = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
    return {"idx": row["idx"], "query": query, "choices": ["yes", "no"], "gold": 1 - int(row["label"])}


def _lambada(row: Row, number: int, config: str) -> dict[str, Any]:
    query, _, last = row["text"].rpartition(" ")
    return {"id": number, "query": query, "answers_text": [last]}


def _anli(row: Row, number: int, config: str) -> dict[str, Any]:
    return {
        "uid": row["uid"],
        "context": row["premise"],
        "statement": row["hypothesis"],
        "gold_label": "enc"[int(row["label"])],
    }


def _truthfulqa(row: Row, number: int, config: str) -> dict[str, Any]:
    return {
        "Question": row["question"],
        "Best Answer": row["best_answer"],
        "Correct Answers": "; ".join(row["correct_answers"]),
        "Incorrect Answers": "; ".join(row["incorrect_answers"]),
    }


def _bbh(row: Row, number: int, config: str) -> dict[str, Any]:
    return {"task": config, "input": row["input"], "target": row["target"]}


def _math(row: Row, number: int, config: str) -> dict[str, Any]:
    return {
        "problem": row["problem"],
        "level": row["level"],
        "type": row["type"],
        "solution": row["solution"],
    }


def _math500(row: Row, number: int, config: str) -> dict[str, Any]:
    found = {k: row[k] for k in ("problem", "level", "solution", "answer")}
    return {**found, "type": row.get("subject")}


_BBH = (
    "boolean_expressions", "causal_judgement", "date_understanding", "disambiguation_qa", "dyck_languages",
    "formal_fallacies", "geometric_shapes", "hyperbaton", "logical_deduction_five_objects",
    "logical_deduction_seven_objects", "logical_deduction_three_objects", "movie_recommendation",
    "multistep_arithmetic_two", "navigate", "object_counting", "penguins_in_a_table",
    "reasoning_about_colored_objects", "ruin_names", "salient_translation_error_detection", "snarks",
    "sports_understanding", "temporal_sequences", "tracking_shuffled_objects_five_objects",
    "tracking_shuffled_objects_seven_objects", "tracking_shuffled_objects_three_objects", "web_of_lies",
    "word_sorting",
)  # fmt: skip
_MATH = (
    "algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra",
    "precalculus",
)  # fmt: skip


def _splits(
    stem: str, repository: str, config: str | None, names: Iterable[str], row: Convert | None = None
) -> dict[str, Source]:
    return {f"{stem}.{name}": Source(repository, (config,), (name,), row) for name in names}


_TEST, _VALIDATION = ("test", "train"), ("validation", "train")

SOURCES: dict[str, Source] = {
    **_splits("arc_easy", "allenai/ai2_arc", "ARC-Easy", _TEST, _by_question),
    **_splits("arc_challenge", "allenai/ai2_arc", "ARC-Challenge", _TEST, _by_question),
    **_splits("hellaswag", "Rowan/hellaswag", None, _VALIDATION),
    **_splits("piqa", "ybisk/piqa", None, _VALIDATION),
    **_splits("winogrande_xl", "allenai/winogrande", "winogrande_xl", _VALIDATION),
    **_splits("openbookqa", "allenai/openbookqa", "main", _TEST, _by_stem),
    **_splits("boolq", "aps/super_glue", "boolq", _VALIDATION, _boolq),
    **_splits("sciq", "allenai/sciq", None, ("validation",)),
    **_splits("mmlu", "cais/mmlu", "all", ("test", "dev")),
    **_splits("lambada_openai", "EleutherAI/lambada_openai", "default", ("test",), _lambada),
    **_splits("commonsense_qa", "tau/commonsense_qa", None, _VALIDATION, _by_question),
    **_splits("social_iqa", "allenai/social_i_qa", None, _VALIDATION),
    **_splits("copa", "aps/super_glue", "copa", ("validation",)),
    **_splits("rte", "nyu-mll/glue", "rte", ("validation",)),
    **_splits("medmcqa", "openlifescienceai/medmcqa", None, ("validation",)),
    **_splits("gsm8k", "openai/gsm8k", "main", ("test",)),
    **_splits("humaneval", "openai/openai_humaneval", "openai_humaneval", ("test",)),
    **_splits(
        "triviaqa_wikipedia_nocontext", "mandarjoshi/trivia_qa", "rc.wikipedia.nocontext", ("validation",)
    ),
    **_splits("nq_open", "google-research-datasets/nq_open", "nq_open", ("validation",)),
    **{f"anli_r{n}.dev": Source("facebook/anli", ("plain_text",), (f"dev_r{n}",), _anli) for n in (1, 2, 3)},
    "truthfulqa.all": Source("truthfulqa/truthful_qa", ("generation",), ("validation",), _truthfulqa),
    "mbpp.all": Source("google-research-datasets/mbpp", ("full",), ("train", "test", "validation", "prompt")),
    "math.test": Source("EleutherAI/hendrycks_math", _MATH, ("test",), _math),
    "math500.test": Source("HuggingFaceH4/MATH-500", (None,), ("test",), _math500),
    "bbh.test": Source("lukaemon/bbh", _BBH, ("test",), _bbh),
    "gpqa_main.test": Source("Idavidrein/gpqa", ("gpqa_main",), ("train",)),
}
