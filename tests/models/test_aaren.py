"""Aaren against the running sums of its paper, and against softmax attention written out."""

import pytest
import torch
from torch import Tensor

import models
from models.architectures.shared import GELU, tiny
from models.decoder import Decoder
from models.recurrent.aaren import AarenConfig


def built(scale: float = 1.0) -> Decoder:
    model = models.build("aaren").double()
    with torch.no_grad():
        for block in model.blocks:
            block.mixer.query.mul_(scale)
            block.mixer.key.weight.mul_(10)
    return model


def tokens(length: int = 23, batch: int = 2) -> Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(0))


def running_sums(
    score: Tensor, v: Tensor, edit_at: int | None = None, factor: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """score [head, pos], v [head, pos, width]: the recurrence over (m, u, w); w is scaled by `factor` after token `edit_at`."""
    heads, length = score.shape
    m = torch.full((heads,), -torch.inf, dtype=score.dtype)
    u = torch.zeros(heads, dtype=score.dtype)
    w = torch.zeros(heads, v.shape[2], dtype=score.dtype)
    out = []
    for t in range(length):
        new = torch.maximum(m, score[:, t])
        u = u * (m - new).exp() + (score[:, t] - new).exp()
        w = w * (m - new).exp()[:, None] + (score[:, t] - new).exp()[:, None] * v[:, t]
        m = new
        out.append(w / u[:, None])
        if t == edit_at:
            w = factor * w
    return torch.stack(out, 1), {"m": m, "u": u, "w": w}


def test_output_and_state_are_the_papers_running_sums() -> None:
    for scale in (1.0, 300.0):  # scores of several hundred, which no exponent may meet
        model, ids = built(scale), tokens()
        _, cache = model.run_with_cache(ids)
        _, state = model(ids, return_state=True)
        for layer in range(model.n_layers):
            score = cache[f"blocks.{layer}.mixer.hook_score"].transpose(1, 2)
            assert scale == 1.0 or score.abs().max() > 300
            v = cache["v", layer].transpose(1, 2)
            z = cache["z", layer].transpose(1, 2)
            for b in range(2):
                expected, last = running_sums(score[b], v[b])
                assert (z[b] - expected).abs().max() < 1e-12
                assert (state.slot(layer, "state")[b, :, 0] - last["w"]).abs().max() < 1e-12
                assert (state.slot(layer, "normaliser")[b] - last["u"]).abs().max() < 1e-12
                assert (state.slot(layer, "maximum")[b] - last["m"]).abs().max() < 1e-12


def test_the_pattern_is_softmax_of_one_row_of_scores() -> None:
    model, ids = built(), tokens()
    _, cache = model.run_with_cache(ids, names=["*.hook_score", "*.hook_pattern"])
    for layer, pattern in model.patterns(ids).items():
        score = cache[f"blocks.{layer}.mixer.hook_score"].transpose(1, 2)
        hidden = torch.ones(23, 23).triu(1).bool()
        expected = score[:, :, None].expand(-1, -1, 23, -1).masked_fill(hidden, -torch.inf).softmax(-1)
        assert (pattern.values - expected).abs().max() < 1e-12
        assert pattern.meta.is_distribution and pattern.entropy().isfinite().all()


def test_edits_of_state_and_normaliser_equal_the_loop() -> None:
    """Scaling w after a token equals the loop with the same edit; scaling u by the inverse does the same to later outputs."""
    model, ids, at = built(), tokens(), 9
    _, cache = model.run_with_cache(ids, names=["blocks.0.mixer.hook_score", "blocks.0.mixer.hook_v"])
    names = ["blocks.0.mixer.hook_z"]
    half = [("blocks.0.mixer.hook_state[9]", lambda s, hook: 0.5 * s)]
    _, edited = model.run_with_cache(ids, names=names, hooks=half)
    for b in range(2):
        score = cache["blocks.0.mixer.hook_score"][b].T
        expected, _ = running_sums(score, cache["v", 0][b].transpose(0, 1), at, 0.5)
        assert (edited[names[0]][b].transpose(0, 1) - expected).abs().max() < 1e-12
    both = [*half, ("blocks.0.mixer.hook_normaliser[9]", lambda u, hook: 0.5 * u)]
    _, forgot = model.run_with_cache(ids, names=names, hooks=both)
    _, plain = model.run_with_cache(ids, names=names)
    pattern = model.run_with_cache(ids, names=["blocks.0.mixer.hook_pattern"], hooks=both)[1]["pattern", 0]
    assert (forgot[names[0]][:, : at + 1] - plain[names[0]][:, : at + 1]).abs().max() == 0
    value = cache["v", 0].transpose(1, 2)
    weights = plain_weights(cache["blocks.0.mixer.hook_score"].transpose(1, 2), at, 0.5)
    assert (forgot[names[0]].transpose(1, 2) - weights @ value).abs().max() < 1e-12
    assert pattern.shape == weights.shape


def plain_weights(score: Tensor, at: int, factor: float) -> Tensor:
    """Softmax weights in which sources up to `at` count `factor` times for readers after `at`."""
    length = score.shape[-1]
    weight = score.exp()[:, :, None].expand(-1, -1, length, -1).tril()
    early = (torch.arange(length)[:, None] > at) & (torch.arange(length) <= at)
    weight = torch.where(early, factor * weight, weight)
    return weight / weight.sum(-1, keepdim=True)


def test_learned_queries_get_a_gradient_and_heads_must_divide() -> None:
    model = built()
    model(tokens(), return_type="loss").backward()
    assert model.blocks[1].mixer.query.grad.abs().max() > 0
    with pytest.raises(ValueError, match=r"multiple of n_heads \(5\)"):
        models.build("aaren", config=tiny(AarenConfig(n_heads=5), GELU))
