"""LEACE against its definition, against the closed form for invertible covariances, and in a model; steering with its random control."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

import models
from probes.erasure import Eraser, fit_eraser
from probes.steering import mean_difference, steering_curve
from workbench.instrument.errors import HookError
from workbench.lab import checkpoints
from workbench.lab.checkpoints import CheckpointError, write_tensors


def data(n: int = 500, width: int = 9, classes: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Correlated activations of very unequal variances in which classes differ."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    mixing = rng.normal(size=(width, width)) * np.geomspace(0.05, 5, width)
    return rng.normal(size=(n, width)) @ mixing + rng.normal(size=(classes, width))[labels] + 2.0, labels


def one_hot(labels: np.ndarray) -> np.ndarray:
    z = np.eye(labels.max() + 1)[labels]
    return z - z.mean(0)


def test_no_linear_classifier_beats_a_constant_afterwards() -> None:
    x, labels = data()
    erased = fit_eraser(x, labels)(x).numpy()
    assert np.abs((erased - erased.mean(0)).T @ one_hot(labels)).max() / len(x) < 1e-12
    before = LogisticRegression(max_iter=5000).fit(x, labels)
    after = LogisticRegression(C=1e6, max_iter=5000, tol=1e-10).fit(erased, labels)
    entropy = -np.sum((p := np.bincount(labels) / len(labels)) * np.log(p))
    loss = -np.log(after.predict_proba(erased)[np.arange(len(x)), labels]).mean()
    assert before.score(x, labels) > p.max() + 0.2
    assert np.isclose(loss, entropy, atol=1e-6) and after.predict_proba(erased).std(0).max() < 1e-4
    assert np.isclose(after.score(erased, labels), p.max())


def test_it_is_the_smallest_change_by_lagrange_and_among_feasible_maps() -> None:
    """min E|Ax − x|² subject to A Σ_xz = 0 has A = I − Σ_xz (Σ_xzᵀ Σ⁻¹ Σ_xz)⁺ Σ_xzᵀ Σ⁻¹, another formula for the same map."""
    x, labels = data()
    centred, z = x - x.mean(0), one_hot(labels)
    sigma, cross = centred.T @ centred / len(x), centred.T @ z / len(x)
    inverse = np.linalg.inv(sigma)
    a = np.eye(9) - cross @ np.linalg.pinv(cross.T @ inverse @ cross, rcond=1e-10) @ cross.T @ inverse
    eraser = fit_eraser(x, labels)
    assert eraser.rank == 2
    assert np.allclose(eraser(x).numpy(), centred @ a.T + x.mean(0), atol=1e-8)
    cost = np.square(eraser(x).numpy() - x).sum()
    free = np.linalg.svd(cross.T)[2][2:]  # maps A + N with N Σ_xz = 0 are all that is feasible
    for seed in range(5):
        step = 0.05 * np.random.default_rng(seed).normal(size=(9, len(free))) @ free
        assert np.square(centred @ (a + step).T - centred).sum() > cost
    orthogonal = np.linalg.qr(cross)[0][:, :2]
    assert np.square(centred @ orthogonal).sum() > 1.5 * cost, "orthogonal projection guards as well and changes more"


def test_singular_activations_and_continuous_concepts() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 4)) @ rng.normal(size=(4, 10))  # rank 4 in width 10
    z = x[:, :2] + rng.normal(size=(200, 2))
    eraser = fit_eraser(x, z)
    erased = eraser(x).numpy()
    assert eraser.rank == 2 and np.abs((erased - erased.mean(0)).T @ (z - z.mean(0))).max() / 200 < 1e-10
    outside = np.linalg.svd(x, full_matrices=True)[2][-1]  # a direction that never varied is left alone
    moved = eraser(x[:1] + outside).numpy() - eraser(x[:1]).numpy()
    assert np.allclose(moved, outside)
    twice = eraser(eraser(x)).numpy()
    assert np.allclose(twice, erased), "a projection"


def test_an_unrelated_concept_and_mistakes() -> None:
    x, labels = data(400)
    assert fit_eraser(np.concatenate([x, x]), np.repeat([0, 1], 400)).rank == 0, "equal class means: nothing to erase"
    with pytest.raises(ValueError, match="nothing to erase"):
        fit_eraser(x, np.zeros(400))
    with pytest.raises(ValueError, match="label each"):
        fit_eraser(x, labels[:3])
    with pytest.raises(ValueError, match="nan"):
        fit_eraser(np.full((3, 2), np.nan), [0, 1, 0])


@pytest.mark.parametrize("name", ["gpt2", "llama", "retnet", "mamba2", "bdh"])
def test_in_a_model_the_concept_is_gone_where_it_was_erased_and_only_there(name: str) -> None:
    model = models.build(name).double()
    tokens = torch.randint(0, 256, (12, 9), generator=torch.Generator().manual_seed(0))
    site = "blocks.1.hook_resid_post"
    x = model.run_with_cache(tokens, names=site)[1][site].detach()
    labels = (tokens % 2).flatten()
    eraser = fit_eraser(x.flatten(0, 1), labels)
    after = model.run_with_cache(tokens, names=site, hooks=[eraser.at(site)])[1][site].detach()
    z = one_hot(labels.numpy())
    covariance = (after.flatten(0, 1) - after.flatten(0, 1).mean(0)).T.numpy() @ z
    assert np.abs(covariance).max() / len(z) < 1e-10
    part = model.run_with_cache(tokens, names=site, hooks=[eraser.at(site, positions=[2, -1])])[1][site].detach()
    assert torch.equal(part[:, :2], x[:, :2]) and torch.allclose(part[:, [2, -1]], after[:, [2, -1]])
    with pytest.raises(HookError, match="expected some of 0"):
        model.run_with_hooks(tokens, hooks=[eraser.at(site, positions=[9])])
    with pytest.raises(HookError, match="no axis 'head'"):
        model.run_with_hooks(tokens, hooks=[eraser.at(site, head=0)])
    with pytest.raises(HookError, match="fitted on width"):
        model.run_with_hooks(tokens, hooks=[eraser.at("unembed.hook_out")])


def test_one_head_is_erased() -> None:
    model = models.build("bdh")  # its heads come before positions
    tokens = torch.arange(10)[None]
    x = model.run_with_cache(tokens, names="blocks.1.hook_a")[1]["blocks.1.hook_a"].detach()
    eraser = fit_eraser(x[0, 1], np.arange(10) % 2)
    after = model.run_with_cache(tokens, names="blocks.1.hook_a", hooks=[eraser.at("blocks.1.hook_a", head=1)])[1][
        "blocks.1.hook_a"
    ]
    assert torch.equal(after[:, 0], x[:, 0]) and torch.allclose(after[0, 1].double(), eraser(x[0, 1]), atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ storing


@pytest.mark.parametrize("classes", [2, 4])
def test_a_stored_eraser_is_the_same_to_the_bit(classes: int, tmp_path: Path) -> None:
    x, labels = data(classes=classes)
    eraser = fit_eraser(x, labels)
    path = eraser.save(tmp_path / "new" / "classes.safetensors")
    again = Eraser.load(path)
    assert (again.rank, again.n_rows, repr(again)) == (classes - 1, 500, repr(eraser))
    assert torch.equal(again(x), eraser(x)) and again.mean.dtype == torch.float64
    once = path.read_bytes()
    assert again.save(path).read_bytes() == once, "equal erasers are equal files"
    assert [each.name for each in path.parent.iterdir()] == ["classes.safetensors"], "no temporary file is left"


def test_an_eraser_without_dimensions_is_stored_too(tmp_path: Path) -> None:
    x, _ = data(400)
    nothing = fit_eraser(np.concatenate([x, x]), np.repeat([0, 1], 400))
    again = Eraser.load(nothing.save(tmp_path / "nothing.safetensors"))
    assert again.rank == 0 and torch.equal(again(x), torch.from_numpy(x))


def test_a_stopped_save_leaves_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = data()
    path = fit_eraser(x, labels).save(tmp_path / "eraser.safetensors")
    before = path.read_bytes()

    def stopped(*arguments: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(checkpoints.os, "replace", stopped)
    with pytest.raises(OSError, match="no space"):
        fit_eraser(2 * x, labels).save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_files_of_anything_else_are_refused_by_name(tmp_path: Path) -> None:
    x, labels = data()
    eraser = fit_eraser(x, labels)
    with pytest.raises(ValueError, match=r"such as eraser\.safetensors, got 'eraser\.pt'"):
        eraser.save(tmp_path / "eraser.pt")
    with pytest.raises(CheckpointError, match="no file"):
        Eraser.load(tmp_path / "none.safetensors")
    path = tmp_path / "other.safetensors"
    write_tensors(path, {"weight": eraser.read})
    with pytest.raises(CheckpointError, match="holds weight, and no eraser"):
        Eraser.load(path)
    whole = eraser.save(tmp_path / "whole.safetensors").read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        Eraser.load(path)
    Eraser(eraser.read, eraser.write[:, 1:], eraser.mean, 3).save(path)
    with pytest.raises(CheckpointError, match=r"write \[2, 8\]"):
        Eraser.load(path)


# ---------------------------------------------------------------------------------------------------------- steering


def first_logit(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits[:, -1, 0] - logits[:, -1, 1]


@pytest.fixture(scope="module")
def steerable():  # type: ignore[no-untyped-def]
    """Texts of even and of odd bytes, whose embeddings are moved along W_U[0] − W_U[1] and against it."""
    model = models.build("llama")
    with torch.no_grad():
        wanted = model.W_U[:, 0] - model.W_U[:, 1]
        wanted = wanted / wanted.norm()
        model.embed.W_E[::2] += 0.2 * wanted
        model.embed.W_E[1::2] -= 0.2 * wanted
    g = torch.Generator().manual_seed(0)
    even, odd = (2 * torch.randint(0, 128, (24, 6), generator=g) + offset for offset in (0, 1))
    return model, even, odd, wanted


def test_the_difference_of_means_is_the_planted_direction(steerable) -> None:  # type: ignore[no-untyped-def]
    model, even, odd, wanted = steerable
    found = mean_difference(model, even, odd, "blocks.0.hook_resid_pre")
    assert torch.cosine_similarity(found.vector, wanted, dim=0) > 0.95 and found.separation == 1.0
    by_hand = model.embed.W_E[even[:, -1]].mean(0) - model.embed.W_E[odd[:, -1]].mean(0)
    assert torch.allclose(found.vector, by_hand, atol=1e-6)
    texts = [model.to_string(row) for row in torch.randint(97, 120, (5, 4))]
    ragged = mean_difference(model, [*texts, "abcdefg"], texts, "blocks.0.hook_resid_pre", position=None)
    assert ragged.positive.shape == (6, 24)
    with pytest.raises(ValueError, match="axes batch pos width"):
        mean_difference(model, even, odd, "blocks.0.attn.hook_z")


def test_it_moves_the_output_more_than_random_directions_do(steerable) -> None:  # type: ignore[no-untyped-def]
    model, even, odd, _ = steerable
    direction = mean_difference(model, even, odd, "blocks.2.hook_resid_post")
    curve = steering_curve(model, odd, direction, first_logit, coefficients=(-1, 0, 1), controls=19)
    assert curve.means[0] < curve.means[1] < curve.means[2]
    assert curve.p(1) == 1 / 20
    direct = model.run_with_hooks(odd, hooks=[direction.at(1.0)])
    assert np.allclose(curve.metric[2], first_logit(direct, odd).detach().double().numpy(), atol=1e-6)
    with pytest.raises(ValueError, match="was not measured"):
        curve.p(3)


def test_a_random_direction_is_not_special(steerable) -> None:  # type: ignore[no-untyped-def]
    """The decoy: directions of no meaning get p-values that are spread, and lengths are matched."""
    model, even, odd, _ = steerable
    direction = mean_difference(model, even, odd, "blocks.2.hook_resid_post")
    for like in ("uniform", "halves"):
        drawn = direction.random(6, seed=3, like=like)
        assert torch.allclose(drawn.norm(dim=-1), direction.vector.norm().expand(6), rtol=1e-5)
    halves = mean_difference(model, even[:12], even[12:], "blocks.2.hook_resid_post")
    ps = []
    for seed, vector in enumerate(direction.random(6, seed=11)):
        decoy = type(halves)(halves.point, vector, halves.positive, halves.negative)
        ps.append(steering_curve(model, odd, decoy, first_logit, coefficients=(0, 1), controls=9, seed=seed).p(1))
    assert max(ps) > 0.3 and np.mean(ps) > 0.2
    with pytest.raises(ValueError, match="Unknown kind of random direction"):
        direction.random(2, like="other")
