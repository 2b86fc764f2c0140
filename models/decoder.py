"""`Decoder`: what every left-to-right language model here does — embed → blocks → unembed — with state, padding, loss and generation.

An architecture supplies `embed`, `blocks` (modules called as `block(x, context, carried) -> (x, carried)`) and `unembed`; everything else
(hooks, caches, start/stop layers, stateful steps, batches with padding) comes from here and is therefore the same everywhere. Texts become
tokens in `models.text_input`; `models.generation` goes on from them.
"""

import hashlib
from collections.abc import Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.configs import config_to_json
from models.context import Context
from models.generation import Generation
from models.text_input import TextInput
from workbench.instrument.errors import suggestion
from workbench.instrument.hook_points import ACTIVE
from workbench.instrument.hooked_model import HookedModel
from workbench.instrument.states import ModelState
from workbench.lab.tokenizers import ByteTokenizer

RETURN_TYPES = ("logits", "loss", "both")


class Decoder(TextInput, Generation, HookedModel):
    """Base of the decoder-only models. Subclasses set `vocab_size`, `n_ctx` (None: unlimited), `blocks`, `loops`, `tokenizer`, `name`."""

    blocks: Any  # nn.ModuleList; torch's type does not say what the blocks are
    vocab_size: int
    d_model: int
    n_ctx: int | None = None
    loops: int = 1
    stream_is_all: bool = True  # False: layers hand on more than the residual stream, so no run can begin between them
    reads_tokens: bool = (
        False  # True: some layer looks at the tokens themselves, which a run from a residual stream must be told
    )
    predicts_from_one_token: bool = True  # False: nothing is read at position 0, whose logits are always the same
    name: str = "unnamed"
    architecture: str = "unknown"
    tokenizer: Any = None
    config: Any = None
    card: dict[str, Any] | None = None
    origin: Mapping[str, Any] = MappingProxyType({"family": "unknown", "paper": None, "provenance": "random"})

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def visits(self) -> tuple[tuple[int, int], ...]:
        """(layer, how often it ran before) in the order in which blocks run; see `models.wiring`."""
        wiring = getattr(self, "wiring", None)
        if wiring is not None:
            return wiring.visits  # type: ignore[no-any-return]
        return tuple((layer, step) for step in range(self.loops) for layer in range(self.n_layers))

    def embed_tokens(self, tokens: Tensor, context: Context) -> Tensor:
        """Token ids [batch, pos] to the first residual stream [batch, pos, d_model]."""
        raise TypeError(f"{type(self).__name__} does not say how it embeds tokens")

    def unembed_residual(self, x: Tensor) -> Tensor:
        """The last residual stream [batch, pos, d_model] to logits [batch, pos, vocab]."""
        raise TypeError(f"{type(self).__name__} does not say how it makes logits")

    # ------------------------------------------------------------------ running

    def forward(
        self,
        tokens: Any,
        *,
        mask: Tensor | None = None,
        state: ModelState | None = None,
        return_state: bool = False,
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the model.

        Args:
            tokens: ids [batch, pos] or [pos], or text if the model has a tokenizer; with `start_at_layer`, the residual stream
                [batch, pos, d_model] that enters that layer.
            mask: True at real tokens, [batch, pos], for left- or right-padded batches. None: no padding.
            state: what an earlier call handed on (`return_state=True`); the tokens continue it.
            return_type: `"logits"` [batch, pos, vocab], `"loss"` (mean next-token cross-entropy in nats over real targets),
                `"both"`, or None.
            loss_per_token: give the loss as [batch, pos - 1].
            start_at_layer, stop_at_layer: run only blocks start ≤ l < stop; stopping returns the residual stream that enters `stop`.
            facts: what else some layers ask for, by name: `"positions"`, positions of all tokens read so far and now, [batch or 1, key],
                whole numbers or not (instead of counting); `"token_ids"` for layers that look at them, with `start_at_layer`; others as
                the model's parts say.

        Returns:
            As `return_type` says; with `return_state`, a pair of that and the `ModelState` to continue from.

        Raises:
            ValueError: tokens out of the vocabulary, too long for n_ctx, mask of a wrong shape, a state of another model or batch,
                unknown return_type, a loss of fewer than two tokens, facts that no layer asks for.
        """
        if return_type not in (*RETURN_TYPES, None):
            raise ValueError(
                f"Unknown return_type {return_type!r}.{suggestion(str(return_type), RETURN_TYPES)} Expected one of {RETURN_TYPES}."
            )
        if return_state and not (start_at_layer is None and stop_at_layer is None):
            raise ValueError("return_state needs all layers to run: leave out start_at_layer and stop_at_layer.")
        if start_at_layer is None:
            tokens = self.to_tokens(tokens)
        context = self._context(tokens, mask, state, return_state, start_at_layer is not None)
        if start_at_layer is None:
            context.token_ids = tokens
        if facts:
            _add_facts(context, facts)
        start, stop = self._layer_range(start_at_layer, stop_at_layer)
        outer = ACTIVE.step, ACTIVE.offset  # of the run from whose hook this one is called, if any
        ACTIVE.step, ACTIVE.offset = 0, context.offset
        try:
            x = tokens if start_at_layer is not None else self._embedded(tokens, context)
            x, carried_out = self._through_blocks(x, context, state, start, None if stop_at_layer is None else stop)
            output = x if stop_at_layer is not None else self._output(x, tokens, mask, return_type, loss_per_token)
        finally:
            ACTIVE.step, ACTIVE.offset = outer
        if facts and set(facts) - context.asked:
            unused = sorted(set(facts) - context.asked)[0]
            known = sorted(context.asked)
            raise ValueError(
                f"No layer asked for the fact {unused!r}.{suggestion(unused, known)} This run asked for: {', '.join(known)}."
            )
        if not return_state:
            return output
        lengths = None if context.key_mask is None else context.key_mask.sum(1)
        return output, ModelState(context.offset + x.shape[1], carried_out, context.key_mask, lengths)

    def _through_blocks(
        self, x: Tensor, context: Context, state: ModelState | None, start: int, stop: int | None
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """The first residual stream [batch, pos, d_model] to the last, or to that which enters `stop`; and what each visit carries on."""
        carried_out: list[dict[str, Tensor]] = []
        blocks, wiring = list(self.blocks), getattr(self, "wiring", None)
        mixers = [] if state is None else self.mixers
        last = len(blocks) if stop is None else stop
        notes = None if wiring is None else wiring.begin(x, context)
        for number, (layer, step) in enumerate(self.visits):
            if not start <= layer < last:
                continue
            ACTIVE.step = step
            if wiring is not None:
                x = wiring.entering(layer, step, x, notes)
            here, carried = context, None if state is None else state.layers[number]
            if carried is not None and not carried and mixers[layer].slots:  # `ModelState.without` this layer
                here, carried = context.knowing(0), None
            x, out = blocks[layer](x, here, carried)
            carried_out.append(out)
            if wiring is not None:
                x = wiring.leaving(layer, step, x, notes)
        ACTIVE.step = 0
        if wiring is not None and stop is None:
            x = wiring.result(x, notes)
        return x, carried_out

    def _embedded(self, tokens: Tensor, context: Context) -> Tensor:
        try:
            return self.embed_tokens(tokens, context)
        except IndexError:
            self._check_vocabulary(tokens)
            raise

    def _output(
        self, x: Tensor, tokens: Tensor, mask: Tensor | None, return_type: str | None, loss_per_token: bool
    ) -> Any:
        logits = self.unembed_residual(x)
        if return_type == "logits":
            return logits
        if return_type is None:
            return None
        if tokens.is_floating_point():
            raise ValueError(
                "With start_at_layer the model sees no tokens, so it cannot give a loss. Expected return_type='logits'."
            )
        loss = next_token_loss(logits, tokens, mask, per_token=loss_per_token)
        return loss if return_type == "loss" else (logits, loss)

    def _context(
        self, tokens: Tensor, mask: Tensor | None, state: ModelState | None, keep: bool, residual: bool
    ) -> Context:
        batch, length = tokens.shape[:2]
        offset = 0 if state is None else state.position
        if length == 0:
            raise ValueError("The input holds no tokens. Expected at least one.")
        if tokens.device.type != "cpu" and not residual and not torch.compiler.is_compiling():
            self._check_vocabulary(tokens)  # beforehand, because a faulty look-up on an accelerator ends the process
        if state is not None:
            self._check_state(state, batch, keep)
        if residual and (tokens.dim() != 3 or tokens.shape[-1] != self.d_model):
            raise ValueError(
                f"start_at_layer expects a residual stream [batch, pos, d_model={self.d_model}]; got {tuple(tokens.shape)}."
            )
        if mask is not None:
            if mask.shape != (batch, length):
                raise ValueError(f"mask has shape {tuple(mask.shape)}; expected [batch, pos] = {(batch, length)}.")
            mask = mask.to(device=tokens.device, dtype=torch.bool)
            if not torch.compiler.is_compiling() and bool(mask.all()):
                mask = None
        earlier = None if state is None else state.mask
        if mask is None and earlier is None:
            keys = torch.arange(offset + length, device=tokens.device).unsqueeze(0)
            self._check_length(offset + length)
            return Context(keys[:, offset:] if offset else keys, keys, None, None, offset, keep)
        now = mask if mask is not None else torch.ones(batch, length, dtype=torch.bool, device=tokens.device)
        before = earlier if earlier is not None else torch.ones(batch, offset, dtype=torch.bool, device=tokens.device)
        key_mask = torch.cat([before, now], dim=1)
        key_positions = (key_mask.cumsum(1) - 1).clamp(min=0)
        self._check_length(int(key_mask.sum(1).max()))
        return Context(key_positions[:, offset:], key_positions, now, key_mask, offset, keep)

    def _check_vocabulary(self, tokens: Tensor) -> None:
        least, most = int(tokens.min()), int(tokens.max())
        if least < 0 or most >= self.vocab_size:
            raise ValueError(
                f"Token ids must lie in 0..{self.vocab_size - 1}; got {least}..{most}. Was another tokenizer used?"
            )

    def _check_state(self, state: ModelState, batch: int, keep: bool) -> None:
        """A state of another model or batch would be read as something that it is not."""
        mixers = self.mixers
        expected = [mixers[layer] for layer, _ in self.visits]
        if len(state.layers) != len(expected):
            raise ValueError(
                f"The state has {len(state.layers)} layers; this model has {len(expected)}. A state continues the model that made it."
            )
        for number, (slots, mixer) in enumerate(zip(state.layers, expected, strict=True)):
            if not slots and mixer.slots:
                if keep:
                    raise ValueError(
                        f"The state is without layer {number}, which would hand on fewer tokens than the others. Expected one call without "
                        "return_state, or a state with slots `replaced`."
                    )
            elif set(slots) != set(mixer.slots):
                raise ValueError(
                    f"The state of layer {number} holds {', '.join(map(repr, slots)) or 'nothing'}; expected "
                    f"{', '.join(map(repr, mixer.slots))}. A state continues the model that made it."
                )
            for name, value in slots.items():
                if value.shape[0] != batch:
                    raise ValueError(
                        f"The state holds a batch of {value.shape[0]}; the tokens are a batch of {batch} (slot {name!r} of layer {number})."
                    )

    def _check_length(self, length: int) -> None:
        if self.n_ctx is not None and length > self.n_ctx:
            raise ValueError(
                f"{length} tokens are more than this model's context of {self.n_ctx} (its position embedding ends there). "
                "Expected a shorter input, or a model with rope, alibi or a recurrent state."
            )

    def _layer_range(self, start: int | None, stop: int | None) -> tuple[int, int]:
        if (start is not None or stop is not None) and self.loops > 1:
            raise ValueError(
                "start_at_layer and stop_at_layer are ambiguous on a model that repeats its blocks; hook 'name@step' instead."
            )
        first = 0 if start is None else start + self.n_layers if start < 0 else start
        last = self.n_layers if stop is None else stop + self.n_layers if stop < 0 else stop
        if not 0 <= first <= last <= self.n_layers:
            raise ValueError(
                f"start_at_layer={start}, stop_at_layer={stop} is no range within layers 0..{self.n_layers}."
            )
        if first and start is not None and not self.stream_is_all:
            raise ValueError(
                f"start_at_layer={start}: the layers of this model hand on more than the residual stream, which alone does not determine "
                "the rest. Expected a run from the tokens, or start_at_layer=0."
            )
        return first, last

    # -------------------------------------------------------------- what it is

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.parameters()).device

    def about(self) -> dict[str, Any]:
        """What run manifests record of a model: where it comes from, what it is made of, its configuration and a hash of its weights."""
        return {
            **self.origin,
            "parameters": self.n_parameters(),
            "config": config_to_json(self.config),
            "weights_sha256": self.weights_sha256(),
        }

    def weights_sha256(self) -> str:
        """A hash of all weights by name, shape, dtype and value."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().double().numpy().tobytes())
        return digest.hexdigest()

    def n_parameters(self) -> int:
        """Number of trainable numbers."""
        return sum(p.numel() for p in self.parameters())

    def set_mode(self, mode: str) -> None:
        """Run every linear mixer as `"chunked"` (default), `"parallel"` or `"recurrent"`; the logits are the same."""
        cores = [module for module in self.modules() if hasattr(module, "mode")]
        if not cores:
            raise ValueError("This model has no linear mixer, so there are no execution modes to choose from.")
        if mode not in ("chunked", "parallel", "recurrent"):
            raise ValueError(f"Unknown mode {mode!r}.{suggestion(mode, ('chunked', 'parallel', 'recurrent'))}")
        for core in cores:
            core.mode = mode  # type: ignore[assignment]

    # ---------------------------------------- TransformerLens's view of a model

    @property
    def cfg(self) -> SimpleNamespace:
        """The configuration under TransformerLens's attribute names (read-only view)."""
        return SimpleNamespace(**self.transformer_lens_config())

    def transformer_lens_config(self) -> dict[str, Any]:
        """Attributes that TransformerLens utilities read. Architectures add what they know."""
        parameter = next(self.parameters())
        return {
            "model_name": self.name,
            "n_layers": self.n_layers,
            "d_model": self.d_model,
            "d_vocab": self.vocab_size,
            "d_vocab_out": self.vocab_size,
            "n_ctx": self.n_ctx or 2**20,
            "device": parameter.device,
            "dtype": parameter.dtype,
            "attn_only": False,
            "parallel_attn_mlp": False,
            "normalization_type": None,
            "positional_embedding_type": None,
            "default_prepend_bos": False,
            "tokenizer_prepends_bos": False,
            "use_hook_mlp_in": self.switches.get("use_hook_mlp_in", False),
            "use_attn_result": self.switches.get("use_attn_result", False),
            "use_attn_in": self.switches.get("use_attn_in", False),
            "use_split_qkv_input": self.switches.get("use_split_qkv_input", False),
        }

    def __repr__(self) -> str:
        return (
            f"{self.name} ({self.architecture}): {self.n_layers} layers, d_model {self.d_model}, {self.n_parameters():,} parameters, "
            f"{len(self.hook_points.points)} hook points"
        )


def _add_facts(context: Context, facts: Mapping[str, Any]) -> None:
    """Put what the caller says where the layers look for it."""
    context.facts = facts
    positions = context.fact("positions")
    if positions is not None:
        known = context.key_positions.shape[1]
        if positions.dim() != 2 or positions.shape[1] != known:
            raise ValueError(
                f"facts['positions'] has shape {tuple(positions.shape)}; expected [batch or 1, key] with key = {known}, all tokens read so "
                "far and now."
            )
        context.key_positions = positions.to(context.key_positions.device)
        context.positions = context.key_positions[:, context.offset :]
    token_ids = context.fact("token_ids") if context.token_ids is None else None
    if token_ids is not None:
        context.token_ids = token_ids


def next_token_loss(logits: Tensor, tokens: Tensor, mask: Tensor | None = None, per_token: bool = False) -> Tensor:
    """Cross-entropy in nats of each next token. logits [batch, pos, vocab], tokens [batch, pos] -> scalar, or [batch, pos - 1].

    With a mask, targets that are padding, or that follow padding, do not count; the mean over none is nan.

    Raises:
        ValueError: fewer than two tokens.
    """
    if tokens.shape[1] < 2:
        raise ValueError(f"A loss needs at least two tokens, got {tokens.shape[1]}: the first one predicts the second.")
    loss = F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    if mask is None:
        return loss if per_token else loss.mean()
    mask = mask.to(device=loss.device, dtype=torch.bool)
    real = (mask[:, 1:] & mask[:, :-1]).to(loss)
    return loss * real if per_token else (loss * real).sum() / real.sum()


def default_tokenizer(vocab_size: int) -> ByteTokenizer | None:
    """Models over 256 symbols read bytes; others bring a tokenizer or take ids only."""
    return ByteTokenizer() if vocab_size == 256 else None
