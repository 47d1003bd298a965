"""The evaluation stage: tasks in, results.json and items.jsonl out, resumable item by item."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pocketphi.core import artifact, progress
from pocketphi.core.artifact import Artifact
from pocketphi.core.errors import DataError
from pocketphi.evals import (
    backends,
    bits,
    contamination,
    conversation,
    generation,
    harness,
    likelihood,
    longcontext,
    metrics,
    prompts,
    tables,
)
from pocketphi.evals import judge as judges
from pocketphi.evals.backends.base import Scorer, prompt_ids
from pocketphi.evals.config import EvalConfig
from pocketphi.evals.data import MissingData
from pocketphi.evals.journal import Journal
from pocketphi.evals.judge import Judge, JudgeConfig
from pocketphi.evals.loading import Loaded, load_task
from pocketphi.evals.suites import Selection, select
from pocketphi.evals.task import prompt_version

RESULTS_SCHEMA = 1
_JOURNAL = "items.partial.jsonl"


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
    corpora = contamination.corpora_of(opened["model"], opened.get("corpus")) if config.contamination else []
    parents = [v for v in opened.values() if isinstance(v, Artifact)]
    parents += [c for c in corpora if c.checksum not in {p.checksum for p in parents}]
    sources: list[Path | str] = [v for v in opened.values() if not isinstance(v, Artifact)]
    loaded, skipped = _load_tasks(config, selection, opened.get("shards"))
    sources += sorted({f.path for each in loaded for f in each.files})
    sources += list(config.texts)
    out = out or artifact.default_path("eval", config, parents, sources)
    if done := artifact.reuse(out, kind="eval", config=config, parents=parents, sources=sources):
        progress.say(f"{out}: already evaluated")
        return done
    with artifact.create(
        out, kind="eval", config=config, parents=parents, sources=sources, resumable=True
    ) as draft:
        judge = _judge(config) if any(e.task.kind == "conversation" for e in loaded) else None
        scorer = backends.load(opened["model"], config)
        journal = Journal(draft.path / _JOURNAL)
        try:
            scored: list[tuple[Loaded, dict[str, Any], list[dict[str, Any]]]] = []
            for each in loaded:
                started = time.monotonic()
                found = _run_task(config, selection, each, scorer, journal, opened, judge)
                if not found:
                    skipped.append({"task": each.task.label, "reason": "; ".join(each.notes)})
                    continue
                entry = _entry(config, each, scorer, found, judge)
                scored.append((each, entry, found))
                draft.timings[f"{each.task.label}_s"] = round(time.monotonic() - started, 3)
                shown = f"{entry['metric']} {entry['value']:.4f}"
                error = f" ± {entry['stderr']:.4f}" if entry["stderr"] is not None else ""
                progress.say(f"{each.task.label}: {shown}{error} (n={entry['n']})")
                progress.event(
                    "task_scored", task=each.task.label, metric=entry["metric"], value=entry["value"]
                )
            if not scored:
                raise DataError(
                    f"no task of '{selection.name}' could be scored: "
                    + "; ".join(f"{s['task']}: {s['reason']}" for s in skipped)
                )
            checked = _contamination(config, corpora, scored)
            entries = [entry for _, entry, _ in scored]
            records = [record for _, _, found in scored for record in found]
            results = {
                "schema": RESULTS_SCHEMA,
                "model": backends.describe_model(opened),
                "suite": selection.name,
                "limit": selection.limit,
                "identity": identity(scorer),
                "contamination": checked,
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


def _contamination(config: EvalConfig, corpora: list[Artifact], scored: Any) -> dict[str, Any]:
    if not config.contamination:
        return {"checked": False, "reason": "switched off (contamination: false)"}
    if not corpora:
        return {"checked": False, "reason": "the corpus that made the model is not at hand (--corpus FOLDER)"}
    checked = contamination.annotate(corpora, scored)
    for _, entry, _ in scored:
        if entry.get("num_seen_in_corpus"):
            progress.say(f"{entry['task']}: {tables.contamination_words(entry)}")
    return checked


def _judge(config: EvalConfig) -> Judge:
    return judges.load(
        JudgeConfig(
            judge_url=config.judge_url,
            judge_model=config.judge_model,
            judge_key_env=config.judge_key_env,
            judge_tries=config.judge_tries,
            judge_max_tokens=config.judge_max_tokens,
            data_dir=config.data_dir,
            parallel=config.batch_size,
            timeout_s=config.timeout_s,
        )
    )


def identity(scorer: Scorer) -> dict[str, Any]:
    """Everything about the model side that a score depends on."""
    return {
        **scorer.identity(),
        "tokenizer_sha256": getattr(scorer.tokenizer, "sha256", None),
        "template_sha256": backends.template_sha256(scorer.tokenizer),
        "start_token": scorer.start_rule,
        "max_context_tokens": scorer.max_tokens,
    }


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
        if task.kind == "long":
            # Made when the model is open: a prompt fills its length in the model's own tokens.
            loaded.append(Loaded(task, [], {}, None, None, 0))
            continue
        if task.kind == "conversation" and not config.judge_url and not selection.strict:
            skipped.append({"task": task.label, "reason": "no judge was named (judge_url, judge_model)"})
            continue
        try:
            loaded.append(load_task(config, task, selection.limit_of(task)))
        except MissingData as error:
            # A suite takes what is there and says what is not; changed columns are never passed over.
            if selection.strict:
                raise
            reason = f"no data: {task.file}.jsonl.zst" if task.file else error.message
            if config.hub or task.gated:
                reason += f" ({'; '.join(filter(None, (error.message if config.hub else '', task.gated)))})"
            skipped.append({"task": task.label, "reason": reason})
    if skipped:
        names = ", ".join(s["task"] for s in skipped)
        progress.say(f"not scored, for want of data or a judge: {names}")
    return loaded, skipped


def _run_task(
    config: EvalConfig,
    selection: Selection,
    each: Loaded,
    scorer: Scorer,
    journal: Journal,
    opened: Mapping[str, Any],
    judge: Judge | None,
) -> list[dict[str, Any]]:
    if each.task.kind == "bits":
        return _run_bits(config, selection.heldout_tokens, each, scorer, journal, opened.get("shards"))
    if each.task.kind == "long":
        if (each.task.length or 0) > scorer.max_tokens:
            each.notes.append(f"{each.task.length} tokens are more than the model's {scorer.max_tokens}")
            return []
        around = 0
        if scorer.tokenizer is not None:
            around = len(prompt_ids(scorer.tokenizer, scorer.start_ids, "", config.chat))
        count = min(config.num_long_items, config.limit or config.num_long_items)
        each.items = longcontext.build(each.task, scorer.tokenizer, around, count)
    if each.task.kind == "choice":
        return likelihood.run_task(each, scorer, journal)
    if each.task.kind == "harness":
        return harness.run_task(config, each, scorer, journal)
    if each.task.kind == "conversation":
        assert judge is not None
        return conversation.run_task(config, each, scorer, judge, journal)
    return generation.run_task(config, each, scorer, journal)


def _run_bits(
    config: EvalConfig,
    most_tokens: int,
    each: Loaded,
    scorer: Scorer,
    journal: Journal,
    shards: Artifact | None,
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
                if counted >= most_tokens:
                    break
    return found


def _entry(
    config: EvalConfig, each: Loaded, scorer: Scorer, records: list[dict[str, Any]], judge: Judge | None
) -> dict[str, Any]:
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
            version = prompt_version(
                task,
                [
                    likelihood.shots_text(each, each.items[0].group),
                    sample.contexts[0],
                    sample.continuations[0],
                ],
            )
        elif task.kind == "harness":
            figures, version = harness.figures(each, records), harness.version(each)
        elif task.kind == "conversation":
            assert judge is not None
            figures = {**metrics.conversation_figures(records), **judge.identity(records)}
            figures["max_turn_tokens"] = min(task.max_new_tokens, config.max_new_tokens)
            version = prompt_version(task, each.items[0].meta["turns"])
        else:
            figures = metrics.generation_figures(task, records)
            figures["chat"] = config.chat
            figures["max_new_tokens"] = min(task.max_new_tokens, config.max_new_tokens)
            if task.kind == "long":
                figures["length"] = task.length
                version = prompt_version(task, longcontext.sample(task))
            else:
                version = generation.version(each)
        data = {
            "file": each.file.name if each.file else task.source,
            "file_sha256": each.file.sha256 if each.file else None,
            "shots_file_sha256": each.shots_file.sha256 if each.shots_file else None,
            "rows_sha256": each.rows_sha256,
            "shots_sha256": each.shots_sha256,
            "hub": each.file.origin if each.file else None,
            "num_in_file": each.num_in_file,
            "num_unusable": each.num_unusable,
        }
        if task.kind == "harness":
            data.update(harness.about(config, each))
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
