"""The report stage: gather, answer, draw."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pocketphi import __version__
from pocketphi.core import artifact, progress
from pocketphi.core.artifact import Artifact
from pocketphi.core.errors import DataError, PocketPhiError, UserError
from pocketphi.report import gather, lineage, page
from pocketphi.report.config import ReportConfig

# Inputs in the order of a model's life.
STAGES = ("corpus", "tokenizer", "shards", "train", "sft", "quantize", "eval")
_KIND_OF = {
    "corpus": ("corpus",),
    "tokenizer": ("tokenizer",),
    "shards": ("shards",),
    "train": ("checkpoint",),
    "sft": ("checkpoint",),
    "quantize": ("gguf",),
    "eval": ("eval",),
}


def run(
    config: ReportConfig, inputs: Mapping[str, Artifact | Path | str], *, out: Path | None = None
) -> Artifact:
    """Draw the page of a run; return the `report` artifact.

    inputs: any of corpus, tokenizer, shards, train, sft, quantize, eval; what is missing is left out
    of the page. Files: index.html, the page (it shows wall times, so it does not count for the
    checksum), and figures.json, all figures on it that repeat from run to run.
    Raises DataError when there is nothing to show or an input is of the wrong kind.
    """
    found = {}
    for name in STAGES:
        value = inputs.get(name)
        if value is None:
            continue
        opened = artifact.load(value)
        if opened.kind not in _KIND_OF[name]:
            raise DataError(f"{opened.path}: expected a {_KIND_OF[name][0]} artifact, found {opened.kind}")
        found[name] = opened
    unknown = [n for n in inputs if n not in STAGES]
    if unknown:
        raise UserError(f"the report has no input '{unknown[0]}' (known: {', '.join(STAGES)})")
    if not found:
        raise DataError("nothing to report on: no artifact was given")
    parents = list(found.values())
    out = out or artifact.default_path("report", config, parents)
    if done := artifact.reuse(out, kind="report", config=config, parents=parents):
        progress.say(f"{done.file('index.html')}: already drawn")
        return done
    with artifact.create(out, kind="report", config=config, parents=parents) as draft:
        run_dir = config.run_dir or out.parent
        figures = repeatable_figures(config, found)
        text = json.dumps(figures, indent=1, ensure_ascii=False) + "\n"
        (draft.path / "figures.json").write_text(text, encoding="utf-8", errors="replace")
        figures.update(volatile_figures(config, found, run_dir))
        # Model output may hold lone surrogates; a page may not.
        data = page.render(figures).encode("utf-8", "replace")
        (draft.path / "index.html").write_bytes(data)
        draft.volatile.add("index.html")
        draft.counts["page_bytes"] = len(data)
    progress.say(f"report: {draft.artifact.file('index.html')}")
    return draft.artifact


def repeatable_figures(config: ReportConfig, found: Mapping[str, Artifact]) -> dict[str, Any]:
    """What the page shows that follows from the artifacts alone."""
    figures: dict[str, Any] = {"code_version": __version__}
    if "corpus" in found:
        figures["corpus"] = gather.corpus_figures(found["corpus"])
    train = []
    for name in ("train", "sft"):
        if name in found and (curves := gather.train_figures(found[name])):
            train.append({"name": name, "curves": curves})
    if train:
        figures["train"] = train
    if "eval" in found:
        figures["eval"] = gather.eval_figures(found["eval"])
    last = next((found[n] for n in ("quantize", "sft", "train") if n in found), None)
    if last is not None:
        figures["model"] = _model(found)
        files = [n for n in last.manifest["files"] if n.endswith(".gguf")]
        if files:
            figures["model_file"] = {"name": files[0], **_file(last, files[0])}
        ancestors = [*artifact.lineage(last)]
        figures["chain"] = lineage.chain(ancestors)
        answers, note = _answers(config, last)
        figures["answers"] = answers
        if note:
            figures["answers_note"] = note
        if answers and "corpus" in found and config.max_lineage_bytes:
            texts = [a["text"] for a in answers]
            figures["nearest"] = lineage.nearest_documents(found["corpus"], texts, config.max_lineage_bytes)
    return figures


def volatile_figures(config: ReportConfig, found: Mapping[str, Artifact], run_dir: Path) -> dict[str, Any]:
    """What belongs to this one run: its title, times, speeds and cost."""
    events = gather.run_events(run_dir)
    rows = gather.forecast_figures(run_dir, found)
    seconds = sum(r["actual_s"] or 0 for r in rows)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    title = config.title or run_dir.resolve().name
    figures: dict[str, Any] = {
        "title": title,
        "forecast": rows,
        "cost": {
            "wall_s": seconds,
            "cores": cores,
            "price_per_hour_usd": config.price_per_hour_usd,
            "usd": seconds / 3600 * config.price_per_hour_usd,
            "watts": config.watts,
            "watt_hours": seconds / 3600 * config.watts,
        },
    }
    train = []
    for name in ("train", "sft"):
        if name in found and (curves := gather.train_figures(found[name])):
            train.append({"name": name, "curves": curves, "speed": gather.speed_figures(name, events)})
    if train:
        figures["train"] = train
    return figures


def inputs_of(folder: Path) -> dict[str, Artifact]:
    """Find the artifacts of a run's folder (runs/<recipe>/<stage>).

    UserError when the folder holds none.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    found = {}
    for name in STAGES:
        if (folder / name / artifact.MANIFEST).is_file():
            found[name] = artifact.load(folder / name, verify=False)
    if not found:
        raise UserError(
            f"{folder}: no artifact of a run here (looked for {', '.join(STAGES)})",
            hint="give the folder that `phi recipe run` wrote, such as runs/nano",
        )
    return found


def _model(found: Mapping[str, Artifact]) -> dict[str, Any]:
    for name in ("sft", "train", "quantize"):
        if name in found:
            counts = found[name].counts
            for key in ("num_parameters", "parameters"):
                if counts.get(key):
                    return {"parameters": int(counts[key])}
    for name in ("sft", "train"):
        if name in found and "config.json" in found[name].manifest["files"]:
            from pocketphi.model.config import ModelConfig

            tree = json.loads(found[name].file("config.json").read_text(encoding="utf-8"))
            return {"parameters": ModelConfig.from_hf(tree).num_parameters}
    return {}


def _file(found: Artifact, name: str) -> dict[str, Any]:
    entry = found.manifest["files"][name]
    return {"bytes": entry["bytes"], "sha256": entry["sha256"]}


def _answers(config: ReportConfig, model: Artifact) -> tuple[list[dict[str, Any]], str | None]:
    """The model's answers to the configured prompts, or none and why."""
    if not config.prompts:
        return [], None
    try:
        from pocketphi import engine

        loaded = engine.load(model.path)
    except (PocketPhiError, ImportError, AttributeError) as error:
        note = f"no sample answers: {getattr(error, 'message', error)}"
        progress.say(note)
        return [], note
    answers = []
    with progress.bar("sample answers", len(config.prompts), unit="answers") as shown:
        for prompt in config.prompts:
            ids = loaded.tokenizer.chat([{"role": "user", "content": prompt}], add_generation_prompt=True)
            reply = loaded.generate(ids, max_new_tokens=config.max_new_tokens, temperature=0.0, seed=0)
            answers.append({"prompt": prompt, **_reply(loaded.tokenizer, reply)})
            shown.advance()
    return answers, None


def _reply(tokenizer: Any, reply: Any) -> dict[str, str]:
    text = getattr(reply, "text", None)
    if text is None:
        ids = getattr(reply, "ids", reply)
        text = tokenizer.decode([i for i in ids if i not in tokenizer.stop_ids])
    ended = str(getattr(reply, "stop_reason", getattr(reply, "finish_reason", "")) or "")
    return {"text": text, "ended": ended}
