"""lm-eval's own tasks through our back ends (`lm-eval/NAME`) against `lm_eval.simple_evaluate`, item by item.

    python benchmarks/eval_lm_eval_tasks.py MODEL_FOLDER --data DATA [--gguf FILE ...] [--tasks NAME=LIMIT ...]

MODEL_FOLDER is a Hugging Face folder: lm-eval's Hugging Face back end reads it through transformers, ours through
`pocketphi.model`; every `--gguf` is run on the engine. `eval_against_lm_eval.py --folder-from-gguf` makes such a
folder. All sides get the same rows and the same drawn items. Prints one row per task and side: items, items with
equal choices or texts, items with equal figures, largest difference of a log-likelihood, both values.

WikiText is asked of essays (`niah_paul_graham_essays` of DATA) where DATA holds no rows of it: another text, the same
protocol. Needs: lm_eval, transformers, accelerate.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from pocketphi import evals
from pocketphi.evals import data as benchmark_data
from pocketphi.evals.harness import index, rows
from pocketphi.evals.task import split_settings

Row = dict[str, Any]
TASKS = ["arc_easy=100", "arc_easy:shots=3=20", "piqa=100", "winogrande=40", "lambada_openai=40", "mmlu_stem=2",
         "gsm8k_cot=6", "wikitext=3"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--gguf", type=Path, action="append", default=[])
    parser.add_argument("--tasks", nargs="*", default=TASKS, metavar="NAME[:SETTINGS]=LIMIT")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    judge = hugging_face(options.folder, options.batch)
    with tempfile.TemporaryDirectory() as place:
        data = with_essays(options.data, Path(place))
        for text in options.tasks:
            name, _, limit = text.rpartition("=")
            for row in compare(name, int(limit), judge, data, options, Path(place)):
                print(json.dumps(row), flush=True)


def hugging_face(folder: Path, batch: int) -> Any:
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return HFLM(
        pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=batch, device="cpu"
    )


def with_essays(data: Path, place: Path) -> Path:
    """The data folder, seen through one that also holds rows for WikiText."""
    folder = place / "data"
    folder.mkdir()
    for path in data.iterdir():
        (folder / path.name).symlink_to(path.resolve())
    if not (folder / rows.OWN_FOLDER).exists():
        (folder / rows.OWN_FOLDER).mkdir()
        essays = benchmark_data.require(data, "niah_paul_graham_essays")
        pages = [{"page": r["text"]} for r in benchmark_data.read(essays, ("text",))]
        pages = sorted(pages, key=lambda r: len(r["page"]))[8:16]
        text = "".join(json.dumps(p) + "\n" for p in pages)
        (folder / rows.OWN_FOLDER / "wikitext.test.jsonl").write_text(text)
    return folder


def compare(
    name: str, limit: int, judge: Any, data: Path, options: argparse.Namespace, place: Path
) -> list[Row]:
    config = evals.EvalConfig(
        tasks=[f"lm-eval/{name}"], data_dir=data, limit=limit, dtype="float32", num_threads=options.threads,
        max_new_tokens=options.max_new_tokens, batch_size=options.batch,
    )  # fmt: skip
    bare, settings = split_settings(name)
    shots = int(settings["shots"]) if "shots" in settings else None
    runs = {}
    for number, model in enumerate([options.folder, *options.gguf]):
        started = time.monotonic()
        found = evals.run(config, {"model": model}, out=place / f"{name.replace(':', '-')}-{number}")
        items = [json.loads(line) for line in found.file("items.jsonl").read_text().splitlines()]
        (entry,) = json.loads(found.file("results.json").read_text())["tasks"]
        runs[model.name] = entry, items, time.monotonic() - started
    # The items that ours drew, by lm-eval's own numbers.
    samples: dict[str, list[int]] = {}
    for item in runs[options.folder.name][1]:
        samples.setdefault(item["part"], []).append(item["number"])
    started = time.monotonic()
    theirs = judged(bare, shots, samples, judge, data, options.max_new_tokens)
    seconds = time.monotonic() - started
    return [
        {
            "task": f"lm-eval/{name}",
            "side": side,
            **differences(items, entry, theirs, bare),
            "s": round(own_seconds, 1),
            "lm_eval_s": round(seconds, 1),
        }
        for side, (entry, items, own_seconds) in runs.items()
    ]


def judged(
    name: str, shots: int | None, samples: dict[str, list[int]], judge: Any, data: Path, limit: int
) -> Any:
    import lm_eval

    with rows.Supply(evals.EvalConfig(data_dir=data), name, shots).installed():
        return lm_eval.simple_evaluate(
            model=judge, tasks=[name], num_fewshot=shots, samples=samples, bootstrap_iters=0,
            task_manager=index.manager(),
            gen_kwargs={"max_gen_toks": limit} if limit < 256 else None,
        )  # fmt: skip


def differences(items: list[Row], entry: Row, theirs: Any, name: str) -> Row:
    by_item = {(i["part"], i["number"]): i for i in items}
    equal = 0
    largest = 0.0
    seen: set[tuple[str, int]] = set()
    unequal: set[tuple[str, int]] = set()
    for part, samples in theirs["samples"].items():
        for sample in samples:
            key = (part, sample["doc_id"])
            item = by_item[key]
            for metric in sample["metrics"]:
                value = item["metrics"].get(f"{metric},{sample['filter']}")
                # Perplexities are log-likelihoods, of which the largest difference speaks.
                if (
                    value is not None
                    and "perplexity" not in metric
                    and abs(value - float(sample[metric])) > 1e-6
                ):
                    unequal.add(key)
            if key in seen:
                continue
            seen.add(key)
            if "logprobs" in item:
                logprobs = [float(r[0]) for r in sample["filtered_resps"]]
                largest = max(largest, *(abs(a - b) for a, b in zip(item["logprobs"], logprobs)))
                best = [max(range(len(x)), key=x.__getitem__) for x in (item["logprobs"], logprobs)]
                equal += best[0] == best[1]
            elif "loglikelihood" in item:
                found = float(sample["resps"][0][0])
                largest = max(largest, abs(item["loglikelihood"] - found))
                equal += abs(item["loglikelihood"] - found) < 1e-3 * abs(found)
            else:
                equal += item["text"] == sample["resps"][0][0][:4000]
    figures = len(seen) - len(unequal)
    results = theirs["results"][name]
    return {
        "n": len(seen),
        "equal": equal,
        "equal_figures": figures,
        "largest_difference": round(largest, 5),
        "values": {k: round(m["value"], 5) for k, m in entry["metrics"].items()},
        "lm_eval_values": {k: round(float(results[k]), 5) for k in entry["metrics"]},
    }


if __name__ == "__main__":
    main()
