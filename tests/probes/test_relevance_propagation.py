"""Relevance propagation against its rules written out cell by cell, its conservation, and the shipped induction circuit."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import models
from models.parts.experts import SparseMLPConfig
from probes.relevance import gradient_attention, integrated_gradients, logit_of, perturbation_curve
from probes.relevance_propagation import NoRule, last_layer, propagate, relevance_propagation
from workbench.lab.tasks import make_task

METRIC = logit_of(3)


def tokens(batch: int = 2, length: int = 6) -> Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(0))


def lively(name: str, seed: int = 1) -> Any:
    """Random weights large enough for patterns that are far from uniform."""
    model = models.build(name, seed=seed).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4).add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    return model


# ---------------------------------------------------------- the rules one contribution at a time, as a backward pass


class Linear(torch.autograd.Function):
    """R_i = Σ_o (x_i w_oi)⁺ / Σ_i' (x_i' w_oi')⁺ R_o."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T + bias

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> Any:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        pushes = (x[..., None, :] * weight).clamp(min=0)
        return (pushes / pushes.sum(-1, keepdim=True) * relevance[..., None]).sum(-2), None, None


class Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a + b

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> Any:  # type: ignore[override]
        a, b = ctx.saved_tensors
        first, second = a / (a + b) * relevance, b / (a + b) * relevance
        share = first.sum().abs() / (first.sum().abs() + second.sum().abs())
        total = relevance.sum()
        return first * (share * total / first.sum()), second * ((1 - share) * total / second.sum())


class Product(torch.autograd.Function):
    """out_ik = Σ_j a_ij b_jk; each factor gets half of what a_ij b_jk contributed to out_ik."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a @ b

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> Any:  # type: ignore[override]
        a, b = ctx.saved_tensors
        moved = a[..., :, :, None] * b[..., None, :, :]
        shares = moved / moved.sum(-2, keepdim=True) * relevance[..., :, None, :]
        return shares.sum(-1) / 2, shares.sum(-3) / 2


class Same(torch.autograd.Function):
    """The value of y with the relevance of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> Any:  # type: ignore[override]
        return relevance, None


def same(x: Tensor, function: Any) -> Tensor:
    return Same.apply(x, function(x.detach()))  # type: ignore[no-any-return]


def causal_softmax(products: Tensor, scale: float) -> Tensor:
    hidden = torch.ones_like(products, dtype=torch.bool).triu(1)
    return (products * scale).masked_fill(hidden, -torch.inf).softmax(-1)


def by_hand(model: Any, ids: Tensor, target: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Relevance of the embeddings, of the positions, and of each pattern of one sequence of GPT-2, by a backward pass of relevance."""
    weight = {name: value.detach() for name, value in model.named_parameters()}
    n, width = len(ids), model.d_model
    embedded = weight["embed.W_E"][ids].requires_grad_()
    placed = model.pos_embed(torch.arange(n)[None])[0].detach().requires_grad_()
    x, patterns = Sum.apply(embedded, placed), []
    for layer in range(model.n_layers):
        name, block = f"blocks.{layer}.", model.blocks[layer]
        apply = lambda y, part, name=name: Linear.apply(y, weight[f"{name}{part}.weight"], weight[f"{name}{part}.bias"])  # noqa: E731
        read = same(x, block.ln1)
        heads = block.attn.n_heads
        q, k, v = (apply(read, f"attn.{part}").view(n, heads, -1).transpose(0, 1) for part in ("query", "key", "value"))
        pattern = same(Product.apply(q, k.mT), partial(causal_softmax, scale=block.attn.scale))
        pattern.retain_grad()
        patterns.append(pattern)
        x = Sum.apply(x, apply(Product.apply(pattern, v).transpose(0, 1).reshape(n, width), "attn.output"))
        hidden_units = same(apply(same(x, block.ln2), "mlp.inward"), block.mlp.activation)
        x = Sum.apply(x, apply(hidden_units, "mlp.outward"))
    rows = model.unembed.W_U.T.detach()
    logits = Linear.apply(same(x, model.ln_final), rows, torch.zeros(len(rows), dtype=rows.dtype))
    logits[-1, target].backward()
    return embedded.grad.sum(-1), placed.grad.sum(-1), [p.grad for p in patterns]  # type: ignore[union-attr]


def test_the_rules_cell_by_cell() -> None:
    model, x = lively("gpt2"), tokens()
    found = propagate(model, x, METRIC)
    for row, ids in enumerate(x):
        embedding, positions, patterns = by_hand(model, ids, 3)
        torch.testing.assert_close(found.embedding[row], embedding, atol=1e-9, rtol=1e-6)
        assert found.positions is not None
        torch.testing.assert_close(found.positions[row], positions, atol=1e-9, rtol=1e-6)
        for layer, wanted in enumerate(patterns):
            torch.testing.assert_close(found.relevance[layer][row], wanted, atol=1e-9, rtol=1e-6)


def test_a_difference_of_logits_is_the_difference_of_both() -> None:
    model, x = lively("gpt2"), tokens()
    found, one, other = (propagate(model, x, metric) for metric in (logit_of(3, against=5), METRIC, logit_of(5)))
    torch.testing.assert_close(found.embedding, one.embedding - other.embedding)
    for layer in range(model.n_layers):
        torch.testing.assert_close(found.relevance[layer], one.relevance[layer] - other.relevance[layer])
    assert (found.start == 0).all() and found.conservation_gap.abs().max() < 1e-9


def test_scores_are_the_rolled_out_product() -> None:
    model, x = lively("gpt2"), tokens()
    found, product = propagate(model, x, METRIC), torch.eye(6).double()
    for gradient, relevance in zip(found.gradients, found.relevance, strict=True):
        product = (torch.eye(6) + (gradient * relevance).clamp(min=0).mean(1)) @ product
    torch.testing.assert_close(relevance_propagation(model, x, METRIC).scores, product[:, -1])
    last = relevance_propagation(model, x, METRIC, start_layer=-1, own="zero").scores
    step = (found.gradients[-1] * found.relevance[-1]).clamp(min=0).mean(1)[:, -1]
    torch.testing.assert_close(last[:, :-1], step[:, :-1])
    assert (last[:, -1] == 0).all()
    normed = relevance_propagation(model, x, METRIC, row_norm=True).scores
    torch.testing.assert_close(normed.sum(1), torch.ones(2).double())


def test_patterns_and_gradients_are_those_that_gradient_attention_uses() -> None:
    model, x = lively("gpt2"), tokens()
    found, product = propagate(model, x, METRIC), torch.eye(6).double()
    for gradient, pattern in zip(found.gradients, found.patterns, strict=True):
        product = (torch.eye(6) + (gradient * pattern).clamp(min=0).mean(1)) @ product
    torch.testing.assert_close(gradient_attention(model, x, METRIC).scores, product[:, -1])


def test_baselines_of_the_last_layer() -> None:
    model, x = lively("gpt2"), tokens()
    found = propagate(model, x, METRIC)
    torch.testing.assert_close(last_layer(model, x, METRIC, "attention").scores, found.patterns[-1].mean(1)[:, -1])
    torch.testing.assert_close(last_layer(model, x, METRIC).scores, found.relevance[-1].mean(1)[:, -1])
    weighted = sum(
        found.gradients[-1][:, head].mean((1, 2))[:, None] * found.patterns[-1][:, head, -1] for head in range(4)
    )
    torch.testing.assert_close(last_layer(model, x, METRIC, "gradcam").scores, weighted.clamp(min=0) / 4)


PROPAGATED = (
    "gpt2",
    "gpt",
    "gpt1",
    "llama",
    "gptj",
    "bloom",
    "gemma2",
    "alibi",
    "attention-only",
    "t5-bias",
    "sparse-transformer",
)


@pytest.mark.parametrize("name", PROPAGATED)
def test_relevance_is_conserved(name: str) -> None:
    model, x = lively(name), tokens()
    found = propagate(model, x, METRIC)
    assert (found.start == 1).all()
    assert found.conservation_gap.abs().max() < 1e-7 * found.embedding.abs().sum()
    assert all(not relevance.triu(1).any() for relevance in found.relevance), "nothing to what may not be read"


def test_the_order_of_sequences_and_padding_do_not_matter() -> None:
    model, x = lively("llama"), tokens(3)
    whole = relevance_propagation(model, x, METRIC).scores
    torch.testing.assert_close(relevance_propagation(model, x.flip(0), METRIC).scores.flip(0), whole)
    torch.testing.assert_close(relevance_propagation(model, x[:1], METRIC).scores, whole[:1])
    padded = torch.cat([torch.full((3, 2), 7), x], 1)
    mask = torch.tensor([False] * 2 + [True] * 6).expand(3, -1)
    found = relevance_propagation(model, padded, METRIC, mask=mask).scores
    assert (found[:, :2] == 0).all()
    torch.testing.assert_close(found[:, 2:], whole)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("retnet", "layer 0 of .*: its mixer is retention, no softmax attention"),
        ("bdh", "no decoder of plain blocks"),
        ("looped", "not run once each"),
        ("qk-norm", "queries and keys are normalised"),
        ("diff-transformer", "not one product of queries and keys"),
        ("griffin", "its mixer is .*, no softmax attention"),
        ("neural-attention", "part of stage 'score'"),
        ("cope", "depends on the content"),
        ("bert", "no decoder of plain blocks"),
    ],
)
def test_what_has_no_rule_is_refused_in_words(name: str, words: str) -> None:
    with pytest.raises(NoRule, match=words + r".*integrated_gradients works on every architecture"):
        relevance_propagation(models.build(name), tokens(), METRIC)


def test_a_mixture_of_experts_is_refused() -> None:
    model = models.build("gpt", mlp=SparseMLPConfig(d_mlp=16, n_experts=4, n_active=2))
    with pytest.raises(NoRule, match="channel mixer is SparseMLP, no MLP"):
        propagate(model, tokens(), METRIC)


def test_mistakes_are_named() -> None:
    model, x = models.build("gpt2"), tokens()
    with pytest.raises(ValueError, match="Did you mean 'gradcam'"):
        last_layer(model, x, METRIC, "grad-cam")
    with pytest.raises(ValueError, match="Did you mean 'minimum'"):
        relevance_propagation(model, x, METRIC, own="min")
    with pytest.raises(ValueError, match="one number for each"):
        propagate(model, x, lambda logits, ids: logits.sum())
    with pytest.raises(ValueError, match=r"layers 0\.\.2"):
        relevance_propagation(model, x, METRIC, start_layer=9)


def test_the_circuit_copies_what_relevance_points_at() -> None:
    """The most relevant token besides the reading one is an earlier occurrence of what comes next; removing by relevance beats chance."""
    batch = make_task("induction", vocab_size=128, length=64, min_period=10, max_period=30, seed=7).batch(
        6, 3, "validation"
    )
    x, target = batch.tokens[:, :-1], batch.tokens[:, -1]
    model, metric = models.load("induction-circuit"), logit_of(target)
    found = relevance_propagation(model, x, metric, own="zero")
    assert (x == target[:, None]).gather(1, found.scores.argmax(1, keepdim=True)).all()
    curve = perturbation_curve(model, x, found, metric, controls=9, shares=(0.1, 0.3, 0.5, 0.8))
    assert curve.p == 0.1 and curve.metric[1] < 0.5 * curve.metric[0]
    other = integrated_gradients(model, x, metric, steps=4)
    assert not torch.allclose(found.scores, other.scores)
