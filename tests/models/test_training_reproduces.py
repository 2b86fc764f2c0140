"""The commands on the cards of the shipped text models give the loss curves on the cards (slow: it trains for a moment)."""

import threading
from pathlib import Path

import pytest

import models
from app.model_service import shipped_cards
from workbench.lab.batches import TextBatches
from workbench.lab.corpora import MissingData
from workbench.lab.training import CurvePoint, TrainingConfig, train

CARDS = [card for card in shipped_cards() if card["command"].startswith("workbench train")]


@pytest.mark.slow
@pytest.mark.parametrize("card", CARDS, ids=lambda card: card["name"])
def test_the_first_steps_are_those_of_the_card(card: dict, tmp_path: Path) -> None:  # type: ignore[type-arg]
    """Built from the preset, trained on the same windows: the losses of the first steps equal the card's to its four decimals."""
    settings, data = card["training"], card["data"]
    try:
        batches = TextBatches(
            data["corpora"][0]["name"], data["context"], data["batch_size"], data["seed"], validation_windows=1
        )
    except MissingData as missing:
        pytest.skip(f"the corpus is not here: {missing}")
    if batches.corpus.sha256 != data["corpora"][0]["sha256"]:
        pytest.skip("this Python's help topics differ from those that the model was trained on")
    expected = {point["step"]: point["train_loss"] for point in card["curve"][:1]}
    last, enough, seen = max(expected), threading.Event(), {}

    def watch(point: CurvePoint, steps: int) -> None:
        seen[point.step] = round(point.train_loss, 4)
        if point.step == last:
            enough.set()

    fields = {
        key: settings[key]
        for key in ("steps", "learning_rate", "warmup", "schedule", "final_rate", "weight_decay", "seed", "clip")
    }
    fields |= {"autocast": settings["autocast"]} if "autocast" in settings else {}  # cards of earlier models do not name it
    words = card["command"].split()
    model = models.build(card["architecture"], words[words.index("--config") + 1])
    train(
        model,
        batches,
        TrainingConfig(**fields, threads=1, eval_every=10**6, checkpoint_every=10**6),
        tmp_path,
        progress=watch,
        cancel=enough,
    )
    assert {step: seen[step] for step in expected} == expected
