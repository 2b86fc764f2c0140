"""Memory transformers against their equations, written out slowly in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import models
from models.attention.infini import InfiniConfig
from models.attention.landmark import LandmarkConfig, with_landmarks
from models.attention.relative import KeyPreferenceConfig, RelativeConfig
from models.attention.site import AttentionConfig
from models.attention.transformer_xl import RecentSegmentsConfig, TransformerXLConfig
from models.language_model import LanguageModel, LanguageModelConfig
from models.segments import SegmentGrid, in_segments


def build(mixer: object, layers: int = 1) -> LanguageModel:
    model = LanguageModel(LanguageModelConfig(layers, 24, mixer=mixer)).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5).add_(0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 256, (2, 17), generator=torch.Generator().manual_seed(0))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> bool:
    return a.shape == b.shape and float((a - b).abs().max()) < tolerance


# -------------------------------------------------------------------------------------------------------- segments


def test_segment_grid_against_a_loop() -> None:
    """Ragged batches: what was begun, what comes, what is unfinished, and back."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        real = torch.rand(3, 11, generator=generator) < 0.7
        before = torch.randint(0, 9, (3,), generator=generator)
        x, begun = torch.rand(3, 11, 2, generator=generator), torch.rand(3, 4, 2, generator=generator)
        grid = SegmentGrid(before, real, 4)
        sorted_x = grid.sort(x, begun)
        for row in range(3):
            first = int(before[row]) % 4
            listed = torch.cat([begun[row, :first], x[row][real[row]]])
            assert torch.equal(sorted_x[row].flatten(0, 1)[: len(listed)], listed)
            assert grid.filled()[row].sum() == len(listed)
            assert torch.equal(grid.unfinished(sorted_x)[row, : len(listed) % 4], listed[len(listed) // 4 * 4 :])
        assert torch.equal(grid.unsort(sorted_x)[real], x[real])


def test_segments_must_hold_tokens(tokens: Tensor) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        next(in_segments(models.build("gpt"), tokens, 0))


# ---------------------------------------------------------------------------------------------------------- Infini


@pytest.mark.parametrize("update", ["linear", "delta"])
def test_infini_is_its_equations(update: str, tokens: Tensor) -> None:
    """Local softmax, memory read and update of every head, token by token."""
    segment, model = 5, build(InfiniConfig(n_heads=4, segment=5, update=update))
    _, cache = model.run_with_cache(tokens)
    at = "blocks.0.mixer."
    q, k, v, rq, rk = (cache[at + f"hook_{name}"] for name in ("q", "k", "v", "rot_q", "rot_k"))
    g = model.blocks[0].mixer.gate.sigmoid()
    for b in range(2):
        for h in range(4):
            memory, z = torch.zeros(6, 6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
            for i in range(17):
                start = i // segment * segment
                weights = (rk[b, start : i + 1, h] @ rq[b, i, h] / 6**0.5).softmax(0)
                asked = F.elu(q[b, i, h]) + 1
                read = asked @ memory / (asked @ z) if start else torch.zeros(6, dtype=torch.float64)
                expected = g[h] * read + (1 - g[h]) * weights @ v[b, start : i + 1, h]
                assert close(cache[at + "hook_z"][b, i, h], expected)
                if i % segment == segment - 1:
                    keys, values = F.elu(k[b, start : i + 1, h]) + 1, v[b, start : i + 1, h]
                    recalled = keys @ memory / (keys @ z)[:, None] if update == "delta" and start else 0.0
                    memory = memory + keys.T @ (values - recalled)
                    z = z + keys.sum(0)
            state = model.states(tokens, [16], layers=0)[0][b, 0, h]
            assert close(state, memory)


def test_infini_memory_is_linear_attention_over_earlier_segments(tokens: Tensor) -> None:
    """The memory's share of the pattern is g · σ(q)·σ(k) / Σ; the rest is a softmax within the segment."""
    model = build(InfiniConfig(n_heads=4, segment=5))
    _, cache = model.run_with_cache(tokens, names=["blocks.0.mixer.*"])
    at = "blocks.0.mixer."
    q, k = (F.elu(cache[at + f"hook_{name}"]) + 1 for name in "qk")
    segment = torch.arange(17) // 5
    earlier = segment[None, :] < segment[:, None]
    match = torch.einsum("bihd,bjhd->bhij", q, k) * earlier
    weights = match / match.sum(-1, keepdim=True).clamp(min=1e-300)
    gate = model.blocks[0].mixer.gate.sigmoid()[:, None, None]
    pattern = cache[at + "hook_pattern"]
    assert close(pattern * earlier, gate * weights * earlier)
    assert close((pattern * (segment[None, :] == segment[:, None])).sum(-1), (1 - gate[..., 0]).expand(2, 4, 17))


def test_taking_one_token_out_of_an_infini_memory(tokens: Tensor) -> None:
    """With the linear update a token's contribution can be subtracted exactly: as if its value had been 0 and it had no key."""
    model, at = build(InfiniConfig(n_heads=4, segment=5)), "blocks.0.mixer."
    _, cache = model.run_with_cache(tokens)
    _, state = model(tokens[:, :5], return_state=True)
    feature, value = F.elu(cache[at + "hook_k"][:, 2]) + 1, cache[at + "hook_v"][:, 2]
    without = state.replaced(
        0,
        state=state.slot(0, "state") - torch.einsum("bhk,bhv->bhkv", feature, value),
        normaliser=state.slot(0, "normaliser") - feature,
    )
    _, watched = model.run_with_cache(tokens[:, 5:10], state=without, names=at + "hook_memory_z")
    q, k, v = (cache[at + f"hook_{name}"] for name in "qkv")
    others = [0, 1, 3, 4]
    match = torch.einsum("bihd,bjhd->bhij", F.elu(q[:, 5:10]) + 1, F.elu(k[:, others]) + 1)
    expected = torch.einsum("bhij,bjhv->bihv", match / match.sum(-1, keepdim=True), v[:, others])
    assert close(watched[at + "hook_memory_z"], expected)


# -------------------------------------------------------------------------------------------------- Transformer-XL


def xl(segment: int, memory: int, layers: int = 2) -> LanguageModel:
    return build(TransformerXLConfig(n_heads=4, mask=RecentSegmentsConfig(segment, memory)), layers)


def test_segments_with_a_long_memory_are_full_attention(tokens: Tensor) -> None:
    """With a memory of everything, reading segment by segment equals one causal attention with the same weights."""
    model = xl(5, 100)
    full = build(AttentionConfig(n_heads=4, position=(KeyPreferenceConfig(), RelativeConfig())), 2)
    full.load_state_dict(model.state_dict())
    pieces = [logits for logits, _ in in_segments(model, tokens, 5)]
    assert close(torch.cat(pieces, 1), full(tokens))


def test_a_short_memory_reaches_one_memory_further_per_layer(tokens: Tensor) -> None:
    """Against an independent run: each segment reads [memory ; segment] of the layer's inputs and nothing else."""
    model, segment, memory = xl(4, 3), 4, 3
    got = torch.cat([logits for logits, _ in in_segments(model, tokens, segment)], 1)
    wave = torch.exp(torch.arange(0, 24, 2, dtype=torch.float64) * (-torch.log(torch.tensor(10000.0).double()) / 24))
    kept: list[Tensor] = [torch.zeros(2, 0, 24, dtype=torch.float64) for _ in range(2)]
    expected = []
    for start in range(0, 17, segment):
        x = model.embed(tokens[:, start : start + segment])
        for layer, block in enumerate(model.blocks):
            h, site = block.ln1(x), block.attn
            everything = torch.cat([kept[layer], h], 1)
            kept[layer] = everything[:, -memory:].detach()
            q, k, v = (
                f(y).unflatten(-1, (4, 6)).transpose(1, 2)
                for f, y in ((site.query, h), (site.key, everything), (site.value, everything))
            )
            n, m = h.shape[1], everything.shape[1]
            distance = (torch.arange(n)[:, None] + m - n - torch.arange(m)[None, :]).double()
            angle = distance.clamp(min=0)[..., None] * wave
            sinusoid = torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)
            term = site.bias["relative"]
            r = term.project(sinusoid).unflatten(-1, (4, 6))
            content = torch.einsum("bhid,bhjd->bhij", q + site.bias["key_preference"].u[:, None], k)
            position = torch.einsum("bhid,ijhd->bhij", q + term.v[:, None], r)
            scores = ((content + position) / 6**0.5).masked_fill(distance < 0, float("-inf"))
            x = x + site.output((scores.softmax(-1) @ v).transpose(1, 2).flatten(-2))
        expected.append(model.unembed_residual(x))
    assert close(got, torch.cat(expected, 1))


def test_no_gradient_through_the_memory_but_to_its_keys(tokens: Tensor) -> None:
    """The earlier segment's embedding gets no gradient; W_K gets one from the memory, as when hidden states are cached."""
    model = xl(4, 4, layers=1)
    embedded: list[Tensor] = []
    with model.hooks([("hook_embed", lambda x, hook: embedded.append(x))]):
        _, state = model(tokens[:, :4], return_state=True)
        loss = model(tokens[:, 4:8], state=state).square().sum()
    gradient, key = torch.autograd.grad(loss, [model.embed.W_E, model.blocks[0].attn.key.weight])
    now = set(tokens[:, 4:8].flatten().tolist())
    only_before = [t for t in tokens[:, :4].flatten().tolist() if t not in now]
    assert only_before and float(gradient[only_before].abs().max()) == 0
    empty = state.replaced(0, hidden=torch.zeros_like(state.slot(0, "hidden")))
    without = torch.autograd.grad(model(tokens[:, 4:8], state=empty).square().sum(), [model.blocks[0].attn.key.weight])[
        0
    ]
    assert float((key - without).abs().max()) > 1e-6


def test_only_the_memory_that_can_be_read_is_carried(tokens: Tensor) -> None:
    _, state = xl(4, 3)(tokens, return_state=True)
    assert state.slot(0, "hidden").shape == (2, 7, 24)


def test_transformer_xl_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="RecentSegmentsConfig"):
        build(TransformerXLConfig(n_heads=4))
    with pytest.raises(ValueError, match="rope"):
        build(TransformerXLConfig(n_heads=4, position="rope", mask=RecentSegmentsConfig(4, 4)))


# -------------------------------------------------------------------------------------------------------- Landmark


@pytest.mark.parametrize("retrieve", [None, 1, 2])
def test_landmark_is_a_softmax_of_two_levels(retrieve: int | None, tokens: Tensor) -> None:
    model = build(AttentionConfig(n_heads=4, position="rope", normalise=LandmarkConfig(3, retrieve)))
    _, cache = model.run_with_cache(tokens)
    scores, pattern = cache["blocks.0.attn.hook_attn_scores"], cache["blocks.0.attn.hook_pattern"]
    gates = cache["blocks.0.attn.normalise.hook_block_gate"]
    for i in range(17):
        own, marks = i // 4, [j for j in range(i // 4 * 4) if j % 4 == 3]
        inside = [j for j in range(own * 4, i + 1) if j % 4 != 3]
        for b in range(2):
            for h in range(4):
                row = scores[b, h, i]
                best = sorted(marks, key=lambda j: -float(row[j]))[:retrieve]
                first = dict(zip(inside + best, row[inside + best].softmax(0), strict=True))
                expected = torch.zeros(17, dtype=torch.float64)
                for j in inside:
                    expected[j] = first[j]
                for mark in best:
                    block = list(range(mark - 3, mark))
                    expected[block] = first[mark] * row[block].softmax(0)
                    assert close(gates[b, h, i, mark // 4], first[mark])
                assert close(pattern[b, h, i], expected)


def test_landmarks_are_put_after_every_block() -> None:
    text = torch.arange(1, 8)[None]
    assert with_landmarks(text, 3, 0).tolist() == [[1, 2, 3, 0, 4, 5, 6, 0, 7]]
    assert with_landmarks(text[:, :2], 3, 0).tolist() == [[1, 2]]
