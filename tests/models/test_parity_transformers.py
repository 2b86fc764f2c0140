"""Our models with Hugging Face's weights: the same logits, residual streams, attention patterns and states, with and without padding.

Both sides run in float64. Hugging Face's code casts to float32 at some places (norms, softmax, rotations, scans); in these tests the
casts go to float64 instead, so that the comparison is as sharp as the formulas.
"""

from typing import Any

import pytest
import torch

from models.attention.site import AttentionConfig
from models.decoder import Decoder
from models.language_model import LanguageModel, LanguageModelConfig
from models.parts.channel_mixers import MLPConfig
from models.recurrent.mamba2 import Mamba2Config
from tests.models.pretrained.reference import HEADS, LAYERS, VOCABULARY, WIDTH, all_double, batch, largest, lively

EXACT = 1e-10
MODELS = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}


def copy_linear(ours: Any, theirs: Any, transpose: bool = False) -> None:
    """Weight and bias of a linear map; GPT-2's Conv1D keeps its weight transposed."""
    ours.weight.data.copy_(theirs.weight.T if transpose else theirs.weight)
    if ours.bias is not None:
        ours.bias.data.copy_(theirs.bias)


# ------------------------------------------------------------------------------------------------------- pairs


@pytest.fixture(scope="module")
def gpt2() -> tuple[Decoder, Any]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, attn_implementation="eager"
    )
    theirs = lively(GPT2LMHeadModel(config))
    ours = LanguageModel(
        LanguageModelConfig(
            LAYERS, WIDTH, VOCABULARY, 16, AttentionConfig(HEADS), MLPConfig(4 * WIDTH), tie_embeddings=True
        )
    ).double()
    ours.embed.W_E.data.copy_(theirs.transformer.wte.weight)
    ours.pos_embed.W_pos.data.copy_(theirs.transformer.wpe.weight)
    for block, other in zip(ours.blocks, theirs.transformer.h, strict=True):
        weight, bias = other.attn.c_attn.weight, other.attn.c_attn.bias
        for part, linear in enumerate((block.attn.query, block.attn.key, block.attn.value)):
            linear.weight.data.copy_(weight[:, part * WIDTH : (part + 1) * WIDTH].T)
            linear.bias.data.copy_(bias[part * WIDTH : (part + 1) * WIDTH])
        copy_linear(block.attn.output, other.attn.c_proj, transpose=True)
        copy_linear(block.mlp.inward, other.mlp.c_fc, transpose=True)
        copy_linear(block.mlp.outward, other.mlp.c_proj, transpose=True)
        for norm, source in ((block.ln1, other.ln_1), (block.ln2, other.ln_2)):
            norm.w.data.copy_(source.weight)
            norm.b.data.copy_(source.bias)
    ours.ln_final.w.data.copy_(theirs.transformer.ln_f.weight)
    ours.ln_final.b.data.copy_(theirs.transformer.ln_f.bias)
    return ours.eval(), theirs


@pytest.fixture(scope="module")
def llama() -> tuple[Decoder, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    theirs = lively(LlamaForCausalLM(config))
    head = WIDTH // HEADS  # the wave lengths are a buffer that was computed in float32; here they are exact
    theirs.model.rotary_emb.inv_freq = 10000.0 ** (-torch.arange(0, head, 2, dtype=torch.float64) / head)
    attention = AttentionConfig(HEADS, 2, position="rope", bias=False)
    ours = LanguageModel(
        LanguageModelConfig(
            LAYERS, WIDTH, VOCABULARY, None, attention, MLPConfig(48, "silu", gated=True, bias=False), norm="rms"
        )
    ).double()
    ours.embed.W_E.data.copy_(theirs.model.embed_tokens.weight)
    ours.unembed.weight.data.copy_(theirs.lm_head.weight)
    ours.ln_final.w.data.copy_(theirs.model.norm.weight)
    for block, other in zip(ours.blocks, theirs.model.layers, strict=True):
        site, source = block.attn, other.self_attn
        for linear, matrix in (
            (site.query, source.q_proj),
            (site.key, source.k_proj),
            (site.value, source.v_proj),
            (site.output, source.o_proj),
            (block.mlp.gate, other.mlp.gate_proj),
            (block.mlp.inward, other.mlp.up_proj),
            (block.mlp.outward, other.mlp.down_proj),
        ):
            copy_linear(linear, matrix)
        block.ln1.w.data.copy_(other.input_layernorm.weight)
        block.ln2.w.data.copy_(other.post_attention_layernorm.weight)
    return ours.eval(), theirs


def mamba2(n_groups: int) -> tuple[Decoder, Any]:
    from transformers import Mamba2Config as TheirConfig
    from transformers import Mamba2ForCausalLM

    config = TheirConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        state_size=6,
        num_hidden_layers=LAYERS,
        num_heads=8,
        head_dim=8,
        expand=2,
        n_groups=n_groups,
        conv_kernel=4,
        chunk_size=4,
        layer_norm_epsilon=1e-5,
        tie_word_embeddings=True,
        use_bias=False,
        use_conv_bias=True,
        residual_in_fp32=False,
    )
    theirs = lively(Mamba2ForCausalLM(config))
    mixer = Mamba2Config(d_state=6, d_head=8, n_groups=n_groups, norm_eps=1e-5)
    ours = LanguageModel(
        LanguageModelConfig(LAYERS, WIDTH, VOCABULARY, None, mixer, None, norm="rms", tie_embeddings=True)
    ).double()
    ours.embed.W_E.data.copy_(theirs.backbone.embeddings.weight)
    ours.ln_final.w.data.copy_(theirs.backbone.norm_f.weight)
    for block, other in zip(ours.blocks, theirs.backbone.layers, strict=True):
        block.ln1.w.data.copy_(other.norm.weight)
        own, source = block.mixer, other.mixer
        copy_linear(own.input, source.in_proj)
        copy_linear(own.output, source.out_proj)
        own.conv.data.copy_(source.conv1d.weight[:, 0])
        own.conv_bias.data.copy_(source.conv1d.bias)
        for name in ("A_log", "D", "dt_bias"):
            getattr(own, name).data.copy_(getattr(source, name))
        own.norm_weight.data.copy_(source.norm.weight)
    return ours.eval(), theirs


# ---------------------------------------------------------------------------------------------------- comparisons


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_logits_streams_and_patterns(name: str, padded: bool, request: pytest.FixtureRequest) -> None:
    ours, theirs = request.getfixturevalue(name)
    tokens, mask, positions = batch("left")
    padding = {"attention_mask": mask.long(), "position_ids": positions} if padded else {}
    with torch.no_grad(), all_double(MODELS[name]):
        expected = theirs(tokens, output_hidden_states=True, output_attentions=True, **padding)
        logits, cache = ours.run_with_cache(tokens, mask=mask if padded else None)
        unwatched = ours(tokens, mask=mask if padded else None)
    real = mask if padded else torch.ones_like(mask)
    assert largest((logits - expected.logits)[real]) < EXACT
    assert largest((unwatched - expected.logits)[real]) < EXACT, "the fused kernels give the same"
    for layer in range(LAYERS):
        assert largest((cache["resid_pre", layer] - expected.hidden_states[layer])[real]) < EXACT
        difference = (cache["pattern", layer] - expected.attentions[layer]).transpose(1, 2)
        assert largest(difference[real]) < EXACT
    assert largest((cache["ln_final.hook_normalized"] - expected.hidden_states[-1])[real]) < EXACT
    assert float(logits.std()) > 0.5 and largest(cache["pattern", 0][:, :, -1].diff(dim=-1)) > 0.01, (
        "not a comparison of zeros"
    )


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("n_groups", [1, 2, 8])
def test_mamba2(n_groups: int, padded: bool) -> None:
    """Also the carried state: after the last token our state_k × state_v is their transposed recurrent state."""
    ours, theirs = mamba2(n_groups)
    tokens, mask, _ = batch("left")
    padding = {"attention_mask": mask.long()} if padded else {}
    with torch.no_grad(), all_double("Mamba2ForCausalLM"):
        expected = theirs(tokens, output_hidden_states=True, use_cache=True, **padding)
        (logits, state), cache = ours.run_with_cache(tokens, mask=mask if padded else None, return_state=True)
    real = mask if padded else torch.ones_like(mask)
    assert largest((logits - expected.logits)[real]) < EXACT
    for layer in range(LAYERS):
        assert largest((cache["resid_post", layer] - expected.hidden_states[layer])[real]) < EXACT
        carried = expected.cache_params.get_recurrent_state(layer, state_idx=0)
        assert largest(state.slot(layer, "state") - carried.transpose(-1, -2)) < EXACT
    assert float(logits.std()) > 0.5 and largest(state.slot(1, "state")) > 0.01


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_generation(name: str, request: pytest.FixtureRequest) -> None:
    """Greedy continuation of a left-padded batch with a key/value cache: the same tokens."""
    ours, theirs = request.getfixturevalue(name)
    tokens, mask, _ = batch("left")
    tokens, mask = tokens[:, :9], mask[:, :9]
    theirs.generation_config.eos_token_id = None  # nothing ends a text before its time
    with all_double(MODELS[name]):
        expected = theirs.generate(
            tokens, attention_mask=mask.long(), max_new_tokens=5, do_sample=False, pad_token_id=0
        )
    assert torch.equal(ours.generate(tokens, 5, mask=mask), expected)


def test_single_precision_as_it_comes(gpt2: tuple[Decoder, Any], llama: tuple[Decoder, Any]) -> None:
    """In float32, with nothing patched, the difference is rounding."""
    import copy

    tokens, _, _ = batch("left")
    for ours, theirs in (gpt2, llama, mamba2(2)):
        with torch.no_grad():
            expected = copy.deepcopy(theirs).float()(tokens).logits
            assert largest(copy.deepcopy(ours).float()(tokens) - expected) < 2e-5 * max(1.0, largest(expected))
