"""How sparsity emerged in a model that is trained already: its training once more, from its card, as far as one likes.

    python -m probes.bdh.sparsity_replay bdh-english --until 400 --folder scratch/replay --write

Every step of a training is a function of the card's settings, so its beginning can be made again. That it is the same training is checked,
not assumed: the losses on the way are compared with those that the card keeps. The last point of the curve is the finished model itself.
Stopped, the same call goes on in its folder.
"""

import argparse
import json
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from models import registry
from models.bdh.model import BDH
from probes.bdh.capture import require_bdh
from probes.bdh.sparsity_training import (
    HELD_OUT,
    SparsityPoint,
    SparsityWatch,
    card_record,
    measured_steps,
    sparsity_point,
)
from workbench.lab.batches import TextBatches
from workbench.lab.checkpoints import CARD, read_json, write_json
from workbench.lab.training import TrainingConfig, train

CHECKPOINT_EVERY = 20
SAME = 0.02
"""Nats that a training loss may differ from the card's: another processor sums in another order, and steps amplify that."""


@dataclass(frozen=True)
class Replay:
    """`curve`: the untrained model, the steps that were made again, and the finished model.

    `difference`: of the training losses from the card's, largest over the steps that the card keeps; nats. `until`: steps made again.
    `tokens`: measured, without the first of each window.
    """

    curve: list[SparsityPoint]
    difference: float
    until: int
    tokens: int

    def record(self) -> dict[str, Any]:
        """For the card."""
        return card_record(self.curve, tokens=self.tokens, until=self.until, difference=round(self.difference, 5))


def replay_sparsity(
    model: Any,
    until: int,
    folder: str | Path,
    *,
    progress: Callable[[float, str], None] | None = None,
    cancel: threading.Event | None = None,
) -> Replay:
    """Train a model of `model`'s configuration as `model.card` says, for `until` steps, and measure sparsity on the way.

    Args:
        model: a finished BDH with a card of a training on a named corpus. folder: of the checkpoint and the curve; a call goes on in it.
        cancel: when set, a checkpoint is kept and InterruptedError raised.

    Raises ValueError for a card that does not say how the model was trained, and for losses that are not those of the card.
    """
    model = require_bdh(model, variants=True)
    card = model.card or {}
    if not card.get("training") or not card.get("data", {}).get("corpora") or not card.get("curve"):
        raise ValueError(
            f"The card of {model.name!r} does not say how it was trained on which corpus; it cannot be trained again."
        )
    if not 1 <= until <= card["training"]["steps"]:
        raise ValueError(f"until is {until}; expected 1 to {card['training']['steps']}, the steps of the training.")
    asked = {**card["training"], "betas": tuple(card["training"]["betas"]), "device": "cpu"}
    asked |= {"eval_every": asked["steps"], "checkpoint_every": CHECKPOINT_EVERY}  # neither changes a step
    source = card["data"]
    data = TextBatches(
        source["corpora"][0]["name"], source["context"], source["batch_size"], source["seed"],
        validation_windows=source["validation_windows"],
    )  # fmt: skip
    if [part["sha256"] for part in data.describe()["corpora"]] != [part["sha256"] for part in source["corpora"]]:
        raise ValueError(
            f"Corpus {source['corpora'][0]['name']!r} is not the text any more that {model.name!r} was trained on."
        )
    held_out = torch.cat([tokens for tokens, _ in data.validation_batches()])[:HELD_OUT, :-1]
    expected = {point["step"]: point["train_loss"] for point in card["curve"] if point["step"] <= until}
    learner, stop = BDH(model.config).eval(), threading.Event()

    def watch_out(point: Any, steps: int) -> None:
        if progress is not None:
            progress(point.step / until, f"step {point.step} of {until}, loss {point.train_loss:.2f}")
        if point.step >= until or (cancel is not None and cancel.is_set()):
            stop.set()

    watch = SparsityWatch(learner, held_out, every=measured_steps(until), folder=folder, then=watch_out)
    result = train(learner, data, TrainingConfig(**asked), folder, progress=watch, cancel=stop)
    if len(result.curve) < until:
        raise InterruptedError(
            f"Cancelled after step {len(result.curve)} of {until}; the same call goes on in {folder}."
        )
    made = {point.step: point.train_loss for point in result.curve}
    difference = max((abs(made[step] - loss) for step, loss in expected.items()), default=math.nan)
    if not difference <= SAME:
        raise ValueError(
            f"This is not the training of {model.name!r}: its losses differ from the card's by up to {difference:.3g} nats "
            f"(allowed: {SAME})."
        )
    curve = [point for point in watch.curve if point.step <= until]
    if until < asked["steps"]:
        curve.append(sparsity_point(model, held_out, asked["steps"]))
    return Replay(curve, difference, until, held_out.shape[0] * (held_out.shape[1] - 1))


def main() -> None:
    """Command line of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="name of a shipped model")
    parser.add_argument("--until", type=int, required=True, help="steps to make again")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--write", action="store_true", help="keep the curve on the model's card")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = replay_sparsity(
        registry.load(options.model), options.until, options.folder, progress=lambda _, words: print(words, flush=True)
    )
    if options.write:
        path = registry.SHIPPED / options.model / CARD
        write_json(path, {**read_json(path), "sparsity": found.record()})
    print(json.dumps(found.record()))


if __name__ == "__main__":
    main()
