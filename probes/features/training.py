"""Training a dictionary: Adam on shuffled rows, directions kept at length 1, dead features watched, resumable bit for bit.

The folder that `train_dictionary` writes:

    checkpoint.safetensors     weights, optimizer and a JSON record, replaced by renaming, while it runs
    dictionary.safetensors     the finished dictionary with its configuration (`load_dictionary` reads it)
    record.json                curve, settings, data, seconds
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor

from probes.features.dictionaries import CONFIGS, Dictionary, DictionaryConfig, build_dictionary
from workbench.instrument.errors import suggestion
from workbench.lab.activation_store import ActivationStore
from workbench.lab.checkpoints import CheckpointError, read_json, read_tensors, write_json, write_tensors
from workbench.lab.training import TrainingConfig, learning_rate_at
from workbench.lab.training_record import load_checkpoint, save_checkpoint

CHECKPOINT, DICTIONARY, RECORD = "checkpoint.safetensors", "dictionary.safetensors", "record.json"


@dataclass(frozen=True)
class FeatureTraining:
    """Settings of a training.

    Args:
        steps, batch_size, learning_rate, warmup: as everywhere; the rate falls linearly to 0 over the last fifth of the steps.
        sparsity_warmup: steps over which the sparsity penalty rises to its weight (kinds that have one).
        dead_after: rows without firing after which a feature counts as dead.
        clip: largest norm of the gradient. seed: order of the rows. report_every: steps between points of the curve.
    """

    steps: int = 2000
    batch_size: int = 1024
    learning_rate: float = 1e-3
    warmup: int = 50
    sparsity_warmup: int = 500
    dead_after: int = 100_000
    clip: float = 1.0
    seed: int = 0
    report_every: int = 50
    checkpoint_every: int = 500

    def rate(self, step: int) -> float:
        """Learning rate of the update after `step` finished steps."""
        shape = TrainingConfig(
            self.steps, self.learning_rate, self.warmup, schedule="linear", decay_from=0.8, final_rate=0.0
        )
        return learning_rate_at(shape, step)


@dataclass
class TrainedDictionary:
    """What a training gave. `curve` holds `{step, loss, <terms>, l0, dead}` points; `completed` is False if it was cancelled."""

    dictionary: Dictionary
    curve: list[dict[str, float]]
    completed: bool
    record: dict[str, Any] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.dictionary, self.record))


def train_dictionary(
    data: ActivationStore | Tensor,
    site: str | None,
    config: DictionaryConfig,
    training: FeatureTraining | None = None,
    *,
    out: str | Path | None = None,
    target: str | Tensor | None = None,
    progress: Callable[[float, str], None] | None = None,
    cancel: Event | None = None,
) -> TrainedDictionary:
    """Train a dictionary on the rows of a site.

    Args:
        data: a store and its `site`; or rows [row, d_in] with site None. config: kind and size. training: settings.
        out: folder for the checkpoint and the finished dictionary; a checkpoint found there is continued. None keeps nothing on disk.
        target: what a transcoder reconstructs: another site of the store, or rows in the same order.
        progress, cancel: as everywhere; a cancelled training keeps its checkpoint.

    Raises:
        CheckpointError: the folder holds a training of other data or settings. FloatingPointError: the loss is not finite.
    """
    training = training or FeatureTraining()
    source = _Rows(data, site, target)
    if (config.d_out is None) != (target is None):
        raise ValueError(
            "A transcoder needs both `d_out` in its configuration and a `target`; a dictionary of one site has neither."
        )
    dictionary = build_dictionary(config, source.width)
    sample, sample_target = source.sample(8192)
    dictionary.fit_scale(sample, None if target is None else sample_target)
    optimizer = torch.optim.Adam(dictionary.parameters(), lr=training.learning_rate, betas=(0.9, 0.999))
    silent = torch.zeros(dictionary.n_features, dtype=torch.int64)  # rows since each feature last fired
    identity = json.loads(
        json.dumps({"config": _described(config), "training": asdict(training), "data": source.identity})
    )
    folder, done, curve, spent = None if out is None else Path(out), 0, [], 0.0
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / CHECKPOINT).exists():
            record = load_checkpoint(folder / CHECKPOINT, dictionary, optimizer, identity, set())
            done, curve, spent = record["step"], record["curve"], record["seconds"]
            silent = torch.tensor(record["silent"])
    started = time.process_time()

    def checkpoint() -> None:
        if folder is not None:
            state = {
                "step": done,
                "curve": curve,
                "silent": silent.tolist(),
                "seconds": spent + time.process_time() - started,
            }
            save_checkpoint(folder / CHECKPOINT, dictionary, optimizer, {**identity, **state})

    dictionary.train()
    for x, wanted in source.batches(training.batch_size, training.seed, start=done):
        if done >= training.steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = training.rate(done)
        terms, fired = dictionary.losses(x, wanted, silent >= training.dead_after)
        if "sparsity" in terms and training.sparsity_warmup:
            terms["sparsity"] = terms["sparsity"] * min(1.0, (done + 1) / training.sparsity_warmup)
        loss = torch.stack(list(terms.values())).sum()
        if not bool(loss.isfinite()):
            raise FloatingPointError(
                f"step {done + 1}: the loss is {float(loss)}. Lower the learning rate ({training.learning_rate})."
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        dictionary.after_backward()
        torch.nn.utils.clip_grad_norm_(dictionary.parameters(), training.clip)
        optimizer.step()
        dictionary.after_step()
        silent = torch.where(fired, 0, silent + len(x))
        done += 1
        if done % training.report_every == 0 or done == training.steps:
            curve.append(_point(dictionary, done, loss, terms, x, silent >= training.dead_after))
            if progress is not None:
                progress(
                    done / training.steps, f"step {done}: loss {curve[-1]['loss']:.3f}, {curve[-1]['l0']:.1f} active"
                )
        cancelled = cancel is not None and cancel.is_set() and done < training.steps
        if done % training.checkpoint_every == 0 or done == training.steps or cancelled:
            checkpoint()
        if cancelled:
            return TrainedDictionary(dictionary.eval(), curve, False)
    dictionary.eval()
    record = {
        **identity,
        "curve": curve,
        "cpu_seconds": spent + time.process_time() - started,
        "rows": done * training.batch_size,
    }
    if folder is not None:
        save_dictionary(dictionary, folder / DICTIONARY, {"data": source.identity, "training": asdict(training)})
        write_json(folder / RECORD, record)
    return TrainedDictionary(dictionary, curve, True, record)


def save_dictionary(dictionary: Dictionary, path: str | Path, about: dict[str, Any] | None = None) -> Path:
    """Write as one safetensors file with its configuration, under a temporary name first."""
    record = {"config": _described(dictionary.config), "d_in": dictionary.d_in, "about": about or {}}
    write_tensors(path, dictionary.state_dict(), {"dictionary": record})
    return Path(path)


def load_dictionary(path: str | Path) -> Dictionary:
    """A dictionary that `save_dictionary` or `train_dictionary` wrote (a file, or the folder of a training).

    Raises:
        CheckpointError: no such file, or a file of something else.
    """
    path = Path(path)
    path = path / DICTIONARY if path.is_dir() else path
    tensors, about = read_tensors(path)
    if "dictionary" not in about:
        raise CheckpointError(
            f"{path} is no dictionary of this workbench; probes.features.formats reads those of other tools"
        )
    record = dict(about["dictionary"]["config"])
    kind = record.pop("kind")
    if kind not in CONFIGS:
        raise CheckpointError(f"{path}: unknown kind {kind!r}.{suggestion(kind, CONFIGS)} Known: {', '.join(CONFIGS)}.")
    if "prefixes" in record:
        record["prefixes"] = tuple(record["prefixes"])
    dictionary = build_dictionary(CONFIGS[kind](**record), about["dictionary"]["d_in"])
    dictionary.load_state_dict(tensors)
    return dictionary.eval()


def training_record(folder: str | Path) -> dict[str, Any]:
    """Curve and settings of a finished training."""
    return read_json(Path(folder) / RECORD)


def _described(config: DictionaryConfig) -> dict[str, Any]:
    return {"kind": config.kind, **asdict(config)}


@torch.no_grad()
def _point(
    dictionary: Dictionary, step: int, loss: Tensor, terms: dict[str, Tensor], x: Tensor, dead: Tensor
) -> dict[str, float]:
    l0 = float((dictionary.encode(x) > 0).sum(-1).double().mean())
    numbers = {name: round(float(value), 6) for name, value in terms.items()}
    return {"step": step, "loss": round(float(loss), 6), **numbers, "l0": l0, "dead": float(dead.double().mean())}


class _Rows:
    """Batches of (rows, target rows) from a store or from tensors, in one fixed shuffled order without end."""

    def __init__(self, data: ActivationStore | Tensor, site: str | None, target: str | Tensor | None) -> None:
        self.data, self.site, self.target = data, site, target
        if isinstance(data, ActivationStore):
            if site is None or isinstance(target, Tensor):
                raise ValueError("A store needs the name of a site, and for a transcoder the name of another.")
            if not data.complete:
                raise ValueError(f"{data} is not complete: go on with harvest first.")
            self.width = data.width(site)
            self.identity: dict[str, Any] = {**data.manifest, "site": site, "target": target}
        else:
            if site is not None or isinstance(target, str):
                raise ValueError("Rows given as a tensor have no site names.")
            if data.ndim != 2 or (target is not None and (target.ndim != 2 or len(target) != len(data))):
                raise ValueError(f"rows: expected [row, width] (and a target of as many rows), got {list(data.shape)}")
            self.width = data.shape[1]
            self.identity = {"rows": list(data.shape), "sum": float(data.double().sum())}

    def sample(self, count: int) -> tuple[Tensor, Tensor]:
        x, wanted = next(self.batches(min(count, len(self.data)), seed=0, start=0))
        return x, wanted

    def batches(self, batch_size: int, seed: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        if isinstance(self.data, ActivationStore):
            assert self.site is not None
            options: dict[str, Any] = {"seed": seed, "start": start, "epochs": None}
            if self.target is None:
                yield from ((x, x) for x in self.data.batches(self.site, batch_size, **options))
            else:  # the order does not depend on the site
                others = self.data.batches(str(self.target), batch_size, **options)
                yield from zip(self.data.batches(self.site, batch_size, **options), others, strict=True)
            return
        wanted = self.data if self.target is None else self.target
        assert isinstance(wanted, Tensor)
        per_epoch = len(self.data) // batch_size
        if not per_epoch:
            raise ValueError(f"there are {len(self.data)} rows, fewer than one batch of {batch_size}")
        step = start
        while True:
            epoch, index = divmod(step, per_epoch)
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            order = torch.randperm(len(self.data), generator=generator)
            for first in range(index * batch_size, per_epoch * batch_size, batch_size):
                chosen = order[first : first + batch_size]
                yield self.data[chosen].float(), wanted[chosen].float()
                step += 1
