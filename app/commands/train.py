"""`workbench train`: train a model from scratch, resumably, with a finished model and its loss curve at the end."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.commands._console import Failure, facts_table, interruptible, note, print_json, stdout
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
    from workbench.lab.training import TrainingConfig, TrainingResult

PANEL = "Make"


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
    warmup: Annotated[
        int | None,
        typer.Option(
            help="Steps of rising learning rate; a tenth of all, at most 50, if not given.", min=0, show_default=False
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of initial weights, data and dropout.", min=0)] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads.", min=1, show_default=False)] = None,
    autocast: Annotated[
        str | None,
        typer.Option(
            help="bfloat16: matrix products in 16 bit, faster where the processor has them.", show_default=False
        ),
    ] = None,
    eval_every: Annotated[int, typer.Option(help="Steps between losses on held-out data.", min=1)] = 100,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the training found in --out.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Throw away the training found in --out.")] = False,
    runs: RunsFolder = None,
    as_json: AsJson = False,
) -> None:
    """Train a model from random weights.

    Example: `workbench train --model retnet --task induction --steps 500 --out scratch/first`

    Ctrl-C stops after the current step and keeps a checkpoint; the same command with --resume goes on, bit for bit as if
    it had never stopped. A finished training leaves a model in OUT, for `workbench trace`, and its loss curve as a run.
    """
    if (corpus is None) == (task is None):
        raise typer.BadParameter("give exactly one of --corpus and --task")
    if task_set and task is None:
        raise typer.BadParameter("--task-set goes with --task")
    if resume and restart:
        raise typer.BadParameter("--resume and --restart exclude each other")
    check_folder(out, resume, restart)

    from workbench.instrument.devices import checked_device
    from workbench.lab.training import TrainingConfig, train

    checked_device(device)  # before the model is made and the data are read
    built = build_model(model, config, change or [], seed)
    data = make_batches(corpus, task, task_set or [], context, batch_size, seed)
    settings = TrainingConfig(
        steps=steps,
        learning_rate=learning_rate,
        seed=seed,
        device=device,
        threads=threads,
        autocast=autocast,  # type: ignore[arg-type]  # TrainingConfig refuses what it does not know
        eval_every=eval_every,
        warmup=min(50, steps // 10) if warmup is None else warmup,
    )
    with interruptible() as cancel, watching(built, data, settings, out) as more:
        result = train(built, data, settings, out, resume=resume, cancel=cancel, **more)
    if not result.completed:
        raise Failure(f"stopped after step {len(result.curve)} of {steps}", "The same command with --resume goes on.")
    finished = save_finished(built, result, out, data_name(corpus or task or ""))
    run_id = store_run(finished, result, runs)
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
    losses |= {f"reference: {name.replace('_', ' ')}": loss for name, loss in result.metrics["references"].items()}
    facts: dict[str, object] = {name: f"{loss:.3f} nats" for name, loss in losses.items() if loss is not None}
    facts |= {"tokens": f"{result.tokens:,}", "seconds": f"{result.wall_seconds:.1f}", "model": finished, "run": run_id}
    stdout().print(facts_table("trained", model, facts))
    note(f'Look inside it with `workbench trace {finished} "some text"`.')


def check_folder(out: Path, resume: bool, restart: bool) -> None:
    """A training is never overwritten by accident, and never resumed from nothing."""
    begun = (out / "checkpoint.safetensors").exists()
    if begun and not (resume or restart):
        raise Failure(f"{out} holds a training already", "Add --resume to continue it or --restart to throw it away.")
    if resume and not begun:
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
    from models.configs import config_from_json
    from models.registry import architecture, build, list_models

    listed = {record.name: record.architecture for record in list_models()}
    kind = architecture(listed.get(name, name))
    settings = {"seed": seed, **parse_settings(changes, "--set")}
    if not config.endswith(".json"):
        return build(kind.name, config, **settings)
    record = json.loads(Path(config).read_text(encoding="utf-8"))
    if isinstance(record, dict) and "config" in record:  # as in the config.json of a finished model
        record = record["config"]
    if not isinstance(record, dict):
        raise Failure(f"{config} holds no configuration: expected a JSON object")
    return build(kind.name, config=config_from_json(kind.config, record), **settings)


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
def watching(model: Any, data: Batches, settings: TrainingConfig, out: Path) -> Iterator[dict[str, Any]]:
    """What else `train` is told: for a BDH a watch over its sparsity, which is kept beside the checkpoint.

    Held-out sequences that are too short to be correlated with anything are not watched.
    """
    from models.bdh.model import BDH
    from probes.bdh.sparsity_training import HELD_OUT, SparsityWatch, measured_steps
    from workbench.lab.training import reporting

    tokens = data.validation_batches()[0][0][:HELD_OUT, :-1]
    if not isinstance(model, BDH) or tokens[:, 1:].numel() < 3:
        yield {}
        return
    with reporting() as report:
        steps = measured_steps(settings.steps)
        yield {"progress": SparsityWatch(model.eval(), tokens, every=steps, folder=out, then=report)}


def data_name(corpus_or_task: str) -> str:
    """A name for what a model read: a corpus or task by its own name, a file or address by its last part."""
    stem = Path(corpus_or_task).stem if "/" in corpus_or_task or "." in corpus_or_task else corpus_or_task
    return re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-") or "text"


def save_finished(model: Any, result: TrainingResult, out: Path, data: str) -> Path:
    """Write the finished model beside its checkpoint, in a folder named after what it is: `retnet-english`."""
    from shutil import rmtree

    import models
    from models.shipping import training_card

    finished = out / f"{model.architecture}-{data}"
    if finished.exists():  # of a training that was restarted, or that was complete when it was resumed
        rmtree(finished)
    from probes.bdh.sparsity_training import card_record, read_sparsity

    sparsity = read_sparsity(out)
    card = {
        "title": f"{model.architecture} trained on {data}",
        "description": f"{result.metrics['steps']} steps, {result.tokens:,} tokens of {data}.",
        **training_card(out),
        **({"sparsity": card_record(sparsity)} if sparsity else {}),
    }
    return models.save(model, finished, card)


def store_run(finished: Path, result: TrainingResult, runs: Path | None) -> str:
    """Keep the loss curve as a run of kind "training"; returns the run's id."""
    import numpy as np

    import models

    model = models.load(finished)
    about = {"name": model.name, "architecture": model.architecture, **model.about()}
    curve = result.curve
    missing = float("nan")
    with open_store(runs).create("training", f"training of {model.name}", model=about) as run:
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
