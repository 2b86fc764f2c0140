"""Every family of checkpoints: what transformers computes from a saved checkpoint, and what we compute from the same files."""

import copy
from pathlib import Path

import pytest
import torch

import models
from tests.models.pretrained.reference import CASES, LAYERS, NEW, Pair, all_double, batch, largest, pair

CLOSE = 1e-4
SIDES = [None, "left", "right"]


@pytest.fixture(scope="module", params=CASES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return pair(CASES[request.param], tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("side", SIDES, ids=["whole", "left", "right"])
def test_logits_streams_and_patterns(both: Pair, side: str | None) -> None:
    tokens, mask, _ = batch(side)
    wanted = {"output_attentions": True} if both.case.patterns else {}
    expected = both.reference(side, **wanted)
    given = None if side is None else mask
    with torch.no_grad():
        logits, cache = both.ours.run_with_cache(tokens, mask=given)
        unwatched = both.ours(tokens, mask=given)
    assert largest((logits - expected.logits)[mask]) < both.case.exact
    assert largest((unwatched - expected.logits)[mask]) < both.case.exact, "the fused kernels give the same"
    for layer in range(LAYERS):
        assert largest((cache[both.case.streams, layer] - expected.hidden_states[layer])[mask]) < both.case.exact
        if both.case.patterns:
            difference = (cache["pattern", layer] - expected.attentions[layer]).transpose(1, 2)
            assert largest(difference[mask]) < both.case.exact
    if "ln_final.hook_normalized" in cache:
        assert largest((cache["ln_final.hook_normalized"] - expected.hidden_states[-1])[mask]) < both.case.exact
    assert float(logits.std()) > 0.1, "not a comparison of zeros"


@pytest.mark.parametrize("side", SIDES[:2], ids=["whole", "left"])
def test_states(both: Pair, side: str | None) -> None:
    """What is carried after the last token. Ours has keys before values, theirs the other way round where both are axes."""
    if not both.case.states:
        pytest.skip("no recurrent state")
    tokens, mask, _ = batch(side)
    expected = both.reference(side, use_cache=True)
    with torch.no_grad():
        _, state = both.ours(tokens, mask=None if side is None else mask, return_state=True)
    for layer in range(LAYERS):
        theirs, ours = expected.cache_params.get_recurrent_state(layer, state_idx=0), state.slot(layer, "state")
        theirs = theirs if theirs.shape == ours.shape else theirs.transpose(-1, -2)
        assert largest(theirs - ours) < both.case.exact < largest(ours)


def test_generation(both: Pair) -> None:
    """Greedy continuation of a left-padded batch with a cache: the same 32 tokens."""
    tokens, mask, _ = batch("left")
    both.theirs.generation_config.eos_token_id = None  # nothing ends a text before its time
    with all_double(both.case.model):
        expected = both.theirs.generate(
            tokens, attention_mask=mask.long(), max_new_tokens=NEW, do_sample=False, pad_token_id=0
        )
    assert torch.equal(both.ours.generate(tokens, NEW, mask=mask), expected)


def test_single_precision_as_it_comes(both: Pair) -> None:
    """In float32, nothing patched."""
    tokens, _, _ = batch(None)
    ours, theirs = models.load(both.folder), copy.deepcopy(both.theirs).float()
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
