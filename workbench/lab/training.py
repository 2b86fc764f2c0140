"""Training a small sequence model, resumably and reproducibly.

`train(model, TextBatches("english", context=128, batch_size=16), TrainingConfig(steps=2000), "runs/first")` is the
whole interface. Every step is a pure function of (weights, optimizer state, seed, step): the batch and the random
numbers of dropout are derived from seed and step alone, so a run that was interrupted and resumed gives the same bits
as one that was not, on a CPU and as long as no other thread draws from torch's global generator.

The folder that a run writes:

    checkpoint.safetensors   weights, optimizer state and a JSON record (step, config, seconds), replaced by renaming
    curve.jsonl, curve.json  one line per step, appended while it runs; the same as one list, written at the end
    metrics.json             losses, references, tokens, corpora, seconds, machine, versions, command; at the end
"""

import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.instrument.devices import checked_device
from workbench.instrument.errors import suggestion
from workbench.lab.batches import Batches, TaskBatches, TextBatches
from workbench.lab.checkpoints import read_json, write_json
from workbench.lab.run_writer import machine
from workbench.lab.training_record import (
    CurvePoint,
    command_line,
    curve_until,
    load_checkpoint,
    model_shapes,
    package_versions,
    save_checkpoint,
)  # fmt: skip

__all__ = [
    "Batches", "CurvePoint", "TaskBatches", "TextBatches", "TrainingConfig", "TrainingDiverged", "TrainingResult",
    "evaluate", "learning_rate_at", "reporting", "train",
]  # fmt: skip

CHECKPOINT, CURVE, CURVE_LIST, METRICS = "checkpoint.safetensors", "curve.jsonl", "curve.json", "metrics.json"


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of a run. Those of `_FREE` may differ when a run is resumed; the others decide its numbers."""

    steps: int = 1000
    learning_rate: float = 1e-3  # at the peak
    warmup: int = 50  # steps of linear rise from 0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    decay_from: float = 0.0  # share of the steps during which the rate stays at its peak before it decays
    final_rate: float = 0.1  # rate at the last step, as a share of the peak
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0  # largest L2 norm of the gradient; 0 = no clipping
    seed: int = 0
    batch_size: int | None = None  # None = what the data says; if given, it must agree with the data
    context: int | None = None  # tokens that the model reads at once; None likewise
    autocast: Literal["bfloat16"] | None = None
    device: str = "cpu"
    threads: int | None = None  # None = leave torch's setting
    eval_every: int = 100
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        choices = {"schedule": ("cosine", "linear", "constant"), "autocast": (None, "bfloat16")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                near = suggestion(str(getattr(self, name)), [str(choice) for choice in allowed])
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}: expected one of {', '.join(map(repr, allowed))}.{near}"
                )
        rules = {
            "steps": self.steps >= 1, "learning_rate": self.learning_rate > 0, "warmup": self.warmup >= 0,
            "decay_from": 0 <= self.decay_from <= 1, "final_rate": 0 <= self.final_rate <= 1,
            "weight_decay": self.weight_decay >= 0,
            "betas": len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            "clip": self.clip >= 0, "seed": self.seed >= 0, "threads": self.threads is None or self.threads >= 1,
            "eval_every": self.eval_every >= 1, "checkpoint_every": self.checkpoint_every >= 1,
        }  # fmt: skip
        for name, holds in rules.items():
            if not holds:
                raise ValueError(f"{name} = {getattr(self, name)!r} is out of range")


_FREE = {"device", "threads", "eval_every", "checkpoint_every"}


@dataclass(frozen=True)
class TrainingResult:
    """What came out. Losses in nats per token; `train_loss` is the mean over the last (at most) 50 steps."""

    train_loss: float
    validation_loss: float | None  # None only for a cancelled run that was never evaluated
    curve: list[CurvePoint]
    cpu_seconds: float
    wall_seconds: float
    tokens: int
    path: Path
    completed: bool  # False: cancelled, and `train` with the same arguments goes on from here
    metrics: dict[str, Any]


class TrainingDiverged(FloatingPointError):
    """The loss or the gradient stopped being finite."""


# The loop


def train(
    model: nn.Module,
    data: Batches,
    config: TrainingConfig,
    out_dir: str | Path,
    resume: bool = True,
    progress: Callable[[CurvePoint, int], None] | None = None,
    cancel: threading.Event | None = None,
    command: str | None = None,
) -> TrainingResult:
    """Train `model` in place.

    Parameters
    ----------
    model
        `model(tokens) -> logits`, tokens int64 [batch, pos], logits [batch, pos, vocab]. AdamW updates every parameter
        that requires a gradient; those of fewer than two dimensions, and those that carry `_no_weight_decay = True`,
        are not decayed.
    out_dir
        Folder of the run (see the module's docstring). With `resume`, a checkpoint found there is continued, or simply
        read if it is complete; without, it is replaced.
    progress
        Called with every `CurvePoint` and the number of steps. Default: a progress bar if standard error is a terminal.
        If it raises, a checkpoint is written before the exception goes on.
    cancel
        When set, the run writes a checkpoint after the current step and returns with `completed=False`.
    command
        What to record as the command that made this run; default: this process's.

    Raises
    ------
    TrainingDiverged
        Loss or gradient norm not finite; the message names the step. The last checkpoint stays.
    CheckpointError
        The checkpoint in `out_dir` belongs to another model, other data or other settings.
    ValueError
        A device that this machine lacks; nothing was written.
    """
    config = _agreed(config, data)
    checked_device(config.device)
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    for leftover in out_dir.glob(".*.tmp"):  # of a run that was killed while it wrote
        leftover.unlink()
    model.to(config.device)
    optimizer = _optimizer(model, config)
    identity = json.loads(json.dumps({"config": asdict(config), "data": data.describe(), "model": model_shapes(model)}))
    clock = _Clock()
    done = tokens_read = 0
    if not resume:
        for name in (CHECKPOINT, CURVE, CURVE_LIST, METRICS):
            (out_dir / name).unlink(missing_ok=True)
    elif (out_dir / CHECKPOINT).exists():
        record = load_checkpoint(out_dir / CHECKPOINT, model, optimizer, identity, _FREE)
        done, tokens_read = record["step"], record["tokens"]
        clock = _Clock(record["cpu_seconds"], record["wall_seconds"])
    curve = curve_until(out_dir / CURVE, done)

    def checkpoint() -> None:
        state = {"step": done, "tokens": tokens_read, "cpu_seconds": clock.cpu(), "wall_seconds": clock.wall()}
        save_checkpoint(out_dir / CHECKPOINT, model, optimizer, {**identity, **state})

    cancelled = False
    with _surroundings(model, config), reporting(progress) as report, open(out_dir / CURVE, "a") as curve_file:
        while done < config.steps and not cancelled:
            rate = learning_rate_at(config, done)
            for group in optimizer.param_groups:
                group["lr"] = rate
            torch.manual_seed(_seed_of_step(config.seed, done))
            model.train()
            loss, _ = _losses(model, data.next_batch(done), config.device, config.autocast)
            optimizer.zero_grad(set_to_none=True)
            loss.mean().backward()
            train_loss = loss.mean().item()
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip or math.inf).item()
            if not (math.isfinite(train_loss) and math.isfinite(norm)):
                raise TrainingDiverged(
                    f"step {done + 1}: loss {train_loss}, gradient norm {norm} at learning rate {rate:.3g}. Lower the "
                    f"learning rate or lengthen the warm-up. The last checkpoint in {out_dir} is untouched."
                )
            optimizer.step()
            done += 1
            tokens_read += data.batch_size * data.context
            validation = None
            if done % config.eval_every == 0 or done == config.steps:
                held_out = data.validation_batches()
                validation = evaluate(model, held_out, config.device, config.autocast)["loss"]
            point = CurvePoint(done, train_loss, validation, rate, norm, tokens_read, round(clock.cpu(), 3))
            curve.append(point)
            curve_file.write(json.dumps(asdict(point)) + "\n")
            curve_file.flush()
            try:
                report(point, config.steps)
            except BaseException:  # a job that was cancelled, or Ctrl-C: the steps done so far are kept
                checkpoint()
                raise
            cancelled = cancel is not None and cancel.is_set() and done < config.steps
            if done % config.checkpoint_every == 0 or done == config.steps or cancelled:
                checkpoint()
        if done == config.steps and not (out_dir / METRICS).exists():
            write_json(out_dir / CURVE_LIST, [asdict(point) for point in curve])
            write_json(out_dir / METRICS, _metrics(model, data, config, curve, clock, command))

    recent = [point.train_loss for point in curve[-50:]]
    evaluated = [point.validation_loss for point in curve if point.validation_loss is not None]
    return TrainingResult(
        train_loss=sum(recent) / len(recent),
        validation_loss=evaluated[-1] if evaluated else None,
        curve=curve,
        cpu_seconds=clock.cpu(),
        wall_seconds=clock.wall(),
        tokens=tokens_read,
        path=out_dir,
        completed=done == config.steps,
        metrics=read_json(out_dir / METRICS) if done == config.steps else {},
    )


def evaluate(
    model: nn.Module, batches: Iterable[Sequence[Tensor]], device: str = "cpu", autocast: str | None = None
) -> dict[str, Any]:
    """Mean loss in nats per counted token, share of them predicted right (`accuracy`), and their number (`tokens`).

    The model is put in evaluation mode and afterwards back in the mode it had.
    """
    was_training = model.training
    model.eval()
    total, right, count = 0.0, 0, 0
    try:
        with torch.no_grad():
            for batch in batches:
                losses, correct = _losses(model, batch, device, autocast)
                total += losses.double().sum().item()
                right += int(correct.sum())
                count += losses.numel()
    finally:
        model.train(was_training)
    if not count:
        raise ValueError("no batches to evaluate on")
    return {"loss": total / count, "accuracy": right / count, "tokens": count}


def learning_rate_at(config: TrainingConfig, step: int) -> float:
    """Rate of the update that follows `step` finished steps: linear warm-up, peak, then the decay of `schedule`, which
    reaches `final_rate` of the peak at the last step."""
    warm = min(1.0, (step + 1) / (config.warmup + 1))
    start = max(config.warmup, config.decay_from * config.steps)
    remaining = config.steps - 1 - start
    past = min(1.0, max(0.0, (step - start) / remaining)) if remaining > 0 else 0.0
    shape = {"constant": 1.0, "linear": 1 - past, "cosine": (1 + math.cos(math.pi * past)) / 2}[config.schedule]
    floor = 1.0 if config.schedule == "constant" else config.final_rate
    return config.learning_rate * warm * (floor + (1 - floor) * shape)


def _losses(model: nn.Module, batch: Sequence[Tensor], device: str, autocast: str | None) -> tuple[Tensor, Tensor]:
    """Loss in nats of every counted token [target], and whether its prediction is right [target]."""
    tokens, loss_mask, asked = batch if len(batch) == 3 else (*batch, batch[0])
    if tokens.shape != loss_mask.shape or tokens.ndim != 2 or loss_mask.dtype != torch.bool:
        raise ValueError(
            f"a batch is tokens [batch, pos] and a bool loss_mask of the same shape; got {tuple(tokens.shape)} and "
            f"{loss_mask.dtype} {tuple(loss_mask.shape)}"
        )
    if bool(loss_mask[:, 0].any()) or not bool(loss_mask.any()):
        raise ValueError("loss_mask must count at least one token, and never the first: nothing comes before it")
    tokens, loss_mask, asked = tokens.to(device), loss_mask.to(device), asked.to(device)
    mixed = torch.autocast(torch.device(device).type, torch.bfloat16) if autocast else nullcontext()
    try:
        with mixed:
            logits = model(tokens[:, :-1])
    except IndexError as error:
        if str(error) != "index out of range in self":  # what torch says of an id that its embedding lacks
            raise
        highest = int(tokens.max())
        raise ValueError(f"the batch has token ids up to {highest}, more than the model's embedding has") from error
    if logits.ndim != 3 or logits.shape[:2] != tokens[:, 1:].shape:
        raise ValueError(
            f"the model must give logits [batch, pos, vocab] = [{tokens.shape[0]}, {tokens.shape[1] - 1}, vocab], "
            f"got {list(logits.shape)}"
        )
    highest = max(int(tokens.max()), int(asked.max()))
    if highest >= logits.shape[-1]:
        raise ValueError(f"token id {highest} does not fit the model's vocabulary of {logits.shape[-1]}")
    chosen, targets = logits[loss_mask[:, 1:]], asked[:, 1:][loss_mask[:, 1:]]  # [target, vocab], [target]
    if chosen.dtype in (torch.bfloat16, torch.float16):
        chosen = chosen.float()
    return F.cross_entropy(chosen, targets, reduction="none"), chosen.detach().argmax(-1) == targets


# ----------------------------------------------------------------------------------------------------------------------
# Parts of the loop


def _agreed(config: TrainingConfig, data: Batches) -> TrainingConfig:
    """The config with batch_size and context filled in from the data; an error if they disagree."""
    for name in ("batch_size", "context"):
        asked, given = getattr(config, name), getattr(data, name)
        if asked is not None and asked != given:
            raise ValueError(f"the config says {name} = {asked}, the data makes batches with {name} = {given}")
    return replace(config, batch_size=data.batch_size, context=data.context)


def _optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise ValueError("the model has no parameter that requires a gradient")
    plain = {name for name, weight in trained.items() if weight.ndim < 2 or getattr(weight, "_no_weight_decay", False)}
    groups = [
        {
            "params": [weight for name, weight in trained.items() if name not in plain],
            "weight_decay": config.weight_decay,
        },
        {"params": [weight for name, weight in trained.items() if name in plain], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.learning_rate, betas=config.betas
    )


def _seed_of_step(seed: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def _surroundings(model: nn.Module, config: TrainingConfig) -> Iterator[None]:
    """Give the caller back its random state, thread count and the model's mode, however the loop ends."""
    threads, was_training = torch.get_num_threads(), model.training
    device = torch.device(config.device)
    with torch.random.fork_rng([device.index or 0] if device.type == "cuda" else []):
        try:
            if config.threads is not None:
                torch.set_num_threads(config.threads)
            yield
        finally:
            torch.set_num_threads(threads)
            model.train(was_training)


@contextmanager
def reporting(
    progress: Callable[[CurvePoint, int], None] | None = None,
) -> Iterator[Callable[[CurvePoint, int], None]]:
    """The caller's progress function, or a bar on a terminal, or nothing."""
    if progress is not None:
        yield progress
    elif not sys.stderr.isatty():
        yield lambda point, steps: None
    else:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task, held_out = bar.add_task("", total=None), ""

            def show(point: CurvePoint, steps: int) -> None:
                nonlocal held_out
                if point.validation_loss is not None:
                    held_out = f", held out {point.validation_loss:.3f}"
                bar.update(
                    task, total=steps, completed=point.step, description=f"loss {point.train_loss:.3f}{held_out}"
                )

            yield show


class _Clock:
    """CPU and wall seconds of a run, going on from those spent before it was resumed."""

    def __init__(self, cpu_before: float = 0.0, wall_before: float = 0.0) -> None:
        self._cpu_start = time.process_time() - cpu_before
        self._wall_start = time.perf_counter() - wall_before

    def cpu(self) -> float:
        return time.process_time() - self._cpu_start

    def wall(self) -> float:
        return time.perf_counter() - self._wall_start


def _metrics(
    model: nn.Module, data: Batches, config: TrainingConfig, curve: list[CurvePoint], clock: _Clock, command: str | None
) -> dict[str, Any]:
    recent = [point.train_loss for point in curve[-50:]]
    device = torch.device(config.device)
    accelerator = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return {
        "train_loss": sum(recent) / len(recent),
        "validation_loss": curve[-1].validation_loss,
        "validation": evaluate(model, data.validation_batches(), config.device, config.autocast),
        "references": data.references(),
        "unit": "nats per token",
        "steps": config.steps,
        "tokens": curve[-1].tokens,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "cpu_seconds": round(clock.cpu(), 2),
        "wall_seconds": round(clock.wall(), 2),
        "data": data.describe(),
        "config": asdict(config),
        "machine": machine() + accelerator,
        "threads": config.threads or torch.get_num_threads(),
        "versions": package_versions(),
        "command": command or command_line(),
    }
