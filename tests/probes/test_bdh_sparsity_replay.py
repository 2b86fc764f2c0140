"""A training made again from a card: the same curve to the bit, the model itself at the end, and refusals of what is not that training."""

import copy
import threading
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from models.bdh.model import BDH, BDHConfig
from probes.bdh.sparsity_replay import replay_sparsity
from probes.bdh.sparsity_training import SparsityWatch, card_curve, card_record, measured_steps, sparsity_point
from tests.probes.bdh_naive import CONFIG, tiny_model
from workbench.lab.training import CurvePoint, TextBatches, TrainingConfig, train

STEPS, UNTIL = 9, 7


def held_out(data: TextBatches) -> torch.Tensor:
    return torch.cat([tokens for tokens, _ in data.validation_batches()])[:8, :-1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[BDH, SparsityWatch]:
    """A model with a card, and the watch over its training. It stops before the last step: only that one measures references."""
    changes = {"n_neurons": 16, "vocab_size": 256, "dropout": 0.2}
    model = BDH(BDHConfig(**{**vars(CONFIG), **changes})).eval()
    data, stop = TextBatches("pydoc", 12, 2), threading.Event()
    config = TrainingConfig(steps=STEPS, warmup=2, seed=3, eval_every=100, batch_size=2, context=12)
    watch = SparsityWatch(
        model,
        held_out(data),
        every=measured_steps(UNTIL),
        then=lambda point, _: stop.set() if point.step == STEPS - 1 else None,
    )
    folder = tmp_path_factory.mktemp("training")
    result = train(model, data, config, folder, progress=watch, cancel=stop)
    curve = [{"step": p.step, "train_loss": round(p.train_loss, 4), "validation_loss": None} for p in result.curve]
    model.card = {"training": {**asdict(config), "betas": list(config.betas)}, "data": data.describe(), "curve": curve}
    return model.eval(), watch


def test_the_curve_is_that_of_the_training_and_ends_with_the_model(
    trained: tuple[BDH, SparsityWatch], tmp_path: Path
) -> None:
    model, watch = trained
    seen: list[float] = []
    found = replay_sparsity(model, UNTIL, tmp_path, progress=lambda share, _: seen.append(share))
    assert [point.step for point in found.curve] == [0, 5, 7, STEPS] and seen[-1] == 1 and len(seen) == UNTIL
    assert found.curve[:3] == watch.curve[:3]  # the same steps, to the bit
    data = TextBatches("pydoc", 12, 2)
    assert found.curve[3] == sparsity_point(model, held_out(data), STEPS)
    assert found.difference <= 5e-5 and found.tokens == 8 * 11  # the card's losses have four decimals
    record = found.record()
    again = card_curve({"sparsity": record})
    assert [point.step for point in again] == [0, 5, 7, STEPS] and record["until"] == UNTIL
    for kept, point in zip(again, found.curve, strict=True):
        assert kept.surprisal == pytest.approx(point.surprisal, abs=1e-5)
        assert torch.allclose(torch.tensor(kept.active["y"]), torch.tensor(point.active["y"]), atol=1e-5)
    assert card_curve({}) == card_curve(None) == [] and card_record([]) == {"curve": []}


def test_a_cancelled_replay_goes_on(trained: tuple[BDH, SparsityWatch], tmp_path: Path) -> None:
    model, watch = trained
    cancel = threading.Event()

    def stop(share: float, _: str) -> None:
        if share > 0.5:
            cancel.set()

    with pytest.raises(InterruptedError, match="Cancelled after step 4 of 7; the same call goes on"):
        replay_sparsity(model, UNTIL, tmp_path, progress=stop, cancel=cancel)
    made: list[str] = []
    found = replay_sparsity(model, UNTIL, tmp_path, progress=lambda _, words: made.append(words))
    assert found.curve[:3] == watch.curve[:3] and len(made) == 3


def test_another_training_is_refused(trained: tuple[BDH, SparsityWatch], tmp_path: Path) -> None:
    model, _ = trained
    for change, words in (
        (lambda card: card["curve"][3].update(train_loss=9.0), "not the training of"),
        (lambda card: card["data"]["corpora"][0].update(sha256="0"), "not the text any more"),
        (lambda card: card.pop("training"), "does not say how"),
    ):
        other = copy.copy(model)
        other.card = copy.deepcopy(model.card)
        change(other.card)
        with pytest.raises(ValueError, match=words):
            replay_sparsity(other, UNTIL, tmp_path / "folder")
    with pytest.raises(ValueError, match="expected 1 to 9"):
        replay_sparsity(model, 10, tmp_path)


def test_steps_are_closer_together_early() -> None:
    assert measured_steps(3) == [3] and measured_steps(30) == [5, 7, 10, 14, 20, 28, 30]
    point = CurvePoint(4, 1.0, None, 1e-3, 1.0, 10, 0.1)
    watch = SparsityWatch(tiny_model(), torch.randint(0, 23, (1, 6)), every=[2, 4])
    for step in (1, 2, 3, 4, 5):
        watch(CurvePoint(**{**asdict(point), "step": step}), 9)
    assert [each.step for each in watch.curve] == [0, 2, 4]
