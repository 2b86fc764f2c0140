"""Parts of the attention site against other libraries: transformers, and x-transformers where it is installed (group `parity`)."""

from typing import Any

import pytest
import torch
from torch import Tensor

from models.attention.cope import CoPEConfig
from models.attention.differential import DifferentialConfig, DifferentialNormConfig
from models.attention.normalisers import HardConfig, SinkConfig, TopKConfig
from models.attention.rotary import QKNormConfig, RopeConfig
from models.attention.site import Attention, AttentionConfig
from models.attention.t5 import T5BiasConfig, t5_bucket
from models.context import Context
from models.parts.positions import Rotary, alibi_slopes
from models.parts.rope_scaling import RopeScaling

WIDTH, HEADS, LENGTH = 32, 4, 11


def largest(x: Tensor) -> float:
    return float(x.detach().abs().max())


def site(config: AttentionConfig, layer: int = 0) -> Attention:
    made = Attention(config, WIDTH, {"use_attn_result": False}).double().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4)
    made.placed(layer, [])
    return made


def context(length: int = LENGTH) -> Context:
    positions = torch.arange(length)[None]
    return Context(positions, positions, None, None, 0, False)


def stream() -> Tensor:
    return torch.randn(2, LENGTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def causal_mask() -> Tensor:
    return torch.full((LENGTH, LENGTH), float("-inf"), dtype=torch.float64).triu(1)[None, None]


# ----------------------------------------------------------------------------------------------------------- transformers

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
def test_rope_scalings(name: str, length: int) -> None:
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
    expected, amplitude = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"), seq_len=length)
    rotary = Rotary(16, base=500.0, scaling=ours)
    cosine, sine = rotary.angles(torch.arange(length)[None], torch.float64, length)
    angles = torch.arange(length)[:, None].double() * expected.double()
    assert largest(cosine[0, :, 0] - angles.cos() * amplitude) < 2e-5
    assert largest(sine[0, :, 0] - angles.sin() * amplitude) < 2e-5
    assert largest(torch.atan2(sine, cosine)[0, 1, 0] - expected) < 1e-6


@pytest.mark.parametrize("causal", [True, False])
def test_t5_bias(causal: bool) -> None:
    """The bias table of transformers' T5, decoder (causal) and encoder."""
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    config = T5Config(
        d_model=WIDTH,
        d_kv=8,
        num_heads=HEADS,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
        is_decoder=causal,
    )
    theirs = T5Attention(config, has_relative_attention_bias=True, layer_idx=0).double().eval()
    torch.nn.init.normal_(theirs.relative_attention_bias.weight)
    distance = torch.arange(40)[:, None] - torch.arange(40)
    ours = theirs.relative_attention_bias.weight[t5_bucket(distance, 8, 20, causal)].permute(2, 0, 1)
    assert largest(ours - theirs.compute_bias(40, 40)[0]) == 0
    layer = site(AttentionConfig(HEADS, position=T5BiasConfig(8, 20), bias=False, scale=1.0, causal=causal))
    theirs.relative_attention_bias.weight.data = layer.bias["t5"].table  # type: ignore[assignment]
    for name, own in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "output")):
        getattr(theirs, name).weight.data = getattr(layer, own).weight
    x = stream()
    expected = theirs(x, mask=causal_mask() if causal else None, past_key_values=None)[0]
    assert largest(layer((x, x, x), context(), None)[0] - expected) < 1e-10


def test_differential_attention_is_diffllamas() -> None:
    """Maps (h, h + H), norm without weights, values of two heads joined. transformers casts its softmax to float32."""
    from transformers import DiffLlamaConfig
    from transformers.models.diffllama.modeling_diffllama import DiffLlamaAttention, DiffLlamaRotaryEmbedding

    config = DiffLlamaConfig(
        hidden_size=WIDTH, num_attention_heads=2 * HEADS, num_key_value_heads=2 * HEADS, attn_implementation="eager"
    )
    theirs = DiffLlamaAttention(config, layer_idx=2).double().requires_grad_(False)
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
    width = layer.d_head
    theirs.q_proj.weight.copy_(layer.query.weight)
    theirs.k_proj.weight.copy_(layer.key.weight)
    theirs.o_proj.weight.copy_(layer.output.weight)
    values = layer.value.weight.view(HEADS, 2, width, WIDTH)  # our head h holds their heads h and h + H
    theirs.v_proj.weight.copy_(values.transpose(0, 1).reshape(-1, WIDTH))
    part = layer.reweight["differential"]
    for name in ("q1", "k1", "q2", "k2"):
        getattr(theirs, f"lambda_{name}").copy_(getattr(part, f"lambda_{name}"))
    x = stream()
    angles = DiffLlamaRotaryEmbedding(config)(x, torch.arange(LENGTH)[None])
    expected = theirs(x, position_embeddings=angles, attention_mask=causal_mask())[0]
    assert largest(layer((x, x, x), context(), None)[0] - expected) < 1e-5 * largest(expected)


def test_normed_queries_and_keys_are_qwens() -> None:
    """RMS norm per head before rotation, grouped heads."""
    from transformers import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RotaryEmbedding

    config = Qwen3Config(
        hidden_size=WIDTH, num_attention_heads=HEADS, num_key_value_heads=2, head_dim=6, attn_implementation="eager"
    )
    theirs = Qwen3Attention(config, layer_idx=0).double().requires_grad_(False)
    base = config.rope_parameters["rope_theta"]
    layer = site(
        AttentionConfig(HEADS, 2, 6, RopeConfig(base), bias=False, qk_norm=QKNormConfig(eps=config.rms_norm_eps))
    )
    for name, own in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("o_proj", "output")):
        getattr(theirs, name).weight.copy_(getattr(layer, own).weight)
    theirs.q_norm.weight.copy_(layer.qk_norm.query.w)
    theirs.k_norm.weight.copy_(layer.qk_norm.key.w)
    x = stream()
    angles = Qwen3RotaryEmbedding(config)(x, torch.arange(LENGTH)[None])
    expected = theirs(x, position_embeddings=angles, attention_mask=causal_mask())[0]
    assert largest(layer((x, x, x), context(), None)[0] - expected) < 1e-5 * largest(expected)


def heads_first_projections(layer: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(
        getattr(layer, n)(x).view(2, LENGTH, -1, layer.d_head).transpose(1, 2) for n in ("query", "key", "value")
    )  # type: ignore[return-value]


def test_soft_caps_and_sinks_are_gemmas_and_gpt_osss() -> None:
    """The eager attention functions of transformers on our projections."""
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as capped
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as sinking

    x = stream()
    for function, config in (
        (capped, AttentionConfig(HEADS, position="none", softcap=0.7)),
        (sinking, AttentionConfig(HEADS, position="none", normalise=SinkConfig())),
    ):
        layer = site(config)
        module = torch.nn.Module()
        module.num_key_value_groups = 1  # type: ignore[assignment]
        options: dict[str, Any] = {"softcap": 0.7} if function is capped else {}
        if function is sinking:
            module.sinks = layer.normalise.logit
        z, _ = function(
            module, *heads_first_projections(layer, x), causal_mask(), scaling=layer.scale, dropout=0.0, **options
        )
        expected = layer.output(z.flatten(2))
        assert largest(layer((x, x, x), context(), None)[0] - expected) < 1e-5 * largest(expected)


# --------------------------------------------------------------------------------------------------------- x-transformers


def x_transformers() -> Any:
    return pytest.importorskip(
        "x_transformers.x_transformers", reason="x-transformers is not installed (dependency group 'parity')"
    )


def test_cope_is_x_transformers() -> None:
    """The bias of CoPE on our queries and scaled, masked scores."""
    theirs = x_transformers().CoPE(dim=8, heads=HEADS, max_pos=6).double()
    layer = site(AttentionConfig(HEADS, position=CoPEConfig(6)))
    theirs.pos_emb.data = layer.bias["cope"].table
    q, k, v = heads_first_projections(layer, stream())
    scores = q @ k.transpose(-1, -2) * layer.scale + causal_mask()
    expected = layer.output((((scores + theirs(q, scores)).softmax(-1) @ v).transpose(1, 2)).flatten(2))
    assert largest(layer((stream(),) * 3, context(), None)[0] - expected) < 1e-12


def test_alibi_and_t5_are_x_transformers() -> None:
    module = x_transformers()
    for heads in (4, 6):
        theirs = module.AlibiPositionalBias(heads, heads)(9, 9)
        distance = (torch.arange(9)[:, None] - torch.arange(9)).abs()
        assert largest(theirs + alibi_slopes(heads)[:, None, None] * distance) < 1e-6
    relative = torch.arange(50)[None] - torch.arange(50)[:, None]
    for causal in (True, False):
        bucket = module.RelativePositionBias._relative_position_bucket(relative, causal, 8, 20)
        assert torch.equal(bucket, t5_bucket(-relative, 8, 20, causal))


def test_normalisers_are_x_transformers() -> None:
    """Top-k, hard attention (its forward value) and learned sinks."""
    x_transformers()
    from x_transformers.attend import Attend

    x = stream()
    for config, options in (
        (TopKConfig(3), {"sparse_topk": 3}),
        (HardConfig(), {"hard": True}),
        (SinkConfig(), {"head_learned_sink": True}),
    ):
        layer = site(AttentionConfig(HEADS, position="none", normalise=config))
        theirs = Attend(causal=True, heads=HEADS, scale=layer.scale, **options).double()
        if isinstance(config, SinkConfig):
            theirs.head_attn_sink.data = layer.normalise.logit
        z, _ = theirs(*heads_first_projections(layer, x))
        expected = layer.output(z.transpose(1, 2).flatten(2))
        assert largest(layer((x, x, x), context(), None)[0] - expected) < 1e-6 * largest(expected), config
