"""Rows for lm-eval's tasks: local files in the columns of their origin, else the Hub, else an error.

A task's rows are looked for in this order:

1. `<data_dir>/lm-eval/<task>.<split>.jsonl` (or .zst, .gz), in the columns of the data set it names;
2. our own benchmark file of that data set (`SOURCES`), its rows turned back into the origin's columns;
3. with `hub`, the data set itself, as lm-eval fetches it: where a split that is needed is neither of these.

Without `hub` nothing that lm-eval does may open a connection: what tries is stopped and named.
"""

from __future__ import annotations

import re
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from pocketphi.core import progress
from pocketphi.core.errors import DataError, PocketPhiError
from pocketphi.evals import data
from pocketphi.evals.config import EvalConfig
from pocketphi.evals.data import DataFile, MissingData
from pocketphi.evals.task import LETTERS

Row = dict[str, Any]
OWN_FOLDER = "lm-eval"


@dataclass(frozen=True)
class Source:
    """A data set that we hold files of. files: split of the origin -> stem; row: to the origin's columns.

    part: which configuration of the data set a row of ours belongs to, where one file holds them all.
    """

    files: Mapping[str, str]
    row: Callable[[Row], Row]
    part: Callable[[Row], str] | None = None


@dataclass
class Given:
    """What one task of lm-eval was given: local files by split, or the data set's commit on the Hub."""

    files: dict[str, DataFile] = field(default_factory=dict)
    origin: dict[str, Any] | None = None


class Supply:
    """Stands in for `ConfigurableTask.download` while lm-eval builds its tasks.

    name: what is built. shots: asked for by hand, None for the task's own number. `given` tells afterwards,
    by task name, what each was given. The rows lie in a folder that is removed with this object.
    """

    def __init__(self, config: EvalConfig, name: str, shots: int | None) -> None:
        self.given: dict[str, Given] = {}
        self._config, self._name, self._shots = config, name, shots
        self._folder = tempfile.TemporaryDirectory(prefix="pocketphi-lm-eval-", ignore_cleanup_errors=True)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Let tasks built inside take their rows from here."""
        from lm_eval.api.task import ConfigurableTask

        supply, theirs = self, ConfigurableTask.download

        def download(task: Any, dataset_kwargs: Any = None, **more: Any) -> None:
            if supply._local(task):
                return
            if not supply._config.hub:
                raise supply._missing(task)
            progress.say(f"lm-eval: fetching {task.DATASET_PATH or supply._called(task)} from the Hub")
            theirs(task, dataset_kwargs, **more)
            supply.given[supply._called(task)] = Given(origin=_origin(task))

        ConfigurableTask.download = download
        try:
            yield
        finally:
            ConfigurableTask.download = theirs

    def _called(self, task: Any) -> str:
        # A task that is a class learns its name after its rows.
        return task.config.task or self._name

    def _local(self, task: Any) -> bool:
        files, rows = self._files(task)
        if not self._needed(task) <= files.keys() or not files:
            return False
        import datasets

        datasets.disable_progress_bars()
        name = self._called(task)
        place = Path(self._folder.name) / re.sub(r"\W", "_", name)
        whole = datasets.DatasetDict({s: datasets.Dataset.from_list(rows(s)) for s in files})
        # On disk, so that `datasets` keeps what a task's process_docs makes of them: some shuffle, and
        # lm-eval asks for the same split several times.
        whole.save_to_disk(place)
        task.dataset = datasets.load_from_disk(place)
        empty = next(iter(task.dataset.values())).select([])
        for split in self._named(task) - task.dataset.keys():
            task.dataset[split] = empty
        self.given[name] = Given(files)
        return True

    def _files(self, task: Any) -> tuple[dict[str, DataFile], Callable[[str], list[Row]]]:
        """Return the local files of a task by split, and what reads the rows of one."""
        folder = self._config.data_dir
        if folder is None:
            return {}, lambda split: []
        name = str(task.DATASET_NAME or "")
        own = {s: data.find(folder / OWN_FOLDER, f"{self._called(task)}.{s}") for s in self._splits(task)}
        source = SOURCES.get((str(task.DATASET_PATH), name)) or SOURCES.get((str(task.DATASET_PATH), "*"))
        ours = {s: data.find(folder, stem) for s, stem in source.files.items()} if source else {}
        found = {s: f for s, f in {**ours, **{s: f for s, f in own.items() if f}}.items() if f is not None}

        def read(split: str) -> list[Row]:
            if own.get(split) is not None or source is None:
                return list(data.read(found[split], ()))
            return converted(source, found[split], name)

        return found, read

    def _splits(self, task: Any) -> set[str]:
        # A task that is a class may name its splits in its code.
        return self._named(task) | {"train", "validation", "test", "dev"}

    def _named(self, task: Any) -> set[str]:
        c = task.config
        return {s for s in (c.training_split, c.validation_split, c.test_split, c.fewshot_config.split) if s}

    def _needed(self, task: Any) -> set[str]:
        """The split that is scored and, where shots are drawn from rows, the split they come from."""
        c = task.config
        scored = c.test_split or c.validation_split
        needed = {scored} if scored else set()
        shots = self._shots if self._shots is not None else c.num_fewshot
        if shots and c.fewshot_config.samples is None:
            needed |= {c.fewshot_config.split or c.training_split or c.validation_split or c.test_split}
        return needed

    def _missing(self, task: Any) -> MissingData:
        name, c = self._called(task), task.config
        place = "/".join(x for x in (task.DATASET_PATH, task.DATASET_NAME) if x) or "its own source"
        lacking = sorted(self._needed(task) - self._files(task)[0].keys())
        splits = ", ".join(lacking) or c.test_split or c.validation_split or "test"
        stem = f"{name}.{splits.split(', ')[0]}.jsonl"
        folder = self._config.data_dir
        here = "no data folder is set" if folder is None else f"{folder} does not hold them"
        return MissingData(
            f"lm-eval/{name} needs rows of {place} (split {splits}) and {here}",
            hint=f"--hub fetches them; or put them into {(folder or Path('DATA')) / OWN_FOLDER / stem}, "
            "in the columns of that data set",
        )


def converted(source: Source, file: DataFile, name: str) -> list[Row]:
    """The rows of one of our files in the origin's columns. DataError when the file is another version."""
    try:
        rows = _read(str(file.path), file.sha256)
        return [source.row(r) for r in rows if source.part is None or source.part(r) == name]
    except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file.path}: its rows are not what was expected: {type(error).__name__}: {error}",
            hint="the file is not the version that this was written for",
        ) from None


@lru_cache(4)
def _read(path: str, sha256: str) -> tuple[Row, ...]:
    return tuple(data.read(DataFile(Path(path), sha256), ()))


def _origin(task: Any) -> dict[str, Any]:
    """Data set, configuration and commit that lm-eval fetched."""
    found: dict[str, Any] = {"repository": task.DATASET_PATH, "config": task.DATASET_NAME}
    for split in task.dataset.values():
        # `datasets` keeps the rows of a data set in a folder named after its commit.
        places = " ".join(str(f["filename"]) for f in getattr(split, "cache_files", None) or [])
        if match := re.search(r"[/\\]([0-9a-f]{40})[/\\]", places):
            found["commit"] = match[1]
    return found


# No connections behind the user's back.

_closed = threading.local()
_hooked = False


@contextmanager
def offline(name: str, *, hub: bool) -> Iterator[None]:
    """Stop this thread from opening connections, unless `hub`. MissingData names the task that tried.

    An audit hook cannot be taken out again; outside of this it looks at one attribute and returns. What lm-eval
    and others make of the refusal is replaced by the refusal.
    """
    global _hooked
    if hub:
        yield
        return
    if not _hooked:
        sys.addaudithook(_audit)
        _hooked = True
    _closed.name, _closed.refusal = name, None
    try:
        yield
    except Exception as error:
        if _closed.refusal is not None and not isinstance(error, PocketPhiError):
            raise _closed.refusal from None
        raise
    finally:
        _closed.name = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not event.startswith("socket.") or getattr(_closed, "name", None) is None:
        return
    if event == "socket.getaddrinfo":
        place = arguments[0]
    elif event == "socket.connect" and arguments[0].family != getattr(socket, "AF_UNIX", None):
        place = arguments[1][0]
    else:
        return
    _closed.refusal = MissingData(
        f"{_closed.name}: lm-eval wants to reach {place} for this task", hint="--hub lets it"
    )
    raise _closed.refusal


# From our files' columns to those of the data sets they were made from.


def _arc(row: Row) -> Row:
    question = row["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    labels = list(LETTERS[: len(row["choices"])])
    return {
        "id": str(row.get("id", "")),
        "question": question,
        "question_stem": question,
        "choices": {"text": row["choices"], "label": labels},
        "answerKey": labels[row["gold"]],
    }


def _boolq(row: Row) -> Row:
    passage, _, rest = row["query"].rpartition("\nQuestion: ")
    question = rest.removesuffix("\nAnswer:").removesuffix("?")
    return {"passage": passage, "question": question, "label": int(row["choices"][row["gold"]] == "yes")}


def _lambada(row: Row) -> Row:
    return {"text": f"{row['query']} {row['answers_text'][0]}"}


def _anli(row: Row) -> Row:
    return {
        "uid": row["uid"],
        "premise": row["context"],
        "hypothesis": row["statement"],
        "label": "enc".index(row["gold_label"]),
    }


def _pair(row: Row) -> Row:
    return {"premise": row["sentence1"], "hypothesis": row["sentence2"], **_only("idx", "label")(row)}


def _hellaswag(row: Row) -> Row:
    return _only("ind", "activity_label", "ctx_a", "ctx_b", "ctx", "endings", "label")(row)


def _math_part(row: Row) -> str:
    return str(row["type"]).lower().replace("&", "and").replace(" ", "_")


def _only(*names: str) -> Callable[[Row], Row]:
    return lambda row: {n: row[n] for n in names}


def _splits(stem: str, *names: str) -> dict[str, str]:
    return {n: f"{stem}.{n}" for n in names}


_ALL, _TRAINED = ("train", "validation", "test"), ("train", "validation")
_BBH = Source(_splits("bbh", "test"), _only("input", "target"), lambda row: row["task"])

# By data set and configuration; "*": the configuration is the row's part.
SOURCES: dict[tuple[str, str], Source] = {
    ("allenai/ai2_arc", "ARC-Easy"): Source(_splits("arc_easy", *_ALL), _arc),
    ("allenai/ai2_arc", "ARC-Challenge"): Source(_splits("arc_challenge", *_ALL), _arc),
    # The file of its training rows keeps prompts ready made, not the origin's columns.
    ("Rowan/hellaswag", ""): Source(_splits("hellaswag", "validation"), _hellaswag),
    ("baber/piqa", ""): Source(_splits("piqa", *_TRAINED), _only("goal", "sol1", "sol2", "label")),
    ("allenai/winogrande", "winogrande_xl"): Source(
        _splits("winogrande_xl", *_TRAINED), _only("sentence", "option1", "option2", "answer")
    ),
    ("allenai/openbookqa", "main"): Source(_splits("openbookqa", *_ALL), _arc),
    ("aps/super_glue", "boolq"): Source(_splits("boolq", *_TRAINED), _boolq),
    ("aps/super_glue", "copa"): Source(
        _splits("copa", "validation"), _only("premise", "choice1", "choice2", "question", "idx", "label")
    ),
    ("aps/super_glue", "rte"): Source(_splits("rte", "validation"), _pair),
    ("nyu-mll/glue", "rte"): Source(
        _splits("rte", "validation"), _only("sentence1", "sentence2", "idx", "label")
    ),
    ("allenai/sciq", ""): Source(
        _splits("sciq", "validation"),
        _only("question", "distractor1", "distractor2", "distractor3", "correct_answer", "support"),
    ),
    ("cais/mmlu", "*"): Source(
        _splits("mmlu", "dev", "validation", "test"),
        _only("question", "subject", "choices", "answer"),
        lambda row: row["subject"],
    ),
    ("EleutherAI/lambada_openai", "default"): Source(_splits("lambada_openai", "test"), _lambada),
    ("tau/commonsense_qa", ""): Source(_splits("commonsense_qa", *_TRAINED), _arc),
    ("lighteval/siqa", ""): Source(
        _splits("social_iqa", *_TRAINED),
        _only("context", "question", "answerA", "answerB", "answerC", "label"),
    ),
    ("facebook/anli", ""): Source({f"dev_r{n}": f"anli_r{n}.dev" for n in (1, 2, 3)}, _anli),
    ("openai/gsm8k", "main"): Source(_splits("gsm8k", "train", "test"), _only("question", "answer")),
    ("SaylorTwift/bbh", "*"): _BBH,
    ("lukaemon/bbh", "*"): _BBH,
    ("openlifescienceai/medmcqa", ""): Source(
        _splits("medmcqa", "validation"), _only("id", "question", "opa", "opb", "opc", "opd", "cop")
    ),
    ("google-research-datasets/nq_open", ""): Source(
        _splits("nq_open", "validation"), _only("question", "answer")
    ),
    ("EleutherAI/hendrycks_math", "*"): Source(
        _splits("math", "test"), _only("problem", "level", "type", "solution"), _math_part
    ),
}
