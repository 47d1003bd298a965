"""The evaluation stage: tasks in, results.json and items.jsonl out, resumable item by item."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from pocketphi.core import artifact, progress
from pocketphi.core.artifact import Artifact
from pocketphi.core.errors import DataError
from pocketphi.evals import backends, bits, metrics, prompts
from pocketphi.evals.backends.base import Scorer
from pocketphi.evals.config import EvalConfig
from pocketphi.evals.data import DataFile, read, require
from pocketphi.evals.journal import Journal
from pocketphi.evals.suites import Selection, select
from pocketphi.evals.task import Question, Task, draw_shots, pick, prompt_version

RESULTS_SCHEMA = 1
_JOURNAL = "items.partial.jsonl"


@dataclass
class Loaded:
    """A task with its items in their final order and the shots shown before them, by group."""

    task: Task
    items: list[Any]
    shots: dict[str, list[Any]]
    file: DataFile | None
    shots_file: DataFile | None
    num_in_file: int
    num_unusable: int = 0
    notes: list[str] = field(default_factory=list)


def run(
    config: EvalConfig, inputs: Mapping[str, Artifact | Path | str], *, out: Path | None = None
) -> Artifact:
    """Score `inputs["model"]` on the configured tasks; return the `eval` artifact.

    inputs: `model` (GGUF file or artifact, Hugging Face folder, or an endpoint's address), optional
    `shards` (held-out documents for bits per byte) and `corpus` (contamination).
    Files: results.json (one entry per task) and items.jsonl (one record per item, in task order).
    Raises ConfigError for an unknown task, DataError for missing or changed data, EngineError for a
    model that cannot be scored. Items finished before an error or a kill are kept for the next run.
    """
    inputs = {k: v for k, v in inputs.items() if v is not None}
    if "model" not in inputs:
        raise DataError("nothing to evaluate: inputs hold no 'model'")
    selection = select(config)
    opened = {k: _open(v) for k, v in inputs.items()}
    parents = [v for v in opened.values() if isinstance(v, Artifact)]
    sources: list[Path | str] = [v for v in opened.values() if not isinstance(v, Artifact)]
    loaded, skipped = _load_tasks(config, selection, opened.get("shards"))
    sources += sorted({f.path for each in loaded for f in (each.file, each.shots_file) if f is not None})
    sources += list(config.texts)
    out = out or artifact.default_path("eval", config, parents, sources)
    if done := artifact.reuse(out, kind="eval", config=config, parents=parents, sources=sources):
        progress.say(f"{out}: already evaluated")
        return done
    with artifact.create(
        out, kind="eval", config=config, parents=parents, sources=sources, resumable=True
    ) as draft:
        scorer = backends.load(opened["model"], config)
        journal = Journal(draft.path / _JOURNAL)
        try:
            entries, records = [], []
            for each in loaded:
                started = time.monotonic()
                found = _run_task(config, each, scorer, journal, opened)
                if not found:
                    skipped.append({"task": each.task.label, "reason": "; ".join(each.notes)})
                    continue
                entry = _entry(each, scorer, found)
                entries.append(entry)
                records += found
                draft.timings[f"{each.task.label}_s"] = round(time.monotonic() - started, 3)
                shown = f"{entry['metric']} {entry['value']:.4f}"
                error = f" ± {entry['stderr']:.4f}" if entry["stderr"] is not None else ""
                progress.say(f"{each.task.label}: {shown}{error} (n={entry['n']})")
                progress.event(
                    "task_scored", task=each.task.label, metric=entry["metric"], value=entry["value"]
                )
            if not entries:
                raise DataError(
                    f"no task of '{selection.name}' could be scored: "
                    + "; ".join(f"{s['task']}: {s['reason']}" for s in skipped)
                )
            results = {
                "schema": RESULTS_SCHEMA,
                "model": backends.describe_model(opened),
                "suite": selection.name,
                "limit": selection.limit,
                "identity": identity(scorer),
                "tasks": entries,
                "skipped": skipped,
            }
            _write_json(draft.path / "results.json", results)
            with open(draft.path / "items.jsonl", "w", encoding="utf-8", errors="replace") as file:
                for record in records:
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
        finally:
            journal.close()
            scorer.close()
        (draft.path / _JOURNAL).unlink()
        draft.counts.update(num_tasks=len(entries), num_items=len(records), num_tasks_skipped=len(skipped))
        for entry in entries:
            draft.counts[f"{entry['task']}.{entry['metric']}"] = round(entry["value"], 6)
    return draft.artifact


def identity(scorer: Scorer) -> dict[str, Any]:
    """Everything about the model side that a score depends on."""
    return {
        **scorer.identity(),
        "tokenizer_sha256": getattr(scorer.tokenizer, "sha256", None),
        "template_sha256": backends.template_sha256(scorer.tokenizer),
        "start_token": scorer.start_rule,
        "max_context_tokens": scorer.max_tokens,
    }


def load_task(config: EvalConfig, task: Task, limit: int | None) -> Loaded:
    """Read a task's files, draw its items and shots. DataError for missing files or columns."""
    if task.file is None:
        from pocketphi.evals.tasks.choice import house_items

        items: list[Any] = list(house_items()) if task.name == "house" else []
        kept = pick((q.id for q in items), limit, task.name)
        return Loaded(task, [items[i] for i in kept], {}, None, None, len(items))
    file = require(config.data_dir, task.file)
    rows, unusable = _rows(task, file)
    num_in_file = len(rows) + unusable
    shots: dict[str, list[Any]] = {}
    shots_file = None
    if task.shots:
        same = task.shots_file == task.file
        assert task.shots_file is not None
        shots_file = file if same else require(config.data_dir, task.shots_file)
        pool = rows if same else _rows(task, shots_file)[0]
        shots = _draw(task, pool)
        if same:
            shown = {q.id for group in shots.values() for q in group}
            rows = [q for q in rows if q.id not in shown]
    kept = pick((q.id for q in rows), limit, task.name)
    return Loaded(task, [rows[i] for i in kept], shots, file, shots_file, num_in_file, unusable)


def _open(value: Artifact | Path | str) -> Artifact | Path | str:
    if isinstance(value, Artifact):
        return value
    if isinstance(value, str) and value.startswith(("http://", "https://")):
        return value
    path = Path(value)
    return artifact.load(path) if (path / artifact.MANIFEST).is_file() else path


def _load_tasks(
    config: EvalConfig, selection: Selection, shards: Any
) -> tuple[list[Loaded], list[dict[str, str]]]:
    loaded, skipped = [], []
    for task in selection.tasks:
        if task.kind == "bits":
            if shards is None and not config.texts:
                if selection.strict:
                    raise DataError(
                        "bits: there is neither a shards artifact nor a text to measure",
                        hint="give --shards FOLDER or --set texts=[FILE]",
                    )
                skipped.append({"task": task.label, "reason": "no held-out shards and no texts were given"})
                continue
            loaded.append(Loaded(task, [], {}, None, None, 0))
            continue
        try:
            loaded.append(load_task(config, task, selection.limit))
        except DataError as error:
            # A suite takes what is there and says what is not; changed columns are never passed over.
            missing = "no such folder" in error.message or "no data folder" in error.message
            if selection.strict or not (missing or " here" in error.message):
                raise
            skipped.append({"task": task.label, "reason": f"no data: {task.file}.jsonl.zst"})
    if skipped:
        names = ", ".join(s["task"] for s in skipped)
        progress.say(f"not scored, for want of data: {names}")
    return loaded, skipped


def _rows(task: Task, file: DataFile) -> tuple[list[Any], int]:
    assert task.read is not None
    found, unusable, seen = [], 0, {}  # type: ignore[var-annotated]
    for number, row in enumerate(read(file, task.columns if file.name.startswith(f"{task.file}.") else ())):
        try:
            item = task.read(row, number)
        except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
            raise DataError(
                f"{file.path}: row {number} is not what task '{task.name}' expects: {type(error).__name__}: {error}",
                hint="the file is not the version that this task was written for",
            ) from None
        if item is None:
            unusable += 1
            continue
        # Two rows with one id (a question asked twice) stay two items.
        count = seen[item.id] = seen.get(item.id, 0) + 1
        if count > 1:
            item = type(item)(**{**item.__dict__, "id": f"{item.id}#{count}"})
        found.append(item)
    if not found:
        raise DataError(f"{file.path}: holds no usable row for task '{task.name}'")
    return found, unusable


def _draw(task: Task, pool: list[Question]) -> dict[str, list[Question]]:
    """Return the shots by group; "" holds those of tasks whose groups share them."""
    if not task.shots_by_group:
        if len(pool) <= task.shots:
            raise DataError(
                f"task '{task.name}': {task.shots} shots asked for, {len(pool)} rows to draw from"
            )
        return {"": [pool[i] for i in draw_shots((q.id for q in pool), task.shots, task.name)]}
    groups: dict[str, list[Question]] = {}
    for question in pool:
        groups.setdefault(question.group, []).append(question)
    # The first rows in their order, not a draw: MMLU's development rows are its shots by definition.
    return {name: members[: task.shots] for name, members in groups.items()}


def _run_task(
    config: EvalConfig,
    each: Loaded,
    scorer: Scorer,
    journal: Journal,
    opened: Mapping[str, Any],
) -> list[dict[str, Any]]:
    if each.task.kind == "bits":
        return _run_bits(config, each, scorer, journal, opened.get("shards"))
    if each.task.kind == "choice":
        return _run_choice(each, scorer, journal)
    from pocketphi.evals import generation

    return generation.run_task(config, each, scorer, journal)


def _run_choice(each: Loaded, scorer: Scorer, journal: Journal) -> list[dict[str, Any]]:
    task, label = each.task, each.task.label
    # Group by group, so that the few-shot text of one is computed once.
    order = sorted(range(len(each.items)), key=lambda i: (each.items[i].group, i))
    todo = [i for i in order if journal.get(label, each.items[i].id) is None]
    prepared: dict[str, tuple[str, list[int]]] = {}

    def rendered(index: int) -> tuple[prompts.Rendered, list[prompts.Request]]:
        question: Question = each.items[index]
        if question.group not in prepared:
            shown = each.shots.get(question.group, each.shots.get("", []))
            text = prompts.shots_text(task, shown, question.group)
            prepared[question.group] = (text, prompts.stable_prefix(scorer.tokenizer, text))
        text, shared_ids = prepared[question.group]
        shape = prompts.render(task, question)
        return shape, prompts.requests(
            scorer.tokenizer, shape, text, shared_ids, scorer.start_ids, scorer.max_tokens
        )

    # The same questions twice, in step: one for the model, one to put its answers together again.
    waiting: list[tuple[int, prompts.Rendered, list[prompts.Request]]] = []

    def feed() -> Iterator[list[prompts.Request]]:
        for index in todo:
            shape, found = rendered(index)
            waiting.append((index, shape, found))
            yield found

    done = len(order) - len(todo)
    with progress.bar(label, len(order), unit="items", done=done) as shown:
        scores = scorer.score(chain.from_iterable(feed()))
        finished = 0
        while finished < len(todo):
            first = next(scores)
            index, shape, found = waiting.pop(0)
            parts = [first, *(next(scores) for _ in found[1:])]
            by_option = [None] * len(shape.continuations)  # type: list[Any]
            tokens = [0] * len(shape.continuations)
            for request, part in zip(found, parts):
                for option, score, ids in zip(request.indices, part, request.options):
                    by_option[option], tokens[option] = score, len(ids)
            question = each.items[index]
            record = metrics.choice_record(task, question, by_option, shape.lengths, tokens)
            if question.true is not None:
                record["num_true"] = sum(question.true)
            record["cut_tokens"] = max(r.cut_tokens for r in found)
            journal.add(
                {"task": label, "id": question.id, "group": question.group, **record, **_shown(question)}
            )
            finished += 1
            shown.advance()
    return [journal.records[(label, q.id)] for q in each.items]


def _shown(question: Question) -> dict[str, Any]:
    return {"question": question.text[:600], "options": [o[:200] for o in question.options]}


def _run_bits(
    config: EvalConfig, each: Loaded, scorer: Scorer, journal: Journal, shards: Artifact | None
) -> list[dict[str, Any]]:
    label, found = each.task.label, []
    sources: list[tuple[str, Iterator[tuple[str, str]]]] = []
    if shards is not None:
        sources += [(s, bits.heldout_documents(shards, s, scorer)) for s in bits.heldout_splits(shards)]
    sources += [(p.name, bits.file_documents(p)) for p in config.texts]
    if not sources:
        each.notes.append("the shards hold no held-out split")
    with progress.bar(label, None, unit="tokens") as shown:
        for group, documents in sources:
            counted = 0
            for id_, text in documents:
                record = journal.get(label, id_)
                if record is None:
                    record = {"task": label, "group": group, **bits.document_record(scorer, id_, text)}
                    if not record["num_tokens"]:
                        continue
                    journal.add(record)
                found.append(record)
                counted += record["num_tokens"]
                shown.advance(record["num_tokens"])
                if counted >= config.max_heldout_tokens:
                    break
    return found


def _entry(each: Loaded, scorer: Scorer, records: list[dict[str, Any]]) -> dict[str, Any]:
    task = each.task
    if task.kind == "bits":
        figures = metrics.bits_figures(records)
        groups = sorted({r["group"] for r in records})
        if len(groups) > 1:
            figures["groups"] = {}
            for group in groups:
                part = metrics.bits_figures([r for r in records if r["group"] == group])
                figures["groups"][group] = {k: part[k] for k in ("value", "stderr", "n", "num_tokens")}
        figures["window_rule"], figures["lead_rule"] = bits.WINDOW_RULE, bits.lead_rule(scorer)
        version = prompt_version(task, [figures["window_rule"], figures["lead_rule"]])
        data: dict[str, Any] = {"documents_sha256": _documents_hash(records)}
    else:
        if task.kind == "choice":
            figures = metrics.choice_figures(task, records)
            sample = prompts.render(task, each.items[0])
            version = prompt_version(task, [_sample_shots(each), sample.contexts[0], sample.continuations[0]])
        else:
            from pocketphi.evals import generation

            figures = metrics.generation_figures(task, records)
            version = generation.version(each)
        data = {
            "file": each.file.name if each.file else "house.yaml in the package",
            "file_sha256": each.file.sha256 if each.file else None,
            "shots_file_sha256": each.shots_file.sha256 if each.shots_file else None,
            "num_in_file": each.num_in_file,
            "num_unusable": each.num_unusable,
        }
        figures["num_cut_prompts"] = sum(bool(r.get("cut_tokens")) for r in records)
        if figures["num_cut_prompts"]:
            progress.say(
                f"{task.label}: {figures['num_cut_prompts']} of {len(records)} prompts were cut on the left "
                f"to fit {scorer.max_tokens} tokens"
            )
    return {
        "task": task.label,
        "name": task.name,
        "title": task.title,
        "kind": task.kind,
        "shots": task.shots,
        "format": task.format if task.kind == "choice" else None,
        "task_version": task.version,
        "prompt_version": version,
        "source": task.source,
        **data,
        **{k: _rounded(v) for k, v in figures.items()},
    }


def _sample_shots(each: Loaded) -> str:
    group = each.items[0].group
    return prompts.shots_text(each.task, each.shots.get(group, each.shots.get("", [])), group)


def _documents_hash(records: list[dict[str, Any]]) -> str:
    import hashlib

    return hashlib.sha256("".join(r["text_sha256"] for r in records).encode()).hexdigest()


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return value


def _write_json(path: Path, tree: Any) -> None:
    path.write_text(json.dumps(tree, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", errors="replace")
