"""Compare our scores with lm-evaluation-harness, item by item, on the same weights and the same rows.

    python benchmarks/eval_against_lm_eval.py MODEL_FOLDER --data DATA [--gguf FILE] [--limit 40]

MODEL_FOLDER is a Hugging Face folder (lm-eval's own back end reads it through transformers; ours reads
it through `pocketphi.model`); `--gguf` adds a run of ours on the engine, and `--folder-from-gguf` makes
the folder first, by letting transformers dequantise the GGUF file. Prints one row per task: items, equal
choices, equal length-normalised choices, largest difference of a log-likelihood, seconds of each. With
`--engine` on a GGUF file in F32 (`phi quantize FOLDER --type f32`) all three have identical weights, and
`engine_equals_torch` counts the items on which our two back ends choose alike. `--splits` scores every item
again in other cuts (torch in batches of 1 and of 16, the engine in passes of 16 tokens) and counts the items
on which all of them choose as the run they are cuts of.

Independent judge: lm-eval's tasks are taken from its own YAML files; only where the rows come from is
replaced by local files. Needs: lm-eval, transformers, datasets, accelerate.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from pocketphi import engine, evals
from pocketphi.evals import data as benchmark_data
from pocketphi.evals import published
from pocketphi.evals.harness.rows import SOURCES
from pocketphi.evals.loading import load_task
from pocketphi.evals.task import parse_task, pick

Row = dict[str, Any]

# Our task -> (lm-eval's YAML, the data set that it reads)
TASKS: dict[str, tuple[str, tuple[str, str]]] = {
    "arc_easy": ("arc/arc_easy.yaml", ("allenai/ai2_arc", "ARC-Easy")),
    "arc_challenge": ("arc/arc_challenge.yaml", ("allenai/ai2_arc", "ARC-Challenge")),
    "hellaswag": ("hellaswag/hellaswag.yaml", ("Rowan/hellaswag", "")),
    "piqa": ("piqa/piqa.yaml", ("baber/piqa", "")),
    "winogrande": ("winogrande/default.yaml", ("allenai/winogrande", "winogrande_xl")),
    "openbookqa": ("openbookqa/openbookqa.yaml", ("allenai/openbookqa", "main")),
    "boolq": ("super_glue/boolq/default.yaml", ("aps/super_glue", "boolq")),
    "sciq": ("sciq/sciq.yaml", ("allenai/sciq", "")),
    "lambada": ("lambada/lambada_openai.yaml", ("EleutherAI/lambada_openai", "default")),
    "mmlu": ("mmlu/default/mmlu_{subject}.yaml", ("cais/mmlu", "*")),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--folder-from-gguf", action="store_true")
    parser.add_argument("--engine", action="store_true", help="score the GGUF file on the engine too")
    parser.add_argument("--splits", action="store_true", help="score in other batches and passes too")
    parser.add_argument("--limit", type=int, default=40, help="items of each task; 0 takes all")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument(
        "--tasks",
        nargs="*",
        default=list(TASKS),
        metavar="TASK[=LIMIT[:SKIP]]",
        help="in this order; SKIP leaves out what a run with that limit drew",
    )
    parser.add_argument("--shots", type=int, default=0)
    parser.add_argument("--subjects", type=int, default=4, help="MMLU subjects")
    parser.add_argument("--backend", default="auto")
    parser.add_argument(
        "--published",
        nargs="*",
        default=["SmolLM2-135M", "SmolLM2-135M-Instruct"],
        help="columns to print beside",
    )
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    options.limit = options.limit or None
    if options.folder_from_gguf and not (options.folder / "config.json").exists():
        make_folder(options.gguf, options.folder)
    import torch

    torch.set_num_threads(options.threads)
    judge = Judge(options.folder, options.device, options.batch)
    rows = []
    everywhere = options.limit
    for entry in options.tasks:
        name, _, own = entry.partition("=")
        limit, _, skip = own.partition(":")
        options.limit = int(limit) if limit else everywhere
        options.skip = int(skip) if skip else 0
        row = compare_task(name, judge, options)
        rows.append(row)
        print(json.dumps(row), flush=True)
    total: Row = {"items": sum(r["n"] for r in rows)}
    counted = ("equal_choices", "equal_norm", "engine_equal_choices", "engine_equals_torch", *SPLITS)
    for key in counted:
        if all(key in r for r in rows):
            total[key] = sum(r[key] for r in rows)
            total[f"{key}_share"] = round(total[key] / total["items"], 5)
    print(json.dumps(total))


def compare_task(name: str, judge: Judge, options: argparse.Namespace) -> Row:
    config = evals.EvalConfig(
        tasks=[f"{name}:shots={options.shots}" if options.shots else name],
        data_dir=options.data,
        limit=options.limit,
        batch_size=options.batch,
        dtype="float32",
        backend=options.backend,
        num_threads=options.threads,
    )
    task = parse_task(config.tasks[0])
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        place_rows(name, task, config, options, place)
        started = time.monotonic()
        theirs = judge.score(name, place, task, options.shots)
        their_seconds = time.monotonic() - started
        result: Row = {"task": name, "shots": options.shots, "n": len(theirs)}
        by_backend: dict[str, dict[tuple[str, str], Row]] = {}
        for label, model in (("torch", options.folder), ("engine", options.gguf)):
            if model is None or (label == "engine" and not options.engine):
                continue
            here = evals.EvalConfig(**{**vars(config), "data_dir": place, "limit": None})
            started = time.monotonic()
            found = evals.run(here, {"model": model}, out=place / f"out-{label}")
            ours = [json.loads(line) for line in found.file("items.jsonl").read_text().splitlines()]
            # `task_s` leaves out loading the model, as the judge's time does.
            seconds = found.manifest["timings"][f"{task.label}_s"]
            (entry,) = json.loads(found.file("results.json").read_text())["tasks"]
            by_id = by_backend[label] = {(o["group"], o["id"]): o for o in ours}
            assert len(by_id) == len(theirs), (len(by_id), len(theirs))
            figures = differences(ours, theirs, name)
            if label == "torch":
                result.update(figures)
                result.update({k: round(entry[k], 4) for k in ("value", "stderr")}, metric=entry["metric"])
                for cell in published.cells(entry, options.published):
                    words = f" ({cell.remark})" if cell.remark else ""
                    result[f"published {cell.model}"] = f"{cell.score:g}%{words}"
            else:
                result.update({f"engine_{k}": v for k, v in figures.items()})
            result[f"{label}_s"] = round(seconds, 1)
        if len(by_backend) == 2:
            pairs = [(by_backend["torch"][key], by_backend["engine"][key]) for key in by_backend["torch"]]
            result["engine_equals_torch"] = sum(choice(a) == choice(b) for a, b in pairs)
            result["engine_from_torch"] = round(
                max(abs(x - y) for a, b in pairs for x, y in zip(a["logprobs"], b["logprobs"])), 5
            )
        if options.splits:
            for label, (back_end, settings) in SPLITS.items():
                if back_end not in by_backend:
                    continue
                here = evals.EvalConfig(**{**vars(config), "data_dir": place, "limit": None, **settings})
                with passes_of(16) if back_end == "engine" else nullcontext():
                    model = options.gguf if back_end == "engine" else options.folder
                    found = evals.run(here, {"model": model}, out=place / f"out-{label}")
                ours = [json.loads(line) for line in found.file("items.jsonl").read_text().splitlines()]
                whole = by_backend[back_end]
                result[label] = sum(choice(o) == choice(whole[(o["group"], o["id"])]) for o in ours)
        result["lm_eval_s"] = round(their_seconds, 1)
    return result


# Other cuts of the same work: the back end, and what is set differently.
SPLITS: dict[str, tuple[str, Row]] = {
    "torch_batch_1": ("torch", {"batch_size": 1}),
    "torch_batch_16": ("torch", {"batch_size": 16}),
    "engine_passes_of_16": ("engine", {}),
}


def choice(item: Row) -> tuple[Any, Any]:
    return item["pred"], item.get("pred_norm")


@contextmanager
def passes_of(size: int) -> Iterator[None]:
    """Let the engine read what it is given in passes of `size` tokens."""
    import numpy as np

    whole = engine.load

    def in_pieces(*arguments: Any, **more: Any) -> engine.Engine:
        loaded = whole(*arguments, **more)
        forward = loaded.backend.forward

        def cut(session: Any, ids: Any, want: Any = "last") -> Any:
            rows: list[Any] = [forward(session, ids[i : i + size], want) for i in range(0, len(ids), size)]
            return np.concatenate(rows) if want == "all" else rows[-1]

        loaded.backend.forward = cut  # type: ignore[method-assign]
        return loaded

    engine.load = in_pieces
    try:
        yield
    finally:
        engine.load = whole


def place_rows(
    name: str, task: Any, config: evals.EvalConfig, options: argparse.Namespace, place: Path
) -> None:
    """Write the drawn rows, and those the shots come from, into a folder that both sides read."""
    source = benchmark_data.require(options.data, task.file or "")
    raw = list(benchmark_data.read(source, ()))
    if name == "mmlu":
        # All subjects weigh alike here; the judge knows one task per subject.
        subjects = sorted({q.group for q in load_task(config, task, None).items})[: options.subjects]
        kept = [i for i, r in enumerate(raw) if r["subject"] in subjects]
        kept = [kept[i] for i in drawn([str(i) for i in kept], options, name)]
        write(place / f"{task.file}.jsonl", [raw[i] for i in kept])
        write(
            place / "mmlu.dev.jsonl",
            list(benchmark_data.read(benchmark_data.require(options.data, "mmlu.dev"), ())),
        )
        return
    everything = load_task(config, task, None).items
    if task.shots_file == task.file and task.shots:
        raise SystemExit(f"{name}: shots come from the scored rows, the judge cannot draw them")
    chosen = drawn([q.id for q in everything], options, task.name)
    write(place / f"{task.file}.jsonl", [raw[i] for i in chosen])
    if task.shots and task.shots_file:
        write(
            place / f"{task.shots_file}.jsonl",
            list(benchmark_data.read(benchmark_data.require(options.data, task.shots_file), ())),
        )


def drawn(ids: list[str], options: argparse.Namespace, salt: str) -> list[int]:
    """The positions of `limit` items after the first `skip` of the draw: a larger draw holds a smaller one."""
    skip = getattr(options, "skip", 0)
    before = set(pick(ids, skip, salt))
    return [i for i in pick(ids, options.limit and options.limit + skip, salt) if i not in before]


def differences(ours: list[Row], theirs: list[Row], name: str) -> Row:
    if name == "mmlu":
        order = sorted(range(len(ours)), key=lambda i: (ours[i]["group"], i))
        ours = [ours[i] for i in order]
    equal = equal_norm = 0
    largest = 0.0
    unequal = []
    for a, b in zip(ours, theirs):
        logprobs = (
            [float(r[0]) for r in b["filtered_resps"]]
            if name != "lambada"
            else [float(b["filtered_resps"][0][0])]
        )
        largest = max(largest, *(abs(x - y) for x, y in zip(a["logprobs"], logprobs)))
        if name == "lambada":
            chosen = 0 if b["acc"] else -1
            equal += a["pred"] == chosen
            equal_norm += 1
            continue
        chosen = max(range(len(logprobs)), key=logprobs.__getitem__)
        equal += a["pred"] == chosen
        if a["pred"] != chosen:
            unequal.append(round(a["margin"], 5))
        equal_norm += a["correct_norm"] == int(b["acc_norm"]) if "acc_norm" in b else 1
    accuracy = sum(o["correct"] for o in ours) / len(ours)
    return {
        "accuracy": round(accuracy, 4),
        "lm_eval_accuracy": round(sum(float(t["acc"]) for t in theirs) / len(theirs), 4),
        "equal_choices": equal,
        "equal_norm": equal_norm,
        "largest_difference": round(largest, 5),
        "margins_of_unequal": unequal,
    }


class Judge:
    """lm-eval's Hugging Face back end on the folder."""

    def __init__(self, folder: Path, device: str, batch: int) -> None:
        import torch
        from lm_eval.models.huggingface import HFLM
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, device=device)

    def score(self, name: str, place: Path, task: Any, shots: int) -> list[Row]:
        import lm_eval
        from lm_eval.tasks import TaskManager

        yaml_name, source = TASKS[name]
        convert = SOURCES[source].row
        home = Path(lm_eval.__file__).parent / "tasks"
        configs = place / "lm_eval"
        configs.mkdir()
        rows = list(benchmark_data.read(benchmark_data.require(place, task.file), ()))
        groups: dict[str, list[Row]] = {}
        for row in rows:
            groups.setdefault(row.get("subject", "") if name == "mmlu" else "", []).append(row)
        names = []
        for group in sorted(groups):
            own = f"local_{name}_{group}" if group else f"local_{name}"
            names.append(own)
            files = {}
            write(configs / f"{own}.jsonl", [convert(r) for r in groups[group]])
            splits = ("test", "validation")
            for split in splits:
                files[split] = str(configs / f"{own}.jsonl")
            if name == "mmlu":
                dev = [
                    convert(r)
                    for r in benchmark_data.read(benchmark_data.require(place, "mmlu.dev"), ())
                    if r["subject"] == group
                ]
                write(configs / f"{own}.dev.jsonl", dev)
                files["dev"] = str(configs / f"{own}.dev.jsonl")
            lines = [
                f"include: {home / yaml_name.format(subject=group)}",
                f"task: {own}",
                "tag: null",
                "dataset_path: json",
                "dataset_name: null",
                "training_split: null",
                f"dataset_kwargs: {json.dumps({'data_files': files})}",
            ]
            (configs / f"{own}.yaml").write_text("\n".join(lines) + "\n")
        # Our files include lm-eval's by their paths; indexing its thousands of others takes half a minute.
        manager = TaskManager(include_path=str(configs), include_defaults=False)
        found = lm_eval.simple_evaluate(
            model=self.model,
            tasks=names,
            num_fewshot=shots or 0,
            task_manager=manager,
            log_samples=True,
            bootstrap_iters=0,
        )
        assert found is not None
        return [s for own in names for s in sorted(found["samples"][own], key=lambda s: s["doc_id"])]


def make_folder(gguf: Path, folder: Path) -> None:
    """Let transformers dequantise a GGUF file into a Hugging Face folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def write(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


if __name__ == "__main__":
    sys.exit(main())
