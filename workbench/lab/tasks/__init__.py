"""Synthetic sequence tasks with planted truth, by name. `workbench.lab.tasks.base` says what a task is.

    task = make_task("induction", length=64)
    tokens, loss_mask, metadata = task.batch(16, step=0)

A new task is a class under `@register_task` in a file of this package; it is found by being there.
"""

from dataclasses import dataclass, fields
from typing import Any

from workbench.discovery import import_all
from workbench.instrument.errors import suggestion
from workbench.lab.tasks.base import TASKS, Row, Task, TaskBatch, register_task
from workbench.lab.tasks.lookup import Delay, Lookup, NthLatest
from workbench.lab.tasks.recall import AssociativeRecall, Copy, Induction, Passkey, SelectiveCopy
from workbench.lab.tasks.relations import Facts, ForAndAgainst, SameDifferent
from workbench.lab.tasks.tracking import Counting, FlipFlop, Parity, Permutations

__all__ = [
    "AssociativeRecall", "Copy", "Counting", "Delay", "Facts", "FlipFlop", "ForAndAgainst", "Induction", "Lookup", "NthLatest", "Parity",
    "Passkey", "Permutations", "Row", "SameDifferent", "SelectiveCopy", "Task", "TaskBatch", "TaskRecord", "list_tasks",
    "make_task", "register_task",
]  # fmt: skip


@dataclass(frozen=True)
class TaskRecord:
    """One line of `list_tasks()`; `options` are the settings with their defaults (None = chosen from the length)."""

    name: str
    description: str
    paper: str
    options: dict[str, Any]


def list_tasks() -> list[TaskRecord]:
    """Every task, what it is, where it comes from, and its settings."""
    return [
        TaskRecord(
            name, (task.__doc__ or "").split("\n")[0], task.paper, {item.name: item.default for item in fields(task)}
        )
        for name, task in _tasks().items()
    ]


def make_task(name: str, **options: Any) -> Task:
    """The task of that name. Raises ValueError for an unknown name or setting, with the nearest right one."""
    tasks = _tasks()
    if name not in tasks:
        raise ValueError(f"unknown task {name!r}: expected one of {', '.join(tasks)}.{suggestion(name, tasks)}")
    known = [item.name for item in fields(tasks[name])]
    for option in options:
        if option not in known:
            near = suggestion(option, known)
            raise ValueError(f"task {name!r} has no setting {option!r}: it has {', '.join(known)}.{near}")
    return tasks[name](**options)


def _tasks() -> dict[str, type[Task]]:
    import_all(__name__)
    return TASKS
