"""Every part of the attention site against its equation: position terms, pairs of maps, masks, normalisers, and what they reduce to."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import models
from models.attention.bam import BAMConfig
from models.attention.cope import CoPEConfig
from models.attention.differential import DifferentialConfig, initial_lambda
from models.attention.gates import ImportanceConfig, OutputGateConfig
from models.attention.low_rank import score_split
from models.attention.masks import (
    BlockCausalConfig,
    DocumentsConfig,
    FixedConfig,
    PrefixConfig,
    StridedConfig,
)
from models.attention.ngram import NGramConfig, ValuesOnlyConfig, ngram_matches
from models.attention.normalisers import EmptyRowsConfig, HardConfig, ReluConfig, SinkConfig, TopKConfig
from models.attention.pair_scores import PairScoreConfig
from models.attention.relative import KeyPreferenceConfig, RelativeConfig, RelativeEmbeddingConfig
from models.attention.rotary import QKNormConfig, RopeConfig, SSMaxConfig
from models.attention.site import Attention, AttentionConfig
from models.attention.slices import SliceConfig
from models.attention.t5 import T5BiasConfig, t5_bucket
from models.configs import config_from_json, config_to_json
from models.context import Context
from models.language_model import LanguageModel, LanguageModelConfig
from models.parts.positions import alibi_slopes, sinusoidal
from models.parts.rope_scaling import RopeScaling
from workbench.instrument.errors import RefusedByPattern
from workbench.instrument.patterns import Pattern, PatternMeta
from workbench.lab.factors import LayerFactors
from workbench.lab.runs import RunStore
from workbench.lab.trace import trace_run

EXACT = 1e-10
LENGTH, WIDTH, VOCAB = 13, 24, 37


def largest(x: Tensor) -> float:
    return float(x.detach().abs().max())


def built(site: AttentionConfig, layers: int = 1, std: float = 0.4) -> LanguageModel:
    """A model of one or more such layers without MLPs, float64, with every parameter away from its initial value."""
    model = LanguageModel(LanguageModelConfig(layers, WIDTH, VOCAB, 64, site, None, init_std=std)).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model.requires_grad_(False)


def text(batch: int = 2, length: int = LENGTH, vocab: int = VOCAB) -> Tensor:
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(0))


def seen(
    model: LanguageModel, *names: str, tokens: Tensor | None = None, hooks: Any = (), **options: Any
) -> dict[str, Tensor]:
    """Activations of layer 0's attention by short name."""
    wanted = [f"blocks.0.attn.{name}" for name in names]
    _, cache = model.run_with_cache(text() if tokens is None else tokens, names=wanted, hooks=hooks, **options)
    return {name: cache[address] for name, address in zip(names, wanted, strict=True)}


# ------------------------------------------------------------------------------------- the stages add up, fast == explicit

SITES = {
    "two rotations": AttentionConfig(4, position=("rope", SSMaxConfig()), bias=("query", "value")),
    "T5": AttentionConfig(4, position=T5BiasConfig(8, 16), scale=1.0),
    "T5, both ways": AttentionConfig(4, position=T5BiasConfig(8, 16), causal=False),
    "ALiBi and rotation": AttentionConfig(6, 2, d_head=6, position=("alibi", "rope"), window=5),
    "Transformer-XL": AttentionConfig(4, position=(KeyPreferenceConfig(), RelativeConfig())),
    "Music Transformer": AttentionConfig(4, position=RelativeEmbeddingConfig(6)),
    "Music Transformer, both ways": AttentionConfig(4, position=RelativeEmbeddingConfig(6), causal=False),
    "CoPE": AttentionConfig(4, position=CoPEConfig(8)),
    "BAM": AttentionConfig(4, position=(SSMaxConfig(), BAMConfig())),
    "five terms": AttentionConfig(
        4, position=("rope", "alibi", BAMConfig(), T5BiasConfig(), KeyPreferenceConfig(), CoPEConfig(8)), softcap=None
    ),
    "capped": AttentionConfig(4, position="alibi", softcap=2.0),
    "normed heads": AttentionConfig(6, 3, d_head=4, position="rope", qk_norm=QKNormConfig()),
    "normed together, after": AttentionConfig(4, position="rope", qk_norm=QKNormConfig("layer", over="all", after_rotation=True)),
    "both ways": AttentionConfig(4, position="rope", causal=False),
    "both ways, window": AttentionConfig(4, position="rope", causal=False, window=3),
    "strided": AttentionConfig(4, mask=StridedConfig(3)),
    "fixed, merged": AttentionConfig(4, mask=FixedConfig(4, 2, split=False)),
    "blocks": AttentionConfig(4, mask=BlockCausalConfig(4)),
    "prefix": AttentionConfig(4, mask=PrefixConfig(5)),
    "own values": AttentionConfig(4, 2, d_value=9),
}  # fmt: skip


@pytest.mark.parametrize("config", SITES.values(), ids=SITES)
def test_fast_is_explicit_and_scores_are_their_terms(config: AttentionConfig) -> None:
    """The fused kernel's output is the explicit one's; scores = content + every named term + mask (softly capped before the mask)."""
    model = built(config)
    site = model.blocks[0].attn
    fast = model(text())
    terms = [f"bias.{name}.hook_bias" for name in site.bias]
    content = [] if site._plain_scores else ["hook_content_scores"]
    got = seen(model, "hook_mask", "hook_attn_scores", "hook_pattern", *content, *terms)
    watched = model.run_with_hooks(text(), hooks=[("blocks.0.attn.hook_pattern", lambda p, hook: None)])
    assert largest(watched - fast) < EXACT
    if content:
        total = got["hook_content_scores"] + sum(got[name] for name in terms)
        capped = total if config.softcap is None else config.softcap * (total / config.softcap).tanh()
        finite = got["hook_mask"] == 0
        assert largest((capped - got["hook_attn_scores"])[finite]) < EXACT
        assert bool(got["hook_attn_scores"][~finite].isneginf().all())
    assert largest(got["hook_attn_scores"].softmax(-1) - got["hook_pattern"]) < EXACT
    for name in terms:  # every term says something of its own
        assert largest(got[name] - got[name][..., :1, :1]) > 1e-3


@pytest.mark.parametrize("config", SITES.values(), ids=SITES)
def test_saved_configurations_come_back(config: AttentionConfig) -> None:
    """Parts, tuples of parts and nested settings survive JSON."""
    model = LanguageModelConfig(2, WIDTH, mixer=(config, AttentionConfig(3)))
    assert config_from_json(LanguageModelConfig, config_to_json(model)) == model


# ------------------------------------------------------------------------------------------------------- position terms


def test_t5_buckets_are_the_published_ones() -> None:
    """Exact up to half of the buckets, then logarithmic up to max_distance; written again as a loop over one distance at a time."""

    def published(relative: int, bidirectional: bool, buckets: int, longest: int) -> int:
        offset, n = 0, -relative  # relative = key − query
        if bidirectional:
            buckets //= 2
            offset, n = (buckets if n < 0 else 0), abs(n)
        n = max(n, 0)
        exact = buckets // 2
        if n < exact:
            return offset + n
        return offset + min(
            exact + int(math.log(n / exact) / math.log(longest / exact) * (buckets - exact)), buckets - 1
        )

    for buckets, longest in ((32, 128), (8, 20)):
        for causal in (True, False):
            distance = torch.arange(-200, 200)
            got = t5_bucket(distance, buckets, longest, causal).tolist()
            assert got == [published(-int(d), not causal, buckets, longest) for d in distance]


def test_t5_layers_share_the_first_table() -> None:
    shared, apart = (built(AttentionConfig(4, position=T5BiasConfig(shared=s)), layers=3) for s in (True, False))
    names = [name for name, _ in shared.named_parameters() if "table" in name]
    assert names == ["blocks.0.attn.bias.t5.table"]
    assert len([name for name, _ in apart.named_parameters() if "table" in name]) == 3
    plain = shared(text())
    last = "blocks.2.attn.bias.t5.hook_bias"
    _, cache = shared.run_with_cache(text(), names=[last, "blocks.0.attn.bias.t5.hook_bias"])
    assert largest(cache[last] - cache["blocks.0.attn.bias.t5.hook_bias"]) == 0
    assert largest(shared.run_with_hooks(text(), hooks=[(last, lambda b, hook: 0 * b)]) - plain) > 1e-6


def test_transformer_xl_is_its_four_terms() -> None:
    """Scores cell by cell as (q + u)·k + (q + v)·W_r R_{i−j}, and the gather equals the paper's shift of a query × distance array."""
    model = built(AttentionConfig(3, position=(KeyPreferenceConfig(), RelativeConfig()), bias=False))
    site = model.blocks[0].attn
    got = seen(model, "hook_q", "hook_k", "hook_attn_scores", "bias.relative.hook_bias")
    u, v, project = site.bias["key_preference"].u, site.bias["relative"].v, site.bias["relative"].project
    for head, i, j in ((0, 5, 2), (2, 12, 0), (1, 7, 7)):
        q, k = got["hook_q"][1, i, head], got["hook_k"][1, j, head]
        wave = sinusoidal(torch.tensor([float(i - j)], dtype=torch.float64), WIDTH)
        r = project(wave)[0].view(3, -1)[head]
        expected = (float((q + u[head]) @ k) + float((q + v[head]) @ r)) * site.scale
        assert float(got["hook_attn_scores"][1, head, i, j]) == pytest.approx(expected, abs=1e-9)
    r = project(sinusoidal(torch.arange(LENGTH - 1, -1, -1, dtype=torch.float64), WIDTH)).view(LENGTH, 3, -1)
    products = torch.einsum("bqhd,nhd->bhqn", got["hook_q"] + v, r) * site.scale  # column n: distance LENGTH − 1 − n
    padded = torch.cat([products.new_zeros(*products.shape[:3], 1), products], dim=-1)
    shifted = padded.view(2, 3, LENGTH + 1, LENGTH)[:, :, 1:].view_as(products)
    lower = torch.ones(LENGTH, LENGTH).tril().bool()
    assert largest((shifted - got["bias.relative.hook_bias"])[..., lower]) < EXACT


def test_music_transformer_is_its_skewed_product() -> None:
    """Skew(Q E_rᵀ) of the paper, for texts up to the longest distance; beyond it the last vector repeats."""
    model = built(AttentionConfig(3, position=RelativeEmbeddingConfig(LENGTH)))
    term = model.blocks[0].attn.bias["relative_embedding"]
    got = seen(model, "hook_q", "bias.relative_embedding.hook_bias")
    rel = torch.einsum("bqhd,hnd->bhqn", got["hook_q"], term.table.flip(1)) * model.blocks[0].attn.scale
    skewed = (
        torch.cat([rel.new_zeros(*rel.shape[:3], 1), rel], -1).view(2, 3, LENGTH + 1, LENGTH)[:, :, 1:].view_as(rel)
    )
    lower = torch.ones(LENGTH, LENGTH).tril().bool()
    assert largest((skewed - got["bias.relative_embedding.hook_bias"])[..., lower]) < EXACT
    short = built(AttentionConfig(3, position=RelativeEmbeddingConfig(4)))
    bias = seen(short, "hook_q", "bias.relative_embedding.hook_bias")
    last = short.blocks[0].attn.bias["relative_embedding"].table[1, -1]
    expected = float(bias["hook_q"][0, 12, 1] @ last) * short.blocks[0].attn.scale
    for key in range(10):
        assert float(bias["bias.relative_embedding.hook_bias"][0, 1, 12, key]) == pytest.approx(expected, abs=1e-9)


def test_cope_is_its_equation() -> None:
    """Gates, counts and interpolation by loops; with all gates at 1, CoPE is a relative position embedding of i − j + 1."""
    model = built(AttentionConfig(3, position=CoPEConfig(6)))
    site, prefix = model.blocks[0].attn, "bias.cope"
    table = site.bias["cope"].table
    names = ("hook_q", "hook_content_scores", f"{prefix}.hook_positions", f"{prefix}.hook_bias", f"{prefix}.hook_count")
    got = seen(model, *names)
    for head, i, j in ((0, 3, 1), (2, 12, 0), (1, 8, 8)):
        content = got["hook_content_scores"][1, head, i]
        count = min(sum(1 / (1 + math.exp(-float(content[t]))) for t in range(j, i + 1)), 5)
        low = math.floor(count)
        vector = table[low] * (1 - count + low) + table[min(low + 1, 5)] * (count - low)
        assert float(got[f"{prefix}.hook_positions"][1, head, i, j]) == pytest.approx(count, abs=1e-9)
        assert float(got[f"{prefix}.hook_bias"][1, head, i, j]) == pytest.approx(
            float(got["hook_q"][1, i, head] @ vector), abs=1e-9
        )
    assert torch.equal(got[f"{prefix}.hook_count"][..., 0], got[f"{prefix}.hook_positions"][..., 0].transpose(1, 2))

    def count_all(gates: Tensor, hook: object) -> Tensor:
        return torch.ones_like(gates).tril()

    ones = seen(model, "hook_q", f"{prefix}.hook_bias", hooks=[(f"blocks.0.attn.{prefix}.hook_gates", count_all)])
    for i, j in ((4, 4), (6, 3), (12, 0)):
        expected = ones["hook_q"][0, i, 1] @ table[min(i - j + 1, 5)]
        assert float(ones[f"{prefix}.hook_bias"][0, 1, i, j]) == pytest.approx(float(expected), abs=1e-9)


def test_bam_reduces_to_alibi_and_to_no_positions() -> None:
    """β = 1, μ = 0 is ALiBi, β = 0 is NoPE, β < 0 prefers the distant; the prior itself cell by cell."""
    bare, alibi, bam = (built(AttentionConfig(4, position=p)) for p in ("none", "alibi", BAMConfig()))
    common = {name: value for name, value in bam.state_dict().items() if ".bias.bam." not in name}
    bare.load_state_dict(common), alibi.load_state_dict(common)
    prior = bam.blocks[0].attn.bias["bam"]
    with torch.no_grad():
        prior.shape.fill_(1), prior.location.fill_(0), prior.scale.copy_(alibi_slopes(4).double().log())
    assert largest(bam(text()) - alibi(text())) < 1e-7  # slopes are float32
    with torch.no_grad():
        prior.shape.fill_(0)
    assert largest(bam(text()) - bare(text())) < EXACT
    with torch.no_grad():
        (
            prior.shape.copy_(torch.tensor([-0.5, 0.7, 1.3, 2.0])),
            prior.location.copy_(torch.tensor([0.0, 0.3, -0.2, -0.8])),
        )
        prior.scale.copy_(torch.tensor([0.1, -0.4, 0.0, -1.0]))
    bias = seen(bam, "bias.bam.hook_bias")["bias.bam.hook_bias"]
    for head, i, j in ((0, 9, 2), (1, 5, 5), (3, 12, 1)):
        off = abs(j - i - 2 * math.sinh(float(prior.location[head]))) + 1e-5
        assert float(bias[0, head, i, j]) == pytest.approx(
            -(off ** float(prior.shape[head])) * math.exp(float(prior.scale[head])), rel=1e-9
        )
    assert float(bias[0, 0, 12, 0]) > float(bias[0, 0, 12, 11])


def test_ssmax_multiplies_rows_by_log_n() -> None:
    plain, scaled = (built(AttentionConfig(4, position=p)) for p in ("none", SSMaxConfig()))
    weights = scaled.blocks[0].attn.rotate["ssmax"].s
    a, b = (seen(m, "hook_attn_scores")["hook_attn_scores"] for m in (plain, scaled))
    for head, i, j in ((0, 0, 0), (1, 4, 2), (3, 12, 12)):
        assert float(b[1, head, i, j]) == pytest.approx(
            float(a[1, head, i, j] * weights[head]) * math.log(i + 1), abs=1e-9
        )


@pytest.mark.parametrize(
    "position", ["rope", "alibi", "sinusoidal", BAMConfig(), CoPEConfig(8), T5BiasConfig(8, 16)], ids=str
)
def test_positions_may_be_given(position: Any) -> None:
    """Counting by hand changes nothing; where only distances matter, shifting changes nothing; spreading changes the output."""
    model = built(AttentionConfig(4, position=position))
    plain, count = model(text()), torch.arange(LENGTH)[None]
    assert largest(model(text(), facts={"positions": count}) - plain) < EXACT
    if position != "sinusoidal":
        assert largest(model(text(), facts={"positions": count + 40}) - plain) < 1e-8
    spread = model(text(), facts={"positions": (count * 1.5).double()})
    if not isinstance(position, CoPEConfig):  # which counts tokens, wherever they are
        assert largest(spread - plain) > 1e-4
    with pytest.raises(
        ValueError, match=r"facts\['positions'\] has shape \(1, 5\); expected \[batch or 1, key\] with key = 13"
    ):
        model(text(), facts={"positions": count[:, :5]})
    with pytest.raises(ValueError, match=r"No layer asked for the fact 'position'. Did you mean 'positions'"):
        model(text(), facts={"position": count})


def test_relative_terms_need_whole_positions() -> None:
    with pytest.raises(ValueError, match="need whole positions"):
        built(SITES["Transformer-XL"])(text(), facts={"positions": torch.arange(LENGTH)[None] * 0.5})


# ---------------------------------------------------------------------------------------------------------- pairs of maps


@pytest.mark.parametrize("pairing", ["adjacent", "halves"])
def test_differential_attention_is_one_map_less_another(pairing: str) -> None:
    """P = P₁ − λP₂ from two ordinary softmax maps, rows sum to 1 − λ, λ by its formula and per layer; λ = 0 leaves P₁."""
    model = built(AttentionConfig(3, position="rope", reweight=DifferentialConfig(pairing)), layers=3)
    assert [b.attn.reweight["differential"].lambda_init for b in model.blocks] == pytest.approx(
        [0.2, 0.8 - 0.6 * math.exp(-0.3), 0.8 - 0.6 * math.exp(-0.6)]
    )
    assert initial_lambda(0) == pytest.approx(0.2)
    site = model.blocks[0].attn
    part, name = site.reweight["differential"], "reweight.differential.hook_lambda"
    got = seen(model, "hook_rot_q", "hook_rot_k", "hook_raw_pattern", "hook_pattern", name)
    expected = math.exp(float(part.lambda_q1 @ part.lambda_k1)) - math.exp(float(part.lambda_q2 @ part.lambda_k2)) + 0.2
    assert largest(got[name] - expected) < EXACT
    causal = torch.full((LENGTH, LENGTH), float("-inf"), dtype=torch.float64).triu(1)
    assert site.d_head == 4 and site.d_value == 8
    maps = [
        (torch.einsum("bqd,bkd->bqk", got["hook_rot_q"][:, :, m], got["hook_rot_k"][:, :, m]) / 2 + causal).softmax(-1)
        for m in range(6)
    ]
    for head in range(3):
        one, two = (2 * head, 2 * head + 1) if pairing == "adjacent" else (head, head + 3)
        assert largest(got["hook_pattern"][:, head] - (maps[one] - expected * maps[two])) < EXACT
    assert largest(got["hook_pattern"].sum(-1) - (1 - expected)) < EXACT
    alone = seen(model, "hook_pattern", hooks=[(f"blocks.0.attn.{name}", lambda x, hook: 0 * x)])["hook_pattern"]
    assert largest(alone[:, 1] - maps[2 if pairing == "adjacent" else 1]) < EXACT
    pattern = model.patterns(text(), layers=0)[0]
    assert pattern.meta.signed and pattern.meta.rows_sum_to == "1-λ"
    with pytest.raises(RefusedByPattern, match="Entropy needs rows that are probability distributions"):
        pattern.entropy()


def test_shared_differential_attention_is_differential_with_merged_weights() -> None:
    """The merged weights in a plain differential model give the same logits, and the four terms sum to the content scores."""
    shared = models.build("shared-diff").double()
    plain = models.build("diff-transformer").double()
    weights = {
        name: value
        for name, value in shared.state_dict().items()
        if ".base." not in name and not name.endswith((".up", ".down"))
    }
    for layer, block in enumerate(shared.blocks):
        for name in ("query", "key"):
            weights[f"blocks.{layer}.attn.{name}.weight"] = getattr(block.attn, name).weight
    plain.load_state_dict(weights)
    assert largest(shared(text()) - plain(text())) < EXACT
    prefix = "blocks.1.attn"
    names = [f"{prefix}.{name}.hook_{part}" for name in ("query", "key") for part in ("base", "low_rank")]
    _, cache = shared.run_with_cache(text(), names=[*names, f"{prefix}.hook_rot_q", f"{prefix}.hook_rot_k"])
    positions = torch.arange(LENGTH)[None]
    split = score_split(shared.blocks[1].attn, cache, prefix, Context(positions, positions, None, None, 0, False))
    q, k = (cache[f"{prefix}.hook_rot_{n}"].transpose(1, 2) for n in "qk")
    assert set(split) == {"base·base", "base·low_rank", "low_rank·base", "low_rank·low_rank"}
    assert largest(sum(split.values()) - q @ k.transpose(-1, -2) * shared.blocks[1].attn.scale) < EXACT
    assert min(largest(term) for term in split.values()) > 1e-6


# ----------------------------------------------------------------------------------------------- relations, n-grams, pairs


def test_relational_heads_split_into_symbols_and_relations() -> None:
    """Σ_j p_ij (W_s s_j + W_r r_ij) by loops; without relations or symbols the other summand remains."""
    model = models.build("dual-attention").double()
    site, prefix = model.blocks[0].attn, "mix.relations"
    value = site.value
    names = ("hook_pattern", "value.hook_symbols", f"{prefix}.hook_relations", f"{prefix}.hook_z_relations", "hook_z")
    _, cache = model.run_with_cache(
        text(), names=[f"blocks.0.attn.{n}" for n in names] + ["blocks.0.ln1.hook_normalized"]
    )
    x = cache["blocks.0.ln1.hook_normalized"][1]
    pattern, symbols, relations, z_relations, z = (cache[f"blocks.0.attn.{n}"][1] for n in names)
    part = site.mix["relations"]
    for i in (0, 6, 12):
        total, mixed = torch.zeros(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
        for j in range(i + 1):
            r = [float(part.query(x[i]).view(3, 5)[n] @ part.key(x[j]).view(3, 5)[n]) / math.sqrt(5) for n in range(3)]
            assert r == pytest.approx(relations[:, i, j].tolist(), abs=1e-9)
            weight = float(pattern[3, i, j])  # the second relational head
            total += weight * sum(r[n] * part.combine[1, n] for n in range(3))
            mixed += weight * (value.weight[18:] @ symbols[j] + value.bias[18:])
        assert largest(z_relations[i, 1] - total) < EXACT
        assert largest(z[i, 3] - mixed) < EXACT
    library = value.library.view(7, 2, 12)
    scores = torch.einsum("hd,shd->hs", value.look_up(x[4]).view(2, 12), value.templates.view(7, 2, 12)) / math.sqrt(12)
    assert largest(symbols[4] - torch.einsum("hs,shd->hd", scores.softmax(-1), library).flatten()) < EXACT


def test_ngram_heads_read_what_followed_the_same_tokens() -> None:
    """The rule, by comparing lists of tokens; rows without a match are zero."""
    tokens = text(2, 21, vocab=3)
    site = AttentionConfig(
        4, position="none", project=ValuesOnlyConfig(), score=NGramConfig((0, 1, 2, 3)), normalise=EmptyRowsConfig()
    )
    model = built(site)
    pattern = model.patterns(tokens)[0].values
    for row in range(2):
        ids = tokens[row].tolist()
        for order in range(4):
            for i in range(21):
                hits = [
                    j
                    for j in range(order, i + 1)
                    if i + 1 >= order and ids[j - order : j] == ids[i - order + 1 : i + 1]
                ]
                expected = torch.zeros(21, dtype=torch.float64)
                expected[hits] = 1 / len(hits) if hits else 0.0
                assert largest(pattern[row, order, i] - expected) < EXACT, (order, i)
    gap = torch.tensor(
        [[True, True, False, True, False, True]]
    )  # a padded text that went on: matching ignores the holes
    ids, positions = torch.tensor([[7, 8, 0, 7, 0, 8]]), (gap.cumsum(1) - 1)
    found = ngram_matches(ids, positions, gap, (1,))[0, 0]
    assert found[5].tolist() == [False, False, False, True, False, False]  # 8 was followed by 7, at storage index 3
    with pytest.raises(ValueError, match="one number from 0 on for each of the 4 heads"):
        built(replace(site, score=NGramConfig((1, 2))))
    with pytest.raises(ValueError, match=r"facts=\{'token_ids': tokens\}"):
        model(model(tokens, stop_at_layer=0), start_at_layer=0)


def test_pair_scores_are_the_network_on_concatenated_pairs() -> None:
    model = built(AttentionConfig(3, position="none", score=PairScoreConfig(6)))
    part = model.blocks[0].attn.score
    got = seen(model, "hook_q", "hook_k", "hook_content_scores", "score.hook_hidden1")
    joint = torch.cat([part.first_query.weight, part.first_key.weight], dim=1)
    for head, i, j in ((0, 4, 2), (2, 12, 0)):
        pair = torch.cat([part.from_query(got["hook_q"][1, i, head]), part.from_key(got["hook_k"][1, j, head])])
        hidden = (joint @ pair + part.first_query.bias).relu()
        assert largest(got["score.hook_hidden1"][1, head, i, j] - hidden) < EXACT
        assert float(got["hook_content_scores"][1, head, i, j]) == pytest.approx(
            float(part.last(part.second(hidden).relu())), abs=1e-9
        )


def test_slices_are_identity_weights() -> None:
    sliced = built(AttentionConfig(4, bias=False, project=SliceConfig(("key", "value"))))
    full = built(AttentionConfig(4, bias=False))
    weights = {
        **sliced.state_dict(),
        **{f"blocks.0.attn.{n}.weight": torch.eye(WIDTH).double() for n in ("key", "value")},
    }
    full.load_state_dict(weights)
    assert largest(sliced(text()) - full(text())) < EXACT
    assert torch.equal(sliced.blocks[0].attn.W_V, full.blocks[0].attn.W_V)
    with pytest.raises(ValueError, match=r"needs heads × width = d_model \(24, got 12\)"):
        built(AttentionConfig(4, 2, bias=False, project=SliceConfig()))


# ------------------------------------------------------------------------------------------------- normalisers and gates


def test_normalisers() -> None:
    """Each on the scores that the site gave it."""
    for config in (SinkConfig(), SinkConfig(learned=False), TopKConfig(3), HardConfig(), ReluConfig()):
        model = built(AttentionConfig(4, position="rope", normalise=config))
        got = seen(model, "hook_attn_scores", "hook_pattern")
        scores, pattern = got["hook_attn_scores"], got["hook_pattern"]
        part = model.blocks[0].attn.normalise
        for head, i in ((0, 0), (2, 7), (3, 12)):
            row = [float(s) for s in scores[1, head, i, : i + 1]]
            if isinstance(config, SinkConfig):
                sink = float(part.logit[head])
                assert (sink != 0) == config.learned
                total = math.exp(sink) + sum(map(math.exp, row))
                expected = [math.exp(s) / total for s in row]
            elif isinstance(config, TopKConfig):
                kept = [s if s >= sorted(row)[-3:][0] else float("-inf") for s in row]
                expected = [math.exp(s) / sum(map(math.exp, kept)) for s in kept]
            elif isinstance(config, HardConfig):
                expected = [float(j == row.index(max(row))) for j in range(len(row))]
            else:
                expected = [max(s, 0) / (i + 1) for s in row]
            assert pattern[1, head, i, : i + 1].tolist() == pytest.approx(expected, abs=1e-9), config
    with pytest.raises(ValueError, match="k is 0; expected at least 1"):
        TopKConfig(0)


def test_gates_and_importance() -> None:
    model = built(AttentionConfig(4, position="rope", reweight=ImportanceConfig(), post=OutputGateConfig()))
    site = model.blocks[0].attn
    names = (
        "hook_raw_pattern",
        "hook_pattern",
        "hook_z",
        "reweight.importance.hook_importance",
        "post.output_gate.hook_gate",
    )
    _, cache = model.run_with_cache(
        text(), names=[f"blocks.0.attn.{n}" for n in names] + ["*.ln1.hook_normalized", "*.hook_attn_out"]
    )
    raw, pattern, z, importance, gate = (cache[f"blocks.0.attn.{n}"] for n in names)
    x = cache["blocks.0.ln1.hook_normalized"]
    weighed = raw * site.reweight["importance"].weigh(x).sigmoid().permute(0, 2, 1)[:, :, None]
    assert largest(pattern - weighed / weighed.sum(-1, keepdim=True)) < EXACT
    assert largest(importance[..., 0] - site.reweight["importance"].weigh(x).sigmoid()) < EXACT
    assert largest(cache["attn_out", 0] - site.output((z * gate).flatten(-2))) < EXACT


# ------------------------------------------------------------------------------------------------------------------ masks


def visible(site: AttentionConfig, length: int = LENGTH, **options: Any) -> Tensor:
    """What each head can read, [head, query, key]."""
    mask = seen(built(site), "hook_mask", tokens=text(1, length), **options)["hook_mask"]
    return mask[0] == 0


def test_masks_are_their_sets() -> None:
    """Every cell against the papers' sets of keys; the diagonal is always there."""
    cells = [(i, j) for i in range(LENGTH) for j in range(LENGTH)]
    near, far = (lambda i, j: 0 <= i - j < 3), (lambda i, j: i >= j and (i - j) % 3 == 0)
    block, ends = (lambda i, j: i >= j and i // 4 == j // 4), (lambda i, j: i >= j and j % 4 >= 2)
    cases = [
        (StridedConfig(3), (near, far)),
        (FixedConfig(4, 2), (block, ends)),
        (StridedConfig(3, split=False), (lambda i, j: near(i, j) or far(i, j),) * 2),
        (FixedConfig(4, 2, split=False), (lambda i, j: block(i, j) or ends(i, j),) * 2),
        (PrefixConfig(5), (lambda i, j: j <= i or (j < 5 and i < 5),) * 2),
        (BlockCausalConfig(4), (lambda i, j: j // 4 <= i // 4,) * 2),
    ]
    for config, rules in cases:
        got = visible(AttentionConfig(4, mask=config))
        for head in range(4):
            for i, j in cells:
                assert bool(got[head, i, j]) == (i == j or rules[head % 2](i, j)), (config, head, i, j)


def test_two_sparse_layers_reach_everything() -> None:
    """Strided attention, either pattern first, reaches the whole past in two steps; merged fixed attention too."""
    for config in (StridedConfig(4, split=False), FixedConfig(4, 1, split=False)):
        one = visible(AttentionConfig(2, mask=config), 24)[0].double()
        assert bool(((one @ one > 0) == torch.ones(24, 24).tril().bool()).all()), config


def test_prefixes_and_documents_of_a_call() -> None:
    """Lengths and ids per sequence; a text may go on behind its prefix, and padding moves nothing."""
    model = built(AttentionConfig(4, position="rope", mask=PrefixConfig()))
    fixed = built(AttentionConfig(4, position="rope", mask=PrefixConfig(6)))
    lengths = torch.tensor([6, 4])
    got = model(text(), facts={"prefix_length": lengths})
    assert largest(got[:1] - fixed(text())[:1]) < EXACT
    assert largest(got[1:] - model(text()[1:], facts={"prefix_length": 4})) < EXACT
    whole = fixed(text())
    first, state = fixed(text()[:, :8], return_state=True)
    assert largest(first - whole[:, :8]) < EXACT
    assert largest(fixed(text()[:, 8:], state=state) - whole[:, 8:]) < EXACT
    _, early = fixed(text()[:, :3], return_state=True)
    with pytest.raises(ValueError, match="The prefix of 6 tokens must be read in one call"):
        fixed(text()[:, 3:], state=early)
    with pytest.raises(ValueError, match=r"Expected facts=\{'prefix_length': n\}"):
        model(text())
    padded, real = (
        torch.cat([torch.zeros(2, 4, dtype=torch.long), text()], 1),
        torch.arange(LENGTH + 4)[None].expand(2, -1) >= 4,
    )
    assert largest(fixed(padded, mask=real)[:, 4:] - whole) < EXACT
    packed = built(AttentionConfig(4, position="rope", mask=DocumentsConfig()))
    ids = torch.tensor([[0] * 5 + [1] * 8])
    logits = packed(text(), facts={"documents": ids})
    assert largest(logits[:, 5:] - packed(text()[:, 5:], facts={"documents": ids[:, 5:]})) < EXACT
    assert largest(logits[:, :5] - packed(text()[:, :5], facts={"documents": ids[:, :5]})) < EXACT


@pytest.mark.parametrize("mask", [PrefixConfig(5), BlockCausalConfig(5)], ids=str)
def test_positions_ahead_are_told_from_the_own(mask: Any) -> None:
    """Where a mask lets tokens read the future, relative terms and T5's buckets know keys ahead from the query itself."""
    for config, name in (
        (RelativeEmbeddingConfig(8), "relative_embedding"),
        (RelativeConfig(), "relative"),
        (T5BiasConfig(8, 16), "t5"),
    ):
        point = f"bias.{name}.hook_bias"
        bias = seen(built(AttentionConfig(4, position=config, mask=mask)), point)[point]
        assert float((bias[:, :, 1, 4] - bias[:, :, 1, 1]).abs().min()) > 1e-4


def test_reading_the_future() -> None:
    """Bidirectional attention: no row depends on the order of the others without positions; padding is not read; no state."""
    model = built(AttentionConfig(4, position="none", causal=False), layers=2)
    order = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(1))
    assert largest(model(text()[:, order]) - model(text())[:, order]) < EXACT
    assert model.patterns(text())[0].meta.causal == "none"
    short, fill = text()[:, :9], torch.zeros(2, 4, dtype=torch.long)
    real = torch.arange(LENGTH)[None].expand(2, -1) < 9
    assert largest(model(torch.cat([short, fill], 1), mask=real)[:, :9] - model(short)) < EXACT
    _, state = model(short, return_state=True)
    with pytest.raises(ValueError, match="cannot be continued from a state: earlier tokens would change"):
        model(fill, state=state)


def test_cross_attention_reads_a_source() -> None:
    """Queries of one sequence, keys and values of another: loops over both; the source's keys are carried, its padding is not read."""
    torch.manual_seed(0)
    site = Attention(AttentionConfig(4, 2), WIDTH, {"use_attn_result": False}).double().requires_grad_(False)
    x, source = torch.randn(2, 5, WIDTH).double(), torch.randn(2, 7, WIDTH).double()
    steps = torch.arange(5)[None]
    real = torch.ones(2, 7, dtype=torch.bool)
    real[1, 4:] = False
    context = Context(steps, steps, None, None, 0, True).of_source(torch.arange(7)[None], real)
    got, carried = site((x, source, source), context, None)
    q = site.query(x).view(2, 5, 4, 6)
    k, v = (linear(source).view(2, 7, 2, 6) for linear in (site.key, site.value))
    for row, keys in ((0, 7), (1, 4)):
        z = torch.zeros(5, 4, 6).double()
        for head in range(4):
            weights = (q[row, :, head] @ k[row, :keys, head // 2].T / math.sqrt(6)).softmax(-1)
            z[:, head] = weights @ v[row, :keys, head // 2]
        assert largest(got[row] - site.output(z.flatten(1))) < EXACT
    later = Context(steps[:, 4:], steps, None, None, 4, True).of_source(torch.arange(7)[None], real)
    again, still = site((x[:, 4:], source, source), later, carried)
    assert largest(again - got[:, 4:]) < EXACT and still["key"] is carried["key"]


# --------------------------------------------------------------------------------------------------------------- mistakes


def test_parts_in_the_wrong_place() -> None:
    cases: list[tuple[Any, Any]] = [
        ({"normalise": T5BiasConfig()}, r"T5BiasConfig is a part of the stage 'bias', not of 'normalise'. .*position=.*SinkConfig"),
        ({"mask": TopKConfig(2)}, r"TopKConfig is a part of the stage 'normalise', not of 'mask'. Expected normalise="),
        ({"position": ("rope", TopKConfig(2))}, r"stage 'normalise', not of 'position'"),
        ({"bias": ("querry",)}, r"bias names 'querry'. Did you mean 'query'"),
        ({"reweight": DifferentialConfig(), "n_heads": 5}, r"d_model \(24\) must be a multiple of n_heads \(5\) × 2 maps"),
    ]  # fmt: skip
    for changes, message in cases:
        with pytest.raises(ValueError, match=message):
            built(AttentionConfig(**{"n_heads": 4, **changes}))
    with pytest.raises(TypeError, match=r"score=3 is no part.* Expected one of .*NGramConfig, PairScoreConfig"):
        built(AttentionConfig(4, score=3))
    with pytest.raises(ValueError, match="Unknown pairing 'pairs'"):
        DifferentialConfig("pairs")
    with pytest.raises(ValueError, match=r"unknown part 't6'. Did you mean 't5'"):
        config_from_json(AttentionConfig, {"n_heads": 4, "position": {"kind": "t6"}})
    with pytest.raises(ValueError, match=r"Unknown rope scaling 'yarm'. Did you mean 'yarn'"):
        RopeConfig(scaling=RopeScaling("yarm"))


# -------------------------------------------------------------------------------------------------------- what is told on


def test_patterns_with_other_columns_say_so() -> None:
    """Probes that need tokens refuse memory slots in words; the tokens' part can be had, no longer as a distribution."""
    meta = PatternMeta(before="memory slot")
    pattern = Pattern(torch.full((1, 2, 3, 5), 0.2), meta, 0, "blocks.0.attn.hook_pattern")
    assert "columns are memory slots, then tokens" in meta.in_words()
    with pytest.raises(
        RefusedByPattern, match=r"Induction needs columns that are tokens; those of this pattern are memory slots, then"
    ):
        meta.require_tokens("Induction")
    tokens = pattern.tokens_only()
    assert tokens.values.shape == (1, 2, 3, 3) and not tokens.meta.is_distribution
    tokens.meta.require_tokens("Induction")
    with pytest.raises(RefusedByPattern, match=r"those of this pattern are slots\. Expected"):
        PatternMeta(columns="slot").require_tokens("Induction")


@pytest.mark.parametrize("name", ["cope", "diff-transformer", "ngram-heads", "bird-eye", "gated-sinks", "bam"])
def test_runs_keep_the_pattern_and_the_special_signals(name: str, tmp_path: Path) -> None:
    """A trace run gives back each layer's pattern; λ, counts, importance and gates are per-token signals of it."""
    model, signals = (
        models.build(name),
        {"cope": "context_count", "diff-transformer": "lambda", "bird-eye": "importance"},
    )
    run = trace_run(model, "abcabcabd abc", RunStore(tmp_path))
    for layer, pattern in model.patterns("abcabcabd abc").items():
        factors = LayerFactors.from_run(run, layer)
        for head in range(pattern.values.shape[1]):
            assert largest(torch.tensor(factors.pattern(head)) - pattern.values[0, head]) < 1e-5
    if name in signals:
        assert [signal["name"] for signal in run.layer(0)["signals"]] == [signals[name]]
    if name == "diff-transformer":
        assert run.array("layer.2.lambda").shape == (3, 13)
        expected = model.run_with_cache("abcabcabd abc", names="blocks.2.attn.reweight.differential.hook_lambda")[1]
        assert run.array("layer.2.lambda")[1, 5] == pytest.approx(
            float(next(iter(expected.values()))[0, 5, 1, 0]), rel=1e-5
        )
