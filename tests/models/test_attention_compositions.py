"""Attention that is composed of further parts, against the papers' equations written again: kernels, comparisons, talking heads, aligned
values, compressed memory, slots. Float64; every part is also reduced to what it generalises."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import models
from kernels.gated_linear_attention import gated_linear_attention
from models.attention.comparison import AsScoredConfig, ComparisonConfig
from models.attention.compressive import CompressionConfig, compressive_mixer
from models.attention.kernel_scores import KernelScoreConfig
from models.attention.site import AttentionConfig
from models.attention.slices import SliceConfig
from models.attention.slot_memory import SlotMemoryConfig
from models.attention.talking_heads import TalkingScoresConfig, TalkingWeightsConfig
from models.attention.transformer_xl import RecentSegmentsConfig, TransformerXLConfig
from models.attention.value_alignment import ValueAlignmentConfig
from models.parts.positions import sinusoidal
from tests.models.test_attention_parts import EXACT, LENGTH, WIDTH, built, largest, seen, text

CAUSAL = torch.ones(LENGTH, LENGTH).tril().bool()


def with_weights_of(model: Any, other: Any) -> Any:
    """`model` with those weights of `other` that it has too."""
    own = model.state_dict()
    model.load_state_dict({**own, **{name: value for name, value in other.state_dict().items() if name in own}})
    return model


# ---------------------------------------------------------------------------------------------------------------- kernels


def features(part: Any, x: Tensor) -> Tensor:
    """φ(x) of the paper, x [batch, pos, head, d_head] -> [batch, head, pos, feature]."""
    config = part.config
    if config.spectrum == "gaussian":
        omega = part.mean[:, None] + part.noise * torch.exp(part.log_variance / 2)[:, None]
    else:
        first, _, last, _ = part.generator
        omega = torch.tanh(last(torch.nn.functional.leaky_relu(first(part.noise))))
    phase = torch.einsum("bphd,hmd->bhpm", x, omega)
    if config.features == "fourier":
        wave = torch.cat([phase.cos(), phase.sin()], -1) / math.sqrt(config.frequencies)
        return torch.cat([wave, torch.ones_like(wave[..., :1])], -1)
    return torch.exp(phase - config.offset * x.square().sum(-1).transpose(1, 2)[..., None])


@pytest.mark.parametrize("kinds", [(f, s) for f in ("positive", "fourier") for s in ("gaussian", "generated")], ids=str)
def test_kernel_scores_are_linear_attention_over_features(kinds: tuple[str, str]) -> None:
    """z is Σ φ(q)·φ(k) v / Σ φ(q)·φ(k), by the recurrent kernel that never forms the map; and the map itself cell by cell."""
    model = built(AttentionConfig(4, score=KernelScoreConfig(*kinds, frequencies=7)))
    got = seen(model, "hook_q", "hook_k", "hook_v", "hook_z", "hook_pattern")
    part, root = model.blocks[0].attn.score, (WIDTH / 4) ** -0.25
    phi_q, phi_k = features(part, got["hook_q"] * root), features(part, got["hook_k"] * root)
    v = got["hook_v"].transpose(1, 2)
    both = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    read, _ = gated_linear_attention(phi_q, phi_k, both, mode="recurrent")
    assert largest(read[..., :-1] / read[..., -1:] - got["hook_z"].transpose(1, 2)) < EXACT
    kernel = (phi_q @ phi_k.transpose(-1, -2)) * CAUSAL
    assert largest(kernel / kernel.sum(-1, keepdim=True) - got["hook_pattern"]) < EXACT
    assert largest(got["hook_pattern"][:, :, -1] - 1 / LENGTH) > 0.01


def test_kernels_tend_to_what_they_estimate() -> None:
    """With standard normal frequencies the map nears softmax's (offset ½) or the Gaussian kernel's, at the rate of a mean over draws."""
    plain = built(AttentionConfig(4), std=0.08)
    got = seen(plain, "hook_q", "hook_k", "hook_pattern")
    q, k = (got[name].transpose(1, 2) * 6**-0.25 for name in ("hook_q", "hook_k"))
    apart = (q[:, :, :, None] - k[:, :, None]).square().sum(-1)
    hidden = ~CAUSAL
    gaussian = (-apart / 2).masked_fill(hidden, -math.inf)
    expected = {
        ("positive", 0.5): got["hook_pattern"],
        ("positive", 1.0): gaussian.softmax(-1),
        ("fourier", 0.5): gaussian.exp().add(1).masked_fill(hidden, 0),
    }
    expected["fourier", 0.5] = expected["fourier", 0.5] / expected["fourier", 0.5].sum(-1, keepdim=True)
    for (kind, offset), pattern in expected.items():
        errors = []
        for count in (100, 40000):
            config = KernelScoreConfig(kind, frequencies=count, offset=offset, seed=5)
            model = with_weights_of(built(AttentionConfig(4, score=config)), plain)
            part = model.blocks[0].attn.score
            part.mean.zero_(), part.log_variance.zero_()
            errors.append(float((seen(model, "hook_pattern")["hook_pattern"] - pattern).square().mean().sqrt()))
        assert errors[1] < 0.12 * errors[0] and errors[1] < 1e-3, (kind, offset, errors)  # √400 = 20 times smaller


def test_kernels_draw_their_noise_once_and_anew_when_told() -> None:
    model = models.build("kernelized").double()
    parts = [block.attn.score for block in model.blocks]
    assert largest(parts[0].noise - parts[1].noise) > 0.1
    before = model(text())
    parts[0].redraw(77)
    assert largest(model(text()) - before) > 1e-9
    parts[0].redraw(0)
    assert torch.equal(model(text()), before)
    with pytest.raises(ValueError, match=r"Unknown features 'positve'. Did you mean 'positive'"):
        KernelScoreConfig("positve")
    with pytest.raises(ValueError, match="frequencies is 0; expected at least 1"):
        KernelScoreConfig(frequencies=0)


def test_far_keys_do_not_break_a_kernel() -> None:
    """Exponents far outside the range of a 64-bit exponential still give the map that their differences say."""
    model = built(AttentionConfig(4, score=KernelScoreConfig(frequencies=1)), std=3.0)
    got = seen(model, "hook_q", "hook_k", "hook_pattern")
    part, root = model.blocks[0].attn.score, 6**-0.25
    omega = part.frequencies()
    k = got["hook_k"].transpose(1, 2) * root
    exponent = torch.einsum("bhkd,hmd->bhkm", k, omega)[..., 0] - 0.5 * k.square().sum(-1)  # the query's own cancels
    assert float(exponent.min()) < -800
    expected = exponent[:, :, None].expand(-1, -1, LENGTH, -1).masked_fill(~CAUSAL, -math.inf).softmax(-1)
    assert largest(expected - got["hook_pattern"]) < EXACT


# ------------------------------------------------------------------------------------------- comparisons, talking heads


def test_combined_attention_is_match_times_closeness() -> None:
    """Cell by cell; where query and key coincide the gate is 1, and nothing sums to 1."""
    model = built(AttentionConfig(4, score=ComparisonConfig(), normalise=AsScoredConfig()))
    got = seen(
        model, "hook_q", "hook_k", "hook_pattern", "score.hook_match", "score.hook_closeness", "hook_z", "hook_v"
    )
    for head, i, j in ((0, 4, 2), (3, 12, 0), (1, 7, 7)):
        q, k = got["hook_q"][1, i, head].tolist(), got["hook_k"][1, j, head].tolist()
        match = math.tanh(sum(a * b for a, b in zip(q, k, strict=True)) / math.sqrt(6))
        gate = 2 / (1 + math.exp(sum(abs(a - b) for a, b in zip(q, k, strict=True)) / math.sqrt(6)))
        assert float(got["score.hook_match"][1, head, i, j]) == pytest.approx(match, abs=1e-9)
        assert float(got["score.hook_closeness"][1, head, i, j]) == pytest.approx(gate, abs=1e-9)
        assert float(got["hook_pattern"][1, head, i, j]) == pytest.approx(match * gate, abs=1e-9)
    assert largest(got["hook_pattern"][..., ~CAUSAL]) == 0
    attn = model.blocks[0].attn
    attn.key.weight.copy_(attn.query.weight), attn.key.bias.copy_(attn.query.bias)
    same = seen(model, "score.hook_closeness")["score.hook_closeness"].diagonal(dim1=-2, dim2=-1)
    assert largest(same - 1) < EXACT


def test_talking_heads_are_two_projections_of_heads() -> None:
    """The paper's einsums with projections 1 + A and 1 + B; without A and B it is ordinary attention, with one of them the other half."""
    site = AttentionConfig(4, position=("rope", TalkingScoresConfig()), reweight=TalkingWeightsConfig())
    model = built(site)
    attn = model.blocks[0].attn
    got = seen(model, "hook_rot_q", "hook_rot_k", "hook_v", "hook_z")
    before, behind = (
        torch.eye(4).double() + part.mix for part in (attn.bias["talking_scores"], attn.reweight["talking_weights"])
    )
    logits = torch.einsum("bqhd,bkhd->bhqk", got["hook_rot_q"], got["hook_rot_k"]) / math.sqrt(6)
    mixed = torch.einsum("bgqk,hg->bhqk", logits, before).masked_fill(~CAUSAL, -math.inf).softmax(-1)
    weights = torch.einsum("bgqk,hg->bhqk", mixed, behind)
    assert largest(torch.einsum("bhqk,bkhd->bqhd", weights, got["hook_v"]) - got["hook_z"]) < EXACT
    plain = with_weights_of(built(AttentionConfig(4, position="rope")), model)
    assert largest(plain(text()) - model(text())) > 1e-4
    attn.bias["talking_scores"].mix.zero_(), attn.reweight["talking_weights"].mix.zero_()
    assert largest(plain(text()) - model(text())) < EXACT


# ---------------------------------------------------------------------------------------------------------- aligned values


def test_super_attention_reads_aligned_values() -> None:
    """P (W_A V) with W_A lower triangular, by its own product; the identity is efficient attention; longer texts are refused in words."""
    sliced = SliceConfig(("key", "value"))
    site = AttentionConfig(4, bias=("query",), project=sliced, reweight=ValueAlignmentConfig(LENGTH + 1))
    model = built(site)
    align = model.blocks[0].attn.reweight["value_alignment"].align
    got = seen(model, "hook_raw_pattern", "hook_pattern", "hook_v", "hook_z")
    aligned = torch.einsum("jt,bthd->bjhd", align[:LENGTH, :LENGTH].tril(), got["hook_v"])
    assert largest(torch.einsum("bhqj,bjhd->bqhd", got["hook_raw_pattern"], aligned) - got["hook_z"]) < EXACT
    assert largest(got["hook_pattern"] - got["hook_raw_pattern"]) > 0.01
    both_ways = built(replace(site, causal=False))
    wide = seen(both_ways, "hook_raw_pattern", "hook_pattern")
    full = both_ways.blocks[0].attn.reweight["value_alignment"].align[:LENGTH, :LENGTH]
    assert largest(wide["hook_raw_pattern"] @ full - wide["hook_pattern"]) < EXACT
    efficient = with_weights_of(built(AttentionConfig(4, bias=("query",), project=sliced)), model)
    align.copy_(torch.eye(LENGTH + 1))
    assert largest(efficient(text()) - model(text())) < EXACT
    with pytest.raises(
        ValueError, match=r"A text reaches place 15; super attention aligns the values of 14 places, 0 to 13"
    ):
        model(text(length=16))
    with pytest.raises(ValueError, match="got fractional facts"):
        built(replace(site, position="none"))(text(), facts={"positions": torch.arange(LENGTH)[None] * 0.5})


# ------------------------------------------------------------------------------------------------------- compressed memory


def by_queues(model: Any, tokens: Tensor, segment: int, memory: int, slots: int, rate: int) -> Tensor:
    """Layer 0's attention output, segment by segment with two queues of hidden states as the paper has them, one sequence and loops."""
    site, block = model.blocks[0].attn, model.blocks[0]
    hidden = block.ln1(model(tokens, stop_at_layer=0))[0]
    part, heads = site.normalise, site.n_heads
    width = site.d_head
    u, relative = site.bias["key_preference"].u, site.bias["relative"]

    def waves(distance: float) -> Tensor:
        return relative.project(sinusoidal(torch.tensor([distance], dtype=torch.float64), WIDTH))[0].view(heads, width)

    recent: list[tuple[int, Tensor]] = []  # (place, hidden state)
    compressed: list[list[tuple[int, Tensor]]] = []
    out = []
    for start in range(0, len(hidden), segment):
        piece = [(start + n, h) for n, h in enumerate(hidden[start : start + segment])]
        for i, h in piece:
            q = site.query(h).view(heads, width)
            z = torch.zeros(heads, width, dtype=torch.float64)
            for head in range(heads):
                share = part.weigh[head].softmax(0)
                sources = [
                    ([place], x, torch.ones(1).double()) for place, x in recent + [p for p in piece if p[0] <= i]
                ]
                for group in compressed[-slots:] if slots else []:
                    mean = sum(w * x for w, (_, x) in zip(share, group, strict=True))
                    sources.append(([place for place, _ in group], mean, share.double()))
                scores, values = [], []
                for places, x, weight in sources:
                    k, v = (linear(x).view(heads, width)[head] for linear in (site.key, site.value))
                    r = sum(w * waves(float(i - place))[head] for w, place in zip(weight, places, strict=True))
                    scores.append(((q[head] + u[head]) @ k + (q[head] + relative.v[head]) @ r) * site.scale)
                    values.append(v)
                z[head] = torch.stack(scores).softmax(0) @ torch.stack(values)
            out.append(site.output(z.flatten()))
        recent += piece
        while len(recent) > memory:  # the oldest leave the memory, `rate` at a time, for one new slot
            compressed.append(recent[:rate])
            recent = recent[rate:]
    return torch.stack(out)


@pytest.mark.parametrize(("memory", "slots", "rate", "learned"), [(4, 2, 2, False), (2, 3, 2, True), (0, 1, 4, True)])
def test_compressed_memory_is_two_queues(memory: int, slots: int, rate: int, learned: bool) -> None:
    site = compressive_mixer(3, segment=4, memory=memory, slots=slots, rate=rate, learned=learned, bias=False)
    model = built(site)
    if learned:
        weigh = model.blocks[0].attn.normalise.weigh
        weigh.copy_(torch.randn(weigh.shape, generator=torch.Generator().manual_seed(8)))
    tokens = text(1, 19)
    _, cache = model.run_with_cache(tokens, names=["*.hook_attn_out", "*.hook_slot_pattern", "*.hook_pattern"])
    assert largest(cache["attn_out", 0][0] - by_queues(model, tokens, 4, memory, slots, rate)) < EXACT
    pattern, weights = (cache[f"blocks.0.attn.{name}"] for name in ("hook_pattern", "normalise.hook_slot_pattern"))
    begun = 16 - memory  # the last segment's: older tokens are read through slots
    read = [slot for slot in range(weights.shape[-1]) if float(weights[0, 0, 18, slot]) > 0]
    assert read == list(range(begun // rate - slots, begun // rate))
    assert largest(pattern[..., 18, begun:].sum(-1) + weights[..., 18, :].sum(-1) - 1) < EXACT
    for slot in read:
        assert largest(pattern[..., 18, slot * rate : (slot + 1) * rate].sum(-1) - weights[..., 18, slot]) < EXACT


def test_compression_reduces_to_transformer_xl() -> None:
    """Without slots, and with slots of one token, a compressive transformer is Transformer-XL with as long a memory."""
    for slots, rate in ((0, 2), (3, 1)):
        compressive = built(compressive_mixer(4, segment=4, memory=2, slots=slots, rate=rate), layers=2)
        mask = RecentSegmentsConfig(4, 2 + slots * rate)
        plain = with_weights_of(built(TransformerXLConfig(n_heads=4, mask=mask), layers=2), compressive)
        assert largest(compressive(text()) - plain(text())) < EXACT
    longer = built(compressive_mixer(4, segment=4, memory=2, slots=3, rate=2), layers=2)
    assert largest(longer(text()) - with_weights_of(plain, longer)(text())) > 1e-5
    with pytest.raises(ValueError, match=r"segment \(5\) and memory \(4\) must be multiples of rate \(2\)"):
        CompressionConfig(5, 4, 2)


# ------------------------------------------------------------------------------------------------------------------- slots


def by_slots(model: Any, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Layer 0's z for one sequence, and the slots before every segment, by loops over segments, tokens, slots and heads."""
    site = model.blocks[0].attn
    part, x = site.mix["slot_memory"], model.blocks[0].ln1(model(tokens, stop_at_layer=0))[0]
    segment, heads = part.config.segment, site.n_heads
    memory = part.bias / part.bias.norm(dim=-1, keepdim=True)
    out, before = [], []
    for start in range(0, len(x), segment):
        piece = x[start : start + segment]
        before.append(memory)
        keys, values = (linear(memory).view(len(memory), heads, -1) for linear in (part.key, part.value))
        q, k, v = (linear(piece).view(len(piece), heads, -1) for linear in (site.query, site.key, site.value))
        asked = part.query(piece).view(len(piece), heads, -1)
        for i in range(len(piece)):
            z = torch.zeros(heads, site.d_value, dtype=torch.float64)
            for head in range(heads):
                inside = torch.stack([q[i, head] @ k[j, head] * site.scale for j in range(i + 1)]).softmax(0)
                slots = torch.stack([asked[i, head] @ key[head] * site.scale for key in keys]).softmax(0)
                z[head] = inside @ v[: i + 1, head] + slots @ values[:, head]
            out.append(z)
        if len(piece) < segment:
            break
        written = []
        for slot in memory:
            sources = torch.cat([slot[None], piece])
            ask = part.write_query(slot).view(heads, -1)
            k, v = (linear(sources).view(len(sources), heads, -1) for linear in (part.write_key, part.write_value))
            match = torch.einsum("hd,shd->hs", ask, k) * site.scale / part.config.temperature
            new = part.write_output(torch.einsum("hs,shd->hd", match.softmax(-1), v).flatten())
            written.append(new + part.bias[len(written)])
        memory = torch.stack([slot / slot.norm() for slot in written])
    return torch.stack(out), before


def test_slots_are_read_and_written_anew() -> None:
    """z and the slots by loops; slots that write nothing are forgotten; what was said segments ago reaches only what reads slots."""
    mix, alone = SlotMemoryConfig(slots=3, segment=5), {"position": "none", "mask": RecentSegmentsConfig(5, 0)}
    model = built(AttentionConfig(4, **alone, mix=mix))
    tokens, part = text(1, 18), model.blocks[0].attn.mix["slot_memory"]
    kept: list[Tensor] = []
    output = [("blocks.0.attn.hook_result", lambda result, hook: kept.append(result))]
    model.set_switch("use_attn_result", True)
    model.run_with_hooks(tokens, hooks=output)
    z, before = by_slots(model, tokens)
    assert largest(kept[0][0] - torch.einsum("phd,hdm->phm", z, model.blocks[0].attn.W_O)) < EXACT
    states = model.states(tokens, [0, 4, 9, 17], layers=0, slot="state")[0]
    for position, segment in enumerate((0, 1, 2, 3)):
        assert largest(states[0, position] - before[segment]) < EXACT
    weights = model.run_with_cache(tokens, names="blocks.0.attn.mix.slot_memory.hook_slot_weights")[1]
    assert largest(next(iter(weights.values())).sum(-1) - 1) < EXACT
    other = tokens.clone()
    other[0, 1] = (other[0, 1] + 1) % 37
    assert largest(model(other)[:, 5:] - model(tokens)[:, 5:]) > 1e-6
    part.write_output.weight.zero_()  # nothing is written: slots fall back to where they began
    assert largest(model(other)[:, 5:] - model(tokens)[:, 5:]) == 0
    part.value.weight.zero_()
    plain = with_weights_of(built(AttentionConfig(4, **alone)), model)
    assert largest(plain(tokens) - model(tokens)) < EXACT
    with pytest.raises(ValueError, match=r"slots is 0, segment 5, temperature 0.25; expected at least 1"):
        SlotMemoryConfig(0, 5)
