"""`Encoder`: BERT-like models (Devlin et al. 2019). Every token reads every token, and norms stand after sums.

Encoders share the blocks of `LanguageModel` and differ at the ends: token types at the embedding, an optional pooled vector of the first
token, and, of what they were trained with, at most the head that predicts masked tokens:

    logits = W_U LN(act(W x + b)) + b_U        x the last residual stream, of the same position: what stands there, not what comes next

Without that head the output is the last residual stream. They generate nothing and have no next-token loss.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.context import Context
from models.language_model import LanguageModel, LanguageModelConfig, Unembed
from models.parts.channel_mixers import activation_function
from models.parts.norms import Norm
from workbench.instrument.hook_points import HookPoint


@dataclass(frozen=True)
class EncoderConfig(LanguageModelConfig):
    """Args: token_types: kinds of tokens (sentence A, sentence B); 0 for none. pooler: tanh(W x + b) of the first token. masked_head:
    the activation function of the head that predicts masked tokens; None: no head."""

    token_types: int = 2
    pooler: bool = False
    masked_head: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(getattr(mixer, "causal", True) for mixer in self.mixers):
            raise ValueError("An encoder reads in both directions. Expected mixers with causal=False.")


class MaskedHead(nn.Module):
    """What the last residual stream goes through before it is unembedded: LN(act(W x + b)), [batch, pos, d_model] on both sides."""

    def __init__(self, activation: str, config: LanguageModelConfig) -> None:
        super().__init__()
        self.activation = activation_function(activation)
        self.dense = nn.Linear(config.d_model, config.d_model)
        self.hook_pre = HookPoint("head_pre", "batch pos d_model")
        self.hook_post = HookPoint("head_post", "batch pos d_model")
        self.ln = Norm(config.norm, config.d_model, config.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.ln(self.hook_post(self.activation(self.hook_pre(self.dense(x)))))  # type: ignore[no-any-return]


class Encoder(LanguageModel):
    """Called like every model. `return_type="logits"` is [batch, pos, vocab] with a head for masked tokens, and the last residual stream
    [batch, pos, d_model] without one; `hook_output` is that stream in both cases, as is `stop_at_layer=n_layers`.

    Token types are a fact of the call: `facts={"token_types": [batch or 1, pos]}`; without it every token is of type 0.
    """

    config: EncoderConfig
    predicts_next_token = False

    def _build(self, config: LanguageModelConfig, position: str | None) -> None:
        assert isinstance(config, EncoderConfig)
        super()._build(config, position)
        del self.unembed
        if config.masked_head is not None:
            self.mlm_head = MaskedHead(config.masked_head, config)
            tied = self.embed if config.tie_embeddings else None
            self.unembed = Unembed(config.d_model, config.vocab_size, tied, True, config.logit_softcap)
        if config.token_types:
            self.W_types = nn.Parameter(torch.empty(config.token_types, config.d_model))
            self.hook_token_types = HookPoint("token_types", "batch pos d_model")
        self.hook_output = HookPoint("output", "batch pos d_model")
        if config.pooler:
            self.pool = nn.Linear(config.d_model, config.d_model)
        self.initialise()

    def embed_tokens(self, tokens: Tensor, context: Context) -> Tensor:
        """Token, position and type embeddings, then their norm. [batch, pos] -> [batch, pos, d_model]."""
        x = self.embed(tokens)
        x = self.hook_embed(x if self.embed_scale == 1.0 else x * self.embed_scale)
        if self.has_position_embedding:
            x = x + self.hook_pos_embed(self.pos_embed(context.positions).to(x.dtype).expand_as(x))
        given = context.fact("token_types")
        if self.config.token_types:
            kinds = torch.zeros_like(tokens[:1]) if given is None else torch.as_tensor(given, device=tokens.device)
            if kinds.shape[-1] != tokens.shape[1]:
                raise ValueError(
                    f"facts['token_types'] has shape {tuple(kinds.shape)}; expected [batch or 1, pos] with pos = {tokens.shape[1]}."
                )
            x = x + self.hook_token_types(F.embedding(kinds, self.W_types).expand_as(x))
        elif given is not None:
            raise ValueError("This model has no token types. Expected a call without facts['token_types'].")
        return x if self.ln_embed is None else self.ln_embed(x)

    @property
    def predicts_masked_tokens(self) -> bool:
        """Whether there is a head, so that the output says which token stands at each position."""
        return self.config.masked_head is not None

    def unembed_residual(self, x: Tensor) -> Tensor:
        """[batch, pos, d_model] -> [batch, pos, vocab] with a head for masked tokens, else the same stream."""
        output: Tensor = self.hook_output(x if self.ln_final is None else self.ln_final(x))
        return self.unembed(self.mlm_head(output)) if self.predicts_masked_tokens else output  # type: ignore[no-any-return]

    def forward(self, tokens: Any, *, return_type: str | None = "logits", **kwargs: Any) -> Any:
        """As for `Decoder.forward`, without a loss.

        Raises:
            ValueError: a loss is asked for, or a state.
        """
        if return_type not in ("logits", None):
            raise ValueError(
                f"return_type={return_type!r}: an encoder predicts no next token. Expected 'logits' (its output) or None."
            )
        if kwargs.get("return_state") or kwargs.get("state") is not None:
            raise ValueError("An encoder reads a text as a whole, so there is no state to carry on.")
        return super().forward(tokens, return_type=return_type, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Tensor:
        """Refused: an encoder predicts no next token."""
        raise ValueError("An encoder predicts no next token, so it cannot generate. Expected a decoder-only model.")

    def pooled(self, output: Tensor) -> Tensor:
        """tanh(W x₀ + b) of the first token of an output [batch, pos, d_model] -> [batch, d_model]; needs a pooler."""
        if not self.config.pooler:
            raise ValueError("This encoder has no pooler. Use the output of the first token, or `mean_pooled`.")
        return self.pool(output[:, 0]).tanh()

    @staticmethod
    def mean_pooled(output: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean over real tokens, [batch, pos, d_model] -> [batch, d_model]; what sentence embedders compare, after normalising."""
        if mask is None:
            return output.mean(1)
        real = mask.to(output.dtype)[..., None]
        return (output * real).sum(1) / real.sum(1)

    @property
    def W_U(self) -> Tensor:
        """[d_model, vocab] of the head for masked tokens; refused where there is none."""
        if not self.predicts_masked_tokens:
            raise ValueError(
                "This encoder has no head that predicts masked tokens, hence no unembedding, no W_U and no logit lens."
            )
        return super().W_U

    @property
    def b_U(self) -> Tensor:
        """[vocab] of the head for masked tokens; refused where there is none."""
        if not self.predicts_masked_tokens:
            raise ValueError("This encoder has no head that predicts masked tokens, hence no unembedding and no b_U.")
        return super().b_U
