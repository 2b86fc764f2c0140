"""Titans with memory as context, MAC (Behrouz, Zhong & Mirrokni 2024, arXiv 2501.00663, section 4.1): attention reads what memory recalls.

Tokens come in segments. M is the memory at the start of the running one, M_t the memory once token t is learned:

    h_t = M(q_t),  q_t = unit(SiLU(W_Q x_t))                       what the segment's start remembers       hook_retrieved[t]
    y_t = attention of x_t over [P ‖ h_j ‖ x_j],  j ≤ t in the segment        P: learned tokens             hook_y[t]
    M_t learns from y_t                                            neural_memory.py, with y in place of x   hook_state[t]
    out = W_O( norm(y) ⊙ σ(norm(M_t(q(y_t)))) ⊙ SiLU(W_G x) )

As printed, the segment attends to the whole retrieved sequence, so that a token sees what later tokens of its segment retrieve. Here it
sees what it and earlier tokens retrieve, and the memory that gates y_t has learned no token after t: the layer is causal. How y and the
memory's answer are combined is not determined by the text; it is done as in `titans.py`.

What reaches what: a segment needs the memory that earlier ones left, so everything behind the retrieval exists only token by token while
the layer runs. An edit of `hook_retrieved[t]`, `hook_y[t]` or a state at t therefore reaches everything later, the next segments'
retrieval included; so does an edit of the queries of the retrieval and of attention, and of keys and values of tokens, which fire once
with the whole call before it runs. What the memory made of y (its keys, values, gates) and the attention pattern are reported once, with
the whole call, when it has run. Edits of `hook_z` change the output alone. `hook_pattern` is the memory's, with its keys and values as
they were: how strongly M_t(q(y_t)) moves with the values that earlier tokens wrote.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.fast_weight_memory import Carry
from models.context import Context, allowed, to_add
from models.mixers import register_mixer
from models.parts.norms import Norm
from models.recurrent.neural_memory import MemoryConfig, NeuralMemory, ShowsItsMemory
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.patterns import PatternMeta

PARTS = ("retrieved_", "")
KEPT = ("key", "value", "retrieved_key", "retrieved_value")  # of tokens and of what they retrieved, for attention


@dataclass(frozen=True)
class TitansContextConfig(MemoryConfig):
    """Args: those of `MemoryConfig`. segment: tokens that attention reads together. n_persistent: learned tokens that every token
    can read."""

    segment: int = 32
    n_persistent: int = 4
    norm_eps: float = 1e-6
    kind: str = "titans_context"


class Collected:
    """Stands in for hook points while a layer runs in pieces: keeps what they would have been given, to fire them once afterwards."""

    def __init__(self) -> None:
        self.pieces: dict[HookPoint, list[Tensor]] = {}

    def __call__(self, point: HookPoint, x: Tensor) -> Tensor:
        self.pieces.setdefault(point, []).append(x)
        return x

    def report(self) -> None:
        """Fire every point with the whole call's tensor."""
        for point, parts in self.pieces.items():
            if point.active:
                point(torch.cat(parts, point.axes.index("pos" if "pos" in point.axes else "query")))


@register_mixer(TitansContextConfig)
class TitansContext(ShowsItsMemory, nn.Module):
    """The MAC mixer of one layer. [batch, pos, d_model] -> same."""

    def __init__(self, config: TitansContextConfig, d_model: int, switches: dict[str, bool]) -> None:
        super().__init__()
        if config.segment < 1:
            raise ValueError(f"segment is {config.segment}; expected at least 1 token.")
        self.config = config
        self.memory = NeuralMemory(config, d_model, reports_only=True)
        self.n_heads, self.d_head = self.memory.n_heads, self.memory.d_head
        self.slots = (*self.memory.slots, "start", *KEPT)
        self.retrieve, self.query, self.key, self.value = (nn.Linear(d_model, d_model, bias=False) for _ in range(4))
        self.persistent_key = nn.Parameter(torch.empty(config.n_persistent, self.n_heads, self.d_head))
        self.persistent_value = nn.Parameter(torch.empty(config.n_persistent, self.n_heads, self.d_head))
        self.memory_norm = Norm("rms", d_model, config.norm_eps)
        self.attention_norm = Norm("rms", d_model, config.norm_eps)
        self.gate = nn.Linear(d_model, d_model, bias=False)
        self.output = nn.Linear(d_model, d_model, bias=False)
        axes = "batch pos head d_head"
        self.hook_retrieval_q = HookPoint("retrieval_query", axes)
        self.hook_attention_q = HookPoint("attention_query", axes)
        self.hook_attention_k = HookPoint("attention_key", axes)
        self.hook_attention_v = HookPoint("attention_value", axes)
        self.hook_retrieved = HookPoint("retrieved", "batch head d_head", per_position=True)
        self.hook_y = HookPoint("memory_input", "batch head d_head", per_position=True)
        meta = PatternMeta(columns="persistent, retrieved or segment token")
        self.hook_attention = HookPoint(
            "attention", "batch head query source", editable=False, on_demand=True, meta=meta
        )
        self.hook_gate = HookPoint("gate", "batch pos channel")

    def forward(
        self, x: Tensor, context: Context, carried: dict[str, Tensor] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """x [batch, pos, d_model]. Carries the memory's slots, the memory at the start of the segment, and keys and values of attention."""
        shape = (self.n_heads, self.d_head)
        asked = F.normalize(F.silu(self.retrieve(x)).unflatten(-1, shape), dim=-1, eps=1e-6)
        asked = self.hook_retrieval_q(asked)
        q = self.hook_attention_q(self.query(x).unflatten(-1, shape))
        k = self.hook_attention_k(self.key(x).unflatten(-1, shape))
        v = self.hook_attention_v(self.value(x).unflatten(-1, shape))
        initial = self.memory.initial(x, carried)
        carry, window = initial, None if carried is None else carried["conv"]
        start = _weights(carry) if carried is None else carried["start"]
        seen = {name: [x.new_zeros(x.shape[0], 0, *shape) if carried is None else carried[name]] for name in KEPT}
        core, offset, length = self.memory.core, context.offset, x.shape[1]
        points = (self.hook_retrieved, self.hook_y)
        watched = {point: set(point.stops(offset, length)) for point in points if point.active}
        stops, watch = core.stops(context, length), Collected()
        learned: dict[str, list[Tensor]] = {}
        ys, answers = [], []
        for begin, end in self._pieces(context, length):
            part = _piece(context, begin, end)
            start = torch.where(self._starts(part), _weights(carry), start)
            h = (
                self.memory.recall(start, asked[:, begin:end].transpose(1, 2).to(start.dtype))
                .to(x.dtype)
                .transpose(1, 2)
            )
            h = _edited(self.hook_retrieved, watched, h, begin, offset).flatten(-2)
            new = (
                k[:, begin:end],
                v[:, begin:end],
                *(layer(h).unflatten(-1, shape) for layer in (self.key, self.value)),
            )
            for name, tokens in zip(KEPT, new, strict=True):
                seen[name].append(tokens)
            y = self._attend(q[:, begin:end], seen, part, watch, offset + length)
            ys.append(_edited(self.hook_y, watched, y, begin, offset).flatten(-2))
            tokens, window = self.memory.project(ys[-1], part, window, watch)
            z, signals, carry = core.learn(tokens, part, carry, [t - begin for t in stops if begin <= t < end])
            answers.append(z)
            for name, value in tokens.items():
                learned.setdefault(name, []).extend([] if value is None else [value])
            watch(core.hook_loss, signals.loss)
            watch(core.hook_surprise, signals.surprise)
        watch.report()
        everything = {name: torch.cat(parts, 2) if parts else None for name, parts in learned.items()}
        z = core.watched(torch.cat(answers, 2), everything, context, initial)
        z = self.memory.hook_z(z.transpose(1, 2))
        mixed = self.attention_norm(torch.cat(ys, 1)) * torch.sigmoid(self.memory_norm(z.flatten(-2)))
        out = self.output(mixed * self.hook_gate(F.silu(self.gate(x))))
        if not context.keep_state:
            return out, {}
        assert isinstance(carry, Carry) and window is not None
        kept = {name: torch.cat(parts, 1) for name, parts in seen.items()}
        return out, {**self.memory.carried(carry, window), "start": start, **kept}

    def _pieces(self, context: Context, length: int) -> list[tuple[int, int]]:
        """(begin, end) of runs of tokens within which no sequence begins a segment."""
        begins = (
            context.positions.expand(1 if context.mask is None else len(context.mask), -1) % self.config.segment == 0
        )
        if context.mask is not None:
            begins = begins & context.mask
        edges = [t for t in begins.any(0).nonzero().flatten().tolist() if t] if length else []
        return list(zip([0, *edges], [*edges, length], strict=True))

    def _starts(self, part: Context) -> Tensor:
        """Which sequences begin a segment with the first token of this piece, [batch or 1, 1, 1, 1]."""
        first = part.positions[:, :1] % self.config.segment == 0
        return (first if part.mask is None else first & part.mask[:, :1])[..., None, None]

    def _attend(self, q: Tensor, seen: dict[str, list[Tensor]], part: Context, watch: Collected, total: int) -> Tensor:
        """q [batch, pos, head, d_head] over learned, retrieved and segment tokens -> [batch, pos, head, d_head]."""
        batch, length = q.shape[:2]
        segment, sources = self.config.segment, part.key_positions.shape[-1]
        same = part.positions[:, :, None] // segment == part.key_positions[:, None, :] // segment
        visible = allowed(part, length, q.device) & same
        visible = visible | part.itself(length, q.device)[0]  # padding reads itself, so that no row is empty
        low = int(visible.any(1).any(0).nonzero()[0])  # nobody here reads what comes before
        keys, values = (
            torch.cat(
                [own.expand(batch, -1, -1, -1), *(torch.cat(seen[f"{which}{name}"], 1)[:, low:] for which in PARTS)], 1
            )
            for name, own in (("key", self.persistent_key), ("value", self.persistent_value))
        )
        readable = F.pad(visible[..., low:].repeat(1, 1, 2), (len(self.persistent_key), 0), value=True)
        scores = torch.einsum("bqhd,bshd->bhqs", q, keys) * self.d_head**-0.5 + to_add(readable, q.dtype)[:, None]
        weights = scores.softmax(-1)
        if self.hook_attention.active:
            learned, *others = weights.split([len(self.persistent_key), sources - low, sources - low], -1)
            watch(self.hook_attention, torch.cat([learned, *(F.pad(w, (low, total - sources)) for w in others)], -1))
        return torch.einsum("bhqs,bshd->bqhd", weights, values)


def _weights(carry: Carry | Tensor) -> Tensor:
    return carry.state if isinstance(carry, Carry) else carry


def _piece(context: Context, begin: int, end: int) -> Context:
    """What holds of tokens begin … end − 1 of the call, as if they were a call of their own."""
    offset = context.offset
    return replace(
        context,
        positions=context.positions[:, begin:end],
        key_positions=context.key_positions[:, : offset + end],
        mask=None if context.mask is None else context.mask[:, begin:end],
        key_mask=None if context.key_mask is None else context.key_mask[:, : offset + end],
        offset=offset + begin,
        memo={},
    )


def _edited(point: HookPoint, watched: dict[HookPoint, set[int]], x: Tensor, begin: int, offset: int) -> Tensor:
    """x [batch, pos, head, d_head] of a piece, once its watched positions were handed out."""
    here = [t for t in sorted(watched.get(point, ())) if begin <= t < begin + x.shape[1]]
    if not here:
        return x
    columns = list(x.unbind(1))
    for t in here:
        columns[t - begin] = point.at(offset + t, columns[t - begin])
    return torch.stack(columns, 1)
