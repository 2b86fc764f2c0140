"""Composition and singular directions: against whole matrices, chance in closed form, planted circuits, the shipped one."""

import numpy as np
import pytest
import torch
from torch import Tensor

import models
from models.decoder import Decoder
from models.weight_processing import process_weights
from probes.embedding_space import NotBilinear, head_map
from probes.weights import composition, head_svd
from tests.instrument.tiny_models import lively


def whole(model: Decoder, layer: int, head: int, which: str) -> Tensor:
    left, right = head_map(model, layer, head, which)
    return left @ right


@pytest.mark.parametrize("name", ["gpt2", "llama", "retnet"])
def test_scores_are_those_of_the_whole_matrices(name: str) -> None:
    """Grouped queries (llama) and values wider than keys (retnet) included."""
    model = lively(name)
    found = composition(model, draws=2)
    n_heads = model.mixers[0].describe()["n_heads"]
    assert found.heads == tuple((layer, head) for layer in range(3) for head in range(n_heads)) and not found.skipped
    for a, b in [(0, n_heads), (1, 2 * n_heads + 1), (n_heads + 1, 3 * n_heads - 1)]:
        moved = whole(model, *found.heads[a], "ov")
        matched, moved_on = (whole(model, *found.heads[b], which) for which in ("qk", "ov"))
        for kind, later in (("Q", matched), ("K", matched.T), ("V", moved_on)):
            by_hand = (moved @ later).norm() / (moved.norm() * later.norm())
            assert found.scores[kind][a, b] == pytest.approx(float(by_hand), rel=1e-9)
    assert np.isnan(found.scores["Q"][n_heads, 0]) and np.isnan(found.scores["K"][0, 1]), "only earlier layers are read"


def test_chance_is_what_random_rotations_give() -> None:
    """Its mean square is 1/d_model exactly; its distribution that of rotating the whole matrices."""
    model = lively("gpt2")
    found = composition(model, draws=300)
    for kind in "QKV":
        square = found.chance[kind] ** 2 + found.spread[kind] ** 2 * 299 / 300
        assert np.nanmax(np.abs(np.sqrt(square) / found.expected - 1)) < 0.1
        assert np.sqrt(np.nanmean(square)) == pytest.approx(model.d_model**-0.5, rel=0.02)
    moved, matched = whole(model, 0, 1, "ov"), whole(model, 1, 2, "qk")
    generator = torch.Generator().manual_seed(3)
    by_hand = []
    for _ in range(300):
        frame, triangle = torch.linalg.qr(torch.randn(24, 24, generator=generator, dtype=torch.float64))
        turned = moved @ (frame * triangle.diagonal().sign()) @ matched
        by_hand.append(float(turned.norm() / (moved.norm() * matched.norm())))
    assert found.chance["Q"][1, 6] == pytest.approx(np.mean(by_hand), rel=0.05)
    assert found.spread["Q"][1, 6] == pytest.approx(np.std(by_hand), rel=0.25)


@pytest.mark.parametrize("kind", ["Q", "K", "V"])
def test_a_planted_composition_is_the_largest(kind: str) -> None:
    """Head 2.3 is given, on one side, the very directions that head 0.1 writes; a decoy writes strongly to nowhere."""
    model = models.build("gpt2").double()
    names = {"Q": "query", "K": "key", "V": "value"}
    with torch.no_grad():
        reader = getattr(model.blocks[2].attn, names[kind])
        reader.weight.unflatten(0, (4, -1))[3] = model.blocks[0].attn.W_O[1]
        model.blocks[1].attn.output.weight *= 50
    found = composition(model)
    best = found.largest(k=1)[0]
    assert (best.kind, best.earlier, best.later) == (kind, (0, 1), (2, 3)) and best.z > 7
    assert found.largest(kind, 2)[1].score < 0.75 * best.score


def test_the_shipped_induction_circuit() -> None:
    """K-composition of a previous-token head (0.1, 0.2 by its card) with an induction head is the largest of all; folding keeps that."""
    model = models.load("induction-circuit")
    for examined in (model, process_weights(model, fold_norms=True)):
        best = composition(examined, draws=20).largest(k=8)
        assert (best[0].kind, best[0].earlier) == ("K", (0, 2)) and best[0].later[0] == 1 and best[0].z > 10
        by_head = {pair.earlier for pair in composition(examined, draws=2).largest("K", 8)}
        assert by_head == {(0, 1), (0, 2)}, "all induction heads read both previous-token heads before anything else"


def test_shared_depth_lets_any_head_read_any() -> None:
    found = composition(lively("looped"), draws=2)
    assert np.isfinite(found.scores["V"]).all()


def test_layers_without_maps_of_heads_are_named() -> None:
    found = composition(lively("t5"), draws=2)
    assert "from a source" in found.skipped[1] and 0 not in found.skipped
    assert "from a source" in str(found.to_json()["skipped"]["1"])
    with pytest.raises(NotBilinear, match="no linear map"):
        composition(lively("bdh"))
    with pytest.raises(ValueError, match="Unknown kind 'k'"):
        found.largest("k")
    with pytest.raises(ValueError, match="at least 2"):
        composition(lively("gpt2"), draws=1)


@pytest.mark.parametrize("name", ["gpt2", "llama", "retnet"])
@pytest.mark.parametrize("which", ["ov", "qk"])
def test_directions_are_those_of_the_whole_matrix(name: str, which: str) -> None:
    model = lively(name)
    found = head_svd(model, 1, 2, which, directions=100)
    matrix = whole(model, 1, 2, which)
    width = len(found.values)
    expected = torch.linalg.svdvals(matrix)[:width].numpy()
    assert np.allclose(found.values, expected)
    rebuilt = sum(one.value * torch.outer(one.left, one.right) for one in found.directions)
    assert torch.allclose(torch.as_tensor(rebuilt), matrix)
    assert sum(one.share for one in found.directions) == pytest.approx(1)
    assert 1 <= found.effective_rank <= width + 1e-9
    first = found.directions[0]
    scores = model.W_E @ first.left
    assert first.reads[0] == (int(scores.argmax()), pytest.approx(float(scores.max())))
    assert first.reads_against[0] == (int(scores.argmin()), pytest.approx(float(-scores.min())))


@torch.no_grad()
def test_a_planted_map_is_read_off() -> None:
    """A head that writes token 66 when it reads token 65, and nothing else."""
    model = models.build("gpt2").double()
    mixer = model.blocks[1].attn
    with torch.no_grad():
        mixer.value.weight.unflatten(0, (4, -1))[2] = 0
        mixer.value.weight.unflatten(0, (4, -1))[2, 0] = model.W_E[65]
        mixer.output.weight.unflatten(1, (4, -1))[:, 2] = 0
        mixer.output.weight.unflatten(1, (4, -1))[:, 2, 0] = 7 * model.W_U[:, 66]
    found = head_svd(model, 1, 2)
    first = found.directions[0]
    pair = (first.reads, first.writes) if first.reads[0][0] == 65 else (first.reads_against, first.writes_against)
    assert pair[0][0][0] == 65 and pair[1][0][0] == 66
    assert found.effective_rank == pytest.approx(1) and first.share == pytest.approx(1)
    assert found.values[0] == pytest.approx(float(7 * model.W_E[65].norm() * model.W_U[:, 66].norm()))


def test_heads_that_are_not_there() -> None:
    with pytest.raises(ValueError, match=r"heads 0\.\.3"):
        head_svd(lively("gpt2"), 0, 9)
    with pytest.raises(ValueError, match="Unknown map"):
        head_svd(lively("gpt2"), 0, 0, "vo")
