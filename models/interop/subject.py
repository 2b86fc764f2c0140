"""Any transformers model whose attention goes through its attention interface, as a subject of our hooks and probes.

    subject = hooked(AutoModelForCausalLM.from_pretrained(...), tokenizer)
    subject.patterns(tokens);  subject.run_with_hooks(tokens, hooks=[Ablate("blocks.1.attn.hook_z", heads=[2])])

transformers lets a model look up its attention function by name (`AttentionInterface`). Ours computes what its eager attention does, past
hook points of the usual names:

    blocks.{l}.hook_resid_pre, blocks.{l}.hook_resid_post      what enters and leaves the model's own block (its norms included)
    blocks.{l}.attn.hook_q, hook_k (hook_rot_q, hook_rot_k where positions rotate them), hook_v
    blocks.{l}.attn.hook_attn_scores, hook_pattern, hook_z

The modelling code stays theirs, and some of it never asks the interface: setting an implementation there changes nothing and warns at
most. So it is counted: every layer must call exactly once in every run, or the run is an error. When a model is wrapped, its output is
compared with its eager attention's; one that does something else between scores and pattern is refused.

For states, steps over shared depth, layers without attention and everything inside a block, open the checkpoint on our own modules
instead: `models.load(folder)` (docs/pretrained.md).
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from models.decoder import Decoder, next_token_loss
from models.interop.acceptance import CONVERT, NotASubject, accepted, layer_places
from models.interop.attention_interface import NAME, LayerCall, Listener, entered, implement, running
from models.interop.points import SubjectBlock, SubjectMixer
from models.pretrained.tokenizer import PretrainedTokenizer
from workbench.instrument.hook_points import ACTIVE

SAME = 1e-4  # largest difference from eager attention, over the largest number of the output, in any dtype but 16 bit


def hooked(model: Any, tokenizer: Any = None) -> "TransformersSubject":
    """Wrap a transformers model. It is put into evaluation mode, and its attention implementation becomes `"workbench"`.

    Args:
        model: a `PreTrainedModel` on any device, or TransformerLens's `TransformerBridge` of one: its parameters in the modules that it
            was made of, since a bridge computes attention itself; the bridge goes on as it is. tokenizer: a fast tokenizer of
            transformers, for texts.

    Raises:
        NotASubject: no transformers model; an encoder-decoder; layers that never ask the attention interface, ask it more than once,
        or have no attention; an attention that computes something else than the interface tells.
    """
    return TransformersSubject(model, tokenizer)


class _Stopped(Exception):
    """The stream of a run that was to stop here."""

    def __init__(self, stream: Tensor) -> None:
        self.stream = stream


class TransformersSubject(Decoder):
    """See the module docstring and `hooked`. Called like every model.

    Of models that read in both directions, or whose output is not a distribution over tokens, `"logits"` are what their head gives,
    [batch, pos, vocab] for masked tokens, or else the last hidden state; they have no next-token loss and do not generate.
    """

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        super().__init__()
        theirs = accepted(model)
        self.theirs = theirs.eval()
        config = theirs.config.get_text_config()
        self.vocab_size, self.d_model = int(config.vocab_size), int(config.hidden_size)
        self.n_ctx = _positions(theirs, getattr(config, "max_position_embeddings", None))
        self.name = getattr(config, "name_or_path", "") or f"{config.model_type} of transformers"
        self.architecture = f"transformers:{config.model_type}"
        self._takes = set(inspect.signature(theirs.forward).parameters)
        self._by_module: dict[int, SubjectMixer] = {}
        if tokenizer is not None:
            backend = getattr(tokenizer, "backend_tokenizer", None)
            if backend is None:
                raise NotASubject(
                    f"{type(tokenizer).__name__} is no fast tokenizer. Expected one, or token ids instead of texts."
                )
            self.tokenizer = PretrainedTokenizer(backend, self.name, self.vocab_size)
        self.origin = {"family": "attention", "paper": None, "provenance": "pretrained"}
        before = theirs.config._attn_implementation
        try:
            self._build()
        except BaseException:
            implement(theirs, before)
            raise
        self.name_hook_points()

    # ------------------------------------------------------------------------------------------------ building

    @torch.no_grad()
    def _build(self) -> None:
        """Learn from one run which modules attend, with what sizes; and from a second that ours computes the same."""
        tokens = (torch.arange(6, device=self.device) * 7 % self.vocab_size)[None]
        self.causal = True
        implement(self.theirs, "eager")
        expected = self._call(tokens, None)
        implement(self.theirs, NAME)
        seen: list[LayerCall] = []
        with entered(Listener(seen)):
            self._call(tokens, None)
        kind = type(self.theirs).__name__
        places = layer_places(self.theirs, [one.module for one in seen])
        self.causal = all(one.causal for one in seen)
        rotates = any("rotary" in type(module).__name__.lower() for module in self.theirs.modules())
        self.blocks = nn.ModuleList(SubjectBlock(SubjectMixer(one, rotates)) for one in seen)
        for layer, one in enumerate(seen):
            self._by_module[id(one.module)] = self.blocks[layer].attn
            self._watch(layer, self.theirs.get_submodule(places[layer]))
        found_output = self._call(tokens, None, True)
        if (found_output - expected).abs().max() > SAME * expected.abs().max() and expected.dtype not in (
            torch.float16,
            torch.bfloat16,
        ):
            raise NotASubject(
                f"{kind} does more between scores and pattern than it tells the attention interface. {CONVERT}"
            )
        over_tokens = expected.dim() == 3 and expected.shape[-1] == self.vocab_size and self._has_head()
        self.predicts_next_token = over_tokens and self.causal
        self.predicts_masked_tokens = over_tokens and not self.causal

    def _has_head(self) -> bool:
        return self.theirs.get_output_embeddings() is not None

    def _watch(self, layer: int, module: nn.Module) -> None:
        """Pass the stream by the hook points where a block of theirs begins and ends."""

        def mine() -> bool:
            return getattr(running, "subject", None) is self

        def before(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
            if not mine():
                return None
            if running.stop == layer:
                raise _Stopped(given[0] if given else named["hidden_states"])
            if given:
                return (self.blocks[layer].hook_resid_pre(given[0]), *given[1:]), named
            return given, named | {"hidden_states": self.blocks[layer].hook_resid_pre(named["hidden_states"])}

        def after(module: nn.Module, given: tuple[Any, ...], output: Any) -> Any:
            if not mine():
                return None
            stream = self.blocks[layer].hook_resid_post(output if isinstance(output, Tensor) else output[0])
            if running.stop == layer + 1:
                raise _Stopped(stream)
            return stream if isinstance(output, Tensor) else (stream, *output[1:])

        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after)

    @property
    def mixers(self) -> list[Any]:
        """What is known of each layer's attention."""
        return [block.attn for block in self.blocks]

    # ------------------------------------------------------------------------------------------------ running

    def forward(  # type: ignore[override]
        self,
        tokens: Any,
        *,
        mask: Tensor | None = None,
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        stop_at_layer: int | None = None,
        **others: Any,
    ) -> Any:
        """As `Decoder.forward`, without states, facts and a start in the middle.

        Raises:
            ValueError: tokens out of the vocabulary or too long, a mask of a wrong shape, an option that only our own modules have, a loss
                of a model that predicts no next token.
            NotASubject: a layer did not ask the attention interface exactly once.
        """
        wanted = sorted(name for name, value in others.items() if value not in (None, False))
        if wanted:
            raise ValueError(f"{wanted[0]} needs the inside of the model, which is transformers' here. {CONVERT}")
        if return_type not in ("logits", "loss", "both", None):
            raise ValueError(f"Unknown return_type {return_type!r}. Expected 'logits', 'loss', 'both' or None.")
        if return_type in ("loss", "both") and not self.predicts_next_token:
            raise ValueError(
                f"return_type={return_type!r}: {self.name} predicts no next token. Expected 'logits' or None."
            )
        stop = None if stop_at_layer is None else self._layer_range(None, stop_at_layer)[1]
        tokens = self.to_tokens(tokens).to(self.device)
        self._check_vocabulary(tokens)
        if mask is not None:
            if mask.shape != tokens.shape:
                raise ValueError(f"mask has shape {tuple(mask.shape)}; expected [batch, pos] = {tuple(tokens.shape)}.")
            mask = mask.to(device=self.device, dtype=torch.bool)
        self._check_length(tokens.shape[1] if mask is None else int(mask.sum(1).max()))
        outer = ACTIVE.step, ACTIVE.offset
        ACTIVE.step, ACTIVE.offset = 0, 0
        try:
            output = self._call(tokens, mask, True, stop)
        finally:
            ACTIVE.step, ACTIVE.offset = outer
        if stop is not None:
            return output
        if return_type in ("logits", None):
            return output if return_type else None
        loss = next_token_loss(output, tokens, mask, per_token=loss_per_token)
        return loss if return_type == "loss" else (output, loss)

    def _call(self, tokens: Tensor, mask: Tensor | None, counted: bool = False, stop: int | None = None) -> Tensor:
        """Their output, or the stream that enters layer `stop`; `counted`: past our hook points."""
        given: dict[str, Any] = {"input_ids": tokens}
        if mask is not None:
            given["attention_mask"] = mask.long()
            if self.causal and "position_ids" in self._takes:
                given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        if "use_cache" in self._takes or "kwargs" in self._takes:
            given["use_cache"] = False
        if not counted:
            return _numbers(self.theirs(**given), type(self.theirs).__name__)
        if self.theirs.config._attn_implementation != NAME:  # somebody chose another one meanwhile
            implement(self.theirs, NAME)
        with entered(self, stop) as calls:
            try:
                output = _numbers(self.theirs(**given), type(self.theirs).__name__)
            except _Stopped as stopped:
                output = stopped.stream
        for layer, mixer in enumerate(self.mixers[:stop]):
            if calls.count(id(mixer)) != 1:
                raise NotASubject(
                    f"Layer {layer} of {type(self.theirs).__name__} asked the attention interface {calls.count(id(mixer))} times in this "
                    f"run, once was expected: hooks there would not do what they say. {CONVERT}"
                )
        return output

    def asked(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
        extra: Mapping[str, Any],
    ) -> Any:
        """Attend for a module of theirs, past the hook points of its layer."""
        mixer = self._by_module.get(id(module))
        if mixer is None:
            raise NotASubject(f"{type(module).__name__} attends, but did not when the model was wrapped. {CONVERT}")
        running.calls.append(id(mixer))
        return mixer.attend(query, key, value, mask, extra)

    def generate(self, tokens: Any, max_new_tokens: int = 32, *, use_state: bool = False, **options: Any) -> Tensor:
        """As `Decoder.generate`, re-reading the whole text at every step.

        Raises:
            ValueError: `use_state`, as no state is carried here; a model that predicts no next token.
        """
        if not self.predicts_next_token:
            raise ValueError(f"{self.name} predicts no next token, so it cannot generate.")
        if use_state:
            raise ValueError(f"A transformers model carries no state of ours. Expected use_state=False. {CONVERT}")
        return super().generate(tokens, max_new_tokens, use_state=False, **options)

    def unembed_residual(self, x: Tensor) -> Tensor:
        """Refused: what lies between the stream and the logits is theirs."""
        raise ValueError(
            f"Reading the stream as logits needs the inside of the model, which is transformers' here. {CONVERT}"
        )

    # ------------------------------------------------------------------------------------------------- facts

    @property
    def W_E(self) -> Tensor:
        """[vocab, d_model]."""
        return self.theirs.get_input_embeddings().weight

    @property
    def W_U(self) -> Tensor:
        """[d_model, vocab]; refused for models without an unembedding."""
        head = self.theirs.get_output_embeddings()
        if head is None:
            raise ValueError(f"{type(self.theirs).__name__} has no unembedding, hence no W_U.")
        return head.weight.T

    def about(self) -> dict[str, Any]:
        """What run manifests record of a model."""
        return {
            **self.origin,
            "parameters": self.n_parameters(),
            "blocks": [],
            "config": self.theirs.config.to_dict(),
            "weights_sha256": self.weights_sha256(),
        }


def _positions(theirs: Any, told: int | None) -> int | None:
    """How many tokens fit; RoBERTa's table of positions holds more rows, which come before and at its padding token's."""
    for name, module in theirs.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1
    return told


def _numbers(output: Any, kind: str) -> Tensor:
    """Logits of a model's output, of one without a head its last hidden state."""
    for name in ("logits", "last_hidden_state"):
        if isinstance(output.get(name), Tensor):
            return output[name]  # type: ignore[no-any-return]
    raise NotASubject(f"{kind} returns {', '.join(output)}. Expected logits or a last_hidden_state.")
