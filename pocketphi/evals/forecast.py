"""What an evaluation will cost, before it starts: tokens, time here and on one H100.

Tokens are estimated from the bytes of the prompts (no model or tokenizer is opened); with shared-prefix
reuse a few-shot text counts once per group and a context once per question. This machine's rates are
measured when the forecast is made (`machine_rates`): on a busy machine it forecasts busy hours.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pocketphi.core import machine
from pocketphi.core.errors import EngineError
from pocketphi.evals import generation, harness, likelihood, prompts
from pocketphi.evals.config import EvalConfig
from pocketphi.evals.data import MissingData
from pocketphi.evals.loading import Loaded, load_task
from pocketphi.evals.suites import Selection, select
from pocketphi.evals.task import Task

# Over the prompts of `phi3-report`: 3.2 with 16,384 ids (pocket), 3.5 with 49,152 (SmolLM2).
BYTES_PER_TOKEN = 3.4
# Shares of the machine's own rates that whole steps of a model reach, prefill of its 8-bit products and
# decode of its memory (docs/experiments.md, 2026-11-23).
PREFILL_SHARE = 0.5
DECODE_SHARE = 0.75
# Of one core, where the native core is missing: products per second and bytes per second of numpy.
CORE_MACS = 1.0e10
CORE_BYTES_PER_S = 1.0e10
# An H100 SXM in bf16 at the share of its peak (989 TFLOP/s) that batched scoring reaches; decode is
# bound by reading the weights, once for H100_BATCH answers.
H100_FLOPS = 3.5e14
H100_BYTES_PER_S = 2.5e12
H100_BATCH = 16
SHIPPED_BYTES_PER_PARAMETER = 0.6


@dataclass
class Cost:
    """Tokens of one task: read, not read again because they are shared, written; `calls` are the sizes of
    the passes in which they are read. reason: why there is nothing to count."""

    label: str
    items: int = 0
    calls: list[float] = field(default_factory=list)
    saved: float = 0.0
    written: float = 0.0
    reason: str = ""

    @property
    def read(self) -> float:
        return sum(self.calls)


def plan(config: EvalConfig, inputs_plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return flat forecast numbers of an evaluation.

    inputs_plan: `parameters` of the model (4 bytes each), or `model_name` of a shape that ships (as its
    4-bit file); `model_bytes` if known. Files that are missing count nothing and are named in `tasks_without_data`.
    """
    rates = machine_rates()
    return totals(by_task(config, inputs_plan, rates), inputs_plan, rates)


def totals(
    rows: Sequence[Mapping[str, Any]], inputs_plan: Mapping[str, Any], rates: tuple[float, float]
) -> dict[str, Any]:
    """Sum what `by_task` returned."""
    parameters, weight_bytes = _model(inputs_plan)
    sums = {k: sum(r[k] for r in rows) for k in rows[0] if k not in ("task", "reason")}
    wall_s = sums["cpu_hours"] * 3600
    forecast: dict[str, Any] = {
        "wall_s": round(wall_s, 1),
        "peak_memory_bytes": int(weight_bytes * 1.2 + 300e6),
        "disk_bytes": int(sums["items"] * 900 + 20_000),
        **{k: round(v, 4) if k.endswith("_hours") else v for k, v in sums.items()},
        "parameters": int(parameters),
        "model_bytes": int(weight_bytes),
        "cpu_products_per_s": int(rates[0]),
        "cpu_weight_bytes_per_s": int(rates[1]),
    }
    if without := [r["task"] for r in rows if r["reason"]]:
        forecast["tasks_without_data"] = ", ".join(without)
    return forecast


def by_task(
    config: EvalConfig, inputs_plan: Mapping[str, Any], rates: tuple[float, float]
) -> list[dict[str, Any]]:
    """Return one row per task of a configuration: items, tokens, hours here (at `machine_rates`) and on one
    H100, and `reason` where a task could not be counted."""
    parameters, weight_bytes = _model(inputs_plan)
    macs_per_s, bytes_per_s = rates
    selection = select(config)
    rows = []
    for task in selection.tasks:
        cost = _cost(config, selection, task)
        # A pass of few tokens takes as long as reading the weights does.
        pass_s = weight_bytes / bytes_per_s
        cpu_s = sum(max(size * parameters / macs_per_s, pass_s) for size in cost.calls)
        cpu_s += cost.written * max(parameters / macs_per_s, pass_s)
        h100_s = cost.read * 2 * parameters / H100_FLOPS
        h100_s += cost.written * 2 * parameters / H100_BYTES_PER_S / H100_BATCH
        rows.append(
            {
                "task": cost.label,
                "items": cost.items,
                "tokens_read": int(cost.read),
                "tokens_saved_by_sharing": int(cost.saved),
                "tokens_written": int(cost.written),
                "cpu_hours": cpu_s / 3600,
                "h100_hours": h100_s / 3600,
                "reason": cost.reason,
            }
        )
    return rows


def machine_rates() -> tuple[float, float]:
    """Return products per second and weight bytes per second that a model can expect of all cores now.

    The native core measures its own instructions and its reads, which takes two seconds; without it (numpy)
    the rates are those of an ordinary core.
    """
    from pocketphi import engine
    from pocketphi.engine.random_weights import random_weights
    from pocketphi.model.config import ModelConfig

    tiny = ModelConfig(vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                       num_attention_heads=1, num_key_value_heads=1)  # fmt: skip
    try:
        model = engine.load(random_weights(tiny), backend="native")
    except EngineError:
        return CORE_MACS * machine.num_cores(), CORE_BYTES_PER_S * machine.num_cores()
    try:
        # The best of three: what a program beside this one took for a moment is not the machine's rate.
        found = [model.backend.probe() for _ in range(3)]  # type: ignore[attr-defined]
    finally:
        model.close()
    macs_per_s, bytes_per_s = (max(f[k] for f in found) for k in ("int8_macs_per_s", "read_bytes_per_s"))
    return PREFILL_SHARE * macs_per_s, DECODE_SHARE * bytes_per_s


def _cost(config: EvalConfig, selection: Selection, task: Task) -> Cost:
    cost = Cost(task.label)
    if task.kind == "bits":
        cost.calls = [float(selection.heldout_tokens)] * max(1, len(config.texts))
        return cost
    if task.kind == "long":
        cost.items = min(config.num_long_items, selection.limit or config.num_long_items)
        cost.calls = [float(task.length or 0)] * cost.items
        cost.written = cost.items * min(task.max_new_tokens, config.max_new_tokens) / 2
        return cost
    try:
        each = load_task(config, task, selection.limit_of(task))
    except MissingData as error:
        cost.reason = f"{error.message} ({error.hint})" if error.hint else error.message
        return cost
    cost.items = len(each.items)
    if each.task.kind == "choice":
        _choice(each, cost)
        return cost
    if each.task.kind == "harness":
        _harness(config, each, cost)
        return cost
    # Most answers end well before the limit.
    answer = min(each.task.max_new_tokens, config.max_new_tokens) / 2
    if each.task.kind == "conversation":
        # The judge's own tokens are its endpoint's business. The first turn is still held at the second.
        for prompt in each.items:
            cost.calls += [_tokens(turn) for turn in prompt.meta["turns"]]
            cost.written += answer * len(prompt.meta["turns"])
        return cost
    _written(each, cost)
    cost.written = answer * cost.items
    return cost


def _choice(each: Loaded, cost: Cost) -> None:
    _shared([likelihood.shots_text(each, q.group) for q in each.items], cost)
    for question in each.items:
        shape = prompts.render(each.task, question)
        contexts = [_tokens(c) for c in dict.fromkeys(shape.contexts)]
        # An option's last token is never read, only looked up.
        options = [size for c in shape.continuations if (size := _tokens(c) - 1) >= 0.5]
        cost.calls += contexts + options
        cost.saved += sum(map(_tokens, shape.contexts)) - sum(contexts)


def _harness(config: EvalConfig, each: Loaded, cost: Cost) -> None:
    """Requests of lm-eval: what a text shares with the one before it is not read again."""
    before = ""
    for item in each.items:
        for request in item.instances:
            text = request.args[0] if isinstance(request.args[0], str) else str(request.args[0])
            same = _tokens(os.path.commonprefix([before, text]))  # noqa: RUF071 (characters are meant)
            cost.calls.append(_tokens(text) - same)
            cost.saved += same
            before = text
            if request.request_type == "loglikelihood" and (size := _tokens(request.args[1]) - 1) >= 0.5:
                cost.calls.append(size)
            if request.request_type == "generate_until":
                cost.written += harness.new_tokens(config, each.defined.tasks[item.part]) / 2


def _written(each: Loaded, cost: Cost) -> None:
    _shared([generation.prefix(each, p) for p in each.items], cost)
    cost.calls += [_tokens(p.prompt) for p in each.items]


def _shared(texts: Sequence[str], cost: Cost) -> None:
    """Count the texts that stand before items, each once."""
    once = [_tokens(text) for text in dict.fromkeys(texts) if text]
    cost.calls += once
    cost.saved += sum(map(_tokens, texts)) - sum(once)


def _tokens(text: str) -> float:
    return len(text.encode()) / BYTES_PER_TOKEN


def _model(inputs_plan: Mapping[str, Any]) -> tuple[float, float]:
    for source in (inputs_plan, *[v for v in inputs_plan.values() if isinstance(v, Mapping)]):
        if source.get("parameters"):
            parameters = float(source["parameters"])
            return parameters, float(source.get("model_bytes") or parameters * 4)
    from pocketphi.model.config import ModelConfig

    parameters = float(ModelConfig.named(str(inputs_plan.get("model_name", "nano"))).num_parameters)
    # A shape by its name is forecast as the file that ships: 4-bit blocks with their scales.
    return parameters, float(inputs_plan.get("model_bytes") or parameters * SHIPPED_BYTES_PER_PARAMETER)
