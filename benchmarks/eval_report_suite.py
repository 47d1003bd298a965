"""The Phi-3 report's whole suite on a model of phi-3-mini's shape with random weights: forecast and run.

    python benchmarks/eval_report_suite.py --data DATA --out FOLDER [--limit 5] [--layers 32]

Writes FOLDER/model.gguf (Q4_0, 2.2 GB at 32 layers; kept for the next run), forecasts the whole suite and
the `--limit` items of each task, runs those, and prints one row per task: items, tokens and seconds that were
forecast, seconds it took. Scores mean nothing: weights are random. Nothing of Microsoft's is used: the
tokenizer is the embedded model's, its 16,384 ids padded to phi-3-mini's 32,064 rows, so a text is longer in
tokens than with Phi-3's own. MT-bench's judge is the embedded model, behind a local endpoint.
Random weights never stop, so `--max-new-tokens` bounds what is written.
"""

from __future__ import annotations

import argparse
import json
import resource
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from eval_mt_bench_local import serve

from pocketphi import engine, evals
from pocketphi.engine.random_weights import random_weights, shape_named
from pocketphi.engine.weights import Weights
from pocketphi.evals import forecast, tables
from pocketphi.quant.config import QuantConfig
from pocketphi.quant.gguf_writer import write_gguf
from pocketphi.quant.model_file import metadata, source_name, tensor_plans
from pocketphi.tokenizer import Tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", default="phi-3-mini")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--limit", type=int, default=5, help="items of each task")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    embedded = engine.load(engine.resolve(None), num_threads=options.threads)
    file = options.out / "model.gguf"
    shape = shape_named(options.shape)
    if options.layers:
        shape = replace(shape, num_hidden_layers=options.layers)
    if not file.exists():
        write_random(file, random_weights(shape, type="Q4_0"), embedded.tokenizer)
    parameters: dict[str, Any] = {"parameters": shape.num_parameters, "model_bytes": file.stat().st_size}
    whole = evals.EvalConfig(suite="phi3-report", data_dir=options.data)
    show_plan(whole, parameters)

    server = serve(embedded, "pocket.gguf")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    config = replace(
        whole,
        limit=options.limit,
        max_new_tokens=options.max_new_tokens,
        num_threads=options.threads,
        judge_url=f"http://127.0.0.1:{server.server_port}/v1",
        judge_model="pocket.gguf",
        judge_max_tokens=32,
        judge_tries=1,
        timeout_s=3600,
    )
    planned = {row["task"]: row for row in show_plan(config, parameters)}
    started, busy = time.monotonic(), processor_s()
    found = evals.run(config, {"model": file}, out=options.out / "eval")
    total = {"wall_s": round(time.monotonic() - started, 1), "processor_s": round(processor_s() - busy, 1)}
    print(tables.text(found), flush=True)
    for entry in tables.flat(found):
        row = planned[entry["task"]]
        kept = {k: row[k] for k in ("task", "items", "tokens_read", "tokens_written")}
        kept["forecast_s"] = round(row["cpu_hours"] * 3600, 1)
        kept["took_s"] = round(found.manifest["timings"][f"{entry['task']}_s"], 1)
        print(json.dumps(kept))
    print(json.dumps(total))
    server.shutdown()


def show_plan(config: evals.EvalConfig, model: dict[str, Any]) -> list[dict[str, Any]]:
    rates = forecast.machine_rates()
    rows = forecast.by_task(config, model, rates)
    print(tables.planned(rows), flush=True)
    print(json.dumps(forecast.totals(rows, model, rates)), flush=True)
    return rows


def write_random(file: Path, weights: Weights, tokenizer: Tokenizer) -> None:
    """Write random weights as the GGUF file of a model with this tokenizer, its vocabulary padded."""
    shape = weights.config
    types = {"token_embd.weight": "Q4_0", "output.weight": "Q4_0"}
    for n in range(shape.num_hidden_layers):
        types.update(dict.fromkeys((f"blk.{n}.{m}.weight" for m in MATRICES), "Q4_0"))
    plans = tensor_plans(shape, types)
    keys = metadata(QuantConfig(type="q4_0", name="random"), shape, tokenizer, {"weights": "random"})
    write_gguf(file, keys, plans, lambda plan: weights.parts[source_name(plan.name)][0].raw())


MATRICES = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")


def processor_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
