"""`workbench train`: train a model from scratch, resumably, into a folder that `workbench trace` can read."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.commands._console import Failure, facts_table, note, print_json, stdout
from app.commands._options import (
    AsJson,
    RunsFolder,
    complete_architectures,
    complete_corpora,
    complete_tasks,
    open_store,
)

if TYPE_CHECKING:
    from workbench.lab.batches import Batches
    from workbench.lab.training import TrainingResult

PANEL = "Make"
FINISHED = "model"  # the folder of the finished model inside the folder of the training


def command(
    model: Annotated[
        str,
        typer.Option("--model", help="Architecture, from `workbench models`.", autocompletion=complete_architectures),
    ],
    out: Annotated[Path, typer.Option(help="Folder for checkpoint, loss curve and finished model.", file_okay=False)],
    config: Annotated[
        str, typer.Option(help="Preset of the architecture, or a JSON file with a whole configuration.")
    ] = "tiny",
    change: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Change one setting of the configuration: n_layers=4. Repeatable.", show_default=False
        ),
    ] = None,
    corpus: Annotated[
        str | None,
        typer.Option(help="Corpus name or text file to read.", autocompletion=complete_corpora, show_default=False),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Synthetic task to learn.", autocompletion=complete_tasks, show_default=False)
    ] = None,
    task_set: Annotated[
        list[str] | None,
        typer.Option(help="Change one setting of the task: length=64. Repeatable.", show_default=False),
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.", min=1)] = 1000,
    batch_size: Annotated[int, typer.Option(help="Sequences per step.", min=1)] = 16,
    context: Annotated[int, typer.Option(help="Tokens read at once (corpora only).", min=1)] = 128,
    learning_rate: Annotated[float, typer.Option(help="Learning rate at its peak.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Seed of initial weights, data and dropout.", min=0)] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads.", min=1, show_default=False)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the training found in --out.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Throw away the training found in --out.")] = False,
    runs: RunsFolder = None,
    as_json: AsJson = False,
) -> None:
    """Train a model from random weights on a corpus or a task.

    Ctrl-C stops after the current step and keeps a checkpoint; the same command with --resume goes on, bit for bit as if
    it had never stopped. A finished training leaves a model for `workbench trace OUT/model TEXT`, and its loss curve as a run.
    """
    if (corpus is None) == (task is None):
        raise typer.BadParameter("give exactly one of --corpus and --task")
    if task_set and task is None:
        raise typer.BadParameter("--task-set goes with --task")
    if resume and restart:
        raise typer.BadParameter("--resume and --restart exclude each other")
    check_folder(out, resume, restart)

    from workbench.lab.training import TrainingConfig, train

    built = build_model(model, config, change or [], seed)
    data = make_batches(corpus, task, task_set or [], context, batch_size, seed)
    settings = TrainingConfig(
        steps=steps, learning_rate=learning_rate, seed=seed, device=device, threads=threads, warmup=min(50, steps // 10)
    )
    with interruptible() as cancel:
        result = train(built, data, settings, out, resume=resume, cancel=cancel)
    if not result.completed:
        raise Failure(f"stopped after step {len(result.curve)} of {steps}", "The same command with --resume goes on.")
    finished = save_finished(built, result, out, corpus or task or "")
    run_id = store_run(built, result, runs, corpus or task or "")
    record = {
        "model": finished,
        "run": run_id,
        "train_loss": result.train_loss,
        "validation_loss": result.validation_loss,
        "references": result.metrics["references"],
        "steps": len(result.curve),
        "tokens": result.tokens,
        "seconds": result.wall_seconds,
    }
    if as_json:
        print_json(record)
        return
    losses = {"train loss": result.train_loss, "validation loss": result.validation_loss}
    losses |= {f"loss of {name.replace('_', ' ')}": loss for name, loss in result.metrics["references"].items()}
    facts: dict[str, object] = {name: f"{loss:.3f} nats" for name, loss in losses.items() if loss is not None}
    facts |= {"tokens": f"{result.tokens:,}", "seconds": f"{result.wall_seconds:.1f}", "model": finished, "run": run_id}
    stdout().print(facts_table("trained", model, facts))
    note(f'Look inside it with `workbench trace {finished} "some text"`.')


def check_folder(out: Path, resume: bool, restart: bool) -> None:
    """A training is never overwritten by accident, and never resumed from nothing."""
    from shutil import rmtree

    begun = (out / "checkpoint.safetensors").exists() or (out / FINISHED).exists()
    if begun and restart:
        rmtree(out / FINISHED, ignore_errors=True)
    elif begun and not resume:
        raise Failure(f"{out} holds a training already", "Add --resume to continue it or --restart to throw it away.")
    elif resume and not begun:
        raise Failure(f"there is no training in {out} to resume", "Leave --resume out to begin one.")


def parse_settings(words: list[str], option: str) -> dict[str, Any]:
    """`["n_layers=4", "norm=rms"]` to `{"n_layers": 4, "norm": "rms"}`: JSON where it is JSON, else text."""
    settings: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise Failure(f"{option} {word!r} is no setting", f"Write {option} name=value.")
        try:
            settings[name.strip()] = json.loads(value)
        except json.JSONDecodeError:
            settings[name.strip()] = value
    return settings


def build_model(name: str, config: str, changes: list[str], seed: int) -> Any:
    """A model at random weights. `name` may be an architecture, or a listed model whose architecture is meant."""
    import models
    from models.configs import config_from_json

    listed = {record.name: record.architecture for record in models.list_models()}
    kind = models.architecture(listed.get(name, name))
    settings = {"seed": seed, **parse_settings(changes, "--set")}
    if not config.endswith(".json"):
        return models.build(kind.name, config, **settings)
    record = json.loads(Path(config).read_text(encoding="utf-8"))
    if isinstance(record, dict) and "config" in record:  # as in the config.json of a finished model
        record = record["config"]
    if not isinstance(record, dict):
        raise Failure(f"{config} holds no configuration: expected a JSON object")
    return models.build(kind.name, config=config_from_json(kind.config, record), **settings)


def make_batches(
    corpus: str | None, task: str | None, task_settings: list[str], context: int, batch_size: int, seed: int
) -> Batches:
    from workbench.lab.batches import TaskBatches, TextBatches

    if corpus is not None:
        return TextBatches(corpus, context=context, batch_size=batch_size, seed=seed)
    from workbench.lab.tasks import make_task

    assert task is not None
    return TaskBatches(make_task(task, **{"seed": seed, **parse_settings(task_settings, "--task-set")}), batch_size)


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Ctrl-C sets the event instead of raising, so that training can end with a checkpoint; a second one stops at once."""
    cancel = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield cancel
        return
    before = signal.getsignal(signal.SIGINT)

    def stop(number: int, frame: Any) -> None:
        cancel.set()
        signal.signal(signal.SIGINT, before)
        note("stopping after this step; Ctrl-C again stops at once")

    signal.signal(signal.SIGINT, stop)
    try:
        yield cancel
    finally:
        signal.signal(signal.SIGINT, before)


def save_finished(model: Any, result: TrainingResult, out: Path, data: str) -> Path:
    """Write the finished model beside its checkpoint, once."""
    import models

    finished = out / FINISHED
    if not finished.exists():
        card = {
            "title": f"{model.architecture} trained on {data}",
            "description": f"{result.metrics['steps']} steps, {result.tokens:,} tokens of {data}.",
            "metrics": {name: value for name, value in result.metrics.items() if name != "command"},
            "command": result.metrics["command"],
        }
        models.save(model, finished, card)
    return finished


def store_run(model: Any, result: TrainingResult, runs: Path | None, data: str) -> str:
    """Keep the loss curve as a run of kind "training"; returns the run's id."""
    import numpy as np

    import models
    from models.configs import config_to_json
    from models.registry import weights_sha256

    kind = models.architecture(model.architecture)
    about = {
        "name": f"{model.architecture}-{data}",
        "architecture": kind.name,
        "family": kind.family,
        "paper": kind.paper,
        "parameters": model.n_parameters(),
        "config": config_to_json(model.config),
        "weights_sha256": weights_sha256(model),
        "provenance": "trained",
    }
    curve = result.curve
    missing = float("nan")
    with open_store(runs).create("training", f"{kind.name} on {data}", model=about) as run:
        run.set(
            settings=result.metrics["config"],
            seed=result.metrics["config"]["seed"],
            results={"train_loss": result.train_loss, "validation_loss": result.validation_loss,
                     "references": result.metrics["references"]},
            seconds=result.wall_seconds,
        )  # fmt: skip
        held_out = [missing if point.validation_loss is None else point.validation_loss for point in curve]
        columns = {
            "step": (np.array([point.step for point in curve], np.int32), None),
            "train_loss": (np.array([point.train_loss for point in curve], np.float32), "nats"),
            "validation_loss": (np.array(held_out, np.float32), "nats"),
            "learning_rate": (np.array([point.learning_rate for point in curve], np.float32), None),
            "gradient_norm": (np.array([point.gradient_norm for point in curve], np.float32), None),
        }
        for name, (values, unit) in columns.items():
            run.add_array(name, values, axes=("step",), unit=unit)
    return run.id
