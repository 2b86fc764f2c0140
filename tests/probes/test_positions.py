"""Moved positions against the call's own, and streaming against a cache that is read token by token."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import models
from models.attention.bam import BAMConfig
from models.attention.rotary import QKNormConfig
from models.attention.site import AttentionConfig
from models.language_model import LanguageModel, LanguageModelConfig
from models.parts.channel_mixers import MLPConfig
from models.parts.positions import rotate
from probes.context_order import rope_base
from probes.positions import move, rotation_base, stream
from workbench.instrument.errors import HookError

N = 13
SITES = {
    "rope": AttentionConfig(n_heads=4, n_key_value_heads=2, position="rope", softcap=9.0),
    "partly": AttentionConfig(
        n_heads=4, position="rope", rope_fraction=0.5, rope_interleaved=True, qk_norm=QKNormConfig(), d_head=8
    ),
    "alibi": AttentionConfig(n_heads=4, position="alibi"),
    "learned": AttentionConfig(n_heads=4, position="learned"),
    "sinusoidal": AttentionConfig(n_heads=4, position="sinusoidal"),
}


def build(site: AttentionConfig) -> LanguageModel:
    return LanguageModel(LanguageModelConfig(2, 24, 29, 40, site, MLPConfig(30), init_std=0.3)).double()


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 29, (2, N), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", SITES)
def test_moved_positions_are_those_of_the_call(name: str, tokens: Tensor) -> None:
    model, positions = build(SITES[name]), torch.tensor([0, 1, 2, 5, 6, 7, 5, 6, 8, 9, 20, 21, 22])
    expected = model(tokens, facts={"positions": positions[None]})
    found = model.run_with_hooks(tokens, hooks=move(model, positions))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert not torch.allclose(found, model(tokens))


def test_another_base_is_that_of_a_model_with_it(tokens: Tensor) -> None:
    for name in ("rope", "partly"):
        model = build(SITES[name])
        with rope_base(model, 77.0):
            expected = model(tokens)
        hooks = [hook for layer in range(2) for hook in rotation_base(model, 77.0, layer=layer)]
        torch.testing.assert_close(model.run_with_hooks(tokens, hooks=hooks), expected, rtol=0, atol=1e-10)
    model = build(SITES["partly"])
    at = "blocks.1.attn.hook_pattern"
    _, plain = model.run_with_cache(tokens, names=at)
    _, cache = model.run_with_cache(tokens, names=at, hooks=rotation_base(model, 77.0, layer=1, heads=[2]))
    changed = (cache[at] - plain[at]).abs().amax((0, 2, 3)) > 1e-6
    assert changed.tolist() == [False, False, True, False]


def by_a_cache(model: LanguageModel, tokens: Tensor, sinks: int, window: int) -> Tensor:
    """StreamingLLM as its code does it: keys are kept unrotated, and turned by their place at every step. [batch, pos, vocab]."""
    caches: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(model.n_layers)]
    logits = []
    for token in tokens.unbind(1):
        x = model.W_E[token]
        for block, cache in zip(model.blocks, caches, strict=True):
            site, read = block.attn, block.ln1(x[:, None])[:, 0]
            q, k, v = (linear(read).unflatten(-1, (-1, width)) for linear, width in (
                (site.query, site.d_head), (site.key, site.d_head), (site.value, site.d_value)))  # fmt: skip
            if site.qk_norm is not None:
                q, k = site.qk_norm(q[:, None], "query")[:, 0], site.qk_norm(k[:, None], "key")[:, 0]
            cache.append((k, v))
            if len(cache) > sinks + window:
                del cache[sinks]
            place = len(cache) - 1
            keys, values = (
                torch.stack(each, 1).repeat_interleave(site.n_heads // site.n_kv, 2)
                for each in zip(*cache, strict=True)
            )
            at = torch.arange(place + 1)
            if "rope" in site.rotate:
                rotary = site.rotate["rope"].rotary
                angle = at[:, None] * rotary.base ** -(torch.arange(0, rotary.d_rotary, 2).double() / rotary.d_rotary)

                def turned(x: Tensor, angle: Tensor, rotary: object = rotary) -> Tensor:
                    own = rotate(x[..., : rotary.d_rotary], angle.cos(), angle.sin(), rotary.interleaved)  # type: ignore[attr-defined]
                    return torch.cat([own, x[..., rotary.d_rotary :]], -1)  # type: ignore[attr-defined]

                q, keys = turned(q, angle[place]), turned(keys, angle[:, None])
            scores = torch.einsum("bhd,bkhd->bhk", q, keys) * site.scale
            if site.config.softcap is not None:
                scores = site.config.softcap * (scores / site.config.softcap).tanh()
            if "alibi" in site.bias:
                scores = scores - site.bias["alibi"].slopes.double()[:, None] * (place - at)
            z = torch.einsum("bhk,bkhd->bhd", scores.softmax(-1), values)
            x = x + site.output(z.flatten(1))
            x = x + block.mlp(block.ln2(x[:, None]))[:, 0]
        logits.append(model.unembed_residual(x[:, None])[:, 0])
    return torch.stack(logits, 1)


@pytest.mark.parametrize("name", ["rope", "partly", "alibi", "none"])
@pytest.mark.parametrize(("sinks", "window"), [(2, 4), (0, 3), (1, 1), (3, 30)])
def test_streaming_is_a_cache_read_token_by_token(name: str, sinks: int, window: int, tokens: Tensor) -> None:
    model = build(SITES.get(name, AttentionConfig(n_heads=4, position="none")))
    hooks = [hook for layer in range(2) for hook in stream(model, layer=layer, sinks=sinks, window=window)]
    found = model.run_with_hooks(tokens, hooks=hooks)
    torch.testing.assert_close(found, by_a_cache(model, tokens, sinks, window), rtol=0, atol=1e-10)
    assert torch.allclose(found, model(tokens)) == (sinks + window > N)


def test_streaming_of_one_head_leaves_the_others(tokens: Tensor) -> None:
    model, at = build(SITES["partly"]), "blocks.1.attn.hook_pattern"
    _, plain = model.run_with_cache(tokens, names=at)
    _, cache = model.run_with_cache(tokens, names=at, hooks=stream(model, layer=1, sinks=2, window=3, heads=[1]))
    assert ((cache[at] - plain[at]).abs().amax((0, 2, 3)) > 1e-6).tolist() == [False, True, False, False]
    assert torch.allclose(cache[at].sum(-1), torch.ones(2, 4, N).double())
    assert F.relu(cache[at][:, 1, 8, 2:6]).abs().max() == 0  # neither a sink nor among the last three


def test_what_cannot_be_moved_is_refused(tokens: Tensor) -> None:
    with pytest.raises(HookError, match="adds positions at the embedding"):
        stream(build(SITES["learned"]), layer=0, sinks=1, window=2)
    with pytest.raises(HookError, match="positions of layer 0 are bam"):
        move(build(AttentionConfig(n_heads=4, position=BAMConfig())), torch.arange(N))
    with pytest.raises(HookError, match="knows no positions"):
        move(build(AttentionConfig(n_heads=4, position="none")), torch.arange(N))
    with pytest.raises(HookError, match="no rotary positions"):
        rotation_base(build(SITES["alibi"]), 5.0, layer=0)
    with pytest.raises(HookError, match="base is -1"):
        rotation_base(build(SITES["rope"]), -1.0, layer=0)
    with pytest.raises(HookError, match="share keys"):
        rotation_base(build(SITES["rope"]), 5.0, layer=0, heads=[1])
    with pytest.raises(HookError, match="is no self-attention"):
        stream(models.build("retnet"), layer=0, sinks=1, window=2)
    model = build(SITES["rope"])
    with pytest.raises(HookError, match="Expected one call with the whole text"):
        model.run_with_hooks(tokens[:, :5], hooks=move(model, torch.arange(N)))
    with pytest.raises(ValueError, match="window 0"):
        stream(model, layer=0, sinks=1, window=0)
    _, state = model(tokens[:, :4], return_state=True)
    with pytest.raises(HookError, match="in one call"):
        model.run_with_hooks(
            tokens[:, 4:6],
            state=state,
            hooks=stream(model, layer=0, sinks=1, window=2),
        )
