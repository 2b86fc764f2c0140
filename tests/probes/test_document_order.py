"""Orders of documents on a model with planted attention, and against passes made by hand."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import models
from probes.context_order import attention_buckets, context_mass
from probes.document_order import plan_order, store_order
from probes.progress import MeasurementCancelled
from tests.probes.test_context_order import Planted
from workbench.lab.runs import RunStore

DOCUMENTS = ["cc", "zz", "aa", "mm"]


class Reader(Planted):
    """The planted model with bytes as tokens, whose next token is certain."""

    name, architecture, device = "planted", "planted", torch.device("cpu")

    def to_tokens(self, text: str) -> torch.Tensor:
        return torch.tensor([list(text.encode())])

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.zeros(1, tokens.shape[1], 256).index_fill(2, torch.tensor([65]), 100.0)

    def about(self) -> dict[str, str]:
        return {"provenance": "random"}


def test_documents_and_places_are_told_apart() -> None:
    """Weight ∝ byte · (1 + slope · position): documents rank by their bytes, places by how late they are, whatever stands there."""
    found = plan_order(Reader(slope=0.5), DOCUMENTS, "?", answer="A")  # type: ignore[arg-type]
    assert np.argsort(found.relevance).tolist() == [2, 0, 3, 1]  # a < c < m < z
    assert np.all(np.diff(found.profile) > 0)
    assert found.orders["attnrank"] == (2, 0, 3, 1)  # the most relevant at the most read place, the last
    assert plan_order(Reader(), DOCUMENTS, "?").orders["attention sorting"] == (
        2,
        0,
        3,
        1,
    )  # where no place is preferred
    assert found.orders["as given"] == (0, 1, 2, 3) and found.answer == 65
    assert all(abs(value) < 1e-9 for value in found.answers.values()) and found.next_tokens["attnrank"][0][0] == 65


def test_the_mass_is_that_of_each_shifted_prompt() -> None:
    model = models.build("gpt").double()
    found = plan_order(
        model, ["abc ", "de ", "fghi "], "jk", before="xy", answer="zw", rounds=2, bases=[10000.0, 500.0]
    )
    text, spans = "xyfghi abc de jk", [(2, 7), (7, 11), (11, 14)]  # the third document first: two shifts
    expected = context_mass(model, model.to_tokens(text), spans)[0].detach().numpy()
    np.testing.assert_allclose([found.mass[2, 0], found.mass[0, 1], found.mass[1, 2]], expected, rtol=1e-12)
    given = model.to_tokens("xyabc de fghi jk")
    with torch.no_grad():
        plain = model(given)[0, -1].log_softmax(-1)
        buckets = attention_buckets(model, given, [10000.0, 500.0])[0, -1]
    assert found.answers["as given"] == pytest.approx(float(plain[ord("z")]), abs=1e-12)
    assert found.answers["as given + buckets"] == pytest.approx(float(buckets[ord("z")]), abs=1e-12)
    assert set(found.answers) == {f"{name}{more}" for name in found.orders for more in ("", " + buckets")}


def test_it_is_stored_and_stops(tmp_path: Path) -> None:
    model, store = models.build("gpt"), RunStore(tmp_path)
    said: list[str] = []
    found = plan_order(model, DOCUMENTS, "?", progress=lambda fraction, words: said.append(words))
    run = store_order(store, model, found, settings={"rounds": 3})
    np.testing.assert_array_equal(run.array("mass"), found.mass)
    assert run.kind == "document-order" and run.manifest["results"]["orders"]["attnrank"] == list(
        found.orders["attnrank"]
    )
    assert "order 2 of 4" in said and found.answers == {}
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(MeasurementCancelled):
        plan_order(model, DOCUMENTS, "?", cancel=cancel)
    with pytest.raises(ValueError, match="1 documents"):
        plan_order(model, ["a"], "?")
