"""The closed forms against sampling and autograd, the layer against the paper's formula, the study end to end."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from case_studies import run_study
from case_studies.linear_attention_regression import closed_form, study
from case_studies.linear_attention_regression.model import LinearSelfAttention, risk, sample_prompts
from workbench.lab.runs import RunStore

VARIANCES = np.array([1.5, 0.9, 0.4])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_layer(d: int = 3, seed: int = 0) -> LinearSelfAttention:
    model = LinearSelfAttention(d).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator(seed), dtype=torch.float64) / 3)
    return model


def test_the_layer_is_the_paper_s_formula() -> None:
    """f(E) = E + W_PV E Eᵀ W_KQ E / N with columns as in the paper, one prompt at a time."""
    model = random_layer()
    prompts, _ = sample_prompts(torch.tensor(VARIANCES), 4, 6, generator())
    with torch.no_grad():
        predictions = model(prompts)
        for prompt, prediction in zip(prompts, predictions, strict=True):
            columns = prompt.T
            output = columns + model.W_PV @ columns @ columns.T @ model.W_KQ @ columns / 6
            assert prediction.item() == pytest.approx(output[-1, -1].item(), abs=1e-12)


def test_with_the_other_weights_zero_it_is_one_preconditioned_step() -> None:
    """ŷ = x_queryᵀ A (1/N Σ y x)."""
    model = random_layer()
    with torch.no_grad():
        model.W_PV[-1, :-1] = 0
        model.W_KQ[-1, :-1] = 0
    prompts, _ = sample_prompts(torch.tensor(VARIANCES), 5, 7, generator(1))
    x, y, query = prompts[:, :-1, :-1], prompts[:, :-1, -1], prompts[:, -1, :-1]
    step = torch.einsum("bn,bnd->bd", y, x) / 7
    expected = torch.einsum("bi,ij,bj->b", query, model.update_matrix(), step)
    assert torch.allclose(model(prompts), expected, atol=1e-12) and model.other_weights().norm() == 0


def test_its_hook_points() -> None:
    """The pattern is what the values are mixed with; editing it changes the prediction; nothing is causal."""
    model = random_layer()
    prompts, _ = sample_prompts(torch.tensor(VARIANCES), 2, 4, generator())
    predictions, cache = model.run_with_cache(prompts)
    pattern, value = cache["blocks.0.attn.hook_pattern"], cache["blocks.0.attn.hook_v"]
    assert pattern.shape == (2, 1, 5, 5) and value.shape == (2, 5, 1, 4) and pattern[:, 0, 0, -1].abs().min() > 0
    mixed = torch.einsum("bhqk,bkhd->bqd", pattern, value)
    assert torch.allclose(mixed, cache["blocks.0.attn.hook_out"], atol=1e-12)
    blind = model.run_with_hooks(prompts, hooks=[("blocks.0.attn.hook_pattern", lambda p, hook: 0 * p)])
    assert torch.equal(blind, torch.zeros_like(predictions))


@pytest.mark.parametrize("examples", [2, 15])
def test_the_risk_of_any_update_against_sampling(examples: int) -> None:
    update = np.random.default_rng(0).normal(size=(3, 3)) / 3
    layer = study.layer_with(update).double()
    prompts, targets = sample_prompts(torch.tensor(VARIANCES), 60_000, examples, generator())
    with torch.no_grad():
        errors = (layer(prompts) - targets).square().numpy()
    expected = closed_form.update_risk(layer.update_matrix().detach().numpy(), VARIANCES, examples)
    assert risk(layer, prompts, targets) == pytest.approx(errors.mean(), rel=1e-9)
    assert abs(errors.mean() - expected) < 4 * errors.std() / len(errors) ** 0.5


def test_the_optimum_is_the_minimum_of_the_risk() -> None:
    """Zero gradient (by differences) at Γ⁻¹, the stated value there, and a larger risk everywhere nearby."""
    optimum = np.diag(closed_form.optimal_update(VARIANCES, 8))
    least = closed_form.update_risk(optimum, VARIANCES, 8)
    assert least == pytest.approx(closed_form.optimal_risk(VARIANCES, 8), abs=1e-12)
    for row, column in np.ndindex(3, 3):
        step = np.zeros((3, 3))
        step[row, column] = 1e-4
        up, down = (closed_form.update_risk(optimum + sign * step, VARIANCES, 8) for sign in (1, -1))
        assert up > least and down > least and up - down == pytest.approx(0, abs=1e-10)


def test_the_other_weights_have_no_gradient_at_the_minimum() -> None:
    """Theorem 4.1's minimum is one of the whole layer: the expected gradient of every weight vanishes there."""
    model = study.layer_with(np.diag(closed_form.optimal_update(VARIANCES, 8))).double()
    prompts, targets = sample_prompts(torch.tensor(VARIANCES), 60_000, 8, generator(2))
    (model(prompts) - targets).square().mean().backward()
    largest = max(weight.grad.abs().max().item() for weight in model.parameters() if weight.grad is not None)
    control = study.layer_with(np.diag(1 / VARIANCES)).double()
    (control(prompts) - targets).square().mean().backward()
    assert largest < 0.05 < 0.3 < max(w.grad.abs().max().item() for w in control.parameters() if w.grad is not None)


@pytest.mark.parametrize("seed", range(2))
def test_gradient_flow_ends_at_the_balanced_weight(seed: int) -> None:
    """The smaller the steps, the nearer: the error is that of following the flow in steps."""
    expected = closed_form.final_value_weight(study.VARIANCES, study.EXAMPLES)
    errors = [
        abs(study.flow_value_weight(np.random.default_rng(seed), rate) - expected) for rate in (0.02, 0.01, 0.005)
    ]
    assert errors[2] < 6e-4 and errors[1] == pytest.approx(2 * errors[2], rel=0.1) and errors[0] > errors[1]


def test_the_update_for_random_covariances_against_sampling() -> None:
    """E[λ²] / E[λ²Γ] over Exp(1) variances, and 1/3 for long prompts."""
    drawn = np.random.default_rng(0).exponential(size=(400_000, 5))
    moments = drawn**2, drawn**2 * (1.05 * drawn + drawn.sum(1, keepdims=True) / 20)
    assert closed_form.random_covariance_update(5, 20) == pytest.approx(moments[0].mean() / moments[1].mean(), rel=0.02)
    assert closed_form.random_covariance_update(5, 20) == pytest.approx(2 / 7)
    assert closed_form.random_covariance_update(5, 10**9) == pytest.approx(1 / 3)


def test_scrambled_labels_tell_nothing() -> None:
    prompts, targets = sample_prompts(torch.tensor(VARIANCES), 40_000, 8, generator(), scrambled=True)
    layer = study.layer_with(np.diag(closed_form.optimal_update(VARIANCES, 8))).double()
    with torch.no_grad():
        assert abs(np.corrcoef(layer(prompts), targets)[0, 1]) < 0.02
    assert prompts[:, -1, -1].abs().max() == 0


def test_the_study_runs(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """The smoke tier end to end: the pipeline, and the one claim that it decides."""
    result = run_study("linear_attention_regression", "smoke", store=RunStore(tmp_path))
    assert {claim.id: claim.verdict for claim in result.claims if claim.verdict != "not run here"} == {
        "balanced-weights": "reproduced"
    }
    run = RunStore(tmp_path).open(result.run)
    assert run.figures() == ["risk.json", "shift.json", "weights.json"] and run.array("update").shape == (1, 5, 5)
    curve = run.array("curve.risk")[0]
    assert curve[-1] < 0.5 * curve[0], "150 steps go far"


@pytest.mark.slow
def test_the_claims_at_the_small_tier(tmp_path) -> None:  # type: ignore[no-untyped-def]
    result = run_study("linear_attention_regression", "small", 3, store=RunStore(tmp_path))
    assert {claim.verdict for claim in result.claims} == {"reproduced"}, str(result)
