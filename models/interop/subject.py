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

For states, steps over shared depth, layers without attention, stop_at_layer and everything inside a block, open the checkpoint on our own
modules instead: `models.load(folder)` (docs/pretrained.md).
"""

import copy
import inspect
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from models.decoder import Decoder, next_token_loss
from models.pretrained.tokenizer import PretrainedTokenizer
from workbench.instrument.hook_points import ACTIVE, HookPoint
from workbench.instrument.patterns import PatternMeta

NAME = "workbench"
SAME = 1e-4  # largest difference from eager attention, over the largest number of the output, in any dtype but 16 bit
CONVERT = "Open the checkpoint on our own modules instead: models.load(folder)."
_running = threading.local()


class NotASubject(ValueError):
    """A transformers model that the attention interface does not reach, or does not describe."""


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


class SubjectMixer(nn.Module):
    """The hook points of one layer's attention, and what is known of it."""

    slots: tuple[str, ...] = ()
    reads_source = False

    def __init__(self, seen: "_Seen", rotates: bool) -> None:
        super().__init__()
        self.n_heads, self.n_kv, self.d_head, self.scale = seen.n_heads, seen.n_kv, seen.d_head, seen.scale
        key_head = "head" if self.n_kv == self.n_heads else "kv_head"
        width = "d_head" if seen.d_value == seen.d_head else "d_value"
        query, key = HookPoint("query", "batch pos head d_head"), HookPoint("key", f"batch pos {key_head} d_head")
        if rotates:
            query.role, key.role = "rotated_query", "rotated_key"
            self.hook_rot_q, self.hook_rot_k = query, key
        else:
            self.hook_q, self.hook_k = query, key
        self.rotates = rotates
        self.hook_v = HookPoint("value", f"batch pos {key_head} {width}")
        self.hook_attn_scores = HookPoint("scores", "batch head query key")
        meta = PatternMeta(causal="inclusive" if seen.causal else "none")
        self.hook_pattern = HookPoint("pattern", "batch head query key", meta=meta)
        self.hook_z = HookPoint("z", f"batch pos head {width}")

    @property
    def factor_points(self) -> dict[str, HookPoint]:
        """The values only: what is added to scores, theirs alone know."""
        return {"value": self.hook_v}

    def constant_factors(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def describe(self) -> dict[str, Any]:
        """The layer record of a run manifest."""
        return {
            "kind": "attention", "form": "dense", "n_heads": self.n_heads, "n_key_heads": self.n_kv,
            "n_value_heads": self.n_kv, "scale": self.scale, "strict": False, "alibi_slopes": None, "window": None,
            "pattern": self.hook_pattern.meta.as_dict(), "state": None, "signals": [],
        }  # fmt: skip

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, extra: Mapping[str, Any]) -> Any:
        """Query [batch, head, pos, d_head], key and value [batch, kv_head, key, ...] -> z [batch, pos, head, d_value] and the pattern."""
        ask, meet = (self.hook_rot_q, self.hook_rot_k) if self.rotates else (self.hook_q, self.hook_k)
        query, key, value = (
            point(x.transpose(1, 2)).transpose(1, 2) for point, x in ((ask, query), (meet, key), (self.hook_v, value))
        )
        return _attend(
            query, key, value, mask, self.scale, extra, self.hook_attn_scores, self.hook_pattern, self.hook_z
        )


class SubjectBlock(nn.Module):
    """The hook points of one block."""

    def __init__(self, attn: SubjectMixer) -> None:
        super().__init__()
        self.attn = attn
        self.hook_resid_pre = HookPoint("resid", "batch pos d_model")
        self.hook_resid_post = HookPoint("resid_post", "batch pos d_model")


class TransformersSubject(Decoder):
    """See the module docstring and `hooked`. Called like every model; encoders return their last hidden state as `"logits"`."""

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        super().__init__()
        theirs = _checked(model)
        self.theirs = theirs.eval()
        config = theirs.config.get_text_config()
        self.vocab_size, self.d_model = int(config.vocab_size), int(config.hidden_size)
        self.n_ctx = getattr(config, "max_position_embeddings", None)
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
            _implement(theirs, before)
            raise
        self.name_hook_points()

    # ------------------------------------------------------------------------------------------------ building

    @torch.no_grad()
    def _build(self) -> None:
        """Learn from one run which modules attend, with what sizes; and from a second that ours computes the same."""
        tokens = (torch.arange(6, device=self.device) * 7 % self.vocab_size)[None]
        self.causal = True
        _implement(self.theirs, "eager")
        expected = self._call(tokens, None)
        _implement(self.theirs, NAME)
        seen: list[_Seen] = []
        with _entered(_Listener(seen)):
            self._call(tokens, None)
        kind = type(self.theirs).__name__
        if not seen:
            raise NotASubject(
                f"{kind} never asks transformers' attention interface, so that nothing attached there would do anything. {CONVERT}"
            )
        names = {id(module): name for name, module in self.theirs.named_modules()}
        places: dict[int, str] = {}
        for one in seen:
            found = re.match(r"(?:.*?\.)??(?:\w+\.)*?(\d+)\.", names[id(one.module)] + ".")
            if found is None:
                raise NotASubject(f"{names[id(one.module)]} of {kind} is no layer of a list. {CONVERT}")
            layer = int(found[1])
            if layer in places:
                raise NotASubject(
                    f"Layer {layer} of {kind} asks the attention interface more than once in a run. {CONVERT}"
                )
            places[layer] = names[id(one.module)][: found.end(1)]
        stack = self.theirs.get_submodule(places[min(places)].rsplit(".", 1)[0])
        missing = sorted(set(range(len(stack))) - set(places))  # type: ignore[arg-type]
        if missing:
            raise NotASubject(
                f"Layers {missing} of {kind} have no attention that asks transformers' interface. {CONVERT}"
            )
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

    def _watch(self, layer: int, module: nn.Module) -> None:
        """Pass the stream by the hook points where a block of theirs begins and ends."""

        def mine() -> bool:
            return getattr(_running, "subject", None) is self

        def before(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
            if not mine():
                return None
            if given:
                return (self.blocks[layer].hook_resid_pre(given[0]), *given[1:]), named
            return given, named | {"hidden_states": self.blocks[layer].hook_resid_pre(named["hidden_states"])}

        def after(module: nn.Module, given: tuple[Any, ...], output: Any) -> Any:
            if not mine():
                return None
            stream = self.blocks[layer].hook_resid_post(output if isinstance(output, Tensor) else output[0])
            _running.stream = stream  # of the last block, when the run is over
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
        """As `Decoder.forward`, without states, facts and parts of the depth: `stop_at_layer` may be n_layers only (the last stream).

        Raises:
            ValueError: tokens out of the vocabulary or too long, a mask of a wrong shape, an option that only our own modules have.
            NotASubject: a layer did not ask the attention interface exactly once.
        """
        wanted = sorted(name for name, value in others.items() if value not in (None, False))
        if stop_at_layer not in (None, self.n_layers):
            wanted.append("stop_at_layer")
        if wanted:
            raise ValueError(f"{wanted[0]} needs the inside of the model, which is transformers' here. {CONVERT}")
        if return_type not in ("logits", "loss", "both", None):
            raise ValueError(f"Unknown return_type {return_type!r}. Expected 'logits', 'loss', 'both' or None.")
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
            logits = self._call(tokens, mask, True)
        finally:
            ACTIVE.step, ACTIVE.offset = outer
        if stop_at_layer is not None:
            stream: Tensor = _running.stream
            return stream
        if return_type in ("logits", None):
            return logits if return_type else None
        loss = next_token_loss(logits, tokens, mask, per_token=loss_per_token)
        return loss if return_type == "loss" else (logits, loss)

    def _call(self, tokens: Tensor, mask: Tensor | None, counted: bool = False) -> Tensor:
        given: dict[str, Any] = {"input_ids": tokens}
        if mask is not None:
            given["attention_mask"] = mask.long()
            if self.causal and "position_ids" in self._takes:
                given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        if "use_cache" in self._takes or "kwargs" in self._takes:
            given["use_cache"] = False
        if not counted:
            return _numbers(self.theirs(**given))
        if self.theirs.config._attn_implementation != NAME:  # somebody chose another one meanwhile
            _implement(self.theirs, NAME)
        with _entered(self) as calls:
            output = _numbers(self.theirs(**given))
        for layer, mixer in enumerate(self.mixers):
            if calls.count(id(mixer)) != 1:
                raise NotASubject(
                    f"Layer {layer} of {type(self.theirs).__name__} asked the attention interface {calls.count(id(mixer))} times in this "
                    f"run, once was expected: hooks there would not do what they say. {CONVERT}"
                )
        return output

    def _attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **extra: Any
    ) -> Any:
        mixer = self._by_module.get(id(module))
        if mixer is None:
            raise NotASubject(f"{type(module).__name__} attends, but did not when the model was wrapped. {CONVERT}")
        _running.calls.append(id(mixer))
        return mixer.attend(query, key, value, mask, extra)

    def generate(self, tokens: Any, max_new_tokens: int = 32, *, use_state: bool = False, **options: Any) -> Tensor:
        """As `Decoder.generate`, re-reading the whole text at every step.

        Raises:
            ValueError: `use_state`, as no state is carried here.
        """
        if use_state:
            raise ValueError(f"A transformers model carries no state of ours. Expected use_state=False. {CONVERT}")
        return super().generate(tokens, max_new_tokens, use_state=False, **options)

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


# ----------------------------------------------------------------------------------------------- the attention function


class _Seen:
    """What one call of the attention interface tells of its layer."""

    def __init__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> None:
        self.module, self.scale = module, scale
        self.n_heads, self.n_kv = query.shape[1], key.shape[1]
        self.d_head, self.d_value = query.shape[3], value.shape[3]
        ahead = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).triu(1)
        self.causal = mask is not None and not bool(((mask > _hidden(mask)) & ahead).any())


class _Listener:
    """Stands in for a subject while its layers are found."""

    def __init__(self, seen: list[_Seen]) -> None:
        self.seen = seen

    def _attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float, **extra: Any
    ) -> Any:
        self.seen.append(_Seen(module, query, key, value, mask, scale))
        return _attend(query, key, value, mask, scale, extra)


@contextmanager
def _entered(subject: Any) -> Iterator[list[int]]:
    """Calls of the attention function in this thread go to `subject`; gives the list that it notes them in."""
    outer = getattr(_running, "subject", None), getattr(_running, "calls", [])
    _running.subject, _running.calls = subject, []
    try:
        yield _running.calls
    finally:
        _running.subject, _running.calls = outer


def _implement(theirs: Any, name: str) -> None:
    """Choose an attention implementation, ours registered first."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(NAME, _interface)
    AttentionMaskInterface.register(NAME, eager_mask)
    theirs.set_attn_implementation(name)


def _interface(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    **extra: Any,
) -> Any:
    """What transformers calls: to the subject that runs in this thread, or plainly eager if none does."""
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    mask = None if mask is None else mask[..., : key.shape[2]]
    subject = getattr(_running, "subject", None)
    if isinstance(subject, _Listener):
        return subject._attention(module, query, key, value, mask, scale, **extra)
    if subject is not None:
        return subject._attention(module, query, key, value, mask, **extra)
    return _attend(query, key, value, mask, scale, extra)


def _same(x: Tensor) -> Tensor:
    return x


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    extra: Mapping[str, Any],
    at_scores: Any = _same,
    at_pattern: Any = _same,
    at_z: Any = _same,
) -> tuple[Tensor, Tensor]:
    """Eager attention: [batch, head, pos, d_head], [batch, kv_head, key, ...] -> z [batch, pos, head, d_value], [batch, head, pos, key]."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) if repeats > 1 else x for x in (key, value))
    scores = query @ key.transpose(2, 3) * scale
    if extra.get("softcap") is not None:
        scores = extra["softcap"] * (scores / extra["softcap"]).tanh()
    if extra.get("position_bias") is not None:
        scores = scores + extra["position_bias"]
    if mask is not None:
        hidden = mask <= _hidden(mask)
        empty = hidden.all(-1, keepdim=True)  # rows of padding: theirs read everything alike, which nobody sees
        scores = scores + mask.masked_fill(hidden & ~empty, float("-inf"))
    scores = at_scores(scores)
    precise = scores.dtype if scores.dtype == torch.float64 else torch.float32
    pattern = at_pattern(scores.softmax(-1, dtype=precise).to(value.dtype))
    return at_z((pattern @ value).transpose(1, 2)).contiguous(), pattern


def _hidden(mask: Tensor) -> float:
    """At most this much is added where a query may not read."""
    return torch.finfo(mask.dtype).min / 2


def _numbers(output: Any) -> Tensor:
    """Logits of a model's output, of an encoder its last hidden state."""
    logits = getattr(output, "logits", None)
    return output.last_hidden_state if logits is None else logits  # type: ignore[no-any-return]


def _unbridged(theirs: nn.Module) -> nn.Module:
    """The same parameters in the modules that a bridge put its own in place of (they attend themselves). The bridge is left alone."""
    shared = {id(tensor): tensor for tensor in (*theirs.parameters(), *theirs.buffers())}
    made: nn.Module = copy.deepcopy(theirs, shared)  # type: ignore[arg-type]
    pending = [made]
    while pending:
        module = pending.pop()
        for name, part in list(module._modules.items()):
            while part is not None and getattr(part, "original_component", None) is not None:
                part = part.original_component  # type: ignore[assignment]
            module._modules[name] = part
            if part is not None:
                pending.append(part)
    return made


def _checked(model: Any) -> Any:
    from transformers import PreTrainedModel

    theirs = model if isinstance(model, PreTrainedModel) else getattr(model, "original_model", model)
    if theirs is not model:
        theirs = _unbridged(theirs)
    if not isinstance(theirs, PreTrainedModel):
        raise NotASubject(
            f"{type(model).__name__} is no transformers model. Expected a PreTrainedModel, or a bridge with an original_model."
        )
    if theirs.config.is_encoder_decoder:
        raise NotASubject(f"{type(theirs).__name__} has an encoder and a decoder. {CONVERT}")
    return theirs
