"""Running lm-eval's requests on our back ends, and counting as lm-eval counts."""

from __future__ import annotations

import json
import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pocketphi.core import progress
from pocketphi.core.errors import DataError, EngineError, UserError
from pocketphi.evals import likelihood, metrics, prompts
from pocketphi.evals.backends.base import Reply, Scorer
from pocketphi.evals.config import EvalConfig
from pocketphi.evals.data import text_sha256
from pocketphi.evals.harness.build import DEFAULT_NEW_TOKENS, Defined, Item, guarded
from pocketphi.evals.journal import Journal
from pocketphi.evals.loading import Loaded
from pocketphi.evals.task import Task, prompt_version

_KEPT_CHARS = 4000
_LIMIT_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_RESAMPLES = 1000


def run_task(config: EvalConfig, each: Loaded, scorer: Scorer, journal: Journal) -> list[dict[str, Any]]:
    """Answer every request that the journal does not hold; return all records in order, with lm-eval's
    figures of each item. EngineError where a back end cannot do what lm-eval asks for."""
    label, defined = each.task.label, each.defined
    todo = [item for item in each.items if journal.get(label, item.id) is None]
    with progress.bar(label, len(each.items), unit="items", done=len(each.items) - len(todo)) as shown:
        for part in defined.tasks:
            mine = [item for item in todo if item.part == part]
            limit = new_tokens(config, defined.tasks[part])
            streams = (
                _likelihoods(mine, scorer, each.task.name),
                _replies(config, mine, scorer, limit, defined.tasks[part]),
                _rolling(mine, scorer, each.task.name),
            )
            for item, (scores, tokens, cut), replies, sums in zip(mine, *streams):
                answers = {
                    "loglikelihood": [[s.logprob, s.greedy] for s in scores],
                    "generate_until": [r.text for r in replies],
                    "loglikelihood_rolling": sums,
                }
                record = {"task": label, "id": item.id, "group": item.group, "number": item.number}
                record["answers"] = {k: v for k, v in answers.items() if v}
                record["num_option_tokens"] = tokens
                record["cut_tokens"] = max([cut, *(r.cut_tokens for r in replies)])
                if replies:
                    record["ended"] = replies[0].ended
                    record["num_tokens"] = sum(r.num_tokens for r in replies)
                record["prompt_sha256"] = _prompt_sha256(item)
                journal.add(record)
                shown.advance()
    kept = [journal.records[(label, item.id)] for item in each.items]
    with guarded(each.task.name, hub=defined.hub):
        defined.outcomes = _outcomes(each.items, kept, defined)
    metric = _primary(each.task, defined)
    return [_record(item, record, defined, metric) for item, record in zip(each.items, kept)]


def new_tokens(config: EvalConfig, theirs: Any) -> int:
    """Room for an answer: what lm-eval's definition says, and no more than the configuration allows."""
    settings = theirs.get_config("generation_kwargs") or {}
    own = next((int(settings[n]) for n in _LIMIT_NAMES if settings.get(n)), DEFAULT_NEW_TOKENS)
    return min(own, config.max_new_tokens)


def _likelihoods(
    items: Sequence[Item], scorer: Scorer, name: str
) -> Iterator[tuple[list[Any], list[int], int]]:
    asking = [item for item in items if item.asked("loglikelihood")]
    if scorer.tokenizer is None and any(not i.args[0] for t in asking for i in t.asked("loglikelihood")):
        raise EngineError(
            f"{name}: some texts stand at the very beginning, and an endpoint gives no log-probability there",
            hint="a GGUF file or a Hugging Face folder gives them",
        )
    scores = likelihood.scores((("", _rendered(item)) for item in asking), scorer)
    for item in items:
        if not item.asked("loglikelihood"):
            yield [], [], 0
            continue
        try:
            yield next(scores)
        except EngineError as error:
            if scorer.tokenizer is not None:
                raise
            # choices_by=writing, which a server without log-probabilities is told of, is not for these.
            kept = None if "choices_by" in (error.hint or "") else error.hint
            need = "an endpoint must serve /completions with echo and logprobs, as vLLM does"
            raise EngineError(
                f"{name} asks for log-likelihoods: {error.message}",
                hint="; ".join(x for x in (need, kept) if x),
            ) from None


def _rendered(item: Item) -> prompts.Rendered:
    pairs = [i.args for i in item.asked("loglikelihood")]
    return prompts.Rendered(tuple(p[0] for p in pairs), tuple(p[1] for p in pairs), ())


def _replies(
    config: EvalConfig, items: Sequence[Item], scorer: Scorer, limit: int, theirs: Any
) -> Iterator[list[Reply]]:
    stop = (theirs.get_config("generation_kwargs") or {}).get("until") or []
    stop = [stop] if isinstance(stop, str) else list(stop)
    texts = (i.args[0] for item in items for i in item.asked("generate_until"))
    found = scorer.complete(texts, chat=config.chat, max_new_tokens=limit, stop=stop)
    blank = scorer.tokenizer is not None and _puts_a_blank(scorer.tokenizer)
    for item in items:
        replies = [next(found) for _ in item.asked("generate_until")]
        # lm-eval decodes an answer as a text of its own, without the blank that goes on from the prompt.
        yield [replace(r, text=r.text.removeprefix(" ")) for r in replies] if blank else replies


def _puts_a_blank(tokenizer: Any) -> bool:
    """Whether encoding puts a blank before a text, which decoding takes away again (SentencePiece)."""
    decoder = tokenizer.stream_decoder(continuing=True)
    return (decoder.push(int(tokenizer.encode("a")[0])) + decoder.flush()).startswith(" ")


def _rolling(items: Sequence[Item], scorer: Scorer, name: str) -> Iterator[list[float]]:
    for item in items:
        yield [rolling(scorer, i.args[0], name) for i in item.asked("loglikelihood_rolling")]


def rolling(scorer: Scorer, text: str, name: str) -> float:
    """Log-probability (nats) of a whole text, in lm-eval's windows.

    Unlike lm-eval's back end, which predicts the start token from itself where a tokenizer adds one, only
    the text is predicted.
    """
    if scorer.tokenizer is None:
        raise EngineError(
            f"{name}: an endpoint gives no log-probabilities of a whole text",
            hint="a GGUF file or a Hugging Face folder gives them",
        )
    from lm_eval.utils import get_rolling_token_windows

    ids = [int(i) for i in scorer.tokenizer.encode(text)]
    lead = scorer.start_ids[0] if scorer.start_ids else prompts.lead_id(scorer.tokenizer)
    total = 0.0
    for context, predicted in get_rolling_token_windows(ids, lead, scorer.max_tokens, 1):
        logprobs = scorer.rolling([*context, predicted[-1]])
        total += float(logprobs[-len(predicted) :].sum())
    return total


def _outcomes(
    items: Sequence[Item], records: Sequence[Mapping[str, Any]], defined: Defined
) -> dict[str, dict[tuple[str, str], Any]]:
    """lm-eval's figures of every item: its filters over all answers, then `process_results`."""
    found: dict[str, dict[tuple[str, str], Any]] = {item.id: {} for item in items}
    for part, theirs in defined.tasks.items():
        mine = [(item, record) for item, record in zip(items, records) if item.part == part]
        if not mine:
            continue
        for item, record in mine:
            waiting = {k: deque(v) for k, v in record["answers"].items()}
            for instance in item.instances:
                answer = waiting[instance.request_type].popleft()
                answer = tuple(answer) if isinstance(answer, list) else answer
                # Greedy answers do not differ from one repetition to the next.
                instance.resps = [answer] * max(1, int(instance.repeats or 1))
                instance.filtered_resps = {}
        theirs._instances = [instance for item, _ in mine for instance in item.instances]
        theirs.apply_filters()
        for filter_ in mine[0][0].instances[0].filtered_resps:
            for item, _ in mine:
                answers = [i.filtered_resps[filter_] for i in item.instances]
                for metric, value in theirs.process_results(item.doc, answers).items():
                    found[item.id][(metric, filter_)] = value
    return found


def _primary(task: Task, defined: Defined) -> tuple[str, str]:
    """Which of lm-eval's figures is the task's value: (metric, filter).

    The first that is a mean over items, else the first; of a group the first that it aggregates. The
    settings `metric` and `filter` say otherwise.
    """
    known = list(dict.fromkeys(key for found in defined.outcomes.values() for key in found))
    wanted, filter_ = task.settings.get("metric"), task.settings.get("filter")
    if defined.group is not None:
        weighed = {c.metric: c.filter_list for c in defined.group.aggregate_metric_list}
        known = [k for m in weighed for k in known if k[0] == m and (not weighed[m] or k[1] in weighed[m])]
    fitting = [k for k in known if wanted in (None, k[0]) and filter_ in (None, k[1])]
    if not fitting:
        there = ", ".join(f"metric={m},filter={f}" for m, f in known)
        raise UserError(f"{task.name}: lm-eval gives no such figure (it gives {there or 'none'})")
    theirs = next(iter(defined.tasks.values()))
    means = [k for k in fitting if _is_mean(theirs, k[0])]
    return (means or fitting)[0]


def figures(each: Loaded, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of a task from the items that `records` name, aggregated by lm-eval's rules.

    `metrics` holds all by "metric,filter", each with value, standard error and direction. Standard errors of
    means are those of independent items; others are bootstrapped over items (1000 draws, fixed seed).
    """
    with guarded(each.task.name, hub=each.defined.hub):
        return _figures(each.task, each.defined, records)


def _figures(task: Task, defined: Defined, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    metric, filter_ = _primary(task, defined)
    scored: dict[str, dict[str, Any]] = {}
    for part, theirs in defined.tasks.items():
        ids = [r["id"] for r in records if r["part"] == part]
        if ids:
            scored[part] = _aggregated(theirs, [defined.outcomes[i] for i in ids])
    if defined.group is None:
        whole = next(iter(scored.values()))
    else:
        whole = defined.group.aggregate(scored)
    better = next(iter(defined.tasks.values())).higher_is_better()
    found: dict[str, Any] = {"n": len(records), "metric": metric, "filter": filter_}
    value, stderr = _pair(whole, metric, filter_)
    if value is None:
        raise DataError(f"{task.name}: lm-eval gives no value of {metric} ({filter_})")
    found.update(value=value, stderr=stderr, higher_is_better=bool(better.get(metric, True)))
    found["metrics"] = {}
    for key in whole:
        name, comma, by = key.partition(",")
        if comma and not name.endswith("_stderr"):
            one, error = _pair(whole, name, by)
            direction = bool(better.get(name, True))
            found["metrics"][key] = {"value": one, "stderr": error, "higher_is_better": direction}
    found["paired"] = all("value" in r for r in records)
    options = [len(r["options"]) for r in records if r.get("options")]
    if len(options) == len(records) and metric.startswith("acc"):
        found["chance"] = float(np.mean([1 / n for n in options]))
    if any("ended" in r for r in records):
        found["share_unreadable"] = float(np.mean([r.get("answer") == "[invalid]" for r in records]))
        found["share_cut_at_limit"] = float(np.mean([r.get("ended") == "length" for r in records]))
    if defined.group is not None:
        found["groups"] = {}
        for part, its in scored.items():
            value, stderr = _pair(its, metric, filter_)
            found["groups"][part] = {"value": value, "stderr": stderr, "n": its["sample_len"]}
        for sub in defined.group.get_all_groups():
            value, stderr = _pair(sub.aggregate(scored), metric, filter_)
            if value is not None:
                members = [t.task_name for t in sub.get_all_tasks() if t.task_name in scored]
                count = sum(scored[m]["sample_len"] for m in members)
                found["groups"][sub.name] = {"value": value, "stderr": stderr, "n": count}
    return found


def about(config: EvalConfig, each: Loaded) -> dict[str, Any]:
    """What an entry of results.json says of lm-eval's side: its version, definition and data sets."""
    from pocketphi.evals.harness.index import library_version

    defined = each.defined
    found: dict[str, Any] = {
        "lm_eval": library_version(),
        "definition_sha256": defined.definition_sha256,
        "versions": {name: str(theirs.VERSION) for name, theirs in defined.tasks.items()},
    }
    if any(t.OUTPUT_TYPE == "generate_until" for t in defined.tasks.values()):
        found["chat"] = config.chat
        found["max_new_tokens"] = max(new_tokens(config, t) for t in defined.tasks.values())
    origins = {part: g.origin for part, g in defined.supply.given.items() if g.origin is not None}
    if origins:
        found["hub"] = origins
    return found


def version(each: Loaded) -> str:
    """The prompt version: settings, lm-eval's definition and the first item's whole requests."""
    sample = [list(map(str, i.args)) for i in each.items[0].instances]
    return prompt_version(each.task, [each.defined.definition_sha256, sample])


def _aggregated(theirs: Any, outcomes: Sequence[Mapping[tuple[str, str], Any]]) -> dict[str, Any]:
    """lm-eval's figures of one of its tasks, in the shape that its groups aggregate."""
    by_key: dict[tuple[str, str], list[Any]] = {}
    for outcome in outcomes:
        for key, value in outcome.items():
            by_key.setdefault(key, []).append(value)
    found: dict[str, Any] = {"sample_len": max(len(v) for v in by_key.values())}
    for (metric, filter_), values in by_key.items():
        aggregate = _aggregation(theirs, metric)
        try:
            found[f"{metric},{filter_}"] = float(aggregate(values))
        except OverflowError:
            # exp() of a text that the model finds impossible.
            found[f"{metric},{filter_}"] = math.inf
        found[f"{metric}_stderr,{filter_}"] = _stderr(aggregate, values)
    return found


def _aggregation(theirs: Any, metric: str) -> Callable[[Sequence[Any]], float]:
    from lm_eval.api.metrics import mean

    return theirs.aggregation().get(metric, mean)


def _is_mean(theirs: Any, metric: str) -> bool:
    from lm_eval.api.metrics import mean

    return _aggregation(theirs, metric) is mean


def _stderr(aggregate: Callable[[Sequence[Any]], float], values: Sequence[Any]) -> float | str:
    """Standard error of an aggregate; "N/A", lm-eval's word, for fewer than two items."""
    from lm_eval.api.metrics import acc_all, acc_all_stderr, mean

    if len(values) < 2:
        return "N/A"
    if aggregate is mean:
        error = metrics.mean_and_stderr([float(v) for v in values])[1]
        return "N/A" if error is None else error
    if aggregate is acc_all:
        return float(acc_all_stderr(values))
    draw = random.Random(0)
    try:
        # Corpus scores such as BLEU take long: fewer draws of many items.
        count = min(_RESAMPLES, max(100, 1_000_000 // len(values)))
        drawn = [float(aggregate(draw.choices(values, k=len(values)))) for _ in range(count)]
    except (ArithmeticError, ValueError):
        return "N/A"
    error = float(np.std(drawn, ddof=1))
    return error if math.isfinite(error) else "N/A"


def _pair(found: Mapping[str, Any], metric: str, filter_: str) -> tuple[float | None, float | None]:
    value, stderr = found.get(f"{metric},{filter_}"), found.get(f"{metric}_stderr,{filter_}")
    return (None if value is None else float(value)), (
        None if stderr is None or isinstance(stderr, str) else float(stderr)
    )


def _record(
    item: Item, journaled: Mapping[str, Any], defined: Defined, primary: tuple[str, str]
) -> dict[str, Any]:
    """The record of an item: what the model answered, and lm-eval's figures of it."""
    theirs, outcome = defined.tasks[item.part], defined.outcomes[item.id]
    record = {k: v for k, v in journaled.items() if k not in ("answers", "num_option_tokens")}
    record["part"] = item.part
    answers = journaled["answers"]
    if "loglikelihood" in answers:
        record["logprobs"] = [round(a[0], 5) for a in answers["loglikelihood"]]
        record["greedy"] = [bool(a[1]) for a in answers["loglikelihood"]]
        record["num_option_tokens"] = journaled["num_option_tokens"]
    if "loglikelihood_rolling" in answers:
        record["loglikelihood"] = round(answers["loglikelihood_rolling"][0], 5)
    if "generate_until" in answers:
        record["text"] = answers["generate_until"][0][:_KEPT_CHARS]
        read = item.asked("generate_until")[0].filtered_resps.get(primary[1])
        record["answer"] = read if isinstance(read, str) else json.dumps(read, default=str)
    if item.options:
        record["options"] = [o[:200] for o in item.options]
        if theirs.OUTPUT_TYPE == "multiple_choice":
            record["pred"] = _choice(primary[0], [a[0] for a in answers["loglikelihood"]], item.options)
    record["question"], record["target"] = item.question[-600:], item.target[:_KEPT_CHARS]
    record["metrics"] = {
        f"{metric},{filter_}": float(value)
        for (metric, filter_), value in outcome.items()
        if isinstance(value, (bool, int, float, np.number))
    }
    value, weight = _share(theirs, primary, outcome, defined)
    if value is not None:
        record["value"] = value
    if weight is not None:
        record["weight"] = weight
    return record


def _share(
    theirs: Any, primary: tuple[str, str], outcome: Mapping[tuple[str, str], Any], defined: Defined
) -> tuple[float | None, float | None]:
    """An item's part in the task's value, where that is a (weighted) mean over items: value, weight."""
    from lm_eval.api.metrics import bits_per_byte

    if primary not in outcome:
        return None, None
    if defined.group is not None:
        weighed = [c for c in defined.group.aggregate_metric_list if c.metric == primary[0]]
        if len(defined.tasks) > 1 and not all(c.weight_by_size for c in weighed):
            return None, None
    if _is_mean(theirs, primary[0]):
        return float(outcome[primary]), None
    if _aggregation(theirs, primary[0]) is bits_per_byte:
        nats, num_bytes = outcome[primary]
        return -nats / math.log(2), float(num_bytes)
    return None, None


def _choice(metric: str, logprobs: Sequence[float], options: Sequence[str]) -> int:
    """The option that a figure of accuracy is about: the likeliest, by length where that is divided out."""
    sizes = {
        "acc_norm": [len(o) for o in options],
        "acc_bytes": [len(o.encode()) for o in options],
    }.get(metric, [1] * len(options))
    per_size = [p / max(s, 1) for p, s in zip(logprobs, sizes)]
    return int(np.argmax(per_size))


def _prompt_sha256(item: Item) -> str:
    asked = [list(map(str, i.args)) for i in item.instances]
    return text_sha256(json.dumps(asked, ensure_ascii=False))[:16]
