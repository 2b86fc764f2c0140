"""The report on what a model learned from the `concepts` corpus, on models that know everything or nothing; and the shipped model."""

import json
import math
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

import models
from models import registry
from models.bdh.concept_report import active_shares, answers, concept_report, losses
from models.bdh.model import BDH, BDHConfig
from workbench.lab.concept_corpus import SPLITS, concept_text, sentences
from workbench.lab.concept_words import WORDS
from workbench.lab.corpora import Corpus


class Clairvoyant:
    """Predicts the next token of what it is given, or, where `blind` bytes come, something else."""

    def __init__(self, blind: str = "") -> None:
        self.blind = torch.tensor(list(blind.encode()), dtype=torch.long)
        self.pad = models.build("bdh").pad

    def eval(self) -> "Clairvoyant":
        return self

    def __call__(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        after = torch.cat([tokens[:, 1:], tokens[:, :1]], 1)
        return torch.nn.functional.one_hot(torch.where(torch.isin(after, self.blind), 0, after), 256).float()


@pytest.fixture(scope="module")
def card() -> dict[str, Any]:
    return json.loads((registry.SHIPPED / "bdh-concepts" / "card.json").read_text())


@pytest.fixture(scope="module")
def shipped() -> BDH:
    return models.load("bdh-concepts")  # type: ignore[return-value]


def test_whoever_sees_the_future_answers_everything() -> None:
    assert all(share == 1 for shares in answers(Clairvoyant(), 60).values() for share in shares.values())  # type: ignore[arg-type]


def test_one_wrong_byte_makes_an_answer_wrong_and_no_other() -> None:
    """Blind for "k": exactly the answers with a k are wrong."""
    found = answers(Clairvoyant("k"), 200)  # type: ignore[arg-type]
    for split in SPLITS:
        asked = [s for s in islice((s for s in sentences(split, 1) if s.answer), 200) if s.answer and s.answer[0]]
        told = [s.text.encode()[slice(*s.answer)] for s in asked if s.answer]
        assert found[split]["all"] == pytest.approx(sum(b"k" not in answer for answer in told) / len(told))
    assert 0.5 < found["train"]["all"] < 1


def test_losses_of_a_model_that_knows_nothing() -> None:
    """With a zero unembedding every byte costs log 256; the n-grams know the training corpus and less of what is new."""
    model = BDH(BDHConfig(n_layers=1, d_model=8, n_heads=2, n_neurons=8, dropout=0.0))
    with torch.no_grad():
        model.unembed.weight.zero_()  # type: ignore[union-attr]
    text = concept_text("train", 300_000).encode()
    found = losses(model, 64, 32, Corpus("concepts", "train", text, "MIT", "generated", "a part of the training text"))
    assert all(found[split]["model"] == pytest.approx(math.log(256), abs=1e-5) for split in SPLITS)
    for name in ("3-gram", "6-gram"):
        assert found["train"][name] < found["templates"][name] and found["train"][name] < found["words"][name]
    assert found["train"]["6-gram"] < found["train"]["3-gram"] < 2


def test_active_shares_count_what_fires() -> None:
    model = BDH(BDHConfig(n_layers=2, d_model=8, n_heads=2, n_neurons=16, dropout=0.0, init_std=0.3)).eval()
    with torch.no_grad():
        model.weights.D_x[:, :, :2] = 0  # two of eight neurons per head never fire
    found = active_shares(model, context=20, windows=3)
    assert set(found) == {"x", "gate", "y"} and all(len(layers) == 2 for layers in found.values())
    for layer in range(2):
        assert 0.2 < found["x"][layer] < 0.75 and found["y"][layer] < found["x"][layer] < found["gate"][layer] + 0.75
    with torch.no_grad():
        model.weights.D_x.zero_()
    assert active_shares(model, context=20, windows=3)["x"] == [0.0, 0.0]


# ------------------------------------------------------------------------------------------------------ shipped model


def test_the_shipped_model_knows_what_kind_of_thing_comes(shipped: BDH) -> None:
    """After "the capital of …" comes a capital, after "paid in" a currency, after "works" a workplace; not always the right one."""
    currencies = {word.facts["en_plural"] for word in WORDS["currency"]}
    cases = {
        "The capital of {} is ": ("country", {word.facts["en_capital"] for word in WORDS["country"]}),
        "In {} they paid in ": ("country", currencies),
        "The {} works ": ("profession", {word.facts["en_workplace"] for word in WORDS["profession"]}),
    }
    for prompt, (concept, possible) in cases.items():
        words = [word for word in WORDS[concept] if not word.held_out][:10]
        tokens, mask = shipped.pad([prompt.format(word.key) for word in words])
        told = shipped.generate(tokens, 18, mask=mask)[:, tokens.shape[1] :]
        kind = [str(shipped.to_string(row)).split(".")[0] in possible for row in told]
        assert sum(kind) >= 8, (prompt, kind)


def test_the_card_says_how_it_is(shipped: BDH, card: dict[str, Any]) -> None:
    """Fresh text of each split costs about what the card says, in the same order; y is sparser than x and than the gate in every layer."""
    report = card["concepts"]
    text = {split: shipped.to_tokens(concept_text(split, 4 * 257, seed=3)[:1000])[:, :1000] for split in SPLITS}
    measured = {
        split: float(shipped(tokens[:, :1000].view(-1)[: 4 * 240].view(4, 240), return_type="loss").detach())
        for split, tokens in text.items()
    }
    for split, loss in measured.items():
        assert loss == pytest.approx(report["losses"][split]["model"], abs=0.35 if split != "templates" else 0.8)
    assert sorted(SPLITS, key=lambda split: measured[split]) == ["train", "combinations", "words", "templates"]
    for layer, share in enumerate(report["active"]["y"]):
        assert 0.02 < share < 0.08 < report["active"]["x"][layer] < 0.4 and report["active"]["gate"][layer] > 0.2


@pytest.mark.slow
def test_the_report_on_the_card_can_be_had_again(shipped: BDH, card: dict[str, Any]) -> None:
    """Every number, to what another build of torch may round differently."""
    report = concept_report(shipped)
    for split, values in card["concepts"]["losses"].items():
        assert report["losses"][split] == pytest.approx(values, abs=2e-3)
        for family, share in card["concepts"]["answers"][split].items():
            assert report["answers"][split][family] == pytest.approx(share, abs=0.02 if family == "all" else 0.15)
    for name, shares in card["concepts"]["active"].items():
        assert report["active"][name] == pytest.approx(shares, abs=1e-3)
