"""`LanguageModel`: token embedding → blocks of (norm, sequence mixer, norm, channel mixer) on a residual stream → norm → unembedding.

The sequence mixer is a configuration (softmax attention, retention, Mamba-2, ...); everything around it is shared. GPT-2, Llama, RetNet and
Mamba-2 are settings of this file, not copies of it.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention.config import several
from models.attention.site import Attention, AttentionConfig
from models.context import Context
from models.decoder import Decoder, default_tokenizer
from models.mixers import MixerConfig, build_mixer
from models.parts.channel_mixers import build_channel_mixer
from models.parts.norms import Norm
from models.parts.positions import PositionEmbedding
from models.wiring import build_wiring
from workbench.instrument.errors import suggestion
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.hooked_model import Mixer

ChannelMixerConfig = Any  # `MLPConfig`, or another registered one
PLACEMENTS = ("before", "both", "after")


@dataclass(frozen=True)
class LanguageModelConfig:
    """Args:
    n_layers, d_model, vocab_size: sizes. n_ctx: longest input (needed for learned positions; None: unlimited).
    mixer: the sequence mixer of every layer; a tuple is one layer after the other and repeats until n_layers (hybrids).
    mlp: the channel mixer, None for none (Mamba-2); a tuple as for mixers.
    norm: `"layer"` or `"rms"`. norm_placement: `"before"` mixer and MLP; `"both"`, before and again on what they add (Gemma 2); `"after"`
        they were added (the original transformer, BERT), which leaves out the last norm. embed_norm: a norm behind the embedding.
    embed_scale: what embedded tokens are multiplied by. logit_softcap: c·tanh(logits / c).
    parallel: attention and MLP read the same input (GPT-J, NeoX) instead of one after the other.
    tie_embeddings: unembed with the embedding's weights. loops: pass through the blocks this often (depth with shared weights).
    wiring: another way through the blocks, a configuration of `models.depth`.
    init_std: standard deviation of the initial weights. seed: of the initial weights.
    """

    n_layers: int
    d_model: int
    vocab_size: int = 256
    n_ctx: int | None = None
    mixer: MixerConfig | tuple[MixerConfig, ...] = field(default_factory=lambda: AttentionConfig(n_heads=4))
    mlp: ChannelMixerConfig | tuple[ChannelMixerConfig | None, ...] | None = None
    norm: str = "layer"
    norm_eps: float = 1e-5
    norm_placement: str = "before"
    embed_norm: bool = False
    embed_scale: float = 1.0
    logit_softcap: float | None = None
    parallel: bool = False
    tie_embeddings: bool = False
    unembed_bias: bool = False
    loops: int = 1
    wiring: Any = None
    init_std: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        if self.norm_placement not in PLACEMENTS:
            raise ValueError(
                f"Unknown norm_placement {self.norm_placement!r}.{suggestion(self.norm_placement, PLACEMENTS)} "
                f"Expected one of {', '.join(PLACEMENTS)}."
            )
        if self.parallel and self.norm_placement == "after":
            raise ValueError(
                "parallel blocks read one normalised stream: norm_placement 'after' has none. Expected 'before'."
            )

    @property
    def mixers(self) -> list[MixerConfig]:
        """The sequence mixer of each layer."""
        return _per_layer("mixer", self.mixer, self.n_layers)

    @property
    def mlps(self) -> list[ChannelMixerConfig | None]:
        """The channel mixer of each layer."""
        return _per_layer("mlp", self.mlp, self.n_layers)

    @property
    def position_embedding(self) -> str | None:
        """The kind of positions added at the embedding, if a mixer asks for one: `"learned"` or `"sinusoidal"`."""
        wanted: set[str] = set().union(*(getattr(mixer, "embedded_positions", ()) for mixer in self.mixers))
        if len(wanted) > 1:
            raise ValueError(
                "Layers ask for learned and for sinusoidal positions. Expected one kind: they are added once, at the embedding."
            )
        return next(iter(wanted), None)


def _per_layer(name: str, given: Any, n_layers: int) -> list[Any]:
    if not isinstance(given, tuple):
        return [given] * n_layers
    if not 0 < len(given) <= n_layers:
        raise ValueError(
            f"{name} lists {len(given)} layers, the model has {n_layers}. Expected between 1 and {n_layers}: the list repeats."
        )
    return [given[layer % len(given)] for layer in range(n_layers)]


class Embed(nn.Module):
    """Token embedding W_E [vocab, d_model]."""

    def __init__(self, vocab_size: int, d_model: int) -> None:
        super().__init__()
        self.W_E = nn.Parameter(torch.empty(vocab_size, d_model))

    def forward(self, tokens: Tensor) -> Tensor:
        """[batch, pos] -> [batch, pos, d_model]."""
        return F.embedding(tokens, self.W_E)


class Unembed(nn.Module):
    """Logits = x W_U + b_U, softly capped at ± `softcap` if given. `tied` shares the embedding's weights."""

    def __init__(
        self, d_model: int, vocab_size: int, tied: Embed | None, bias: bool, softcap: float | None = None
    ) -> None:
        super().__init__()
        self.softcap = softcap
        self.tied = [tied] if tied is not None else []  # in a list, so that the shared weight is registered once
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model)) if tied is None else None
        self.b_U = nn.Parameter(torch.zeros(vocab_size)) if bias else None
        self.hook_in = HookPoint("unembed_input", "batch pos d_model")
        self.hook_out = HookPoint("logits", "batch pos vocab")

    @property
    def W_U(self) -> Tensor:
        """[d_model, vocab]."""
        return self._rows().T

    def _rows(self) -> Tensor:
        weight = self.weight
        return weight if weight is not None else self.tied[0].W_E

    def forward(self, x: Tensor) -> Tensor:
        """[batch, pos, d_model] -> [batch, pos, vocab]."""
        logits = F.linear(self.hook_in(x), self._rows(), self.b_U)
        return self.hook_out(logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh())


class Block(nn.Module):
    """x + mixer(norm(x)), then + mlp(norm(x)); or both from the same x if `parallel`.

    With norms `"after"`, x ← norm(x + mixer(x)), then norm(x + mlp(x)): `hook_resid_mid` and `hook_resid_post` are the sums before
    their norms (TransformerLens's choice for BERT), and the next block's `hook_resid_pre` is the normalised stream.
    With norms on `"both"` sides, `hook_attn_out` and `hook_mlp_out` are what is added, so behind the second norm.
    """

    hook_out_is_single_residual_stream = True  # TransformerLens's logit lens asks every block

    def __init__(self, config: LanguageModelConfig, layer: int, switches: dict[str, bool]) -> None:
        super().__init__()
        mlp = config.mlps[layer]
        self.parallel, self.switches = config.parallel, switches
        self.norm_after, norm_both = config.norm_placement == "after", config.norm_placement == "both"
        self.hook_resid_pre = HookPoint("resid", "batch pos d_model")
        self.ln1 = Norm(config.norm, config.d_model, config.norm_eps)
        self.ln1_post = Norm(config.norm, config.d_model, config.norm_eps) if norm_both else None
        mixer = build_mixer(config.mixers[layer], config.d_model, switches)
        self.is_attention = isinstance(mixer, Attention)
        if isinstance(mixer, Attention):
            self.attn = mixer
            self.hook_attn_out = HookPoint("mixer_out", "batch pos d_model")
            self.hook_attn_in = HookPoint("mixer_input", "batch pos head d_model", flag="use_attn_in", gated=True)
            axis = mixer.sizes.map_axis
            if mixer.matches:
                self.hook_q_input = HookPoint(
                    "query_input", f"batch pos {axis} d_model", flag="use_split_qkv_input", gated=True
                )
            if mixer.matches and not mixer.reads_source:
                self.hook_k_input = HookPoint(
                    "key_input", f"batch pos kv_{axis} d_model", flag="use_split_qkv_input", gated=True
                )
            if not mixer.reads_source:
                self.hook_v_input = HookPoint(
                    "value_input", "batch pos kv_head d_model", flag="use_split_qkv_input", gated=True
                )
        else:
            self.mixer = mixer
            self.hook_mixer_out = HookPoint("mixer_out", "batch pos d_model")
        if mlp is not None:
            if not config.parallel:
                self.hook_resid_mid = HookPoint("resid_mid", "batch pos d_model")
            self.hook_mlp_in = HookPoint("mlp_input", "batch pos d_model", on_demand=True, flag="use_hook_mlp_in")
            self.ln2 = Norm(config.norm, config.d_model, config.norm_eps)
            self.ln2_post = Norm(config.norm, config.d_model, config.norm_eps) if norm_both else None
            self.mlp = build_channel_mixer(mlp, config.d_model)
            self.hook_mlp_out = HookPoint("mlp_out", "batch pos d_model")
        self.has_mlp = mlp is not None
        self.hook_resid_post = HookPoint("resid_post", "batch pos d_model")

    @property
    def sequence_mixer(self) -> Any:
        """The attention site or recurrent mixer of this block."""
        return self.attn if self.is_attention else self.mixer

    def forward(
        self, x: Tensor, context: Context, carried: dict[str, Tensor] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """x [batch, pos, d_model] -> same, and what the mixer carries to the next call."""
        x = self.hook_resid_pre(x)
        if self.is_attention:
            if self.switches["use_split_qkv_input"] or self.switches["use_attn_in"]:
                inputs, stream = self._inputs_per_head(x), self._read(x) if self.attn.parts else None
            else:
                inputs, stream = (self._read(x),) * 3, None
            mixed, out = self.attn(inputs, context, carried, stream)
            mixed = self.hook_attn_out(mixed if self.ln1_post is None else self.ln1_post(mixed))
        else:
            mixed, out = self.mixer(self._read(x), context, carried)
            mixed = self.hook_mixer_out(mixed if self.ln1_post is None else self.ln1_post(mixed))
        if not self.has_mlp:
            total = self.hook_resid_post(x + mixed)
            return self.ln1(total) if self.norm_after else total, out
        middle = x if self.parallel else self.hook_resid_mid(x + mixed)
        if self.norm_after:
            middle = self.ln1(middle)
        read = self.hook_mlp_in(middle)
        added = self.mlp(read if self.norm_after else self.ln2(read))
        added = self.hook_mlp_out(added if self.ln2_post is None else self.ln2_post(added))
        total = self.hook_resid_post(x + mixed + added if self.parallel else middle + added)
        return self.ln2(total) if self.norm_after else total, out

    def _read(self, x: Tensor) -> Tensor:
        """What the mixer reads of the stream."""
        return x if self.norm_after else self.ln1(x)

    def _inputs_per_head(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Behind the switches: one normalised copy per head (and per q, k, v), so that paths can be patched apart."""
        if self.switches["use_split_qkv_input"]:
            sizes, apart = self.attn.sizes, x[:, :, None]
            if self.attn.reads_source:
                return (self._read(self.hook_q_input(apart.expand(-1, -1, sizes.n_maps, -1))),) * 3
            v = self._read(self.hook_v_input(apart.expand(-1, -1, sizes.n_kv, -1)))
            if not self.attn.matches:
                return v, v, v  # nothing is projected but values
            q = self._read(self.hook_q_input(apart.expand(-1, -1, sizes.n_maps, -1)))
            k = self._read(self.hook_k_input(apart.expand(-1, -1, sizes.n_key_maps, -1)))
            return q, k, v
        if not self.attn.sizes.one_map_each:
            raise ValueError(
                "use_attn_in needs one key/value head per query head; use use_split_qkv_input with grouped queries."
            )
        return (self._read(self.hook_attn_in(x[:, :, None].expand(-1, -1, self.attn.n_heads, -1))),) * 3


class LanguageModel(Decoder):
    """See the module docstring. `name` and `architecture` are set by the registry."""

    pos_embed: PositionEmbedding
    hook_pos_embed: HookPoint

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size, self.d_model, self.loops = config.vocab_size, config.d_model, config.loops
        self.tokenizer = default_tokenizer(config.vocab_size)
        position = config.position_embedding
        self.n_ctx = config.n_ctx if position == "learned" else None
        if position == "learned" and config.n_ctx is None:
            raise ValueError("Learned positions need n_ctx, the number of positions to learn.")
        self.switches.update(use_attn_result=False, use_split_qkv_input=False, use_attn_in=False, use_hook_mlp_in=False)
        with torch.random.fork_rng(
            devices=[]
        ):  # torch draws initial weights when a layer is made; ours follow from the seed alone
            self._build(config, position)
        self.reads_tokens = any(part.reads_tokens for mixer in self.mixers for part in getattr(mixer, "parts", ()))
        self.name_hook_points()
        for point in self.hook_points.points.values():
            if point.layer_index is not None:
                point.steps = sum(layer == point.layer_index for layer, _ in self.visits)

    def _build(self, config: LanguageModelConfig, position: str | None) -> None:
        self.embed = Embed(config.vocab_size, config.d_model)
        self.embed_scale = config.embed_scale
        self.ln_embed = Norm(config.norm, config.d_model, config.norm_eps) if config.embed_norm else None
        self.hook_embed = HookPoint("embed", "batch pos d_model")
        if position is not None:
            self.pos_embed = PositionEmbedding(position, config.n_ctx or 0, config.d_model)
            self.hook_pos_embed = HookPoint("pos_embed", "batch pos d_model")
        self.has_position_embedding = position is not None
        self.blocks = nn.ModuleList(Block(config, layer, self.switches) for layer in range(config.n_layers))
        for layer, mixer in enumerate(self.mixers):
            if hasattr(mixer, "placed"):
                mixer.placed(layer, self.mixers[:layer])
        channel_mixers = [block.mlp for block in self.blocks if block.has_mlp]
        for number, mlp in enumerate(channel_mixers):
            if hasattr(mlp, "placed"):
                mlp.placed(number, channel_mixers[:number])
        self.ln_final = None if config.norm_placement == "after" else Norm(config.norm, config.d_model, config.norm_eps)
        self.unembed = Unembed(
            config.d_model,
            config.vocab_size,
            self.embed if config.tie_embeddings else None,
            config.unembed_bias,
            config.logit_softcap,
        )
        self.wiring = None if config.wiring is None else build_wiring(config.wiring, config)
        if self.wiring is not None:
            self.stream_is_all = self.wiring.stream_is_all
            self.loops = 1 + max(step for _, step in self.wiring.visits)
        self.initialise()

    def initialise(self) -> None:
        """Seeded N(0, init_std²) weights and zero biases; projections back to the residual stream are scaled by 1/√(2·depth) (GPT-2)."""
        std, depth = self.config.init_std, len(self.visits)
        torch.manual_seed(self.config.seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2 or getattr(parameter, "_own_init", False):
                continue
            outward = name.endswith(("output.weight", "outward.weight"))
            nn.init.normal_(parameter, std=std / (2 * depth) ** 0.5 if outward else std)
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for module in self.modules():  # afterwards: what a mixer gives its linear maps' biases stays
            own = getattr(module, "initialise_own", None)
            if own is not None:
                own()

    @property
    def mixers(self) -> list[Mixer]:
        """The sequence mixer of each layer."""
        return [block.sequence_mixer for block in self.blocks]

    def embed_tokens(self, tokens: Tensor, context: Context) -> Tensor:
        """[batch, pos] -> [batch, pos, d_model]."""
        x = self.embed(tokens)
        x = self.hook_embed(x if self.embed_scale == 1.0 else x * self.embed_scale)
        if self.has_position_embedding:
            positions = self.pos_embed(context.positions)
            x = x + self.hook_pos_embed(
                (positions if positions.dtype == x.dtype else positions.to(x.dtype)).expand_as(x)
            )
        return x if self.ln_embed is None else self.ln_embed(x)

    def unembed_residual(self, x: Tensor) -> Tensor:
        """[batch, pos, d_model] -> [batch, pos, vocab]."""
        return self.unembed(x if self.ln_final is None else self.ln_final(x))

    # Weights under TransformerLens's names, stacked over layers.

    @property
    def W_E(self) -> Tensor:
        """[vocab, d_model]."""
        return self.embed.W_E

    @property
    def W_pos(self) -> Tensor:
        """[n_ctx, d_model]; only with learned positions."""
        return self.pos_embed.W_pos

    @property
    def W_U(self) -> Tensor:
        """[d_model, vocab]."""
        return self.unembed.W_U

    @property
    def b_U(self) -> Tensor:
        """[vocab]."""
        return self.unembed.b_U if self.unembed.b_U is not None else self.W_U.new_zeros(self.vocab_size)

    def _stacked(self, part: str, name: str) -> Tensor:
        return torch.stack([getattr(getattr(block, part), name) for block in self.blocks])

    W_Q = property(lambda self: self._stacked("attn", "W_Q"), doc="[layer, head, d_model, d_head].")
    W_K = property(lambda self: self._stacked("attn", "W_K"), doc="[layer, kv_head, d_model, d_head].")
    W_V = property(lambda self: self._stacked("attn", "W_V"), doc="[layer, kv_head, d_model, d_head].")
    W_O = property(lambda self: self._stacked("attn", "W_O"), doc="[layer, head, d_head, d_model].")
    W_in = property(lambda self: self._stacked("mlp", "W_in"), doc="[layer, d_model, d_mlp].")
    W_out = property(lambda self: self._stacked("mlp", "W_out"), doc="[layer, d_mlp, d_model].")
    b_in = property(lambda self: self._stacked("mlp", "b_in"), doc="[layer, d_mlp].")
    b_out = property(lambda self: self._stacked("mlp", "b_out"), doc="[layer, d_model].")

    def accumulated_bias(self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True) -> Tensor:
        """Sum of the output biases that enter the residual stream before `layer` (as TransformerLens counts them). [d_model]."""
        total = self.W_E.new_zeros(self.d_model)
        for number, block in enumerate(self.blocks):
            if number < layer:
                if block.is_attention:
                    total = total + block.attn.b_O
                if include_mlp_biases and block.has_mlp:
                    total = total + block.mlp.b_out
            elif number == layer and mlp_input and block.is_attention:
                total = total + block.attn.b_O
        return total

    def tokens_to_residual_directions(self, tokens: Any) -> Tensor:
        """Unembedding directions of tokens: [..., d_model]. Takes ids or a one-token text."""
        ids = self.to_single_token(tokens) if isinstance(tokens, str) else tokens
        return self.W_U.T[torch.as_tensor(ids, device=self.device)]

    def transformer_lens_config(self) -> dict[str, Any]:
        """Attributes that TransformerLens utilities read."""
        view = super().transformer_lens_config()
        config = self.config
        mlp = next((item for item in config.mlps if item is not None), None)
        attention = next((block.attn for block in self.blocks if block.is_attention), None)
        view |= {
            "attn_only": mlp is None,
            "d_mlp": mlp.d_mlp if mlp else 0,
            "act_fn": mlp.activation if mlp else None,
            "gated_mlp": bool(mlp and mlp.gated),
            "normalization_type": {"layer": "LN", "rms": "RMS"}[config.norm],
            "parallel_attn_mlp": config.parallel,
            "eps": config.norm_eps,
        }
        if attention is not None:
            kinds = {"learned": "standard", "rope": "rotary"}
            position = "+".join(getattr(item, "kind", item) for item in several(attention.config.position))
            view |= {
                "n_heads": attention.n_heads,
                "n_key_value_heads": None if attention.n_kv == attention.n_heads else attention.n_kv,
                "d_head": attention.d_head,
                "positional_embedding_type": kinds.get(position, position),
            }
        return view
