"""What an evaluation will cost, before it starts: tokens, time here and on one H100.

Tokens are estimated from the bytes of the prompts (no model or tokenizer is opened); with shared-prefix
reuse a few-shot text counts once per group and a context once per question.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from pocketphi.core.errors import DataError
from pocketphi.evals import generation, prompts
from pocketphi.evals.config import EvalConfig
from pocketphi.evals.suites import select

BYTES_PER_TOKEN = 3.6
# Sustained rates, for the forecast only: float32 matrix products of one core, and an H100 SXM in bf16
# at the share of its peak (989 TFLOP/s) that batched scoring reaches.
CORE_FLOPS = 2.0e10
H100_FLOPS = 3.5e14
# Reading the weights once per generated token bounds decoding.
CPU_BYTES_PER_S = 1.5e10
H100_BYTES_PER_S = 2.5e12
SHIPPED_BYTES_PER_PARAMETER = 0.6
# Time per request that is not arithmetic, measured on the numpy runtime.
REQUEST_S = 0.002


def plan(config: EvalConfig, inputs_plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return flat forecast numbers of an evaluation.

    inputs_plan: `parameters` of the model (4 bytes each), or `model_name` of a shape that ships (as its
    4-bit file); `model_bytes` if known. Files that are missing count nothing and are named in `tasks_without_data`.
    """
    parameters, weight_bytes = _model(inputs_plan)
    selection = select(config)
    read_tokens = written_tokens = saved_tokens = items = requests = 0.0
    without: list[str] = []
    for task in selection.tasks:
        if task.kind == "bits":
            read_tokens += selection.heldout_tokens * max(1, len(config.texts))
            continue
        if task.kind == "long":
            count = min(config.num_long_items, selection.limit or config.num_long_items)
            items += count
            requests += count
            read_tokens += count * (task.length or 0)
            written_tokens += count * min(task.max_new_tokens, config.max_new_tokens) / 2
            continue
        try:
            from pocketphi.evals.loading import load_task

            each = load_task(config, task, selection.limit_of(task))
        except DataError:
            without.append(task.label)
            continue
        items += len(each.items)
        if task.kind == "choice":
            for group in {q.group for q in each.items}:
                shown = each.shots.get(group, each.shots.get("", []))
                size = len(prompts.shots_text(task, shown, group).encode()) / BYTES_PER_TOKEN
                members = sum(q.group == group for q in each.items)
                read_tokens += size
                saved_tokens += size * (members - 1)
            for question in each.items:
                shape = prompts.render(task, question)
                contexts = sum(len(c.encode()) for c in dict.fromkeys(shape.contexts))
                read_tokens += (
                    contexts + sum(len(c.encode()) for c in shape.continuations)
                ) / BYTES_PER_TOKEN
                saved_tokens += (sum(len(c.encode()) for c in shape.contexts) - contexts) / BYTES_PER_TOKEN
                requests += 1 + len(shape.continuations)
        elif task.kind == "conversation":
            # The judge's own tokens are its endpoint's business.
            for prompt in each.items:
                size = sum(len(t.encode()) for t in prompt.meta["turns"]) / BYTES_PER_TOKEN
                answer = min(task.max_new_tokens, config.max_new_tokens) / 2
                read_tokens += 2 * size + answer
                written_tokens += 2 * answer
                requests += 2
        else:
            for prompt in each.items:
                size = len(generation.full_prompt(each, prompt).encode()) / BYTES_PER_TOKEN
                read_tokens += size
                # Most answers end well before the limit.
                written_tokens += min(task.max_new_tokens, config.max_new_tokens) / 2
                requests += 1
    flops = 2 * parameters
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cpu_s = (
        read_tokens * flops / (CORE_FLOPS * cores)
        + written_tokens * max(flops / (CORE_FLOPS * cores), weight_bytes / CPU_BYTES_PER_S)
        + requests * REQUEST_S
    )
    h100_s = read_tokens * flops / H100_FLOPS + written_tokens * 2 * parameters / H100_BYTES_PER_S / 16
    forecast: dict[str, Any] = {
        "wall_s": round(cpu_s, 1),
        "peak_memory_bytes": int(weight_bytes * 1.2 + 300e6),
        "disk_bytes": int(items * 900 + 20_000),
        "items": int(items),
        "tokens_read": int(read_tokens),
        "tokens_saved_by_sharing": int(saved_tokens),
        "tokens_written": int(written_tokens),
        "cpu_hours": round(cpu_s / 3600, 3),
        "h100_hours": round(h100_s / 3600, 4),
        "parameters": int(parameters),
        "model_bytes": int(weight_bytes),
    }
    if without:
        forecast["tasks_without_data"] = ", ".join(without)
    return forecast


def _model(inputs_plan: Mapping[str, Any]) -> tuple[float, float]:
    for source in (inputs_plan, *[v for v in inputs_plan.values() if isinstance(v, Mapping)]):
        if source.get("parameters"):
            parameters = float(source["parameters"])
            return parameters, float(source.get("model_bytes") or parameters * 4)
    from pocketphi.model.config import ModelConfig

    parameters = float(ModelConfig.named(str(inputs_plan.get("model_name", "nano"))).num_parameters)
    # A shape by its name is forecast as the file that ships: 4-bit blocks with their scales.
    return parameters, float(inputs_plan.get("model_bytes") or parameters * SHIPPED_BYTES_PER_PARAMETER)
