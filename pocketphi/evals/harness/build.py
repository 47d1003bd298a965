"""From an lm-eval task to items: definitions loaded with their rows, items drawn, prompts made."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pocketphi.core import progress
from pocketphi.core.errors import ConfigError, DataError, PocketPhiError, UserError
from pocketphi.evals.config import EvalConfig
from pocketphi.evals.data import text_sha256
from pocketphi.evals.harness import index, rows
from pocketphi.evals.loading import Loaded
from pocketphi.evals.task import Task, pick

# Those of lm_eval.simple_evaluate.
_SEED, _NUMPY_SEED, _SHOTS_SEED = 0, 1234, 1234
# Of lm-eval's Hugging Face back end, where a task does not say.
DEFAULT_NEW_TOKENS = 256


@dataclass
class Item:
    """One document of an lm-eval task and the requests that lm-eval made of it.

    id: hash of the document, after the task's name in a group. number: its place in lm-eval's split.
    part: the task it belongs to. question, target, options: for people.
    """

    id: str
    part: str
    number: int
    doc: Any
    instances: list[Any]
    question: str
    target: str
    options: tuple[str, ...] = ()
    group: str = ""

    def asked(self, kind: str) -> list[Any]:
        """The requests of one type: loglikelihood, loglikelihood_rolling or generate_until."""
        return [i for i in self.instances if i.request_type == kind]


@dataclass
class Defined:
    """What lm-eval made of a name: its tasks, the group that weighs them, and where their rows came from.

    outcomes: per item id, lm-eval's figures of it by (metric, filter), once it is scored. hub: whether lm-eval
    may fetch what it needs.
    """

    tasks: dict[str, Any]
    group: Any
    supply: rows.Supply
    definition_sha256: str
    hub: bool = False
    outcomes: dict[str, dict[tuple[str, str], Any]] = field(default_factory=dict)


def load(config: EvalConfig, task: Task, limit: int | None) -> Loaded:
    """Let lm-eval build a task; draw its items by a hash of their ids and make their prompts.

    `limit` holds for each task of lm-eval, so for every part of a group. Prompts are made for the drawn
    items in their order, as `simple_evaluate(samples=...)` makes them: shots drawn at random depend on
    which items are drawn. Raises MissingData for rows that are nowhere, ConfigError for settings that
    lm-eval's definition does not allow, DataError when lm-eval itself fails.
    """
    name = task.name.removeprefix(index.PREFIX)
    asked = int(task.settings["shots"]) if "shots" in task.settings else None
    supply = rows.Supply(config, name, asked)
    with guarded(task.name, hub=config.hub), _seeded():
        with supply.installed():
            found = index.manager().load(name)
        built: dict[str, Any] = found["tasks"]
        group = found.get("groups", {}).get(name)
        shots = {part: _shots(part, theirs, asked) for part, theirs in built.items()}
        items: list[Item] = []
        hashes: list[str] = []
        for part, theirs in built.items():
            _check(part, theirs, config)
            docs = getattr(theirs, "task_docs", None) or theirs.eval_docs
            ids = _ids(docs)
            hashes += ids
            kept = pick(ids, limit, part)
            progress.say(f"{index.PREFIX}{part}: {len(kept)} of {len(docs)} items")
            items += _items(config, part, theirs, docs, ids, kept, shots[part], in_group=group is not None)
        if not items:
            raise DataError(f"{task.name}: lm-eval finds no document in its rows")
        definition = _definition(built, group)
    numbers = set(shots.values())
    task = replace(task, shots=numbers.pop() if len(numbers) == 1 else 0)
    each = Loaded(task, items, {}, None, None, len(hashes))
    each.defined = Defined(built, group, supply, definition, config.hub)
    _add_files(each, supply, shots)
    each.rows_sha256 = text_sha256("\n".join(hashes))
    if any(shots.values()):
        pools = [_ids(t.sampler.df) for part, t in built.items() if shots[part] and hasattr(t, "sampler")]
        each.shots_sha256 = text_sha256(json.dumps(pools))
    return each


@contextmanager
def guarded(name: str, *, hub: bool) -> Iterator[None]:
    """Run lm-eval's code: no connections without `hub`, and its errors become ours."""
    try:
        with rows.offline(name, hub=hub):
            yield
    except PocketPhiError:
        raise
    except Exception as error:
        if isinstance(error, ImportError):
            raise UserError(
                f"{name}: lm-eval needs a package that is not installed: {error}",
                hint="lm_eval has extras of its own, such as pip install 'lm_eval[math]'",
            ) from None
        words = " ".join(str(error).split())[:300]
        raise DataError(
            f"{name}: lm-eval fails on it: {type(error).__name__}: {words}",
            hint=None if hub else "its rows may lack columns that lm-eval's definition reads",
        ) from error


@contextmanager
def _seeded() -> Iterator[None]:
    """The random state in which lm-eval builds tasks: some of them shuffle their options."""
    kept, kept_numpy = random.getstate(), np.random.get_state()
    random.seed(_SEED)
    np.random.seed(_NUMPY_SEED)
    try:
        yield
    finally:
        random.setstate(kept)
        np.random.set_state(kept_numpy)


def _shots(part: str, theirs: Any, asked: int | None) -> int:
    """Set the number of shots as lm-eval does, and return it."""
    own = theirs.get_config("num_fewshot")
    if asked is not None:
        if own == 0 and asked:
            raise ConfigError(f"{index.PREFIX}{part}: lm-eval's definition says 0 shots, whatever is asked")
        theirs.set_config("num_fewshot", asked)
    elif own is None:
        theirs.set_config("num_fewshot", 0)
    theirs.set_fewshot_seed(seed=_SHOTS_SEED)
    return int(theirs.get_config("num_fewshot") or 0)


def _check(part: str, theirs: Any, config: EvalConfig) -> None:
    name = index.PREFIX + part
    if getattr(theirs, "UNSAFE_CODE", False) or getattr(theirs, "MULTIMODAL", False):
        raise ConfigError(f"{name}: lm-eval marks it as running written programs or showing images")
    kind = theirs.OUTPUT_TYPE
    if config.choices_by == "writing" and kind != "generate_until":
        raise ConfigError(
            f"{name}: lm-eval asks for log-likelihoods; choices_by=writing is for our own choice tasks",
            hint=f"-t {part} --set choices_by=writing, where we have it, or a task that is answered in writing",
        )
    if kind != "generate_until":
        return
    settings = theirs.get_config("generation_kwargs") or {}
    if settings.get("do_sample") is not False and (
        settings.get("do_sample") or float(settings.get("temperature") or 0) > 0
    ):
        raise ConfigError(f"{name}: lm-eval draws its answers at random; answers here are greedy")
    if config.chat and theirs.get_config("gen_prefix"):
        raise ConfigError(
            f"{name}: lm-eval begins the model's answer for it, which the chat template does not allow",
            hint="--set chat=false",
        )


def _items(
    config: EvalConfig,
    part: str,
    theirs: Any,
    docs: Any,
    ids: Sequence[str],
    kept: Sequence[int],
    shots: int,
    *,
    in_group: bool,
) -> list[Item]:
    chat = config.chat and theirs.OUTPUT_TYPE == "generate_until"
    template = _messages if chat else None
    found = []
    for number in kept:
        doc = docs[number]
        context = theirs.fewshot_context(
            doc,
            num_fewshot=shots,
            apply_chat_template=chat,
            fewshot_as_multiturn=True,
            chat_template=template,
            gen_prefix=theirs.doc_to_prefix(doc),
        )
        made = theirs.construct_requests(
            doc=doc,
            ctx=context,
            metadata=(part, number, theirs.config.repeats),
            apply_chat_template=chat,
            chat_template=template,
        )
        instances = sorted(made, key=lambda i: i.idx) if isinstance(made, list) else [made]
        question, target, options = _shown(theirs, doc, instances)
        id_ = f"{part}/{ids[number]}" if in_group else ids[number]
        group = part if in_group else ""
        found.append(Item(id_, part, number, doc, instances, question, target, options, group))
    return found


def _messages(messages: Any, *, add_generation_prompt: bool = True) -> Any:
    """In place of a chat template's text: the messages, for the back end's own template."""
    return messages


def _shown(theirs: Any, doc: Any, instances: Sequence[Any]) -> tuple[str, str, tuple[str, ...]]:
    """Question, right answer and options in words, as far as lm-eval's definition has them."""
    context = instances[0].args[0]
    question = context if isinstance(context, str) else json.dumps(context, ensure_ascii=False)
    options: tuple[str, ...] = ()
    try:
        if theirs.get_config("doc_to_choice") is not None:
            options = tuple(str(c) for c in theirs.doc_to_choice(doc))
        text, target = theirs.doc_to_text(doc), theirs.doc_to_target(doc)
        if isinstance(text, int) and options:  # the contexts are the options, and this the right one
            return options[text], str(target), options
        if isinstance(text, str) and text:
            question = text
        if isinstance(target, int) and 0 <= target < len(options):
            target = options[target]
    except Exception:  # for people only: what is asked stands in the requests
        return question, "", options
    return question, str(target), options


def _ids(docs: Any) -> list[str]:
    """A hash of each document; the second of two equal ones is told apart."""
    found, seen = [], {}  # type: ignore[var-annotated]
    for doc in docs:
        text = json.dumps(doc, sort_keys=True, default=str, ensure_ascii=False)
        name = text_sha256(text)[:16]
        seen[name] = seen.get(name, 0) + 1
        found.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return found


def _definition(built: Mapping[str, Any], group: Any) -> str:
    """Hash of lm-eval's definitions, functions by their source, without paths of this machine."""
    tree: dict[str, Any] = {name: theirs.dump_config() for name, theirs in built.items()}
    for definition in tree.values():
        definition.get("metadata", {}).pop("config_source", None)
    if group is not None:
        tree["group"] = [[g.name, g.child_names, repr(g.aggregate_metric_list)] for g in _groups(group)]
    return hashlib.sha256(json.dumps(tree, sort_keys=True, default=_plain).encode()).hexdigest()


def _plain(value: Any) -> str:
    # A function's default text holds its address in memory.
    return getattr(value, "__qualname__", None) or type(value).__qualname__


def _groups(group: Any) -> list[Any]:
    return [group, *group.get_all_groups()]


def _add_files(each: Loaded, supply: rows.Supply, shots: Mapping[str, int]) -> None:
    """Name the files that the rows came from: the scored split's first, then the shots', then others."""
    assert each.defined is not None
    scored, shown, others = [], [], []
    for part, given in supply.given.items():
        c = each.defined.tasks[part].config if part in each.defined.tasks else None
        for split, file in given.files.items():
            if c is not None and split == (c.test_split or c.validation_split or split):
                scored.append(file)
            elif shots.get(part):
                shown.append(file)
            else:
                others.append(file)
    files = list({f.path: f for f in scored}.values())
    if files:
        each.file = files[0]
    shown = [f for f in {f.path: f for f in shown}.values() if f not in files]
    if shown:
        each.shots_file = shown[0]
    each.more_files = [*files[1:], *shown[1:]]
