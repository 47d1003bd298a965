"""lm-eval's definitions by name: found, expanded, refused where they cannot run here."""

from __future__ import annotations

import difflib
import importlib.metadata
import logging
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from pocketphi.core.errors import ConfigError, UserError
from pocketphi.evals.task import Task

PREFIX = "lm-eval/"
_OLDEST, _TOO_NEW = (0, 4, 13), (0, 5)
_INSTALL = "pip install 'pocketphi[lm-eval]'"
# Where lm-eval would run what the model wrote in this process, and which task of ours does it safely.
_SANDBOXED = {"humaneval": "humaneval", "mbpp": "mbpp"}


def library_version() -> str:
    """The installed lm_eval's version. UserError when it is absent or one that was never tested."""
    try:
        found = importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"tasks named {PREFIX}NAME are those of lm-evaluation-harness, which is not installed",
            hint=_INSTALL,
        ) from None
    numbers = tuple(int(p) for p in found.split(".")[:3] if p.isdigit())
    if not _OLDEST <= numbers < _TOO_NEW:
        raise UserError(f"lm_eval {found} is installed, 0.4.13 or a newer 0.4 is needed", hint=_INSTALL)
    return found


@cache
def manager() -> Any:
    """lm-eval's TaskManager over all its definitions; reading their 14,000 files takes seconds."""
    library_version()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(f"lm_eval cannot be imported: {error}", hint=_INSTALL) from None
    return TaskManager()


def parse(name: str, settings: Mapping[str, str]) -> list[Task]:
    """Return the tasks behind `lm-eval/NAME`: one, or those of a tag or of a group without a score.

    settings: `shots`, and `metric` and `filter` that choose the task's value among lm-eval's figures.
    ConfigError for unknown names (with the nearest) and settings, and for tasks that need images or
    run programs that the model wrote.
    """
    unknown = set(settings) - {"shots", "metric", "filter"}
    if unknown:
        raise ConfigError(f"task {name}: unknown setting '{min(unknown)}' (known: shots, metric, filter)")
    if "shots" in settings and not settings["shots"].isdigit():
        raise ConfigError(f"task {name}: shots must be a number, found {settings['shots']!r}")
    return [_task(found, settings) for found in _expanded(name.removeprefix(PREFIX))]


def _task(name: str, settings: Mapping[str, str]) -> Task:
    entry = manager().task_index[name]
    for leaf, definition in leaves(name):
        _refuse(leaf, definition)
    parts = [definition for _, definition in leaves(name)]
    shots = {int(d.get("num_fewshot") or 0) for d in parts}
    data_sets = dict.fromkeys(str(d["dataset_path"]) for d in parts if d.get("dataset_path"))
    definition = entry.cfg or {}
    metadata = definition.get("metadata")
    version = metadata.get("version", 0) if isinstance(metadata, dict) else 0
    title = definition.get("group_alias") or definition.get("task_alias") or name
    return Task(
        name=PREFIX + name,
        kind="harness",
        version=version,
        title=f"{title} (lm-evaluation-harness)",
        file=None,
        columns=(),
        source=f"lm-evaluation-harness {library_version()}, rows of {', '.join(data_sets) or 'its own'}",
        hub=", ".join(data_sets),
        shots=int(settings["shots"]) if "shots" in settings else min(shots) if len(shots) == 1 else 0,
        metric=settings.get("metric", ""),
        lm_eval=f"{name} v{version}",
        settings=dict(settings),
    )


def _expanded(name: str) -> list[str]:
    index = manager().task_index
    if name not in index:
        near = difflib.get_close_matches(name, index, n=3, cutoff=0.6)
        raise ConfigError(
            f"lm-evaluation-harness {library_version()} has no task '{name}'"
            + (f" (did you mean {', '.join(PREFIX + n for n in near)}?)" if near else ""),
            hint="`lm_eval ls tasks` lists them all",
        )
    entry = index[name]
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    if entry.kind.name != "GROUP" or entry.cfg.get("aggregate_metric_list"):
        return [name]
    found: list[str] = []
    for member in entry.cfg.get("task") or []:
        own = member if isinstance(member, str) else None
        if own is None or own not in index:
            names = ", ".join(_named(m) for m in entry.cfg["task"])
            raise ConfigError(
                f"{PREFIX}{name} has no score of its own and changes its tasks' definitions",
                hint=f"name its tasks: {names}",
            )
        found += _expanded(own)
    return list(dict.fromkeys(found))


def _named(member: Any) -> str:
    """A group's member as it is asked for here."""
    if isinstance(member, str):
        return PREFIX + member
    shots = f":shots={member['num_fewshot']}" if member.get("num_fewshot") else ""
    own = member.get("task")
    if isinstance(own, list):
        return ", ".join(PREFIX + str(m) for m in own)
    return f"{PREFIX}{member.get('group', own)}{shots}"


def leaves(name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (name, definition as in the YAML) of every task below a task, group or tag."""
    index = manager().task_index
    entry = index[name]
    if entry.kind.name == "TAG":
        for member in sorted(entry.tags):
            yield from leaves(member)
    elif entry.kind.name == "GROUP":
        yield from _members(entry.cfg)
    else:
        yield name, entry.cfg or {}


def _members(group: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    index = manager().task_index
    for member in group.get("task") or []:
        changes = {} if isinstance(member, str) else member
        own = member if isinstance(member, str) else member.get("group", member.get("task"))
        if isinstance(own, str) and own in index:
            yield from ((leaf, {**definition, **changes}) for leaf, definition in leaves(own))
        elif isinstance(changes.get("task"), list):
            yield from _members(changes)
        else:
            yield str(own), changes


def _refuse(name: str, definition: Mapping[str, Any]) -> None:
    if definition.get("unsafe_code"):
        safe = next((ours for theirs, ours in _SANDBOXED.items() if name.startswith(theirs)), None)
        raise ConfigError(
            f"{PREFIX}{name} would run programs that the model wrote in this very process",
            hint=f"-t {safe} runs them in a sandbox"
            if safe
            else "humaneval and mbpp run such programs in a sandbox",
        )
    for key, what in (("doc_to_image", "images"), ("doc_to_audio", "sounds")):
        if definition.get(key):
            raise ConfigError(f"{PREFIX}{name} shows {what} to the model, which reads text only")
