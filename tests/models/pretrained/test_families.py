"""Every family of checkpoints: what transformers computes from a saved checkpoint, and what we compute from the same files."""

from pathlib import Path

import pytest
import torch

import models
from tests.models.pretrained.reference import CASES, LAYERS, NEW, Pair, batch, largest, pair

CLOSE = 1e-4
SIDES = [None, "left", "right"]


@pytest.fixture(scope="module", params=CASES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return pair(CASES[request.param], tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("side", SIDES, ids=["whole", "left", "right"])
def test_logits_streams_and_patterns(both: Pair, side: str | None) -> None:
    tokens, mask, _ = batch(side)
    expected = both.reference(side)
    given = None if side is None else mask
    with torch.no_grad():
        logits, cache = both.ours.run_with_cache(tokens, mask=given)
        unwatched = both.ours(tokens, mask=given)
    assert largest((logits - expected.logits)[mask]) < both.case.exact
    assert largest((unwatched - expected.logits)[mask]) < both.case.exact, "the fused kernels give the same"
    for layer in range(LAYERS):
        assert largest((cache[both.case.streams, layer] - expected.hidden_states[layer])[mask]) < both.case.exact
    assert bool(expected.attentions) == both.case.patterns
    for layer, theirs in expected.attentions.items():
        assert largest((cache["pattern", layer] - theirs).transpose(1, 2)[mask]) < both.case.exact
    if "ln_final.hook_normalized" in cache:
        assert largest((cache["ln_final.hook_normalized"] - expected.hidden_states[-1])[mask]) < both.case.exact
    assert float(logits.std()) > 0.1, "not a comparison of zeros"


@pytest.mark.parametrize("side", SIDES[:2], ids=["whole", "left"])
def test_states(both: Pair, side: str | None) -> None:
    """What is carried after the last token."""
    if both.case.states is None:
        pytest.skip("no recurrent state")
    tokens, mask, _ = batch(side)
    expected = both.reference(side)
    with torch.no_grad():
        _, state = both.ours(tokens, mask=None if side is None else mask, return_state=True)
    assert expected.states
    for layer, theirs in expected.states.items():
        ours = both.state_of_ours(state, layer, theirs)
        assert largest(theirs - ours) < both.case.exact < largest(ours)


def test_generation(both: Pair) -> None:
    """Greedy continuation of a left-padded batch with a cache: the same 32 tokens."""
    tokens, mask, _ = batch("left")
    assert torch.equal(both.ours.generate(tokens, NEW, mask=mask)[:, -NEW:], both.generated())


def test_single_precision_as_it_comes(both: Pair) -> None:
    """In float32, nothing patched."""
    tokens, _, _ = batch(None)
    ours, theirs = models.load(both.folder), both.single()
    with torch.no_grad():
        expected = theirs(tokens, output_hidden_states=True)
        logits, cache = ours.run_with_cache(tokens)
    assert largest(logits - expected.logits) < CLOSE * max(1.0, largest(expected.logits))
    for layer in range(LAYERS):
        theirs_here = expected.hidden_states[layer]
        assert largest(cache[both.case.streams, layer] - theirs_here) < CLOSE * max(1.0, largest(theirs_here))


def test_saved_again(both: Pair, tmp_path: Path) -> None:
    """What was opened can be saved by us and opened again: the same logits."""
    tokens, _, _ = batch(None)
    models.save(both.ours, tmp_path / "saved")
    again = models.load(tmp_path / "saved", dtype=torch.float64)
    with torch.no_grad():
        assert largest(again(tokens) - both.ours(tokens)) < 1e-12
