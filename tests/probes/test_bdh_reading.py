"""Reading: contributions sum to what they claim, and pairs sum to the score."""

import pytest
import torch
from torch import Tensor

from models.bdh.model import BDH
from probes.bdh.reading import matching_pairs, read_circuit, reading_gradient
from tests.probes.bdh_naive import EXACT, largest, naive, tiny_model, tiny_tokens
from workbench.instrument.interventions import FreezeNorm

AT, TOKEN = 7, 11


@pytest.fixture(scope="module")
def model() -> BDH:
    return tiny_model()


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return tiny_tokens()


def test_last_layer_contributions_sum_to_its_share_of_the_logit(model: BDH, tokens: Tensor) -> None:
    circuit = read_circuit(model, tokens, logit=TOKEN, at=AT)
    _, cache = model.run_with_cache(tokens, names=["blocks.2.ln_u.hook_normalized", "blocks.2.ln_v.hook_scale"])
    u = cache["blocks.2.ln_u.hook_normalized"][:, AT] / cache["blocks.2.ln_v.hook_scale"][:, AT]
    share = u @ model.W_U[:, TOKEN]
    assert largest(circuit.contributions[:, -1].sum((-1, -2)) - share) < EXACT
    assert largest(share) > 1e-2


def test_scores_are_the_pattern_and_gradients_are_slopes(model: BDH, tokens: Tensor) -> None:
    """Every contribution is the true slope: forgetting token τ by a small step changes the frozen-norm logit accordingly."""
    circuit = read_circuit(model, tokens, logit=TOKEN, at=AT)
    patterns = model.patterns(tokens)
    _, scales = model.run_with_cache(tokens, role="norm_scale")
    frozen = FreezeNorm.from_cache(scales)
    plain = model.run_with_hooks(tokens, hooks=[frozen])[:, AT, TOKEN]
    step = 1e-6
    for layer in range(3):
        assert largest(circuit.scores[:, layer] - patterns[layer].values[:, :, AT, :AT]) < EXACT
        for head, past in ((0, 3), (1, 5)):

            def weaken(pattern: Tensor, hook: object, head: int = head, past: int = past) -> Tensor:
                pattern[:, head, AT, past] *= 1 - step
                return pattern

            changed = model.run_with_hooks(tokens, hooks=[frozen, (f"blocks.{layer}.attn.hook_pattern", weaken)])
            slope = (plain - changed[:, AT, TOKEN]) / step
            assert largest(slope - circuit.contributions[:, layer, head, past]) < 1e-5 * max(1.0, largest(slope))


def test_directions_over_the_vocabulary(model: BDH, tokens: Tensor) -> None:
    direction = torch.zeros(37)
    direction[3], direction[8] = 1, -1
    both = read_circuit(model, tokens, logit=direction, at=AT).contributions
    apart = [read_circuit(model, tokens, logit=token, at=AT).contributions for token in (3, 8)]
    assert largest(both - (apart[0] - apart[1])) < EXACT
    assert largest(both) > 1e-3


def test_top_lists_the_largest(model: BDH, tokens: Tensor) -> None:
    circuit = read_circuit(model, tokens, logit=TOKEN, at=AT)
    top = circuit.top(5, sequence=1)
    for layer, head, past, value in top:
        assert value == float(circuit.contributions[1, layer, head, past])
    kept = torch.tensor([abs(value) for *_, value in top])
    assert torch.equal(kept, circuit.contributions[1].abs().flatten().topk(5).values.float())


def test_pairs_sum_to_the_score(model: BDH, tokens: Tensor) -> None:
    run = naive(model, tokens[1])
    for layer, head, at, past in ((0, 0, 8, 2), (2, 1, 6, 5)):
        pairs = matching_pairs(model, tokens[1:], layer, head, at=at, past=past)
        expected = float(run.key[layer, at][head] @ run.key[layer, past][head])
        assert pairs.score == pytest.approx(expected, abs=EXACT)
        assert float(pairs.contribution.sum()) == pytest.approx(expected, abs=EXACT)
        assert largest(pairs.same + pairs.cross - pairs.contribution) == 0
        assert bool((pairs.contribution.abs().diff() <= 0).all())
        for number, pair in enumerate(pairs.pairs.tolist()):
            part = slice(2 * pair, 2 * pair + 2)
            assert largest(pairs.x_now[number] - run.x[layer, at][head, part]) < EXACT
            assert largest(pairs.x_past[number] - run.x[layer, past][head, part]) < EXACT
            rotated = run.key[layer, at][head, part] @ run.key[layer, past][head, part]
            assert abs(float(pairs.contribution[number] - rotated)) < EXACT
    assert len(matching_pairs(model, tokens[1:], 1, 0, at=8, past=2, k=2).pairs) == 2


def test_without_rotation_nothing_crosses(tokens: Tensor) -> None:
    model = tiny_model()
    model.weights.frequencies.zero_()
    pairs = matching_pairs(model, tokens[:1], 1, 0, at=6, past=2)
    assert largest(pairs.cross) == 0 and largest(pairs.same) > 0
    assert bool((pairs.same >= 0).all())  # x is not negative


def test_mistakes_are_named(model: BDH, tokens: Tensor) -> None:
    with pytest.raises(ValueError, match="the first token reads nothing"):
        read_circuit(model, tokens, logit=1, at=0)
    with pytest.raises(ValueError, match="expected a token id or a direction"):
        read_circuit(model, tokens, logit=torch.zeros(5))
    with pytest.raises(ValueError, match="Expected past < at"):
        matching_pairs(model, tokens[:1], 0, 0, at=3, past=3)
    with pytest.raises(ValueError, match="has heads 0"):
        matching_pairs(model, tokens[:1], 0, 2, past=1)
    with pytest.raises(ValueError, match="layer is 3"):
        reading_gradient(model, tokens, 3, 1, 0)
