"""Parts of the attention site and ways through the blocks against transformers and scipy, in float64. docs/attention-parity.md lists them.

Casts to float32 in transformers' files go to float64 while it runs (`all_double`), so that a comparison is as sharp as the formulas.
"""

import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from models.attention.differential import DifferentialConfig, DifferentialNormConfig
from models.attention.masks import BlockCausalConfig, DocumentsConfig, PrefixConfig
from models.attention.normalisers import SinkConfig
from models.attention.relative import KeyPreferenceConfig, RelativeConfig, RelativeEmbeddingConfig
from models.attention.rotary import QKNormConfig, RopeConfig
from models.attention.site import AttentionConfig
from models.attention.t5 import T5BiasConfig, t5_bucket
from models.attention.transformer_xl import RecentSegmentsConfig, TransformerXLConfig
from models.language_model import LanguageModel, LanguageModelConfig
from models.parts.channel_mixers import MLPConfig
from models.parts.positions import Rotary, sinusoidal
from models.parts.rope_scaling import RopeScaling
from tests.models.attention_sites import (
    HEADS,
    LENGTH,
    VOCABULARY,
    WIDTH,
    causal_mask,
    heads_first,
    largest,
    lively,
    model,
    out,
    site,
    stream,
    tokens,
)
from tests.models.conftest import Agrees
from tests.models.pretrained.reference import all_double


def of_transformers(model_type: str) -> Any:
    """The modelling file of a type, imported when a test needs it."""
    return importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")


SCALINGS: dict[str, tuple[dict[str, Any], RopeScaling]] = {
    "linear": ({"rope_type": "linear", "factor": 3.0}, RopeScaling("linear", 3.0)),
    "dynamic": ({"rope_type": "dynamic", "factor": 3.0}, RopeScaling("dynamic", 3.0, 16)),
    "yarn": (
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 3.0,
            "beta_slow": 0.5,
        },
        RopeScaling("yarn", 4.0, 16, beta_fast=3.0, beta_slow=0.5),
    ),
    "yarn, not rounded": (
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "attention_factor": 1.2,
            "truncate": False,
        },
        RopeScaling("yarn", 4.0, 64, attention_factor=1.2, truncate=False),
    ),
    "llama3": (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        RopeScaling("llama3", 8.0, 64, low_frequency_factor=1.0, high_frequency_factor=4.0),
    ),
    "longrope": (
        {
            "rope_type": "longrope",
            "factor": 4.0,
            "short_factor": [1.0 + 0.1 * k for k in range(8)],
            "long_factor": [2.0 + 0.5 * k for k in range(8)],
            "original_max_position_embeddings": 16,
        },
        RopeScaling(
            "longrope",
            4.0,
            16,
            short_factors=tuple(1.0 + 0.1 * k for k in range(8)),
            long_factors=tuple(2.0 + 0.5 * k for k in range(8)),
        ),
    ),
}


@pytest.mark.parametrize("length", [12, 40])
@pytest.mark.parametrize("name", SCALINGS)
def test_rope_scalings(name: str, length: int, agrees: Agrees) -> None:
    """Frequencies and amplitude of transformers' functions, below and beyond the original context."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters, ours = SCALINGS[name]
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=16 if name in ("linear", "dynamic") else 64,
        rope_parameters={"rope_theta": 500.0, **parameters},
    )
    if name == "longrope":
        config.original_max_position_embeddings = 16
    with all_double("LlamaForCausalLM"):
        expected, amplitude = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"), seq_len=length)
    rotary = Rotary(16, base=500.0, scaling=ours)
    cosine, sine = rotary.angles(torch.arange(length)[None], torch.float64, length)
    angles = torch.arange(length)[:, None].double() * expected.double()
    agrees(cosine[0, :, 0], angles.cos() * amplitude)
    agrees(sine[0, :, 0], angles.sin() * amplitude)


def test_sinusoids(agrees: Agrees) -> None:
    """DistilBERT's embedding of positions, which is written in float32."""
    theirs = torch.zeros(50, 24)
    of_transformers("distilbert").create_sinusoidal_embeddings(50, 24, theirs)
    agrees(sinusoidal(torch.arange(50).double(), 24), theirs.double())


@pytest.mark.parametrize("causal", [True, False])
def test_t5_bias(causal: bool, agrees: Agrees) -> None:
    """The bias table of transformers' T5, decoder (causal) and encoder, and a layer with it."""
    from transformers import T5Config

    config = T5Config(
        d_model=WIDTH,
        d_kv=8,
        num_heads=HEADS,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
        is_decoder=causal,
    )
    theirs = of_transformers("t5").T5Attention(config, has_relative_attention_bias=True, layer_idx=0).double().eval()
    torch.nn.init.normal_(theirs.relative_attention_bias.weight)
    distance = torch.arange(40)[:, None] - torch.arange(40)
    ours = theirs.relative_attention_bias.weight[t5_bucket(distance, 8, 20, causal)].permute(2, 0, 1)
    assert largest(ours - theirs.compute_bias(40, 40)[0]) == 0
    layer = site(AttentionConfig(HEADS, position=T5BiasConfig(8, 20), bias=False, scale=1.0, causal=causal))
    theirs.relative_attention_bias.weight.data = layer.bias["t5"].table  # type: ignore[assignment]
    for name, own in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "output")):
        getattr(theirs, name).weight.data = getattr(layer, own).weight
    x = stream()
    agrees(out(layer, x), theirs(x, mask=causal_mask() if causal else None, past_key_values=None)[0])


@pytest.mark.parametrize("heads", [4, 6], ids=["a power of two", "six heads"])
def test_alibi_is_mpts(heads: int, agrees: Agrees) -> None:
    """MPT counts distances from the end of the text, which moves each row by a constant."""
    from transformers import MptConfig

    config = MptConfig(d_model=6 * heads, n_heads=heads, max_seq_len=16)
    theirs = of_transformers("mpt").MptAttention(config).double().requires_grad_(False)
    layer, x = site(AttentionConfig(heads, position="alibi", bias=False), width=6 * heads), stream(width=6 * heads)
    theirs.Wqkv.weight.copy_(torch.cat([layer.query.weight, layer.key.weight, layer.value.weight]))
    theirs.out_proj.weight.copy_(layer.output.weight)
    slopes = of_transformers("mpt").build_mpt_alibi_tensor(heads, 16)
    with all_double("MptForCausalLM"):
        expected = theirs(x, slopes.double(), attention_mask=causal_mask() < 0)[0]
    agrees(out(layer, x), expected)


@pytest.mark.parametrize("before", [0, 5], ids=["one segment", "with a memory"])
def test_transformer_xl_is_xlnets(before: int, agrees: Agrees) -> None:
    """XLNet's relative attention, by a shift; ours by a gather. Its sinusoids stand [sines, cosines], ours in turns."""
    from transformers import XLNetConfig

    theirs = of_transformers("xlnet").XLNetRelativeAttention(XLNetConfig(d_model=WIDTH, n_head=HEADS)).double().eval()
    theirs.requires_grad_(False)
    position = (KeyPreferenceConfig(), RelativeConfig())
    if before:
        config = TransformerXLConfig(HEADS, position=position, bias=False, mask=RecentSegmentsConfig(16, before))
    else:
        config = AttentionConfig(HEADS, position=position, bias=False)  # type: ignore[assignment]
    layer = site(config)
    for name, own in (("q", "query"), ("k", "key"), ("v", "value")):
        getattr(theirs, name).copy_(getattr(layer, own).weight.view(HEADS, 8, WIDTH).permute(2, 0, 1))
    theirs.o.copy_(layer.output.weight.view(WIDTH, HEADS, 8))
    relative = layer.bias["relative"].project.weight.view(HEADS, 8, WIDTH)
    theirs.r.copy_(torch.cat([relative[..., 0::2], relative[..., 1::2]], dim=-1).permute(2, 0, 1))
    theirs.r_w_bias.copy_(layer.bias["key_preference"].u)
    theirs.r_r_bias.copy_(layer.bias["relative"].v)
    theirs.layer_norm = torch.nn.Identity()
    x, memory, every = stream(), stream(before, seed=2), before + LENGTH
    frequency = 10000.0 ** (-torch.arange(0, WIDTH, 2, dtype=torch.float64) / WIDTH)
    waves = of_transformers("xlnet").XLNetModel.positional_embedding(
        torch.arange(every, -LENGTH, -1).double(), frequency, 2
    )
    hidden = torch.arange(every) > torch.arange(before, every)[:, None]
    mask = hidden[:, :, None, None].double().expand(-1, -1, 2, HEADS)
    h = x.transpose(0, 1)
    expected = theirs(h, None, mask, None, waves, None, mems=memory.transpose(0, 1) if before else None)[0] - h
    agrees(out(layer, x, {"hidden": memory} if before else None, before), expected.transpose(0, 1))


def test_relative_embeddings_are_wav2vecs(agrees: Agrees) -> None:
    """Wav2Vec2-BERT's relative keys, in both directions. Its heads share the vectors, ours are given the same."""
    from transformers import Wav2Vec2BertConfig

    config = Wav2Vec2BertConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        position_embeddings_type="relative_key",
        left_max_position_embeddings=6,
        right_max_position_embeddings=6,
        attn_implementation="eager",
    )
    theirs = of_transformers("wav2vec2_bert").Wav2Vec2BertSelfAttention(config).double().requires_grad_(False).eval()
    layer = site(AttentionConfig(HEADS, position=RelativeEmbeddingConfig(7), causal=False))
    table = layer.bias["relative_embedding"].table
    table.copy_(table[:1].expand_as(table))  # type: ignore[operator]
    theirs.distance_embedding.weight.copy_(table[0].flip(0))  # type: ignore[index]  # theirs counts from query to key
    for name, own in (("linear_q", "query"), ("linear_k", "key"), ("linear_v", "value"), ("linear_out", "output")):
        getattr(theirs, name).weight.copy_(getattr(layer, own).weight)
        getattr(theirs, name).bias.copy_(getattr(layer, own).bias)
    x = stream()
    agrees(out(layer, x), theirs(x)[0])


def test_differential_attention_is_diffllamas(agrees: Agrees) -> None:
    """Maps (h, h + H), norm without weights, values of two heads joined."""
    from transformers import DiffLlamaConfig

    file = of_transformers("diffllama")
    config = DiffLlamaConfig(
        hidden_size=WIDTH, num_attention_heads=2 * HEADS, num_key_value_heads=2 * HEADS, attn_implementation="eager"
    )
    theirs = file.DiffLlamaAttention(config, layer_idx=2).double().requires_grad_(False)
    layer = site(
        AttentionConfig(
            HEADS,
            position="rope",
            bias=False,
            reweight=DifferentialConfig("halves"),
            post=DifferentialNormConfig(eps=config.rms_norm_eps, affine=False),
        ),
        layer=2,
    )
    theirs.q_proj.weight.copy_(layer.query.weight)
    theirs.k_proj.weight.copy_(layer.key.weight)
    theirs.o_proj.weight.copy_(layer.output.weight)
    values = layer.value.weight.view(HEADS, 2, layer.d_head, WIDTH)  # our head h holds their heads h and h + H
    theirs.v_proj.weight.copy_(values.transpose(0, 1).reshape(-1, WIDTH))
    part = layer.reweight["differential"]
    for name in ("q1", "k1", "q2", "k2"):
        getattr(theirs, f"lambda_{name}").copy_(getattr(part, f"lambda_{name}"))
    x = stream()
    with all_double("DiffLlamaForCausalLM"):
        angles = file.DiffLlamaRotaryEmbedding(config)(x, torch.arange(LENGTH)[None])
        expected = theirs(x, position_embeddings=angles, attention_mask=causal_mask())[0]
    agrees(out(layer, x), expected)


def test_normed_queries_and_keys_are_qwens(agrees: Agrees) -> None:
    """RMS norm per head before rotation, grouped heads."""
    from transformers import Qwen3Config

    file = of_transformers("qwen3")
    config = Qwen3Config(
        hidden_size=WIDTH, num_attention_heads=HEADS, num_key_value_heads=2, head_dim=6, attn_implementation="eager"
    )
    theirs = file.Qwen3Attention(config, layer_idx=0).double().requires_grad_(False)
    base = config.rope_parameters["rope_theta"]
    layer = site(
        AttentionConfig(HEADS, 2, 6, RopeConfig(base), bias=False, qk_norm=QKNormConfig(eps=config.rms_norm_eps))
    )
    for name, own in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("o_proj", "output")):
        getattr(theirs, name).weight.copy_(getattr(layer, own).weight)
    theirs.q_norm.weight.copy_(layer.qk_norm.query.w)
    theirs.k_norm.weight.copy_(layer.qk_norm.key.w)
    x = stream()
    with all_double("Qwen3ForCausalLM"):
        angles = file.Qwen3RotaryEmbedding(config)(x, torch.arange(LENGTH)[None])
        expected = theirs(x, position_embeddings=angles, attention_mask=causal_mask())[0]
    agrees(out(layer, x), expected)


@pytest.mark.parametrize("kind", ["Gemma2", "GptOss"])
def test_soft_caps_and_sinks_are_gemmas_and_gpt_osss(kind: str, agrees: Agrees) -> None:
    """The eager attention functions of transformers on our projections."""
    capped = kind == "Gemma2"
    part: dict[str, Any] = {"softcap": 0.7} if capped else {"normalise": SinkConfig()}
    layer = site(AttentionConfig(HEADS, position="none", **part))
    module = torch.nn.Module()
    module.num_key_value_groups = 1  # type: ignore[assignment]
    if not capped:
        module.sinks = layer.normalise.logit
    x, options = stream(), {"softcap": 0.7} if capped else {}
    with all_double(f"{kind}ForCausalLM"):
        attend = of_transformers("gemma2" if capped else "gpt_oss").eager_attention_forward
        z, _ = attend(module, *heads_first(layer, x), causal_mask(), scaling=layer.scale, dropout=0.0, **options)
    agrees(out(layer, x), layer.output(z.flatten(2)))


def mask_functions() -> dict[str, tuple[AttentionConfig, dict[str, Any], Callable[..., Any]]]:
    """Ours, the facts of the call, and transformers' function of (sequence, head, query, key)."""
    from transformers import masking_utils as theirs

    documents = torch.tensor([[0] * 4 + [1] * 5 + [2] * 2]).expand(2, -1)
    prefix = torch.tensor([[0] * 6 + [-1] * 5, [0] * 3 + [-1] * 8])  # -1: outside of any block
    blocks = (torch.arange(LENGTH) // 4).expand(2, -1)

    def or_causal(block_ids: Tensor) -> Callable[..., Any]:
        return theirs.or_masks(theirs.causal_mask_function, theirs.blockwise_overlay(block_ids))

    packed = theirs.and_masks(theirs.packed_sequence_mask_function(documents), theirs.causal_mask_function)
    none = torch.zeros(2, dtype=torch.long)
    return {
        "window": (AttentionConfig(HEADS, window=4), {}, theirs.sliding_window_causal_mask_function(4)),
        "window, both ways": (
            AttentionConfig(HEADS, window=4, causal=False),
            {},
            theirs.sliding_window_bidirectional_mask_function(3),  # how far, where ours says how many
        ),
        "segments": (
            AttentionConfig(HEADS, mask=RecentSegmentsConfig(4, 0)),
            {},
            theirs.chunked_causal_mask_function(4, none),
        ),
        "documents": (AttentionConfig(HEADS, mask=DocumentsConfig()), {"documents": documents}, packed),
        "prefix": (
            AttentionConfig(HEADS, mask=PrefixConfig()),
            {"prefix_length": torch.tensor([6, 3])},
            or_causal(prefix),
        ),
        "blocks": (AttentionConfig(HEADS, mask=BlockCausalConfig(4)), {}, or_causal(blocks)),
    }


@pytest.mark.parametrize("name", ["window", "window, both ways", "segments", "documents", "prefix", "blocks"])
def test_masks_are_transformers(name: str, agrees: Agrees) -> None:
    """Sliding windows (Mistral), chunks (Llama 4), packed texts, and blocks read in both directions (Gemma 3's images)."""
    config, facts, theirs = mask_functions()[name]
    point = "blocks.0.attn.hook_mask"
    mask = model(config).run_with_cache(tokens(), names=point, facts=facts)[1][point]
    row, query, key = torch.meshgrid(torch.arange(2), torch.arange(LENGTH), torch.arange(LENGTH), indexing="ij")
    expected = theirs(row, 0, query, key)[:, None].expand(-1, HEADS, -1, -1)
    agrees((mask == 0).double(), expected.double())


def test_repeated_blocks_are_alberts(agrees: Agrees) -> None:
    """A group of two blocks, three times through, norms behind the sums, read in both directions."""
    from transformers import AlbertConfig

    config = AlbertConfig(
        embedding_size=24,
        hidden_size=24,
        num_attention_heads=4,
        intermediate_size=40,
        num_hidden_layers=3,
        inner_group_num=2,
        attn_implementation="eager",
    )
    theirs = lively(of_transformers("albert").AlbertTransformer(config)).eval()
    theirs.embedding_hidden_mapping_in = torch.nn.Identity()
    attention = AttentionConfig(4, position="none", causal=False)
    settings: dict[str, Any] = {"norm_placement": "after", "norm_eps": config.layer_norm_eps, "loops": 3}
    ours = lively(LanguageModel(LanguageModelConfig(2, 24, VOCABULARY, mixer=attention, mlp=MLPConfig(40), **settings)))
    for block, source in zip(ours.blocks, theirs.albert_layer_groups[0].albert_layers, strict=True):
        for own, other in (
            (block.attn.query, source.attention.query),
            (block.attn.key, source.attention.key),
            (block.attn.value, source.attention.value),
            (block.attn.output, source.attention.dense),
            (block.mlp.inward, source.ffn),
            (block.mlp.outward, source.ffn_output),
        ):
            own.load_state_dict(other.state_dict())
        for norm, other in ((block.ln1, source.attention.LayerNorm), (block.ln2, source.full_layer_layer_norm)):
            norm.w.copy_(other.weight)
            norm.b.copy_(other.bias)
    logits, cache = ours.run_with_cache(tokens(), names="hook_embed")
    agrees(logits, ours.unembed_residual(theirs(cache["hook_embed"]).last_hidden_state))


def test_priors_over_distances_are_scipys(agrees: Agrees) -> None:
    """BAM's bias is the logarithm of scipy's generalised normal density, up to a constant of each row."""
    from scipy.stats import gennorm

    from models.attention.bam import BAMConfig

    ours = model(AttentionConfig(HEADS, position=BAMConfig(epsilon=0.0)))
    prior = ours.blocks[0].attn.bias["bam"]
    prior.shape.copy_(torch.tensor([0.5, 0.9, 1.5, 2.0]))
    prior.location.copy_(torch.tensor([0.3, -0.2, 0.1, -0.7]))
    point = "blocks.0.attn.bias.bam.hook_bias"
    bias = ours.run_with_cache(tokens(), names=point)[1][point]
    offset = torch.arange(LENGTH) - torch.arange(LENGTH)[:, None]
    for head in range(HEADS):
        beta, mean = float(prior.shape[head]), 2 * math.sinh(float(prior.location[head]))
        alpha = math.exp(-float(prior.scale[head]) / beta)
        density = torch.tensor(gennorm.logpdf(offset.numpy(), beta, loc=mean, scale=alpha))
        agrees(bias[0, head] - bias[0, head, :, :1], density - density[:, :1])
