"""From a task's definition to its items: files read, rows checked, shots drawn."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pocketphi.core.errors import DataError
from pocketphi.evals import generation
from pocketphi.evals.config import EvalConfig
from pocketphi.evals.data import DataFile, read, require
from pocketphi.evals.task import Task, draw_shots, pick


@dataclass
class Loaded:
    """A task with its items in their final order and the shots shown before them, by group.

    prefix: the few-shot text by group, for tasks answered in writing.
    """

    task: Task
    items: list[Any]
    shots: dict[str, list[Any]]
    file: DataFile | None
    shots_file: DataFile | None
    num_in_file: int
    num_unusable: int = 0
    notes: list[str] = field(default_factory=list)
    prefix: dict[str, str] = field(default_factory=dict)
    by_writing: bool = False


def load_task(config: EvalConfig, task: Task, limit: int | None) -> Loaded:
    """Read a task's files, draw its items and shots. DataError for missing files or columns."""
    if task.file is None:
        from pocketphi.evals.tasks.choice import house_items

        items: list[Any] = list(house_items()) if task.name == "house" else []
        kept = pick((q.id for q in items), limit, task.name)
        each = Loaded(task, [items[i] for i in kept], {}, None, None, len(items))
        return generation.from_choice(each) if config.choices_by == "writing" and items else each
    file = require(config.data_dir, task.file)
    rows, unusable = _rows(task, file)
    num_in_file = len(rows) + unusable
    shots: dict[str, list[Any]] = {}
    shots_file = None
    if task.shots and task.shots_file is not None:
        same = task.shots_file == task.file
        shots_file = file if same else require(config.data_dir, task.shots_file)
        pool = rows if same else _rows(task, shots_file)[0]
        shots = _draw(task, pool)
        if same:
            shown = {q.id for group in shots.values() for q in group}
            rows = [q for q in rows if q.id not in shown]
    kept = pick((q.id for q in rows), limit, task.name)
    each = Loaded(task, [rows[i] for i in kept], shots, file, shots_file, num_in_file, unusable)
    if task.kind == "generate":
        each.prefix, prefix_file = generation.read_prefix(config, task, shots)
        each.shots_file = prefix_file or shots_file
    elif task.kind == "choice" and config.choices_by == "writing":
        each = generation.from_choice(each)
    return each


def _rows(task: Task, file: DataFile) -> tuple[list[Any], int]:
    assert task.read is not None
    found, unusable, seen = [], 0, {}  # type: ignore[var-annotated]
    for number, row in enumerate(read(file, task.columns if file.name.startswith(f"{task.file}.") else ())):
        try:
            item = task.read(row, number)
        except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
            raise DataError(
                f"{file.path}: row {number} is not what task '{task.name}' expects: {type(error).__name__}: {error}",
                hint="the file is not the version that this task was written for",
            ) from None
        if item is None:
            unusable += 1
            continue
        # Two rows with one id (a question asked twice) stay two items.
        count = seen[item.id] = seen.get(item.id, 0) + 1
        if count > 1:
            item = type(item)(**{**item.__dict__, "id": f"{item.id}#{count}"})
        found.append(item)
    if not found:
        raise DataError(f"{file.path}: holds no usable row for task '{task.name}'")
    return found, unusable


def _draw(task: Task, pool: list[Any]) -> dict[str, list[Any]]:
    """Return the shots by group; "" holds those of tasks whose groups share them."""
    if task.shot_ids:
        return {"": [q for q in pool if q.id in task.shot_ids[: task.shots]]}
    if not task.shots_by_group:
        if len(pool) <= task.shots:
            raise DataError(
                f"task '{task.name}': {task.shots} shots asked for, {len(pool)} rows to draw from"
            )
        return {"": [pool[i] for i in draw_shots((q.id for q in pool), task.shots, task.name)]}
    groups: dict[str, list[Any]] = {}
    for question in pool:
        groups.setdefault(question.group, []).append(question)
    # The first rows in their order, not a draw: MMLU's development rows are its shots by definition.
    return {name: members[: task.shots] for name, members in groups.items()}
