"""One cell of the table: a mixer trained on a task, and how much it gets right.

The learning rate is chosen by short trainings on a seed of their own (weights and data), by the loss on held-out rows; then the cell is
trained with the rate that won, on another seed. Every training and every finished cell is kept on disk, so a killed study goes on.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from case_studies.who_can_do_what.mixers import build
from models.language_model import LanguageModel
from workbench.lab.checkpoints import read_json, write_json
from workbench.lab.jobs import JobCancelled
from workbench.lab.tasks import Task, make_task
from workbench.lab.training import TaskBatches, TrainingConfig, TrainingDiverged, TrainingResult, evaluate, train

TASKS: dict[str, dict[str, Any]] = {
    "associative_recall": {"vocab_size": 16, "length": 33, "pairs": 6},
    "selective_copy": {"vocab_size": 10, "length": 25, "content": 3},
    "passkey": {"vocab_size": 16, "length": 33, "key_length": 3},
    "parity": {"vocab_size": 4, "length": 25},
    "permutations": {"vocab_size": 6, "length": 25, "items": 3},
}
SELECTION_SEED = 1000  # added to the seed for everything that chooses the learning rate


def task_of(name: str, seed: int) -> Task:
    """The task whose rows depend on the seed."""
    return make_task(name, seed=seed, **TASKS[name])


def chance(task: Task) -> float:
    """Accuracy of guessing uniformly among the tokens that an answer can be."""
    return math.exp(-task.chance_loss)


def settled_rate(
    mixer: str, task: str, seed: int, settings: Mapping[str, Any], folder: Path, stop: threading.Event
) -> float:
    """The rate with the smallest held-out loss after `selection_steps`; a training that diverges loses."""
    losses = {}
    for rate in settings["rates"]:
        try:
            result = _train(
                mixer,
                task,
                seed + SELECTION_SEED,
                rate,
                settings["selection_steps"],
                settings,
                folder / f"{rate:g}",
                stop,
            )[1]
            assert result.validation_loss is not None
            losses[rate] = result.validation_loss
        except TrainingDiverged:
            losses[rate] = math.inf
    return min(losses, key=losses.__getitem__)


def measure_cell(
    mixer: str, task: str, seed: int, settings: Mapping[str, Any], folder: Path, stop: threading.Event
) -> dict[str, Any]:
    """Accuracy at the training length, accuracy beyond it, the loss and the learning rate of one cell.

    Raises JobCancelled when `stop` is set; the steps done so far are kept.
    """
    record = folder / "cell.json"
    if record.exists():
        return read_json(record)
    rate = settled_rate(mixer, task, seed, settings, folder / "rates", stop)
    model, result = _train(mixer, task, seed, rate, settings["steps"], settings, folder / "training", stop)
    data, held_out = task_of(task, seed), settings["held_out"]
    cell = {
        "mixer": mixer, "task": task, "seed": seed, "rate": rate, "loss": result.validation_loss,
        "accuracy": accuracy(model, data, held_out), "beyond": accuracy_beyond(model, data, held_out), "chance": chance(data),
        "cpu_seconds": result.cpu_seconds,
    }  # fmt: skip
    write_json(record, cell)
    return cell


def trained_model(
    mixer: str, task: str, seed: int, cell: Mapping[str, Any], settings: Mapping[str, Any], folder: Path
) -> LanguageModel:
    """The model of a finished cell, read back from its checkpoint."""
    return _train(mixer, task, seed, cell["rate"], settings["steps"], settings, folder / "training", threading.Event())[
        0
    ].eval()


def accuracy(model: LanguageModel, task: Task, rows: int) -> float:
    """Share of the answers on so many held-out rows that are right."""
    return evaluate(model, TaskBatches(task, rows, 1).validation_batches())["accuracy"]


def accuracy_beyond(model: LanguageModel, task: Task, rows: int) -> float:
    """The same on rows of twice the length, counting only answers at positions that training never had."""
    batches = TaskBatches(twice_as_long(task), rows, 1).validation_batches()
    return evaluate(model, [_only_from(task.length, batch) for batch in batches])["accuracy"]


def twice_as_long(task: Task) -> Task:
    """The same task on rows that are read for twice as many tokens."""
    return replace(task, length=2 * task.length - 1)


def _only_from(first: int, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    tokens, asked, *targets = batch
    return (tokens, asked & (torch.arange(tokens.shape[1]) >= first), *targets)


def _train(
    mixer: str,
    task: str,
    seed: int,
    rate: float,
    steps: int,
    settings: Mapping[str, Any],
    folder: Path,
    stop: threading.Event,
) -> tuple[LanguageModel, TrainingResult]:
    model = build(mixer, seed)
    config = TrainingConfig(
        steps=steps, learning_rate=rate, warmup=30, weight_decay=0.0, betas=(0.9, 0.98), seed=seed, eval_every=steps,
        checkpoint_every=200,
    )  # fmt: skip
    silent: Callable[..., None] = lambda point, steps: None  # noqa: E731
    result = train(
        model, TaskBatches(task_of(task, seed), settings["batch"], 4), config, folder, progress=silent, cancel=stop
    )
    if not result.completed:
        raise JobCancelled(f"{mixer} on {task}")
    return model, result
