"""From a task's definition to its items: files read, rows checked, shots drawn."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pocketphi.core.errors import DataError
from pocketphi.evals import generation
from pocketphi.evals.config import EvalConfig
from pocketphi.evals.data import DataFile, MissingData, read, require, text_sha256
from pocketphi.evals.task import Task, draw_shots, pick


@dataclass
class Loaded:
    """A task with its items in their final order and the shots shown before them, by group.

    prefix: the few-shot text by group, for tasks answered in writing.
    rows_sha256, shots_sha256: hashes of the rows as the task reads them, before any draw of items, and of
        what is shown as shots: equal for the same rows, however they are packed.
    defined: what lm-eval made of a task of its own (evals/harness); more_files: of its parts.
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
    more_files: list[DataFile] = field(default_factory=list)
    rows_sha256: str | None = None
    shots_sha256: str | None = None
    defined: Any = None

    @property
    def files(self) -> list[DataFile]:
        return [f for f in (self.file, self.shots_file, *self.more_files) if f is not None]


def load_task(config: EvalConfig, task: Task, limit: int | None) -> Loaded:
    """Read a task's files, draw its items and shots. DataError for missing files or columns."""
    if task.kind == "harness":
        from pocketphi.evals import harness

        return harness.load(config, task, limit)
    if task.file is None:
        from pocketphi.evals.tasks.choice import house_items

        items: list[Any] = list(house_items()) if task.name == "house" else []
        kept = pick((q.id for q in items), limit, task.name)
        each = Loaded(task, [items[i] for i in kept], {}, None, None, len(items))
        return generation.from_choice(each) if config.choices_by == "writing" and items else each
    file = find(config, task, task.file)
    rows, unusable = _rows(task, file)
    num_in_file = len(rows) + unusable
    shots: dict[str, list[Any]] = {}
    shots_file = None
    if task.shots and task.shots_file is not None:
        same = task.shots_file == task.file
        shots_file = file if same else find(config, task, task.shots_file)
        pool = rows if same else _rows(task, shots_file)[0]
        shots = _draw(task, pool)
        if same:
            shown = {q.id for group in shots.values() for q in group}
            rows = [q for q in rows if q.id not in shown]
    kept = pick((q.id for q in rows), limit, task.name)
    each = Loaded(task, [rows[i] for i in kept], shots, file, shots_file, num_in_file, unusable)
    each.rows_sha256 = text_sha256("\n".join(repr(row) for row in rows))
    if task.kind == "generate":
        each.prefix, prefix_file = generation.read_prefix(config, task, shots)
        each.shots_file = prefix_file or shots_file
        each.shots_sha256 = text_sha256(repr(sorted(each.prefix.items()))) if each.prefix else None
        return each
    each.shots_sha256 = text_sha256(repr(sorted(shots.items()))) if shots else None
    if task.kind == "choice" and config.choices_by == "writing":
        each = generation.from_choice(each)
    return each


def find(config: EvalConfig, task: Task, stem: str) -> DataFile:
    """Return one of a task's files. MissingData says where its rows come from."""
    try:
        return require(config.data_dir, stem, from_hub=config.hub)
    except MissingData as error:
        more = [h for h in (error.hint, task.gated) if h]
        if task.hub and not config.hub:
            more.append(f"--hub fetches it from {task.hub}")
        raise MissingData(error.message, hint="; ".join(more) or None) from None


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
