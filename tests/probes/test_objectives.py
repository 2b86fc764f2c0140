"""Objectives against their definitions, and what they refuse."""

import pytest
import torch

from probes.objectives import (
    Divergence,
    LogitDifference,
    MeanLogProbability,
    ProbabilityDifference,
    last_real,
    measured,
    rows_at,
)


def logits_of(batch: int = 3, length: int = 4, vocab: int = 7, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, length, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_logit_differences_at_positions_of_their_own() -> None:
    logits = logits_of()
    found = LogitDifference([1, 2, 3], 6, at=torch.tensor([0, 2, -1]))(logits)
    expected = [logits[0, 0, 1] - logits[0, 0, 6], logits[1, 2, 2] - logits[1, 2, 6], logits[2, 3, 3] - logits[2, 3, 6]]
    torch.testing.assert_close(found, torch.stack(expected))
    torch.testing.assert_close(LogitDifference(4)(logits), logits[:, -1, 4])
    assert LogitDifference(4, 4)(logits).abs().max() == 0


def test_probability_differences_by_sequence_and_alike() -> None:
    logits = logits_of()
    right = torch.tensor([False, False, False, True, True, False, False])
    wrong = torch.tensor([True, True, False, False, False, False, False])
    p = logits[:, -1].softmax(-1)
    expected = p[:, 3] + p[:, 4] - p[:, 0] - p[:, 1]
    torch.testing.assert_close(ProbabilityDifference(right, wrong)(logits), expected)
    each = ProbabilityDifference(right.expand(3, -1), wrong.expand(3, -1))
    torch.testing.assert_close(each(logits), expected)
    with pytest.raises(ValueError, match=r"right is torch\.int64"):
        ProbabilityDifference(torch.tensor([3, 4]), wrong)(logits)


def test_divergences_are_kl() -> None:
    one, other = logits_of(seed=1), logits_of(seed=2)
    p, q = one.softmax(-1), other.softmax(-1)
    kl = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(Divergence(one)(other), -kl[:, -1])
    torch.testing.assert_close(Divergence(one, at=None)(other), -kl.mean(1))
    mask = torch.tensor([[True, True, True, False], [False, True, True, True], [True, True, True, True]])
    by_hand = torch.stack([kl[0, :3].mean(), kl[1, 1:].mean(), kl[2].mean()])
    torch.testing.assert_close(Divergence(one, at=None, mask=mask)(other), -by_hand)
    assert Divergence(one)(one).abs().max() < 1e-12
    with pytest.raises(ValueError, match="the reference's is"):
        Divergence(one)(other[:2])


def test_mean_log_probabilities_of_counted_tokens() -> None:
    logits, tokens = logits_of(), torch.tensor([[0, 1, 2, 3], [4, 5, 6, 0], [1, 1, 1, 1]])
    counted = torch.tensor([[False, True, False, True], [False, False, True, False], [False, True, True, True]])
    log_p = logits.log_softmax(-1)
    by_hand = torch.stack(
        [
            (log_p[0, 0, 1] + log_p[0, 2, 3]) / 2,
            log_p[1, 1, 6],
            (log_p[2, 0, 1] + log_p[2, 1, 1] + log_p[2, 2, 1]) / 3,
        ]
    )
    objective = MeanLogProbability(tokens, counted)
    torch.testing.assert_close(objective(logits), by_hand)
    torch.testing.assert_close(objective(logits[:, :-1]), by_hand)
    with pytest.raises(ValueError, match="never the first"):
        MeanLogProbability(tokens, torch.ones_like(counted))(logits)


def test_copies_are_measured_one_by_one() -> None:
    logits = logits_of(batch=6)
    objective = LogitDifference([1, 2, 3], 0)
    found = measured(objective, logits, copies=2)
    torch.testing.assert_close(found, torch.stack([objective(logits[:3]), objective(logits[3:])]))
    with pytest.raises(ValueError, match="one number for each of 3 sequences"):
        measured(lambda x: x.sum(-1), logits, copies=2)


def test_positions_are_checked() -> None:
    mask = torch.tensor([[False, True, True], [True, True, False]])
    assert last_real(mask).tolist() == [2, 1]
    x = logits_of()
    for at, message in ((4, r"positions 0\.\.3"), ([0, 1], "2 positions for 3"), (torch.tensor(0.5), "a position")):
        with pytest.raises(ValueError, match=message):
            rows_at(x, at)
    with pytest.raises(ValueError, match="wrong is 7"):
        LogitDifference(1, 7)(x)
