"""`EncoderDecoder`: a stack that reads a source in both directions, and a language model whose cross-attention reads what it gives.

    model(tokens, facts={"source": source, "source_mask": mask})
    model.generate(source="translate English to German: That is good.")
    bound = model.with_source(source)        a language model of the text given this source: every probe runs on it
    alone = model.encoder_alone()            the encoder as a model of one text: probes run on it too

A published decoder layer (self-attention, cross-attention, MLP) is two blocks here, `blocks.{2l}` with self-attention and no MLP and
`blocks.{2l + 1}` with cross-attention and the MLP, so that every block has one sequence mixer with one pattern. The encoder's hook points
are `encoder.…`, e.g. `encoder.blocks.0.attn.hook_pattern`; their roles begin with `source_` and their axes are the source's, so that what
asks for residual streams or patterns by role gets those of the text. The encoder runs once per text: a carried state holds what the
cross-attention sites made of the source.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from models.architecture_record import ENCODERS
from models.attention.cross import Source, hook_points_of
from models.attention.site import AttentionConfig
from models.context import Context
from models.encoder import Encoder, EncoderConfig
from models.language_model import Block, LanguageModel, LanguageModelConfig
from models.parts.channel_mixers import MLPConfig
from models.parts.norms import Norm
from workbench.instrument.hook_points import ACTIVE, HookPoint
from workbench.instrument.hooked_model import Mixer
from workbench.instrument.states import ModelState

_AXES = {"pos": "source", "query": "source_query", "key": "source_key"}


@dataclass(frozen=True)
class EncoderDecoderConfig(LanguageModelConfig):
    """Args:
    encoder_layers: blocks of the encoder, of the same width and norms. encoder_mixer: their attention, `causal=False`. encoder_mlp: their
        channel mixer.
    source: what is read by calls that name no source (None: every call must). start: the token that begins every text.

    The other fields are the decoder's: `n_layers` counts its blocks, and `mixer` names at least one `CrossAttentionConfig`.
    """

    encoder_layers: int = 2
    encoder_mixer: AttentionConfig = field(default_factory=lambda: AttentionConfig(4, position="rope", causal=False))
    encoder_mlp: MLPConfig | None = None
    source: tuple[int, ...] | None = None
    start: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder_layers < 1:
            raise ValueError(f"encoder_layers is {self.encoder_layers}; expected at least 1.")
        if self.encoder_mixer.causal:
            raise ValueError("An encoder reads in both directions. Expected encoder_mixer with causal=False.")
        if self.encoder_mixer.embedded_positions:
            raise ValueError(
                f"encoder_mixer has position={self.encoder_mixer.position!r}; expected positions inside attention, such as 'rope' or "
                "T5BiasConfig()."
            )
        if not any(mixer.kind == "cross_attention" for mixer in self.mixers):
            raise ValueError("No mixer reads the source. Expected a CrossAttentionConfig among them.")

    @property
    def encoder_stack(self) -> LanguageModelConfig:
        """The encoder's blocks as a configuration."""
        return LanguageModelConfig(
            self.encoder_layers,
            self.d_model,
            mixer=self.encoder_mixer,
            mlp=self.encoder_mlp,
            norm=self.norm,
            norm_eps=self.norm_eps,
            norm_placement=self.norm_placement,
        )


class SourceEncoder(nn.Module):
    """The encoder's blocks and last norm, with roles and axes of a source."""

    def __init__(self, config: LanguageModelConfig, switches: dict[str, bool]) -> None:
        super().__init__()
        self.hook_embed = HookPoint("embed", "batch pos d_model")
        self.blocks = nn.ModuleList(Block(config, layer, switches) for layer in range(config.n_layers))
        mixers = [block.sequence_mixer for block in self.blocks]  # type: ignore[union-attr]
        for layer, mixer in enumerate(mixers):
            mixer.placed(layer, mixers[:layer])  # type: ignore[union-attr, operator]
        self.ln_final = None if config.norm_placement == "after" else Norm(config.norm, config.d_model, config.norm_eps)
        self.hook_output = HookPoint("output", "batch pos d_model")
        for point in hook_points_of(self):
            point.role = f"source_{point.role}"
            point.axes = tuple(_AXES.get(axis, axis) for axis in point.axes)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Embedded source [batch, source, d_model] -> what cross-attention reads, same shape."""
        x = self.hook_embed(x)
        for block in self.blocks:
            x, _ = block(x, context, None)
        return self.hook_output(x if self.ln_final is None else self.ln_final(x))


class EncoderDecoder(LanguageModel):
    """See the module docstring. Source and text share the embedding.

    Facts of a call: `"source"`, token ids [batch or 1, source], a text, or what `encode` gave; `"source_mask"`, True at its real tokens.
    """

    config: EncoderDecoderConfig
    bound: Source | tuple[Any, Tensor | None] | None = None

    def _build(self, config: LanguageModelConfig, position: str | None) -> None:
        assert isinstance(config, EncoderDecoderConfig)
        self.encoder = SourceEncoder(config.encoder_stack, self.switches)
        super()._build(config, position)

    @property
    def source_mixers(self) -> list[Mixer]:
        """The sequence mixer of each of the encoder's layers."""
        return [block.sequence_mixer for block in self.encoder.blocks]  # type: ignore[union-attr, misc]

    def encoder_alone(self) -> Encoder:
        """The encoder as a model of its own, which reads one text: `model.encoder_alone().patterns("a source")`.

        Its weights are this model's, not copies; its hook points are its own, called as in any encoder.
        """
        from models.pretrained.loader import weightless

        given = {item.name: getattr(self.config.encoder_stack, item.name) for item in fields(LanguageModelConfig)}
        given |= {"vocab_size": self.config.vocab_size, "embed_scale": self.config.embed_scale}
        with weightless():
            alone = Encoder(EncoderConfig(**given, token_types=0))
        whole = self.state_dict(keep_vars=True)
        own = {name: whole.get(f"encoder.{name}", whole.get(name)) for name in alone.state_dict()}
        alone.load_state_dict(own, assign=True)
        alone.tokenizer = self.tokenizer
        alone.name = f"{self.name} (encoder)"
        named = f"{self.architecture}-encoder"  # registered for T5; without, no random twin can be built
        alone.architecture = named if named in ENCODERS else "unknown"
        alone.origin = self.origin
        return alone.train(self.training)

    def encode(self, source: Any, mask: Tensor | None = None) -> Source:
        """Read a source: what several calls can then be given as `facts["source"]`.

        Args:
            source: token ids [batch, source] or [source], or text. mask: True at real tokens, [batch, source] (padding on either side).

        Raises:
            ValueError: tokens out of the vocabulary, a mask of another shape, a sequence that is nothing but padding.
        """
        tokens = self.to_tokens(source)
        context = self._context(tokens, mask, None, False, False)
        self._check_vocabulary(tokens)
        if context.mask is not None and not bool(context.mask.any(1).all()):
            raise ValueError("A source is nothing but padding. Expected at least one real token in each.")
        outer = ACTIVE.step, ACTIVE.offset
        ACTIVE.step, ACTIVE.offset = 0, 0
        try:
            return Source(self.encoder(self._looked_up(tokens), context), context.mask)
        finally:
            ACTIVE.step, ACTIVE.offset = outer

    def _looked_up(self, tokens: Tensor) -> Tensor:
        embedded: Tensor = self.embed(tokens)
        return embedded if self.embed_scale == 1.0 else embedded * self.embed_scale

    def with_source(self, source: Any, mask: Tensor | None = None) -> "EncoderDecoder":
        """This model, the same weights and hook points, reading this source in every call that names none."""
        twin = copy.copy(self)
        twin.bound = source if isinstance(source, Source) else (self.to_tokens(source), mask)
        return twin

    def bound_source(self) -> tuple[list[int] | None, int]:
        """What calls that name no source read: the token ids of its one sequence (None if it was bound as read already), and how many
        tokens it has.

        Raises:
            ValueError: no source, or a batch of them.
        """
        given = self.bound if self.bound is not None else self.config.source
        if given is None:
            raise ValueError(f"{self.name} reads a source besides the text. Expected model.with_source(...).")
        if isinstance(given, Source):
            sequences, count, ids = given.stream.shape[0], given.stream.shape[1], None
        else:
            tokens = given[0] if isinstance(given[0], Tensor) else torch.tensor(given)[None]
            sequences, count, ids = tokens.shape[0], tokens.shape[1], tokens[0].tolist()
        if sequences != 1:
            raise ValueError(f"The model is bound to a batch of {sequences} sources. Expected one.")
        return ids, count

    def _source(self, facts: dict[str, Any], batch: int) -> Source:
        """The source of a call, read now (once for each of the batch's texts) unless it was before; takes what names it from the facts."""
        source, mask = facts.pop("source", None), facts.pop("source_mask", None)
        if source is None:
            if mask is not None:
                raise ValueError("facts['source_mask'] came without facts['source']. Expected both.")
            given = self.bound if self.bound is not None else self.config.source
            if given is None:
                raise ValueError(
                    "This model reads a source besides the text. Expected facts={'source': ids or text}, or model.with_source(...)."
                )
            source, mask = given if isinstance(given, tuple) and self.bound is not None else (given, None)
        if isinstance(source, Source):
            if mask is not None:
                raise ValueError("facts['source'] was read already, with its mask. Expected no facts['source_mask'].")
            return source
        ids = self.to_tokens(torch.tensor(source, device=self.device) if isinstance(source, tuple) else source)
        if ids.shape[0] == 1 < batch:
            ids, mask = ids.expand(batch, -1), None if mask is None else mask.expand(batch, -1)
        return self.encode(ids, mask)

    def forward(
        self, tokens: Any, *, state: ModelState | None = None, facts: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        """As for `Decoder.forward`, on the text; the source is among the facts.

        Raises:
            ValueError: no source, one of another batch, one besides a state (which carries its own), and as for `Decoder.forward`.
        """
        known = dict(facts or {})
        tokens = self.to_tokens(tokens) if kwargs.get("start_at_layer") is None else tokens
        if state is None:
            known["source"] = self._source(known, tokens.shape[0])
        elif "source" in known or "source_mask" in known:
            raise ValueError("The state carries its source. Expected a call with state and without facts['source'].")
        return super().forward(tokens, state=state, facts=known, **kwargs)

    def _context(
        self, tokens: Tensor, mask: Tensor | None, state: ModelState | None, keep: bool, residual: bool
    ) -> Context:
        context = super()._context(tokens, mask, state, keep, residual)
        context.asked.add("source")  # a run that stops before the first cross-attention read it all the same
        return context

    def start_tokens(self, batch: int = 1) -> Tensor:
        """The token that begins every text, [batch, 1]."""
        return torch.full((batch, 1), self.config.start, device=self.device)

    def generate(
        self,
        tokens: Any = None,
        max_new_tokens: int = 32,
        *,
        source: Any = None,
        source_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """As for `Decoder.generate`.

        Args:
            tokens: how the texts begin, [batch, pos]; None: with the start token, one text per source.
            source, source_mask: what is read, as in `encode`; None: what the model is bound to.
        """
        model = self if source is None else self.with_source(source, source_mask)
        if source is None and source_mask is not None:
            raise ValueError("source_mask came without a source. Expected both.")
        if tokens is None:
            given = model.bound
            read = 1 if given is None else given.stream if isinstance(given, Source) else given[0]
            tokens = self.start_tokens(1 if isinstance(read, int) else read.shape[0])
        return super(EncoderDecoder, model).generate(tokens, max_new_tokens, **options)
