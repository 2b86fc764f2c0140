"""BDH-GPU, the Dragon Hatchling (Kosowski et al. 2025, arXiv 2509.26507): as the published code computes it, and three variants.

The residual stream v [batch, pos, d] is the attention value; one set of weights serves every layer:

    v ← LN(embed(token))
    per layer:  x = ReLU(v D_x)                       sparse, per head: [batch, head, pos, neuron]
                q = k = R_t x                          rotary on neuron pairs; head-independent frequencies
                a_t = Σ_{τ<t} (q_t·k_τ) v_τ            linear attention, strictly past, no scale, no normaliser
                y = ReLU(LN(a) D_y) ⊙ x                gated: the paper's sparse "y"
                v ← LN(v + LN(y E))
    logits = v W_U

Three execution modes give the same logits (`model.set_mode`): the quadratic form, chunks, and token by token with the state
ρ [batch, head, neuron, d] = Σ k_τ ⊗ v_τ. It is kept in the frame of position 0 (keys rotated, state not), which is exact; the paper's
co-rotating state after token t is ρ turned back by t.

The paper's equation 8 is another model (`residual="neuron"`): its residual stream is x, in neuron space, and v is what E last wrote,

    x_l = x_{l−1} + ReLU(v_{l−1} D_x),   y_l = ReLU(LN(a_l) D_y) ⊙ x_l,   v_l = LN(y_l E),   logits = v_L W_U

The paper does not say what stands before the first layer; here x_0 = 0 and v_0 = LN(embed(token)). As nothing but E y reaches the next
layer, what token 0 leaves unread is missing one layer further at token 1, and so on: the first L tokens of a text have v_L = 0.

With `decay` the state fades between tokens, S ← λ_h S with λ_h = exp(−decay · slope_h), which multiplies the weight of a token n back by
λ_hⁿ: for a linear read what ALiBi (slopes as there) is for scores in a softmax. The paper advises it for long texts (section 6.1); its code
has none. With `detach_memory` no gradient flows back in time: keys and values are constants for the backward pass (section 7.2).

Names: the published code calls D_x `encoder`, D_y `encoder_v` and E `decoder`, the reverse of the paper. Here they are D_x, D_y, E.
Position 0 reads nothing: a = 0, LN(0) = 0, so y = 0 there and v passes unchanged (stream residual); leave position 0 out of statistics.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.context import Context
from models.decoder import Decoder, default_tokenizer
from models.language_model import Embed, Unembed
from models.parts.norms import Norm
from models.parts.positions import alibi_slopes, rotate
from models.parts.precision import KeepsPrecision
from models.recurrent.linear_core import LinearCore, linear_record
from workbench.instrument.errors import suggestion
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.hooked_model import Mixer

RESIDUALS = ("stream", "neuron")


@dataclass(frozen=True)
class BDHConfig:
    """Args:
    n_layers, d_model, n_heads, vocab_size: L, d, h, Ω. n_neurons: n, over all heads (published default 32,768 = 128·d).
    theta: RoPE base. dropout: on y while training. init_std, seed: of the initial weights. norm_eps: of every layer norm.
    residual: `"stream"`, the published code's, or `"neuron"`, the paper's. decay: 0 for none; 1 fades heads at ALiBi's slopes per token.
    detach_memory: no gradient through keys and values; the forward pass is the same.

    Raises ValueError for another residual and for a negative decay, which would make the state grow.
    """

    n_layers: int = 6
    d_model: int = 256
    n_heads: int = 4
    n_neurons: int = 32768
    vocab_size: int = 256
    theta: float = 2.0**16
    dropout: float = 0.1
    chunk_size: int | None = None
    init_std: float = 0.02
    seed: int = 0
    norm_eps: float = 1e-5
    residual: Literal["stream", "neuron"] = "stream"
    decay: float = 0.0
    detach_memory: bool = False

    def __post_init__(self) -> None:
        if self.residual not in RESIDUALS:
            near = suggestion(str(self.residual), RESIDUALS)
            raise ValueError(
                f"residual is {self.residual!r}; expected 'stream' (the code's) or 'neuron' (the paper's).{near}"
            )
        if not self.decay >= 0:
            raise ValueError(
                f"decay is {self.decay}; expected 0 (none) or more: λ = exp(−decay · slope) must not exceed 1."
            )


def rope_frequencies(neurons_per_head: int, theta: float) -> Tensor:
    """Frequencies in cycles per token, θ^(−2⌊j/2⌋/N)/2π, equal within a pair; float32 as published. [neuron]."""
    index = torch.arange(neurons_per_head, dtype=torch.float32)
    return 1.0 / (theta ** (torch.floor(index / 2) * 2 / neurons_per_head)) / (2 * math.pi)


class BDHWeights(KeepsPrecision):
    """The one set of weights: D_x, D_y [head, d_model, neuron], E [head, neuron, d_model]; rotation frequencies [neuron], log λ [head]."""

    exact_buffers = ("frequencies", "log_decay")
    frequencies: Tensor
    log_decay: Tensor

    def __init__(self, config: BDHConfig) -> None:
        super().__init__()
        if config.n_neurons % (2 * config.n_heads):
            raise ValueError(
                f"n_neurons ({config.n_neurons}) must be a multiple of 2·n_heads ({2 * config.n_heads}): neurons rotate in pairs."
            )
        neurons = config.n_neurons // config.n_heads
        self.D_x = nn.Parameter(torch.empty(config.n_heads, config.d_model, neurons))
        self.D_y = nn.Parameter(torch.empty(config.n_heads, config.d_model, neurons))
        self.E = nn.Parameter(torch.empty(config.n_heads, neurons, config.d_model))
        self.register_buffer("frequencies", rope_frequencies(neurons, config.theta))
        self.register_buffer("log_decay", -config.decay * alibi_slopes(config.n_heads).double(), persistent=False)

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of each pair's phase at positions [batch or 1, pos]: [batch or 1, 1, pos, pair], float32.

        Phases are kept in cycles and reduced modulo 1 before the multiplication by 2π, as published.
        """
        cycles = positions.to(torch.float32)[:, None, :, None] * self.frequencies[::2]
        angle = (cycles % 1) * (2 * math.pi)
        return angle.cos(), angle.sin()


class BDHAttention(nn.Module):
    """The parameter-free linear attention of one layer, with its hook points."""

    slots = ("state",)  # what it carries from call to call

    def __init__(self, config: BDHConfig, shared: BDHWeights) -> None:
        super().__init__()
        self.config, self.shared = config, [shared]
        self.core = LinearCore(strict=True, chunk_size=config.chunk_size)
        self.hook_q = HookPoint("query", "batch head pos neuron")
        self.hook_k = HookPoint("key", "batch head pos neuron")
        self.hook_rot_q = HookPoint("rotated_query", "batch head pos neuron")
        self.hook_rot_k = HookPoint("rotated_key", "batch head pos neuron")
        self.hook_value = HookPoint("value", "batch pos d_model")

    def forward(
        self, x: Tensor, v: Tensor, context: Context, carried: dict[str, Tensor] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """x [batch, head, pos, neuron], v [batch, pos, d_model] -> a [batch, head, pos, d_model], in float32 at least.

        a grows with the number of tokens (nothing normalises it), so 16-bit models compute it and the state in float32.
        """
        q, k = self.hook_q(x), self.hook_k(x)
        cosine, sine = self.shared[0].rotation(context.positions)
        precise = torch.float64 if x.dtype == torch.float64 else torch.float32
        q = self.hook_rot_q(rotate(q.to(precise), cosine, sine, interleaved=True))
        k = self.hook_rot_k(rotate(k.to(precise), cosine, sine, interleaved=True))
        value = self.hook_value(v)[:, None].to(precise)
        if self.config.detach_memory:
            k, value = k.detach(), value.detach()
        state = None if carried is None else carried["state"]
        a, state = self.core(q, k, value, context, state, **self.constant_factors())
        return a, {"state": state} if context.keep_state else {}

    @property
    def factor_points(self) -> dict[str, HookPoint]:
        """The hook points that determine pattern and state."""
        return {"query": self.hook_rot_q, "key": self.hook_rot_k, "value": self.hook_value}

    def constant_factors(self) -> dict[str, Tensor]:
        """log λ as `log_decay` [head], in float32 at least; none without decay, where every factor depends on the input."""
        if not self.config.decay:
            return {}
        weights = self.shared[0]
        precise = torch.float64 if weights.E.dtype == torch.float64 else torch.float32
        return {"log_decay": weights.log_decay.to(precise)}

    def describe(self) -> dict[str, Any]:
        """The layer record of a run manifest."""
        config = self.config
        shape = (config.n_heads, config.n_neurons // config.n_heads, config.d_model)
        return linear_record("bdh", self.core, config.n_heads, config.n_heads, 1, shape)


_NEURONS = "BDH: x of the layer before"


class BDHLayer(nn.Module):
    """One pass through the shared weights."""

    def __init__(self, config: BDHConfig, shared: BDHWeights, layer: int) -> None:
        super().__init__()
        self.shared, self.dropout, self.residual, self.layer = [shared], config.dropout, config.residual, layer
        self.hook_resid_pre = HookPoint("resid", "batch pos d_model")
        self.hook_x_pre = HookPoint("neuron_pre", "batch head pos neuron")
        if config.residual == "neuron":
            self.hook_x_added = HookPoint("neuron_added", "batch head pos neuron")
        self.hook_x = HookPoint("neuron", "batch head pos neuron")
        self.attn = BDHAttention(config, shared)
        self.hook_a = HookPoint("z", "batch head pos d_model")
        self.ln_a = Norm("layer", config.d_model, config.norm_eps, affine=False, axes="batch head pos d_model")
        self.hook_gate_pre = HookPoint("gate_pre", "batch head pos neuron")
        self.hook_gate = HookPoint("gate", "batch head pos neuron")
        self.hook_y = HookPoint("neuron_gated", "batch head pos neuron")
        self.hook_u_pre = HookPoint("mixer_out_pre", "batch pos d_model")
        self.ln_u = Norm("layer", config.d_model, config.norm_eps, affine=False)
        if config.residual == "stream":
            self.hook_v_sum = HookPoint("resid_sum", "batch pos d_model")
            self.ln_v = Norm("layer", config.d_model, config.norm_eps, affine=False)
        self.hook_resid_post = HookPoint("resid_post", "batch pos d_model")

    @property
    def sequence_mixer(self) -> BDHAttention:
        """The linear attention of this layer."""
        return self.attn

    def forward(
        self, v: Tensor, context: Context, carried: dict[str, Tensor] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """v [batch, pos, d_model] -> same, and the state carried to the next call."""
        weights = self.shared[0]
        v = self.hook_resid_pre(v)
        x = F.relu(self.hook_x_pre(v[:, None] @ weights.D_x))
        if self.residual == "neuron":
            x = self.accumulated(self.hook_x_added(x), context)
        x = self.hook_x(x)
        if self.residual == "neuron":
            context.beside[_NEURONS] = x
        a, out = self.attn(x, v, context, carried)
        a = self.ln_a(self.hook_a(a)).to(v.dtype)
        gate = self.hook_gate(F.relu(self.hook_gate_pre(a @ weights.D_y)))
        y = F.dropout(self.hook_y(x * gate), self.dropout, self.training)
        u = self.hook_u_pre(y.transpose(1, 2).flatten(-2) @ weights.E.flatten(0, 1))
        v = self.ln_u(u) if self.residual == "neuron" else self.ln_v(self.hook_v_sum(v + self.ln_u(u)))
        return self.hook_resid_post(v), out

    def accumulated(self, added: Tensor, context: Context) -> Tensor:
        """x_l = x_{l−1} + added [batch, head, pos, neuron]. x travels beside v, with the call."""
        return added if self.layer == 0 else context.beside[_NEURONS] + added


class BDH(Decoder):
    """See the module docstring."""

    def __init__(self, config: BDHConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size, self.d_model = config.vocab_size, config.d_model
        self.stream_is_all = self.predicts_from_one_token = config.residual == "stream"
        self.tokenizer = default_tokenizer(config.vocab_size)
        self.embed = Embed(config.vocab_size, config.d_model)
        self.hook_embed = HookPoint("embed", "batch pos d_model")
        self.ln_embed = Norm("layer", config.d_model, config.norm_eps, affine=False)
        self.weights = BDHWeights(config)
        self.blocks = nn.ModuleList(BDHLayer(config, self.weights, layer) for layer in range(config.n_layers))
        self.unembed = Unembed(config.d_model, config.vocab_size, tied=None, bias=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            for parameter in self.parameters():
                nn.init.normal_(parameter, std=config.init_std)
        self.name_hook_points()

    def hook_aliases(self) -> dict[str, str]:
        """The paper's symbols, and the norms' hook points by what they normalise."""
        names = {
            "hook_v": "hook_resid_pre",
            "hook_a_scale": "ln_a.hook_scale",
            "hook_a_ln": "ln_a.hook_normalized",
            "hook_u_scale": "ln_u.hook_scale",
            "hook_u": "ln_u.hook_normalized",
            "attn.hook_scores": "attn.hook_pattern",
        }
        if self.config.residual == "stream":
            names["hook_v_scale"] = "ln_v.hook_scale"
        return {
            f"blocks.{layer}.{a}": f"blocks.{layer}.{name}"
            for layer in range(self.n_layers)
            for a, name in names.items()
        }

    @property
    def mixers(self) -> list[Mixer]:
        """The linear attention of each layer."""
        return [block.attn for block in self.blocks]

    def embed_tokens(self, tokens: Tensor, context: Context) -> Tensor:
        """[batch, pos] -> [batch, pos, d_model]."""
        return self.ln_embed(self.hook_embed(self.embed(tokens)))

    def unembed_residual(self, x: Tensor) -> Tensor:
        """[batch, pos, d_model] -> [batch, pos, vocab]."""
        return self.unembed(x)

    @property
    def W_E(self) -> Tensor:
        """[vocab, d_model]."""
        return self.embed.W_E

    @property
    def W_U(self) -> Tensor:
        """[d_model, vocab]."""
        return self.unembed.W_U

    def transformer_lens_config(self) -> dict[str, Any]:
        """Attributes that TransformerLens utilities read."""
        config = self.config
        return super().transformer_lens_config() | {
            "n_heads": config.n_heads,
            "n_key_value_heads": None,
            "d_head": config.d_model,
            "d_mlp": config.n_neurons,
            "attn_only": True,
            "positional_embedding_type": "rotary",
        }
