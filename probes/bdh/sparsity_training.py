"""Sparsity over training: the share of active neurons and surprisal on the same held-out tokens, measured again and again as a BDH learns.

watch = SparsityWatch(model, tokens, every=50, folder="runs/first")
train(model, data, config, "runs/first", progress=watch)
watch.curve                                                 # one SparsityPoint per measurement, the untrained model first
"""

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from probes.bdh.capture import require_bdh
from probes.bdh.sparse import POINTS
from probes.bdh.sparsity import measure_sparsity
from workbench.instrument.errors import suggestion
from workbench.lab.catalogue import implements

CURVE = "sparsity.jsonl"
HELD_OUT = 8
"""Held-out sequences that a training is watched on, unless others are given."""


@dataclass(frozen=True)
class SparsityPoint:
    """After `step` steps, over all counted tokens (never a sequence's first).

    Args:
        active: share of active neurons by "x", "gate", "y": [layer][head]. dead: neurons that never fired, likewise.
        correlation: of the share of active y (over heads) with surprisal, [layer]; None where one of them does not vary.
        surprisal: mean, nats per token.
    """

    step: int
    active: dict[str, list[list[float]]]
    dead: dict[str, list[list[int]]]
    correlation: list[float | None]
    surprisal: float


@torch.no_grad()
def sparsity_point(model: Any, tokens: Tensor, step: int) -> SparsityPoint:
    """One measurement, of the model as it is used, without dropout; the mode that it is in and torch's random numbers stay as they are."""
    was_training = model.training
    model.eval()
    try:
        found = measure_sparsity(model, tokens.to(model.W_E.device))
    finally:
        model.train(was_training)
    tied = found.correlation("y").value.tolist()
    return SparsityPoint(
        step,
        {name: found.mean(name).double().tolist() for name in POINTS},
        {name: found.dead(name).tolist() for name in POINTS},
        [value if value == value else None for value in tied],
        float(found.surprisal.double().nanmean()),
    )


@implements("bdh", "probe", "SparsityWatch", note="sparsity over training, by layer and head")
class SparsityWatch:
    """A progress callback of `workbench.lab.training.train` that measures sparsity every so many steps, and at the last one.

    Args:
        model: the BDH that is trained. tokens: int64 [batch, pos], at least three, measured every time; best held-out ones.
        every: steps between measurements, or the steps to measure after.
        folder: where `sparsity.jsonl` is kept, a line per measurement: the folder of the training, say. A resumed training goes on with
            what is there up to the step that it resumes from, one that begins anew replaces it. None: nothing is written.
        then: another progress callback, called with the same arguments.
    """

    def __init__(
        self,
        model: Any,
        tokens: Tensor,
        *,
        every: int | Collection[int],
        folder: str | Path | None = None,
        then: Callable[[Any, int], None] | None = None,
    ) -> None:
        if isinstance(every, int) and every < 1:
            raise ValueError(f"every is {every}; expected at least 1 step between measurements.")
        self.model, self.tokens, self.every, self.then = require_bdh(model, variants=True), tokens, every, then
        self.path = None if folder is None else Path(folder) / CURVE
        before = [] if self.path is None else read_sparsity(self.path)
        self.curve = [sparsity_point(model, tokens, 0), *(point for point in before if point.step > 0)]

    def __call__(self, point: Any, steps: int) -> None:
        self.curve = [
            kept for kept in self.curve if kept.step < point.step
        ]  # what lies ahead was measured by an earlier call
        if self._wanted(point.step) or point.step == steps:
            self.curve.append(sparsity_point(self.model, self.tokens, point.step))
            self._write()
        if self.then is not None:
            self.then(point, steps)

    def _wanted(self, step: int) -> bool:
        return step % self.every == 0 if isinstance(self.every, int) else step in self.every

    def _write(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}.tmp")
        partial.write_text("".join(json.dumps(asdict(point)) + "\n" for point in self.curve))
        partial.replace(self.path)

    def over_steps(self, name: str, head: int | None = None) -> tuple[Tensor, Tensor]:
        """(steps [measurement], share of active neurons of "x", "gate" or "y" [measurement, layer]) of a head, or the mean over heads."""
        return over_steps(self.curve, name, head)


def over_steps(curve: Sequence[SparsityPoint], name: str, head: int | None = None) -> tuple[Tensor, Tensor]:
    """See `SparsityWatch.over_steps`."""
    if name not in POINTS:
        raise ValueError(f"Unknown activity {name!r}.{suggestion(name, POINTS)} Expected one of {', '.join(POINTS)}.")
    shares = torch.tensor([point.active[name] for point in curve], dtype=torch.float64)  # [measurement, layer, head]
    if head is not None and not 0 <= head < shares.shape[-1]:
        raise ValueError(f"There is no head {head}; expected 0..{shares.shape[-1] - 1}.")
    return torch.tensor([point.step for point in curve]), shares.mean(-1) if head is None else shares[..., head]


def read_sparsity(path: str | Path) -> list[SparsityPoint]:
    """The curve that a `SparsityWatch` kept (a file, or the folder of a training); empty where there is none yet."""
    path = Path(path)
    path = path / CURVE if path.is_dir() else path
    if not path.exists():
        return []
    try:
        return [SparsityPoint(**json.loads(line)) for line in path.read_text("utf-8").splitlines()]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no curve of sparsity: {error}") from None


def measured_steps(last: int) -> list[int]:
    """Steps 5, 7, 10, 14, 20, … up to `last`: each about √2 times the one before, because most of it happens early."""
    return sorted({min(last, round(5 * math.sqrt(2) ** power)) for power in range(64)})


def card_record(curve: Sequence[SparsityPoint], **facts: Any) -> dict[str, Any]:
    """What a finished model's card keeps under "sparsity": the curve, numbers to five decimals, and `facts` about it."""
    text = json.dumps([asdict(point) for point in curve])
    return {**facts, "curve": json.loads(text, parse_float=lambda value: round(float(value), 5))}


def card_curve(card: Mapping[str, Any] | None) -> list[SparsityPoint]:
    """The curve that a finished model's card keeps; empty where it keeps none."""
    return [SparsityPoint(**point) for point in ((card or {}).get("sparsity") or {}).get("curve", [])]
