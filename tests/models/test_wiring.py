"""Ways through the blocks against the same blocks called by hand, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

import models
from models.attention.site import AttentionConfig
from models.depth.dense import DenseFormerConfig
from models.depth.halting import ACTConfig, PonderConfig, exit_divergence, ponder_cost
from models.depth.hierarchical import HierarchicalConfig
from models.depth.looped import LoopedConfig
from models.language_model import LanguageModel, LanguageModelConfig
from models.parts.channel_mixers import MLPConfig


def build(wiring: Any = None, layers: int = 3, **changes: Any) -> LanguageModel:
    mixer = AttentionConfig(n_heads=4, position="rope")
    model = LanguageModel(LanguageModelConfig(layers, 24, mixer=mixer, mlp=MLPConfig(40), wiring=wiring, **changes))
    model = model.double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.startswith("wiring.") and p.dim() > 1:
                p.mul_(5)
    return model


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 256, (2, 11), generator=torch.Generator().manual_seed(0))


def block(model: LanguageModel, layer: int, x: Tensor) -> Tensor:
    """One block alone."""
    return model.blocks[layer](x, model._context(x, None, None, False, True), None)[0]


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and float((a - b).detach().abs().max()) < 1e-10


# ------------------------------------------------------------------------------------------------------ DenseFormer


def test_denseformer_begins_as_an_ordinary_stack(tokens: Tensor) -> None:
    model, plain = build(DenseFormerConfig(), 4), build(None, 4)
    assert not any(close(a, b) for a, b in [(model(tokens), torch.zeros(2, 11, 256).double())])
    assert close(model(tokens), plain(tokens))


@pytest.mark.parametrize(("dilation", "period"), [(1, 1), (2, 1), (1, 2), (2, 2), (3, 1)])
def test_denseformer_is_its_equation(dilation: int, period: int, tokens: Tensor) -> None:
    """Y_i = Σ α_ik X_k over k ≤ i, k ≡ i modulo the dilation, behind every period-th block."""
    model = build(DenseFormerConfig(dilation, period), 5)
    outputs = [model.embed(tokens)]
    x = outputs[0]
    generator = torch.Generator().manual_seed(1)
    for i in range(1, 6):
        outputs.append(block(model, i - 1, x))
        x = outputs[-1]
        if i % period == 0:
            sources = [k for k in range(i + 1) if k % dilation == i % dilation]
            alpha = torch.randn(len(sources), generator=generator).double()
            with torch.no_grad():
                model.wiring.after[str(i - 1)].alpha.copy_(alpha)
            x = sum(a * outputs[k] for a, k in zip(alpha, sources, strict=True))
    assert close(model(tokens), model.unembed_residual(x))


def test_cutting_one_edge_between_layers(tokens: Tensor) -> None:
    """A weight set to 0 by a hook is an edge that does not exist: as with that α at 0."""
    model = build(DenseFormerConfig(), 3)
    with torch.no_grad():
        for average in model.wiring.after.values():
            average.alpha.copy_(torch.linspace(0.3, 1, len(average.alpha)))

    def cut(weights: Tensor, hook: object) -> Tensor:
        weights[..., 1] = 0
        return weights

    hooked = model.run_with_hooks(tokens, hooks=[("wiring.after.2.hook_weights", cut)])
    plain = model(tokens)
    with torch.no_grad():
        model.wiring.after["2"].alpha[1] = 0
    assert close(hooked, model(tokens)) and not close(hooked, plain)


# ---------------------------------------------------------------------------------------------------------- halting


def test_universal_transformer_that_never_halts_is_a_looped_one(tokens: Tensor) -> None:
    model, looped = build(ACTConfig(steps=3, halt_bias=-200.0), 2), build(None, 2, loops=3)
    silent = [("wiring.hook_step_embed", lambda x, hook: 0 * x)]
    assert close(model.run_with_hooks(tokens, hooks=silent), looped(tokens))


def test_act_token_by_token(tokens: Tensor) -> None:
    """Halting, remainders and frozen states of every token by a loop over steps; some tokens stop early, some late."""
    model = build(ACTConfig(steps=4, threshold=0.9), 1)
    with torch.no_grad():
        model.wiring.halt.weight.mul_(60)
    state = model.embed(tokens)
    output, total = torch.zeros_like(state), torch.zeros(2, 11).double()
    stopped = torch.zeros(2, 11, dtype=torch.bool)
    _, cache = model.run_with_cache(tokens)
    weights = []
    for step in range(4):
        new = block(model, 0, state + cache[f"wiring.hook_step_embed@{step}"])
        weight = torch.zeros(2, 11).double()
        for b in range(2):
            for t in range(11):
                if stopped[b, t]:
                    new[b, t] = state[b, t]
                    continue
                p = torch.sigmoid(model.wiring.halt(new[b, t]))[0]
                if step == 3 or total[b, t] + p >= 0.9:
                    weight[b, t], stopped[b, t] = 1 - total[b, t], True
                else:
                    weight[b, t] = p
                total[b, t] += weight[b, t].detach()
                output[b, t] = output[b, t] + weight[b, t] * new[b, t]
        state = new
        weights.append(weight)
        assert close(cache[f"wiring.hook_step_weight@{step}"], weight)
    assert close(model(tokens), model.unembed_residual(output))
    steps = (torch.stack(weights) > 0).sum(0)
    assert len(steps.unique()) > 1
    last = torch.stack(weights).gather(0, (steps - 1)[None])[0]
    assert close(ponder_cost([cache[f"wiring.hook_step_weight@{s}"] for s in range(4)]), steps + last)


def test_the_cost_of_pondering_can_be_learned(tokens: Tensor) -> None:
    """Step weights taken by a hook keep their graph, so that cost and divergence can be part of a loss."""
    for wiring in (ACTConfig(steps=3), PonderConfig(steps=3)):
        model = build(wiring, 2)
        kept: list[Tensor] = []
        with model.hooks([("wiring.hook_step_weight", lambda x, hook, kept=kept: kept.append(x))]):
            model(tokens)
        cost = ponder_cost(kept) if isinstance(wiring, ACTConfig) else exit_divergence(kept, 0.3)
        weight = model.wiring.halt.weight if isinstance(wiring, ACTConfig) else model.wiring.score[0].weight
        (gradient,) = torch.autograd.grad(cost.sum(), [weight])
        assert float(gradient.abs().max()) > 0


@pytest.mark.parametrize("exit_", ["average", "quantile"])
def test_exits_are_their_equation(exit_: str, tokens: Tensor) -> None:
    model = build(PonderConfig(steps=3, exit=exit_, quantile=0.6), 2)
    with torch.no_grad():
        for p in model.wiring.parameters():
            p.mul_(30)
    h, left, states, weights = model.embed(tokens), torch.ones(2, 11).double(), [], []
    for step in range(3):
        before, h = h, block(model, 1, block(model, 0, h))
        if step < 2:
            chance = model.wiring.score(torch.cat([h, before], -1) + model.wiring.step_embed[step])[..., 0].sigmoid()
        else:
            chance = torch.ones_like(left)
        states.append(h)
        weights.append(left * chance)
        left = left * (1 - chance)
    if exit_ == "average":
        expected = sum(w[..., None] * s for w, s in zip(weights, states, strict=True))
    else:
        first = (torch.stack(weights).cumsum(0) > 0.6).double().argmax(0)
        assert len(first.unique()) > 1
        expected = torch.stack(states).gather(0, first[None, ..., None].expand(1, -1, -1, 24))[0]
    assert close(model(tokens), model.unembed_residual(expected))


def test_divergence_from_a_geometric_prior() -> None:
    """0 for the prior itself; against torch's KL elsewhere."""
    prior = torch.tensor([0.3, 0.21, 0.147], dtype=torch.float64)
    prior = prior / prior.sum()
    assert close(exit_divergence([p.expand(2, 3) for p in prior], 0.3), torch.zeros(2, 3).double())
    other = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    expected = torch.nn.functional.kl_div(prior.log(), other, reduction="sum")
    assert close(exit_divergence([p.expand(2, 3) for p in other], 0.3), expected.expand(2, 3))
    for call in (lambda: ponder_cost([]), lambda: exit_divergence([prior[:1, None]], 1.0)):
        with pytest.raises(ValueError, match="weights"):
            call()


# ------------------------------------------------------------------------------------------------------ pre-loop-post


def test_pre_loop_post_by_hand(tokens: Tensor) -> None:
    for inject in ("add", "none"):
        model = build(LoopedConfig(times=3, before=1, after=1, inject=inject), 4)
        x = block(model, 0, model.embed(tokens))
        z = torch.zeros_like(x) if inject == "add" else x
        for _ in range(3):
            z = block(model, 2, block(model, 1, z + x if inject == "add" else z))
        assert close(model(tokens), model.unembed_residual(block(model, 3, z)))
    assert (
        model.hook_dict["blocks.0.hook_resid_pre"].steps == 1 and model.hook_dict["blocks.1.hook_resid_pre"].steps == 3
    )


def test_looped_without_ends_or_injection_is_loops(tokens: Tensor) -> None:
    assert close(build(LoopedConfig(times=3, inject="none"), 2)(tokens), build(None, 2, loops=3)(tokens))


def test_a_window_cuts_gradients_not_outputs(tokens: Tensor) -> None:
    """The gradient of the last loop alone: that of a model whose earlier loops are constants."""
    cut, full = build(LoopedConfig(times=3, window=1), 1), build(LoopedConfig(times=3), 1)
    assert close(cut(tokens), full(tokens))
    x = full.embed(tokens)
    with torch.no_grad():
        z = block(full, 0, block(full, 0, x) + x)
    expected = full.unembed_residual(block(full, 0, z + x)).square().sum()
    weights = [m.blocks[0].attn.query.weight for m in (cut, full)]
    (got,) = torch.autograd.grad(cut(tokens).square().sum(), weights[0])
    (want,) = torch.autograd.grad(expected, weights[1])
    (whole,) = torch.autograd.grad(full(tokens).square().sum(), weights[1])
    assert close(got, want) and not close(got, whole)


# --------------------------------------------------------------------------------------------------------------- HRM


@pytest.mark.parametrize("gradient", ["full", "last"])
def test_two_levels_by_hand(gradient: str, tokens: Tensor) -> None:
    """2 cycles of 3 fast steps, and the gradient of either choice."""
    wiring = HierarchicalConfig(low=1, cycles=2, steps=3, gradient=gradient)
    model = build(wiring, 3, norm="rms", norm_placement="after")
    x = model.embed(tokens)
    low, high = model.wiring.start_low.expand_as(x), model.wiring.start_high.expand_as(x)
    _, cache = model.run_with_cache(tokens)
    for cycle in range(2):
        for step in range(3):
            low = block(model, 0, low + high + x)
            assert close(low, cache[f"wiring.hook_low@{3 * cycle + step}"])
            if gradient == "last" and (cycle, step) != (1, 2):
                low = low.detach()
        high = block(model, 2, block(model, 1, high + low))
        assert close(high, cache[f"wiring.hook_high@{cycle}"])
        high = high.detach() if gradient == "last" and cycle == 0 else high
    expected = model.unembed_residual(high)
    assert close(model(tokens), expected)
    weights = [model.blocks[0].attn.query.weight, model.embed.W_E]
    for got, want in zip(
        torch.autograd.grad(model(tokens).square().sum(), weights),
        torch.autograd.grad(expected.square().sum(), weights),
        strict=True,
    ):
        assert close(got, want)


def test_the_slow_state_can_be_patched_between_cycles(tokens: Tensor) -> None:
    """With the slow and the fast state of another text the rest of the run reads this text only through its embedding."""
    model = build(HierarchicalConfig(low=1, cycles=2, steps=1), 3)
    _, other = model.run_with_cache(tokens.flip(0))
    patch = [(name, lambda x, hook, name=name: other[name]) for name in ("wiring.hook_low@0", "wiring.hook_high@0")]
    got = model.run_with_hooks(tokens, hooks=patch)
    low = block(model, 0, other["wiring.hook_low@0"] + other["wiring.hook_high@0"] + model.embed(tokens))
    expected = block(model, 2, block(model, 1, other["wiring.hook_high@0"] + low))
    assert close(got, model.unembed_residual(expected))


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: build(MLPConfig(4)), "no wiring"),
        (lambda: build(DenseFormerConfig(), loops=2), "loops=1"),
        (lambda: build(LoopedConfig(times=2, before=2, after=1)), "none is left"),
        (lambda: build(HierarchicalConfig(low=3)), "slow stack"),
        (lambda: LoopedConfig(times=2, inject="ad"), "'add'"),
        (lambda: HierarchicalConfig(low=1, gradient="ful"), "'full'"),
        (lambda: HierarchicalConfig(low=1, cycles=0), "never runs"),
        (lambda: PonderConfig(3, exit="averag"), "'average'"),
        (lambda: build(ACTConfig(steps=1)), "at least 2"),
        (lambda: LoopedConfig(times=0), "at least 1"),
        (lambda: DenseFormerConfig(dilation=0), "at least 1"),
    ],
)
def test_what_cannot_be_wired_is_refused(make: Any, words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        make()


def test_diagrams_say_how_depth_is_used() -> None:
    from models.diagram import model_blocks

    details = {
        name: [p["detail"] for p in model_blocks(models.build(name)) if p["kind"] == "loop"]
        for name in ("hrm", "denseformer")
    }
    assert details == {
        "hrm": ["passes", "passes", "passes", "2 × (2 fast, 1 slow)"],  # of each layer, and of the whole
        "denseformer": ["averages of all outputs"],
    }
