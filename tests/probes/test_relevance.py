"""Relevance against its definitions: products of patterns, finite differences, completeness; and on the shipped induction circuit."""

import numpy as np
import pytest
import torch
from torch import Tensor

import models
from probes.relevance import (
    Relevance,
    gradient_attention,
    gradient_x_input,
    integrated_gradients,
    logit_of,
    perturbation_curve,
    rollout,
)
from workbench.instrument.errors import RefusedByPattern
from workbench.lab.tasks import make_task

NAMES = ("gpt2", "llama", "retnet", "mamba2", "bdh")
METRIC = logit_of(3, against=5)


def tokens(batch: int = 2, length: int = 7) -> Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(0))


def metric_at(model, x: Tensor, hooks=()) -> Tensor:  # type: ignore[no-untyped-def]
    with torch.no_grad():
        return METRIC(model.run_with_hooks(x, hooks=list(hooks)), x)


# --------------------------------------------------------------------------------------------------------- attention


def test_rollout_of_patterns_written_by_hand() -> None:
    """Two layers that pass token 0 to 1 and then 1 to 2: the last token gets a quarter from token 0, through both."""
    model = models.build("attention-only").double()
    first, second = torch.eye(3).double(), torch.eye(3).double()
    first[1] = torch.tensor([1.0, 0, 0])
    second[2] = torch.tensor([0, 1.0, 0])

    def write(pattern: Tensor, hook: object) -> Tensor:
        return [first, second, torch.eye(3).double()][hook.layer()].expand_as(pattern)  # type: ignore[attr-defined]

    with model.hooks([("blocks.*.attn.hook_pattern", write)]):
        found = rollout(model, tokens(2, 3))
    assert torch.allclose(found.scores, torch.tensor([[0.25, 0.25, 0.5]], dtype=torch.float64).expand(2, -1))


@pytest.mark.parametrize("name", ["gpt2", "llama", "looped"])
def test_rollout_is_a_distribution_and_ignores_padding(name: str) -> None:
    model, x = models.build(name).double(), tokens()
    plain = rollout(model, x).scores
    assert torch.allclose(plain.sum(1), torch.ones(2, dtype=torch.float64)) and (plain >= 0).all()
    padded = torch.cat([torch.zeros(2, 2, dtype=torch.long), x], 1)
    mask = torch.tensor([[False] * 2 + [True] * 7]).expand(2, -1)
    for call in (rollout, lambda m, t, **k: gradient_attention(m, t, METRIC, **k)):
        found = call(model, padded, mask=mask).scores
        assert (found[:, :2] == 0).all() and torch.allclose(found[:, 2:], call(model, x).scores, atol=1e-9)


def test_gradient_attention_is_its_formula_with_finite_differences() -> None:
    """∇A by central differences in every cell of every pattern."""
    model, x = models.build("gpt2").double(), tokens(1, 4)
    _, cache = model.run_with_cache(x, role="pattern")
    product = torch.eye(4).double()
    for layer in range(model.n_layers):
        name, step = f"blocks.{layer}.attn.hook_pattern", 1e-5
        a = cache[name][0].detach()
        gradient = torch.zeros_like(a)
        for head, q, k in np.ndindex(*a.shape):
            values = []
            for sign in (1, -1):
                moved = a.clone()
                moved[head, q, k] += sign * step
                values.append(metric_at(model, x, [(name, lambda p, hook, moved=moved: moved[None])]))
            gradient[head, q, k] = float(values[0] - values[1]) / (2 * step)
        product = (torch.eye(4) + (gradient * a).clamp(min=0).mean(0)) @ product
    assert torch.allclose(gradient_attention(model, x, METRIC).scores[0], product[-1], atol=1e-7)
    minimum = gradient_attention(model, x, METRIC, own="minimum").scores[0]
    assert minimum[-1] == product[-1].min() or torch.isclose(minimum[-1], product[-1].min(), atol=1e-7)
    assert gradient_attention(model, x, METRIC, own="zero").scores[0, -1] == 0
    normed = gradient_attention(model, x, METRIC, row_norm=True).scores
    assert torch.allclose(normed.sum(1), torch.ones(1, dtype=torch.float64))
    last = gradient_attention(model, x, METRIC, start_layer=-1).scores
    assert not torch.allclose(last, product[-1])


@pytest.mark.parametrize("name", ["retnet", "mamba2", "bdh"])
def test_signed_patterns_are_refused_in_words(name: str) -> None:
    model, x = models.build(name), tokens()
    with pytest.raises(RefusedByPattern, match="it is signed"):
        rollout(model, x)
    with pytest.raises(RefusedByPattern, match="it is signed"):
        gradient_attention(model, x, METRIC)
    with pytest.raises(RefusedByPattern, match="do not sum to 1"):
        rollout(models.build("gru"), x)  # Jacobian norms


def test_a_layer_without_a_pattern_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = models.build("gpt2"), tokens()
    whole = model.patterns(x)
    monkeypatch.setattr(model, "patterns", lambda *args, **kwargs: {0: whole[0], 2: whole[2]})
    with pytest.raises(RefusedByPattern, match=r"Layers \[1\] of gpt2-random have no pattern"):
        rollout(model, x)


# --------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("name", NAMES)
def test_gradient_x_input_is_the_effect_of_growing_one_embedding(name: str) -> None:
    model, x = models.build(name).double(), tokens()
    found = gradient_x_input(model, x, METRIC)
    assert torch.allclose(found.output, metric_at(model, x))
    for position in range(x.shape[1]):

        def grow(e: Tensor, hook: object, factor: float, position: int = position) -> Tensor:
            out = e.clone()
            out[:, position] *= factor
            return out

        up, down = (
            metric_at(model, x, [("hook_embed", lambda e, hook, f=f: grow(e, hook, f))]) for f in (1 + 1e-6, 1 - 1e-6)
        )
        assert torch.allclose(found.scores[:, position], (up - down) / 2e-6, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "steps", "gap"),
    [("gpt2", 32, 1e-8), ("llama", 32, 1e-8), ("retnet", 64, 1e-5), ("mamba2", 96, 1e-5), ("bdh", 128, 2e-2)],
)
def test_integrated_gradients_are_complete(name: str, steps: int, gap: float) -> None:
    """Σ = f(x) − f(baseline) up to the quadrature's error, which is large where the path is kinked (BDH's ReLUs) and shrinks with steps."""
    model, x = models.build(name).double(), tokens()
    found = integrated_gradients(model, x, METRIC, steps=steps)
    mean = model.W_E.mean(0).detach()
    assert torch.allclose(
        found.baseline_output, metric_at(model, x, [("hook_embed", lambda e, hook: mean.expand_as(e))])
    )
    assert found.completeness_gap.abs().max() < gap
    coarse, turned = (integrated_gradients(model, t, METRIC, steps=2) for t in (x, x.flip(0)))
    assert coarse.completeness_gap.abs().max() > 10 * found.completeness_gap.abs().max()
    assert torch.allclose(turned.scores.flip(0), coarse.scores, atol=1e-8)


def test_what_cannot_matter_gets_nothing() -> None:
    """Tokens after the one whose logit is explained, and tokens that equal the baseline."""
    model, x = models.build("retnet").double(), tokens()
    x[:, 2] = 32
    found = integrated_gradients(model, x, logit_of(3, at=4), baseline=32, steps=8).scores
    assert (found[:, 5:] == 0).all() and (found[:, 2] == 0).all() and (found[:, [0, 1, 3, 4]] != 0).all()
    assert (gradient_x_input(model, x, logit_of(3, at=4)).scores[:, 5:] == 0).all()


def test_mistakes_are_named() -> None:
    model, x = models.build("gpt2"), tokens()
    for call, message in (
        (lambda: integrated_gradients(model, x, METRIC, baseline="men"), "expected 'mean'"),
        (lambda: integrated_gradients(model, x, METRIC, baseline=256), "0..255"),
        (lambda: integrated_gradients(model, x, METRIC, steps=0), "at least 1"),
        (lambda: gradient_x_input(model, x, lambda logits, ids: logits.sum()), "one number for each"),
        (lambda: gradient_attention(model, x, METRIC, own="min"), "Did you mean 'minimum'"),
        (lambda: rollout(model, x, start_layer=9), "layers 0..2"),
        (lambda: rollout(model, x, residual=2), "share between"),
        (lambda: perturbation_curve(model, x, torch.zeros(2, 3), METRIC), "relevance has shape"),
        (lambda: perturbation_curve(model, x, torch.zeros(2, 7), METRIC, order="postive"), "Did you mean 'positive'"),
        (lambda: perturbation_curve(model, x, torch.zeros(2, 7), METRIC, shares=(0.5, 0.2)), "ascending"),
        (lambda: rollout(model, x).completeness_gap, "does not promise"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# ------------------------------------------------------------------------------------------------------ perturbation


@pytest.fixture(scope="module")
def induction():  # type: ignore[no-untyped-def]
    """The circuit, its texts, the metric "logit of the right next token", and the earlier places where that token stands."""
    batch = make_task("induction", vocab_size=128, length=64, min_period=10, max_period=30, seed=7).batch(
        6, 3, "validation"
    )
    x, target = batch.tokens[:, :-1], batch.tokens[:, -1]
    return models.load("induction-circuit"), x, logit_of(target), x == target[:, None]


@pytest.mark.parametrize("method", ["rollout", "gradient_attention", "integrated_gradients", "gradient_x_input"])
def test_removing_relevant_tokens_of_the_circuit_matters_most(induction, method: str) -> None:  # type: ignore[no-untyped-def]
    model, x, metric, _ = induction
    found = {
        "rollout": lambda: rollout(model, x),
        "gradient_attention": lambda: gradient_attention(model, x, metric),
        "integrated_gradients": lambda: integrated_gradients(model, x, metric, steps=16),
        "gradient_x_input": lambda: gradient_x_input(model, x, metric),
    }[method]()
    curve = perturbation_curve(model, x, found, metric, controls=9, shares=(0.1, 0.3, 0.5, 0.8))
    assert curve.p == 0.1 and curve.auc < curve.random_aucs.min()
    assert curve.metric[0] > 15 and curve.metric[1] < 0.5 * curve.metric[0]


def test_gradient_attention_points_at_the_copied_token(induction) -> None:  # type: ignore[no-untyped-def]
    """The most relevant token besides the reading one is an earlier occurrence of the token that comes next."""
    model, x, metric, places = induction
    found = gradient_attention(model, x, metric, own="zero")
    assert places.gather(1, found.scores.argmax(1, keepdim=True)).all()


def test_a_random_relevance_is_not_better_than_random(induction) -> None:  # type: ignore[no-untyped-def]
    model, x, metric, places = induction
    decoy = torch.rand(x.shape, generator=torch.Generator().manual_seed(9))
    kwargs = {"controls": 9, "shares": (0.1, 0.3, 0.5, 0.8)}
    curves = [
        perturbation_curve(model, x, decoy, metric, order=order, seed=1, **kwargs) for order in ("positive", "negative")
    ]
    assert max(curve.p for curve in curves) > 0.2 and min(curve.p for curve in curves) > 0.1
    truth = Relevance(places.double(), "truth")
    best = perturbation_curve(model, x, truth, metric, **kwargs)
    assert best.auc < curves[0].auc and best.to_json()["p"] == best.p


def test_tokens_are_removed_in_order_and_kept_where_asked() -> None:
    """Counted: which embeddings the model was given at each share."""
    model, x = models.build("retnet").double(), tokens(1, 6)
    scores = torch.tensor([[5.0, 1, 4, 2, 3, 9]])
    mask = torch.tensor([[True, True, True, True, False, True]])
    seen = []

    def look(e: Tensor, hook: object) -> None:
        seen.append((e[0] == model.W_E.mean(0)).all(-1).nonzero()[:, 0].tolist())

    def metric(logits: Tensor, ids: Tensor) -> Tensor:
        return logits[:, -1, 0]

    handle = model.add_hook("blocks.0.hook_resid_pre", look)
    perturbation_curve(model, x, scores, metric, shares=(0.25, 0.5, 1.0), controls=0, mask=mask)
    handle.remove()
    assert seen[1:] == [[], [0], [0, 2], [0, 1, 2, 3]], "position 4 is padding, position 5 is kept"
