"""Trains and measures experiments; every finished training is kept, so a killed run goes on where it stopped.

<folder>/<hash of the settings>-<seed>/     what `train` writes; shared by experiments with the same baseline
results.json                                name -> seeds, both measured values and CPU seconds per seed; replaced by renaming
"""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.trainings.record import Experiment
from workbench.lab.batches import TaskBatches
from workbench.lab.checkpoints import read_json, write_json
from workbench.lab.jobs import JobCancelled
from workbench.lab.run_writer import machine
from workbench.lab.training import TrainingConfig, train

RESULTS = Path(__file__).parent / "results.json"
WARMUP = 20
Report = Callable[[float, str], None]


def run(
    experiments: Sequence[Experiment],
    folder: Path,
    seeds: Sequence[int] = (0,),
    results: Path = RESULTS,
    progress: Report | None = None,
    cancel: threading.Event | None = None,
) -> dict[str, Any]:
    """Train and measure what is not in `results` yet, and add it there, experiment by experiment.

    Args:
        folder: of the trainings. seeds: of weights and data. progress: told the share done (0 to 1) and a sentence.
        cancel: set it, and the run stops after the current step with JobCancelled; what was done is kept.

    Returns:
        All stored results by name.
    """
    torch.set_num_threads(1)
    cancel = cancel or threading.Event()
    wanted = [(one, seed) for one in experiments for seed in seeds]
    for number, (one, seed) in enumerate(wanted):
        stored = read_results(results)
        record = stored.get(one.name)
        if record is not None and record["identity"] == one.identity() and str(seed) in record["seeds"]:
            continue
        pair = {}
        for place, side in enumerate(one.sides):
            first, width = (number + place / 2) / len(wanted), 0.5 / len(wanted)
            say = _within(progress, first, width, f"{one.name}, seed {seed}, {side}")
            pair[side] = measure_side(one, side, seed, folder, say, cancel)
        add_result(results, one, seed, pair)
    if progress is not None:
        progress(1.0, f"{len(wanted)} results")
    return read_results(results)


def measure_side(
    one: Experiment,
    side: str,
    seed: int,
    folder: Path,
    progress: Report | None = None,
    cancel: threading.Event | None = None,
) -> dict[str, float]:
    """Train one side with one seed (or read its finished training) and measure it."""
    module = one.sides[side].build(seed)
    config = TrainingConfig(
        steps=one.steps, learning_rate=one.rate, warmup=WARMUP, weight_decay=0.0, betas=(0.9, 0.98), seed=seed,
        eval_every=one.steps, checkpoint_every=max(1, one.steps // 4), threads=1,
    )  # fmt: skip
    tell = progress or (lambda share, words: None)
    result = train(
        module,
        TaskBatches(one.training_task(seed), one.batch, validation_batches=1),
        config,
        folder / f"{one.training_key(side)}-{seed}",
        progress=lambda point, steps: tell(point.step / steps, f"step {point.step} of {steps}"),
        cancel=cancel,
    )
    if not result.completed:
        raise JobCancelled(f"{one.name}, {side}, seed {seed}")
    return {
        "value": round(one.measure.of(module, one, seed), 4),
        "loss": round(result.train_loss, 4),
        "parameters": parameters(module),
        "cpu_seconds": round(result.cpu_seconds, 1),
    }


def parameters(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def read_results(path: Path = RESULTS) -> dict[str, Any]:
    """The stored results; empty where there are none."""
    return read_json(path) if path.exists() else {}


def add_result(path: Path, one: Experiment, seed: int, pair: dict[str, dict[str, float]]) -> None:
    """Put one seed's numbers beside those of the other seeds; results of an experiment that has changed since are dropped."""
    stored = read_results(path)
    record = stored.get(one.name)
    if record is None or record["identity"] != one.identity():
        record = {"identity": one.identity(), "machine": machine(), "seeds": {}}
    holds = one.verdict(pair["ours"]["value"], pair["baseline"]["value"])
    record["seeds"][str(seed)] = {**pair, "holds": holds}
    record["seeds"] = dict(sorted(record["seeds"].items(), key=lambda item: int(item[0])))
    stored[one.name] = record
    write_json(path, stored)


def _within(progress: Report | None, first: float, width: float, words: str) -> Report:
    if progress is None:
        return lambda share, message: None
    return lambda share, message: progress(first + width * share, f"{words}: {message}")
