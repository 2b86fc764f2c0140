"""Parts of the attention site against x-transformers, in float64, where it is installed (dependency group `parity`)."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention.cope import CoPEConfig
from models.attention.cross import CrossAttentionConfig, Source
from models.attention.gates import OutputGateConfig
from models.attention.normalisers import HardConfig, SinkConfig, TopKConfig
from models.attention.rotary import QKNormConfig, RopeConfig
from models.attention.site import Attention, AttentionConfig
from models.attention.t5 import t5_bucket
from models.attention.talking_heads import TalkingScoresConfig, TalkingWeightsConfig
from models.attention.transformer_xl import RecentSegmentsConfig, TransformerXLConfig
from models.depth.dense import DenseFormerConfig
from models.parts.positions import alibi_slopes
from tests.models.attention_sites import (
    HEADS,
    LENGTH,
    WIDTH,
    causal_mask,
    context,
    heads_first,
    model,
    out,
    site,
    stream,
    tokens,
)
from tests.models.conftest import Agrees

D_HEAD = WIDTH // HEADS


def x_transformers() -> Any:
    return pytest.importorskip(
        "x_transformers.x_transformers", reason="x-transformers is not installed (dependency group 'parity')"
    )


# -------------------------------------------------------------------------------------------------------- whole layers


def whole(layer: Attention, **options: Any) -> Any:
    """Their attention with our maps; its softmax is told not to go to float32."""
    theirs = x_transformers().Attention(WIDTH, dim_head=D_HEAD, heads=HEADS, causal=True, **options).double()
    theirs.requires_grad_(False)
    for name, own in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out", "output")):
        getattr(theirs, name).weight.copy_(getattr(layer, own).weight)
    theirs.attend.attn_fn = partial(F.softmax, dim=-1)
    return theirs


def plain(**changes: Any) -> AttentionConfig:
    return AttentionConfig(HEADS, **{"position": "none", "bias": False, **changes})


@pytest.mark.parametrize("n_kv", [1, 2])
def test_shared_keys_and_values(n_kv: int, agrees: Agrees) -> None:
    """One or two key/value heads. Their head h reads group h mod n_kv, ours ⌊h·n_kv/n⌋: heads change places."""
    layer, x = site(plain(n_key_value_heads=n_kv)), stream()
    theirs = whole(layer, **({"one_kv_head": True} if n_kv == 1 else {"kv_heads": n_kv}))
    order = torch.arange(HEADS).view(n_kv, -1).T.flatten()  # their head h is our head order[h]
    theirs.to_q.weight.copy_(layer.query.weight.unflatten(0, (HEADS, -1))[order].flatten(0, 1))
    theirs.to_out.weight.copy_(layer.output.weight.unflatten(1, (HEADS, -1))[:, order].flatten(1))
    agrees(out(layer, x), theirs(x))


@pytest.mark.parametrize("window", [1, 4])
def test_windows(window: int, agrees: Agrees) -> None:
    """They say how far back a token may read, we how many tokens."""
    layer, x = site(plain(window=window)), stream()
    agrees(out(layer, x), whole(layer, max_attend_past=window - 1)(x))


def test_soft_caps(agrees: Agrees) -> None:
    layer, x = site(plain(softcap=0.8)), stream()
    agrees(out(layer, x), whole(layer, softclamp_logits=True, logit_softclamp_value=0.8)(x))


def test_gated_outputs(agrees: Agrees) -> None:
    layer, x = site(plain(post=OutputGateConfig())), stream()
    theirs = whole(layer, gate_values=True)
    theirs.to_v_gate.weight.copy_(layer.post["output_gate"].gate.weight)
    agrees(out(layer, x), theirs(x))


def test_talking_heads(agrees: Agrees) -> None:
    """Their projection of scores is added to them, that of weights replaces them; both of ours are added."""
    layer, x = site(plain(position=TalkingScoresConfig(), reweight=TalkingWeightsConfig())), stream()
    attend = (theirs := whole(layer, pre_talking_heads=True, post_talking_heads=True)).attend
    scores, weights = layer.bias["talking_scores"].mix, layer.reweight["talking_weights"].mix
    attend.pre_softmax_talking_heads.weight.copy_(scores[:, :, None, None])
    attend.post_softmax_talking_heads.weight.copy_((weights + torch.eye(HEADS))[:, :, None, None])
    agrees(out(layer, x), theirs(x))


def test_normed_queries_and_keys(agrees: Agrees) -> None:
    """Their norm has no ε, and weights per head that count from 1; all heads are given the same."""
    layer, x = site(plain(qk_norm=QKNormConfig(eps=0.0))), stream()
    theirs = whole(layer, qk_rmsnorm=True)
    theirs.q_rmsnorm.gamma.copy_((layer.qk_norm.query.w - 1).expand(HEADS, 1, -1))
    theirs.k_rmsnorm.gamma.copy_((layer.qk_norm.key.w - 1).expand(HEADS, 1, -1))
    agrees(out(layer, x), theirs(x))


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_rotations(fraction: float, agrees: Agrees) -> None:
    """Pairs of neighbours, of the whole head or of a part."""
    layer, x = site(plain(position=RopeConfig(fraction=fraction, interleaved=True))), stream()
    rotary = x_transformers().RotaryEmbedding(int(D_HEAD * fraction)).double()
    steps = torch.arange(0, int(D_HEAD * fraction), 2).double() / int(D_HEAD * fraction)
    rotary.inv_freq.copy_(10000.0**-steps)
    agrees(out(layer, x), whole(layer)(x, rotary_pos_emb=rotary(torch.arange(LENGTH))))


def test_reading_a_source(agrees: Agrees) -> None:
    layer, x, source = site(CrossAttentionConfig(HEADS, bias=False)), stream(), stream(7, seed=5)
    here = context()
    here.facts = {"source": Source(source)}
    agrees(layer((x, x, x), here, None)[0], whole(layer)(x, context=source, causal=False))


def test_a_memory_of_hidden_states(agrees: Agrees) -> None:
    """Keys and values of [memory ; segment], without positions."""
    layer = site(TransformerXLConfig(HEADS, position="none", bias=False, mask=RecentSegmentsConfig(16, 5)))
    x, memory = stream(), stream(5, seed=2)
    agrees(out(layer, x, {"hidden": memory}, 5), whole(layer)(x, mem=memory))


# ------------------------------------------------------------------------------------------------------ parts by themselves


def test_cope_is_x_transformers(agrees: Agrees) -> None:
    """The bias of CoPE on our queries and scaled, masked scores."""
    theirs = x_transformers().CoPE(dim=8, heads=HEADS, max_pos=6).double()
    layer = site(AttentionConfig(HEADS, position=CoPEConfig(6)))
    theirs.pos_emb.data = layer.bias["cope"].table
    q, k, v = heads_first(layer, stream())
    scores = q @ k.transpose(-1, -2) * layer.scale + causal_mask()
    expected = layer.output((((scores + theirs(q, scores)).softmax(-1) @ v).transpose(1, 2)).flatten(2))
    agrees(out(layer, stream()), expected)


def test_alibi_and_t5_are_x_transformers(agrees: Agrees) -> None:
    """Biases, and buckets, which are the same numbers."""
    module = x_transformers()
    for heads in (4, 6):
        distance = (torch.arange(9)[:, None] - torch.arange(9)).abs()
        agrees(-alibi_slopes(heads)[:, None, None] * distance, module.AlibiPositionalBias(heads, heads)(9, 9))
    relative = torch.arange(50)[None] - torch.arange(50)[:, None]
    for causal in (True, False):
        bucket = module.RelativePositionBias._relative_position_bucket(relative, causal, 8, 20)
        assert torch.equal(bucket, t5_bucket(-relative, 8, 20, causal))


NORMALISERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "top-k": (TopKConfig(3), {"sparse_topk": 3}),
    "hard": (HardConfig(), {"hard": True}),
    "sink": (SinkConfig(), {"head_learned_sink": True}),
    "off by one": (SinkConfig(learned=False), {"add_zero_kv": True}),
}


@pytest.mark.parametrize("name", NORMALISERS)
def test_normalisers_are_x_transformers(name: str, agrees: Agrees) -> None:
    """Top-k, hard attention, learned sinks, a key and value of zeros; gradients too, which hard attention takes from the softmax."""
    x_transformers()
    from x_transformers.attend import Attend

    config, options = NORMALISERS[name]
    layer = site(AttentionConfig(HEADS, position="none", normalise=config))
    # qk_norm: the softmax stays in float64, nothing else
    theirs = Attend(causal=True, heads=HEADS, scale=layer.scale, qk_norm=True, **options).double()
    if name == "sink":
        theirs.head_attn_sink.data = layer.normalise.logit
    x = stream().requires_grad_()
    z, _ = theirs(*heads_first(layer, x))
    expected, got = layer.output(z.transpose(1, 2).flatten(2)), out(layer, x)
    agrees(got, expected)
    ours, reference = (torch.autograd.grad(y.square().sum(), x)[0] for y in (got, expected))
    agrees(ours, reference)


def test_averages_over_depth_are_limes(agrees: Agrees) -> None:
    """DenseFormer's average is DynamicLIMe (Gerasimov et al. 2025) whose weights do not depend on the token and are positive."""
    ours = model(AttentionConfig(HEADS), 3, wiring=DenseFormerConfig())
    weights = {str(layer): torch.linspace(0.2, 1.1, layer + 2).double() for layer in range(3)}
    for name, average in ours.wiring.after.items():
        average.alpha.copy_(weights[name])
    names = ["blocks.0.hook_resid_pre", *(f"blocks.{layer}.hook_resid_post" for layer in range(3))]
    _, cache = ours.run_with_cache(tokens(), names=[*names, "wiring.after.*.hook_average"])
    outputs: list[Tensor] = [cache[name] for name in names]
    for layer in range(3):
        theirs = x_transformers().DynamicLIMe(WIDTH, layer + 2, norm=False, use_softmax=False).double()
        linear = next(part for part in theirs.to_weights if isinstance(part, torch.nn.Linear))
        linear.requires_grad_(False)
        linear.weight.zero_()
        linear.bias.copy_(weights[str(layer)])
        agrees(cache[f"wiring.after.{layer}.hook_average"], theirs(outputs[0], outputs[: layer + 2]))
