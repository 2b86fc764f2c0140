"""Every family of checkpoints: what transformers computes from a saved checkpoint, and what we compute from the same files."""

import copy
from pathlib import Path

import pytest
import torch

import models
from tests.models.pretrained.reference import CASES, LAYERS, NEW, Pair, all_double, batch, largest, pair

EXACT, CLOSE = 1e-10, 1e-4
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
    assert largest((logits - expected.logits)[mask]) < EXACT
    assert largest((unwatched - expected.logits)[mask]) < EXACT, "the fused kernels give the same"
    assert len(expected.hidden_states) == LAYERS + 1
    for layer in range(LAYERS):
        assert largest((cache["resid_pre", layer] - expected.hidden_states[layer])[mask]) < EXACT
        if both.case.patterns:
            difference = (cache["pattern", layer] - expected.attentions[layer]).transpose(1, 2)
            assert largest(difference[mask]) < EXACT
    assert largest((cache["ln_final.hook_normalized"] - expected.hidden_states[-1])[mask]) < EXACT
    assert float(logits.std()) > 0.1, "not a comparison of zeros"


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
        assert largest(cache["resid_pre", layer] - theirs_here) < CLOSE * max(1.0, largest(theirs_here))


def test_saved_again(both: Pair, tmp_path: Path) -> None:
    """What was opened can be saved by us and opened again: the same logits."""
    tokens, _, _ = batch(None)
    models.save(both.ours, tmp_path / "saved")
    again = models.load(tmp_path / "saved", dtype=torch.float64)
    with torch.no_grad():
        assert largest(again(tokens) - both.ours(tokens)) < 1e-12
